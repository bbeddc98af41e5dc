"""95% intervals of AP, by bootstrap over images.

    found = bootstrap(result.matches, result.recalls)
    found.intervals["AP"], found.per_class[0]["AP50"]    # Interval(low=0.652, high=0.694)

Images are drawn with replacement, as many as there are, 1,000 times (Efron 1979). Each time AP is
accumulated anew from the matches, exactly as pycocotools accumulates it on that set; nothing is
matched again. `benchmarks/intervals.py` measures how often an interval holds the true AP.

The draws depend on the number of images alone, so two models evaluated on the same images meet the
same sets, and the differences of their resampled AP are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runkey.units import counted

METRICS = ("AP", "AP50")
RESAMPLES = 1000
FEW_OBJECTS = 50
"""Below it a difference of 0.05 AP is noise."""
_LEAST_RESAMPLES = 200
_MOST_CELLS = 4_000_000_000
"""Matches times resamples, 6 ns each; a larger evaluation has fewer resamples."""
_CELLS = 1_000_000
"""Cells of an array that is worked on at a time, which bounds the memory."""
_SEED = 0
_DIGITS = 6
_EDGE = 0.01
"""Nearer to 0 or 1 the logarithm of the odds is taken as here."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ClassMatches:
    """Detections of a class and what they match, of all images, as COCOeval has them.

    D detections by descending score; equal scores in the order of the images, then of COCOeval.
    """

    images: NDArray[np.int64]
    """[D]: index of each detection's image."""
    scores: Floats
    """[D]."""
    right: NDArray[np.bool_]
    """[T, D]: whether it matches an object at each IoU threshold."""
    ignored: NDArray[np.bool_]
    """[T, D]: whether it counts as nothing, since it lies in a crowd region."""
    objects: NDArray[np.int64]
    """[I]: number of objects in each image, without crowd regions."""


def average_precision(one: ClassMatches, times: NDArray[np.int32], recalls: Floats) -> Floats:
    """Compute a class's AP on sets that hold each image several times or not at all.

    The set that pycocotools would see has the copies of an image beside each other, in the order of
    the images. Copies of a detection are of one score and all right or all wrong, so that only the
    last of them can be a corner of the precision-recall curve: one entry stands for all of them.
    Where one image has detections of equal score of which some are right, the copies alternate,
    and each copy has its own entry.

    Args:
        one: the matches; of D detections J are right at an IoU threshold.
        times: [I, B] how often each set holds each image.
        recalls: [R] at which precision is averaged, COCOeval's `recThrs`: 0.00, 0.01, ... 1.00.

    Returns:
        [T, B]: AP at each IoU threshold in each set, 0..1; NaN where the set has no object.
    """
    place, rows, times = _entries(one, times)
    objects = one.objects @ times[: len(one.objects)]
    average = np.zeros((len(one.right), times.shape[1]))
    average[:, objects == 0] = np.nan
    right, ignored = one.right[:, place], one.ignored[:, place]
    corners = np.flatnonzero(right.any(axis=0))
    if not len(corners):
        return average
    shown = _cumulative(np.arange(len(place)), corners, rows, times)  # [corners, B]
    for t in range(len(right)):
        mine = np.flatnonzero(right[t])
        if len(mine):
            seen = shown[np.searchsorted(corners, mine)]
            if ignored[t].any():
                seen -= _cumulative(np.flatnonzero(ignored[t]), mine, rows, times)
            tp = np.cumsum(times[rows[mine]], axis=0, dtype=np.float64)
            average[t] += _area(tp, seen, objects, recalls)  # NaN stays NaN
    return average


