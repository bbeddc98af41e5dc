"""Check a COCO folder, split it if it has one JSON, and write what training reads.

    prepared/   classes.json  train.json  val.json  images.json  statistics.json  report.json
                cache_train.npy  cache_train.json  cache_val.npy  cache_val.json   (if they fit)

The data folder is only read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.data.cache import Place, Scratch, cached_size, write_cache
from runkey.data.checks import SourceChecks
from runkey.data.coco import Coco, merge_classes, read_coco
from runkey.data.index import (
    IMAGE_LIST,
    ClassName,
    ImageRecord,
    SplitName,
    write_classes,
    write_image_list,
    write_index,
)
from runkey.data.layout import Source, find_sources
from runkey.data.report import Findings
from runkey.errors import DataError
from runkey.params import Data
from runkey.units import GIB, MIB

logger = logging.getLogger(__name__)

_REPORT = "report.json"
_OUTPUTS = (
    *("classes.json", "train.json", "val.json", IMAGE_LIST, "statistics.json", _REPORT),
    *("cache_train.npy", "cache_train.json", "cache_val.npy", "cache_val.json"),
)
_LISTED_NAMES = 10
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_MOST_SIZES = 20
# COCO's bounds of small, medium and large, square pixels.
_SMALL_AREA = 32.0**2
_MEDIUM_AREA = 96.0**2


@dataclass(frozen=True, slots=True)
class _Image:
    """A checked image on its way into a split."""

    record: ImageRecord
    source: Source
    digest: bytes
    sums: NDArray[np.int64]
    place: Place | None
    """Of its pixels in the scratch file; None: it is not cached."""

    @property
    def classes(self) -> frozenset[int]:
        """Of its objects, without crowd regions."""
        return frozenset(label for _, label, _ in self.record.objects())


def prepare(data: Data, seed: int, root: Path, out: Path, num_queries: int) -> Findings:
    """Check the data set, write the outputs and log the report.

    Args:
        data: section `data` of the parameters.
        seed: chooses the validation images if the data set has one JSON.
        root: the folder that `data.path` is relative to.
        out: folder for the outputs (prepared/); earlier outputs are replaced.
        num_queries: the model's; images with more objects are reported.

    Returns:
        The faults and what was done, as in report.json.

    Raises:
        DataError: the data set has a fault whose policy is `fail`, or cannot be used at all. All
            checks run first, and report.json lists every fault.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in _OUTPUTS:
        (out / name).unlink(missing_ok=True)
    findings = Findings(data.checks)
    scratch = Scratch(out / "scratch.tmp")
    shown = (out.relative_to(root) if out.is_relative_to(root) else out) / _REPORT
    try:
        preparation = _Preparation(data, out, findings, scratch, shown.as_posix())
        preparation.run(find_sources(root / data.path, data.path.rstrip("/")), seed, num_queries)
    except DataError as error:
        if not findings.failures:
            findings.refuse(data.path, str(error), "stopped")
        findings.write(out / _REPORT)
        raise
    finally:
        scratch.close()
    findings.write(out / _REPORT)
    return findings


