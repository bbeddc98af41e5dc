"""Numbers about a checked data set, for choosing sizes and queries: prepared/statistics.json."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from runkey.data.index import ClassName, Record

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_MOST_SIZES = 20
# COCO's bounds of small, medium and large, in squared pixels.
SMALL_AREA = 32.0**2
MEDIUM_AREA = 96.0**2


def describe(
    records: list[Record], classes: list[ClassName], mean: list[float], std: list[float]
) -> dict[str, Any]:
    """The statistics of one split.

    Args:
        records: its images.
        classes: all classes.
        mean: of the pixels, for each channel of RGB, 0..1.
        std: of the pixels, for each channel of RGB, 0..1.
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
    showing = Counter(label for record in records for label in shown_classes(record))
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
            entry.name: {"objects": labels[entry.index], "images": showing[entry.index]}
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
                {"width": width, "height": height, "images": number}
                for (width, height), number in common
            ],
        },
        "pixel_mean": [_rounded(value) for value in mean],
        "pixel_std": [_rounded(value) for value in std],
    }


def shown_classes(record: Record) -> frozenset[int]:
    """Classes of an image's objects, crowd regions left aside."""
    pairs = zip(record.labels, record.crowd, strict=True)
    return frozenset(label for label, crowd in pairs if not crowd)


def write_statistics(path: Path, splits: dict[str, dict[str, Any]]) -> None:
    """Write statistics.json: the same data give the same bytes."""
    text = json.dumps(splits, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _quantiles(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float] | None:
    if values.size == 0:
        return None
    return {
        f"{round(100 * q)}%": _rounded(value)
        for q, value in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True)
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
