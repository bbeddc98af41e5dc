"""The repository's files that a stage can import, and their hashes, read from syntax trees.

Nothing is imported, so this takes milliseconds and also finds imports inside functions and by
`import_module("a.b")`, under any name: a text that names a module counts as its import.  It cannot
find names that are built at run time: `imported_files` lists what was really imported, `undeclared`
compares the two, and `runkey.identity.audit` refuses such a file when it is imported.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.machinery import all_suffixes
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from runkey.errors import RecipeError
from runkey.files import read_plain
from runkey.hashing import sha256_bytes
from runkey.identity.kept import keep

EXCLUDED = (
    "runkey/__main__.py",
    "runkey/api.py",
    "runkey/cli/",
    "runkey/errors.py",
    "runkey/identity/",
    "runkey/plots/",
    "runkey/progress.py",
    "runkey/registry/",
    "runkey/sweep/",
    "runkey/tracking/",
    "runkey/training/progress.py",
    "runkey/version.py",
    "runkey/pipeline/once.py",
    "runkey/pipeline/record.py",
    "runkey/pipeline/share.py",
)
"""Files that do not change a run's results: command line, telemetry, pictures, errors, progress,
and the code of the keys themselves (which `runkey.identity.key.SCHEMA` stands for).  A folder ends
with `/`.  Files that only these import are left out as well.  The list is part of the key."""
RULE, BYTES = "ast1", "bytes"
"""Rules by which a file of code is hashed: by its syntax tree; in `rk1-` keys by its bytes.  A rule
has another name whenever the same file would give another hash."""

_MODULE_ENDS = tuple(all_suffixes())
"""What Python imports: `x.so` before `x.py` before `x.pyc`."""
_IMPORTERS = (b"__import__", b"import_module", b"importlib", b"pkgutil", b"runpy")
_DOTTED = re.compile(rb"""["']\.*[^\W\d]\w*(?:\.\w+)+["']""")
"""A text that may be the name of a module in a package."""
_NAME = re.compile(r"\.*[^\W\d]\w*(\.\w+)*")
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
    and folders that are `excluded` are not searched. RecipeError if there is no such module.
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
            if file.endswith(".py"):
                for name in _read(file, read_plain(tree.root / file)).imports:
                    waiting += tree.files_of(name)
    return tuple(sorted(found))


def code_rule(code: Mapping[str, Any]) -> str:
    """Return the rule by which the files in a key's code part are hashed: `RULE` or `BYTES`."""
    return str(code.get("rule", BYTES))


def hash_code(path: str, data: bytes, rule: str = RULE) -> str:
    """Return the hex sha256 of a file of code.

    `RULE` hashes the syntax tree of a `.py` file (see `syntax_digest`) and the bytes of others;
    `BYTES` hashes bytes.  CRLF counts as LF: a checkout on Windows has the same key.  RecipeError
    if the file is not Python, or reads its docstrings.
    """
    if rule == BYTES or not path.endswith(".py"):
        return sha256_bytes(data.replace(b"\r\n", b"\n"))
    digest = _read(path, data).digest
    if isinstance(digest, RecipeError):
        raise digest
    return digest


def hash_files(paths: Iterable[str], root: Path) -> dict[str, str]:
    """Return the hash of each file by its path, see `hash_code`."""
    return {path: hash_code(path, read_plain(root / path)) for path in paths}


def imported_files(root: Path) -> tuple[list[str], list[str]]:
    """Return the files that this process imported: the repository's, and foreign ones; sorted.

    Foreign ones are outside repository and interpreter: `PYTHONPATH` or a .pth file can put one
    before a locked package, and no key covers it.
    """
    names = [getattr(module, "__file__", None) or "" for module in tuple(sys.modules.values())]
    # Some of torch's modules name a relative file that does not exist.
    files = sorted({str(Path(name).resolve()) for name in names if name.startswith("/")})
    homes = tuple(f"{Path(home).resolve()}/" for home in (root, sys.prefix, sys.base_prefix))
    own = [file.removeprefix(homes[0]) for file in files if file.startswith(homes[0])]
    foreign = [file for file in files if not file.startswith(homes)]
    return [path for path in own if not path.startswith(".")], foreign


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
            # Not on into other excluded rooms: those that were imported have a turn of their own.
            others = [entry for entry in excluded if not is_excluded(path, [entry])]
            known |= {path, *_reached(tree.files_of(module), tree, others)}
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
            _, folders, names = self._listed(folder)
            inner = f"{folder}{part}/"
            if part in folders and "__init__.py" in self._listed(inner)[2]:
                files.append(f"{inner}__init__.py")
            elif own := [f"{part}{end}" for end in _MODULE_ENDS if f"{part}{end}" in names]:
                return [*files, *(f"{folder}{name}" for name in own)]
            elif part not in folders:
                return files
            folder = inner
        return files

    def _list(self, folder: str) -> tuple[str, list[str], list[str]]:
        """Return the path, folders and files of a folder, which is "" or ends with `/`."""
        return next(os.walk(self.root / folder), ("", [], []))


class _Module(NamedTuple):
    imports: tuple[str, ...]
    """Absolute dotted names of everything that it imports, at any depth."""
    digest: str | RecipeError
    """See `syntax_digest`; an error, since excluded files need no hash."""


# The stages of a pipeline share most of their files, and parsing takes the time.
@functools.cache
def _read(path: str, source: bytes) -> _Module:
    name = sha256_bytes(f"{path}\0".encode() + source)
    imports, digest, fault = keep(f"code {name}", lambda: _parse(path, source))
    return _Module(tuple(imports), RecipeError(fault) if fault else digest)


def _parse(path: str, source: bytes) -> list[Any]:
    """Return a file's imports, its digest, and why it has none, or ""."""
    try:
        tree = ast.parse(source.replace(b"\r\n", b"\n"), path)
    except SyntaxError as error:
        raise RecipeError(f"{path}, line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise RecipeError(f"{path}: cannot be parsed ({error})") from None
    imports = _imports(path, source, tree)
    try:
        return [imports, syntax_digest(path, tree), ""]
    except RecipeError as error:
        return [imports, "", str(error)]


def _imports(path: str, source: bytes, tree: ast.Module) -> list[str]:
    names: list[str] = []
    for node in _import_statements(tree.body):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        else:
            base = "." * node.level + (node.module or "")
            dot = "." if node.module else ""
            names += [base, *(f"{base}{dot}{alias.name}" for alias in node.names)]
    is_importer = any(name in source for name in _IMPORTERS)
    if is_importer or _DOTTED.search(source):
        texts = _texts(tree)
        names += texts if is_importer else (text for text in texts if "." in text)
    package = PurePosixPath(path).parent.parts
    return list(dict.fromkeys(_absolute(name, package) for name in names))


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


def _texts(tree: ast.AST) -> list[str]:
    """Return the texts in a file that may name a module, whatever function imports it."""
    nodes = list(ast.walk(tree))
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    constants = (n for n in nodes if isinstance(n, ast.Constant) and n not in docstrings)
    texts = (node.value for node in constants)
    return [text for text in texts if isinstance(text, str) and _NAME.fullmatch(text)]


# --- syntax trees

_NOT_WRITTEN = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
"""Fields that follow from the rest of the tree, or that Python ignores."""
_DOCSTRING_READERS = frozenset(
    {"__doc__", "findsource", "getcomments", "getdoc", "getsource", "getsourcelines"}
)
_LOG_METHODS = frozenset({"debug", "info", "warning", "error", "exception", "critical"})


def syntax_digest(path: str, tree: ast.Module) -> str:
    """Return the hex sha256 of a file's syntax tree without what cannot change a result.

    A tree holds neither comments nor formatting.  Also left out are statements that are only a
    constant (docstrings, also those below attributes) and `pass`, which Python compiles to nothing,
    and the text of log messages, see `_log_residue`.

    Raises:
        RecipeError: the file reads docstrings or source text, or is nested too deeply.
    """
    parts: list[str] = [RULE, "\n"]
    try:
        _write(tree, parts, _module_loggers(tree))
    except RecursionError:
        raise RecipeError(f"{path}: an expression is nested too deeply; split it") from None
    text = "".join(parts)
    # It holds all names and texts in quotes; walking every tree would double the time.
    if any(f"'{name}'" in text for name in _DOCSTRING_READERS):
        _refuse_readers(path, tree)
    return sha256_bytes(text.encode())


def _refuse_readers(path: str, tree: ast.Module) -> None:
    for node in ast.walk(tree):
        match node:
            case (
                ast.Attribute(attr=name)
                | ast.Name(id=name)
                | ast.alias(name=name)
                | ast.Constant(value=str(name))
            ) if name in _DOCSTRING_READERS:
                raise RecipeError(
                    f"{path}, line {node.lineno}: {name} reads docstrings or source text, which are"
                    " not in the key; put the text that is needed into a variable"
                )


@functools.cache
def _written_fields(kind: type[ast.AST]) -> tuple[tuple[str, str], ...]:
    """Return the fields of a kind of node that count, each with how it begins in the text."""
    return tuple((name, f"{name}=") for name in kind._fields if name not in _NOT_WRITTEN)


def _write(node: Any, text: list[str], loggers: frozenset[str]) -> None:
    """Append a node, or a field's plain value, in canonical form.

    Fields that are None or empty are left out, so that new optional fields of a later Python
    change nothing.
    """
    kind: Any = type(node)
    if kind is ast.Constant:
        text.append(f"Constant({_plain(node.value)})")
        return
    if not isinstance(node, ast.AST):
        text.append(_plain(node))
        return
    text.append(f"{kind.__name__}(")
    for name, begin in _written_fields(kind):
        value = getattr(node, name, None)
        if value is None:
            continue
        if type(value) is list:
            _write_list(name, value, text, loggers)
        elif type(value) is str:
            text.append(f"{begin}{value!a},")
        else:
            text.append(begin)
            _write(value, text, loggers)
            text.append(",")
    text.append(")")


def _write_list(name: str, items: list[Any], text: list[str], loggers: frozenset[str]) -> None:
    start = len(text)
    for item in items:
        if isinstance(item, ast.stmt):
            is_constant = isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)
            if is_constant or isinstance(item, ast.Pass):
                continue
            residue = _log_residue(item, loggers) if loggers else None
            if residue is not None:
                _write_list("log", list(residue), text, loggers)
                continue
        _write(item, text, loggers)
        text.append(",")
    if len(text) > start:
        text.insert(start, f"{name}=[")
        text.append("],")


def _plain(value: object) -> str:
    """Return a constant as text; 1, 1.0, True and "1" differ, and so do -0.0 and 0.0."""
    if isinstance(value, str):
        return ascii(value)
    if value is None or value is ... or isinstance(value, bool | bytes):
        return repr(value)
    if isinstance(value, int):
        return hex(value)  # `str` refuses thousands of digits
    if isinstance(value, float):
        return value.hex()
    assert isinstance(value, complex)
    return f"complex({value.real.hex()},{value.imag.hex()})"


# --- log messages


def _module_loggers(tree: ast.Module) -> frozenset[str]:
    """Return which of the names `logger` and `log` are certainly loggers.

    The module binds such a name once, at its top level, to `logging.getLogger(...)` of `__name__`
    or a text; `logging` is bound once, by `import logging`; no attribute of either is set.
    """
    names, imported = [], False
    for statement in tree.body:
        match statement:
            case ast.Import(names=aliases):
                imported |= any(one.name == "logging" and one.asname is None for one in aliases)
            case ast.Assign(
                targets=[ast.Name(id="logger" | "log" as name), *_],
                value=ast.Call(
                    func=ast.Attribute(value=ast.Name(id="logging"), attr="getLogger"),
                    args=[ast.Name(id="__name__") | ast.Constant()],
                    keywords=[],
                ),
            ):
                names.append(name)
    if not names or not imported:
        return frozenset()
    bound = Counter(_bound_names(tree))
    if bound["logging"] != 1 or bound["*"]:
        return frozenset()
    return frozenset(name for name in names if bound[name] == 1)


def _bound_names(tree: ast.Module) -> Iterator[str]:
    """Yield a name each time that the module binds or deletes it, or sets an attribute of it."""
    for node in ast.walk(tree):
        match node:
            case ast.alias(name=name, asname=other):
                yield other or name.split(".")[0]
            case ast.Attribute(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                yield name
            case ast.Name(ctx=ast.Load()) | ast.Attribute() | ast.keyword() | ast.Constant():
                pass
            case ast.ImportFrom() | ast.MatchClass():
                pass  # their texts are a module and attributes
            case _:  # functions, classes, arguments, patterns, ...: all other texts are bound names
                for _, value in ast.iter_fields(node):
                    texts = value if isinstance(value, list) else [value]
                    yield from (text for text in texts if isinstance(text, str))


def _log_residue(statement: ast.stmt, loggers: frozenset[str]) -> list[ast.expr] | None:
    """Return the parts of a statement such as `logger.info("...", x)` that count; else None.

    Text and plain names do not count.  Everything that may run code does: calls, attributes (which
    may be properties), arithmetic, format specifications.
    """
    match statement:
        case ast.Expr(
            value=ast.Call(
                func=ast.Attribute(value=ast.Name(id=name), attr=method),
                args=arguments,
                keywords=keywords,
            )
        ) if name in loggers and method in _LOG_METHODS:
            values = [*arguments, *(keyword.value for keyword in keywords)]
            if any(keyword.arg is None for keyword in keywords):
                return [statement.value]
            return list(_running(values))
    return None


def _running(values: Iterable[ast.expr]) -> Iterator[ast.expr]:
    """Yield the expressions in a log message that may run code."""
    for value in values:
        match value:
            case ast.Constant() | ast.Name():
                pass
            case ast.JoinedStr(values=inner):
                yield from _running(inner)
            case ast.FormattedValue(value=inner, format_spec=None):
                yield from _running([inner])
            case _:
                yield value