@dataclass(frozen=True, slots=True)
class _Preparation:
    data: Data
    out: Path
    findings: Findings
    scratch: Scratch
    report: str
    """Name of report.json in messages."""

    def run(self, sources: list[Source], seed: int, num_queries: int) -> None:
        """Check, split and write the data of one or two JSON files."""
        read = [(source, read_coco(source, self.findings)) for source in sources]
        categories = [(source.shown_json, coco.categories) for source, coco in read]
        classes = merge_classes(categories, self.findings)
        if any(item.kind == "structure" for item in self.findings.items):
            self.findings.stop_if_failed(self.report)  # other checks need the classes
        parts = [list(self._check(source, coco, classes)) for source, coco in read]
        if len(parts) == 2:
            parts[0] = self._without_leaks(*parts)
        self.findings.stop_if_failed(self.report)
        train, val = parts if len(parts) == 2 else self._split(parts[0], sources[0], seed)
        splits: dict[SplitName, list[_Image]] = {"train": train, "val": val}
        for (split, images), source in zip(splits.items(), (sources[0], sources[-1]), strict=True):
            # Sorted, so that the index does not depend on the order of the JSON.
            images.sort(key=lambda image: image.record.id)
            self._refuse_empty(split, images, source)
        self._write(splits, classes)
        self.findings.notes += _notes(splits, classes, num_queries)
        for line in self.findings.lines():
            logger.info(line)

    def _check(self, source: Source, coco: Coco, classes: list[ClassName]) -> Iterator[_Image]:
        data = self.data
        checks = SourceChecks(source, data, classes, self.findings)
        images = checks.listed_images(coco)
        # One JSON holds both splits; the limit applies to each.
        share = 1.0 if source.split != "all" else max(data.val_fraction, 1 - data.val_fraction)
        sizes = (cached_size(i.width, i.height, data.short_sides, data.long_side) for i in images)
        size = sum(width * height * 3 for width, height in sizes) * share
        for record, scan in checks.check_files(images, cached=size <= data.cache_gib * GIB):
            place = None if scan.pixels is None else self.scratch.append(scan.pixels)
            yield _Image(record, source, scan.digest, scan.sums, place)

    def _without_leaks(self, train: list[_Image], val: list[_Image]) -> list[_Image]:
        """Train without the images that are also in val, by name or by content."""
        held: dict[str | bytes, _Image] = {}
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
                image.source.shown_json,
                f"image {image.record.id} ({image.record.file}) is image {twin.record.id} "
                f"({twin.record.file}) of {twin.source.shown_json} too",
                image_id=image.record.id,
                dropped="left out of train",
            )
        return kept

    def _split(self, images: list[_Image], source: Source, seed: int) -> list[list[_Image]]:
        """Split a data set with one JSON. Copies of an image stay in the same split."""
        twins: dict[bytes, list[_Image]] = {}
        for image in images:
            twins.setdefault(image.digest, []).append(image)
        if len(twins) < 2:
            raise DataError(
                f"{source.shown_json}: train and val need an image each, but only {len(twins)} "
                f"(not counting copies) passed the checks; add images or see {self.report}"
            )
        groups = {min(image.record.id for image in group): group for group in twins.values()}
        classes_of = {
            first: frozenset().union(*(image.classes for image in group))
            for first, group in groups.items()
        }
        held = choose_val(classes_of, self.data.val_fraction, seed)
        parts: list[list[_Image]] = [[], []]
        for first, group in groups.items():
            parts[first in held] += group
        return parts

    def _refuse_empty(self, split: SplitName, images: list[_Image], source: Source) -> None:
        way = f"add annotated images or see what was left out in {self.report}"
        if not images:
            raise DataError(f"{source.shown_json}: no image is left for {split}; {way}")
        if not any(image.classes for image in images):
            raise DataError(f"{source.shown_json}: no image for {split} has an object; {way}")

    def _write(self, splits: dict[SplitName, list[_Image]], classes: list[ClassName]) -> None:
        write_classes(self.out / "classes.json", classes)
        statistics: dict[SplitName, dict[str, Any]] = {}
        for split, images in splits.items():
            write_index(self.out / f"{split}.json", [image.record for image in images])
            statistics[split] = numbers = _describe(images, classes)
            cached = self._write_cache(split, images)
            logger.info(
                f"{split}: {len(images)} images, {numbers['images_without_objects']} without "
                f"objects; {numbers['objects']} objects, {numbers['crowd_regions']} crowd regions; "
                f"{cached}"
            )
        listed = {s: [(i.record, i.digest) for i in images] for s, images in splits.items()}
        write_image_list(self.out / IMAGE_LIST, listed, classes)
        text = json.dumps(statistics, indent=2, ensure_ascii=False)
        (self.out / "statistics.json").write_text(text + "\n", encoding="utf-8")
        for split, numbers in statistics.items():
            counted = ("images", "objects", "crowd_regions")
            self.findings.kept[split] = {name: numbers[name] for name in counted}

    def _write_cache(self, split: SplitName, images: list[_Image]) -> str:
        places = [image.place for image in images if image.place is not None]
        size = sum(height * width * 3 for _, height, width in places)
        if len(places) < len(images) or size > self.data.cache_gib * GIB:
            limit = f"data.cache_gib: {self.data.cache_gib:g}"
            return f"not cached, as it would take more than {limit}"
        write_cache(self.out, split, self.scratch.read(places))
        return f"{size / MIB:.1f} MiB cached"


def _notes(
    splits: dict[SplitName, list[_Image]], classes: list[ClassName], num_queries: int
) -> Iterator[str]:
    for split, images in splits.items():
        shown = frozenset().union(*(image.classes for image in images))
        absent = [entry.name for entry in classes if entry.index not in shown]
        if absent:
            names = ", ".join(absent[:_LISTED_NAMES])
            rest = f" and {len(absent) - _LISTED_NAMES} more" if len(absent) > _LISTED_NAMES else ""
            yield f"{split} has no object of {len(absent)} classes: {names}{rest}"
        counts = [(len(image.record.objects()), image.record) for image in images]
        crowded = [(count, record) for count, record in counts if count > num_queries]
        if crowded:
            most, record = max(crowded, key=lambda pair: (pair[0], -pair[1].id))
            yield (
                f"{split}: {len(crowded)} image(s) have more objects than model.num_queries "
                f"({num_queries}), at most {most} in image {record.id} ({record.file}); the rest "
                "cannot be found"
            )


