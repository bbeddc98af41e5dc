"""Check a COCO folder, split it if it has one JSON, and write what training reads.

prepared/   classes.json  train.json  val.json  images.json  statistics.json  report.json
            cache_train.npy  cache_train.json  cache_val.npy  cache_val.json   (if they fit)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.data.cache import Scratch, write_cache
from runkey.data.checks import CheckedImage, SourceChecks
from runkey.data.coco import Source, find_sources, merge_classes, read_coco
from runkey.data.index import (
    IMAGE_LIST,
    ClassName,
    SplitName,
    write_classes,
    write_image_list,
    write_index,
)
from runkey.data.pixel_range import PixelRange
from runkey.data.report import Findings
from runkey.errors import DataError
from runkey.files import write_atomically
from runkey.params import Data
from runkey.units import GIB, MIB, counted

logger = logging.getLogger(__name__)

_REPORT = "report.json"
_OUTPUTS = (
    *("classes.json", "train.json", "val.json", IMAGE_LIST, "statistics.json", _REPORT),
    *("cache_train.npy", "cache_train.json", "cache_val.npy", "cache_val.json"),
)
_LISTED_NAMES = 10
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_MOST_SIZES = 20
_SIZE_BOUNDS = (32**2, 96**2)
"""COCO's bounds between small, medium and large, square pixels."""

_CROWD_WAY_OUT = "write iscrowd: 0 for single objects (CVAT exports masks with 1)"
_MANY_CROWDS = 0.05
"""Fraction of the annotations; COCO has 0.012."""

Splits = dict[SplitName, list[CheckedImage]]


