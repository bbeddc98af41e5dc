"""Names that come from elsewhere: which of them may become paths here."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from runkey.errors import RegistryError

_LONGEST = 1000
_DRIVE = re.compile(r"^[A-Za-z]:")
_ODD = re.compile(r"[\x00-\x1f\x7f\\]")
_RESERVED = (".git", ".dvc")


def safe_path(name: object, where: str) -> str:
    """`name`, if it is a plain relative path that stays below the folder it is joined to.

    Args:
        name: with `/` between its parts.
        where: said in errors.

    Raises:
        RegistryError: it is absolute, leaves the folder, names a drive, or has a backslash or a
            control character; or it leads into git's or DVC's own folder.
    """
    if not isinstance(name, str) or not name or len(name) > _LONGEST:
        raise RegistryError(f"{where}: {str(name)[:60]!r} is no name of a file; refused")
    why = None
    if _ODD.search(name):
        why = "has a backslash or a control character"
    elif name.startswith("/") or _DRIVE.match(name):
        why = "is absolute"
    elif ".." in name.split("/"):
        why = "leaves its folder"
    elif PurePosixPath(name).as_posix() != name:
        why = "is not in its shortest form"
    elif any(part.lower() in _RESERVED for part in name.split("/")):
        why = "leads into .git or .dvc"
    if why:
        raise RegistryError(f"{where}: the name {name!r} {why}; refused")
    return name
