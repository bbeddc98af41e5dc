"""Check a COCO folder, split it if it has one JSON, and write what training reads.

    prepared/   classes.json  train.json  val.json  images.json  statistics.json  report.json
                cache_train.npy  cache_train.json  cache_val.npy  cache_val.json   (if they fit)

The data folder is only read.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runkey.data.cache import Scratch, cache_bytes, write_cache
from runkey.data.checks import (
    Item,
    ScanSettings,
    check_ids,
    check_scan,
    check_units,
    make_record,
    scan_images,
)
from runkey.data.coco import merge_classes, read_coco
from runkey.data.index import (
    IMAGE_LIST,
    ClassName,
    Record,
    Split,
    write_classes,
    write_image_list,
    write_index,
)
from runkey.data.layout import Source, find_sources
from runkey.data.report import Finding, Findings, Report
from runkey.data.split import choose_val
from runkey.errors import DataError
from runkey.params import Data
from runkey.units import GIB, MIB

logger = logging.getLogger(__name__)

_SPLITS: tuple[Split, Split] = ("train", "val")
_REPORT = "report.json"
_OUTPUTS = (
    *("classes.json", "train.json", "val.json", IMAGE_LIST, "statistics.json", _REPORT),
    *("cache_train.npy", "cache_train.json", "cache_val.npy", "cache_val.json"),
)
_LISTED_NAMES = 10
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_MOST_SIZES = 20
# COCO's bounds of small, medium and large, square pixels.
SMALL_AREA = 32.0**2
MEDIUM_AREA = 96.0**2


@dataclass(frozen=True, slots=True)
class _Image:
    """A checked image on its way into a split."""

    record: Record
    source: Source
    digest: bytes
    sums: tuple[tuple[int, ...], tuple[int, ...]]
    pixels: int | None
    """Index of its pixels in the scratch file; None: it is not cached."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What all steps need."""

    data: Data
    seed: int
    folder: Path
    out: Path
    shown_report: str
    findings: Findings
    scratch: Scratch


def prepare(data: Data, seed: int, root: Path, out: Path, num_queries: int) -> Report:
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
    shown = out.relative_to(root) if out.is_relative_to(root) else out
    findings = Findings(data.checks)
    scratch = Scratch(out / "scratch.tmp")
    report_path = (shown / _REPORT).as_posix()
    job = _Job(data, seed, root / data.path, out, report_path, findings, scratch)
    try:
        report = _prepare(job, num_queries)
    except DataError as error:
        items = list(findings.items)
        if not any(item.policy == "fail" for item in items):
            items.append(Finding("structure", "fail", data.path, None, None, str(error), "stopped"))
        Report(False, tuple(items), {}, ()).write(out / _REPORT)
        raise
    finally:
        scratch.close()
    report.write(out / _REPORT)
    return report


def _prepare(job: _Job, num_queries: int) -> Report:
    sources = find_sources(job.folder, job.data.path.rstrip("/"))
    read = [(source, read_coco(source, job.findings)) for source in sources]
    classes = merge_classes(
        [(source.shown_json, coco.categories) for source, coco in read], job.findings
    )
    if any(item.kind == "structure" for item in job.findings.items):
        job.findings.stop_if_failed(job.shown_report)  # other checks need the classes
    parts: list[list[_Image]] = []
    for source, coco in read:
        items = check_ids(coco, source, classes, job.findings)
        check_units(items, source, job.findings)
        parts.append(list(_check_images(job, source, items, classes)))
    if len(parts) == 2:
        parts[0] = _without_leaks(parts[0], parts[1], job.findings)
    job.findings.stop_if_failed(job.shown_report)
    train, val = parts if len(parts) == 2 else _split(job, parts[0], sources[0])
    splits: dict[Split, list[_Image]] = {"train": _by_id(train), "val": _by_id(val)}
    for name, source in zip(_SPLITS, (sources[0], sources[-1]), strict=True):
        _refuse_empty(splits[name], name, source, job.shown_report)
    return _write(job, splits, classes, num_queries)


