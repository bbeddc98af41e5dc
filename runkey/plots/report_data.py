"""What a report shows of a run: its record, its files, and tables made from both.

A run's files have the paths of the repository, so that their folder is a run's artifacts or the
workspace it was trained in.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runkey import paths
from runkey.evaluation.files import METRICS
from runkey.identity.key import PARTS, short_key
from runkey.identity.manifest import RunManifest
from runkey.identity.record import KEY, KEY_JSON, REPRODUCTION_OF, Record
from runkey.params import as_text, changed_params, load_params
from runkey.plots.hints import CLASS_SCORES, EVENT, Hint, all_hints
from runkey.plots.log import SAMPLES, Point, TrainingLog, read_log, read_samples
from runkey.plots.style import cut
from runkey.units import format_seconds

LOG = paths.LOGS / "train.jsonl"
SCORES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100", "loss")
_METRICS = f"{paths.EVALUATION}/{METRICS}"
_UNUSED = (
    *("model/weights", "model/model.json", "evaluation/predictions.json", "prepared/images.json"),
    "plots/report.html",
)
"""Files, by the beginning of their paths, that are large and in no report."""
_REGULAR_EVENTS = ("training_start", "training_end", CLASS_SCORES)
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
_SHORT = 12
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """One run of a report."""

    folder: Path
    """Of its files; which exist depends on how far the run came."""
    key: str
    parts: Mapping[str, str]
    name: str
    run_id: str | None
    status: str
    started_ms: int | None
    ended_ms: int | None
    params: Mapping[str, str]
    """Resolved parameters by dotted name, as text."""
    metrics: Mapping[str, float]
    """The last value of each."""
    tags: Mapping[str, str]
    witness: Mapping[str, Any]
    """See `runkey.identity.manifest.RunEnvironment`; empty if the run did not end well."""
    snapshot: str | None
    host: str
    log: TrainingLog
    """Empty if there is none."""

    @property
    def samples(self) -> list[Point]:
        """Samples of the machine; may be empty."""
        return read_samples((self.folder / LOG).with_name(SAMPLES))

    @property
    def is_evaluated(self) -> bool:
        """Whether its model was evaluated after training."""
        return (self.folder / _METRICS).is_file() or "eval/AP" in self.metrics

    @property
    def label(self) -> str:
        """The short key, with the run id if the run repeats another one."""
        is_repeat = self.tags.get(REPRODUCTION_OF)
        suffix = f":{self.run_id[:4]}" if is_repeat and self.run_id else ""
        return short_key(self.key) + suffix

    @property
    def seconds(self) -> float | None:
        """Wall time; None while it runs."""
        if self.started_ms is None or self.ended_ms is None:
            return None
        return (self.ended_ms - self.started_ms) / 1000

    def json(self, path: str) -> Any:
        """Return the contents of a JSON file; None if the run has no such file."""
        file = self.folder / path
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def preimage(self, part: str) -> Mapping[str, Any]:
        """Return what a part of the key is the hash of; empty if it was not recorded."""
        recipe = self.json(KEY_JSON) or {}
        found: Mapping[str, Any] = recipe.get("preimages", {}).get(part, {})
        return found

    def scores(self) -> dict[str, Any]:
        """Return COCO metrics, those of each class under `per_class`; the last ones known."""
        final = self.json(_METRICS)
        if isinstance(final, dict):
            return final
        for prefix in ("eval/", "val/"):
            known = [(n, v) for n, v in self.metrics.items() if n.startswith(prefix)]
            if known:
                return {name.removeprefix(prefix): value for name, value in known}
        last = [p.values for p in self.log.epochs if "val/AP" in p.values][-1:]
        return {n.removeprefix("val/"): v for values in last for n, v in values.items()}

    def hints(self) -> list[Hint]:
        """Return the hints that the training logged, and those that its log gives now."""
        return all_hints(self.log, self.params, self.samples)


def is_shown(path: str) -> bool:
    """Return True if a report shows anything of a run's file."""
    return not path.startswith(_UNUSED)


def recorded_run(record: Record, folder: Path) -> ReportedRun:
    """Return a run of a store, with a folder that has those of its files that are shown."""
    run, details = record.run, record.details
    return ReportedRun(
        folder=folder,
        key=record.key,
        parts=run.parts,
        name=run.name,
        run_id=run.run_id,
        status=run.status,
        started_ms=run.started_ms,
        ended_ms=run.ended_ms,
        params={n: v for n, v in run.params.items() if n.split(".")[0] != KEY},
        metrics=run.metrics,
        tags=run.tags,
        witness=details.witness if details else {},
        snapshot=details.snapshot if details else None,
        host=details.host if details else run.tags.get("host", ""),
        log=_read_log(folder),
    )


