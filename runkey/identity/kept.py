"""Values that are a function of a file's contents and take long to make, kept between commands.

with kept_values(home / KEPT):
    digest = keep(f"code {path} {sha256}", lambda: digest_of(path, data))
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

from runkey.files import FormatError, read_json, read_plain, write_json
from runkey.hashing import sha256_bytes, sha256_json

KEPT = "kept.json"
"""File in `Store.home`."""
_MOST = 2000
_values: dict[str, Any] = {}


class _Stored(TypedDict):
    check: str
    """Hash of the values, and of the code and Python that made them."""
    values: dict[str, Any]


@contextmanager
def kept_values(file: Path) -> Iterator[None]:
    """Take values that were kept before from `file`, and add new ones to it.

    A damaged file, or one of another version of this room or of Python, is written anew; where no
    file can be written, all values are made each time.
    """
    with suppress(OSError, FormatError):
        stored = read_json(file, _Stored)
        if stored["check"] == _check(stored["values"]):
            _values.update(stored["values"])
    before = set(_values)
    yield
    if new := _values.keys() - before:
        values = _values if len(_values) < _MOST else {name: _values[name] for name in new}
        with suppress(OSError):
            write_json(file, {"check": _check(values), "values": values})


def keep[T](name: str, make: Callable[[], T]) -> T:
    """Return the kept value of that name, which says of what it is; else make it.

    Args:
        name: must hold the hash of all that the value depends on, but for this room's code.
        make: its value is one that JSON gives back equal.
    """
    if name not in _values:
        _values[name] = make()
    value: T = _values[name]
    return value


def _check(values: dict[str, Any]) -> str:
    return sha256_json([_makers(), values])


@cache
def _makers() -> list[str]:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [sys.version, *(sha256_bytes(read_plain(file)) for file in files)]
