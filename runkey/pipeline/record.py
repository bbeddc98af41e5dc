"""Record a run: while it trains, its outputs and environment at the end, and its evaluation."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runkey import paths
from runkey.data.index import SplitName, index_file, read_index
from runkey.data.loader import is_cached
from runkey.errors import DataError, ParamsError, RecipeError, RegistryError, TrackingError
from runkey.files import LARGE, expect, json_safe, read_json, write_json
from runkey.identity.dvc_yaml import covers
from runkey.identity.inputs import tree_note
from runkey.identity.key import Recipe, short_key
from runkey.identity.record import (
    CLASS_AP,
    DETAILS,
    KEY_JSON,
    ORIGIN,
    REPRODUCTION_OF,
    SPLIT,
    Details,
    Hardware,
    LoggedRun,
    Record,
    RunEnvironment,
    RunManifest,
    StartedFrom,
    StoredFile,
    capture_environment,
    describe_cpu,
    hashed_files,
    this_host,
)
from runkey.identity.record_cache import update_record
from runkey.inference.thresholds import THRESHOLDS
from runkey.memory.choose import MemoryPlan
from runkey.params import Params, load_params
from runkey.params.render import render
from runkey.pipeline.once import KeyClaim
from runkey.plots.curves import write_training_plots
from runkey.plots.hints import lasting_hints
from runkey.plots.log import read_log
from runkey.registry.library import canonical, open_library
from runkey.registry.lineage import started_from
from runkey.tracking.describe import (
    DIFFERS,
    describe_in_words,
    describe_run,
    note_tags,
)
from runkey.tracking.logged_model import ModelDescription, log_model
from runkey.tracking.mlflow_run import TrackedRun, open_run
from runkey.tracking.store import Store, locate_store
from runkey.tracking.sync import RunSender, TrainingRun, legal_name
from runkey.training.guard import REPORTS

if TYPE_CHECKING:
    from runkey.evaluation.coco import ClassResult

logger = logging.getLogger(__name__)

_MOST_NAMES = 5
_CLASS_CHARACTERS = 200
_OUTPUTS = (paths.MODEL, paths.LOGS, paths.RUN_JSON, paths.METRICS / "train.json")
_BESIDE = (
    paths.PARAMS,
    *(paths.PREPARED / name for name in ("images.json", "report.json", "statistics.json")),
    paths.PREPARED / "contact_sheet.jpg",
    paths.MEMORY,
)
"""Recorded with the run, though the stage does not write them."""


@dataclass(frozen=True)
class Run:
    """One training: its key and parameters, and where it runs."""

    params: Params
    root: Path
    recipe: Recipe
    claim: KeyClaim
    plan: MemoryPlan
    device: torch.device
    precision: str
    world_size: int

    @cached_property
    def started_from(self) -> StartedFrom | None:
        """The weights that it begins with; None: random or ImageNet's."""
        keyed = self.recipe.preimages["params"]
        return started_from(keyed, self.params.flat(), self.claim.store.cache)

    def check(self, *, at_end: bool = True) -> None:
        """Raise if another process took the key over, or if what training reads changed.

        Between epochs the second is left out where it would take long.
        """
        self.claim.check()
        splits: tuple[SplitName, ...] = ("train", "val")
        # The other ranks do not wait for the cache that rank 0 makes.
        cached = self.world_size == 1 and all(
            is_cached(self.params, self.root, split) for split in splits
        )
        inputs = self.claim.inputs
        (inputs.check if at_end else inputs.check_again)("none" if cached else "images")

    @property
    def device_name(self) -> str:
        """Such as `cpu x86_64` or `cuda NVIDIA H200`."""
        if self.device.type == "cuda":
            return f"cuda {torch.cuda.get_device_name(self.device)}"
        return f"{self.device.type} {platform.machine()}"


