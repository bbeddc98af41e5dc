"""What in a running training calls for another parameter: pure functions of its log.

Each rule looks at the last two epochs or at all evaluations, and is quiet rather than wrong: what a
hint says was measured, and it names the parameter that changes it.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runkey.plots.log import Point, TrainingLog, gpu_names, number
from runkey.progress import WIDTH

if TYPE_CHECKING:
    from runkey.evaluation.coco import ClassResult


# What a hint is.


CLASS_SCORES = "class_scores"
"""Event of an evaluation during training; its fields are what `class_scores` gives."""
EVENT = "hint."
"""Beginning of the kinds of events that hold hints."""
MOST_NAMES = 5
"""Of classes, in a hint."""
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
        return self.wrapped(WIDTH)

    def wrapped(self, width: int) -> list[str]:
        """For people; at most so many columns."""
        return [
            *textwrap.wrap(f"hint: {self.seen}", width, subsequent_indent=_INDENT),
            *textwrap.wrap(self.change, width, initial_indent=_INDENT, subsequent_indent=_INDENT),
        ]


# What rules ask of a log: its latest values, and the parameters as they are.


FEWEST = 8
"""Logged steps, or samples of the machine, that say something."""


def recent(log: TrainingLog, name: str) -> NDArray[np.float64]:
    """Finite values of the logged steps of the last two whole epochs."""
    begin = log.epochs[-3].step if len(log.epochs) > 2 else log.epochs[0].step
    steps, values = log.of_steps(name)
    return values[(steps > begin) & np.isfinite(values)]


def finite(log: TrainingLog, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of the epochs' ends, without those that are not finite."""
    steps, values = log.of_epochs(name)
    good = np.isfinite(values)
    return steps[good], values[good]


def skipped_lately(log: TrainingLog) -> int:
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


def median(samples: Sequence[Point], names: Sequence[str]) -> float:
    """Of all samples of all these metrics; NaN, which is neither high nor low, without any."""
    values = [s.values[name] for s in samples for name in names if name in s.values]
    return float(np.median(values)) if values else float("nan")


def now(name: str, settings: Mapping[str, Any]) -> str:
    """A parameter, with the value that it has."""
    if name not in settings:
        return name
    value = settings[name]
    return f"{name} (now {value if isinstance(value, str) else json.dumps(value)})"


# Rules about what is learnt: clipping, learning rate, overfitting, classes.


_LATEST = 3
"""Epochs that must all say that the loss has risen: one alone may, of a training that goes well."""
_HIGH = 2e-3
"""Of AdamW's rates; above it a loss that stays is not for want of more."""
_GAP = 1.4
"""Held-out loss over training loss.  On the sample 0.9 to 1; without augmentation 1.3 in epoch 15,
2 at the end, and AP 0.05 lower (benchmarks/results/techniques.json)."""


