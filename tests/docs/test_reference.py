"""docs/reference/commands.md is what the program says of its commands."""

from __future__ import annotations

from pathlib import Path

from docs.site.commands import render_commands

PAGE = Path(__file__).parents[2] / "docs/reference/commands.md"


def test_the_page_has_every_command_and_option() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_commands(), "make reference-docs"
