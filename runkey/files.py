"""Write files whole or not at all; read other programs' files with limits.

`read_json`, `parse_json` and `read_text` are the one way in for text that the program did not make
in the same process: size, encoding, depth, digits, repeated names and types are checked, and every
fault is a `FormatError` with one line of text. `runkey.identity.dvc_yaml` and `runkey.params` read
YAML with `check_yaml` and `check_tree`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedReader
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from runkey.errors import RunkeyError
from runkey.units import MIB, format_bytes

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SMALL, LARGE = 16 * MIB, 4096 * MIB
"""Most bytes of a file about a run, and of one with an entry for each image or detection."""
_DEEPEST = 100
"""Levels of nesting; no file of ours, DVC's or MLflow's has 20."""
_LONGEST_NUMBER = 40
"""Digits; the largest whole numbers here have 19."""
_MANY_VALUES = 100_000
_SURROGATE = re.compile("[\ud800-\udfff]")
_BRACKET = re.compile(r"[\[\]{}]")
_DEEP_BLOCK = re.compile(rf"^[ \t?:-]{{{2 * _DEEPEST}}}", re.MULTILINE)


class FormatError(ValueError):
    """A file, or text from elsewhere, cannot be read; the text says what is wrong in one line."""


class WriteError(RunkeyError, OSError):
    """A file cannot be written: a full disk, a missing right; an older one is as it was."""

    def __init__(self, path: Path, error: OSError, wanted: int = 0) -> None:
        """Args: path: of the file. error: what the system said. wanted: bytes of the file."""
        text = f"{path}: cannot be written ({error.strerror or error})"
        if error.errno in _NO_ROOM:
            text += f"; {room(path, wanted)}; make room there and run it again"
        super().__init__(error.errno, error.strerror or str(error), str(path))
        self.text = text

    def __str__(self) -> str:
        return self.text


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def room(path: Path, wanted: int) -> str:
    """Say how many bytes a file or folder needs, and how many its disk has left."""
    parent = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
    has = f"{format_bytes(shutil.disk_usage(parent).free)} are free in {parent}"
    return f"{format_bytes(wanted)} are wanted, {has}" if wanted else has


@contextmanager
def replacing(
    path: Path, folder: Path | None = None, mode: int = 0o666, wanted: int = 0
) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path`, on the disk, when the block ends well.

    It is beside `path`, or in `folder`. Its name cannot be guessed and no link is followed, since
    the folder may be one that others write to, such as /tmp. `mode` is subject to the umask.
    Missing parent folders are made.

    Raises:
        WriteError: the file cannot be written; an older file is left as it was. `wanted` is its
            size in bytes, for the message.
    """
    name = f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}"
    temporary = (folder or path.parent) / name
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(temporary, flags, mode), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, WriteError):
            raise WriteError(path, error, wanted) from None
        raise


def copy_atomically(source: Path, path: Path) -> None:
    """Copy a file's bytes, whole or not at all, see `replacing`."""
    with source.open("rb") as data, replacing(path, wanted=source.stat().st_size) as file:
        shutil.copyfileobj(data, file, MIB)


def write_atomically(path: Path, data: str | bytes, mode: int = 0o666) -> None:
    """Write a file as `replacing` does, which see.

    Several processes may write the same path; the last one wins. Missing parent folders are made.
    """
    content = data.encode() if isinstance(data, str) else data
    with replacing(path, mode=mode, wanted=len(content)) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinities are refused (ValueError)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


# Reading.

_NOT_PLAIN = "a folder or a device, not a file"


def open_plain(path: Path) -> BufferedReader:
    """Open a file to read its bytes; OSError if there is none, or it is no plain file.

    Reading a pipe without a writer never returns, and /dev/zero never ends.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, _NOT_PLAIN, str(path))
    return os.fdopen(file, "rb")


def read_plain(path: Path, most: int | None = None) -> bytes:
    """Read a file's bytes, see `open_plain`; OSError also if they are more than `most`."""
    with open_plain(path) as file:
        if most is None:
            return file.read()
        data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if data is None or len(data) > most:
        text = f"larger than {format_bytes(most)}, the most that is read"
        raise OSError(errno.EFBIG, text, str(path))
    return data


