"""What a report tells of one run, read from its record and its files.

Files lie under the paths that they have in the repository, so the folder may be a run's artifacts
or the workspace that it was trained in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runkey import paths
from runkey.evaluation.files import METRICS
from runkey.identity.key import short_key
from runkey.identity.manifest import RunManifest
from runkey.identity.record import KEY, KEY_JSON, REPRODUCTION_OF, Record
from runkey.params import as_text, load_params
from runkey.plots.hints import Hint, all_hints
from runkey.plots.log import SAMPLES, Point, TrainingLog, read_log, read_samples

LOG = paths.LOGS / "train.jsonl"
_SCORES = f"{paths.EVALUATION}/{METRICS}"
_NOT_WANTED = (
    *("model/weights.safetensors", "model/weights.pt", "model/model.json"),
    *("evaluation/predictions.json", "prepared/images.json"),
)
"""Large, and in no report."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run."""

    folder: Path
    """Of its files; which are there depends on how far it came."""
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
    """See `runkey.identity.manifest.Witness`; empty if the run did not come so far."""
    snapshot: str | None
    host: str
    log: TrainingLog
    """Empty if there is none."""

    @property
    def samples(self) -> list[Point]:
        """Of the machine; there may be none."""
        return read_samples((self.folder / LOG).with_name(SAMPLES))

    @property
    def is_evaluated(self) -> bool:
        """Whether its model was evaluated, after training."""
        return (self.folder / _SCORES).is_file() or "eval/AP" in self.metrics

    @property
    def label(self) -> str:
        """The short key, and the run if it repeats another."""
        repeats = self.tags.get(REPRODUCTION_OF)
        run = f":{self.run_id[:4]}" if repeats and self.run_id else ""
        return short_key(self.key) + run

    @property
    def seconds(self) -> float | None:
        """Wall time; None while it runs."""
        if self.started_ms is None or self.ended_ms is None:
            return None
        return (self.ended_ms - self.started_ms) / 1000

    def json(self, path: str) -> Any:
        """The contents of a JSON file; None if the run has none."""
        file = self.folder / path
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def preimage(self, part: str) -> Mapping[str, Any]:
        """What a part of the key was made of; empty if the run does not say."""
        recipe = self.json(KEY_JSON) or {}
        found: Mapping[str, Any] = recipe.get("preimages", {}).get(part, {})
        return found

    def scores(self) -> dict[str, Any]:
        """COCO's numbers with those of each class under `per_class`, or the last of training."""
        final = self.json(_SCORES)
        if isinstance(final, dict):
            return final
        for prefix in ("eval/", "val/"):
            known = [(n, v) for n, v in self.metrics.items() if n.startswith(prefix)]
            if known:
                return {name.removeprefix(prefix): value for name, value in known}
        last = [p.values for p in self.log.epochs if "val/AP" in p.values][-1:]
        return {n.removeprefix("val/"): v for values in last for n, v in values.items()}

    def hints(self) -> list[Hint]:
        """What the training was told, and what its log says now."""
        return all_hints(self.log, self.params, self.samples)


def is_wanted(path: str) -> bool:
    """Whether a report shows anything of a run's file."""
    return not path.startswith(_NOT_WANTED)


def recorded_run(record: Record, folder: Path) -> Run:
    """A run of a store, with those of its files that are wanted in a folder."""
    run, details = record.run, record.details
    return Run(
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
        log=_log(folder),
    )


def workspace_run(root: Path) -> Run:
    """The run whose results lie in a workspace, recorded or not.

    Raises:
        RecipeError: there is none; says to train.
        ParamsError: params.yaml is missing or wrong.
    """
    manifest = RunManifest.read(root / paths.RUN_JSON)
    log = _log(root)
    flat = load_params(root / paths.PARAMS).flat()
    times = [point.seconds for point in (*log.steps, *log.epochs)]
    return Run(
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


def _log(folder: Path) -> TrainingLog:
    return read_log(folder / LOG) if (folder / LOG).is_file() else TrainingLog()
