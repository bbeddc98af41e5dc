"""docs/your-data.md, typed in a clone with the data that it was written with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.project import REPOSITORY, Project, copy_repository
from tests.support.shared import shared_data

EPOCHS = {"training.epochs=6": "training.epochs=1", "epochs: 90": "epochs: 2"}
"""What the page trains, and what is trained here."""


@dataclass
class Typed:
    """One command of the page and what it shows below it."""

    command: str
    shown: list[str] = field(default_factory=list)


def walk() -> list[Typed]:
    page = (REPOSITORY / "docs/your-data.md").read_text(encoding="utf-8")
    typed: list[Typed] = []
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                typed.append(Typed(line[2:].split("  #")[0].strip()))
            elif line != "...":
                typed[-1].shown.append(line)
    return typed


def test_the_walk_is_whole() -> None:
    words = {" ".join(one.command.split()[:2]) for one in walk()}
    assert {"git clone", "make env", "dvc add", "make preset", "dvc repro", "dvc exp"} <= words
    assert {"make repro", "runkey list"} <= words


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Project]:
    """A repository as `git clone` leaves it."""
    shared_data("blood-cells")
    project = Project(tmp_path / "cells")
    copy_repository(project.root)
    for name in ("data.dvc", "sample-data/README.md"):
        if (REPOSITORY / name).is_file():
            (project.root / name).parent.mkdir(exist_ok=True)
            (project.root / name).write_bytes((REPOSITORY / name).read_bytes())
    preset = project.root / "presets/blood-cells.yaml"
    preset.write_text(preset.read_text().replace("  epochs: 90", "  epochs: 2"))
    project.run("git", "init", "-q")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "start")
    return project


def meant(command: str) -> str | None:
    """What is typed here; None: it has been done, or would make an environment."""
    # `runkey convert` there is of another export; tests/cli/test_convert.py types it.
    if command.startswith(("git clone", "make env", "source ", "runkey convert ")):
        return None
    command = command.replace("/path/to/blood-cells", str(shared_data("blood-cells")))
    # The rest of the page goes on with preset blood-cells.
    command = command.replace("preset auto", "preset auto --print")
    for page, here in EPOCHS.items():
        command = command.replace(page, here)
    # The environment that runs this test is the locked one.
    bin_folder = Path(sys.executable).parent
    return re.sub(r"^make (?!env)", f"make --old-file=env BIN={bin_folder} ", command)


def fixed(line: str) -> str:
    """A line without what differs from run to run: numbers, times, keys, ids, spaces."""
    line = re.sub(r"\b\d+ (min|s)\b", "#", line)
    line = re.sub(r"rk\d-[0-9a-f]+|\b[0-9a-f]{32}\b", "#", line)
    return re.sub(r"[\d.,]+(e[-+]\d+)?", "#", " ".join(line.split()))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_typed(clone: Project) -> None:
    printed = ""
    for step in walk():
        command = meant(step.command)
        if command is None:
            continue
        done = clone.run("bash", "-c", command)
        printed = done.stdout + done.stderr
        if step.command == "dvc repro prepare":
            lines = " ".join(printed.split())
            assert all(" ".join(line.split()) in lines for line in step.shown), printed
            continue
        shapes = {fixed(line) for line in printed.splitlines()}
        wanted = {fixed(line) for line in step.shown if not line.startswith("epoch")}
        missing = {w for w in wanted if not any(w[:30] in s for s in shapes)}
        assert missing == set(), json.dumps([command, sorted(missing), printed], indent=1)
    assert clone.run("git", "status", "--porcelain").stdout == ""
    check_what_is_said_of_files(clone)


def check_what_is_said_of_files(clone: Project) -> None:
    numbers = clone.json("prepared/statistics.json")
    assert (numbers["train"]["objects_per_image"]["maximum"]) == 28
    assert (numbers["val"]["objects_per_image"]["maximum"]) == 30
    assert round(numbers["train"]["box_side_of_image"]["5%"], 3) == 0.076
    assert [c["objects"] for c in numbers["train"]["classes"].values()] == [286, 3326, 296]
    assert "push: false" in (clone.root / "data.dvc").read_text()
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=clone.root, capture_output=True, text=True, check=True
    ).stdout
    # Pictures of the documentation are the only ones that git has.
    pictures = [n for n in tracked.split() if n.endswith((".jpg", ".png", ".npy"))]
    assert [name for name in pictures if not name.startswith(("docs/", "sample-data/"))] == []