@contextmanager
def recorded(run: Run) -> Iterator[TrackedRun]:
    """Open the run's tracker; mark the MLflow run if training fails or is interrupted."""
    claim = run.claim
    tags = {
        "device": run.device_name,
        "micro_batch": str(run.plan.micro_batch),
        "precision": run.precision,
        "torch": torch.__version__,
        "host": this_host(),
        "decision": claim.why,
        "snapshot": claim.snapshot,
        REPRODUCTION_OF: claim.repeats.run.run_id if claim.repeats else None,
        **(run.started_from.tags if run.started_from else {}),
    }
    runtime = run.params.runtime
    description = describe_run(
        run.params,
        run.root,
        key=run.recipe.key,
        parts=run.recipe.parts,
        tags={name: value for name, value in tags.items() if value},
        counts=_data_counts(run.root),
        name=claim.repeats.run.name if claim.repeats else None,
    )
    tracker = open_run(
        locate_store() if runtime.mlflow else None,
        TrainingRun(runtime.experiment, description, claim.folder, supersedes=claim.superseded),
        run.root,
        on_change=claim.changed,
        system_seconds=runtime.system_metrics_seconds,
    )
    try:
        yield tracker
    except BaseException as error:
        for report in sorted(claim.folder.glob(REPORTS)):  # of bad steps
            tracker.artifact(report, "reports")
        tracker.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def save_run(run: Run, tracker: TrackedRun) -> str | None:
    """Write the key and run.json beside the outputs, and end the recording with copies of all.

    Returns the MLflow run's id, None if there is none.
    """
    root, claim = run.root, run.claim
    run.check()
    write_json(root / KEY_JSON, run.recipe.as_dict())
    hardware = Hardware(
        device=run.device_name,
        micro_batch=run.plan.micro_batch,
        world_size=run.world_size,
        threads=torch.get_num_threads(),
        precision=run.precision,
        cpu=describe_cpu(torch.backends.cpu.get_cpu_capability()),
    )
    witness = capture_environment(root, run.recipe, hardware)
    audit = _audit(witness.undeclared_files)
    if audit:
        logger.warning(f"imported, but no part of the key: {audit}")
    tracker.tag("key.audit", f"undeclared: {audit}" if audit else "ok")
    # MLflow may answer late or never; the evaluate stage then finds the run by its key.
    manifest = RunManifest(
        key=run.recipe.key,
        stage=run.recipe.stage,
        parts=run.recipe.parts,
        run_id=tracker.run_id(),
        witness=witness,
        started_from=run.started_from,
    )
    manifest.write(root / paths.RUN_JSON)
    assert tracker.jsonl
    details = _details(run, witness, with_log=not tracker.jsonl.lost_lines)
    with tempfile.TemporaryDirectory() as folder:
        # Only for the run's MLflow page: the stage `plots` draws them in the workspace.
        drawn = Path(folder)
        write_training_plots(root / paths.TRAIN_LOG, drawn / paths.PLOTS)
        own = [paths.PLOTS]
        if _params_changed(run):
            text = render(run.params, "# As it was trained; the file was changed meanwhile.")
            (drawn / paths.PARAMS).write_text(text, encoding="utf-8")
            own.append(paths.PARAMS)
        written = hashed_files(drawn, own)
        claim.details = replace(details, files=details.files | written)
        (drawn / DETAILS).write_text(claim.details.as_json(), encoding="utf-8")
        given = [name for name in details.files if name not in written]
        for top, names in ((root, given), (drawn, [*written, DETAILS])):
            for name in names:
                _copy(top, name, tracker)
        run_id = tracker.close()
    claim.is_whole = tracker.is_whole
    return run_id


def _params_changed(run: Run) -> bool:
    """Return True if params.yaml has other values now than those that this run was trained with.

    `dvc exp run -S` writes them before DVC's lock refuses it.
    """
    try:
        return load_params(run.root / paths.PARAMS) != run.params
    except ParamsError:
        return True


def _audit(files: Sequence[str]) -> str:
    """Names of files in one line; an environment outside the lock adds a thousand."""
    more = len(files) - _MOST_NAMES
    return ", ".join(files[:_MOST_NAMES]) + (f" and {more} more (run.json)" if more > 0 else "")


def _details(run: Run, witness: RunEnvironment, *, with_log: bool) -> Details:
    root, claim = run.root, run.claim
    wanted = _OUTPUTS if with_log else [p for p in _OUTPUTS if p != paths.LOGS]
    outputs = hashed_files(root, wanted)
    for path in wanted:
        if not any(covers(path.as_posix(), name) for name in outputs):
            raise RegistryError(
                f"{root / path}: gone, though this training has just written it; another dvc or"
                " git in this folder may have removed it; run it again to resume from a checkpoint"
            )
    environment = asdict(witness)
    for long in ("packages", "files"):  # run.json has them
        environment.pop(long)
    pointer = hashlib.md5((root / paths.RUN_JSON).read_bytes()).hexdigest()
    return Details(
        stage=run.recipe.stage,
        files=outputs | hashed_files(root, _BESIDE),
        outputs=sorted(outputs),
        witness=environment,
        host=this_host(),
        snapshot=claim.snapshot,
        pointer_md5=pointer if "DVC_STAGE" in os.environ else None,
        decision=claim.why,
        started_from=run.started_from,
    )


def _copy(root: Path, path: str, tracker: TrackedRun) -> None:
    folder = Path(path).parent
    tracker.artifact(root / path, "" if folder == Path() else folder.as_posix())