def prepare(data: Data, root: Path, out: Path, num_queries: int) -> Findings:
    """Check the data set below `root`, replace the outputs in `out`, and log the report.

    Images with more objects than the model's `num_queries` are noted. Returns what report.json
    holds.

    Raises:
        DataError: the data set has a fault whose policy is `fail`, or cannot be used at all. All
            checks run first, and report.json lists every fault.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in _OUTPUTS:
        (out / name).unlink(missing_ok=True)
    shown = (out.relative_to(root) if out.is_relative_to(root) else out) / _REPORT
    findings = Findings(data.checks, shown.as_posix())
    try:
        with closing(Scratch(out / "scratch.tmp")) as scratch:
            sources = find_sources(root / data.path, data.path.rstrip("/"))
            _Preparation(data, out, findings, scratch).run(sources, num_queries)
    except DataError as error:
        if not findings.failures:
            findings.refuse(data.path, str(error), "stopped")
        findings.write(out / _REPORT)
        raise
    findings.write(out / _REPORT)
    return findings


@dataclass(frozen=True, slots=True)
class _Preparation:
    data: Data
    out: Path
    findings: Findings
    scratch: Scratch

    def run(self, sources: list[Source], num_queries: int) -> None:
        """Check, split and write the data of one or two JSON files."""
        read = [read_coco(source, self.findings) for source in sources]
        classes = merge_classes(read, self.findings)
        if any(item.kind == "structure" for item in self.findings.items):
            self.findings.stop_if_failed()  # other checks need the classes
        labels = {entry.id: entry.index for entry in classes}
        parts, pixels = [], PixelRange()
        for coco in read:
            checks = SourceChecks(coco, self.data, labels, self.findings, self.scratch, pixels)
            parts.append(list(checks.accepted_images()))
        if len(parts) == 2:
            parts[0] = self._without_leaks(parts, sources)
        self.findings.stop_if_failed()
        train, val = parts if len(parts) == 2 else self._split(parts[0], sources[0])
        splits: Splits = {"train": train, "val": val}
        way = f"add annotated images or see what was left out in {self.findings.report}"
        for (split, images), source in zip(splits.items(), (sources[0], sources[-1]), strict=True):
            # Sorted, so that the index does not depend on the order of the JSON.
            images.sort(key=lambda image: image.record.id)
            if not images:
                raise DataError(f"{source.shown_json}: no image is left for {split}; {way}")
            if not any(image.classes for image in images):
                crowd = sum(len(image.record.crowd) for image in images)
                what = f"all {crowd} annotations for {split} are crowd regions" if crowd else ""
                raise DataError(
                    f"{source.shown_json}: "
                    + (
                        f"{what}, which are not learnt; {_CROWD_WAY_OUT}"
                        if crowd
                        else f"no image for {split} has an object; {way}"
                    )
                )
        self._write(splits, classes)
        self.findings.notes += _notes(splits, classes, num_queries)
        self.findings.notes += pixels.notes(self.data.intensity_range)
        for line in self.findings.lines():
            logger.info(line)

    def _without_leaks(
        self, parts: list[list[CheckedImage]], sources: list[Source]
    ) -> list[CheckedImage]:
        """Train without the images that are also in val, by name or by content."""
        train, val = parts
        held: dict[str | bytes, CheckedImage] = {}
        for image in val:
            held[image.record.file] = held[image.digest] = image
        kept = []
        for image in train:
            twin = held.get(image.record.file) or held.get(image.digest)
            if twin is None:
                kept.append(image)
                continue
            self.findings.add(
                "leaked_image",
                sources[0].shown_json,
                f"image {image.record.id} ({image.record.file}) is image {twin.record.id} "
                f"({twin.record.file}) of {sources[1].shown_json} too",
                image_id=image.record.id,
                dropped="left out of train",
            )
        return kept

    def _split(self, images: list[CheckedImage], source: Source) -> list[list[CheckedImage]]:
        """Split a data set with one JSON; the checks have left out copies of an image."""
        if len(images) < 2:
            raise DataError(
                f"{source.shown_json}: train and val need an image each, but only {len(images)} "
                f"(not counting copies) passed the checks; add images or see {self.findings.report}"
            )
        classes_of = {image.record.id: image.classes for image in images}
        held = choose_val(classes_of, self.data.val_fraction, self.data.split_seed)
        parts: list[list[CheckedImage]] = [[], []]
        for image in images:
            parts[image.record.id in held].append(image)
        return parts

    def _write(self, splits: Splits, classes: list[ClassName]) -> None:
        write_classes(self.out / "classes.json", classes)
        statistics: dict[SplitName, dict[str, Any]] = {}
        for split, images in splits.items():
            write_index(self.out / f"{split}.json", [image.record for image in images])
            statistics[split] = numbers = _describe(images, classes)
            cached = self._write_cache(split, images)
            logger.info(
                f"{split}: {counted(len(images), 'image')}, {numbers['images_without_objects']} "
                f"without objects; {counted(numbers['objects'], 'object')}, "
                f"{counted(numbers['crowd_regions'], 'crowd region')}; "
                f"{cached}"
            )
        listed = {s: [(i.record, i.digest) for i in images] for s, images in splits.items()}
        write_image_list(self.out / IMAGE_LIST, listed, classes)
        text = json.dumps(statistics, indent=2, ensure_ascii=False)
        write_atomically(self.out / "statistics.json", text + "\n")
        self.findings.kept |= {
            split: {name: numbers[name] for name in ("images", "objects", "crowd_regions")}
            for split, numbers in statistics.items()
        }

    def _write_cache(self, split: SplitName, images: list[CheckedImage]) -> str:
        places = [image.places[split] for image in images if split in image.places]
        size = sum(height * width * 3 for _, height, width in places)
        if len(places) < len(images) or size > self.data.cache_gib * GIB:
            limit = f"data.cache_gib: {self.data.cache_gib:g}"
            return f"not cached, as it would take more than {limit}"
        write_cache(self.out, split, self.scratch.read(places))
        return f"{size / MIB:.1f} MiB cached"


def _notes(splits: Splits, classes: list[ClassName], num_queries: int) -> Iterator[str]:
    for split, images in splits.items():
        shown = frozenset().union(*(image.classes for image in images))
        absent = [entry.name for entry in classes if entry.index not in shown]
        if absent:
            names = ", ".join(absent[:_LISTED_NAMES])
            rest = f" and {len(absent) - _LISTED_NAMES} more" if len(absent) > _LISTED_NAMES else ""
            yield f"{split} has no object of {counted(len(absent), 'class')}: {names}{rest}"
        yield from _crowd_notes(split, images, classes)
        counts = [len(image.record.objects()) for image in images]
        most, crowded = max(counts), sum(count > num_queries for count in counts)
        if crowded:
            record = images[counts.index(most)].record
            yield (
                f"{split}: more objects than model.num_queries ({num_queries}) in "
                f"{counted(crowded, 'image')}, at most {most} in image {record.id} "
                f"({record.file}); the rest cannot be found"
            )


def _crowd_notes(
    split: SplitName, images: list[CheckedImage], classes: list[ClassName]
) -> Iterator[str]:
    """Note crowd regions if they are more than a few of all annotations, or most of a class."""
    every: Counter[int] = Counter()
    crowds: Counter[int] = Counter()
    for record in (image.record for image in images):
        every.update(record.labels)
        crowds.update(
            label for label, crowd in zip(record.labels, record.crowd, strict=True) if crowd
        )
    count, total = crowds.total(), every.total()
    mostly = [c for c in classes if 2 * crowds[c.index] > every[c.index]]
    if count > _MANY_CROWDS * total or mostly:
        named = ", ".join(entry.name for entry in mostly[:_LISTED_NAMES])
        yield (
            f"{split}: {count} of {total} annotations are crowd regions (iscrowd: 1)"
            f"{f', mostly {named}' if named else ''}: neither learnt nor judged; {_CROWD_WAY_OUT}"
        )


def _describe(images: list[CheckedImage], classes: list[ClassName]) -> dict[str, Any]:
    """The statistics of one split, for statistics.json."""
    records = [image.record for image in images]
    per_image = [len(record.objects()) for record in records]
    objects = np.array(
        [
            (*box, area, label, record.width, record.height)
            for record in records
            for box, label, area in record.objects()
        ]
    )
    _, _, widths, heights, areas, labels, frame_widths, frame_heights = objects.T
    of_class = np.bincount(labels.astype(np.int64), minlength=len(classes)).tolist()
    images_of = Counter(label for image in images for label in image.classes)
    by_size = np.histogram(areas, bins=(0, *_SIZE_BOUNDS, math.inf))[0].tolist()
    sides = np.sqrt(widths * heights)
    sizes = Counter((record.width, record.height) for record in records)
    common = sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST_SIZES]
    return {
        "images": len(records),
        "images_without_objects": per_image.count(0),
        "objects": len(objects),
        "crowd_regions": sum(sum(record.crowd) for record in records),
        "objects_per_image": {
            "mean": _rounded(len(objects) / len(records)),
            "maximum": max(per_image),
        },
        "classes": {
            entry.name: {"objects": of_class[entry.index], "images": images_of[entry.index]}
            for entry in classes
        },
        "sizes_by_area": dict(zip(("small", "medium", "large"), by_size, strict=True)),
        "box_side_pixels": _quantiles(sides),
        "box_side_of_image": _quantiles(sides / np.sqrt(frame_widths * frame_heights)),
        "box_width_to_height": _quantiles(widths / heights),
        "image_width_to_height": _quantiles(np.array([r.width / r.height for r in records])),
        "image_sizes": {
            "distinct": len(sizes),
            "most_common": [
                {"width": width, "height": height, "images": count}
                for (width, height), count in common
            ],
        },
        **_colour(images),
    }


def _colour(images: list[CheckedImage]) -> dict[str, list[float]]:
    """Mean and standard deviation of the pixels in each channel, 0..1, from exact sums."""
    pixels = sum(image.record.width * image.record.height for image in images)
    # Python's integers: a difference of two large floats would not be exact.
    sums, squares = np.sum([image.sums for image in images], axis=0).tolist()
    variances = [
        (pixels * q - s * s) / (pixels * pixels) / 255**2
        for s, q in zip(sums, squares, strict=True)
    ]
    return {
        "pixel_mean": [_rounded(s / pixels / 255) for s in sums],
        "pixel_std": [_rounded(math.sqrt(variance)) for variance in variances],
    }


def _quantiles(values: NDArray[np.float64]) -> dict[str, float]:
    return {
        f"{round(100 * q)}%": _rounded(value)
        for q, value in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True)
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def choose_val(
    classes_of: Mapping[int, frozenset[int]], val_fraction: float, seed: int
) -> frozenset[int]:
    """Choose the validation images by image id, with every class in train and val.

    Iterative stratification for multi-label data (Sechidis, Tsoumakas, Vlahavas 2011). Hashes of
    seed and image id replace random numbers, so the order of the JSON does not matter.
    A class of two images or more is in both splits, unless other classes of the same few images
    prevent it; then, and if only one image has it, it is in train.

    `classes_of` holds the classes of each image id, none for an image without objects. Of two
    images or more, at least one is chosen and not all.
    """
    order = sorted(classes_of, key=lambda n: hashlib.sha256(f"{seed}:{n}".encode()).digest())
    split = _Stratification(classes_of, order, val_fraction)
    for label in sorted(split.members, key=lambda label: (len(split.members[label]), label)):
        split.assign(label)
    split.assign_empty()
    for label in sorted(split.members):
        split.repair(label)
    split.balance()
    return frozenset(split.val)


class _Stratification:
    """The growing splits. All randomness is in `order`."""

    def __init__(
        self, classes_of: Mapping[int, frozenset[int]], order: list[int], fraction: float
    ) -> None:
        self.classes_of, self.order, self.fraction = classes_of, order, fraction
        self.wanted = min(max(1, round(fraction * len(order))), len(order) - 1)
        self.val: set[int] = set()
        self.placed: set[int] = set()
        self.held: Counter[int] = Counter()
        """Images of each class in val."""
        self.members: dict[int, list[int]] = defaultdict(list)
        """Images of each class, in `order`."""
        for number in order:
            for label in classes_of[number]:
                self.members[label].append(number)

    def put(self, number: int, in_val: bool) -> None:
        self.placed.add(number)
        if in_val != (number in self.val):
            self.val ^= {number}
            count = self.held.update if in_val else self.held.subtract
            count(self.classes_of[number])

    def assign(self, label: int) -> None:
        """Assign the images of a class that no rarer class has assigned."""
        count = len(self.members[label])
        quota = min(max(1, round(self.fraction * count)), count - 1)
        for number in self.members[label]:
            if number not in self.placed:
                self.put(number, self.held[label] < quota)

    def assign_empty(self) -> None:
        """Fill val up to its size with images without objects."""
        for number in self.order:
            if not self.classes_of[number]:
                self.put(number, len(self.val) < self.wanted)

    def repair(self, label: int) -> None:
        """Move an image of a class that is in one split only, if other classes allow it."""
        held, count = self.held[label], len(self.members[label])
        if count < 2 or 0 < held < count:
            return
        for number in self.members[label]:
            to_val = held == 0
            if self._allowed(number, to_val, slack=False):
                self.put(number, to_val)
                return
        if held:  # a class that is never evaluated is better than one that is never trained
            self.put(self.members[label][0], in_val=False)

    def balance(self) -> None:
        """Move images until val has its size, as long as every class keeps its share."""
        for number in self.order:
            if len(self.val) == self.wanted:
                return
            to_val = len(self.val) < self.wanted
            if (number in self.val) != to_val and self._allowed(number, to_val, slack=True):
                self.put(number, to_val)

    def _allowed(self, number: int, to_val: bool, slack: bool) -> bool:
        """True if a move keeps each class in both splits (slack: and its share about right)."""
        for label in self.classes_of[number]:
            count = len(self.members[label])
            share = self.fraction * count if slack else 0.0
            after = self.held[label] + (1 if to_val else -1)
            most = min(count - 1, math.ceil(share) if slack else count)
            fits = after <= most if to_val else after >= max(1, math.floor(share))
            if not fits:
                return False
        return True