def _describe(images: list[_Image], classes: list[ClassName]) -> dict[str, Any]:
    """The statistics of one split, for statistics.json."""
    records = [image.record for image in images]
    objects = [
        (box, label, area, record) for record in records for box, label, area in record.objects()
    ]
    per_image = [len(record.objects()) for record in records]
    labels = Counter(label for _, label, _, _ in objects)
    images_of = Counter(label for image in images for label in image.classes)
    areas = np.array([area for _, _, area, _ in objects], dtype=np.float64)
    boxes = np.array([box for box, _, _, _ in objects], dtype=np.float64).reshape(-1, 4)
    frames = np.array([(r.width, r.height) for _, _, _, r in objects], dtype=np.float64)
    sides = np.sqrt(boxes[:, 2] * boxes[:, 3])
    sizes = Counter((record.width, record.height) for record in records)
    mean, std = _colour(images)
    common = sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST_SIZES]
    return {
        "images": len(records),
        "images_without_objects": per_image.count(0),
        "objects": len(objects),
        "crowd_regions": sum(sum(record.crowd) for record in records),
        "objects_per_image": {
            "mean": _rounded(len(objects) / max(1, len(records))),
            "maximum": max(per_image, default=0),
        },
        "classes": {
            entry.name: {"objects": labels[entry.index], "images": images_of[entry.index]}
            for entry in classes
        },
        "sizes_by_area": {
            "small": int((areas < _SMALL_AREA).sum()),
            "medium": int(((areas >= _SMALL_AREA) & (areas < _MEDIUM_AREA)).sum()),
            "large": int((areas >= _MEDIUM_AREA).sum()),
        },
        "box_side_pixels": _quantiles(sides),
        "box_side_of_image": _quantiles(sides / np.sqrt(frames.reshape(-1, 2).prod(axis=1))),
        "box_width_to_height": _quantiles(boxes[:, 2] / boxes[:, 3]),
        "image_width_to_height": _quantiles(np.array([r.width / r.height for r in records])),
        "image_sizes": {
            "distinct": len(sizes),
            "most_common": [
                {"width": width, "height": height, "images": count}
                for (width, height), count in common
            ],
        },
        "pixel_mean": [_rounded(value) for value in mean],
        "pixel_std": [_rounded(value) for value in std],
    }


def _colour(images: list[_Image]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels in each channel, 0..1, from exact sums."""
    pixels = sum(image.record.width * image.record.height for image in images)
    # Python's integers: a difference of two large floats would not be exact.
    sums, squares = np.sum([image.sums for image in images], axis=0).tolist()
    mean = [s / pixels / 255 for s in sums]
    var = [
        (pixels * q - s * s) / (pixels * pixels) / 255**2
        for s, q in zip(sums, squares, strict=True)
    ]
    return mean, [math.sqrt(v) for v in var]


def _quantiles(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float] | None:
    if values.size == 0:
        return None
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

    Args:
        classes_of: image id -> its classes (empty for an image without objects).
        val_fraction: fraction of validation images, 0..1.
        seed: another seed chooses other images.

    Returns:
        Ids of the val images; of two images or more at least one and not all.
    """
    order = sorted(classes_of, key=lambda n: hashlib.sha256(f"{seed}:{n}".encode()).digest())
    split = _Stratification(classes_of, order, val_fraction)
    for label in sorted(split.total, key=lambda label: (split.total[label], label)):
        split.assign(label)
    split.assign_empty()
    for label in sorted(split.total):
        split.repair(label)
    split.balance()
    return frozenset(split.val)


class _Stratification:
    """The growing splits. All randomness is in `order`."""

    def __init__(
        self, classes_of: Mapping[int, frozenset[int]], order: list[int], fraction: float
    ) -> None:
        self.classes_of = classes_of
        self.order = order
        self.fraction = fraction
        self.total = Counter(label for labels in classes_of.values() for label in labels)
        self.val: set[int] = set()
        self.placed: set[int] = set()
        self.held: Counter[int] = Counter()
        """Images of each class in val."""
        self.members: dict[int, list[int]] = {label: [] for label in self.total}
        """Images of each class, in `order`."""
        for number in order:
            for label in classes_of[number]:
                self.members[label].append(number)
        self.wanted = min(max(1, round(fraction * len(order))), len(order) - 1)

    def put(self, number: int, in_val: bool) -> None:
        self.placed.add(number)
        if in_val != (number in self.val):
            self.val ^= {number}
            count = self.held.update if in_val else self.held.subtract
            count(self.classes_of[number])

    def assign(self, label: int) -> None:
        """Assign the images of a class that no rarer class has assigned."""
        count = self.total[label]
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
        held = self.held[label]
        if self.total[label] < 2 or 0 < held < self.total[label]:
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
            share = self.fraction * self.total[label]
            after = self.held[label] + (1 if to_val else -1)
            least, most = (math.floor(share), math.ceil(share)) if slack else (0, math.inf)
            stays = self.total[label] - after >= 1 if to_val else after >= 1
            if not stays or not (after <= most if to_val else after >= least):
                return False
        return True
