"""The bound that memory.json states for a micro-batch, as training goes by it."""

from __future__ import annotations

from runkey.memory.batch_shapes import BatchShapes, ShapeStatistics
from runkey.memory.predict import predict
from runkey.memory.trace.events import MicroBatch
from runkey.params import Params, override
from runkey.pipeline.step_factory import step_factory


def stated_bounds(
    params: Params, shape: tuple[int, int], objects: int, classes: int, images: int
) -> tuple[int, ...]:
    """Most bytes that the allocator holds, for micro-batches of 1, 2, ... images of one shape.

    Args:
        params: what is trained.
        shape: padded (height, width), pixels.
        objects: boxes of an image.
        classes: K.
        images: most images.
    """
    statistics = ShapeStatistics(1, 1, shape, shape, shape, shape, (objects,))

    def sample(count: int, batches: int) -> list[tuple[MicroBatch, ...]]:
        one = MicroBatch(count, *shape, objects)
        return [(one,), (one, one)] * (batches // 3)

    shapes = BatchShapes(statistics, lambda _: statistics, sample, classes)
    params = override(params, {"training.batch_size": images})
    predicted = predict(
        params, shapes, lambda changed: step_factory(changed, classes), alternatives=False
    )
    return predicted.model.gpu.upper_bytes
