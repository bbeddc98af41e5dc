"""What `profile_memory` needs to know before it predicts: the batches of prepared data."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from runkey.data.index import Record, read_classes, read_index
from runkey.data.shapes import Shape
from runkey.memory.census import Census, census_of_shape, sample_windows, take_census
from runkey.memory.predict import Surroundings
from runkey.memory.trace.events import Pass
from runkey.params import Params


def prepared_surroundings(params: Params, prepared: Path) -> Surroundings:
    """The batches that training will meet.

    Args:
        params: data, seed, model.num_queries and training.batch_size are read.
        prepared: prepare's output folder.

    Raises:
        DataError: prepare has not run, or left no image.
    """
    records = read_index(prepared / "train.json")
    census = partial(_census, records)
    return Surroundings(
        census=census(params),
        census_of=census,
        sample=partial(_sample, params, records),
        num_classes=len(read_classes(prepared / "classes.json")),
    )


def single_shape_surroundings(
    params: Params, shape: Shape, *, objects: int, num_classes: int
) -> Surroundings:
    """Batches of one shape, without any data.

    Args:
        params: data.short_sides and training.batch_size are read.
        shape: padded (height, width), pixels.
        objects: boxes of each image.
        num_classes: K.
    """

    def census(other: Params) -> Census:
        part = max(other.data.short_sides) / max(params.data.short_sides)
        height, width = (max(1, round(side * part)) for side in shape)
        if not other.data.group_by_aspect:
            height = width = max(height, width)
        return census_of_shape(
            (height, width), batch_size=other.training.batch_size, objects=objects
        )

    def sample(images: int, _: int) -> list[tuple[Pass, ...]]:
        return [(Pass(images, *shape, objects),) * 2] * 2

    return Surroundings(census(params), census, sample, num_classes)


def max_objects(params: Params) -> int:
    """Boxes of an image that the loader keeps."""
    return min(n for n in (params.data.max_objects, params.model.num_queries) if n)


def _census(records: list[Record], params: Params) -> Census:
    return take_census(
        params.data,
        records,
        batch_size=params.training.batch_size,
        max_objects=max_objects(params),
    )


def _sample(
    params: Params, records: list[Record], images: int, batches: int
) -> list[tuple[Pass, ...]]:
    return sample_windows(
        params.data,
        records,
        seed=params.seed,
        batch_size=params.training.batch_size,
        micro_batch=images,
        max_objects=max_objects(params),
        batches=batches,
    )
