"""DVC's settings and its lists of files, read as files: DVC itself is not imported."""

from __future__ import annotations

import configparser
import hashlib
import json
import os
from pathlib import Path, PurePosixPath

from runkey.errors import RegistryError
from runkey.identity.errors import RecipeError


def md5_below(file: str, tracked: PurePosixPath, md5: str, path: str, root: Path) -> str:
    """The md5 that `dvc add <path>` would give a part of a folder that DVC tracks as a whole.

    Args:
        file: the folder's .dvc file, said in errors.
        tracked: the folder, relative to `root`.
        md5: of the folder; its list of files, `{md5, relpath}` each, is read from DVC's cache.
        path: a folder or file in it, relative to `root`.
        root: the repository.

    Raises:
        RecipeError: the list is not in the cache, or holds nothing at `path`.
    """
    inner = PurePosixPath(path).relative_to(tracked).as_posix()
    listed = _read_list(md5, root)
    if listed is None:
        raise RecipeError(
            f"{file}: the md5 of {path}, a part of {tracked}, is not known, since DVC's cache does"
            f" not hold the list of files in {tracked}; run `dvc pull {file}`"
        )
    if inner in listed:
        return listed[inner]
    below = f"{inner}/"
    part = [
        {"md5": listed[name], "relpath": name.removeprefix(below)}
        for name in sorted(listed)
        if name.startswith(below)
    ]
    if not part:
        raise RecipeError(f"{file}: {tracked} has no {inner}; `dvc add {tracked}` lists it anew")
    digest = hashlib.md5(json.dumps(part, sort_keys=True).encode(), usedforsecurity=False)
    return f"{digest.hexdigest()}.dir"


def _read_list(md5: str, root: Path) -> dict[str, str] | None:
    """md5 by path of the files in a folder; None if its list is not in the cache, or torn."""
    folder = cache_folder(root)
    # The latter is where DVC 2 put it.
    for base in (folder / "files" / "md5", folder):
        try:
            items = json.loads((base / md5[:2] / md5[2:]).read_bytes())
            return {str(item["relpath"]): str(item["md5"]) for item in items}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def cache_folder(root: Path) -> Path:
    """Where a checkout's DVC keeps its cache: `cache.dir` of its settings, else .dvc/cache.

    Raises:
        RegistryError: a settings file cannot be read.
    """
    folder = root / ".dvc" / "cache"
    for file in (_user_config(), root / ".dvc" / "config", root / ".dvc" / "config.local"):
        value = read_config(file).get("cache", "dir", fallback="").strip("\"'")
        if value:
            folder = (file.parent / Path(value).expanduser()).resolve()
    return folder


def _user_config() -> Path:
    named = os.environ.get("DVC_GLOBAL_CONFIG_DIR")
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return (Path(named) if named else Path(base).expanduser() / "dvc") / "config"


def read_config(path: Path) -> configparser.ConfigParser:
    """One of DVC's settings files; empty if it is not there.

    Raises:
        RegistryError: it is none.
    """
    config = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        config.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        raise RegistryError(f"{path}: not a DVC settings file; `dvc config -l` says more") from None
    return config
