"""The report: one HTML file about a run, or about what differs between several.

Pictures and styles are part of the file. It has no script, and its content policy forbids a browser
to load anything else, so that it opens offline. A run's files have the paths of the repository, so
that their folder is a run's artifacts or the workspace it was trained in.
"""

from __future__ import annotations

import base64
import logging
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import cycle, product
from operator import add
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import Field

from runkey import paths
from runkey.evaluation.files import METRICS_JSON, OTHER, RESAMPLED, Metrics, Resampled
from runkey.evaluation.noise import compare_scores
from runkey.files import LARGE, FormatError, read_json, write_atomically
from runkey.identity.key import PARTS
from runkey.identity.record import KEY, KEY_JSON, LoggedRun, Record, RunManifest
from runkey.inference.draw import printable
from runkey.inference.thresholds import THRESHOLDS, Thresholds
from runkey.params import as_text, changed_params, load_params
from runkey.plots import style
from runkey.plots.curves import write_training_plots
from runkey.plots.hints import CLASS_SCORES, EVENT, Hint, all_hints
from runkey.plots.log import TrainingLog, read_log
from runkey.progress import escaped
from runkey.units import counted, format_seconds
from runkey.version import __version__

logger = logging.getLogger(__name__)

_METRICS = f"{paths.EVALUATION}/{METRICS_JSON}"
_RESAMPLED = f"{paths.EVALUATION}/{RESAMPLED}"
_OTHER_RESAMPLED = f"{paths.EVALUATION}/{OTHER}/{RESAMPLED}"
_OTHER_METRICS = f"{paths.EVALUATION}/{OTHER}/{METRICS_JSON}"
_THRESHOLDS = f"{paths.EVALUATION}/{THRESHOLDS}"
_UNUSED = (
    *("model/weights", "model/model.json", "prepared/images.json", "plots/report.html"),
    *("evaluation/predictions.json", "evaluation/val/predictions.json"),
)
"""Files, by the beginning of their paths, that are large and in no report."""
_REGULAR_EVENTS = ("training_start", "training_end", CLASS_SCORES)
SCORES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100", "loss")
CLASS_COLUMNS = (
    *("class", "objects", "AP", "95% interval", "AP50", "AR"),
    *("AP small", "AP medium", "AP large"),
    *("best F1", "at score"),
)
_ENVIRONMENT = {
    "device": "device",
    "threads": "threads",
    "world_size": "processes",
    "micro_batch": "micro-batch",
    "precision": "mixed precision",
    "interpreter": "Python",
    "commit": "commit",
    "dirty": "uncommitted changes",
}
_TYPES = {".png": "image/png", ".jpg": "image/jpeg"}
_CURVES = {
    "loss_and_ap": "Loss and AP",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm before and after clipping",
    "throughput": "Images per second, and waiting for data",
    "machine": "CPU, GPU and memory",
}
_EVALUATION = {
    "precision_recall": "Precision and recall",
    "confusion": "Confusion matrix",
    "ap_by_size": "AP by object size",
    "calibration": "Calibration of the scores",
    "best": "Best images: ground truth beside detections",
    "worst": "Worst images: ground truth beside detections",
}
_STORED = {
    # Runs from before the stage `plots` have their pictures in evaluation/ and prepared/.
    "evaluation": (("plots", "evaluation"), _EVALUATION),
    "memory": (("memory",), {"timeline": "Memory during a training step"}),
    "images": (("plots", "prepared"), {"contact_sheet": "Training images with their boxes"}),
}
"""Folders and titles of the pictures that a run has, by part of the page."""
_COMPARED = {
    "Validation AP": ("AP, 0 to 1", "val/AP"),
    "Validation loss": ("loss per object", "val/loss"),
    "Training loss, mean of each epoch": ("loss per object", "train/epoch_loss"),
    "Learning rate": ("learning rate", "train/lr"),
}
_COLOURS = [colour for colour in style.CYCLE if colour != style.YELLOW]
_SHORT = 12


class _Code(TypedDict, total=False):
    files: dict[str, str]


