"""Tiles of an image, and what is made of the boxes that are found in them."""

from __future__ import annotations

import numpy as np
import pytest

from runkey.errors import DataError
from runkey.inference.tile import Tiling, ViewDetections, merge_views, parse_tiling

TILING = Tiling(100, 100, 0.2)
SIZE = (100, 180)
"""Height and width of an image of two tiles, 0..100 and 80..180."""


@pytest.mark.parametrize(("height", "width"), [(100, 100), (101, 399), (64, 1000), (777, 500)])
def test_tiles_cover_the_image_and_share_what_they_should(height: int, width: int) -> None:
    tiling = Tiling(100, 64, 0.25)
    whole, *tiles = tiling.views(height, width)
    assert whole == (0, 0, width, height)
    covered = np.zeros((height, width), int)
    for left, top, right, bottom in tiles:
        assert (right - left, bottom - top) == (min(100, width), min(64, height))
        covered[top:bottom, left:right] += 1
    assert covered.min() == 1
    # An object of `shared` pixels is whole in a tile, wherever it lies.
    side = tiling.shared
    for left in range(0, width - side + 1):
        assert any(t[0] <= left and left + side <= t[2] for t in tiles)


def test_a_small_image_is_one_view() -> None:
    assert TILING.views(100, 100) == [(0, 0, 100, 100)]
    assert TILING.views(40, 30) == [(0, 0, 30, 40)]


def found(view: tuple[int, int, int, int], *rows: tuple[float, int, list[float]]) -> ViewDetections:
    """Detections (score, label, box in the image's pixels) of a view."""
    left, top, right, bottom = view
    sides = np.array([right - left, bottom - top] * 2)
    boxes = [(np.array(box) - [left, top, left, top]) / sides for _, _, box in rows]
    return ViewDetections(
        view,
        np.array([score for score, _, _ in rows], np.float32),
        np.array([label for _, label, _ in rows], np.int64),
        np.array(boxes, np.float32).reshape(-1, 4),
    )


def merged(whole: list, left: list, right: list, least: float = 0.0) -> list:
    """(score, label, box) of what stays."""
    views = TILING.views(*SIZE)
    assert len(views) == 3
    parts = [found(view, *rows) for view, rows in zip(views, (whole, left, right), strict=True)]
    scores, labels, boxes = merge_views(parts, SIZE, TILING, np.full(2, least, np.float32))
    rows = zip(scores.round(2).tolist(), labels.tolist(), boxes.round(1).tolist(), strict=True)
    return [(round(score, 2), label, box) for score, label, box in rows]


def test_an_object_that_two_tiles_have_whole_stays_once() -> None:
    first, second = (0.7, 0, [84, 20, 96, 40]), (0.8, 0, [84, 21, 97, 40])
    assert merged([], [first], [second]) == [second]


def test_boxes_of_other_classes_and_of_one_view_stay() -> None:
    """A detector itself says what is one object in one view; two classes are two objects."""
    first, other = (0.7, 0, [84, 20, 96, 40]), (0.8, 1, [84, 20, 96, 40])
    assert merged([], [first], [other]) == [other, first]
    near = (0.6, 0, [85, 20, 97, 40])
    assert merged([], [first, near], []) == [first, near]


def test_a_cut_box_gives_way_to_the_whole_one_also_with_a_better_score() -> None:
    cut, whole = (0.9, 0, [85, 20, 100, 50]), (0.6, 0, [85, 20, 110, 50])
    assert merged([], [cut], [whole]) == [whole]


def test_a_cut_box_stays_if_nothing_has_it_whole() -> None:
    cut = (0.9, 0, [70, 20, 100, 50])
    assert merged([], [cut], []) == [cut]
    elsewhere = (0.6, 0, [120, 20, 140, 50])
    assert merged([], [cut], [elsewhere]) == [cut, elsewhere]


def test_boxes_at_the_edge_of_the_image_are_not_cut() -> None:
    at_edge, larger = (0.9, 0, [0, 0, 15, 15]), (0.5, 0, [0, 0, 60, 60])
    assert merged([larger], [at_edge], []) == [at_edge, larger]


def test_large_objects_come_from_the_whole_image_and_small_ones_do_not() -> None:
    large, small = (0.8, 0, [20, 5, 170, 95]), (0.9, 0, [30, 30, 45, 45])
    halves = [(0.9, 0, [20, 5, 100, 95])], [(0.85, 0, [80, 5, 170, 95])]
    assert merged([large, small], *halves) == [large]


def test_scores_below_the_limits_go_before_anything_is_merged() -> None:
    weak, strong = (0.3, 0, [84, 20, 96, 40]), (0.8, 0, [20, 20, 40, 40])
    assert merged([], [strong], [weak], least=0.5) == [strong]
    cut, whole = (0.9, 0, [85, 20, 100, 50]), (0.4, 0, [85, 20, 110, 50])
    assert merged([], [cut], [whole], least=0.5) == [cut]


def test_many_boxes() -> None:
    """Each of 400 objects in a crowded image is found twice and stays once."""
    tiling, size = Tiling(400, 400, 0.5), (400, 2000)
    views = tiling.views(*size)
    boxes = [[x, y, x + 16.0, y + 16.0] for x in range(4, 1980, 40) for y in range(4, 380, 47)]
    parts = [found(views[0])]
    for view in views[1:]:
        rows = [
            (0.5 + 0.001 * (view[0] % 7), 0, box)
            for box in boxes
            if box[0] >= view[0] and box[2] <= view[2]
        ]
        parts.append(found(view, *rows))
    _, _, merged_boxes = merge_views(parts, size, tiling, np.zeros(1, np.float32))
    assert sorted(merged_boxes.round().tolist()) == sorted(boxes)


def test_the_shape_follows_the_model_if_only_the_width_is_given() -> None:
    assert parse_tiling("256", 0.2, 120, 160) == Tiling(256, 192, 0.2)
    assert parse_tiling("800", 0.2, 800, 1333) == Tiling(800, 600, 0.2)
    assert parse_tiling("512", 0.1, 512, 512) == Tiling(512, 512, 0.1)
    assert parse_tiling("640X320", 0.2, 120, 160) == Tiling(640, 320, 0.2)


@pytest.mark.parametrize("text", ["big", "12", "640x", "640x3.5", "-640", ""])
def test_tiles_that_are_none(text: str) -> None:
    with pytest.raises(DataError, match=f"--tile {text}"):
        parse_tiling(text, 0.2, 120, 160)


def test_the_overlap_has_bounds() -> None:
    with pytest.raises(DataError, match=r"--overlap 0\.9: from 0 to 0.75"):
        Tiling(100, 100, 0.9)