def read_text(path: Path, most: int = SMALL) -> str:
    """Read text in UTF-8, with or without a byte order mark, or in UTF-16 or UTF-32 as JSON may be.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it is no plain file, cannot be read, is larger than `most` bytes or no text.
    """
    try:
        return decode(read_plain(path, most))
    except FileNotFoundError:
        raise
    except OSError as error:
        ours = error.strerror == _NOT_PLAIN or error.errno == errno.EFBIG
        why = error.strerror if ours else f"cannot be read ({error.strerror})"
        raise FormatError(why) from None


def decode(data: bytes) -> str:
    """Return bytes as text, see `read_text`; FormatError says at which byte they are none."""
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise FormatError(f"byte {error.start} is not UTF-8") from None


def read_json(path: Path, form: Any = Any, most: int = SMALL) -> Any:
    """Read a JSON file as a dataclass, TypedDict or another type; see `read_text`, `parse_json`."""
    return parse_json(read_text(path, most), form)


def parse_json(data: str | bytes, form: Any = Any) -> Any:
    """Parse JSON as a dataclass, TypedDict or another type, each value of the very type.

    Raises:
        FormatError: it is not JSON, is nested too deep, holds a name twice, a number of too many
            digits or half a character; or a value is missing or of a wrong type: the text names it.
    """
    text = decode(data) if isinstance(data, bytes) else data
    try:
        # The place of a fault, and names that are there twice, which pydantic does not see.
        tree = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise FormatError(f"not JSON ({where}: {error.msg})") from None
    except RecursionError:
        raise FormatError(f"nested more than {_DEEPEST} levels deep") from None
    if form is Any and _is_plain(text):
        return tree
    from pydantic import ValidationError  # 0.07 s

    try:
        return _adapter(form).validate_json(text, strict=True)
    except ValidationError as error:
        raise FormatError(first_fault(error)) from None


def _is_plain(text: str) -> bool:
    """Return True if JSON cannot be too deep or hold half a character, written as an escape."""
    few = text.count("{") + text.count("[") <= _DEEPEST
    return few and "\\u" not in text and (text.isascii() or not _SURROGATE.search(text))


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the dict of a JSON object; FormatError if a name is there twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"holds the name {ascii(twice)[:60]} twice")
    return made


def _whole(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise FormatError(f"holds a number of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_int=_whole)


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(form)


def expect(form: Any, value: Any) -> Any:
    """Return parsed JSON or YAML as another type; FormatError names what does not fit."""
    from pydantic import ValidationError

    try:
        return _adapter(form).validate_python(value)
    except ValidationError as error:
        raise FormatError(first_fault(error)) from None


def first_fault(error: Any) -> str:
    """Say what pydantic found wrong first, and where: `files.run.json.size: Input should be`."""
    fault = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, fault["loc"]))
    place = place[:80] if place.isprintable() else ascii(place[:80])
    shown = f"{place}: {fault['msg']}" if place else fault["msg"]
    return " ".join(shown.split())[:300]


def check_yaml(text: str) -> str:
    """Return the text of a YAML file; FormatError if it is nested so deep that parsers crash.

    libyaml's loader in C ends the process at 50,000 brackets.
    """
    steps = (1 if bracket in "[{" else -1 for bracket in _BRACKET.findall(text))
    if max(accumulate(steps), default=0) > _DEEPEST or _DEEP_BLOCK.search(text):
        raise FormatError(f"nested more than {_DEEPEST} levels deep")
    return text


def check_tree(tree: Any, most: int = _MANY_VALUES) -> Any:
    """Return a YAML tree; FormatError if it is too deep, or aliases repeat too much of it."""
    waiting, count = [(tree, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > most or depth > _DEEPEST:
            raise FormatError(f"nested more than {_DEEPEST} levels deep, or aliases of aliases")
        if isinstance(value, dict):
            waiting += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list | tuple | set):
            waiting += [(inner, depth + 1) for inner in value]
        elif isinstance(value, str) and _SURROGATE.search(value):
            raise FormatError("holds half a character (a lone surrogate)")
        elif isinstance(value, int) and abs(value) > 10**_LONGEST_NUMBER:
            raise FormatError(f"holds a number of more than {_LONGEST_NUMBER} digits")
    return tree


def json_safe(value: Any) -> Any:
    """Return the same value with floats that JSON cannot hold (nan, inf) as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a new name survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
