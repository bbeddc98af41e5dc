"""Render the reference of every command, docs/reference/commands.md: `make reference-docs`.

tests/docs/test_reference.py compares page and program.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer.main

from runkey.cli import app

INTRODUCTION = """# Commands

Generated from the program by `make reference-docs`; `runkey COMMAND --help` prints the same. Every
command has `--help` too; `--traceback` prints where in the code an error came from.
"""


def commands(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield every command with its full name, sorted as `runkey --help` lists them.

    Args:
        group: click group, such as `typer.main.get_command(app)`.
        before: words that call the group.
    """
    for name, command in group.commands.items():
        words = (*before, name)
        if hasattr(command, "commands"):
            yield from commands(command, words)
        else:
            yield " ".join(words), command


def render_commands() -> str:
    """Render the page as Markdown."""
    sections = [_section(name, command) for name, command in commands(typer.main.get_command(app))]
    return "\n".join([INTRODUCTION, *sections])


def _section(name: str, command: Any) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    usage = " ".join(["runkey", name, *map(_argument, arguments)])
    lines = [f"## {name}", f"`{usage}`", "", _prose(command.help), ""]
    if command.params:
        lines += ["| | |", "|---|---|", *map(_row, command.params), ""]
    return "\n".join(lines)


def _argument(parameter: Any) -> str:
    name = _metavar(parameter) + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{_metavar(parameter)}`"
    else:
        value = "" if parameter.is_flag else f" {_metavar(parameter)}"
        name = ", ".join(f"`{option}{value}`" for option in parameter.opts)
    text = _prose(parameter.help).replace("|", "\\|")
    if parameter.default not in (None, "", False, ()) and not callable(parameter.default):
        text = f"{text} Default: `{parameter.default}`."
    return f"| {name} | {text} |"


def _prose(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    sys.stdout.write(render_commands())
