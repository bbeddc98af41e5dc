"""Train a recorded run again from its snapshot, in a git worktree, and compare the two.

DVC's run-cache is not used, since it would give the first result back and prove nothing; nor does
the repeat enter DVC's cache, where the newest entry of a key wins (`--no-commit`). On one class of
machine the weights must be equal bit for bit; on another, sums are rounded in another order, and
the metrics are compared within a tolerance.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from runkey import paths
from runkey.errors import RecipeError, RegistryError, RunkeyError
from runkey.evaluation.files import METRICS_JSON, OTHER, read_metrics
from runkey.hashing import sha256_file
from runkey.identity.dvc_yaml import (
    covers,
    read_pipeline,
    read_yaml_text,
)
from runkey.identity.key import Recipe, make_recipe
from runkey.identity.record import (
    KEY_JSON,
    ORIGIN,
    REPRODUCES,
    REPRODUCES_SINCE,
    TAKEN,
    Details,
    Record,
    RunManifest,
    this_host,
)
from runkey.params import load_params
from runkey.params.schema import flatten
from runkey.paths import PARAMS
from runkey.registry.archive import parse_json
from runkey.registry.checkout import (
    TARGET,
    clean_environment,
    fetch_data,
    run_dvc,
    share_cache,
)
from runkey.registry.environment import compare_environment
from runkey.registry.gc import has_processes
from runkey.registry.library import Library
from runkey.registry.snapshot import (
    add_worktree,
    changed_files,
    git,
    has_commit,
    remove_worktree,
)
from runkey.registry.verify import first_few
from runkey.training.lock import LOCK, holder_of, locked
from runkey.units import counted

logger = logging.getLogger(__name__)

# The comparison of a run and its repeat.


AP_TOLERANCE = 0.02
"""Absolute, of metrics in 0..1 such as AP and AR. Other seeds of the sample give AP 0.655 to 0.668
(benchmarks/results/pipeline.md); another order of rounding changes no more than another seed."""
LOSS_TOLERANCE = 0.05
"""Relative, of losses, which have no upper bound."""
WEIGHTS = ("model/weights.safetensors", "model/weights.pt")
"""The weights file; older runs have the latter."""
IDENTICAL = (*WEIGHTS, "evaluation/predictions.json", "evaluation/val/predictions.json")
"""Files that are compared bit by bit: the weights, and the predictions on the held-out images. The
other files hold times and names."""
_COMPARED = re.compile(r"eval/(val/)?(?!loss_|val/)")
"""Metrics of the evaluation; of the losses only their sum."""
WITNESS_CLASS = (
    *("device", "cpu", "micro_batch", "world_size", "threads", "precision"),
    *("interpreter", "package_differences"),
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
class RunComparison:
    """The comparison of a run and its repeat."""

    class_differences: tuple[str, ...]
    """Such as `threads 1 | 2`; empty: the same witness class."""
    files: dict[str, tuple[str, str | None]]
    """Hex sha256 in both runs by path; None: the repeat has no such file."""
    metrics: tuple[MetricPair, ...]

    @property
    def same_class(self) -> bool:
        """True if bit-identical results are due."""
        return not self.class_differences

    @property
    def identical(self) -> bool:
        """True if all files have the same bits."""
        return all(first == repeat for first, repeat in self.files.values())

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
            changed = ", ".join(path for path, (a, b) in self.files.items() if a != b)
            near = "within tolerance" if self.within_tolerance else "outside tolerance"
            return f"NOT reproduced: {changed} differ on the same kind of machine ({near})"
        if self.within_tolerance:
            return "reproduced within tolerance, on another kind of machine"
        far = ", ".join(metric.name for metric in self.metrics if not metric.is_near)
        return f"NOT reproduced: {far or 'no number'} within tolerance"

    def as_dict(self) -> dict[str, Any]:
        """Format for the record of the first run."""
        values = {metric.name: (metric.first, metric.repeat) for metric in self.metrics}
        return {
            "same_class": self.same_class,
            "class_differences": self.class_differences,
            "identical": self.identical,
            "within_tolerance": self.within_tolerance,
            "reproduced": self.holds,
            "files": self.files,
            "metrics": {n: [v if math.isfinite(v) else None for v in values[n]] for n in values},
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
    """Compare a run with its repeat; RegistryError if the first has no weights recorded."""
    if not any(path in first.hashes for path in WEIGHTS):
        raise RegistryError(f"{WEIGHTS[0]}: the run recorded none, so there is nothing to compare")
    # NaN: the data have no object of that size, in either run.
    names = sorted(n for n, v in first.metrics.items() if _COMPARED.match(n) and math.isfinite(v))
    classes = [(n, first.witness.get(n), repeat.witness.get(n)) for n in WITNESS_CLASS]
    return RunComparison(
        tuple(f"{n} {_class_text(a)} | {_class_text(b)}" for n, a, b in classes if a != b),
        {p: (first.hashes[p], repeat.hashes.get(p)) for p in IDENTICAL if p in first.hashes},
        tuple(MetricPair(n, first.metrics[n], repeat.metrics.get(n, math.nan)) for n in names),
    )


def _class_text(value: Any) -> str:
    if value is None:
        return "not recorded"  # an older run
    return f"{counted(len(value), 'other version')}" if isinstance(value, list) else str(value)


# Training again.


_SHOWN = 10
"""Most names of files that a question lists."""


@dataclass(frozen=True)
class ForeignCode:
    """Code that somebody else may have written, which training a run again would execute."""

    who: str
    """Where the run was made, and how it came here; the former as its maker says."""
    oid: str
    """The snapshot."""
    files: tuple[str, ...]
    """Files of the snapshot that are not as in this checkout, code first."""

    def __str__(self) -> str:
        names = ", ".join(self.files[:_SHOWN])
        more = f" and {len(self.files) - _SHOWN} more" if self.files[_SHOWN:] else ""
        verb = "differs" if len(self.files) == 1 else "differ"
        return (
            f"made on {self.who}; to train it again executes its code, in which"
            f" {counted(len(self.files), 'file')} {verb} from yours: {names}{more}"
            f" (`git diff {self.oid[:12]}` shows how)"
        )


def foreign_code(record: Record, main: Path, *, is_shared: bool) -> ForeignCode | None:
    """Return the code that a run would bring from elsewhere; None if it is this checkout's own.

    A run comes from elsewhere if it was imported or fetched, or if others write to its store
    (`is_shared`). A snapshot that is not in git here is None, too: it cannot be executed.
    """
    oid = record.details.snapshot if record.details else None
    copied = ORIGIN in record.run.tags
    if record.details is None or oid is None or not (copied or is_shared):
        return None
    if not has_commit(main, oid):
        return None
    listed = git(main, "diff", "--no-ext-diff", "--no-renames", "--name-only", "-z", oid)
    # What the pipeline writes anew is not executed.
    stages = read_pipeline(main, load_params(main / PARAMS).flat()).values()
    prefix = git(main, "rev-parse", "--show-prefix")
    outs = [prefix + out for out in ("dvc.lock", *(out for one in stages for out in one.outs))]
    changed = [n for n in listed.split("\0") if n and not any(covers(out, n) for out in outs)]
    files = sorted(changed, key=lambda name: (not name.endswith(".py"), name))
    if not files:
        return None
    way = record.run.tags.get(TAKEN, "taken from elsewhere") if copied else "in a shared store"
    return ForeignCode(f"{record.details.host or 'unknown'}, {way}", oid, tuple(files))


def reproduce(
    record: Record,
    library: Library,
    main: Path,
    home: Path,
    output: TextIO,
    *,
    keep: bool = False,
    any_environment: bool = False,
) -> tuple[RunComparison, dict[str, Any]]:
    """Train a run again and compare.

    Args:
        record: the run, with its details; its code is executed, see `foreign_code`.
        library: where it is.
        main: the main checkout: its git, DVC cache and store are used.
        home: `Store.home`.
        output: a real file that the pipeline writes to.
        keep: keep the worktree.
        any_environment: go on where packages are not as the snapshot locks them.

    Returns:
        The comparison; the outcome for `Details.outcomes` of the first run, which also has the
        repeat's MLflow id (None if its parameters switch MLflow off) and how long it took.

    Raises:
        RegistryError: it cannot be reproduced, or the pipeline failed; says where the worktree is.
        KeyboardInterrupt: the pipeline was ended first, the worktree is gone.
    """
    label, run, details = record.label, record.run, record.details
    if not record.is_whole or details is None:
        why = f"run {run.run_id} is {run.status}, without a recorded result to compare with"
        raise RegistryError(f"{label}: {why}")
    logger.info(f"{label}: run {run.run_id}, {run.name or 'without a name'}")
    if details.snapshot is None:
        why = "its code was not kept (it ran outside git); it cannot be reproduced"
        raise RegistryError(f"{label}: {why}")
    env = clean_environment(main, {REPRODUCES: run.run_id})
    folder, root = _begin(home / "reproduce", label, details.snapshot, main, env)
    with locked(folder):
        try:
            _check_key(record, library, main, root)
            _check_packages(record, details, root, any_environment=any_environment)
            share_cache(main, root)
            repeat = _train_again(record, details, root, env, output)
        except RunkeyError as error:
            raise RegistryError(
                f"{error}; its worktree is left in {folder}, where the same command goes on"
            ) from None
        except KeyboardInterrupt:
            with suppress(OSError):
                remove_worktree(main, folder)
            logger.info(f"interrupted; {folder} is {'left' if folder.exists() else 'removed'}")
            raise
        if keep:
            (folder / LOCK).unlink(missing_ok=True)  # the next one trains again
            logger.info(f"the worktree is kept: {folder}; `git worktree remove` ends it")
        else:
            with suppress(OSError):
                remove_worktree(main, folder)
        return repeat


def _begin(
    home: Path, label: str, snapshot: str, main: Path, env: dict[str, str]
) -> tuple[Path, Path]:
    """Return a worktree and the workspace in it: what was left behind, or a new checkout.

    `env` then says since when an interrupted reproduction has been going on.
    """
    folder = left_behind(home, label, snapshot)
    if folder:
        logger.info(f"goes on in {folder}, where it was interrupted")
        env[REPRODUCES_SINCE] = str((folder / LOCK).stat().st_mtime_ns // 1_000_000)
        return folder, folder / git(main, "rev-parse", "--show-prefix")
    folder = home / f"{label}-{os.getpid()}"
    root = add_worktree(main, snapshot, folder, f"`runkey fetch {label}` brings it")
    logger.info(f"snapshot {snapshot[:12]} is checked out in {folder}")
    return folder, root


def left_behind(folder: Path, label: str, snapshot: str) -> Path | None:
    """Return a worktree of a reproduction that was killed or failed; None if there is none.

    Its training is recorded, or can be resumed: another one would be recorded a second time.
    """
    for path in sorted(folder.glob(f"{label}-*/")):
        # Locked after the checkout, so it is whole.
        if path.is_symlink() or not (path / LOCK).is_file() or holder_of(path) is not None:
            continue
        with suppress(RegistryError):
            if git(path, "rev-parse", "HEAD") == snapshot:
                if has_processes(path):  # a stage outlives a DVC that was killed
                    logger.info(f"waiting for the stage that still runs in {path}")
                    while has_processes(path):
                        time.sleep(1)
                return path
    return None


def _train_again(
    record: Record, details: Details, root: Path, env: Mapping[str, str], output: TextIO
) -> tuple[RunComparison, dict[str, Any]]:
    """Train and evaluate in the worktree; compare."""
    fetch_data(root, env, output)
    if began := record.started_from:
        logger.info(f"initial weights: {began.about}")
    # The snapshot's own; another one is of this reproduction, which was interrupted.
    committed = git(root, "ls-tree", "HEAD", "dvc.lock")
    if committed and not git(root, "diff", "--name-only", "HEAD", "--", "dvc.lock"):
        (root / "dvc.lock").unlink()
    logger.info("training again: dvc repro without its run-cache")
    begin = time.monotonic()
    run_dvc(["repro", "--no-run-cache", "--no-commit", TARGET], root, env, output)
    seconds = round(time.monotonic() - begin, 1)
    manifest = RunManifest.read(root / paths.RUN_JSON)
    if manifest.run_id == record.run.run_id:
        raise RegistryError(
            f"{record.label}: the snapshot's train stage took the run's own files and did not train"
        )
    recorded = {path: file.sha256 for path, file in details.files.items()}
    written = {path: sha256_file(root / path) for path in IDENTICAL if (root / path).is_file()}
    # This file has all of COCO's metrics; those that DVC tracks are a few of them.
    metrics = _metrics_of(root / paths.EVALUATION, "eval/")
    comparison = compare_runs(
        RunResult(details.witness, recorded, record.run.metrics),
        RunResult(vars(manifest.witness), written, metrics),
    )
    return comparison, {
        "when_ms": time.time_ns() // 1_000_000,
        "run_id": manifest.run_id,
        "host": this_host(),
        "seconds": seconds,
        **comparison.as_dict(),
    }


def _metrics_of(evaluation: Path, prefix: str) -> dict[str, float]:
    """Return the metrics in an evaluation's folder, those of the other split behind `val/`."""
    stored = read_metrics(evaluation / METRICS_JSON)
    found = {f"{prefix}{n}": float(v) for n, v in stored.items() if isinstance(v, int | float)}
    other = evaluation / OTHER
    return found | (_metrics_of(other, f"{prefix}{OTHER}/") if other.is_dir() else {})


