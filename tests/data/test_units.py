"""Boxes between 0 and 1: a split of nothing else is refused, a speck among others is not."""

from __future__ import annotations

import pytest

from runkey.errors import DataError
from tests.support.bad_data.annotations import in_parts


def test_each_split_is_looked_at(folder):
    in_parts(folder, "val")
    folder.write()
    with pytest.raises(DataError, match=r"instances_val\.json: all 2 boxes lie between 0 and 1"):
        folder.prepare()


def test_a_split_of_one_box(folder):
    in_parts(folder, "val")
    del folder.val["annotations"][1:]
    folder.write()
    with pytest.raises(DataError, match=r"instances_val\.json: the only box lies between 0 and 1"):
        folder.prepare()


def test_one_box_of_less_than_a_pixel_is_a_speck(folder):
    folder.train["annotations"][1] |= {"bbox": [0.5, 0.5, 0.4, 0.4], "area": 0.16}
    folder.write()
    assert not folder.prepare().failures


def test_without_objects_there_is_no_unit(folder):
    """The fault is that there is nothing to learn."""
    folder.val["annotations"] = []
    folder.write()
    with pytest.raises(DataError, match="no image for val has an object"):
        folder.prepare()
