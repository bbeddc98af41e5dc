"""Train a recorded run again from its snapshot, and compare the two.

    <home>/reproduce/<short key>-<process id>/     the worktree, removed afterwards

The pipeline runs there with DVC's run-cache off: with it, DVC would give the first result back and
prove nothing.  Nothing of the repeat enters DVC's cache either (`--no-commit`), where the newest
entry of a key wins; it is kept in the store, as a run of its own.
"""

from __future__ import annotations

import configparser
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from runkey import paths
from runkey.errors import RegistryError, RunkeyError
from runkey.evaluation.files import METRICS
from runkey.hashing import sha256_file
from runkey.identity.dvc_files import cache_folder, read_config
from runkey.identity.dvc_yaml import chain, pointer_of, read_pipeline
from runkey.identity.key import PARTS, Recipe
from runkey.identity.manifest import RunManifest
from runkey.identity.record import REPRODUCES, Details, Record, this_host
from runkey.params import load_params
from runkey.paths import PARAMS
from runkey.registry.compare_runs import IDENTICAL, Side, Verdict, compare_runs
from runkey.registry.environment import compare_environment
from runkey.registry.gc import mark_owner
from runkey.registry.library import Library
from runkey.registry.snapshot import git
from runkey.registry.verify_places import some

# A checkout of a run's snapshot, beside the store, with the main checkout's DVC cache and data.


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


