"""What in a running training calls for another parameter: pure functions of its log.

Each rule looks at the last two epochs or at all evaluations, and is quiet rather than wrong: what a
hint says was measured, and it names the parameter that changes it.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runkey.plots.log import Point, TrainingLog, number
from runkey.plots.samples import gpu_names

if TYPE_CHECKING:  # who only reads a log needs no pycocotools
    from runkey.evaluation.coco import ClassResult

CLASS_SCORES = "class_scores"
"""Event of an evaluation during training; its fields are what `class_scores` gives."""
EVENT = "hint."
"""Beginning of the kinds of events that hold hints."""
_HOST_MEMORY = "system/system_memory_usage_percentage"
_GPU_BUSY = "_utilization_percentage"
_GPU_MEMORY = "_memory_usage_percentage"

_LOADER_SHARE = 0.15
_BUSY_PERCENT = 60
_FULL_PERCENT = {"host": 92, "GPU": 97}
_EMPTY_PERCENT = 40
_FEWEST = 8
"""Logged steps, or samples of the machine, that say something."""
_MOST_NAMES = 5
_WIDTH = 100
_INDENT = " " * len("hint: ")


@dataclass(frozen=True, slots=True)
class Hint:
    """One thing to look at."""

    kind: str
    """Such as `loader`; a run is told each kind once."""
    seen: str
    """What was measured."""
    change: str
    """Which parameters change it, and which way."""

    @property
    def lines(self) -> list[str]:
        """For people; at most 100 columns."""
        return self.wrapped(_WIDTH)

    def wrapped(self, width: int) -> list[str]:
        """For people; at most so many columns."""
        return [
            *textwrap.wrap(f"hint: {self.seen}", width, subsequent_indent=_INDENT),
            *textwrap.wrap(self.change, width, initial_indent=_INDENT, subsequent_indent=_INDENT),
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
        *_loader(log, settings),
        *_machine(log, settings, samples),
        *_clipping(log, settings),
        *_rate(log, settings),
        *_overfitting(log, settings),
        *_classes(log),
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
    """The hints that the training was told, and those of other kinds that its log gives now."""
    told = told_hints(log)
    kinds = {hint.kind for hint in told}
    return [*told, *(h for h in find_hints(log, params, samples) if h.kind not in kinds)]


def class_scores(per_class: Sequence[ClassResult]) -> dict[str, Any]:
    """What an evaluation says of classes, short enough for a tag of the run."""
    known = [(c.name, c.ap50) for c in per_class if c.ap50 is not None]
    never = [name for name, ap50 in known if ap50 < 0.001]
    return {
        "classes": len(known),
        "mean_AP50": float(np.mean([ap50 for _, ap50 in known])) if known else 0.0,
        "never_found": [name[:60] for name in never[: 4 * _MOST_NAMES]],
        "never_found_count": len(never),
    }


def _loader(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    waits = _recent(log, "train/data_wait_share")
    if len(waits) >= _FEWEST and (share := float(np.median(waits))) >= _LOADER_SHARE:
        yield Hint(
            "loader",
            f"training waits for data {share:.0%} of its time",
            f"raise {_now('runtime.workers', settings)} or {_now('runtime.prefetch', settings)};"
            f" or {_now('data.cache_gib', settings)}, so that images lie decoded",
        )


def _machine(
    log: TrainingLog, settings: Mapping[str, Any], samples: Sequence[Point]
) -> Iterator[Hint]:
    recent = samples[-60:]
    if len(recent) < _FEWEST:
        return
    if (full := _median(recent, [_HOST_MEMORY])) >= _FULL_PERCENT["host"]:
        yield Hint(
            "host_memory",
            f"{full:.0f}% of the host's memory is in use",
            f"lower {_now('runtime.workers', settings)} or {_now('data.cache_gib', settings)}",
        )
    busy = _median(recent, gpu_names(recent, _GPU_BUSY))
    waits = _recent(log, "train/data_wait_share")
    if len(waits) and busy < _BUSY_PERCENT and np.median(waits) < _LOADER_SHARE:
        yield Hint(
            "host",
            f"the GPU is busy {busy:.0f}% of the time though its data is there: the host is slower",
            f"raise {_larger_batch(settings)}, so that each launch does more",
        )
    memory = _median(recent, gpu_names(recent, _GPU_MEMORY))
    if memory >= _FULL_PERCENT["GPU"]:
        yield Hint(
            "gpu_memory",
            f"{memory:.0f}% of the GPU's memory is in use: a larger batch may not fit",
            f"lower {_now('training.micro_batch', settings)} or"
            f" {_now('memory.budget_gib', settings)}",
        )
    elif memory < _EMPTY_PERCENT:
        yield Hint(
            "gpu_memory",
            f"only {memory:.0f}% of the GPU's memory is in use",
            f"raise {_larger_batch(settings)}, or train a larger model or larger images",
        )


def _clipping(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    before, after = _recent(log, "train/grad_norm"), _recent(log, "train/grad_norm_clipped")
    if len(before) < _FEWEST or len(before) != len(after):
        return
    if settings.get("optimizer.clip.mode") == "percentile":
        return  # the threshold follows the norms by itself
    share = float((before > 1.001 * after).mean())
    typical, high = (float(f"{np.percentile(before, q):.2g}") for q in (50, 90))
    threshold = _now("optimizer.clip.threshold", settings)
    if share >= 0.98 and typical >= 2 * np.median(after):
        yield Hint(
            "clipping",
            f"gradients are clipped in {share:.0%} of the steps, from a norm of about {typical:g}"
            f" to {np.median(after):.2g}: every step has the same length",
            f"raise {threshold} to about {high:g} to clip outliers alone",
        )
    limit = settings.get("optimizer.clip.threshold")
    norm_mode = settings.get("optimizer.clip.mode") == "norm"
    if norm_mode and share == 0 and len(log.epochs) >= 3 and isinstance(limit, (int, float)):
        largest = float(np.max(before))
        if largest < limit / 2:
            yield Hint(
                "clipping",
                f"clipping never acts: the largest gradient norm is {largest:.2g}",
                f"lower {threshold} to about {high:g}, or set optimizer.clip.mode: none",
            )


def _rate(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    lr = _now("lr", settings)
    _, losses = _finite(log, "train/epoch_loss")
    if skipped := _skipped(log):
        were = "step was" if skipped == 1 else "steps were"
        yield Hint(
            "lr_high",
            f"{skipped} {were} skipped in the last epoch: loss or gradients were not finite",
            f"lower {lr} to a third, or set training.precision: off",
        )
    elif len(losses) >= 3 and losses[-1] > 1.1 * losses[:-1].min():
        least = float(losses[:-1].min())
        yield Hint(
            "lr_high",
            f"the training loss has risen from {least:.3g} to {losses[-1]:.3g}",
            f"lower {lr} to a third, or raise {_now('schedule.warmup_fraction', settings)}",
        )
    _, scores = _finite(log, "val/AP")
    fallen = 1 - losses[-1] / losses[0] if len(losses) else 1.0
    if len(losses) >= 4 and 0 <= fallen < 0.05 and (not len(scores) or scores.max() < 0.1):
        yield Hint(
            "lr_low",
            f"the training loss has fallen by {fallen:.1%} in {len(losses)} epochs",
            f"raise {lr} three times, or lower {_now('schedule.warmup_fraction', settings)}",
        )


def _overfitting(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    steps, held_out = _finite(log, "val/loss")
    train_steps, train = _finite(log, "train/epoch_loss")
    if len(steps) < 4:
        return
    best = int(np.argmin(held_out))
    since = held_out[best + 1 :]
    at_best, now = (float(np.interp(s, train_steps, train)) for s in (steps[best], steps[-1]))
    if len(since) >= 3 and held_out[-1] > 1.05 * held_out[best] and now < at_best:
        per_epoch = log.steps_per_epoch or 1.0
        yield Hint(
            "overfitting",
            f"since epoch {steps[best] / per_epoch:.0f} the loss of held-out images has risen from"
            f" {held_out[best]:.3g} to {held_out[-1]:.3g}, while that of training fell from"
            f" {at_best:.3g} to {now:.3g}",
            f"strengthen data.augment, raise {_now('optimizer.weight_decay', settings)} or"
            f" {_now('model.dropout', settings)}, or lower {_now('training.epochs', settings)};"
            " the best weights are kept",
        )


def _classes(log: TrainingLog) -> Iterator[Hint]:
    fields = log.events.get(CLASS_SCORES, {})
    never, classes = fields.get("never_found", []), fields.get("classes", 0)
    if never and number(fields.get("mean_AP50")) > 0.2:
        shown = ", ".join(map(str, never[:_MOST_NAMES]))
        count = fields.get("never_found_count", len(never))
        more = f" and {count - _MOST_NAMES} more" if count > _MOST_NAMES else ""
        yield Hint(
            "class",
            f"{count} of {classes} classes are never found (AP50 0): {shown}{more}",
            "more images of them help most; else raise training.epochs, or look at their names and"
            " boxes in prepared/contact_sheet.jpg",
        )


def _recent(log: TrainingLog, name: str) -> NDArray[np.float64]:
    """Finite values of the logged steps of the last two whole epochs."""
    begin = log.epochs[-3].step if len(log.epochs) > 2 else log.epochs[0].step
    steps, values = log.of_steps(name)
    chosen = values[(steps > begin) & np.isfinite(values)]
    return chosen


def _finite(log: TrainingLog, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps, values = log.of_epochs(name)
    good = np.isfinite(values)
    return steps[good], values[good]


def _skipped(log: TrainingLog) -> int:
    """Steps of the last epoch that were skipped, if it was one in a hundred or more.

    With fp16 one in ten: its loss scale finds its place, and later its bounds, by such steps.
    """
    steps, counts = log.of_epochs("train/skipped_steps")
    if len(counts) < 2:
        return 0
    skipped, tried = counts[-1] - counts[-2], steps[-1] - steps[-2]
    precision = str(log.events.get("training_start", {}).get("precision"))
    scaled = precision.startswith("float16")
    few = max(3, tried / 10) if scaled else max(1, tried / 100)
    return int(skipped) if np.isfinite(skipped) and skipped >= few else 0


def _larger_batch(settings: Mapping[str, Any]) -> str:
    """What makes forward passes larger: `auto` takes as many images as the step has and fit."""
    names = ["training.batch_size"]
    if settings.get("training.micro_batch") != "auto":
        names.insert(0, "training.micro_batch")
    return " or ".join(_now(name, settings) for name in names)


def _median(samples: Sequence[Point], names: Sequence[str]) -> float:
    """Of all samples of all these metrics; NaN, which is neither high nor low, without any."""
    values = [s.values[name] for s in samples for name in names if name in s.values]
    return float(np.median(values)) if values else float("nan")


def _plain(value: Any) -> Any:
    """MLflow has parameters as JSON texts; words in it are bare."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _now(name: str, settings: Mapping[str, Any]) -> str:
    """A parameter, with the value that it has."""
    if name not in settings:
        return name
    value = settings[name]
    return f"{name} (now {value if isinstance(value, str) else json.dumps(value)})"
