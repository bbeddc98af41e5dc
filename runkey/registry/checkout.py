"""Another checkout of this repository, such as a snapshot's worktree, and DVC in it.

It uses the main checkout's DVC cache, remotes and store.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from runkey.errors import RegistryError
from runkey.files import write_atomically
from runkey.identity.dvc_yaml import cache_folder, chain, pointer_of, read_config, read_pipeline
from runkey.params import load_params
from runkey.paths import PARAMS
from runkey.registry.snapshot import ELSEWHERE

logger = logging.getLogger(__name__)

TARGET = "evaluate"
"""The stage to run; those before it run as well."""
_PATIENCE = 30.0
"""Seconds that an interrupted pipeline has to end by itself."""


def share_cache(main: Path, root: Path, *, links: bool = False) -> None:
    """Let DVC in a checkout use the main checkout's cache and remotes.

    With `links` its files are links into the cache, read-only, unless the settings say otherwise:
    so many checkouts of large data take no more room than one.

    Relative addresses are relative to the settings that hold them. A remote whose folder exists in
    the other checkout, such as sample-data, is used there; any other is the main checkout's.
    """
    settings, other = main / ".dvc", root / ".dvc"
    shared, local = read_config(settings / "config"), read_config(settings / "config.local")
    local.read_dict({"cache": {"dir": str(cache_folder(main))}})
    if links and not shared.has_option("cache", "type"):
        local.read_dict({"cache": {"type": "reflink,hardlink,copy"}})
    sections = (*shared.sections(), *local.sections())
    for section in (s for s in sections if s.strip("'").startswith("remote ")):
        options = dict(local[section]) if section in local else {}
        if shared.has_option(section, "url"):
            options = {"url": shared[section]["url"]} | options
        local[section] = {}
        for name, value in options.items():
            path = value.strip("\"'")
            is_path = name == "url" or name.endswith(("file", "path"))
            if not is_path or "://" in path or Path(path).expanduser().is_absolute():
                local[section][name] = value
            elif name != "url" or not (other / path).is_dir():
                local[section][name] = str((settings / path).resolve())
    text = io.StringIO()
    local.write(text)
    # It may hold the remotes' passwords; a link of the snapshot is replaced, not followed.
    write_atomically(other / "config.local", text.getvalue(), mode=0o600)


def clean_environment(
    main: Path, more: Mapping[str, str], python: str = sys.executable
) -> dict[str, str]:
    """Return variables for DVC in another checkout, whose runs go to the store of `main`.

    Variables that a stage, an experiment or a hook has set would name another checkout. DVC's
    stages call `python`, which must be the given one.
    """
    path = f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    dropped = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_", *ELSEWHERE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "PATH": path, "DVC_ROOT": str(main), **more}


def fetch_data(root: Path, env: Mapping[str, str], output: TextIO | int) -> None:
    """Check out the data by their hash: from DVC's cache, else from their remote."""
    flat = load_params(root / PARAMS).flat()
    stages = chain(read_pipeline(root, flat), TARGET)
    wanted = [str(flat["data.path"]).rstrip("/"), *(dep for one in stages for dep in one.deps)]
    for file in dict.fromkeys(filter(None, (pointer_of(dep, root) for dep in wanted))):
        try:
            run_dvc(["checkout", "--quiet", file], root, env, subprocess.DEVNULL)
            logger.info(f"{file}: data from DVC's cache, by their hash")
        except RegistryError:
            logger.info(f"{file}: not whole in DVC's cache; it is pulled")
            run_dvc(["pull", file], root, env, output)


def run_dvc(arguments: list[str], root: Path, env: Mapping[str, str], output: TextIO | int) -> None:
    """Run DVC in the worktree; an interruption ends it, the stage and its workers together.

    Raises:
        RegistryError: it failed.
    """
    command = ["-m", "dvc", *arguments]
    child = subprocess.Popen(
        [shutil.which("python", path=env["PATH"]) or sys.executable, *command],
        cwd=root,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        code = child.wait()
    except BaseException:
        # First as Ctrl-C does, so that MLflow records the end of the run; at last those of the
        # group that outlive their leader.
        for number, seconds in ((signal.SIGINT, _PATIENCE), (signal.SIGTERM, 5.0)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(child.pid, number)
                child.wait(seconds)
                break
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    if code:
        raise RegistryError(f"python {' '.join(command)}: failed with exit code {code}")
