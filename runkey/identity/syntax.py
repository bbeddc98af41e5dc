"""Hash a Python file's syntax tree without what cannot change a result.

A tree holds neither comments nor formatting.  Also left out are statements that are only a constant
(docstrings, also those below attributes) and `pass`, which Python compiles to nothing, and the text
of log messages, see `_log_residue`.  A file that reads its own docstrings is refused.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from runkey.errors import RecipeError
from runkey.hashing import sha256_bytes

RULE = "ast1"
"""Version of the rule; changes whenever the same file would give another hash."""

_NOT_WRITTEN = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
"""Fields that follow from the rest of the tree, or that Python ignores."""
_DOCSTRING_READERS = frozenset(
    {"__doc__", "findsource", "getcomments", "getdoc", "getsource", "getsourcelines"}
)
_LOG_METHODS = frozenset({"debug", "info", "warning", "error", "exception", "critical"})


def syntax_digest(path: str, tree: ast.Module) -> str:
    """Return the hex sha256 of a file's syntax tree; errors name the `path`.

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


def _write(node: Any, text: list[str], loggers: frozenset[str]) -> None:
    """Append a node, or a field's plain value, in canonical form.

    Fields that are None or empty are left out, so that new optional fields of a later Python
    change nothing.
    """
    if not isinstance(node, ast.AST):
        text.append(_plain(node))
        return
    kind = type(node)
    text.append(f"{kind.__name__}(")
    if kind is ast.Constant:
        text.append(_plain(node.value))  # type: ignore[attr-defined]
    else:
        for name in kind._fields:
            value = getattr(node, name, None)
            if value is None or name in _NOT_WRITTEN:
                continue
            if isinstance(value, list):
                _write_list(name, value, text, loggers)
            else:
                text.append(f"{name}=")
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
