"""Propose parameters for a data set and a machine: `runkey preset auto`.

    facts, machine = survey_data(root, params), survey_machine(root, params)
    proposal = propose(facts, machine, params, 10, measure_speed)

A proposal is a preset with some values changed, each with its reason. It follows from the data, the
machine and the measured speed alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runkey.model.backbones import spec_of, strides_of
from runkey.params import Params, load_params, override
from runkey.params.render import preset_file
from runkey.pipeline.survey import DataFacts, Machine, Speed, SplitFacts
from runkey.plots.hints import FEW_OBJECTS, FEW_VAL, half_width
from runkey.units import GIB, counted, format_seconds

Measure = Callable[[Params, DataFacts], Speed]
"""Measure training steps under some parameters, see `measure_speed`."""

SMALL = 0.1
"""Fraction of the objects that may be smaller than the distance of two cells of the features."""
_PHOTOS, _LARGE_DATA, _LARGE_PRESET = "photos", 20_000, "coco-detr-r50"
_LARGE_MINUTES = 600.0
_CELLS = "blood-cells"
_CELLS_OBJECTS, _CELLS_IN_IMAGE, _CELLS_SPREAD, _CELLS_SIDE = 1_000, 5, 0.25, 0.3
"""Objects to train on, and on average in an image, from which random weights are better, if their
sizes spread less than the third within a class and their median side is less than the fourth."""
_FINEST = 8
"""Pixels from cell to cell: features of 4 have four times as many tokens."""
_SIZE_STEP, _LEAST_SIZE = 32, 192
_LARGEST_SIZE = 1344
"""About that of detectors on COCO; what is small there needs tiles."""
_FEW_EPOCHS, _MOST_EPOCHS = 12, 100
"""Below the first, smaller images are worth more than objects that are too small for them."""
_EVALUATIONS = 10
_EVALUATION_COST = 0.4
"""Time to evaluate an image, as a part of the time to train on it."""
_EVALUATION_SHARE = 0.2
_READING = 0.9
"""Images/s of a training as a part of those of the measured steps, which read no images."""
_START_SECONDS = 10.0
_THREADS_GAIN = 1.3
_QUERIES_SPARE, _QUERIES_STEP = 1.25, 10
_MOST_NOISED = 100
"""Denoising queries of an image; their cost grows with the square."""
_KEPT: tuple[str, ...] = (
    *("data.path", "data.checks.", "data.val_fraction", "data.test_fraction", "data.group_by"),
    *("data.split_seed", "data.max_megapixels", "data.max_bad_fraction", "data.intensity_range"),
    *("memory.", "runtime."),
)
"""Parameters that say what the data and the machine are; beginnings of their names."""
_SIDED = re.compile(
    r"(?i)(^|[^a-z])(left|right)([^a-z]|$)|^(digit|number|letter|char)?[ _-]?\w$"
    r"|^(zero|one|two|three|four|five|six|seven|eight|nine|ten)$"
)
"""Names of classes that a mirror may change."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Parameters, and why they are what they are."""

    preset: str
    params: Params
    changes: Mapping[str, Any]
    """What differs from the preset, by dotted name."""
    reasons: tuple[tuple[str, str], ...]
    """A parameter or a subject, and the reason; in the order of the decisions."""
    warnings: tuple[str, ...]
    """What the parameters cannot mend."""


def propose(
    facts: DataFacts, machine: Machine, now: Params, minutes: float, measure: Measure
) -> Proposal:
    """Propose parameters for the data and the machine.

    Args:
        facts: of the data.
        machine: that trains.
        now: the workspace's parameters, of which those that say what data and machine are stay.
        minutes: time for the train stage.
        measure: runs training steps.

    Raises:
        TrainingError: not even one image at once fits into memory.
    """
    name, why = _choose_preset(facts, machine, minutes)
    kept = {n: v for n, v in now.flat(runtime=True).items() if n.startswith(_KEPT)}
    preset = override(load_params(preset_file(name)), kept)
    plan = _Plan(preset, facts, minutes * 60, measure)
    plan.note("data", _describe(facts))
    plan.note("machine", str(machine))
    plan.note("preset", f"{name}: {why}")
    backbone, weights = preset.model.backbone, preset.model.backbone_weights
    plan.note("model.backbone", f"{backbone}, the preset's, with weights {weights}")
    plan.choose_queries()
    plan.choose_initial_box()
    plan.choose_flip()
    plan.choose_stride()
    plan.choose_size_and_epochs(machine)
    return Proposal(name, plan.params, plan.changes, tuple(plan.reasons), tuple(plan.warnings()))