class _Environment(TypedDict, total=False):
    packages: list[Annotated[list[str], Field(min_length=3)]]


class _Parts(TypedDict, total=False):
    code: _Code
    environment: _Environment


class _Objects(TypedDict, total=False):
    objects: int


class _Statistics(TypedDict, total=False):
    """A split of statistics.json."""

    images: int
    images_without_objects: int
    objects: int
    crowd_regions: int
    objects_per_image: dict[str, float]
    classes: dict[str, _Objects]
    sizes_by_area: dict[str, int]
    box_side_pixels: dict[str, float]


class _KeyJson(TypedDict, total=False):
    """What the page shows of key.json."""

    preimages: _Parts


@dataclass(frozen=True, kw_only=True)
class ReportedRun(Record):
    """One run of a report, with its files as far as it came."""

    folder: Path
    """Of the files."""
    log: TrainingLog
    """Empty if there is none."""
    witness: Mapping[str, Any]
    """`RunEnvironment`; empty if it is not known."""

    @property
    def label(self) -> str:
        """The short key, with the run id if the run repeats another one."""
        suffix = f":{self.run.run_id[:4]}" if self.reproduction_of and self.run.run_id else ""
        return super().label + suffix

    @property
    def events(self) -> dict[str, list[dict[str, Any]]]:
        """The events of each kind that is out of the ordinary, such as skipped steps."""
        return {
            kind: events
            for kind, events in self.log.events.items()
            if kind not in _REGULAR_EVENTS and not kind.startswith(EVENT)
        }

    @property
    def params(self) -> dict[str, str]:
        """Resolved parameters by dotted name, as text."""
        return {n: v for n, v in self.run.params.items() if n.split(".")[0] != KEY}

    @property
    def is_evaluated(self) -> bool:
        """Whether its model was evaluated after training."""
        return (self.folder / _METRICS).is_file() or "eval/AP" in self.run.metrics

    @property
    def started(self) -> str:
        """Local time; empty if it is not known."""
        started = time.localtime(self.run.started_ms / 1000)
        return time.strftime("%Y-%m-%d %H:%M:%S", started) if self.run.started_ms else ""

    @property
    def duration(self) -> str:
        """Wall time; empty while it runs."""
        run = self.run
        return "" if run.ended_ms is None else format_seconds((run.ended_ms - run.started_ms) / 1e3)

    def json(self, path: str, form: Any = dict[str, Any]) -> Any:
        """Return the object in a JSON file; {} if there is none, or a damaged one (a warning)."""
        file = self.folder / path
        with suppress(FileNotFoundError):
            try:
                return read_json(file, form, LARGE)
            except FormatError as error:
                logger.warning(f"{file}: {error}; the report does without it")
        return {}

    def statistics(self) -> dict[str, _Statistics]:
        """Return the statistics of each split of the data; {} if they are not known."""
        return dict(self.json("prepared/statistics.json", dict[str, _Statistics]))

    def scores(self) -> dict[str, Any]:
        """Return COCO metrics, those of each class under `per_class`; the last ones known."""
        if final := self.json(_METRICS, Metrics):
            return dict(final)
        metrics = self.run.metrics
        last = next((p.values for p in reversed(self.log.epochs) if "val/AP" in p.values), {})
        for prefix, values in (("eval/", metrics), ("val/", metrics), ("val/", last)):
            known = [name for name in values if name.startswith(prefix)]
            if known:
                return {name.removeprefix(prefix): values[name] for name in known}
        return {}

    def resampled_of(self, split: str) -> Resampled | None:
        """Return its AP on resampled sets of images; None if it has none, or damaged ones."""
        if split == self.split:
            return self.json(_RESAMPLED, Resampled) or None
        return (self.json(_OTHER_RESAMPLED, Resampled) or None) if split == OTHER else None

    @property
    def split(self) -> str:
        """The split that `scores` are of: test or val."""
        if not self.is_evaluated:
            return "val"
        return str(self.scores().get("split", self.run.split))

    def scores_of(self, split: str) -> dict[str, Any]:
        """Return what `scores` does, of a split; {} if nothing is known of it."""
        if split == self.split:
            return self.scores()
        if split != OTHER:
            return {}
        if found := self.json(_OTHER_METRICS, Metrics):
            return dict(found)
        metrics, prefix = self.run.metrics, f"eval/{OTHER}/"
        return {n.removeprefix(prefix): v for n, v in metrics.items() if n.startswith(prefix)}

    def hints(self) -> list[Hint]:
        """Return the hints that the training logged, and those that its log gives now."""
        return all_hints(self.log, self.params)

    def environment(self) -> dict[str, str]:
        """Return machine, packages and code of the run, as far as they are known."""
        details, found = self.details, self.witness
        packages = found.get("package_differences")
        shown = {"host": details.host if details else self.run.tags.get("host")}
        shown |= {label: _text(found[n]) for n, label in _ENVIRONMENT.items() if n in found}
        shown["snapshot"] = details.snapshot if details else None
        shown["packages"] = None if packages is None else ", ".join(packages) or "as locked"
        shown["files outside the key"] = ", ".join(found.get("undeclared_files", ()))
        shown |= {name: str(value) for name, value in found.get("variables", {}).items()}
        return {name: value for name, value in shown.items() if value}

    def classes(self) -> list[list[str]]:
        """Tabulate the COCO metrics of each class, in `CLASS_COLUMNS`, the worst first."""
        per_class: Mapping[str, Mapping[str, Any]] = self.scores().get("per_class", {})
        thresholds = self.json(_THRESHOLDS, Thresholds).get("classes", {})
        rows = []
        for name in sorted(per_class, key=lambda name: (per_class[name].get("AP") or 0.0, name)):
            one = per_class[name]
            sizes = (one.get("by_size", {}).get(size, {}) for size in ("small", "medium", "large"))
            values = [one.get(n) for n in ("AP50", "AR")] + [s.get("AP") for s in sizes]
            threshold: Mapping[str, Any] = thresholds.get(name) or {}
            values += [threshold.get("f1"), threshold.get("score")]
            first = [f"{one.get('objects', 0):,}", _number(one.get("AP")), _interval(one, "AP")]
            rows.append([name, *first, *map(_number, values)])
        return rows


