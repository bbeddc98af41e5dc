"""The repository's files that a stage can import, and their hashes, read from syntax trees.

Nothing is imported, so this takes milliseconds and also finds imports inside functions and by
`import_module("a.b")`.  It cannot find names that are built at run time: after a run,
`imported_files` lists what was really imported, and `undeclared` compares the two.
"""

from __future__ import annotations

import ast
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from runkey.errors import RecipeError
from runkey.hashing import sha256_bytes
from runkey.identity.syntax import RULE, syntax_digest

EXCLUDED = (
    "runkey/__main__.py",
    "runkey/cli/",
    "runkey/errors.py",
    "runkey/identity/",
    "runkey/plots/",
    "runkey/progress.py",
    "runkey/registry/",
    "runkey/tracking/",
    "runkey/training/progress.py",
    "runkey/version.py",
    "runkey/pipeline/once.py",
    "runkey/pipeline/record.py",
)
"""Files that do not change a run's results: command line, telemetry, pictures, errors, progress,
and the code of the keys themselves (which `runkey.identity.key.SCHEMA` stands for).  A folder ends
with `/`.  Files that only these import are left out as well.  The list is part of the key."""
BYTES = "bytes"
"""Rule of `rk1-` keys: hash a file of code by its bytes."""

_CALLS = ("import_module", "__import__")
_BODIES = ("body", "orelse", "finalbody", "handlers", "cases")
"""Fields of statements that hold other statements."""


def is_excluded(path: str, excluded: Iterable[str] = EXCLUDED) -> bool:
    """Return True if a repo-relative path is on the list of excluded files and folders."""
    return any(
        path == entry or (entry.endswith("/") and path.startswith(entry)) for entry in excluded
    )


def import_closure(module: str, root: Path, excluded: Sequence[str] = EXCLUDED) -> tuple[str, ...]:
    """Return the repo-relative paths of first-party files that `python -m module` can import.

    First-party is what is under `root`, with the `__init__.py` of every package on the way. Files
    and folders that are `excluded` are not searched.

    Raises:
        RecipeError: there is no such module, or a file is not Python.
    """
    path = module.replace(".", "/")
    entry = [p for p in (f"{path}.py", f"{path}/__main__.py") if (root / p).is_file()]
    if not entry:
        raise RecipeError(f"{module}: no such module in the repository; see `cmd` in dvc.yaml")
    tree = _Tree(root)
    return _reached(tree.files_of(module) + entry, tree, excluded)


def _reached(start: Iterable[str], tree: _Tree, excluded: Sequence[str]) -> tuple[str, ...]:
    waiting, found = list(start), set[str]()
    while waiting:
        file = waiting.pop()
        if file not in found and not is_excluded(file, excluded):
            found.add(file)
            for name in _read(file, (tree.root / file).read_bytes()).imports:
                waiting += tree.files_of(name)
    return tuple(sorted(found))


def code_rule(code: Mapping[str, Any]) -> str:
    """Return the rule by which the files in a key's code part are hashed: `RULE` or `BYTES`."""
    return str(code.get("rule", BYTES))


def hash_code(path: str, data: bytes, rule: str = RULE) -> str:
    """Return the hex sha256 of a file of code.

    `RULE` hashes the syntax tree of a `.py` file (see `runkey.identity.syntax`) and the bytes of
    others; `BYTES` hashes bytes.  CRLF counts as LF: a checkout on Windows has the same key.

    Raises:
        RecipeError: the file is not Python, or reads its docstrings.
    """
    if rule == BYTES or not path.endswith(".py"):
        return sha256_bytes(data.replace(b"\r\n", b"\n"))
    digest = _read(path, data).digest
    if isinstance(digest, RecipeError):
        raise digest
    return digest


def hash_files(paths: Iterable[str], root: Path) -> dict[str, str]:
    """Return the hash of each file by its path, see `hash_code`."""
    return {path: hash_code(path, (root / path).read_bytes()) for path in paths}


def imported_files(root: Path) -> tuple[str, ...]:
    """Return the repo-relative paths of first-party files that this process imported, sorted."""
    home = f"{root.resolve()}/"
    inside = (file.removeprefix(home) for file in _loaded_files() if file.startswith(home))
    return tuple(sorted(path for path in inside if not path.startswith(".")))