def _check_images(
    job: _Job, source: Source, items: list[Item], classes: list[ClassName]
) -> Iterator[_Image]:
    """Check every file against the JSON, then its boxes against the image."""
    data = job.data
    sizes = [(item.image.width, item.image.height) for item in items]
    # One JSON holds both splits; the limit applies to each.
    share = 1.0 if source.split != "all" else max(data.val_fraction, 1 - data.val_fraction)
    fits = cache_bytes(sizes, data.short_sides, data.long_side) * share <= data.cache_gib * GIB
    settings = ScanSettings(
        max_pixels=data.max_megapixels * 1e6,
        turn=data.checks.exif_rotation == "fix",
        cache=(data.short_sides, data.long_side) if fits else None,
    )
    labels = {entry.id: entry.index for entry in classes}
    name = "data" if source.split == "all" else source.split
    for item, scan in scan_images(source.data, items, settings, name):
        frame = check_scan(item, scan, source.show(item.file), job.findings)
        if frame is None:
            continue
        record = make_record(item, frame, source.shown_json, labels, job.findings)
        pixels = None if scan.pixels is None else job.scratch.append(scan.pixels)
        yield _Image(record, source, scan.digest, scan.sums, pixels)


def _without_leaks(train: list[_Image], val: list[_Image], findings: Findings) -> list[_Image]:
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
        what = (
            f"image {image.record.id} ({image.record.file}) is image {twin.record.id} "
            f"({twin.record.file}) of {twin.source.shown_json} too"
        )
        findings.add(
            "leaked_image",
            image.source.shown_json,
            what,
            image_id=image.record.id,
            dropped="left out of train",
        )
    return kept


def _split(job: _Job, images: list[_Image], source: Source) -> tuple[list[_Image], list[_Image]]:
    """Split a data set with one JSON. Copies of an image stay in the same split."""
    twins: dict[bytes, list[_Image]] = {}
    for image in images:
        twins.setdefault(image.digest, []).append(image)
    if len(twins) < 2:
        raise DataError(
            f"{source.shown_json}: train and val need an image each, but only {len(twins)} (not "
            f"counting copies) passed the checks; add images or see {job.shown_report}"
        )
    groups = {min(image.record.id for image in group): group for group in twins.values()}
    classes_of = {
        image_id: frozenset().union(*(object_classes(image.record) for image in group))
        for image_id, group in groups.items()
    }
    held = choose_val(classes_of, job.data.val_fraction, job.seed)
    train = [image for first, group in groups.items() if first not in held for image in group]
    val = [image for first, group in groups.items() if first in held for image in group]
    return train, val


def _refuse_empty(images: list[_Image], split: Split, source: Source, report: str) -> None:
    way = f"add annotated images or see what was left out in {report}"
    if not images:
        raise DataError(f"{source.shown_json}: no image is left for {split}; {way}")
    if not any(object_classes(image.record) for image in images):
        raise DataError(f"{source.shown_json}: no image for {split} has an object; {way}")


def _write(
    job: _Job, splits: dict[Split, list[_Image]], classes: list[ClassName], num_queries: int
) -> Report:
    write_classes(job.out / "classes.json", classes)
    statistics: dict[Split, dict[str, Any]] = {}
    kept: dict[str, dict[str, int]] = {}
    for split, images in splits.items():
        records = [image.record for image in images]
        write_index(job.out / f"{split}.json", records)
        statistics[split] = numbers = describe(records, classes, *_colour(images))
        kept[split] = {key: numbers[key] for key in ("images", "objects", "crowd_regions")}
        cached = _write_cache(job, split, images)
        logger.info(
            f"{split}: {len(records)} images, {numbers['images_without_objects']} without objects; "
            f"{numbers['objects']} objects, {numbers['crowd_regions']} crowd regions; {cached}"
        )
    listed = {s: [(i.record, i.digest) for i in images] for s, images in splits.items()}
    write_image_list(job.out / IMAGE_LIST, listed, classes)
    text = json.dumps(statistics, indent=2, ensure_ascii=False)
    (job.out / "statistics.json").write_text(text + "\n", encoding="utf-8")
    notes = _notes(splits, classes, num_queries)
    report = Report(True, tuple(job.findings.items), kept, notes)
    for line in report.lines():
        logger.info(line)
    return report