def _describe(facts: DataFacts) -> str:
    train, val = facts.train, facts.val
    height, width = facts.median_size
    images = f"{train.images:,} + {val.images:,}" if val else f"{train.images:,}"
    return (
        f"{counted(images, 'image')} of about {width} x {height} pixels,"
        f" {counted(len(train.classes), 'class')},"
        f" {counted(f'{train.objects + (val.objects if val else 0):,}', 'object')} ({facts.read})"
    )


def _choose_preset(facts: DataFacts, machine: Machine, minutes: float) -> tuple[str, str]:
    images = facts.train.images
    if images > _LARGE_DATA and machine.gpu and minutes >= _LARGE_MINUTES:
        return (
            _LARGE_PRESET,
            f"{counted(f'{images:,}', 'image')}, a GPU and {format_seconds(minutes * 60)}",
        )
    if why := _why_cells(facts.train):
        return _CELLS, why
    why = f"starts from pretrained weights, which {counted(f'{images:,}', 'image')} need"
    if images > _LARGE_DATA:
        why = (
            "starts from pretrained weights, which short trainings need;"
            f" {_LARGE_PRESET} needs a GPU and {_LARGE_MINUTES / 60:g} hours or more"
        )
    return _PHOTOS, why


def _why_cells(train: SplitFacts) -> str:
    """Return why random weights are enough; empty if they are not.

    Many small objects of one size are what microscopes and scanners show. Photographs have
    perspective, which spreads the sizes within a class.
    """
    in_image = train.objects / train.images
    if (
        train.objects < _CELLS_OBJECTS
        or in_image < _CELLS_IN_IMAGE
        or train.median_side > _CELLS_SIDE
        or train.size_spread > _CELLS_SPREAD
    ):
        return ""
    return (
        f"{counted(f'{train.objects:,}', 'object')}, {in_image:.0f} in an image, whose sizes spread"
        f" by only {train.size_spread:.0%} within a class, as under a microscope: random weights"
        " learn them, at a third of the cost of an image"
    )


