"""Which of the repository's own files a stage can reach by import, read from their syntax trees.

    import_closure("stages.train", root)    # ("runkey/__init__.py", "runkey/data/batch.py", ...)

Nothing is imported, so this takes milliseconds and knows imports inside functions too.  What it
cannot know is a module named at run time (`importlib`); `imported_files` lists, after a run, what
was really imported, and `undeclared` compares the two.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from runkey.hashing import sha256_bytes
from runkey.identity.errors import RecipeError

EXCLUDED = (
    "runkey/__main__.py",
    "runkey/cli/",
    "runkey/identity/",
    "runkey/plots/",
    "runkey/registry/",
    "runkey/tracking/",
)
"""Files that tell about a run and do not change its results: the command line, telemetry, pictures,
and what names runs (whose meaning is in `runkey.identity.key.SCHEMA`).  A folder ends with `/`.
What only these files import is left out as well.  The list itself is part of the key."""


def is_excluded(path: str, excluded: Iterable[str] = EXCLUDED) -> bool:
    """Whether a repo-relative path is on the list of excluded files and folders."""
    return any(
        path == entry or (entry.endswith("/") and path.startswith(entry)) for entry in excluded
    )


def import_closure(module: str, root: Path, excluded: Iterable[str] = EXCLUDED) -> tuple[str, ...]:
    """Repo-relative paths of the first-party files that `python -m module` can import, sorted.

    First-party is what lies under `root`; the `__init__.py` of every package on the way counts.

    Args:
        module: dotted name of the module that is run, such as `stages.train`.
        root: the repository.
        excluded: files and folders (with a `/` at the end) that are left out and not looked into.

    Raises:
        RecipeError: there is no such module, or a file of the closure is no Python.
    """
    path = PurePosixPath(*module.split("."))
    entry = [p for p in (f"{path}.py", f"{path}/__main__.py") if (root / p).is_file()]
    if not entry:
        raise RecipeError(f"{module}: no such module in the repository; see `cmd` in dvc.yaml")
    return _reached(_files_of(module, root) + entry, root, tuple(excluded))


def _reached(start: Iterable[str], root: Path, excluded: tuple[str, ...]) -> tuple[str, ...]:
    """The files of `start` and all that they reach by import, sorted."""
    waiting, found = list(start), set[str]()
    while waiting:
        file = waiting.pop()
        if file in found or is_excluded(file, excluded):
            continue
        found.add(file)
        for name in _imports(file, (root / file).read_bytes()):
            waiting += _files_of(name, root)
    return tuple(sorted(found))


def hash_files(paths: Iterable[str], root: Path) -> dict[str, str]:
    """Hex sha256 by path; CRLF counts as LF, so that a checkout on Windows has the same key.

    Raises:
        RecipeError: a file is missing.
    """
    hashes = {}
    for path in paths:
        try:
            content = (root / path).read_bytes()
        except FileNotFoundError:
            raise RecipeError(f"{path}: a file of the stage's code is missing") from None
        hashes[path] = sha256_bytes(content.replace(b"\r\n", b"\n"))
    return hashes


def imported_files(root: Path) -> tuple[str, ...]:
    """Repo-relative paths of the first-party files that this process has imported, sorted."""
    home = root.resolve()
    files = (getattr(module, "__file__", None) for module in tuple(sys.modules.values()))
    # Some of torch's modules name a file that does not exist, relative to nothing.
    paths = {Path(file).resolve() for file in files if file and Path(file).is_absolute()}
    inside = (path.relative_to(home) for path in paths if path.is_relative_to(home))
    return tuple(sorted(p.as_posix() for p in inside if not p.parts[0].startswith(".")))


def undeclared(
    imported: Iterable[str],
    declared: Iterable[str],
    root: Path,
    excluded: Iterable[str] = EXCLUDED,
) -> tuple[str, ...]:
    """Imported files that a key does not cover, sorted.

    Left out are declared files, excluded ones, and what excluded ones import.
    """
    entries, files = tuple(excluded), set(imported)
    known = set(declared)
    for path in files:
        if is_excluded(path, entries):
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            known |= {path, *_reached(_files_of(module, root), root, ())}
    return tuple(sorted(files - known))


def _files_of(module: str, root: Path) -> list[str]:
    """The file of a module and the `__init__.py` of the packages above it; [] if not first-party.

    A name that goes on after the last module (`package.module.function`) gives that module.
    """
    files: list[str] = []
    folder = PurePosixPath()
    for part in module.split("."):
        if (root / folder / part / "__init__.py").is_file():
            files.append(str(folder / part / "__init__.py"))
        elif (root / folder / f"{part}.py").is_file():
            return [*files, str(folder / f"{part}.py")]
        elif not (root / folder / part).is_dir():
            return files
        folder /= part
    return files


# The stages of one pipeline share most of their files, and parsing is what takes time.
@functools.cache
def _imports(path: str, source: bytes) -> tuple[str, ...]:
    """Absolute dotted names of everything that a file imports, at any depth of its code."""
    try:
        tree = ast.parse(source, path)
    except SyntaxError as error:
        raise RecipeError(f"{path}, line {error.lineno}: {error.msg}") from None
    package = PurePosixPath(path).parent.parts
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= dict.fromkeys(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the file's own package; each further dot goes one up.
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *(node.module.split(".") if node.module else ())))
            names |= dict.fromkeys((base, *(f"{base}.{alias.name}" for alias in node.names)))
    return tuple(names)