def workspace_run(root: Path) -> ReportedRun:
    """Return the run whose results are in a workspace, recorded or not.

    Raises:
        RecipeError: there is none.
        ParamsError: params.yaml is missing or wrong.
    """
    manifest = RunManifest.read(root / paths.RUN_JSON)
    log = _read_log(root)
    flat = load_params(root / paths.PARAMS).flat()
    times = [point.seconds for point in (*log.steps, *log.epochs)]
    return ReportedRun(
        folder=root,
        key=manifest.key,
        parts=manifest.parts,
        name="",
        run_id=manifest.run_id,
        status="FINISHED",
        started_ms=round(1000 * min(times)) if times else None,
        ended_ms=round(1000 * max(times)) if times else None,
        params={name: as_text(value) for name, value in flat.items()},
        metrics={},
        tags={},
        witness=asdict(manifest.witness),
        snapshot=None,
        host="",
        log=log,
    )


def _read_log(folder: Path) -> TrainingLog:
    return read_log(folder / LOG) if (folder / LOG).is_file() else TrainingLog()


@dataclass(frozen=True)
class Table:
    """Rows of text under headings."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = False
    """Whether all columns but the first hold numbers."""


def overview(run: ReportedRun) -> Table:
    """Tabulate key, status, times and how the run ended."""
    started = run.started_ms and time.localtime(run.started_ms / 1000)
    rows = [
        ("key", run.key),
        ("status", run.status.lower()),
        ("started", time.strftime("%Y-%m-%d %H:%M:%S", started) if started else ""),
        ("duration", _duration(run)),
        ("decision", run.tags.get("decision", "")),
        ("MLflow run", run.run_id or "none"),
        ("ended", str(run.log.events.get("training_end", {}).get("reason", ""))),
    ]
    return Table((), [row for row in rows if row[1]])


def key_parts(run: ReportedRun) -> Table:
    """Tabulate the parts of the key."""
    return Table(("part", "sha256"), [(part, run.parts.get(part, "")) for part in PARTS])


def events(run: ReportedRun) -> Table:
    """Tabulate what happened in training: skipped steps, interruptions and so on."""
    rows = []
    for kind, count in run.log.counts.items():
        if kind not in _REGULAR_EVENTS and not kind.startswith(EVENT):
            fields = run.log.events[kind]
            last = ", ".join(f"{n} {_brief(v)}" for n, v in fields.items() if v not in (None, []))
            rows.append((kind.replace("_", " "), f"{count:,}", last))
    return Table(("event", "count", "last one"), rows)


def changed_parameters(run: ReportedRun) -> Table:
    """Tabulate the parameters that are not the default."""
    return Table(("parameter", "value"), sorted(changed_params(run.params).items()))


def all_parameters(run: ReportedRun) -> Table:
    """Tabulate all parameters."""
    return Table(("parameter", "value"), sorted(run.params.items()))


def environment(run: ReportedRun) -> Table:
    """Tabulate machine, packages and code of the run."""
    found = run.witness
    rows = [("host", run.host)]
    rows += [(label, _text(found[name])) for name, label in _ENVIRONMENT.items() if name in found]
    rows += [("snapshot", run.snapshot or "")]
    packages = found.get("package_differences")
    if packages is not None:
        rows += [("packages", ", ".join(packages) or "as locked")]
    if undeclared := found.get("undeclared_files"):
        rows += [("files outside the key", ", ".join(undeclared))]
    rows += [(name, str(value)) for name, value in found.get("variables", {}).items()]
    return Table((), [row for row in rows if row[1]])


def scores(run: ReportedRun) -> Table:
    """Tabulate the COCO metrics of the run."""
    found = run.scores()
    names = [name for name in SCORES if found.get(name) is not None]
    return Table(names, [[_number(found[name]) for name in names]] if names else [])


def classes(run: ReportedRun) -> Table:
    """Tabulate the COCO metrics of each class, the worst first."""
    per_class: Mapping[str, Mapping[str, Any]] = run.scores().get("per_class", {})
    sizes = ("small", "medium", "large")
    rows = []
    for name in sorted(per_class, key=lambda name: (per_class[name].get("AP") or 0.0, name)):
        one = per_class[name]
        by_size = [one.get("by_size", {}).get(size, {}).get("AP") for size in sizes]
        values = [one.get("AP"), one.get("AP50"), one.get("AR"), *by_size]
        rows.append([name, f"{one.get('objects', 0):,}", *map(_number, values)])
    columns = ("class", "objects", "AP", "AP50", "AR", *(f"AP {size}" for size in sizes))
    return Table(columns, rows, numbers=True)


def data(run: ReportedRun) -> Table:
    """Tabulate the statistics of the data set, a column for each split."""
    statistics: Mapping[str, Any] = run.json("prepared/statistics.json") or {}
    if not statistics:
        return Table((), [])

    def cells(split: Mapping[str, Any]) -> list[str]:
        per_image = split.get("objects_per_image", {})
        sides = split.get("box_side_pixels", {})
        return [
            f"{split.get('images', 0):,}",
            f"{split.get('images_without_objects', 0):,}",
            f"{split.get('objects', 0):,}",
            f"{split.get('crowd_regions', 0):,}",
            f"{per_image.get('mean', 0):.3g}, at most {per_image.get('maximum', 0)}",
            f"{len(split.get('classes', {})):,}",
            " / ".join(f"{n:,}" for n in split.get("sizes_by_area", {}).values()),
            " / ".join(f"{sides[q]:g}" for q in ("5%", "50%", "95%") if q in sides),
            *(f"{one.get('objects', 0):,}" for one in split.get("classes", {}).values()),
        ]

    names = [
        *("images", "images without objects", "objects", "crowd regions", "objects per image"),
        *("classes", "small / medium / large", "box side, pixels (5%, 50%, 95%)"),
        *(f"objects of {name}" for name in next(iter(statistics.values())).get("classes", {})),
    ]
    columns = [cells(split) for split in statistics.values()]
    return Table(("", *statistics), list(zip(names, *columns, strict=False)), numbers=True)


@dataclass(frozen=True)
class Differences:
    """Tables with a column for each run, and rows only where they differ."""

    parts: Table
    """Of the key."""
    parameters: Table
    code: Table
    """Files by their hashes."""
    packages: Table
    environment: Table
    scores: Table
    classes: Table
    """AP of each class."""

    @property
    def same_key(self) -> bool:
        """Whether all runs have the same key."""
        return not self.parts.rows


def differences(runs: Sequence[ReportedRun]) -> Differences:
    """Compare at least two runs; metrics are compared with those of the first one."""
    heads = ("", *(run.label for run in runs))
    machines = [{n: _shorten(v) for n, v, *_ in environment(run).rows} for run in runs]
    per_class = [
        {name: one.get("AP") for name, one in run.scores().get("per_class", {}).items()}
        for run in runs
    ]
    metrics = _compare_numbers([run.scores() for run in runs], SCORES)
    names = dict.fromkeys(name for one in per_class for name in one)
    return Differences(
        parts=Table(heads, _differing([r.parts for r in runs], PARTS, missing="", length=_SHORT)),
        parameters=Table(heads, _differing([run.params for run in runs], missing="not set")),
        code=Table(heads, _recorded_by_all(runs, _files)),
        packages=Table(heads, _recorded_by_all(runs, _packages)),
        environment=Table(
            heads, _differing(machines, dict.fromkeys(n for one in machines for n in one), "")
        ),
        scores=Table(heads, [["duration", *map(_duration, runs)], *metrics], numbers=True),
        classes=Table(heads, _compare_numbers(per_class, names), numbers=True),
    )


def _differing(
    values: Sequence[Mapping[str, str]],
    names: Iterable[str] | None = None,
    missing: str = "missing",
    length: int | None = None,
) -> list[Sequence[str]]:
    """Return a row for each name whose values are not the same in all runs."""
    names = sorted({name for one in values for name in one}) if names is None else names
    rows = [[name, *(one.get(name, missing)[:length] for one in values)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _recorded_by_all(
    runs: Sequence[ReportedRun], of: Callable[[ReportedRun], Mapping[str, str]]
) -> list[Sequence[str]]:
    values = [of(run) for run in runs]
    return _differing(values) if all(values) else []


def _files(run: ReportedRun) -> Mapping[str, str]:
    return {name: text[:_SHORT] for name, text in run.preimage("code").get("files", {}).items()}


def _packages(run: ReportedRun) -> Mapping[str, str]:
    packages = run.preimage("environment").get("packages", ())
    return {name: f"{version} {build}" for name, version, build, *_ in packages}


def _compare_numbers(values: Sequence[Mapping[str, Any]], names: Iterable[str]) -> list[list[str]]:
    """Return a row for each name that any run has, with the change from the first run."""
    rows = []
    for name in names:
        first, *others = [one.get(name) for one in values]
        if any(value is not None for value in (first, *others)):
            rows.append([name, _number(first), *(_with_change(v, first) for v in others)])
    return rows


def _with_change(value: Any, first: Any) -> str:
    both = isinstance(first, (int, float)) and isinstance(value, (int, float))
    return f"{_number(value)} ({value - first:+.3f})" if both else _number(value)


def _duration(run: ReportedRun) -> str:
    return "" if run.seconds is None else format_seconds(run.seconds)


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _shorten(text: str) -> str:
    return text[:_SHORT] if _COMMIT.fullmatch(text) else text


def _brief(value: Any) -> str:
    return cut(f"{value:.4g}" if isinstance(value, float) else _text(value), 80)


def _text(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
