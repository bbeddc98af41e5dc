"""The remote inside the repository: an empty clone gets its data, and nothing is pushed there."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.errors import DataError
from runkey.pipeline.prepare import own_data_note

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *command: str) -> str:
    # A DVC_ROOT of a surrounding `dvc repro` would lead into another checkout.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    # No name server, no proxy: whatever asks the network fails.
    clean |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    result = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def dvc(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments)


def git(folder: Path, *arguments: str) -> str:
    return run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository with the DVC files of this one alone, as committed in the working tree."""
    origin = tmp_path_factory.mktemp("origin")
    names = ["data.dvc", ".dvcignore", ".dvc/config", ".dvc/.gitignore", ".gitignore"]
    tracked = git(ROOT, "ls-files", "-z", "--", *names, "sample-data").split("\0")
    for name in filter(None, tracked):
        target = origin / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    git(origin, "init", "-q")
    git(origin, "add", ".")
    git(origin, "commit", "-qm", "start")
    folder = tmp_path_factory.mktemp("clones") / "clone"
    git(origin, "clone", "-q", ".", str(folder))
    return folder


def test_nothing_phones_home():
    config = configparser.ConfigParser()
    config.read(ROOT / ".dvc/config")
    assert config["core"]["analytics"] == "false"
    assert config["core"]["check_update"] == "false"


def test_data_dvc_alone_names_the_seed_remote():
    config = configparser.ConfigParser()
    config.read(ROOT / ".dvc/config")
    assert config["core"]["remote"] == "store"
    # Relative to .dvc/: the one beside it and committed, the other inside it and ignored.
    assert config["'remote \"seed\"'"]["url"] == "../sample-data"
    assert config["'remote \"store\"'"]["url"] == "store"
    assert "/store" in (ROOT / ".dvc/.gitignore").read_text().split()


@pytest.mark.slow
def test_pull_then_own_data(clone):
    """One story, for every dvc call takes seconds."""
    dvc(clone, "pull", "data.dvc")
    assert len(list(clone.glob("data/*/*.jpg"))) == 600
    assert git(clone, "status", "--porcelain") == ""
    assert "up to date" in dvc(clone, "status")
    assert own_data_note(clone) is None

    # Somebody's own images take the sample's place with the one usual command ...
    (clone / "data/train/holiday.jpg").write_bytes(b"mine")
    dvc(clone, "add", "data")
    assert git(clone, "status", "--porcelain").split() == ["M", "data.dvc"]
    # ... and `dvc push` does not put them into the repository.
    dvc(clone, "push")
    assert git(clone, "status", "--porcelain").split() == ["M", "data.dvc"]
    note = own_data_note(clone)
    assert note is not None
    assert note.startswith("note: data.dvc holds your own images and still says `remote: seed`")

    # With the two lines out, the default remote gets them; git sees neither.
    text = (clone / "data.dvc").read_text()
    text = text.replace("  remote: seed\n", "").replace("  push: false\n", "")
    (clone / "data.dvc").write_text(text)
    assert own_data_note(clone) is None
    dvc(clone, "push")
    assert len([p for p in (clone / ".dvc/store").rglob("*") if p.is_file()]) == 606
    assert git(clone, "status", "--porcelain").split() == ["M", "data.dvc"]


def test_note_needs_a_readable_data_dvc(tmp_path):
    assert own_data_note(tmp_path) is None
    (tmp_path / "data.dvc").write_text("outs: []\n")
    with pytest.raises(DataError) as caught:
        own_data_note(tmp_path)
    assert str(caught.value) == "data.dvc: unreadable; `dvc add data` writes it anew"
