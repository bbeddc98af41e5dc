"""The walk of docs/registry.md, typed in real clones, gives what it shows."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.clones import Team
from tests.support.project import REPOSITORY, Project

PAGE = REPOSITORY / "docs/registry.md"
KEY = re.compile(r"rk\d-[0-9a-f]{4,64}")


@dataclass
class Typed:
    """One command of the page and what it shows below it."""

    who: str
    """Empty, or `colleague`."""
    command: str
    shown: list[str] = field(default_factory=list)


def walk() -> list[Typed]:
    text = PAGE.read_text(encoding="utf-8")
    typed: list[Typed] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if match := re.match(r"(colleague)?\$ (.*)", line):
                typed.append(Typed(match[1] or "", match[2].split("  #")[0].strip()))
            elif line.strip() not in ("", "..."):
                typed[-1].shown.append(line)
    return typed


def shape(line: str) -> str:
    """How a line begins, without what differs from run to run."""
    line = re.sub(r"^\s*[\d.]+ [kM]?B\s+", "", line)  # a file's size, before its name
    first = re.split(r"\s{2,}", line.strip())[0]
    first = re.sub(r"[0-9a-f]{7,}|\d[\d.,:-]*", "#", first.split(":")[0])
    return " ".join(first.split()[:2])


def is_too_long(line: str) -> bool:
    """More than 100 columns, though no address or path is too long to be broken."""
    return len(line) > 100 and not any("/" in word and len(word) > 50 for word in line.split())


def test_every_command_of_the_registry_is_on_the_page() -> None:
    shown = {one.command.split()[1] for one in walk() if one.command.startswith("runkey ")}
    told = PAGE.read_text(encoding="utf-8")
    registry = "key list show open diff get verify reproduce env publish fetch export import"
    assert set(registry.split()) <= shown
    assert [name for name in ("gc", "index") if f"`runkey {name}`" not in told] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_walk_gives_what_it_shows(team: Team) -> None:
    mine = team.first
    mine.run("git", "add", "-A")
    mine.run("git", "commit", "-q", "-m", "baseline")
    mine.dvc("exp", "run", "-S", "lr=5e-4")
    second = mine.json("run.json")["key"]
    mine.run("git", "checkout", "-q", "params.yaml")
    mine.dvc("repro")
    colleague = team.clone("colleague")
    first_shown, second_shown = _keys(walk())
    known = {first_shown, second_shown}
    # A run that starts from another one is shown, and not trained here.
    steps = [step for step in walk() if {key[:8] for key in KEY.findall(step.command)} <= known]
    real = {first_shown: team.key, second_shown: second}
    for step in steps:
        _type(step, colleague if step.who else mine, real)
        if step.command.startswith("runkey export"):
            archive = step.command.split()[-1]
            shutil.copy(mine.root / archive, colleague.root / archive)


def _keys(steps: list[Typed]) -> tuple[str, str]:
    """The keys of the page's first two runs, cut to what all mentions of them have."""
    text = "\n".join("\n".join([step.command, *step.shown]) for step in steps)
    first, second, *_ = dict.fromkeys(key[:8] for key in KEY.findall(text))
    return first, second


def _type(step: Typed, project: Project, real: dict[str, str]) -> None:
    def meant(match: re.Match[str]) -> str:
        return real[match[0][:8]][:16]

    command = KEY.sub(meant, step.command)
    done = project.run("bash", "-c", command)
    printed = done.stdout + done.stderr
    shapes = {shape(line) for line in printed.splitlines()}
    wanted = {shape(line) for line in step.shown}
    if command.startswith("runkey "):
        assert [line for line in printed.splitlines() if is_too_long(line)] == [], command
    assert wanted <= shapes, json.dumps([command, sorted(wanted - shapes), printed], indent=1)
    if " --to " in command:
        assert any(Path(project.root / command.split()[-1]).iterdir())
