"""Coverage of the 95% intervals of AP: how often they hold the true AP, on made-up detectors.

    python -m benchmarks.intervals [--sets 1000] [--images 40 100 400]

A made-up detector meets made-up images: some images are hard, some are full, and score and IoU of a
detection depend on how hard its object is. Its true AP is that of 120,000 images. Then small sets
are drawn, and an interval is computed from each by `runkey.evaluation.intervals` and, beside it, as
the plain percentiles of the resampled AP. The same for the difference of two detectors of equal AP,
which should be called noise 95 times of 100. `results/intervals.md` is written anew.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runkey.evaluation.intervals import (
    METRICS,
    ClassMatches,
    accumulate,
    bootstrap,
    difference_interval,
)

RESULT = Path(__file__).parent / "results" / "intervals.md"
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
POPULATION = 60_000
FEW = (2, 3, 5, 8, 12, 20)
"""Numbers of images that hold a class, up to which its intervals are counted together."""


@dataclass(frozen=True)
class Detector:
    """A made-up detector on a made-up kind of images."""

    name: str
    objects: tuple[float, ...]
    """Mean number of objects of each class in an image."""
    quality: float
    """Mean log-odds of the IoU with an object."""
    false: float
    """Mean number of false detections of each class in an image."""


DETECTORS = (
    Detector("1 class, 1.15 objects an image", (1.15,), 0.9, 2.0),
    Detector("3 classes, 11.4, 1 and 0.95 objects an image", (11.4, 1.0, 0.95), 1.2, 4.0),
    Detector("10 classes, 0.45 objects an image each", (0.45,) * 10, 1.6, 1.0),
    Detector("20 classes, 2 to 0.1 objects an image", tuple(2 / k for k in range(1, 21)), 1.0, 1.0),
)


@dataclass(frozen=True)
class Images:
    """Objects of I images and what is common to all detectors on them."""

    counts: NDArray[np.int64]
    """[K, I]: objects of each class in each image."""
    hard: NDArray[np.float64]
    """[I]: lowers quality, and raises the number and the scores of false detections."""
    ease: list[NDArray[np.float64]]
    """By class, of each object."""


def draw_images(random: np.random.Generator, count: int, detector: Detector) -> Images:
    """Draw images with their objects."""
    hard = random.normal(0, 0.6, count)
    full = random.gamma(2, 0.5, count)
    counts = np.stack([random.poisson(rate * full) for rate in detector.objects])
    ease = [random.normal(0, 0.8, one.sum()) for one in counts]
    return Images(counts, hard, ease)


def detect(
    random: np.random.Generator, images: Images, detector: Detector
) -> tuple[ClassMatches, ...]:
    """Return the matches of a detector's own detections."""
    matches = []
    for k, objects in enumerate(images.counts):
        of_object = np.repeat(np.arange(len(objects)), objects)
        hard = images.hard[of_object]
        quality = detector.quality + 0.25 * np.sin(3 * k) - hard + images.ease[k]
        quality += random.normal(0, 0.6, len(quality))
        iou = _share(quality + random.normal(0, 0.6, len(quality)))
        false = np.repeat(
            np.arange(len(objects)), random.poisson(detector.false * np.exp(0.5 * images.hard))
        )
        scores = np.concatenate(
            [
                _share(1.5 * quality - 1 + random.normal(0, 0.8, len(quality))),
                _share(random.normal(-3, 1.5, len(false)) + 0.5 * images.hard[false]),
            ]
        )
        where = np.concatenate([of_object, false])
        order = np.lexsort((where, -scores))
        right = np.concatenate([iou, np.zeros(len(false))])[order] >= IOUS[:, None]
        matches.append(
            ClassMatches(where[order], scores[order], right, np.zeros_like(right), objects)
        )
    return tuple(matches)


def _share(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-logit)))


def _ap(matches: tuple[ClassMatches, ...]) -> float:
    """AP of a set as it is."""
    ap, _ = accumulate(matches, np.ones((len(matches[0].objects), 1), np.int32), RECALLS)
    return float(np.nanmean(ap))


@cache
def true_ap(detector: Detector) -> dict[str, NDArray[np.float64]]:
    """Return AP and AP50 of each class, [K], of very many images."""
    random = np.random.default_rng(99)
    found = []
    for _ in range(2):
        matches = detect(random, draw_images(random, POPULATION, detector), detector)
        found.append(accumulate(matches, np.ones((POPULATION, 1), np.int32), RECALLS))
    return {
        name: np.mean([one[metric][:, 0] for one in found], axis=0)
        for metric, name in enumerate(METRICS)
    }


@dataclass
class Coverage:
    """Counts of a detector on sets of one size."""

    detector: Detector
    images: int
    sets: int
    true: dict[str, float]
    seconds: float
    hits: dict[str, list[bool]]
    """By metric and method, and by `class`, number of images."""
    lengths: dict[str, list[float]]
    above: list[bool]
    """Whether the true AP lies below the interval, of the sets whose interval misses it."""


