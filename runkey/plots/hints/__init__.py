"""What in a running training calls for another parameter: pure functions of its log.

Each rule looks at the last two epochs or at all evaluations, and is quiet rather than wrong: what a
hint says was measured, and it names the parameter that changes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from runkey.plots.hints import learning, speed
from runkey.plots.hints.hint import CLASS_SCORES, EVENT, MOST_NAMES, Hint
from runkey.plots.log import Point, TrainingLog

if TYPE_CHECKING:  # who only reads a log needs no pycocotools
    from runkey.evaluation.coco import ClassResult

__all__ = [
    "CLASS_SCORES",
    "EVENT",
    "Hint",
    "all_hints",
    "class_scores",
    "find_hints",
    "standing_hints",
    "told_hints",
]


def find_hints(
    log: TrainingLog, params: Mapping[str, Any], samples: Sequence[Point] = ()
) -> list[Hint]:
    """All hints that a log gives.

    Args:
        log: of a training, running or ended.
        params: resolved parameters by dotted name, or their texts; {} if they are not known.
        samples: of the machine, see `runkey.plots.samples`.
    """
    settings = {name: _plain(value) for name, value in params.items()}
    if len(log.epochs) < 2:
        return []
    return [
        *speed.loader(log, settings),
        *speed.machine(log, settings, samples),
        *learning.clipping(log, settings),
        *learning.rate(log, settings),
        *learning.overfitting(log, settings),
        *learning.classes(log),
    ]


def told_hints(log: TrainingLog) -> list[Hint]:
    """The hints that the training was told, as its log has them."""
    return [
        Hint(kind.removeprefix(EVENT), str(fields.get("seen", "")), str(fields.get("change", "")))
        for kind, fields in log.events.items()
        if kind.startswith(EVENT)
    ]


def all_hints(
    log: TrainingLog, params: Mapping[str, Any], samples: Sequence[Point] = ()
) -> list[Hint]:
    """The hints that the training was told, and those of other kinds that its log gives now.

    Of a training that has ended, those that came to nothing say so.
    """
    found = find_hints(log, params, samples)
    told, kinds = told_hints(log), {hint.kind for hint in found}
    if "training_end" in log.events:
        told = [
            h if h.kind in kinds else replace(h, seen=f"{h.seen} (no longer at the end)")
            for h in told
        ]
    return [*told, *(h for h in found if h.kind not in {one.kind for one in told})]


def standing_hints(
    log: TrainingLog, params: Mapping[str, Any], samples: Sequence[Point] = ()
) -> list[Hint]:
    """The hints that the training was told and that its log still gives, as it gives them now."""
    told = {hint.kind for hint in told_hints(log)}
    return [hint for hint in find_hints(log, params, samples) if hint.kind in told]


def class_scores(per_class: Sequence[ClassResult]) -> dict[str, Any]:
    """What an evaluation says of classes, short enough for a tag of the run."""
    known = [(c.name, c.ap50) for c in per_class if c.ap50 is not None]
    never = [name for name, ap50 in known if ap50 < 0.001]
    return {
        "classes": len(known),
        "mean_AP50": float(np.mean([ap50 for _, ap50 in known])) if known else 0.0,
        "never_found": [name[:60] for name in never[: 4 * MOST_NAMES]],
        "never_found_count": len(never),
    }


def _plain(value: Any) -> Any:
    """MLflow has parameters as JSON texts; words in it are bare."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