def _entries(
    one: ClassMatches, times: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """List the entries of the curve: the detection of each, and its row in the extended `times`.

    Rows behind those of the images count one copy of an image each, where copies alternate.
    """
    count = len(one.images)
    place = np.arange(count)
    starts = np.ones(count, dtype=bool)
    starts[1:] = (np.diff(one.scores) != 0) | (np.diff(one.images) != 0)
    group = np.cumsum(starts) - 1
    first = np.flatnonzero(starts)[group] if count else place
    same = (one.right == one.right[:, first]) & (one.ignored == one.ignored[:, first])
    mixed = np.zeros(count, dtype=bool)
    mixed[first[~same.all(axis=0)]] = True
    alternate = mixed[first]
    if not alternate.any():
        return place, one.images, times
    copies = np.arange(int(times.max()))
    tied = np.flatnonzero(alternate)
    whole = np.unique(one.images[tied])
    extra = (times[whole][:, None] > copies[:, None]).reshape(-1, times.shape[1])  # image, copy
    behind = len(times) + np.searchsorted(whole, one.images[tied]) * len(copies)
    single = np.flatnonzero(~alternate)
    place = np.concatenate([single, np.repeat(tied, len(copies))])
    copy = np.concatenate([np.zeros(len(single), dtype=np.int64), np.tile(copies, len(tied))])
    rows = np.concatenate([one.images[single], (behind[:, None] + copies).ravel()])
    by_place = np.lexsort((place, copy, first[place]))
    extended = np.concatenate([times, extra.astype(times.dtype)])
    return place[by_place], rows[by_place], extended


def _cumulative(
    counted: NDArray[np.int64],
    ends: NDArray[np.int64],
    rows: NDArray[np.int64],
    times: NDArray[np.int32],
) -> Floats:
    """[ends, B]: how many detections of the entries `counted` there are up to each end."""
    from scipy.sparse import csr_array  # here: comparisons of runs do not wait for its import

    part = np.searchsorted(ends, counted)  # the first end at or behind each entry
    inside = part < len(ends)
    shape = (len(ends), len(times))
    cells = (part[inside], rows[counted[inside]])
    matrix = csr_array((np.ones(len(cells[0]), dtype=np.int32), cells), shape=shape)
    return np.cumsum(matrix @ times, axis=0, dtype=np.float64)


def _area(tp: Floats, seen: Floats, objects: NDArray[np.int64], recalls: Floats) -> Floats:
    """Average the largest precision at or beyond each recall, as COCOeval does.

    Args:
        tp: [J, B] right detections up to and with each right one.
        seen: [J, B] detections up to there that count.
        objects: [B].
        recalls: [R].
    """
    precision = tp / (seen + np.spacing(1))
    largest = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    recall = tp / np.maximum(1, objects)
    # COCOeval's thresholds are no exact hundredths; the nearest one is compared as it is.
    nearest = np.rint(recall * (len(recalls) - 1)).astype(np.int64)
    reached = nearest + (recalls[nearest] <= recall)  # recalls up to this one, [J, B]
    reached[1:] -= reached[:-1].copy()
    total: Floats = np.einsum("jb,jb->b", largest, reached)
    return total / len(recalls)


def accumulate(
    matches: Sequence[ClassMatches], times: NDArray[np.int32], recalls: Floats
) -> tuple[Floats, Floats]:
    """Compute AP and AP50 of K classes on sets that hold each image several times or not at all.

    Args:
        matches: of each class.
        times: [I, B] how often each set holds each image.
        recalls: see `average_precision`.

    Returns:
        AP and AP50, [K, B] each; NaN where a set has no object of the class.
    """
    ap = np.empty((len(matches), times.shape[1]))
    ap50 = np.empty_like(ap)
    for k, one in enumerate(matches):
        at_once = max(8, _CELLS // max(1, int(one.right.sum(axis=1).max(initial=0))))
        for start in range(0, times.shape[1], at_once):
            part = slice(start, start + at_once)
            each = average_precision(one, np.ascontiguousarray(times[:, part]), recalls)
            ap[k, part], ap50[k, part] = each.mean(axis=0), each[0]
    return ap, ap50


def draw(images: int, resamples: int) -> NDArray[np.int32]:
    """[images, resamples]: how often each set holds each image; the same on every machine."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    times = np.empty((images, resamples), dtype=np.int32)
    for column in times.T:
        column[:] = np.bincount(random.integers(0, images, images), minlength=images)
    return times


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The resampled metrics of an evaluation, and their intervals; dictionaries by `METRICS`."""

    resampled: dict[str, list[float | None]]
    """[B], each averaged over the classes that the set has; None for a set without any."""
    deviations: dict[str, float | None]
    """Half the length of the interval, in standard deviations of the resampled values; 1.96 with
    very many images. None: too few images hold objects."""
    intervals: dict[str, Interval | None]
    """None as well where the resampled values do not differ, such as with an AP of 0."""
    per_class: tuple[dict[str, Interval | None], ...]


def bootstrap(matches: Sequence[ClassMatches], recalls: Floats) -> Bootstrap:
    """Resample the images of an evaluation; see the top of this file.

    A class that a set has no object of is left out of that set's mean, as pycocotools does.
    """
    holding = np.array([one.objects > 0 for one in matches]).reshape(len(matches), -1)
    images = holding.shape[1]
    work = sum(len(one.images) + int(one.right.sum()) for one in matches) + images
    resamples = int(np.clip(_MOST_CELLS // max(1, work), _LEAST_RESAMPLES, RESAMPLES))
    times = np.concatenate([np.ones((images, 1), np.int32), draw(images, resamples)], axis=1)
    values = dict(zip(METRICS, accumulate(matches, times, recalls), strict=True))
    counts = holding.sum(axis=1)
    known = counts > 0
    means = {name: _means(of_classes[known]) for name, of_classes in values.items()}
    deviations = {name: _deviations(of[known, 1:], counts[known]) for name, of in values.items()}
    return Bootstrap(
        resampled={
            name: [None if np.isnan(v) else round(float(v), _DIGITS) for v in mean[1:]]
            for name, mean in means.items()
        },
        deviations=deviations,
        intervals={name: _interval(mean, deviations[name]) for name, mean in means.items()},
        per_class=tuple(
            {
                name: _interval(of[k], _deviations(of[k : k + 1, 1:], counts[k : k + 1]))
                for name, of in values.items()
            }
            for k in range(len(matches))
        ),
    )


def _means(values: Floats) -> Floats:
    """Average [K, B] over the classes that are defined; NaN without any."""
    count = (~np.isnan(values)).sum(axis=0)
    mean: Floats = np.where(count, np.nansum(values, axis=0), np.nan) / np.maximum(1, count)
    return mean


def _deviations(values: Floats, counts: NDArray[np.int64]) -> float | None:
    """Return how many standard deviations of the resampled mean the interval reaches.

    A bootstrap of n images is too narrow by sqrt((n - 1) / n), and needs Student's t (Hesterberg
    2015). A class counts with the n images that hold it, so a mean over rare classes has few
    degrees of freedom: those of Welch (1947) and Satterthwaite (1946).

    Args:
        values: [K, B] of classes with objects.
        counts: [K] images that hold each; what a class in one image varies by is not known, so that
            it counts as in two.

    Returns:
        None if only single images hold objects, or if nothing varies.
    """
    from scipy.special import stdtrit

    if counts.max(initial=0) < 2:
        return None
    count = np.nansum(~np.isnan(values), axis=1)
    centred = values - (np.nansum(values, axis=1) / np.maximum(1, count))[:, None]
    variances = np.nansum(centred**2, axis=1) / np.maximum(1, count)
    total = variances.sum()
    if not total:
        return None
    several = np.maximum(2, counts)
    freedom = total**2 / (variances**2 / (several - 1)).sum()
    wider = (variances * several / (several - 1)).sum() / total
    return float(stdtrit(freedom, 0.975) * np.sqrt(wider))


def _interval(values: Floats, deviations: float | None) -> Interval | None:
    """Return the 95% interval of a metric between 0 and 1 from its value and the resampled ones.

    It is symmetric in log(v / (1 - v)), so that it stays between 0 and 1.
    """
    value, half = float(values[0]), _half(values[1:], deviations)
    if half is None:
        return None
    centre = min(max(value, _EDGE), 1 - _EDGE)
    odds = centre / (1 - centre)
    factor = np.exp(half / (centre * (1 - centre)))
    low, high = (float(one / (1 + one)) for one in (odds / factor, odds * factor))
    return Interval(round(min(low, value), _DIGITS), round(max(high, value), _DIGITS))


def describe_few_objects(objects: int, ap: float | None, interval: Interval | None) -> str:
    """Say how uncertain the AP of a split of under 50 objects is; empty for a larger one."""
    if objects >= FEW_OBJECTS or ap is None:
        return ""
    known = f"known to {interval.low:.2f} to {interval.high:.2f} (95%)" if interval else "a guess"
    return f"{counted(objects, 'held-out object')}: AP {ap:.3f} is {known}; hold out more images"


def difference_interval(
    a: Sequence[float | None],
    b: Sequence[float | None],
    difference: float,
    deviations: float,
) -> Interval | None:
    """Return the 95% interval of a difference B - A that is paired; None if nothing varies.

    Args:
        a: the resampled metric of A.
        b: that of B, on the same sets of images.
        difference: of the metrics of all images.
        deviations: the larger one of both runs' `Bootstrap.deviations`.
    """
    pairs = [y - x for x, y in zip(a, b, strict=False) if x is not None and y is not None]
    half = _half(np.array(pairs), deviations)
    if half is None:
        return None
    return Interval(round(difference - half, _DIGITS), round(difference + half, _DIGITS))


def _half(resampled: Floats, deviations: float | None) -> float | None:
    known = resampled[~np.isnan(resampled)]
    if deviations is None or len(known) < 2 or not np.ptp(known):
        return None
    return deviations * float(known.std())
