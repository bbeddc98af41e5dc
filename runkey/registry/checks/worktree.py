"""A checkout of a run's snapshot, beside the store, with the main checkout's DVC cache and data."""

from __future__ import annotations

import configparser
import io
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runkey.errors import RegistryError
from runkey.identity.dvc_files import cache_folder, read_config
from runkey.identity.pipeline import chain, pointer_of, read_pipeline
from runkey.params import load_params
from runkey.paths import PARAMS
from runkey.registry.git import git

# A user's hooks (DVC's own among them) are for his checkouts, not for this one.
_NO_HOOKS = ("-c", "core.hooksPath=/dev/null")
_REMOTE = re.compile(r"""^'?remote "(.+)"'?$""")


@dataclass(frozen=True)
class Worktree:
    """A checked-out snapshot."""

    top: Path
    """Its top folder, which git knows as a worktree."""
    root: Path
    """The folder of it that is the repository's workspace; most often the same."""


def add_worktree(main: Path, oid: str, folder: Path, way_out: str) -> Worktree:
    """Check a snapshot out.

    Args:
        main: the main checkout.
        oid: the commit.
        folder: to be made.
        way_out: said where the commit is missing.

    Raises:
        RegistryError: the commit is not there, or git refuses.
    """
    try:
        git(main, "cat-file", "-e", f"{oid}^{{tree}}")
    except RegistryError:
        raise RegistryError(f"snapshot {oid[:12]}: not in git here; {way_out}") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    git(main, *_NO_HOOKS, "worktree", "add", "--detach", str(folder), oid)
    return Worktree(folder, folder / git(main, "rev-parse", "--show-prefix"))


def remove_worktree(main: Path, tree: Worktree) -> None:
    """Delete the checkout, and what git keeps of it."""
    shutil.rmtree(tree.top, ignore_errors=True)
    git(main, "worktree", "prune")


def share_cache(main: Path, root: Path) -> None:
    """Let DVC in a checkout use the main checkout's cache, and reach its remotes.

    Relative addresses are meant from where they are written: an in-tree remote such as sample-data
    is the snapshot's own, another one the main checkout's.

    Args:
        main: the main checkout.
        root: the other one, at a commit with DVC's settings.
    """
    settings = main / ".dvc"
    local = read_config(settings / "config.local")
    for section in read_config(settings / "config").sections():
        if _REMOTE.match(section) and not local.has_section(section):
            local.add_section(section)
    for section in local.sections():
        if _REMOTE.match(section):
            _place_remote(local, section, settings, root / ".dvc")
    if not local.has_section("cache"):
        local.add_section("cache")
    local.set("cache", "dir", str(cache_folder(main)))
    text = io.StringIO()
    local.write(text)
    (root / ".dvc" / "config.local").write_text(text.getvalue(), encoding="utf-8")


def _place_remote(
    local: configparser.ConfigParser, section: str, settings: Path, other: Path
) -> None:
    """Make a remote's relative addresses absolute, unless the other checkout has the folder."""
    shared = read_config(settings / "config")
    for name, value in [*shared.items(section)] * shared.has_section(section):
        if name == "url" and not local.has_option(section, name):
            local.set(section, name, value)
    for name, value in local.items(section):
        path = value.strip("\"'")
        if name != "url" and not name.endswith(("file", "path", "_file_path")):
            continue
        if "://" in path or Path(path).expanduser().is_absolute():
            continue
        if name == "url" and (other / path).is_dir():
            local.remove_option(section, name)
        else:
            local.set(section, name, str((settings / path).resolve()))


def tracked_inputs(root: Path, stage: str) -> list[str]:
    """The .dvc files of the data that a stage and those before it read, relative to `root`.

    Raises:
        ParamsError, RecipeError: params.yaml or dvc.yaml cannot be read.
    """
    flat = load_params(root / PARAMS).flat()
    stages = chain(read_pipeline(root, flat), stage)
    wanted = [str(flat["data.path"]).rstrip("/"), *(dep for one in stages for dep in one.deps)]
    found = (pointer_of(dep, root) for dep in wanted)
    return list(dict.fromkeys(file for file in found if file))


def clean_environment(main: Path, more: Mapping[str, str]) -> dict[str, str]:
    """This process's variables for DVC in another checkout, whose runs go to `main`'s store.

    DVC would take over what a stage or an experiment was told; git, what a hook was told.

    Args:
        main: the main checkout.
        more: variables to add.
    """
    strange = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    return kept | {"DVC_ROOT": str(main)} | dict(more)
