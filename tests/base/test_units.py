"""Counts in messages: one function makes the plural, and every message uses it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from runkey.units import counted, format_score

REPOSITORY = Path(__file__).parents[2]
FILES = sorted([*REPOSITORY.glob("runkey/**/*.py"), *REPOSITORY.glob("stages/*.py")])


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (2, "image", "2 images"),
        (1, "class", "1 class"),
        (8, "class", "8 classes"),
        (2, "box", "2 boxes"),
        (3, "batch", "3 batches"),
        (2, "entry", "2 entries"),
        (2, "day", "2 days"),
        (1, "epoch", "1 epoch"),
        (5, "epoch", "5 epochs"),
        ("1,200", "step", "1,200 steps"),
        ("1", "crowd region", "1 crowd region"),
        ("no", "fault", "no faults"),
        ("?", "process", "? processes"),
    ],
)
def test_a_count(count: int | str, noun: str, text: str) -> None:
    assert counted(count, noun) == text


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"AP": 0.67294, "AP_low": 0.6516, "AP_high": 0.694}, "0.673 (95%: 0.652 to 0.694)"),
        ({"AP": 0.67294, "AP_low": None, "AP_high": None}, "0.673"),
        ({"AP": 0.0}, "0.000"),
        ({"AP": None, "AP_low": 0.1, "AP_high": 0.2}, "none"),
        ({}, "none"),
    ],
)
def test_a_score(metrics: dict[str, float | None], text: str) -> None:
    assert format_score(metrics, "AP") == text


def nouns() -> set[str]:
    """The plurals of all nouns that messages count."""
    calls = (c for file in FILES for c in ast.walk(ast.parse(file.read_text())))
    return {
        counted(2, c.args[1].value)[2:].rsplit(" ", maxsplit=1)[-1]
        for c in calls
        if isinstance(c, ast.Call) and getattr(c.func, "id", "") == "counted"
        if isinstance(c.args[1], ast.Constant)
    }


def own_plurals(file: Path, plurals: set[str]) -> Iterator[str]:
    """Texts of a file in which a bare number stands before a plural, or one is made by hand."""
    source = file.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [ast.Constant(""), *node.values]
            for before, value, after in zip(parts, node.values, node.values[1:], strict=False):
                # `3 of 8 images` counts the 3.
                is_whole = isinstance(before, ast.Constant) and str(before.value).endswith(" of ")
                if is_whole or not isinstance(after, ast.Constant):
                    continue
                if isinstance(value, ast.FormattedValue):
                    noun = re.match(r" ([a-z]+)\b", str(after.value))
                    if noun and noun[1] in plurals and not _is_no_count(value):
                        yield f"{file.name}:{node.lineno}: {ast.unparse(node)}"
    for made in re.finditer(r"""\(e?s\)|(?<!differ\{)['"]e?s['"] (?:if|\*)""", source):
        yield f"{file.name}: {made[0]}"


def _is_no_count(value: ast.FormattedValue) -> bool:
    """Return True for names, for constants, and for numbers with decimals."""
    text = ast.unparse(value.value)
    is_word = text.endswith(("name", "run_id", "suffix")) or text.isupper()
    return is_word or "." in ast.unparse(value.format_spec or ast.Constant(""))


def test_no_message_makes_its_own_plural() -> None:
    plurals = nouns()
    assert {"images", "epochs", "classes", "files", "runs"} <= plurals
    found = [text for file in FILES for text in own_plurals(file, plurals)]
    assert found == [], "\n".join(found)
