"""Train a recorded run again from its snapshot, and compare the two.

    <home>/reproduce/<short key>-<process id>/     the worktree, removed afterwards

The pipeline runs there without DVC's run-cache, which would give the first result back and prove
nothing. Nothing of the repeat enters DVC's cache either (`--no-commit`), where the newest entry of
a key wins; it is kept in the store, as a run of its own.

Two runs of one key on the same class of machine give the same weights, bit for bit. On another
device, micro-batch, number of threads or packages sums are rounded in another order, and training
amplifies the difference with every step; the metrics are then compared within a tolerance.
"""

from __future__ import annotations

import configparser
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from runkey import paths
from runkey.errors import RegistryError, RunkeyError
from runkey.evaluation.files import METRICS
from runkey.hashing import sha256_file
from runkey.identity.dvc_yaml import cache_folder, chain, pointer_of, read_config, read_pipeline
from runkey.identity.key import PARTS, Recipe
from runkey.identity.manifest import RunManifest
from runkey.identity.record import REPRODUCES, Details, Record, this_host
from runkey.params import load_params
from runkey.paths import PARAMS
from runkey.registry.environment import compare_environment
from runkey.registry.gc import mark_owner
from runkey.registry.snapshot import git
from runkey.registry.verify import first_few

logger = logging.getLogger(__name__)

# The comparison of a run and its repeat.


AP_TOLERANCE = 0.02
"""Absolute, of metrics in 0..1 such as AP and AR. Other seeds of the sample give AP 0.655 to 0.668
(benchmarks/results/pipeline.md); another order of rounding changes no more than another seed."""
LOSS_TOLERANCE = 0.05
"""Relative, of losses, which have no upper bound."""
WEIGHTS = ("model/weights.safetensors", "model/weights.pt")
"""The weights file; older runs have the latter."""
IDENTICAL = (*WEIGHTS, "evaluation/predictions.json")
"""Files that are compared bit by bit: the weights, and the predictions on the held-out images. The
other files hold times and names."""
_COMPARED = re.compile(r"eval/(?!loss_)")
"""Metrics of the evaluation; of the losses only their sum."""
WITNESS_CLASS = (
    "device",
    "micro_batch",
    "world_size",
    "threads",
    "precision",
    "interpreter",
    "package_differences",
)
"""Fields of a witness that make its class."""


@dataclass(frozen=True)
class MetricPair:
    """A metric of both runs."""

    name: str
    first: float
    repeat: float

    @property
    def tolerance(self) -> float:
        """Largest allowed absolute difference."""
        if "loss" in self.name:
            return LOSS_TOLERANCE * max(abs(self.first), abs(self.repeat))
        return AP_TOLERANCE

    @property
    def is_near(self) -> bool:
        """True if they are within the tolerance; NaN never is."""
        return abs(self.first - self.repeat) <= self.tolerance


@dataclass(frozen=True)
class FilePair:
    """A file of both runs that should be the same."""

    path: str
    first: str | None
    """Hex sha256; None: the run has no such file."""
    repeat: str | None

    @property
    def is_same(self) -> bool:
        """True if both have it, with the same bits."""
        return self.first == self.repeat and self.first is not None


