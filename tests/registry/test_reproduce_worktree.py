"""The checkout of a snapshot: made, given DVC's cache and remotes, taken away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.identity.dvc_yaml import cache_folder
from runkey.registry.checkout import clean_environment, share_cache
from runkey.registry.reproduce import left_behind
from runkey.registry.snapshot import add_worktree, git, remove_worktree
from runkey.training.lock import locked

WHO = {
    f"GIT_{role}_{what}": value
    for role in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Tester"), ("EMAIL", "tester@example.org"))
}
CONFIG = """[core]
    remote = store
['remote "seed"']
    url = ../seed
['remote "store"']
    url = store
['remote "team"']
    url = s3://bucket/path
"""


@pytest.fixture
def main(tmp_path: Path) -> Path:
    """A repository with DVC's settings, and a hook that must not run."""
    root = tmp_path / "main"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text(CONFIG)
    (root / ".dvc" / ".gitignore").write_text("/config.local\n/cache\n/store\n/tmp\n")
    (root / "seed").mkdir()
    (root / "seed" / "object").write_text("x")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "start", env=WHO)
    hook = root / ".git" / "hooks" / "post-checkout"
    hook.write_text("#!/bin/sh\ntouch hooked\n")
    hook.chmod(0o755)
    return root


def test_it_is_made_and_taken_away(main: Path, tmp_path: Path) -> None:
    oid = git(main, "rev-parse", "HEAD")
    folder = tmp_path / "home" / "reproduce" / "a-1"
    root = add_worktree(main, oid, folder, "fetch it")
    assert root == folder
    assert (root / "seed" / "object").is_file()
    assert not (root / "hooked").exists()
    assert git(root, "rev-parse", "HEAD") == oid
    remove_worktree(main, folder)
    assert not folder.exists()
    assert len(git(main, "worktree", "list").splitlines()) == 1
    assert git(main, "status", "--porcelain") == ""


def test_an_interrupted_reproduction_goes_on_where_it_was(main: Path, tmp_path: Path) -> None:
    oid, home = git(main, "rev-parse", "HEAD"), tmp_path / "reproduce"
    half = home / "a-0"  # killed while it was checked out
    add_worktree(main, oid, half, "fetch it")
    assert left_behind(home, "a", oid) is None
    whole = home / "a-1"
    add_worktree(main, oid, whole, "fetch it")
    with locked(whole):
        pass
    assert left_behind(home, "a", oid) == whole
    assert left_behind(home, "a", "0" * 40) is None
    assert left_behind(home, "b", oid) is None
    stage = subprocess.Popen(["sleep", "1.5"], cwd=whole)
    assert left_behind(home, "a", oid) == whole
    assert stage.poll() is not None  # it waited for the stage
    held = "import sys; from pathlib import Path; from runkey.training.lock import locked\n"
    held += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", held, str(whole)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout
    assert other.stdout.readline() == b"held\n"
    assert left_behind(home, "a", oid) is None
    other.communicate()


def test_a_missing_snapshot_says_how_to_get_it(main: Path, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="snapshot 111111111111: not in git here; fetch it"):
        add_worktree(main, "1" * 40, tmp_path / "tree", "fetch it")
    assert not (tmp_path / "tree").exists()


def test_dvc_finds_the_main_checkouts_cache_and_remotes(main: Path, tmp_path: Path) -> None:
    (main / ".dvc" / "config.local").write_text(
        "['remote \"team\"']\n    access_key_id = name\n[cache]\n    type = copy\n"
    )
    root = add_worktree(main, git(main, "rev-parse", "HEAD"), tmp_path / "tree", "")
    share_cache(main, root)
    assert cache_folder(root) == main / ".dvc" / "cache"
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "config", "--list"],
        cwd=root,
        env=clean_environment(main, {}),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    # The sample data lie in the snapshot itself, what was pushed beside the main checkout.
    assert "remote.seed.url=" + str(root / "seed") in listed or (
        "remote.seed.url=../seed" in listed
    )
    assert f"remote.store.url={main / '.dvc' / 'store'}" in listed
    assert "remote.team.url=s3://bucket/path" in listed
    assert "remote.team.access_key_id=name" in listed
    assert "cache.type=copy" in listed
    # It may hold passwords.
    assert (root / ".dvc" / "config.local").stat().st_mode & 0o777 == 0o600
    assert git(root, "status", "--porcelain") == ""


def test_a_link_in_a_snapshot_is_not_written_through(main: Path, tmp_path: Path) -> None:
    mine = tmp_path / "bashrc"
    mine.write_text("mine")
    root = add_worktree(main, git(main, "rev-parse", "HEAD"), tmp_path / "tree", "")
    (root / ".dvc" / "config.local").symlink_to(mine)
    share_cache(main, root)
    assert mine.read_text() == "mine"
    assert not (root / ".dvc" / "config.local").is_symlink()


def test_dvc_is_not_told_of_another_run(main: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "GIT_DIR"):
        monkeypatch.setenv(name, "another")
    env = clean_environment(main, {"RUNKEY_REPRODUCES": "abc"})
    assert "another" not in env.values()
    assert env["DVC_ROOT"] == str(main)
    assert env["RUNKEY_REPRODUCES"] == "abc"
    assert env["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
