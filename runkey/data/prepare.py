"""The prepare stage's work: check a COCO folder, split it if need be, write what training reads.

    prepared/   classes.json  train.json  val.json  images.json  statistics.json  report.json
                cache_train.npy  cache_train.json  cache_val.npy  cache_val.json   (where they pay)

The originals are neither copied nor touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runkey.data.cache import Scratch, cache_bytes, write_cache
from runkey.data.check_boxes import check_units, make_record
from runkey.data.check_images import ScanSettings, check_scan, scan_images
from runkey.data.checks import Item, check_ids
from runkey.data.coco import merge_classes, read_coco
from runkey.data.image_list import IMAGE_LIST, write_image_list
from runkey.data.index import ClassName, Record, Split, write_classes, write_index
from runkey.data.layout import Source, find_sources
from runkey.data.report import Finding, Findings, Report
from runkey.data.split import choose_val
from runkey.data.statistics import describe, shown_classes, write_statistics
from runkey.errors import DataError
from runkey.params import Data

Say = Callable[[str], None]

_SPLITS: tuple[Split, Split] = ("train", "val")
_REPORT = "report.json"
_OUTPUTS = (
    *("classes.json", "train.json", "val.json", IMAGE_LIST, "statistics.json", _REPORT),
    *("cache_train.npy", "cache_train.json", "cache_val.npy", "cache_val.json"),
)
_LISTED_NAMES = 10


@dataclass(frozen=True, slots=True)
class _Image:
    """A checked image on its way into a split."""

    record: Record
    source: Source
    digest: bytes
    sums: tuple[tuple[int, ...], tuple[int, ...]]
    number: int | None
    """Its number in the scratch file, where pixels are kept."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What all steps share."""

    data: Data
    seed: int
    folder: Path
    out: Path
    shown_report: str
    findings: Findings
    scratch: Scratch
    say: Say


def prepare(data: Data, seed: int, root: Path, out: Path, num_queries: int, say: Say) -> Report:
    """Check the data set and write the outputs named above.

    Args:
        data: the `data` section of the parameters.
        seed: decides which images are held out, where the data set has one JSON.
        root: what `data.path` is relative to.
        out: folder for the outputs (prepared/); earlier outputs of the same names are replaced.
        num_queries: the model's; images with more objects are noted.
        say: takes what was found and the table of findings, a line at a time.

    Returns:
        What was found and done; it is in report.json too.

    Raises:
        DataError: the data set has a fault whose policy is `fail`, or cannot be used at all.  All
            of it is checked first, and report.json lists every fault.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in _OUTPUTS:
        (out / name).unlink(missing_ok=True)
    shown = out.relative_to(root) if out.is_relative_to(root) else out
    findings = Findings(data.checks)
    scratch = Scratch(out / "scratch.tmp")
    report_path = (shown / _REPORT).as_posix()
    job = _Job(data, seed, root / data.path, out, report_path, findings, scratch, say)
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
        job.findings.stop_if_failed(job.shown_report)  # without sound classes all else is noise
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
    """Open every file, hold it against the JSON, then its boxes against the image."""
    data = job.data
    sizes = [(item.image.width, item.image.height) for item in items]
    # Both splits share this pass where there is one JSON; each then has its own limit.
    share = 1.0 if source.split != "all" else max(data.val_fraction, 1 - data.val_fraction)
    pays = cache_bytes(sizes, data.short_sides, data.long_side) * share <= _limit_bytes(data)
    settings = ScanSettings(
        max_pixels=data.max_megapixels * 1e6,
        turn=data.checks.exif_rotation == "fix",
        cache=(data.short_sides, data.long_side) if pays else None,
    )
    labels = {entry.id: entry.index for entry in classes}
    name = "data" if source.split == "all" else source.split
    for item, scan in scan_images(source.data, items, settings, name):
        frame = check_scan(item, scan, source.show(item.file), job.findings)
        if frame is None:
            continue
        record = make_record(item, frame, source.shown_json, labels, job.findings)
        number = None if scan.pixels is None else job.scratch.append(scan.pixels)
        yield _Image(record, source, scan.digest, scan.sums, number)


def _without_leaks(train: list[_Image], val: list[_Image], findings: Findings) -> list[_Image]:
    """Train without the images that val has too, by name or by content."""
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
    """Train and val of a data set with one JSON.  Copies of an image stay on one side."""
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
        number: frozenset().union(*(shown_classes(image.record) for image in group))
        for number, group in groups.items()
    }
    held = choose_val(classes_of, job.data.val_fraction, job.seed)
    train = [image for number, group in groups.items() if number not in held for image in group]
    val = [image for number, group in groups.items() if number in held for image in group]
    return train, val


def _refuse_empty(images: list[_Image], split: Split, source: Source, report: str) -> None:
    way = f"add annotated images or see what was left out in {report}"
    if not images:
        raise DataError(f"{source.shown_json}: no image is left for {split}; {way}")
    if not any(shown_classes(image.record) for image in images):
        raise DataError(f"{source.shown_json}: no image for {split} has an object; {way}")


def _write(
    job: _Job, splits: dict[Split, list[_Image]], classes: list[ClassName], num_queries: int
) -> Report:
    write_classes(job.out / "classes.json", classes)
    statistics: dict[str, dict[str, Any]] = {}
    kept: dict[str, dict[str, int]] = {}
    for split, images in splits.items():
        records = [image.record for image in images]
        write_index(job.out / f"{split}.json", records)
        statistics[split] = numbers = describe(records, classes, *_colour(images))
        kept[split] = {key: numbers[key] for key in ("images", "objects", "crowd_regions")}
        cached = _write_cache(job, split, images)
        job.say(
            f"{split}: {len(records)} images, {numbers['images_without_objects']} without objects; "
            f"{numbers['objects']} objects, {numbers['crowd_regions']} crowd regions; {cached}"
        )
    listed = {s: [(i.record, i.digest) for i in images] for s, images in splits.items()}
    write_image_list(job.out / IMAGE_LIST, listed, classes)
    write_statistics(job.out / "statistics.json", statistics)
    notes = _notes(splits, classes, num_queries)
    report = Report(True, tuple(job.findings.items), kept, notes)
    for line in report.lines():
        job.say(line)
    return report


def _write_cache(job: _Job, split: Split, images: list[_Image]) -> str:
    numbers = [image.number for image in images if image.number is not None]
    size = job.scratch.bytes_of(numbers)
    if len(numbers) < len(images) or size > _limit_bytes(job.data):
        return f"not cached, as it would take more than data.cache_gib: {job.data.cache_gib:g}"
    write_cache(job.out, split, job.scratch.read(numbers))
    return f"{size / 2**20:.1f} MiB cached"


def _colour(images: list[_Image]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels for each channel, 0..1, from exact sums."""
    pixels = sum(image.record.width * image.record.height for image in images)
    sums = [sum(image.sums[0][c] for image in images) for c in range(3)]
    squares = [sum(image.sums[1][c] for image in images) for c in range(3)]
    mean = [s / pixels / 255 for s in sums]
    # In integers up to the division: the difference of two large floats would not be exact.
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
        shown = frozenset().union(*(shown_classes(image.record) for image in images))
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
    """The index does not depend on the order of the JSON."""
    return sorted(images, key=lambda image: image.record.id)


def _limit_bytes(data: Data) -> float:
    return data.cache_gib * 2**30
