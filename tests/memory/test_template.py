"""Three traces against further ones: every block of every batch, to the byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runkey.errors import TrainingError
from runkey.memory.template import Grid, Laws, Template, other_shape, quantities
from runkey.memory.trace.events import CLASSES, MicroBatch, break_down, timeline_of
from runkey.memory.trace.gpu import Gpu
from runkey.memory.trace.record import BatchFields, recorder
from runkey.pipeline.step_factory import step_factory

SEEN = (
    MicroBatch(2, 90, 120, 6),
    MicroBatch(4, 90, 120, 6),
    MicroBatch(3, *other_shape((90, 120), Grid((8,))), 6),
)
UNSEEN = MicroBatch(5, 83, 108, 6), MicroBatch(1, 90, 120, 6), MicroBatch(7, 88, 70, 6)


@pytest.fixture(scope="module")
def traces(small_params):
    """Steps over one, two and three micro-batches, traced for themselves."""
    with recorder(step_factory(small_params, 8), BatchFields(8, 2), Gpu()) as one:
        windows = [(SEEN[0],), *((p, p) for p in (*SEEN, *UNSEEN)), (UNSEEN[0],) * 3, SEEN[:1]]
        return [one.step(window) for window in windows]


@pytest.fixture(scope="module")
def template(traces):
    return Template(traces[1:4], Grid((8,)))


def lives(trace):
    """What is allocated and freed, without names."""
    return [(e.kind, e.bytes, e.class_, e.module) for e in trace.events]


@pytest.mark.parametrize("number", range(3))
def test_a_batch_that_was_never_traced_is_known_to_the_byte(template, traces, number):
    traced = traces[4 + number]
    assert traced.micro_batches[0] == UNSEEN[number]
    modelled = template.at(UNSEEN[number])
    assert modelled.marks == traced.marks
    wrong = [
        (ours, theirs)
        for ours, theirs in zip(lives(modelled), lives(traced), strict=True)
        if ours != theirs
    ]
    # A few blocks follow no law: they are bounded, and weigh next to nothing.
    assert all(ours[1] >= theirs[1] for ours, theirs in wrong)
    excess = sum(ours[1] - theirs[1] for ours, theirs in wrong if ours[0] == "alloc")
    assert excess < 1e-3 * timeline_of(traced).peak_bytes
    peak = timeline_of(traced).peak_bytes
    assert peak <= template.peak(UNSEEN[number]) <= 1.001 * peak


@pytest.mark.parametrize(("number", "window"), [(7, (UNSEEN[0],) * 3), (8, SEEN[:1])])
def test_windows_of_other_lengths_are_what_is_traced(template, traces, number, window):
    """Two steps of three micro-batches, and of one: what is alive at the peak and at the end."""
    traced = timeline_of(traces[number])
    assert traces[number].micro_batches == window
    allocator = template.replay([window] * 2, 0.0)
    assert allocator.max_allocated == pytest.approx(traced.peak_bytes, rel=1e-3)
    # But for scalars of losses, which a step over one micro-batch more makes anew.
    assert allocator.allocated == pytest.approx(int(traced.total[-1]), abs=20 * 512)


def test_a_workspace_comes_and_goes(template):
    """It shows in the peak, and nothing of it is left."""
    big = MicroBatch(16, 475, 630, 6)
    assert template.peak(big, 100.0) > template.peak(big)
    without, held = (template.replay([(big,)], share) for share in (0.0, 100.0))
    assert held.allocated == without.allocated > 0
    assert held.max_allocated > without.max_allocated


def test_laws_are_found_and_what_has_none_is_bounded():
    grid, worst = Grid((32,)), (800, 1333)
    other = other_shape(worst, grid)
    passes = [MicroBatch(2, *worst, 9), MicroBatch(4, *worst, 9), MicroBatch(3, *other, 9)]
    known = np.stack([quantities(one, grid) for one in passes])
    sizes = np.concatenate((known * 12, [[100 + 7], [100 + 14], [90]]), axis=1)
    laws = Laws(sizes, passes, grid)
    new = MicroBatch(5, 640, 901, 9)
    assert laws.loose == 1
    assert (laws.bytes(new)[:-1] == quantities(new, grid) * 12).all()
    # 100 + 3.5 an image, whatever the shape.
    assert laws.bytes(passes[0])[-1] >= 107
    assert laws.bytes(MicroBatch(8, 10, 10, 9))[-1] == 128


@pytest.mark.parametrize(
    ("queries", "other"),
    [(0, (222, 309)), (70, (222, 309)), (100, (381, 523)), (151, (222, 309))],
)
def test_the_other_shape_has_enough_tokens_if_the_largest_has(queries, other):
    """Of 300 x 470 pixels, 10 x 15 tokens."""
    assert other_shape((300, 470), Grid((32,)), queries) == other
    tokens = -(-other[0] // 32) * -(-other[1] // 32)
    assert (tokens >= queries) is (queries <= 150)
    assert tokens % 8 != 0


@pytest.mark.parametrize(("worst", "single"), [((45, 60), False), ((30, 60), True)])
def test_both_shapes_have_a_level_of_one_row_or_neither(worst, single):
    """Slices of one row are copied nowhere, so that the steps would have different blocks."""
    height, width = other_shape(worst, Grid((8, 16, 32), 32))
    assert (height <= 32) == single
    assert width > 32
    assert (height, width) != worst


def test_traces_that_differ_in_more_than_bytes_are_refused(traces):
    shorter = replace(traces[2], events=traces[2].events[:-1])
    with pytest.raises(TrainingError) as refused:
        Template([traces[1], shorter], Grid((8,)))
    assert str(refused.value) == (
        "memory cannot be predicted: the step allocates other tensors for 4 x 90 x 120 (images x"
        " height x width) than for 2 x 90 x 120; take another model.backbone, or other"
        " data.short_sides and data.long_side"
    )


def test_breakdown_adds_up_to_the_peak(template):
    trace = template.at(UNSEEN[0])
    timeline = timeline_of(trace)
    parts = break_down(trace)
    assert tuple(parts.classes) == CLASSES
    assert sum(parts.classes.values()) == timeline.peak_bytes == template.peak(UNSEEN[0])
    assert sum(sum(sizes.values()) for sizes in parts.modules.values()) == timeline.peak_bytes
    assert parts.phase in ("forward", "backward")
    assert {"backbone.layer1", "transformer.encoder", "ema"} <= parts.modules.keys()
    assert parts.classes["optimizer"] > 2 * parts.classes["gradient"] > 0