def _check_key(record: Record, library: Library, main: Path, root: Path) -> None:
    """Stop if the checked-out tree is of another key than the run; nothing of it is executed."""
    recipe = read_recipe(library, record)
    found = make_recipe(recipe.stage, root, main=main)
    differing = [] if found.key == record.key else _differing(recipe, found, main, root)
    if not differing:
        logger.info("its key is the run's")
        return
    raise RegistryError(
        f"{record.label}: its snapshot is of another key: {' and '.join(differing)}"
        f" differ{'s' if len(differing) == 1 else ''}; `runkey verify {record.label}` says more"
    )


def _differing(recipe: Recipe, found: Recipe, main: Path, root: Path) -> list[str]:
    """List the parts in which a tree differs from a recipe of perhaps another version of runkey.

    Another version has other defaults, and leaves out other files: compared are the parameters that
    params.yaml holds, and the files that the recipe lists.
    """
    differing = []
    if dict(found.cmd) != dict(recipe.cmd):
        differing.append("cmd")
    if changed_files(main, git(root, "rev-parse", "HEAD"), recipe.preimages["code"]):
        differing.append("code")
    keyed, now = recipe.preimages["params"], found.preimages["params"]
    written = set(flatten(read_yaml_text(root / PARAMS) or {}))
    # A shorthand, such as data.checks.level, stands in keys as what it means.
    short = tuple(f"{name.rpartition('.')[0]}." for name in written - keyed.keys() if "." in name)
    compared = {n for n in keyed.keys() & now.keys() if n in written or n.startswith(short)}
    if any(keyed[name] != now[name] for name in compared):
        differing.append("params")
    return differing + [p for p in ("data", "environment") if found.parts[p] != recipe.parts[p]]


