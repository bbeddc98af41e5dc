"""A run of others is trained again only if somebody says so; until then none of its code runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.identity.key import Recipe, make_recipe
from runkey.identity.record import ORIGIN, TAKEN, Record
from runkey.registry.library import LocalLibrary
from runkey.registry.reproduce import _check_key, _differing, foreign_code
from runkey.registry.snapshot import add_worktree, git
from tests.support.project import TINY, clean_environment, commit_recipe
from tests.support.records import FILES, make_run

WHO = {f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
MARK = "import pathlib; pathlib.Path('/MARK').touch()\n"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trust") / "repository"
    commit_recipe(root, TINY)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    git(template, "clone", "-q", str(template), str(tmp_path / "clone"))
    return tmp_path / "clone"


def commit(root: Path, changes: dict[str, Callable[[str], str]]) -> str:
    """Commit changes beside the branch that is checked out, as a snapshot from elsewhere."""
    for name, change in changes.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(change(path.read_text() if path.exists() else ""))
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "theirs", env=WHO)
    oid = git(root, "rev-parse", "HEAD")
    git(root, "reset", "-q", "--hard", "HEAD~1")
    return oid


def record_of(root: Path, oid: str, **tags: str) -> Record:
    """A run of the key that the tree has, made from the snapshot."""
    recipe = make_recipe("train", root)
    key_json = json.dumps(recipe.as_dict()).encode()
    tags = {"key": recipe.key} | tags
    files = FILES | {"model/key.json": key_json}
    return make_run(root, recipe.key, files=files, tags=tags, snapshot=oid, host="their-box")


def runkey(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runkey", *arguments],
        cwd=root, env=clean_environment(), capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def evil(root: Path, mark: Path) -> str:
    """A snapshot of the same key with code in rooms that keys leave out, and beside the code."""
    text = MARK.replace("/MARK", str(mark))
    places = ("runkey/__init__.py", "runkey/identity/key.py", "runkey/registry/__init__.py")
    changes = {name: lambda old: old + text for name in (*places[1:], "json.py")}
    return commit(root, changes)


def test_the_key_is_checked_without_executing_the_snapshot(root: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    oid = evil(root, mark)
    record = record_of(root, oid)
    tree = add_worktree(root, oid, tmp_path / "tree", "")
    _check_key(record, LocalLibrary(root / ".runkey"), root, tree)
    assert not mark.exists()


def test_nobody_is_asked_without_a_terminal_and_nothing_runs(root: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    record = record_of(root, evil(root, mark), **{ORIGIN: "a" * 32, TAKEN: "imported from x.zip"})
    done = runkey(root, "reproduce", record.label)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(
        f"error: {record.label}: made on their-box, imported from x.zip; to train it again executes"
        " its code, in which 3 files differ from yours: json.py, runkey/identity/key.py,"
        " runkey/registry/__init__.py (`git diff "
    )
    assert done.stderr.endswith("; --trust executes it\n")
    assert not mark.exists()
    assert not (root / ".runkey" / "reproduce").exists()


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["n", ""])
def test_the_terminal_is_asked(root: Path, tmp_path: Path, answer: str) -> None:
    mark = tmp_path / "executed"
    record = record_of(root, evil(root, mark), **{ORIGIN: "a" * 32})
    ours, theirs = os.openpty()
    os.write(ours, f"{answer}\n".encode())
    process = subprocess.Popen(
        [sys.executable, "-m", "runkey", "reproduce", record.label],
        cwd=root, env=clean_environment(), stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    assert process.wait() == 1
    written = " ".join(os.read(ours, 1 << 16).decode().split())
    assert "made on their-box, taken from elsewhere; to train it again executes" in written
    assert "Execute it? [y/N]: " in written
    assert f"error: {record.label}: not trained again" in written
    assert not mark.exists()


@pytest.mark.slow
def test_trust_goes_on_to_the_key(root: Path) -> None:
    oid = commit(root, {"dvc.yaml": lambda text: text.replace("stages.train", "stages.evil", 1)})
    record = record_of(root, oid, **{ORIGIN: "a" * 32})
    done = runkey(root, "reproduce", record.label, "--trust")
    assert done.returncode == 1
    assert "stages.evil" in done.stderr  # there is no such module
    assert "--trust" not in done.stderr


def test_what_is_asked_about(root: Path) -> None:
    same = git(root, "rev-parse", "HEAD")
    changes = {name: lambda text: f"{text}#" for name in ("README.md", "stages/train.py")}
    # What the pipeline writes is no code.
    other = commit(
        root, changes | {"dvc.lock": lambda _: "x", "metrics/train.json": lambda _: "{}"}
    )
    copied = {ORIGIN: "a" * 32}

    def files(oid: str, *, is_shared: bool = False, **tags: str) -> tuple[str, ...] | None:
        found = foreign_code(record_of(root, oid, **tags), root, is_shared=is_shared)
        return found and found.files

    assert files(other) is None  # made here
    assert files(other, **copied) == ("stages/train.py", "README.md")
    assert files(other, is_shared=True) == ("stages/train.py", "README.md")
    assert files(same, **copied) is None  # the very code of this checkout
    (root / "stages" / "train.py").write_text("mine")
    assert files(same, **copied) == ("stages/train.py",)
    assert files("1" * 40, **copied) is None  # not in git here: nothing to execute


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("params.yaml", lambda text: text.replace("seed: ", "seed: 1"), "params"),
        ("params.yaml", lambda text: text.replace("level: repair", "level: drop"), "params"),
        ("runkey/model/boxes.py", lambda text: text.replace(" 0.5 *", " 0.25 *"), "code"),
        ("data.dvc", lambda text: text.replace("0123", "4567"), "data"),
        ("dvc.yaml", lambda text: text.replace("stages.prepare", "stages.train", 1), "cmd"),
    ],
)
def test_a_snapshot_of_another_key(
    root: Path, tmp_path: Path, name: str, change: Callable[[str], str], part: str
) -> None:
    oid = commit(root, {name: change})
    record = record_of(root, oid)
    tree = add_worktree(root, oid, tmp_path / "tree", "")
    with pytest.raises(RegistryError, match=f"its snapshot is of another key: .*{part}.* differ"):
        _check_key(record, LocalLibrary(root / ".runkey"), root, tree)


def test_a_recipe_of_another_version_of_runkey(root: Path) -> None:
    """It had a parameter that is gone, and lacked one that params.yaml does not set."""
    path = root / "params.yaml"
    path.write_text(path.read_text().replace("\n  num_queries:", "\n  # num_queries:"))
    git(root, "commit", "-q", "-a", "-m", "mine", env=WHO)
    found = make_recipe("train", root)
    params = dict(found.preimages["params"]) | {"old.name": 1}
    params["model.num_queries"] = 77  # its default then
    older: Recipe = replace(found, preimages=dict(found.preimages) | {"params": params})
    assert older.key != found.key
    assert _differing(older, found, root, root) == []
    params["lr"] = 0.5
    assert _differing(older, found, root, root) == ["params"]