def _data_counts(root: Path) -> dict[str, int]:
    path = root / paths.PREPARED / "report.json"
    try:
        kept = expect(dict[str, dict[str, int]], read_json(path, dict[str, Any], LARGE)["kept"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not readable ({error}); run `dvc repro -f prepare`") from None
    return {
        f"{split}_{what}": number
        for split, counts in kept.items()
        for what, number in counts.items()
    }


def class_metrics(per_class: Iterable[ClassResult]) -> dict[str, float]:
    """Return the AP of each class that has objects, by the names of MLflow's metrics.

    MLflow takes `/` for a folder; two names that become the same one get their category ids.
    """
    scores: dict[str, float] = {}
    for one in per_class:
        if one.ap is None:
            continue
        name = legal_name(one.name.replace("/", "_"))[:_CLASS_CHARACTERS].strip(" .") or "_"
        while f"{CLASS_AP}/{name}" in scores:
            name += f" id {one.category_id}"
        scores[f"{CLASS_AP}/{name}"] = one.ap
    return scores


class FinishedRun:
    """The recorded run that run.json names, to add an evaluation or pictures to."""

    def __init__(self, params: Params, root: Path) -> None:
        """Find the run in the store in use; MLflow is opened in the background."""
        self._root, self._data = root, params.data.path
        self._store = locate_store()
        self._manifest = RunManifest.read(root / paths.RUN_JSON)
        self.record = _recorded_run(self._store, self._manifest)
        self._details = self.record.details if self.record else None
        self._mlflow: TrackedRun | None = None
        if params.runtime.mlflow and self.record:
            run_id = self.record.run.run_id
            sender = RunSender(self._store, run_id, on_change=self._changed)
            self._mlflow = TrackedRun(None, sender)
        elif params.runtime.mlflow:
            logger.info(
                "MLflow: the training was not recorded there, so there is nothing to add to"
            )

    def check(self, params: Params) -> None:
        """Check that the workspace's files have the run's key, and that model/ is the run's.

        Raises:
            RecipeError: another key, or another file; the text names it.
        """
        if note := tree_note(self._root, params):
            raise RecipeError(note)
        if self.record is None or self._details is None:
            return
        for path, file in hashed_files(self._root, (paths.MODEL,)).items():
            if self._details.files.get(path) != file:
                raise RecipeError(
                    f"{path}: not what run {self.record.run.run_id[:8]} recorded; `dvc checkout"
                    f" --force {paths.MODEL}` restores it, or `dvc repro`"
                )

    def describe(self, result: str) -> None:
        """Describe the run by its result, what differs from the baseline, and lasting hints."""
        if self._mlflow is None or self.record is None:
            return
        log, run = self._root / paths.TRAIN_LOG, self.record.run
        hints = lasting_hints(read_log(log), run.params) if log.is_file() else []
        shown = [f"{hint.seen}; {hint.change}" for hint in hints]
        text = describe_in_words(run.tags.get(DIFFERS, "not known"), result, shown)
        for name, value in note_tags(text).items():
            self._mlflow.tag(name, value)

    def add_evaluation(self, key: str, metrics: Mapping[str, float], split: SplitName) -> None:
        """Record an evaluation and copies of its files, unless the run has these very metrics.

        `key` is that of the stage `evaluate`; `split` is the one that the result is of.
        """
        if self._mlflow is None:
            return
        # A record is JSON, which has no NaN; MLflow has.
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        shown = self.record.run.metrics if self.record else {}
        is_newest = all(shown.get(legal_name(name)) == value for name, value in finite.items())
        is_newest &= self.record is not None and self.record.run.tags.get(SPLIT) == split
        files = hashed_files(self._root, (paths.EVALUATION, paths.METRICS / "evaluate.json"))
        if (
            is_newest
            and self._details
            and self._details.evaluations.get(key) == finite
            and all(self._details.files.get(path) == file for path, file in files.items())
        ):
            self._close("evaluate")
            return
        self._mlflow.log_again(metrics)
        self._mlflow.tag(SPLIT, split)
        self._add("evaluate", files, {key: finite})

    def add_pictures(self, page: Path) -> None:
        """Record copies of plots/, unless the run has them.

        The report `page` holds the time it was written at, so that it is not compared.
        """
        if self._mlflow is None:
            return
        files = hashed_files(self._root, (paths.PLOTS,))
        recorded = self._details.files if self._details else {}
        if all(recorded.get(n) == f for n, f in files.items() if n != page.as_posix()):
            self._close("plots")
        else:
            self._add("plots", files, {})

    def _add(
        self, stage: str, files: dict[str, StoredFile], evaluations: dict[str, dict[str, float]]
    ) -> None:
        """Copy files of the workspace to the run, note both in its record, and close it."""
        assert self._mlflow
        with _copies(self._root, files, self._mlflow) as folder:
            if self._details is not None:
                self._details = replace(
                    self._details,
                    files=self._details.files | files,
                    evaluations=self._details.evaluations | evaluations,
                )
                _send_details(self._details, folder, self._mlflow)
            self._close(stage)

    def _close(self, stage: str) -> None:
        """Send what is left. The workspace has what MLflow does not take, so nothing is kept."""
        assert self._mlflow
        self._mlflow.close()
        if not self._mlflow.is_whole:
            logger.warning(f"MLflow: `dvc repro -f -s {stage}` sends it, when MLflow answers again")

    def save_model(self, preset: str, result: str, metrics: Mapping[str, float]) -> None:
        """Log the run's model in MLflow, with the `result` and `metrics` of its evaluation."""
        if self._mlflow is None or self.record is None:
            return
        key, root = self.record.key, self._root
        text = f'{result}\n\nKey `{key}`. `runkey.load("{short_key(key)}")` loads it in Python.'
        described = ModelDescription(
            name=f"detector-{preset}-{short_key(key)}",
            key=key,
            text=text,
            metrics={n: v for n, v in metrics.items() if math.isfinite(v)},
        )
        files = {path.name: path for path in sorted((root / paths.MODEL).iterdir())}
        files[THRESHOLDS] = root / paths.EVALUATION / THRESHOLDS
        example = read_index(index_file(root / paths.PREPARED, "val"))[0].file
        try:
            run_id = self.record.run.run_id
            log_model(self._store, run_id, described, files, root / self._data / example)
        except TrackingError as error:
            logger.info(str(error))

    def _changed(self, run: LoggedRun) -> None:
        update_record(self._store.cache, run, self._details)


@dataclass(frozen=True, kw_only=True)
class Addition:
    """What is added to a run after its end."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()
    """Relative to `root`; they get the same paths among the run's artifacts."""
    root: Path = Path()
    exports: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """See `Details.exports`."""


def add_to_run(store: Store | None, key: str | None, addition: Addition) -> str:
    """Add to the run of a key, in MLflow and in its record; return a line about it."""
    if store is None or key is None:
        missing = "the current folder is in no repository" if key else "the run is not known"
        return f"not recorded: {missing}"
    try:
        library = open_library(store.uri, store.home)
        runs = library.matching(key)
        if not runs:
            return f"not recorded: no run of this key in {library.place}"
        record = library.with_details(canonical(runs))
    except RegistryError as error:
        return f"not recorded: {error}"
    details = record.details
    hashed = hashed_files(addition.root, addition.files)
    if details:
        exports = details.exports | json_safe(dict(addition.exports))
        details = replace(details, files=details.files | hashed, exports=exports)

    def changed(run: LoggedRun) -> None:
        update_record(store.cache, run, details)

    tracked = TrackedRun(None, RunSender(store, record.run.run_id, on_change=changed))
    tracked.log_again(addition.metrics)
    for name, text in addition.tags.items():
        tracked.tag(name, text)
    with _copies(addition.root, hashed, tracked) as folder:
        if details:
            _send_details(details, folder, tracked)
        tracked.close()
    where = f"run {record.run.run_id[:8]}"
    return f"recorded on {where}" if tracked.is_whole else f"not recorded on {where}"


@contextmanager
def _copies(root: Path, files: Iterable[str], tracker: TrackedRun) -> Iterator[Path]:
    """Send copies of files, in a folder that is there until the block ends.

    After a kill of DVC its stage runs on, and a new DVC removes its outputs.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in files:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, folder / path)
            _copy(folder, path, tracker)
        yield folder


def _send_details(details: Details, folder: Path, tracker: TrackedRun) -> None:
    (folder / DETAILS).write_text(details.as_json(), encoding="utf-8")
    tracker.artifact(folder / DETAILS)


def _recorded_run(store: Store, manifest: RunManifest) -> Record | None:
    """Find the run of a manifest in a store: itself, its copy, or another run of its key."""
    library = open_library(store.uri, store.home)
    try:
        runs = library.matching(manifest.key)
        ids = {manifest.run_id, None} - {None}
        same = [r for r in runs if {r.run.run_id, r.run.tags.get(ORIGIN)} & ids]
        return library.with_details(canonical(same or runs)) if runs else None
    except RegistryError as error:
        logger.info(f"MLflow: {error}; nothing is added to the run")
        return None
