"""Whether a text that a page quotes is one that the code can print.

    known = Templates()
    known.add_python(Path("runkey/errors.py"))
    known.unexplained("error: params.yaml: unknown key lrr")   # words that nothing there says

A template is a string of the source, with holes where values come.  It explains the words of its
fixed pieces where all of them stand in the text in their order; so a message that is reworded in
the code leaves the whole of the old one unexplained.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from runkey.units import counted

_HOLE = r"(.{0,600}?)"
# `{}` and `%s` of texts that are filled in later; `$(...)`, `$NAME` of the shell.
_LATER = re.compile(r"\{[^{}\n]*\}|%[sdr]|\$\([^)]*\)|\$\{?\w+\}?")
_SHELL = re.compile(r'"((?:[^"\\]|\\.)*)"')


def flat(text: str) -> str:
    """One line, one space between words."""
    return " ".join(text.split())


class Templates:
    """The strings of some source files."""

    def __init__(self) -> None:
        self._patterns: dict[str, str] = {}
        """By regular expression, its longest fixed piece."""

    def add_python(self, *paths: Path) -> None:
        """Take the strings and f-strings of Python files."""
        for path in paths:
            for pieces in _strings(ast.parse(path.read_text(encoding="utf-8"))):
                self._add(pieces)

    def add_shell(self, path: Path) -> None:
        """Take the strings of a shell script, those that follow each other as one, too."""
        text = path.read_text(encoding="utf-8").replace("\\`", "`")
        joined = re.sub(r'"\s*\\?\n\s*"', " ", text)
        for match in _SHELL.finditer(joined):
            self._add(_LATER.split(match[1]))

    def unexplained(self, text: str) -> list[str]:
        """The words of a text that no template has, in their order."""
        text = flat(text)
        explained = bytearray(len(text))
        for pattern, longest in self._patterns.items():
            if longest in text:
                for match in re.finditer(pattern, text):
                    _mark(match, explained)
        words = re.finditer(r"\S+", text)
        return [w[0] for w in words if not all(_letters_in(text, explained, *w.span()))]

    def _add(self, pieces: list[str]) -> None:
        fixed = [re.sub(r"\s+", " ", piece) for piece in pieces]
        if len("".join(fixed).split()) < 2:  # a single word explains nothing
            return
        pattern = _HOLE.join(re.escape(piece) for piece in fixed if piece.strip())
        pattern = pattern.replace(r"\ ", " ").strip()
        edge = r"(?<!\w)" if pattern[:1].isalpha() else ""
        self._patterns[edge + pattern] = max(fixed, key=len).strip()


def _strings(tree: ast.AST) -> Iterator[list[str]]:
    """Fixed pieces of each string; the parts of f-strings are none of their own."""
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for count in (1, 2):
                yield [_fixed(part, count) for part in node.values]
        elif isinstance(node, ast.Constant) and id(node) not in inside:
            yield _LATER.split(node.value if isinstance(node.value, str) else "")


def _fixed(part: ast.expr, count: int) -> str:
    """The fixed text of a part of an f-string; of a count with its noun, the noun."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    call = getattr(part, "value", None)
    if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "counted":
        noun = call.args[1]
        return counted(count, str(noun.value))[1:] if isinstance(noun, ast.Constant) else ""
    return ""


def _mark(match: re.Match[str], explained: bytearray) -> None:
    """Note the fixed pieces of a match."""
    start, end = match.span()
    edges = [start, *(edge for n in range(match.re.groups) for edge in match.span(n + 1)), end]
    for begin, stop in zip(edges[::2], edges[1::2], strict=True):
        explained[begin:stop] = b"\1" * (stop - begin)


def _letters_in(text: str, explained: bytearray, start: int, end: int) -> Iterator[bool]:
    return (bool(explained[i]) for i in range(start, end) if text[i].isalpha())
