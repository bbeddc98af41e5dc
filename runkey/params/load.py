"""Read params.yaml and say in one line what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from runkey.errors import ParamsError
from runkey.params.root import Params


def load_params(path: Path) -> Params:
    """The checked parameters of a YAML 1.2 file.

    Raises:
        ParamsError: the file is missing or no YAML, or a key is unknown, of a wrong type or out of
            range; the text has a line per fault with key, value and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ParamsError(f"{path.name}: not found; `make preset NAME=sample` makes one") from None
    except OSError as error:
        raise ParamsError(f"{path.name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path.name}: not UTF-8 text ({error.reason})") from None
    try:
        tree = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}" if mark else ""
        raise ParamsError(f"{path.name}{where}: not YAML: {error.problem}") from None
    except YAMLError as error:
        raise ParamsError(f"{path.name}: not YAML: {' '.join(str(error).split())}") from None
    return parse_params(tree, path.name)


def parse_params(tree: Any, source: str = "params.yaml") -> Params:
    """The checked parameters of a nested dict.

    Raises:
        ParamsError: see `load_params`.
    """
    if not isinstance(tree, dict):
        raise ParamsError(f"{source}: holds no parameters; `make preset NAME=sample` makes some")
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        raise ParamsError(f"{source}: {'; '.join(_faults(error))}") from None


def _faults(error: ValidationError) -> list[str]:
    """Each faulty key once, as `key = value: what is allowed`."""
    texts: dict[str, str] = {}
    for fault in error.errors():
        where = [part for part in fault["loc"] if not _is_union_branch(part)]
        name = ".".join(str(part) for part in where)
        if fault["type"] == "extra_forbidden":
            texts[name] = f"unknown key {name}{_suggest(where)}"
        elif fault["type"] == "missing":
            texts[name] = f"{name} is missing"
        elif name in texts:
            # The further branches of a union: `... or 'auto'`.
            texts[name] += f" or {_message(fault).removeprefix('should be ')}"
        else:
            texts[name] = f"{name}{_shown(fault['input'])}: {_message(fault)}"
    return [texts[name].removeprefix(": ") for name in texts]


def _shown(value: Any) -> str:
    """` = value` as YAML writes it; nothing for a section."""
    words = {"True": "true", "False": "false", "None": "null"}
    text = repr(value)
    return (
        f" = {words.get(text, text)}" if isinstance(value, str | int | float | list | None) else ""
    )


_MESSAGES = {
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "int_parsing": "should be a whole number",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "finite_number": "should be a finite number",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "string_type": "should be text",
    "tuple_type": "should be a list",
    "model_type": "should be a section with keys of its own",
    "greater_than": "should be > {gt}",
    "greater_than_equal": "should be >= {ge}",
    "less_than": "should be < {lt}",
    "less_than_equal": "should be <= {le}",
    "literal_error": "should be {expected}",
    "too_short": "should not be empty",
    "too_long": "should have at most {max_length} entries",
    "string_too_short": "should not be empty",
}


def _message(fault: Any) -> str:
    """What is allowed, in the words of params.yaml rather than Python's."""
    known = _MESSAGES.get(fault["type"])
    if known is not None:
        limits = fault.get("ctx", {})
        plain = {
            k: int(v) if isinstance(v, float) and v == int(v) else v for k, v in limits.items()
        }
        return known.format(**plain)
    return " ".join(str(fault["msg"]).removeprefix("Value error, ").split())


def _is_union_branch(part: str | int) -> bool:
    """Pydantic adds the branch of a union ("int", "literal['auto']") to the location."""
    return isinstance(part, str) and (
        "[" in part or part in ("int", "float", "str") or "constrained" in part
    )


def _suggest(where: list[str | int]) -> str:
    """`; did you mean X?` and the keys that the section knows."""
    section: type[BaseModel] = Params
    for part in where[:-1]:
        section = section.model_fields[str(part)].annotation  # type: ignore[assignment]
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(where[-1]), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


def override(params: Params, changes: Mapping[str, Any]) -> Params:
    """The same parameters with some changed.

    Args:
        params: the parameters.
        changes: values by dotted name, such as `model.backbone`.

    Raises:
        ParamsError: see `load_params`.
    """
    tree = params.model_dump()
    for name, value in changes.items():
        section, *rest = tree, *name.split(".")
        for part in rest[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ParamsError(f"{name}: {part} is no section of params.yaml")
        section[rest[-1]] = value
    return parse_params(tree)