def read_recipe(library: Library, record: Record) -> Recipe:
    """Return a run's recipe; RegistryError if its key.json is missing, or is not of its key."""
    with library.open_file(record, KEY_JSON) as file:
        content = parse_json(dict[str, Any], file.read(), f"{record.label}: {KEY_JSON}")
    try:
        recipe = Recipe.from_dict(content)
    except RecipeError as error:
        raise RegistryError(f"{record.label}: {error}") from None
    if recipe.key != record.key:
        raise RegistryError(f"{record.label}: {KEY_JSON}: holds another key, {recipe.key}")
    return recipe


def _check_packages(record: Record, details: Details, root: Path, *, any_environment: bool) -> None:
    """Stop if what is installed is not what the snapshot locks, unless the run had the same."""
    found = compare_environment(root)
    if found.agrees:
        logger.info(
            f"installed as {found.against} of then locks them: {counted(found.same, 'package')}"
        )
        return
    lines = [str(d) for d in (*found.missing, *found.other)]
    text = f"not as {found.against} of then locks them: {counted(len(lines), 'package')}:"
    text += f" {first_few(lines)}"
    if sorted(lines) == sorted(details.witness["package_differences"]):
        logger.info(f"{text}; the run itself had the same")
    elif any_environment:
        logger.info(f"{text}; goes on, as --any-environment says")
    else:
        raise RegistryError(
            f"{text}; `runkey env export {record.label}` gives the lists to install from,"
            " --any-environment goes on as it is"
        )
