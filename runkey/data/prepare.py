"""Check a COCO folder, split it where it is not, and write what training reads.

prepared/   classes.json  images.json  statistics.json  report.json
            train.safetensors  val.safetensors  (and test, if there is a test split)
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from runkey.data.checks import CheckedImage, SourceChecks
from runkey.data.coco import Coco, Source, find_sources, merge_classes, read_coco
from runkey.data.image_list import IMAGE_LIST, write_image_list
from runkey.data.index import ClassName, SplitName, index_file, write_classes, write_index
from runkey.data.pixel_range import PixelRange
from runkey.data.report import Findings
from runkey.data.split import list_groups, shared_groups, split_images
from runkey.errors import DataError
from runkey.files import write_atomically
from runkey.params import Data
from runkey.units import counted

logger = logging.getLogger(__name__)

_REPORT = "report.json"
_SPLITS: tuple[SplitName, ...] = get_args(SplitName)
_OUTPUTS = (
    *("classes.json", IMAGE_LIST, "statistics.json", _REPORT),
    *(index_file(Path(), split).name for split in _SPLITS),
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
"""In the order train, val, test; without test if there is none."""


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
        sources = find_sources(root / data.path, data.path.rstrip("/"))
        _Preparation(data, out, findings).run(sources, num_queries)
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

    def run(self, sources: list[Source], num_queries: int) -> None:
        """Check, split and write the data of the JSON files."""
        read = [c for source in sources if (c := read_coco(source, self.findings)) is not None]
        classes = merge_classes(read, self.findings)
        if any(item.kind == "structure" for item in self.findings.items):
            self.findings.stop_if_failed()  # other checks need the classes
        labels = {entry.id: entry.index for entry in classes}
        fractions = self._missing(read)
        splits, pixels = Splits(), PixelRange()
        for coco in read:
            split: SplitName = "train" if coco.source.split == "data" else coco.source.split
            checks = SourceChecks(coco, self.data, labels, self.findings, pixels)
            splits[split] = list(checks.accepted_images())
        shown: dict[SplitName, str] = dict.fromkeys(_SPLITS, read[0].source.shown_json)
        shown |= {c.source.split: c.source.shown_json for c in read if c.source.split != "data"}
        self._drop_leaks(splits, shown)
        self.findings.stop_if_failed()
        self._note_shared_groups(splits)
        if fractions:
            self._split(splits, fractions, shown["train"])
        for split in splits:
            self._check_split(split, splits[split], shown[split])
        splits = {split: splits[split] for split in _SPLITS if split in splits}
        self._write(splits, classes)
        self.findings.notes += _notes(splits, classes, num_queries)
        self.findings.notes += pixels.notes(self.data.intensity_range)
        for line in self.findings.lines():
            logger.info(line)

    def _missing(self, read: list[Coco]) -> dict[SplitName, float]:
        """Return the fraction of each split that is wanted and that has no JSON."""
        given = {coco.source.split for coco in read}
        wanted: dict[SplitName, float] = {
            "val": self.data.val_fraction,
            "test": self.data.test_fraction,
        }
        return {split: part for split, part in wanted.items() if part and split not in given}

    def _drop_leaks(self, splits: Splits, shown: dict[SplitName, str]) -> None:
        """Take the images from train and val that are also in test or val, by name or content."""
        held: dict[str | bytes, tuple[CheckedImage, SplitName]] = {}
        for split in reversed(_SPLITS):
            kept = []
            for image in splits.get(split, ()):
                keys = (image.record.file, image.digest)
                twin, of_split = next((held[key] for key in keys if key in held), (None, split))
                if twin is None:
                    kept.append(image)
                    continue
                self.findings.add(
                    "leaked_image",
                    shown[split],
                    f"image {image.record.id} ({image.record.file}) is image {twin.record.id} "
                    f"({twin.record.file}) of {shown[of_split]} too",
                    image_id=image.record.id,
                    dropped=f"left out of {split}",
                )
            for image in kept:
                held[image.record.file] = held[image.digest] = image, split
            if split in splits:
                splits[split] = kept

    def _note_shared_groups(self, splits: Splits) -> None:
        """Note the groups of `data.group_by` that two JSON files share."""
        pattern = self.data.group_by
        if pattern is None or len(splits) < 2:
            return
        names = {split: [image.name for image in images] for split, images in splits.items()}
        if shared := shared_groups(names, pattern):
            self.findings.notes.append(
                f"data.group_by: {counted(len(shared), 'group')} in more than one JSON "
                f"({list_groups(shared)}): AP is too high if their images are alike"
            )

    def _split(self, splits: Splits, fractions: dict[SplitName, float], shown: str) -> None:
        """Split train by `fractions`; the checks have left out copies of an image."""
        images = splits["train"]
        if len(images) <= len(fractions):
            names = " and ".join(["train", *fractions])
            raise DataError(
                f"{shown}: {names} need an image each, but only {len(images)} "
                f"(not counting copies) passed the checks; add images or see {self.findings.report}"
            )
        classes_of = {image.name: image.classes for image in images}
        found = split_images(classes_of, fractions, self.data.split_seed, self.data.group_by)
        self.findings.notes += found.notes
        for split in ("train", *fractions):
            splits[split] = [image for image in images if found.split_of[image.name] == split]

    def _check_split(self, split: SplitName, images: list[CheckedImage], shown: str) -> None:
        """Sort a split by id, whatever the JSON's order; refuse it without images or objects."""
        way = f"add annotated images or see what was left out in {self.findings.report}"
        images.sort(key=lambda image: image.record.id)
        if not images:
            raise DataError(f"{shown}: no image is left for {split}; {way}")
        if not any(image.classes for image in images):
            crowd = sum(len(image.record.crowd) for image in images)
            what = f"all {crowd} annotations for {split} are crowd regions" if crowd else ""
            raise DataError(
                f"{shown}: "
                + (
                    f"{what}, which are not learnt; {_CROWD_WAY_OUT}"
                    if crowd
                    else f"no image for {split} has an object; {way}"
                )
            )

    def _write(self, splits: Splits, classes: list[ClassName]) -> None:
        write_classes(self.out / "classes.json", classes)
        statistics: dict[SplitName, dict[str, Any]] = {}
        for split, images in splits.items():
            write_index(index_file(self.out, split), [image.record for image in images])
            statistics[split] = numbers = _describe(images, classes)
            logger.info(
                f"{split}: {counted(len(images), 'image')}, {numbers['images_without_objects']} "
                f"without objects; {counted(numbers['objects'], 'object')}, "
                f"{counted(numbers['crowd_regions'], 'crowd region')}"
            )
        listed = {s: [(i.record, i.digest) for i in images] for s, images in splits.items()}
        write_image_list(self.out / IMAGE_LIST, listed, classes)
        text = json.dumps(statistics, indent=2, ensure_ascii=False)
        write_atomically(self.out / "statistics.json", text + "\n")
        self.findings.kept |= {
            split: {name: numbers[name] for name in ("images", "objects", "crowd_regions")}
            for split, numbers in statistics.items()
        }


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