def _read_log(folder: Path) -> TrainingLog:
    log = folder / paths.TRAIN_LOG
    return read_log(log) if log.is_file() else TrainingLog()


def is_shown(path: str) -> bool:
    """Return True if a report shows anything of a run's file."""
    return not path.startswith(_UNUSED)


def recorded_run(record: Record, folder: Path) -> ReportedRun:
    """Return a run of a store, with a folder that has those of its files that are shown."""
    log = _read_log(folder)
    details = record.details
    witness = details.witness if details else {}
    return ReportedRun(run=record.run, details=details, folder=folder, log=log, witness=witness)


def workspace_run(root: Path) -> ReportedRun:
    """Return the run whose results are in a workspace, recorded or not; RecipeError without any."""
    manifest = RunManifest.read(root / paths.RUN_JSON)
    params = {n: as_text(v) for n, v in load_params(root / paths.PARAMS).flat().items()}
    params |= {KEY: manifest.key} | {f"{KEY}.{n}": digest for n, digest in manifest.parts.items()}
    log = _read_log(root)
    times = [round(1000 * point.seconds) for point in (*log.steps, *log.epochs)]
    places = {"run_id": manifest.run_id or "", "experiment_id": "", "artifact_uri": ""}
    ended = {"start_time": min(times, default=0), "end_time": max(times, default=None)}
    began = manifest.started_from
    tags = {name: value for name, value in (began.tags if began else {}).items() if value}
    run = LoggedRun.from_mlflow({**places, **ended, "status": "FINISHED"}, params, {}, tags)
    witness = asdict(manifest.witness)
    return ReportedRun(run=run, details=None, folder=root, log=log, witness=witness)