@dataclass(frozen=True)
class RunComparison:
    """The comparison of a run and its repeat."""

    class_differences: tuple[str, ...]
    """Such as `threads 1 | 2`; empty: the same witness class."""
    files: tuple[FilePair, ...]
    metrics: tuple[MetricPair, ...]

    @property
    def same_class(self) -> bool:
        """True if bit-identical results are due."""
        return not self.class_differences

    @property
    def identical(self) -> bool:
        """True if all files have the same bits."""
        return all(file.is_same for file in self.files)

    @property
    def within_tolerance(self) -> bool:
        """True if there are metrics, and all are within the tolerance."""
        return bool(self.metrics) and all(metric.is_near for metric in self.metrics)

    @property
    def holds(self) -> bool:
        """True if the repeat gave what it should."""
        return self.identical or (not self.same_class and self.within_tolerance)

    @property
    def line(self) -> str:
        """The result in words."""
        if self.identical:
            return "reproduced: bit-identical weights and predictions"
        if self.same_class:
            changed = ", ".join(file.path for file in self.files if not file.is_same)
            near = "within" if self.within_tolerance else "outside"
            return (
                f"NOT reproduced: {changed} differ on the same kind of machine ({near} tolerance)"
            )
        if self.within_tolerance:
            return "reproduced within tolerance, on another kind of machine"
        far = ", ".join(metric.name for metric in self.metrics if not metric.is_near)
        return f"NOT reproduced: {far or 'no number'} within tolerance"

    def as_dict(self) -> dict[str, Any]:
        """Format for the record of the first run."""
        return {
            "same_class": self.same_class,
            "class_differences": list(self.class_differences),
            "identical": self.identical,
            "within_tolerance": self.within_tolerance,
            "reproduced": self.holds,
            "files": {file.path: [file.first, file.repeat] for file in self.files},
            "metrics": {
                m.name: [_none_if_nan(m.first), _none_if_nan(m.repeat)] for m in self.metrics
            },
        }


@dataclass(frozen=True)
class RunResult:
    """The compared part of one of the two runs."""

    witness: Mapping[str, Any]
    hashes: Mapping[str, str]
    """Hex sha256 by path."""
    metrics: Mapping[str, float]
    """By MLflow's names; those of the evaluation are compared."""


def compare_runs(first: RunResult, repeat: RunResult) -> RunComparison:
    """Compare a run with its repeat.

    Raises:
        RegistryError: the first has no weights recorded, so nothing can be said.
    """
    if not any(path in first.hashes for path in WEIGHTS):
        raise RegistryError(f"{WEIGHTS[0]}: the run recorded none, so there is nothing to compare")
    # NaN: the data have no object of that size, in either run.
    names = sorted(n for n, v in first.metrics.items() if _COMPARED.match(n) and math.isfinite(v))
    return RunComparison(
        tuple(_class_differences(first.witness, repeat.witness)),
        tuple(
            FilePair(path, first.hashes[path], repeat.hashes.get(path))
            for path in IDENTICAL
            if path in first.hashes
        ),
        tuple(
            MetricPair(name, first.metrics[name], repeat.metrics.get(name, math.nan))
            for name in names
        ),
    )


