"""Which files a run needs to run again: what its snapshot must hold, tracked by git or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from runkey.errors import RegistryError
from runkey.identity.closure import import_closure
from runkey.identity.key import DATA_PATH, FILE_PARAMS, Recipe
from runkey.identity.manifest import REQUIREMENTS
from runkey.identity.pipeline import PIPELINE, Stage, pointer_of
from runkey.params import load_params
from runkey.paths import LOCK, PARAMS

_ALWAYS = (str(PIPELINE), str(PARAMS), str(LOCK), str(REQUIREMENTS), ".dvc/config", ".dvcignore")


def needed_files(root: Path, recipe: Recipe) -> set[str]:
    """The files that the recipe's stages need, relative to `root`, posix.

    All that they import (telemetry too, which the key leaves out), what dvc.yaml declares beside
    it, parameters, lock, weights to start from; in place of a file that DVC tracks its .dvc file.
    Of a symbolic link both the link and what it points to.

    Args:
        root: the workspace.
        recipe: made in it.

    Raises:
        RegistryError: a file is a link that leaves the repository.
    """
    flat = load_params(root / PARAMS).flat()
    paths = {path for path in _ALWAYS if (root / path).is_file()}
    paths |= set(recipe.preimages["code"]["files"])
    for name, cmd in recipe.cmd.items():
        paths |= set(import_closure(Stage(name, cmd, (), (), ()).module, root, ()))
    for dep in recipe.preimages["data"]:
        paths.add(str(flat[DATA_PATH]).rstrip("/") if dep == "data" else dep)
    paths |= {str(flat[name]) for name in FILE_PARAMS if _lies_inside(flat.get(name))}
    return {file for path in paths for file in _real_files(pointer_of(path, root) or path, root)}


def _lies_inside(value: object) -> bool:
    """Whether a parameter is a file of the repository.

    One outside it has no place in a snapshot; the key holds its hash, so that no other file can
    pass for it.
    """
    if value in (None, "none", "imagenet") or Path(str(value)).is_absolute():
        return False
    return ".." not in Path(str(value)).parts


def _real_files(path: str, root: Path) -> Iterator[str]:
    """`path` without links in it, and every link on the way."""
    home = root.resolve()
    for part in reversed((PurePosixPath(path), *PurePosixPath(path).parents[:-1])):
        link = root / part
        if not link.is_symlink():
            continue
        yield str(part)
        target = link.resolve()
        if not target.is_relative_to(home):
            raise RegistryError(
                f"{path}: a link to {link.readlink()}, outside the repository, so that no snapshot"
                " can hold what the run needs; put the file itself there"
            )
        rest = PurePosixPath(path).relative_to(part)
        yield from _real_files((target.relative_to(home) / rest).as_posix(), home)
        return
    yield path