def _write_cache(job: _Job, split: Split, images: list[_Image]) -> str:
    indices = [image.pixels for image in images if image.pixels is not None]
    size = job.scratch.bytes_of(indices)
    if len(indices) < len(images) or size > job.data.cache_gib * GIB:
        return f"not cached, as it would take more than data.cache_gib: {job.data.cache_gib:g}"
    write_cache(job.out, split, job.scratch.read(indices))
    return f"{size / MIB:.1f} MiB cached"


def _colour(images: list[_Image]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels in each channel, 0..1, from exact sums."""
    pixels = sum(image.record.width * image.record.height for image in images)
    sums = [sum(image.sums[0][c] for image in images) for c in range(3)]
    squares = [sum(image.sums[1][c] for image in images) for c in range(3)]
    mean = [s / pixels / 255 for s in sums]
    # Integers up to the division: a difference of two large floats would not be exact.
    var = [
        (pixels * q - s * s) / (pixels * pixels) / 255**2
        for s, q in zip(sums, squares, strict=True)
    ]
    return mean, [math.sqrt(v) for v in var]


def _notes(
    splits: dict[Split, list[_Image]], classes: list[ClassName], num_queries: int
) -> tuple[str, ...]:
    notes = []
    for split, images in splits.items():
        shown = frozenset().union(*(object_classes(image.record) for image in images))
        absent = [entry.name for entry in classes if entry.index not in shown]
        if absent:
            names = ", ".join(absent[:_LISTED_NAMES])
            rest = f" and {len(absent) - _LISTED_NAMES} more" if len(absent) > _LISTED_NAMES else ""
            notes.append(f"{split} has no object of {len(absent)} classes: {names}{rest}")
        counts = [(image.record.crowd.count(False), image.record) for image in images]
        crowded = [(count, record) for count, record in counts if count > num_queries]
        if crowded:
            most, record = max(crowded, key=lambda pair: (pair[0], -pair[1].id))
            notes.append(
                f"{split}: {len(crowded)} image(s) have more objects than model.num_queries "
                f"({num_queries}), at most {most} in image {record.id} ({record.file}); the rest "
                "cannot be found"
            )
    return tuple(notes)


def _by_id(images: list[_Image]) -> list[_Image]:
    """Sort by id, so that the index does not depend on the order of the JSON."""
    return sorted(images, key=lambda image: image.record.id)


def describe(
    records: list[Record], classes: list[ClassName], mean: list[float], std: list[float]
) -> dict[str, Any]:
    """Compute the statistics of one split, for statistics.json.

    Args:
        records: its images.
        classes: all classes.
        mean: mean of the pixels in each channel of RGB, 0..1.
        std: standard deviation of the pixels in each channel of RGB, 0..1.
    """
    objects = [
        (box, label, area, record)
        for record in records
        for box, label, area, crowd in zip(
            record.boxes_xywh, record.labels, record.areas, record.crowd, strict=True
        )
        if not crowd
    ]
    per_image = [sum(not crowd for crowd in record.crowd) for record in records]
    labels = Counter(label for _, label, _, _ in objects)
    images_of = Counter(label for record in records for label in object_classes(record))
    areas = np.array([area for _, _, area, _ in objects], dtype=np.float64)
    boxes = np.array([box for box, _, _, _ in objects], dtype=np.float64).reshape(-1, 4)
    frames = np.array([(r.width, r.height) for _, _, _, r in objects], dtype=np.float64)
    sides = np.sqrt(boxes[:, 2] * boxes[:, 3])
    sizes = Counter((record.width, record.height) for record in records)
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
            "small": int((areas < SMALL_AREA).sum()),
            "medium": int(((areas >= SMALL_AREA) & (areas < MEDIUM_AREA)).sum()),
            "large": int((areas >= MEDIUM_AREA).sum()),
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


def object_classes(record: Record) -> frozenset[int]:
    """Return the classes of an image's objects, without crowd regions."""
    pairs = zip(record.labels, record.crowd, strict=True)
    return frozenset(label for label, crowd in pairs if not crowd)


def _quantiles(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float] | None:
    if values.size == 0:
        return None
    return {
        f"{round(100 * q)}%": _rounded(value)
        for q, value in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True)
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
