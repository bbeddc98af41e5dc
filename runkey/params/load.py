"""Read params.yaml, report every fault in it in one line, and compare values with the defaults."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from runkey.errors import ParamsError
from runkey.files import FormatError, check_tree, check_yaml, read_text
from runkey.params.schema import Params
from runkey.paths import LOGIN, Address
from runkey.units import KIB

_LARGEST = 256 * KIB
"""Bytes; ruamel reads 0.1 MB in a second."""
_LONGEST = 200
"""Characters of what a message says of a value."""
_SHORT = reprlib.Repr(maxstring=_LONGEST, maxlist=20, maxother=_LONGEST)


def load_params(path: Path) -> Params:
    """Read and check a YAML 1.2 file.

    Raises:
        ParamsError: the file is missing or not YAML, or a key is unknown, of a wrong type or out of
            range.  The one-line message names each faulty key, its value and what is allowed.
    """
    try:
        tree = parse_yaml(read_text(path, _LARGEST))
    except FileNotFoundError:
        raise ParamsError(f"{path.name}: not found; run `make preset NAME=sample`") from None
    except FormatError as error:
        raise ParamsError(
            f"{path.name}: {error}; mend it, or get the last one back from git"
        ) from None
    return parse_params(tree, path.name)


def parse_yaml(text: str) -> Any:
    """Parse YAML 1.2, as DVC reads params.yaml; FormatError says what is wrong, and where."""
    try:
        return check_tree(YAML(typ="safe", pure=True).load(check_yaml(text)))
    except FormatError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise FormatError(f"not YAML ({where}{_one_line(error.problem)})") from None
    # What Python says to the value: ruamel makes dates and numbers without checking them first.
    except Exception as error:  # noqa: BLE001
        raise FormatError(f"not YAML ({_one_line(error)})") from None


def _one_line(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."


def parse_params(tree: Any, source: str = "params.yaml") -> Params:
    """Check a nested dict, called `source` in errors; raises as `load_params`."""
    if not isinstance(tree, dict):
        raise ParamsError(f"{source}: holds no parameters; run `make preset NAME=sample`")
    for name, value in _texts(tree):
        if (address := Address(value)).hides:
            raise ParamsError(
                f"{source}: {name} holds a login, which git and every run would keep; write"
                f" {address}, and {LOGIN}"
            )
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        raise ParamsError(f"{source}: {'; '.join(_faults(error))}") from None


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in nested values with its dotted name."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict | list):
        for part, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{name}.{part}".lstrip("."))


def _faults(error: ValidationError) -> list[str]:
    """Return `key = value: what is allowed` for each faulty key."""
    texts: dict[str, str] = {}
    for fault in error.errors():
        where = [part for part in fault["loc"] if not _is_union_branch(part)]
        name = ".".join(str(part) for part in where)
        if any(known.startswith(f"{name}.") for known in texts):
            continue  # of a list whose entry is named already
        if fault["type"] == "extra_forbidden":
            texts[name] = f"unknown key {name}{_suggest(where)}"
        elif fault["type"] == "missing":
            texts[name] = f"{name} is missing"
        elif name in texts:
            # Another branch of a union: `... or 'auto'`.
            texts[name] += f" or {_message(fault).removeprefix('should be ')}"
        else:
            texts[name] = f"{name}{_shown(fault['input'])}: {_message(fault)}"
    return [texts[name].removeprefix(": ") for name in texts]


def _shown(value: Any) -> str:
    """Return ` = value` in YAML's spelling; nothing for a section."""
    words = {"True": "true", "False": "false", "None": "null"}
    if not isinstance(value, str | int | float | list | None):
        return ""
    shown = _SHORT.repr(value)
    return f" = {words.get(shown, shown)}"


_MESSAGES = {
    **dict.fromkeys(("float_parsing", "float_type"), "should be a number"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "should be a whole number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "should be true or false"),
    **dict.fromkeys(("too_short", "string_too_short"), "should not be empty"),
    "finite_number": "should be a finite number",
    "string_type": "should be text",
    "tuple_type": "should be a list",
    "model_type": "should be a section with keys of its own",
    "greater_than": "should be > {gt:.12g}",
    "greater_than_equal": "should be >= {ge:.12g}",
    "less_than": "should be < {lt:.12g}",
    "less_than_equal": "should be <= {le:.12g}",
    "literal_error": "should be {expected}",
    "too_long": "should have at most {max_length} entries",
}


def _message(fault: Any) -> str:
    """Say what is allowed, in YAML's words instead of Python's."""
    known = _MESSAGES.get(fault["type"])
    if known is not None:
        return known.format(**fault.get("ctx", {}))
    return " ".join(str(fault["msg"]).removeprefix("Value error, ").split())


def _is_union_branch(part: str | int) -> bool:
    # Pydantic puts the branch of a union ("int", "literal['auto']") into the location.
    return isinstance(part, str) and (
        "[" in part or part in ("int", "float", "str") or "constrained" in part
    )


def _suggest(where: list[str | int]) -> str:
    """Return `; did you mean X?` and the known keys of the section."""
    section: type[BaseModel] = Params
    for part in where[:-1]:
        section = section.model_fields[str(part)].annotation  # type: ignore[assignment]
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(where[-1]), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


def override(params: Params, changes: Mapping[str, Any]) -> Params:
    """Return a copy with some values changed, by dotted name such as `model.backbone`.

    Raises:
        ParamsError: as `load_params`.
    """
    tree = params.written()
    set_values(tree, changes)
    return parse_params(tree)


def set_values(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Set values by dotted name in the tree of a params.yaml; ParamsError if one cannot be."""
    for name, value in changes.items():
        section, *rest = tree, *name.split(".")
        for part in rest[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ParamsError(f"{name}: {part} is not a section of params.yaml")
        section[rest[-1]] = value


def as_text(value: object) -> str:
    """Format a value as MLflow and run records store it: 5e-05, true, [120, 140], none."""
    return value if isinstance(value, str) else json.dumps(value)


def changed_params(values: Mapping[str, str]) -> dict[str, str]:
    """Return the values, by dotted name as text, that differ from the schema's defaults."""
    without_default = {"lr": 1.0, "seed": 0}
    defaults = parse_params(without_default).flat(runtime=True).items()
    usual = {name: as_text(value) for name, value in defaults if name not in without_default}
    return {name: value for name, value in values.items() if value != usual.get(name)}
