"""git, run as a command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from runkey.errors import RegistryError


def git(
    root: Path, *arguments: str, env: Mapping[str, str] | None = None, text: str | None = None
) -> str:
    """What a git command prints, without the line end.

    Args:
        root: folder that it is run in.
        arguments: after `git`.
        env: variables beside this process's own.
        text: its standard input.

    Raises:
        RegistryError: git is not installed, or the command failed; the text has its last line.
    """
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            env=os.environ | dict(env or {}),
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=False,
        )
    except FileNotFoundError:
        raise RegistryError("git: not installed; the code of a run is kept with it") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise RegistryError(f"git {arguments[0]}: {said[-1].removeprefix('fatal: ')}")
    return done.stdout.rstrip("\n")


def has_git(root: Path) -> bool:
    """Whether `root` lies in a git repository (and git is installed)."""
    try:
        git(root, "rev-parse", "--git-dir")
    except RegistryError:
        return False
    return True
