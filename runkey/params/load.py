"""Read params.yaml and say in one line what is wrong with it."""

from __future__ import annotations

import difflib
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
        raise ParamsError("; ".join(f"{source}: {_fault(e)}" for e in error.errors())) from None


def _fault(error: Any) -> str:
    """One pydantic error as `key = value: what is allowed`."""
    where = [part for part in error["loc"] if not _is_union_branch(part)]
    name = ".".join(str(part) for part in where)
    if error["type"] == "extra_forbidden":
        return f"unknown key {name}{_suggest(where)}"
    if error["type"] == "missing":
        return f"{name} is missing"
    text = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{name} = {error['input']!r}: {text}" if _is_plain(error["input"]) else f"{name}: {text}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | None)


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