def clipping(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    """Every step is clipped, or none."""
    before, after = recent(log, "train/grad_norm"), recent(log, "train/grad_norm_clipped")
    if len(before) < FEWEST or len(before) != len(after):
        return
    if settings.get("optimizer.clip.mode") == "percentile":
        return  # the threshold follows the norms by itself
    share = float((before > 1.001 * after).mean())
    typical, high = (float(f"{np.percentile(before, q):.2g}") for q in (50, 90))
    threshold = now("optimizer.clip.threshold", settings)
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


def rate(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    """The learning rate is too high or too low, by the loss."""
    lr = now("lr", settings)
    _, losses = finite(log, "train/epoch_loss")
    if skipped := skipped_lately(log):
        were = "step was" if skipped == 1 else "steps were"
        yield Hint(
            "lr_high",
            f"{skipped} {were} skipped in the last epoch: loss or gradients were not finite",
            f"lower {lr} to a third, or set training.precision: off",
        )
    elif len(losses) > _LATEST and losses[-_LATEST:].min() > 1.1 * (
        least := _least_before(losses, settings)
    ):
        yield Hint(
            "lr_high",
            f"the training loss has risen from {least:.3g} to {losses[-1]:.3g}",
            f"lower {lr} to a third, or raise {now('schedule.warmup_fraction', settings)}",
        )
    _, scores = finite(log, "val/AP")
    fallen = 1 - losses[-1] / losses[0] if len(losses) else 1.0
    slow = len(losses) >= 4 and 0 <= fallen < 0.05 and not _rising(log)
    given = settings.get("lr")
    slow = slow and not (isinstance(given, (int, float)) and given > _HIGH)
    if slow and (not len(scores) or scores.max() < 0.1):
        yield Hint(
            "lr_low",
            f"the training loss has fallen by {fallen:.1%} in {len(losses)} epochs",
            f"raise {lr} three times, or lower {now('schedule.warmup_fraction', settings)}",
        )


def _least_before(losses: NDArray[np.float64], settings: Mapping[str, Any]) -> float:
    """The least of the earlier epochs' losses; with a cyclical rate, of those a cycle ago."""
    earlier = losses[:-_LATEST]
    cycle = settings.get("schedule.cycle_epochs")
    if settings.get("schedule.name") == "cyclical" and isinstance(cycle, (int, float)):
        earlier = losses[: -max(_LATEST, round(cycle))]
    return float(earlier.min()) if len(earlier) else math.inf


def _rising(log: TrainingLog) -> bool:
    """Whether the rate is higher than an epoch ago: warm-up, or a schedule's way up."""
    steps, rates = log.of_steps("train/lr")
    if not len(rates):
        return False
    ago = float(np.interp(steps[-1] - (log.steps_per_epoch or 1.0), steps, rates))
    return bool(rates[-1] > 1.02 * ago)


def overfitting(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    """The loss of held-out images rises, or is far above that of training."""
    steps, held_out = finite(log, "val/loss")
    train_steps, train = finite(log, "train/epoch_loss")
    if len(steps) < 4 or not len(train):
        return
    trained = np.interp(steps, train_steps, train)
    best = int(np.argmin(held_out))
    risen = len(held_out) - best > 3 and held_out[-1] > 1.05 * held_out[best]
    if risen and trained[-1] < trained[best]:
        epoch = steps[best] / (log.steps_per_epoch or 1.0)
        seen = (
            f"since epoch {epoch:.0f} the loss of held-out images has risen from"
            f" {held_out[best]:.3g} to {held_out[-1]:.3g}, while that of training fell from"
            f" {trained[best]:.3g} to {trained[-1]:.3g}"
        )
    elif np.all(held_out[-3:] > _GAP * trained[-3:]):
        seen = (
            f"the loss of held-out images is {held_out[-1]:.3g}, that of training images"
            f" {trained[-1]:.3g}"
        )
    else:
        return
    yield Hint(
        "overfitting",
        seen,
        f"strengthen data.augment, raise {now('optimizer.weight_decay', settings)} or"
        f" {now('model.dropout', settings)}, or lower {now('training.epochs', settings)};"
        " the best weights are kept",
    )


def classes(log: TrainingLog) -> Iterator[Hint]:
    """Classes that no detection finds."""
    fields = log.events.get(CLASS_SCORES, {})
    never, classes = fields.get("never_found", []), fields.get("classes", 0)
    if never and number(fields.get("mean_AP50")) > 0.2:
        shown = ", ".join(map(str, never[:MOST_NAMES]))
        count = fields.get("never_found_count", len(never))
        more = f" and {count - MOST_NAMES} more" if count > MOST_NAMES else ""
        yield Hint(
            "class",
            f"{count} of {classes} classes are never found (AP50 0): {shown}{more}",
            "add images of these classes, which helps most; or raise training.epochs, or look at"
            " their names and boxes in prepared/contact_sheet.jpg",
        )


# Rules about what a training waits for, and about memory.


_HOST_MEMORY = "system/system_memory_usage_percentage"
_GPU_BUSY = "_utilization_percentage"
_GPU_MEMORY = "_memory_usage_percentage"

_LOADER_SHARE = 0.15
_BUSY_PERCENT = 60
_FULL_PERCENT = {"host": 92, "GPU": 97}
_EMPTY_PERCENT = 40


def loader(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    """Training waits for data."""
    waits = recent(log, "train/data_wait_share")
    if len(waits) >= FEWEST and (share := float(np.median(waits))) >= _LOADER_SHARE:
        yield Hint(
            "loader",
            f"training waits for data {share:.0%} of its time",
            f"raise {now('runtime.workers', settings)} or {now('runtime.prefetch', settings)};"
            f" or {now('data.cache_gib', settings)}, so that images lie decoded",
        )


def machine(
    log: TrainingLog, settings: Mapping[str, Any], samples: Sequence[Point]
) -> Iterator[Hint]:
    """The host's memory is full, the GPU not busy, the GPU's memory full or empty."""
    last = samples[-60:]
    if len(last) < FEWEST:
        return
    if (full := median(last, [_HOST_MEMORY])) >= _FULL_PERCENT["host"]:
        yield Hint(
            "host_memory",
            f"{full:.0f}% of the host's memory is in use",
            f"lower {now('runtime.workers', settings)} or {now('data.cache_gib', settings)}",
        )
    busy = median(last, gpu_names(last, _GPU_BUSY))
    waits = recent(log, "train/data_wait_share")
    if len(waits) and busy < _BUSY_PERCENT and np.median(waits) < _LOADER_SHARE:
        yield Hint(
            "host",
            f"the GPU is busy {busy:.0f}% of the time though its data is there: the host is slower",
            f"raise {_larger_batch(settings)}, so that each launch does more",
        )
    memory = median(last, gpu_names(last, _GPU_MEMORY))
    if memory >= _FULL_PERCENT["GPU"]:
        yield Hint(
            "gpu_memory",
            f"{memory:.0f}% of the GPU's memory is in use: a larger batch may not fit",
            f"lower {now('training.micro_batch', settings)} or"
            f" {now('memory.budget_gib', settings)}",
        )
    elif memory < _EMPTY_PERCENT:
        yield Hint(
            "gpu_memory",
            f"only {memory:.0f}% of the GPU's memory is in use",
            f"raise {_larger_batch(settings)}, or train a larger model or larger images",
        )


def _larger_batch(settings: Mapping[str, Any]) -> str:
    """What makes forward passes larger: `auto` takes as many images as the step has and fit."""
    names = ["training.batch_size"]
    if settings.get("training.micro_batch") != "auto":
        names.insert(0, "training.micro_batch")
    return " or ".join(now(name, settings) for name in names)


def find_hints(
    log: TrainingLog, params: Mapping[str, Any], samples: Sequence[Point] = ()
) -> list[Hint]:
    """All hints that a log gives.

    Args:
        log: of a training, running or ended.
        params: resolved parameters by dotted name, or their texts; {} if they are not known.
        samples: of the machine, see `runkey.plots.log`.
    """
    settings = {name: _plain(value) for name, value in params.items()}
    if len(log.epochs) < 2:
        return []
    return [
        *loader(log, settings),
        *machine(log, settings, samples),
        *clipping(log, settings),
        *rate(log, settings),
        *overfitting(log, settings),
        *classes(log),
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