def foreign_files(root: Path) -> tuple[str, ...]:
    """Return the absolute paths of imported files outside repository and interpreter, sorted.

    `PYTHONPATH` or a .pth file can put one before a locked package; no key covers it.
    """
    homes = tuple(f"{Path(home).resolve()}/" for home in (root, sys.prefix, sys.base_prefix))
    return tuple(sorted(file for file in _loaded_files() if not file.startswith(homes)))


def _loaded_files() -> set[str]:
    files = (getattr(module, "__file__", None) for module in tuple(sys.modules.values()))
    # Some of torch's modules name a relative file that does not exist.
    return {_resolved(file) for file in files if file and file.startswith("/")}


@functools.cache
def _resolved(file: str) -> str:
    return str(Path(file).resolve())


def undeclared(
    imported: Iterable[str], declared: Iterable[str], root: Path, excluded: Sequence[str] = EXCLUDED
) -> tuple[str, ...]:
    """Return the imported files that a key does not cover, sorted.

    Declared files, excluded ones, and what excluded ones import are left out.
    """
    files, known, tree = set(imported), set(declared), _Tree(root)
    for path in files:
        if is_excluded(path, excluded):
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            known |= {path, *_reached(tree.files_of(module), tree, ())}
    return tuple(sorted(files - known))


class _Tree:
    """The folders under a root, each listed once: lookups come by the thousand."""

    def __init__(self, root: Path) -> None:
        self.root, self._listed = root, functools.cache(self._list)

    def files_of(self, module: str) -> list[str]:
        """Return a module's file and the `__init__.py` of its packages; [] if not first-party.

        A longer name (`package.module.function`) gives the module in it.
        """
        files: list[str] = []
        folder = ""
        for part in module.split("."):
            names, folders = self._listed(folder)
            inner = f"{folder}{part}/"
            if part in folders and "__init__.py" in self._listed(inner)[0]:
                files.append(f"{inner}__init__.py")
            elif f"{part}.py" in names:
                return [*files, f"{folder}{part}.py"]
            elif part not in folders:
                return files
            folder = inner
        return files

    def _list(self, folder: str) -> tuple[set[str], set[str]]:
        """Return the file names and folder names in a folder, which is "" or ends with `/`."""
        with os.scandir(self.root / folder) as entries:
            kinds = {entry.name: entry.is_dir() for entry in entries}
        folders = {name for name, is_folder in kinds.items() if is_folder}
        return kinds.keys() - folders, folders


class _Module(NamedTuple):
    imports: tuple[str, ...]
    """Absolute dotted names of everything that it imports, at any depth."""
    digest: str | RecipeError
    """See `syntax_digest`; an error, since excluded files need no hash."""


# The stages of a pipeline share most of their files, and parsing takes the time.
@functools.cache
def _read(path: str, source: bytes) -> _Module:
    try:
        tree = ast.parse(source.replace(b"\r\n", b"\n"), path)
    except SyntaxError as error:
        raise RecipeError(f"{path}, line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise RecipeError(f"{path}: cannot be parsed ({error})") from None
    imports = _imports(path, source, tree)
    try:
        return _Module(imports, syntax_digest(path, tree))
    except RecipeError as error:
        return _Module(imports, error)


def _imports(path: str, source: bytes, tree: ast.Module) -> tuple[str, ...]:
    names: list[str] = []
    for node in _import_statements(tree.body):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        else:
            base = "." * node.level + (node.module or "")
            dot = "." if node.module else ""
            names += [base, *(f"{base}{dot}{alias.name}" for alias in node.names)]
    if any(name.encode() in source for name in _CALLS):
        names += _imported_by_name(tree)
    package = PurePosixPath(path).parent.parts
    return tuple(dict.fromkeys(_absolute(name, package) for name in names))


def _absolute(name: str, package: tuple[str, ...]) -> str:
    plain = name.lstrip(".")
    dots = len(name) - len(plain)
    # One dot is the file's own package; each further dot goes one up.
    above = package[: len(package) - dots + 1] if dots else ()
    return ".".join((*above, plain)).removesuffix(".")


def _import_statements(body: Iterable[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements in statements; expressions, most of a tree, hold none."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            for part in _BODIES:
                yield from _import_statements(getattr(node, part, ()))


def _imported_by_name(tree: ast.AST) -> Iterator[str]:
    """Yield the literal names in `importlib.import_module("a.b")` and `__import__("a.b")`."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(attr=called) | ast.Name(id=called),
                args=[ast.Constant(value=str(name)), *_],
            ) if called in _CALLS:
                yield name
