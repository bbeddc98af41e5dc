"""Weights from elsewhere: what their pickle would call, read without running it.

A file of `torch.save` is a zip whose `data.pkl` can name any function of any module and have it
called on loading.  A state dict needs a dozen harmless ones; a file that names anything else is
refused.  (The stages load with `weights_only=True` besides.)
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

from runkey.errors import RegistryError

_LARGEST_PICKLE = 64 << 20
"""Bytes; a state dict's own part is some 100 bytes a tensor, the numbers lie beside it."""

_STORAGES = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
_TORCH_DTYPES = (
    *("bfloat16", "bool", "float16", "float32", "float64"),
    *("int16", "int32", "int64", "int8", "uint8"),
)
ALLOWED = frozenset(
    {
        "collections OrderedDict",
        "torch Size",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
        "torch.storage UntypedStorage",
        *(f"torch {name}Storage" for name in _STORAGES),
        *(f"torch {name}" for name in _TORCH_DTYPES),
    }
)
"""`module name` of all that a state dict may name."""

_OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "LONG1"),
        *("BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_DICT"),
        *("SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE"),
        *("TUPLE1", "TUPLE2", "TUPLE3", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET"),
        *("LONG_BINGET", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
    }
)
_RAW = (".pkl", ".pickle", ".joblib", ".dill")
_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin")


def check_pickles(path: Path, name: str) -> None:
    """Refuse a file that could run code when it is loaded.

    Args:
        path: the file.
        name: what it will be called; said in errors.

    Raises:
        RegistryError: it is a raw pickle, weights in another form than torch's zip, or weights
            whose pickle names something that a state dict does not need.
    """
    lower = name.lower()
    if lower.endswith(_RAW):
        raise RegistryError(f"{name}: a pickle can run any code when it is loaded; refused")
    is_zip = zipfile.is_zipfile(path)
    if lower.endswith(_WEIGHTS) and not is_zip:
        raise RegistryError(f"{name}: not weights in torch's zip format; refused")
    if is_zip:
        _check_zip(path, name)


def _check_zip(path: Path, name: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(set(names)) < len(names):
                raise RegistryError(f"{name}: holds a member twice; refused")
            for member in members:
                if member.filename.lower().endswith(_RAW):
                    _check_member(archive, member, name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise RegistryError(f"{name}: a damaged zip ({error}); refused") from None


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> None:
    folder, _, file = member.filename.rpartition("/")
    if file != "data.pkl" or "/" in folder:
        raise RegistryError(f"{name}: holds the pickle {member.filename!r}; refused")
    with archive.open(member) as opened:
        content = opened.read(_LARGEST_PICKLE + 1)
    if len(content) > _LARGEST_PICKLE:
        raise RegistryError(f"{name}: its pickle is larger than 64 MiB; refused")
    for found in forbidden(content):
        raise RegistryError(f"{name}: loading it would use {found}; no state dict does; refused")


def forbidden(content: bytes) -> list[str]:
    """What a pickle names or does that no state dict needs, in the order it stands there."""
    found = []
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "GLOBAL":
                if argument not in ALLOWED:
                    found.append(str(argument).replace(" ", "."))
            elif opcode.name not in _OPCODES:
                found.append(f"the pickle instruction {opcode.name}")
    # pickletools raises whatever its readers of arguments do: struct.error, UnicodeDecodeError, ...
    except Exception as error:  # noqa: BLE001
        found.append(f"a broken pickle ({type(error).__name__})")
    return found
