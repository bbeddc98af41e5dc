"""The table of docs/keys.md: which change gives another key, and in which part."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from runkey.identity.key import Recipe, make_recipe
from runkey.params import load_params

ROOT = Path(__file__).parents[2]
PARTS = ("code", "params", "data", "environment")
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this repository that a key can see, and README.md."""
    root = tmp_path_factory.mktemp("keys")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "runkey", "stages", "*.yaml", "*.yml", "data.dvc", "README.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


def recipe(root: Path) -> Recipe:
    return make_recipe("train", root, load_params(root / "params.yaml"))


def edited(name: str, old: str, new: str) -> Change:
    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert re.search(old, text), old
        (root / name).write_text(re.sub(old, new, text, count=1))

    return change


def added(name: str) -> Change:
    return edited(name, r"\Z", "# a comment\n")


CHANGES = {
    "`lr: 0.0005` in `params.yaml`": edited("params.yaml", r"(?m)^lr: .*", "lr: 0.0005"),
    "`runtime.workers: 2`": edited("params.yaml", r"  workers: auto", "  workers: 2"),
    "`evaluate.sheet_images: 4`": edited("params.yaml", r"sheet_images: \d+", "sheet_images: 4"),
    "a comment in `runkey/model/boxes.py`": added("runkey/model/boxes.py"),
    "a constant in `runkey/model/boxes.py`": edited("runkey/model/boxes.py", r" 0\.5\b", " 0.25"),
    "a comment in `runkey/plots/curves.py`": added("runkey/plots/curves.py"),
    "or `README.md`": added("README.md"),
    "another image": edited("data.dvc", r"md5: [0-9a-f]{4}", "md5: 0000"),
    "another numpy": edited(
        "conda-lock.yml", r"- name: numpy\n  version: \S+", "- name: numpy\n  version: 9.9.9"
    ),
}


@pytest.mark.parametrize("told", CHANGES)
def test_the_table_is_right(told: str, tree: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/keys.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| ") and told in line)
    key, *cells = (cell.strip() for cell in row.strip("| ").split("|")[1:])
    cells += [""] * (len(PARTS) - len(cells))
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    before = recipe(root)
    CHANGES[told](root)
    after = recipe(root)
    differing = [part for part in PARTS if after.parts[part] != before.parts[part]]
    assert differing == [part for part, cell in zip(PARTS, cells, strict=True) if cell]
    assert (after.key == before.key) == (key == "the same")