class _Plan:
    """Decisions so far."""

    def __init__(self, preset: Params, facts: DataFacts, seconds: float, measure: Measure) -> None:
        self.params, self._facts, self._seconds, self._measure = preset, facts, seconds, measure
        self._preset = preset
        self.changes: dict[str, Any] = {}
        self.reasons: list[tuple[str, str]] = []
        self._warnings: list[str] = []

    def note(self, subject: str, reason: str) -> None:
        self.reasons.append((subject, reason))

    def change(self, values: Mapping[str, Any], reason: str) -> None:
        """Set parameters; what is the preset's value already is not listed as a change."""
        before = self._preset.flat(runtime=True)
        self.params = override(self.params, values)
        for name, value in self.params.flat(runtime=True).items():
            if name in values and value != before[name]:
                self.changes[name] = value
        first, value = next(iter(values.items()))
        self.note(first, f"{_text(value)}: {reason}")

    def choose_queries(self) -> None:
        facts, now = self._facts, self.params.model.num_queries
        most = max(facts.train.most_objects, facts.val.most_objects if facts.val else 0)
        wanted = math.ceil(most * _QUERIES_SPARE / _QUERIES_STEP) * _QUERIES_STEP
        self.change(
            {"model.num_queries": max(now, wanted)},
            f"the fullest image has {counted(most, 'object')}",
        )
        groups = self.params.model.denoising.groups
        if groups * most > _MOST_NOISED:
            self.change(
                {"model.denoising.groups": max(1, _MOST_NOISED // most)},
                f"noised copies of {counted(most, 'object')} are queries too: about {_MOST_NOISED}",
            )

    def choose_initial_box(self) -> None:
        side = min(0.9, max(0.02, round(self._facts.train.median_side, 2)))
        if self.params.model.preset == "fast":
            reason = "the median side of the boxes, as a fraction of the image's"
            self.change({"model.initial_box": side}, reason)

    def choose_flip(self) -> None:
        """Switch flips off if a class's name says that left and right differ."""
        named = [name for name in self._facts.train.classes if _SIDED.search(name)]
        if named and self.params.data.augment.flip_probability:
            self.change(
                {"data.augment.flip_probability": 0.0},
                f"a mirrored {named[0]!r} may be another class; 0.5 if not",
            )

    def choose_stride(self) -> None:
        """Take finer features for small objects: cheaper than larger images."""
        model, small = self.params.model, self._small_side(self._preset.data.long_side)
        finer = [s for s in spec_of(model.backbone).strides if _FINEST <= s < self._stride]
        if small < self._stride and finer:
            self.change(
                {"model.feature_strides": (finer[-1],)},
                f"1 object in 10 is under {small:.0f} pixels at the preset's image size",
            )

    # Image size, epochs and threads: all from the measured speed.

    def choose_size_and_epochs(self, machine: Machine) -> None:
        wanted = long = self._size_for_objects()
        self._set_size(long)
        speed = self._measure(self.params, self._facts)
        epochs = self._epochs(speed)
        if epochs < _FEW_EPOCHS:
            # Time grows with the pixels.
            part = math.sqrt(max(epochs, 0.1) / _FEW_EPOCHS)
            least = min(wanted, self._least_size())
            long = max(least, int(long * part) // _SIZE_STEP * _SIZE_STEP)
        if long < wanted:
            self._set_size(long)
            speed = self._measure(self.params, self._facts)
            epochs = self._epochs(speed)
        self._explain_size(long, wanted)
        free = machine.cores - machine.busy_cores
        if not machine.gpu and free > 1.5 and self.params.training.cpu_threads == 1:
            speed = self._choose_threads(speed, machine.cores)
            epochs = self._epochs(speed)
        self._choose_epochs(speed, epochs)
        self._choose_cache(machine)
        self.note("memory", _memory(speed, machine))

    def _sides(self, long: int) -> tuple[int, ...]:
        """Return short_sides of images whose long side is `long`, in the preset's proportion."""
        data = self._preset.data
        if long == data.long_side:
            return data.short_sides
        scaled = (side * long / data.long_side / _SIZE_STEP for side in data.short_sides)
        return tuple(sorted({max(1, round(side)) * _SIZE_STEP for side in scaled}))

    def _set_size(self, long: int) -> None:
        values = {"data.long_side": long, "data.short_sides": self._sides(long)}
        self.params = override(self.params, values)

    def _small_side(self, long: int) -> float:
        sides = self._facts.train.sides_at(max(self._sides(long)), long)
        return float(np.quantile(sides, SMALL))

    @property
    def _stride(self) -> int:
        return strides_of(self.params.model)[0]

    def _size_for_objects(self) -> int:
        """Return the smallest long side, from the preset's on, at which few objects are small."""
        base = self._preset.data.long_side
        sides = min(_LARGEST_SIZE, max(self._facts.median_size))
        largest = max(base, sides // _SIZE_STEP * _SIZE_STEP)
        sizes: Iterable[int] = range(base, largest + 1, _SIZE_STEP)
        return next((one for one in sizes if self._small_side(one) >= self._stride), largest)

    def _least_size(self) -> int:
        """Return the smallest long side that objects allow where time is short."""
        base = self._preset.data.long_side
        sizes = range(min(base, _LEAST_SIZE), base + 1, _SIZE_STEP)
        return next((one for one in sizes if self._small_side(one) >= 2 * self._stride), base)

    def _explain_size(self, long: int, wanted: int) -> None:
        small, stride = self._small_side(long), self._stride
        reason = f"{round(10 * (1 - SMALL))} of 10 objects are at least {small:.0f} pixels there"
        reason += f", and the features' cells are {stride} pixels apart"
        if long < wanted:
            reason += f"; {wanted} leaves less than {_FEW_EPOCHS} epochs"
        self.change({"data.long_side": long, "data.short_sides": self._sides(long)}, reason)
        if small >= stride:
            return
        if long < wanted:
            way = "more minutes allow larger images; or cut the images into tiles"
        elif long >= _LARGEST_SIZE:
            way = "cut the images into tiles"
        else:
            way = "the images are no larger: cut larger ones into tiles, or photograph from nearer"
        self._warnings.append(f"1 object in 10 is under {stride} pixels, and hard to find; {way}")

    def _choose_threads(self, speed: Speed, cores: int) -> Speed:
        many = self._measure(override(self.params, {"training.cpu_threads": cores}), self._facts)
        gain = many.images_per_second / speed.images_per_second
        rates = f"{many.images_per_second:.3g} images/s with {cores}, {speed.images_per_second:.3g}"
        rates += " with 1"
        if gain < _THREADS_GAIN:
            self.note("training.cpu_threads", f"1: {rates}")
            return speed
        self.change({"training.cpu_threads": cores}, rates)
        return many

    def _epochs(self, speed: Speed) -> float:
        """Return the epochs that fit into the time."""
        facts = self._facts
        data = self.params.data
        held = (0 if facts.val else data.val_fraction) + (0 if facts.test else data.test_fraction)
        train = facts.train.images * max(0.01, 1 - held)
        rate = _READING * speed.images_per_second
        seconds = max(0.0, self._seconds - _START_SECONDS)
        return max(0.0, seconds - self._evaluations(speed)[1]) * rate / train

    def _evaluations(self, speed: Speed) -> tuple[int, float]:
        """Return the number of evaluations and their seconds altogether."""
        facts = self._facts
        held = facts.val.images if facts.val else facts.train.images * self.params.data.val_fraction
        one = held * _EVALUATION_COST / speed.images_per_second
        count = min(_EVALUATIONS, max(1, int(_EVALUATION_SHARE * self._seconds / max(one, 1e-9))))
        return count, count * one

    def _choose_epochs(self, speed: Speed, fitting: float) -> None:
        epochs = min(_MOST_EPOCHS, max(1, int(fitting)))
        every = max(1, round(epochs / self._evaluations(speed)[0]))
        values: dict[str, Any] = {"training.epochs": epochs, "training.evaluate_every": every}
        plain = self._preset.data.augment.plain_epochs
        if plain:
            part = plain / self._preset.training.epochs
            values["data.augment.plain_epochs"] = min(epochs - 1, max(1, round(part * epochs)))
        what = format_seconds(self._seconds)
        reason = f"{what} at {speed.images_per_second:.3g} images/s, measured here"
        reason += f" with {counted(speed.threads, 'thread')}"
        if epochs == _MOST_EPOCHS:
            reason = f"{what} would give {int(fitting):,}, and so many gain nothing"
        self.change(values, reason)
        if fitting < _FEW_EPOCHS:
            minutes = math.ceil(self._seconds / 60 * _FEW_EPOCHS / max(fitting, 0.01))
            self._warnings.append(
                f"only {counted(epochs, 'epoch')}: --minutes {minutes} gives {_FEW_EPOCHS}"
            )

    def _choose_cache(self, machine: Machine) -> None:
        """Keep decoded images if memory and disk hold them: large ones take long to decode."""
        from runkey.data.cache import HEADROOM

        data, facts = self.params.data, self._facts
        images = max(facts.train.images, facts.val.images if facts.val else 0)
        one = 3 * (HEADROOM * max(data.short_sides)) * (HEADROOM * data.long_side)
        needed = images * one / GIB
        room = min(machine.memory_bytes / 2, machine.disk_bytes / 4) / GIB
        if data.cache_gib < needed <= room:
            reason = f"holds {counted(f'{images:,}', 'image')} decoded; {room:.0f} GiB may be taken"
            self.change({"data.cache_gib": float(math.ceil(needed))}, reason)

    def warnings(self) -> Iterable[str]:
        """Return what no parameter mends, after what the decisions found."""
        facts = self._facts
        yield from self._warnings
        rare = [f"{n} ({c})" for n, c in facts.train.classes.items() if c < FEW_OBJECTS]
        if rare:
            yield few_objects(rare)
        if facts.judged and facts.judged.objects < FEW_VAL:
            yield few_val(facts.judged.objects)


def few_objects(classes: list[str]) -> str:
    """Say which classes have too few objects to learn or to judge."""
    shown = ", ".join(classes[:5]) + (f" and {len(classes) - 5} more" if len(classes) > 5 else "")
    return f"fewer than {FEW_OBJECTS} objects: {shown}; add images of them"


def few_val(objects: int) -> str:
    """Say how far AP50 may be off with so few objects in val."""
    return (
        f"AP is measured on {counted(objects, 'object')}: at AP50 0.8 it is known to"
        f" +-{half_width(objects):.2f}; hold out more images, with data.val_fraction if one JSON"
        " has all"
    )


def _memory(speed: Speed, machine: Machine) -> str:
    where = "the GPU" if machine.gpu else "the machine"
    return (
        f"{speed.peak_bytes / GIB:.1f} GiB of the {machine.memory_bytes / GIB:.1f} GiB of {where}"
        " were used at the peak"
    )


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