TARGET = "evaluate"
"""The stage that is asked for; all before it run as well."""
_PATIENCE = 30.0
"""Seconds that an interrupted pipeline has to end by itself."""
# The snapshot's own code says what its key is: a later version has other defaults.
_ASK_KEY = (
    "import json; from pathlib import Path; from runkey.identity.key import make_recipe;"
    " print(json.dumps(make_recipe({stage!r}, Path()).as_dict()))"
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be reproduced, and how."""

    library: Library
    record: Record
    """The run, with its details."""
    main: Path
    """The main checkout: its git, DVC cache and store are used."""
    home: Path
    """`Store.home`."""
    say: Callable[[str], None]
    """Told what is done, in one line each."""
    output: TextIO
    """A real file that the pipeline writes its own lines to."""
    keep: bool = False
    """Leave the worktree there."""
    any_environment: bool = False
    """Go on where packages are not as the snapshot locks them."""


@dataclass(frozen=True)
class Repeat:
    """A run that was reproduced."""

    run_id: str | None
    """MLflow's; None if its parameters switch MLflow off."""
    seconds: float
    verdict: Verdict
    outcome: dict[str, Any]
    """For `Details.outcomes` of the first run."""


def reproduce(request: Request) -> Repeat:
    """Train the run again and compare.

    Raises:
        RegistryError: it cannot be reproduced here, or the pipeline failed; the text says what is
            missing, and where the worktree was left.
        KeyboardInterrupt: the pipeline was ended first, the worktree is gone.
    """
    record, details = request.record, _whole(request.record)
    if details.snapshot is None:
        raise RegistryError(
            f"{record.label}: its code was not kept (it ran outside git); it cannot be reproduced"
        )
    folder = request.home / "reproduce" / f"{record.label}-{os.getpid()}"
    tree = add_worktree(
        request.main, details.snapshot, folder, f"`runkey fetch {record.label}` brings it"
    )
    mark_owner(tree.top)
    request.say(f"snapshot {details.snapshot[:12]} is checked out in {tree.top}")
    try:
        repeat = _repeat(request, details, tree)
    except RunkeyError as error:
        raise RegistryError(f"{error}; its worktree is left in {tree.top}") from None
    except KeyboardInterrupt:
        remove_worktree(request.main, tree)
        request.say(f"interrupted; {tree.top} is removed")
        raise
    if request.keep:
        request.say(f"the worktree is kept: {tree.top}; `git worktree remove` ends it")
    else:
        remove_worktree(request.main, tree)
    return repeat


def _whole(record: Record) -> Details:
    if not record.is_whole or record.details is None:
        raise RegistryError(
            f"{record.label}: run {record.run.run_id} is {record.run.status}, without a recorded"
            " result to compare with"
        )
    return record.details


def _repeat(request: Request, details: Details, tree: Worktree) -> Repeat:
    """Make ready, train and evaluate, compare."""
    record, root = request.record, tree.root
    env = clean_environment(request.main, {REPRODUCES: record.run.run_id})
    # DVC's stages call `python`: this one.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    _check_key(request, details.stage, root, env)
    _check_packages(request, details, root)
    share_cache(request.main, root)
    _fetch_data(request, root, env)
    (root / "dvc.lock").unlink(missing_ok=True)
    request.say("training again: dvc repro without its run-cache")
    begin = time.monotonic()
    _run(["-m", "dvc", "repro", "--no-run-cache", "--no-commit", TARGET], root, env, request.output)
    seconds = time.monotonic() - begin
    manifest = RunManifest.read(root / paths.RUN_JSON)
    if manifest.run_id == record.run.run_id:
        raise RegistryError(
            f"{record.label}: the snapshot's train stage took the run's own files and did not train"
        )
    verdict = compare_runs(_first(record, details), _second(root, manifest))
    outcome = {
        "when_ms": time.time_ns() // 1_000_000,
        "run_id": manifest.run_id,
        "host": this_host(),
        "seconds": round(seconds, 1),
        **verdict.as_dict(),
    }
    return Repeat(manifest.run_id, seconds, verdict, outcome)


def _check_key(request: Request, stage: str, root: Path, env: Mapping[str, str]) -> None:
    """Stop if the checked-out tree is of another key than the run."""
    record = request.record
    code = _ASK_KEY.format(stage=stage)
    asked = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=dict(env),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    try:
        found = Recipe.from_dict(json.loads(asked.stdout))
    except ValueError:
        said = (asked.stderr.strip() or "no answer").splitlines()[-1]
        raise RegistryError(f"{record.label}: the snapshot's key cannot be made: {said}") from None
    if found.key == record.key:
        request.say("its key is the run's")
        return
    parts = record.run.parts
    differing = [part for part in PARTS if found.parts[part] != parts[part]]
    raise RegistryError(
        f"{record.label}: its snapshot has the key {found.key}; the {' and '.join(differing)} of"
        f" the key differ{'s' if len(differing) == 1 else ''}; `runkey verify {record.label}` says"
        " more"
    )


def _check_packages(request: Request, details: Details, root: Path) -> None:
    """Stop if what is installed is not what the snapshot locks, unless the run had the same."""
    found = compare_environment(root)
    if found.agrees:
        request.say(f"{found.same} packages are installed as {found.against} of then locks them")
        return
    lines = [
        f"{d.name}: locked {d.locked}, installed {d.installed or 'none'}"
        for d in (*found.of_kind("missing"), *found.of_kind("other"))
    ]
    told = f"{len(lines)} packages are not as {found.against} of then locks them: {some(lines)}"
    if sorted(lines) == sorted(details.witness["package_differences"]):
        request.say(f"{told}; the run itself had the same")
    elif request.any_environment:
        request.say(f"{told}; goes on, as --any-environment says")
    else:
        raise RegistryError(
            f"{told}; `runkey env export {request.record.label}` gives the lists to install from,"
            " --any-environment goes on as it is"
        )


def _fetch_data(request: Request, root: Path, env: Mapping[str, str]) -> None:
    """Put the data in place by their hash: from DVC's cache, else from their remote."""
    for file in tracked_inputs(root, TARGET):
        dvc = [sys.executable, "-m", "dvc"]
        done = subprocess.run(
            [*dvc, "checkout", "--quiet", file],
            cwd=root,
            env=dict(env),
            capture_output=True,
            check=False,
        )
        if done.returncode:
            request.say(f"{file}: not whole in DVC's cache; it is pulled")
            _run(["-m", "dvc", "pull", file], root, env, request.output)
        else:
            request.say(f"{file}: data from DVC's cache, by their hash")


def _run(arguments: list[str], root: Path, env: Mapping[str, str], output: TextIO) -> None:
    """Run Python in the worktree, its output passed on; ended with us.

    It has a process group of its own, so that all of it can be ended: DVC, the stage, its workers.

    Raises:
        RegistryError: it failed.
    """
    child = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=root,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        code = child.wait()
    except BaseException:
        _end(child)
        raise
    if code:
        raise RegistryError(f"python {' '.join(arguments)}: failed with exit code {code}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process group: first as Ctrl-C does, so that the run is marked in MLflow."""
    for number, seconds in ((signal.SIGINT, _PATIENCE), (signal.SIGTERM, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
            break
    # Whoever of the group is left, the leader or not.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _first(record: Record, details: Details) -> Side:
    hashes = {path: file.sha256 for path, file in details.files.items()}
    return Side(details.witness, hashes, record.run.metrics)


def _second(root: Path, manifest: RunManifest) -> Side:
    """The repeat, from the files that it wrote."""
    hashes = {p: sha256_file(root / p) for p in IDENTICAL if (root / p).is_file()}
    # All of COCO's numbers; DVC's metrics are a few of them.
    numbers = json.loads((root / paths.EVALUATION / METRICS).read_text(encoding="utf-8"))
    metrics = {f"eval/{n}": float(v) for n, v in numbers.items() if isinstance(v, int | float)}
    return Side(vars(manifest.witness), hashes, metrics)


def with_outcome(details: Details, repeat: Repeat) -> Details:
    """The details of the first run with what its repeat gave."""
    return replace(details, outcomes=[*details.outcomes, repeat.outcome])