def _none_if_nan(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _class_differences(first: Mapping[str, Any], repeat: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {_class_text(first.get(name))} | {_class_text(repeat.get(name))}"
        for name in WITNESS_CLASS
        if first.get(name) != repeat.get(name)
    ]


def _class_text(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} of other versions"
    return str(value)


# The checkout of a snapshot, with the DVC cache and data of the main checkout.


# Hooks, such as DVC's own, are meant for the user's checkouts.
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
    """Check out a snapshot.

    Args:
        main: the main checkout.
        oid: the commit.
        folder: to be made.
        way_out: shown where the commit is missing.

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
    """Delete the checkout and git's note of it."""
    shutil.rmtree(tree.top, ignore_errors=True)
    git(main, "worktree", "prune")


def share_cache(main: Path, root: Path) -> None:
    """Let DVC in a checkout use the main checkout's cache and remotes.

    Relative addresses are relative to the settings that hold them. A remote whose folder exists in
    the other checkout, such as sample-data, is used there; any other is the main checkout's.

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
    """List the .dvc files of the data that a stage and those before it read, relative to `root`.

    Raises:
        ParamsError, RecipeError: params.yaml or dvc.yaml cannot be read.
    """
    flat = load_params(root / PARAMS).flat()
    stages = chain(read_pipeline(root, flat), stage)
    wanted = [str(flat["data.path"]).rstrip("/"), *(dep for one in stages for dep in one.deps)]
    found = (pointer_of(dep, root) for dep in wanted)
    return list(dict.fromkeys(file for file in found if file))


def clean_environment(main: Path, more: Mapping[str, str]) -> dict[str, str]:
    """Return variables for DVC in another checkout, whose runs go to `main`'s store.

    Variables that a stage, an experiment or a hook has set would name another checkout.

    Args:
        main: the main checkout.
        more: variables to add.
    """
    dropped = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"DVC_ROOT": str(main)} | dict(more)


TARGET = "evaluate"
"""The stage to run; those before it run as well."""
_PATIENCE = 30.0
"""Seconds that an interrupted pipeline has to end by itself."""
# The snapshot's own code makes the key: a later version has other defaults.
_ASK_KEY = (
    "import json; from pathlib import Path; from runkey.identity.key import make_recipe;"
    " print(json.dumps(make_recipe({stage!r}, Path()).as_dict()))"
)


@dataclass(frozen=True, kw_only=True)
class ReproduceRequest:
    """What to reproduce, and how."""

    record: Record
    """The run, with its details."""
    main: Path
    """The main checkout: its git, DVC cache and store are used."""
    home: Path
    """`Store.home`."""
    output: TextIO
    """A real file that the pipeline writes to."""
    keep: bool = False
    """Keep the worktree."""
    any_environment: bool = False
    """Go on where packages are not as the snapshot locks them."""


@dataclass(frozen=True)
class Repeat:
    """A reproduced run."""

    run_id: str | None
    """MLflow's; None if its parameters switch MLflow off."""
    seconds: float
    comparison: RunComparison
    outcome: dict[str, Any]
    """For `Details.outcomes` of the first run."""


def reproduce(request: ReproduceRequest) -> Repeat:
    """Train the run again and compare.

    Raises:
        RegistryError: it cannot be reproduced here, or the pipeline failed; the text says what is
            missing, and where the worktree was left.
        KeyboardInterrupt: the pipeline was ended first, the worktree is gone.
    """
    record, details = request.record, _whole(request.record)
    run = record.run
    logger.info(f"{record.label}: run {run.run_id}, {run.name or 'without a name'}")
    if details.snapshot is None:
        raise RegistryError(
            f"{record.label}: its code was not kept (it ran outside git); it cannot be reproduced"
        )
    folder = request.home / "reproduce" / f"{record.label}-{os.getpid()}"
    tree = add_worktree(
        request.main, details.snapshot, folder, f"`runkey fetch {record.label}` brings it"
    )
    mark_owner(tree.top)
    logger.info(f"snapshot {details.snapshot[:12]} is checked out in {tree.top}")
    try:
        repeat = _repeat(request, details, tree)
    except RunkeyError as error:
        raise RegistryError(f"{error}; its worktree is left in {tree.top}") from None
    except KeyboardInterrupt:
        remove_worktree(request.main, tree)
        logger.info(f"interrupted; {tree.top} is removed")
        raise
    if request.keep:
        logger.info(f"the worktree is kept: {tree.top}; `git worktree remove` ends it")
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


def _repeat(request: ReproduceRequest, details: Details, tree: Worktree) -> Repeat:
    """Prepare the worktree, train and evaluate, compare."""
    record, root = request.record, tree.root
    env = clean_environment(request.main, {REPRODUCES: record.run.run_id})
    # DVC's stages call `python`; it must be this one.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    _check_key(request, details.stage, root, env)
    _check_packages(request, details, root)
    share_cache(request.main, root)
    _fetch_data(request, root, env)
    (root / "dvc.lock").unlink(missing_ok=True)
    logger.info("training again: dvc repro without its run-cache")
    begin = time.monotonic()
    _run(["-m", "dvc", "repro", "--no-run-cache", "--no-commit", TARGET], root, env, request.output)
    seconds = time.monotonic() - begin
    manifest = RunManifest.read(root / paths.RUN_JSON)
    if manifest.run_id == record.run.run_id:
        raise RegistryError(
            f"{record.label}: the snapshot's train stage took the run's own files and did not train"
        )
    comparison = compare_runs(_recorded_result(record, details), _new_result(root, manifest))
    outcome = {
        "when_ms": time.time_ns() // 1_000_000,
        "run_id": manifest.run_id,
        "host": this_host(),
        "seconds": round(seconds, 1),
        **comparison.as_dict(),
    }
    return Repeat(manifest.run_id, seconds, comparison, outcome)


def _check_key(request: ReproduceRequest, stage: str, root: Path, env: Mapping[str, str]) -> None:
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
        last = (asked.stderr.strip() or "no answer").splitlines()[-1]
        raise RegistryError(f"{record.label}: the snapshot's key cannot be made: {last}") from None
    if found.key == record.key:
        logger.info("its key is the run's")
        return
    parts = record.run.parts
    differing = [part for part in PARTS if found.parts[part] != parts[part]]
    raise RegistryError(
        f"{record.label}: its snapshot has the key {found.key}; the {' and '.join(differing)} of"
        f" the key differ{'s' if len(differing) == 1 else ''}; `runkey verify {record.label}` says"
        " more"
    )


def _check_packages(request: ReproduceRequest, details: Details, root: Path) -> None:
    """Stop if what is installed is not what the snapshot locks, unless the run had the same."""
    found = compare_environment(root)
    if found.agrees:
        logger.info(f"{found.same} packages are installed as {found.against} of then locks them")
        return
    lines = [
        f"{d.name}: locked {d.locked}, installed {d.installed or 'none'}"
        for d in (*found.of_kind("missing"), *found.of_kind("other"))
    ]
    text = (
        f"{len(lines)} packages are not as {found.against} of then locks them: {first_few(lines)}"
    )
    if sorted(lines) == sorted(details.witness["package_differences"]):
        logger.info(f"{text}; the run itself had the same")
    elif request.any_environment:
        logger.info(f"{text}; goes on, as --any-environment says")
    else:
        raise RegistryError(
            f"{text}; `runkey env export {request.record.label}` gives the lists to install from,"
            " --any-environment goes on as it is"
        )


def _fetch_data(request: ReproduceRequest, root: Path, env: Mapping[str, str]) -> None:
    """Check out the data by their hash: from DVC's cache, else from their remote."""
    for file in tracked_inputs(root, TARGET):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "checkout", "--quiet", file],
            cwd=root,
            env=dict(env),
            capture_output=True,
            check=False,
        )
        if done.returncode:
            logger.info(f"{file}: not whole in DVC's cache; it is pulled")
            _run(["-m", "dvc", "pull", file], root, env, request.output)
        else:
            logger.info(f"{file}: data from DVC's cache, by their hash")


def _run(arguments: list[str], root: Path, env: Mapping[str, str], output: TextIO) -> None:
    """Run Python in the worktree and pass on its output; an interruption ends it, too.

    It has a process group of its own, so that DVC, the stage and its workers can be ended together.
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
    """End a process group, first as Ctrl-C does, so that MLflow records the end of the run."""
    for number, seconds in ((signal.SIGINT, _PATIENCE), (signal.SIGTERM, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
            break
    # The leader may have ended before others of the group.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _recorded_result(record: Record, details: Details) -> RunResult:
    hashes = {path: file.sha256 for path, file in details.files.items()}
    return RunResult(details.witness, hashes, record.run.metrics)


def _new_result(root: Path, manifest: RunManifest) -> RunResult:
    """The repeat, from the files that it wrote."""
    hashes = {p: sha256_file(root / p) for p in IDENTICAL if (root / p).is_file()}
    # This file has all of COCO's metrics; those that DVC tracks are a few of them.
    stored = json.loads((root / paths.EVALUATION / METRICS).read_text(encoding="utf-8"))
    metrics = {f"eval/{n}": float(v) for n, v in stored.items() if isinstance(v, int | float)}
    return RunResult(vars(manifest.witness), hashes, metrics)
