"""git, run as a command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

from runkey.errors import RegistryError

# What makes git look elsewhere than in its current folder; hooks and DVC hand them down.
_ELSEWHERE = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_IMPLICIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE"),
    *("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_QUARANTINE_PATH"),
    *("GIT_PREFIX", "GIT_NAMESPACE", "GIT_GRAFT_FILE", "GIT_SHALLOW_FILE"),
    *("GIT_REPLACE_REF_BASE", "GIT_LITERAL_PATHSPECS", "GIT_GLOB_PATHSPECS"),
)


def git(
    root: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    text: str | None = None,
    accept: Collection[int] = (0,),
) -> str:
    """What a git command prints, without the line end.

    Args:
        root: folder that it is run in; inherited variables that name another repository are void.
        arguments: after `git`.
        env: variables beside this process's own.
        text: its standard input.
        accept: exit codes that are no failure.

    Raises:
        RegistryError: git is not installed, or the command failed; the text has its last line.
    """
    printed = git_bytes(root, *arguments, env=env, text=text, accept=accept)
    return printed.decode("utf-8", "surrogateescape").rstrip("\n")


def git_bytes(
    root: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    text: str | None = None,
    accept: Collection[int] = (0,),
) -> bytes:
    """What a git command prints, byte for byte; all else as in `git`."""
    own = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            env=own | dict(env or {}),
            input=None if text is None else text.encode("utf-8", "surrogateescape"),
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        raise RegistryError("git: not installed; the code of a run is kept with it") from None
    if done.returncode not in accept:
        told = (done.stderr.strip() or done.stdout.strip()).decode("utf-8", "replace")
        said = (told or "no message").splitlines()
        raise RegistryError(f"git {arguments[0]}: {said[-1].removeprefix('fatal: ')}")
    return done.stdout


def has_git(root: Path) -> bool:
    """Whether `root` lies in a git repository (and git is installed)."""
    try:
        git(root, "rev-parse", "--git-dir")
    except RegistryError:
        return False
    return True