def measure(detector: Detector, images: int, sets: int) -> Coverage:
    """Draw sets of so many images, and count how often the intervals hold what is true."""
    true = true_ap(detector)
    hits, lengths = defaultdict(list), defaultdict(list)
    above = []
    start = time.process_time()
    for number in range(sets):
        random = np.random.default_rng([images, number])
        drawn = draw_images(random, images, detector)
        matches = detect(random, drawn, detector)
        found = bootstrap(matches, RECALLS)
        present = drawn.counts.any(axis=1)
        for name in METRICS:
            expected = float(true[name][present].mean())
            known = np.array([v for v in found.resampled[name] if v is not None])
            low, high = np.quantile(known, [0.025, 0.975])
            hits[f"{name} percentile"].append(bool(low <= expected <= high))
            interval = found.intervals[name]
            assert interval
            hits[name].append(interval.low <= expected <= interval.high)
            lengths[name].append(interval.high - interval.low)
            if name == "AP" and not hits[name][-1]:
                above.append(expected < interval.low)
        for k, intervals in enumerate(found.per_class):
            holding = int((drawn.counts[k] > 0).sum())
            group = next((f"up to {most}" for most in FEW if holding <= most), "more")
            if one := intervals["AP"]:
                hits[f"class {group}"].append(bool(one.low <= true["AP"][k] <= one.high))
        others = detect(random, drawn, detector)
        other = bootstrap(others, RECALLS)
        reach = max(one.deviations["AP"] or 0 for one in (found, other))
        first, second = _ap(matches), _ap(others)
        paired = difference_interval(
            found.resampled["AP"], other.resampled["AP"], second - first, reach
        )
        hits["difference"].append(bool(paired and paired.low <= 0 <= paired.high))
        if paired:
            lengths["difference"].append(paired.high - paired.low)
    spent = (time.process_time() - start) / sets
    means = {name: float(of.mean()) for name, of in true.items()}
    return Coverage(detector, images, sets, means, spent, dict(hits), dict(lengths), above)


def row(one: Coverage) -> str:
    """Format a row of the first table."""
    share = {name: f"{100 * np.mean(hits):.1f}" for name, hits in one.hits.items()}
    length = {name: f"{np.mean(values):.3f}" for name, values in one.lengths.items()}
    columns = [one.detector.name, str(one.images), str(one.sets)]
    for name in METRICS:
        columns += [f"{one.true[name]:.3f}", share[f"{name} percentile"], share[name], length[name]]
    columns += [share["difference"], length["difference"]]
    return f"| {' | '.join(columns)} |"


def page(found: list[Coverage]) -> str:
    """Write the result as Markdown."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for one in found:
        for name, hits in one.hits.items():
            if name.startswith("class "):
                groups[name.removeprefix("class ")] += hits
    order = [name for name in (*(f"up to {most}" for most in FEW), "more") if name in groups]
    misses = [above for one in found for above in one.above]
    head = ["detector", "images", "sets"]
    for name in METRICS:
        head += [f"true {name}", f"percentile {name}", f"**interval {name}**", "length"]
    head += ["**difference**", "length"]
    lines = [
        "# Coverage of the 95% intervals",
        "",
        f"`python -m benchmarks.intervals --sets {found[0].sets}`, {time.strftime('%Y-%m-%d')},"
        f" Python {platform.python_version()}.",
        "Percent of the sets of images whose interval holds the true value; the goal is 93 to 97.",
        f"Of {found[0].sets} sets such a number is sure to"
        f" {100 * 1.96 * (0.95 * 0.05 / found[0].sets) ** 0.5:.1f}, of a third as many to"
        f" {100 * 1.96 * (0.95 * 0.05 / found[0].sets * 3) ** 0.5:.1f}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *map(row, found),
        "",
        "`difference`: two detectors of equal AP on the same images, compared in pairs; percent of"
        " the pairs",
        "that are called noise.",
        "",
        "## Classes, by the number of images that hold the class",
        "| images | AP intervals | percent that hold the true AP |",
        "|---|---|---|",
        *(f"| {n} | {len(groups[n]):,} | {100 * np.mean(groups[n]):.1f} |" for n in order),
        "",
        f"{sum(misses)} of the {len(misses)} intervals of AP that miss lie above the true AP: AP of"
        " few objects is too high.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sets", type=int, default=1000, help="of up to 100 images; else a third")
    parser.add_argument("--images", type=int, nargs="+", default=[40, 100, 400])
    chosen = parser.parse_args()
    found = []
    for images in chosen.images:
        for detector in DETECTORS:
            sets = chosen.sets if images <= 100 else chosen.sets // 3
            found.append(measure(detector, images, sets))
            RESULT.write_text(page(found), encoding="utf-8")
            print(row(found[-1]), flush=True)


if __name__ == "__main__":
    main()
