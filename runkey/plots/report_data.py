"""What a report shows of a run: its record, its files, and tables made from both.

A run's files have the paths of the repository, so that their folder is a run's artifacts or the
workspace it was trained in.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from runkey import paths
from runkey.evaluation.files import METRICS_JSON
from runkey.identity.key import PARTS
from runkey.identity.record import KEY, KEY_JSON, Details, LoggedRun, Record, RunManifest
from runkey.params import as_text, changed_params, load_params
from runkey.plots.hints import CLASS_SCORES, EVENT, Hint, all_hints
from runkey.plots.log import SAMPLES, Point, TrainingLog, read_log, read_samples
from runkey.units import format_seconds

LOG = paths.LOGS / "train.jsonl"
SCORES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100", "loss")
_METRICS = f"{paths.EVALUATION}/{METRICS_JSON}"
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
class ReportedRun(Record):
    """One run of a report, with its files as far as it came."""

    folder: Path
    """Of the files."""
    log: TrainingLog
    """Empty if there is none."""

    @property
    def label(self) -> str:
        """The short key, with the run id if the run repeats another one."""
        suffix = f":{self.run.run_id[:4]}" if self.reproduction_of and self.run.run_id else ""
        return super().label + suffix

    @property
    def events(self) -> dict[str, dict[str, Any]]:
        """The last one of each kind of event that is out of the ordinary, such as skipped steps."""
        return {
            kind: fields
            for kind, fields in self.log.events.items()
            if kind not in _REGULAR_EVENTS and not kind.startswith(EVENT)
        }

    @property
    def params(self) -> dict[str, str]:
        """Resolved parameters by dotted name, as text."""
        return {n: v for n, v in self.run.params.items() if n.split(".")[0] != KEY}

    @property
    def changed_params(self) -> dict[str, str]:
        """The parameters that are not the default."""
        return changed_params(self.params)

    @property
    def samples(self) -> list[Point]:
        """Samples of the machine; may be empty."""
        return read_samples((self.folder / LOG).with_name(SAMPLES))

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
            known = [(n, v) for n, v in self.run.metrics.items() if n.startswith(prefix)]
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
    log = read_log(folder / LOG) if (folder / LOG).is_file() else TrainingLog()
    return ReportedRun(run=record.run, details=record.details, folder=folder, log=log)


def workspace_run(root: Path) -> ReportedRun:
    """Return the run whose results are in a workspace, recorded or not; RecipeError without any."""
    manifest = RunManifest.read(root / paths.RUN_JSON)
    params = {n: as_text(v) for n, v in load_params(root / paths.PARAMS).flat().items()}
    params |= {KEY: manifest.key} | {f"{KEY}.{n}": digest for n, digest in manifest.parts.items()}
    run = LoggedRun(
        run_id=manifest.run_id or "",
        experiment_id="",
        name="",
        status="FINISHED",
        started_ms=0,
        ended_ms=None,
        artifact_uri="",
        params=params,
        metrics={},
        tags={},
    )
    details = Details(
        stage="",
        files={},
        outputs=[],
        witness=asdict(manifest.witness),
        host="",
        snapshot=None,
        pointer_md5=None,
        decision="",
    )
    found = recorded_run(Record(run=run, details=details), root)
    times = [1000 * point.seconds for point in (*found.log.steps, *found.log.epochs)]
    if times:
        started, ended = round(min(times)), round(max(times))
        found = replace(found, run=replace(run, started_ms=started, ended_ms=ended))
    return found


def environment(run: ReportedRun) -> dict[str, str]:
    """Return machine, packages and code of the run, as far as they are known."""
    found = run.details.witness if run.details else {}
    packages = found.get("package_differences")
    shown = {"host": run.details.host if run.details else run.run.tags.get("host")}
    shown |= {label: text(found[name]) for name, label in _ENVIRONMENT.items() if name in found}
    shown["snapshot"] = run.details.snapshot if run.details else None
    shown["packages"] = None if packages is None else ", ".join(packages) or "as locked"
    shown["files outside the key"] = ", ".join(found.get("undeclared_files", ()))
    shown |= {name: str(value) for name, value in found.get("variables", {}).items()}
    return {name: value for name, value in shown.items() if value}


CLASS_COLUMNS = ("class", "objects", "AP", "AP50", "AR", "AP small", "AP medium", "AP large")


def classes(run: ReportedRun) -> list[list[str]]:
    """Tabulate the COCO metrics of each class, in `CLASS_COLUMNS`, the worst first."""
    per_class: Mapping[str, Mapping[str, Any]] = run.scores().get("per_class", {})
    rows = []
    for name in sorted(per_class, key=lambda name: (per_class[name].get("AP") or 0.0, name)):
        one = per_class[name]
        sizes = (one.get("by_size", {}).get(size, {}) for size in ("small", "medium", "large"))
        values = [*(one.get(n) for n in ("AP", "AP50", "AR")), *(size.get("AP") for size in sizes)]
        rows.append([name, f"{one.get('objects', 0):,}", *map(number, values)])
    return rows


def differences(runs: Sequence[ReportedRun]) -> dict[str, list[list[str]]]:
    """Compare at least two runs; metrics are compared with those of the first one.

    Returns:
        Rows of a name and a value of each run, only where they differ: `parts` of the key,
        `parameters`, files of the `code` by their hashes, `packages`, `environment`, `scores`, and
        the AP of each of the `classes`.
    """
    files = [run.preimage("code").get("files", {}) for run in runs]
    packages = [
        {name: f"{version} {build}" for name, version, build, *_ in found}
        for found in (run.preimage("environment").get("packages", ()) for run in runs)
    ]
    machines = [environment(run) for run in runs]
    per_class = [
        {name: one.get("AP") for name, one in run.scores().get("per_class", {}).items()}
        for run in runs
    ]
    metrics = _compare_numbers([run.scores() for run in runs], SCORES)
    parts = [run.run.parts for run in runs]
    return {
        "parts": _differing(parts, PARTS, missing="", length=_SHORT),
        "parameters": _differing([run.params for run in runs], missing="not set"),
        "code": _differing(files, length=_SHORT) if all(files) else [],
        "packages": _differing(packages) if all(packages) else [],
        "environment": [
            [name, *(v[:_SHORT] if _COMMIT.fullmatch(v) else v for v in values)]
            for name, *values in _differing(machines, _names(machines), "")
        ],
        "scores": [["duration", *(run.duration for run in runs)], *metrics],
        "classes": _compare_numbers(per_class, _names(per_class)),
    }


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
        changes = [f" ({v - first:+.3f})" if number(v) and number(first) else "" for v in others]
        if any(value is not None for value in found):
            shown = zip(others, changes, strict=True)
            rows.append([name, number(first), *(number(v) + change for v, change in shown)])
    return rows


def number(value: Any) -> str:
    """Format a metric; empty if there is none."""
    if not isinstance(value, (int, float)):
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def text(value: Any) -> str:
    """Format a value of any type."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