def write_report(runs: Sequence[ReportedRun], path: Path) -> Path:
    """Write a page about a run, or about several with their differences on top."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["counted"] = counted
    environment.filters |= {"number": _number, "text": _text, "changed": changed_params}
    environment.filters["interval"] = _interval
    several = len(runs) > 1
    page = environment.get_template("page.html.jinja").render(
        title=", ".join(f"{run.label} {run.run.name}".strip() for run in runs),
        runs=runs,
        score_names=SCORES,
        class_columns=CLASS_COLUMNS,
        pictures=[_pictures(run) for run in runs],
        differences=_differences(runs) if several else None,
        comparison=_comparison(runs) if several else None,
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )
    write_atomically(path, page)
    return path


def _shown(value: Any) -> Any:
    """Escape a text's control characters; what was rendered already stays."""
    return escaped(value) if type(value) is str else value


def _pictures(run: ReportedRun) -> dict[str, dict[str, str]]:
    """Return the pictures of each part of the page; curves are drawn from the log.

    An interrupted run has a log as well.
    """
    pictures = {
        part: _embedded([run.folder / name for name in folders], titles)
        for part, (folders, titles) in _STORED.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        if (run.folder / paths.TRAIN_LOG).is_file():
            *_, machine = write_training_plots(run.folder / paths.TRAIN_LOG, Path(folder))
            if not run.log.samples:
                machine.unlink()
        return pictures | {"curves": _embedded([Path(folder)], _CURVES)}


def _comparison(runs: Sequence[ReportedRun]) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        _compare_curves(runs, Path(folder) / "compare.png")
        return _embedded([Path(folder)], {"compare": "AP, loss and learning rate of all runs"})


def _embedded(folders: Sequence[Path], titles: Mapping[str, str]) -> dict[str, str]:
    """Return title and `data:` address of each picture, from the first folder that has it."""
    pictures = {}
    for name, title in titles.items():
        places = (folder / f"{name}{suffix}" for folder in folders for suffix in _TYPES)
        if path := next(filter(Path.is_file, places), None):
            data = base64.b64encode(path.read_bytes()).decode()
            pictures[title] = f"data:{_TYPES[path.suffix]};base64,{data}"
    return pictures


def _compare_curves(runs: Sequence[ReportedRun], path: Path) -> None:
    """Draw AP, losses and learning rate of several runs over epochs."""
    looks = [
        {"linestyle": dashes, "color": colour}
        for _, (dashes, colour) in zip(runs, cycle(product(("-", "--", ":", "-."), _COLOURS)))
    ]
    with style.drawing(path, *_COMPARED, height=1.9) as panels:
        for axes, (label, metric) in zip(panels, _COMPARED.values(), strict=True):
            for run, look in zip(runs, looks, strict=True):
                _draw(axes, run.log, metric, look)
            if not axes.lines:
                style.show_empty(axes)
                continue
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            if metric == "train/lr":
                axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
        for run, look in zip(runs, looks, strict=True):
            name = printable(f"{run.label}  {run.run.name}".strip(), "run")
            panels[0].plot([], [], **look, label=style.cut(name, 34))
        style.legend_beside(panels[0])
        panels[-1].set_xlabel("epoch")


def _draw(axes: Any, log: TrainingLog, metric: str, look: dict[str, str]) -> None:
    """Draw one run's curve, if it has one, with a star at its best epoch."""
    steps, values = log.series(metric)
    if not np.isfinite(values).any():
        return
    per_epoch = log.steps_per_epoch
    epochs = steps / (per_epoch or 1.0)
    style.plot(axes, (epochs, values), look["color"], linestyle=look["linestyle"], markersize=3)
    best = log.best_step()
    if metric == "val/AP" and best is not None and per_epoch:
        at = np.argmin(np.abs(epochs - best / per_epoch))
        star: dict[str, Any] = {"marker": "*", "markersize": 13, "zorder": 5}
        star |= {"color": look["color"], "markeredgecolor": style.BLACK, "markeredgewidth": 0.6}
        axes.plot(epochs[at], values[at], **star)


def _differences(runs: Sequence[ReportedRun]) -> dict[str, list[list[str]]]:
    """Compare at least two runs; metrics are compared with those of the first one.

    Returns:
        Rows of a name and a value of each run, only where they differ: `parts` of the key,
        `parameters`, files of the `code` by their hashes, `packages`, `environment`, `scores`, and
        the AP of each of the `classes`.
    """
    hashed = [run.json(KEY_JSON, _KeyJson).get("preimages", {}) for run in runs]
    files = [parts.get("code", {}).get("files", {}) for parts in hashed]
    packages = [
        {name: f"{version} {build}" for name, version, build, *_ in found}
        for found in (parts.get("environment", {}).get("packages", ()) for parts in hashed)
    ]
    machines = [run.environment() for run in runs]
    splits = sorted({run.split for run in runs}, reverse=True)
    metrics, classes = list[list[str]](), list[list[str]]()
    for split in splits:
        # An AP of val is never compared with one of test.
        scores = [run.scores_of(split) for run in runs]
        per_class = [
            {name: one.get("AP") for name, one in found.get("per_class", {}).items()}
            for found in scores
        ]
        rows = (
            _compare_numbers(scores, SCORES),
            _compare_numbers(per_class, _names(per_class)),
        )
        of_split = f" on {split}" if len(splits) > 1 or split != "val" else ""
        for found, known in zip((metrics, classes), rows, strict=True):
            found += [[f"{name}{of_split}", *values] for name, *values in known]
    parts = [run.run.parts for run in runs]
    return {
        "parts": _differing(parts, PARTS, missing="", length=_SHORT),
        "parameters": _differing([run.params for run in runs], missing="not set"),
        "code": _differing(files, length=_SHORT) if all(files) else [],
        "packages": _differing(packages) if all(packages) else [],
        "environment": [
            [name, *(v[:_SHORT] if name in ("commit", "snapshot") else v for v in values)]
            for name, *values in _differing(machines, _names(machines), "")
        ],
        "scores": [["duration", *(run.duration for run in runs)], *metrics],
        "noise": _noise(runs),
        "classes": classes,
    }


def _noise(runs: Sequence[ReportedRun]) -> list[list[str]]:
    """Return run and text of each AP that is compared with the first run's, on one split."""
    first, *others = runs
    found = []
    for run in others:
        split = first.split if run.split == first.split else OTHER
        scores = (first.scores_of(split), run.scores_of(split))
        resampled = (first.resampled_of(split), run.resampled_of(split))
        for one in compare_scores(*scores, *resampled):
            found.append([run.label, str(one) if run.split == first.split else f"{split}: {one}"])
    return found


def _names(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return all names in the order in which they come first."""
    return list(dict.fromkeys(name for one in values for name in one))


def _differing(
    values: Sequence[Mapping[str, str]],
    names: Iterable[str] | None = None,
    missing: str = "missing",
    length: int | None = None,
) -> list[list[str]]:
    """Return a row for each name whose values are not the same in all runs."""
    names = sorted(_names(values)) if names is None else names
    rows = [[name, *(one.get(name, missing)[:length] for one in values)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _compare_numbers(values: Sequence[Mapping[str, Any]], names: Iterable[str]) -> list[list[str]]:
    """Return a row for each name that any run has, with the change from the first run."""
    rows = []
    for name in names:
        found: list[Any] = [one.get(name) for one in values]
        first, *others = found
        changes = [f" ({v - first:+.3f})" if _number(v) and _number(first) else "" for v in others]
        if any(value is not None for value in found):
            rows.append([name, _number(first), *map(add, map(_number, others), changes)])
    return rows


def _interval(metrics: Mapping[str, Any], name: str) -> str:
    """Format the 95% interval of a metric; empty if it is not known."""
    low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
    known = isinstance(low, float) and isinstance(high, float)
    return f"{_number(low)} to {_number(high)}" if known else ""


def _number(value: Any) -> str:
    """Format a metric; empty if there is none."""
    if not isinstance(value, (int, float)):
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _text(value: Any) -> str:
    """Format a value of any type."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
