"""The prediction for every body: traced steps of other sizes need at most that, and hardly less."""

from __future__ import annotations

import pytest

from runkey.memory.batch_shapes import single_shape
from runkey.memory.predict import MODEL_ERROR, batch_fields, predict
from runkey.memory.trace.events import MicroBatch, timeline_of
from runkey.memory.trace.gpu import Gpu
from runkey.memory.trace.record import recorder
from runkey.params import override
from runkey.pipeline.step_factory import step_factory

BODIES = {
    "compact": {},
    "resnet18": {},
    "lite0": {},
    "lite0, levels": {"model.feature_strides": [8, 16, 32]},
    "resnet18, levels": {"model.feature_strides": [8, 16, 32]},
    "timm:convnext_atto": {},
    "timm:convnext_atto, levels": {"model.feature_strides": [8, 16, 32]},
    "timm:vit_tiny_patch16_224": {},
    "lite0, frozen": {"model.norm": "frozen", "model.frozen_stages": 2},
}
# The largest batch of each has sides that padding to 32 changes, or not.
WORST = {"padded": (100, 118), "aligned": (96, 128)}


# Fast: each body once, in its plain form.
CASES = [
    pytest.param(
        *(name, worst),
        id=f"{name}-{size}",
        marks=() if "," not in name and size == "padded" else pytest.mark.slow,
    )
    for name in BODIES
    for size, worst in WORST.items()
]


@pytest.mark.parametrize(("name", "worst"), CASES)
def test_every_size_is_predicted(small_params, name, worst):
    values = {"model.backbone": name.split(",")[0], "data.long_side": 128, **BODIES[name]}
    params = override(small_params, values)
    shapes = single_shape(params, worst, objects=5, num_classes=3)
    prediction = predict(params, shapes, lambda other: step_factory(other, 3), alternatives=False)
    sizes = (
        shapes.worst(5),
        MicroBatch(1, 96, 97, 5),
        MicroBatch(6, worst[0] - 1, worst[1] - 17, 5),
    )
    with recorder(step_factory(params, 3), batch_fields(params, 3), Gpu()) as recording:
        recording.step(sizes[:1])
        for one in sizes:
            traced = timeline_of(recording.step((one, one))).peak_bytes
            predicted = prediction.template.peak(one) * (1 + MODEL_ERROR)
            assert traced <= predicted <= 1.03 * traced, one
