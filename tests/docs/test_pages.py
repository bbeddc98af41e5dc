"""README and docs/: every command and every import that they name exists.  Links: test_site.py."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from runkey.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`[^`\n]+`")
MAKE = re.compile(r"(?:^|[`$;&|(] *|\bthen )make ([a-z][a-z-]*)", re.MULTILINE)
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
RUNKEY = re.compile(r"(?<!--name )\brunkey ([a-z][a-z-]*(?: [^`\n#;|&)]*)?)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = [*FENCE.findall(text), *INLINE.findall(FENCE.sub("", text))]
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = dict(commands(typer.main.get_command(app)))
    for part in code:
        for target in MAKE.findall(part):
            assert target in targets, f"make {target}"
        for said in RUNKEY.findall(part):
            check_command(said.split(), known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_imports_what_exists(page: Path) -> None:
    for code in PYTHON.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert [one.name for one in node.names if not hasattr(module, one.name)] == []
            elif isinstance(node, ast.Import):
                for one in node.names:
                    importlib.import_module(one.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tests_exist(page: Path) -> None:
    for path, name in TEST.findall(page.read_text(encoding="utf-8")):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


def check_command(words: list[str], known: dict[tuple[str, ...], Any]) -> None:
    """The command and each of its options, where a command line is what is said."""
    length = 2 if tuple(words[:2]) in known else 1
    assert tuple(words[:length]) in known, f"runkey {' '.join(words)}"
    options = {option for p in known[tuple(words[:length])].params for option in p.opts}
    for word in words[length:]:
        option = word.split("=")[0].rstrip(",.")
        if option.startswith("--") and len(option) > 2:
            assert option in options | {"--help"}, f"runkey {' '.join(words)}"


def commands(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command by the words that call it."""
    for name, command in getattr(group, "commands", {}).items():
        yield (*before, name), command
        yield from commands(command, (*before, name))


def test_the_check_finds_faults() -> None:
    known = dict(commands(typer.main.get_command(app)))
    check_command(["list", "--where", "lr=1", "--limit", "3"], known)
    check_command(["env", "check"], known)
    for wrong in ("lits", "list --where2 x", "nothing at all"):
        with pytest.raises(AssertionError):
            check_command(wrong.split(), known)
