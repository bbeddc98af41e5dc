"""Census, line, choice and plan."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from runkey.data.index import Record
from runkey.errors import DataError, TrainingError
from runkey.memory.budget import available_bytes, budget_bytes
from runkey.memory.census import take_census
from runkey.memory.choose import GIB, MIB, Choice, Line, choose, cut, fit_line, spare_bytes
from runkey.memory.guard import run_guarded
from runkey.memory.plan import MemoryPlan, read_plan, write_plan
from runkey.memory.probe import Peak, Probe, measure, synthetic_window
from runkey.params import Augment, Data

CPU = torch.device("cpu")


def record(image_id: int, width: int, height: int, boxes: int, crowds: int = 0) -> Record:
    count = boxes + crowds
    return Record(
        id=image_id,
        file=f"{image_id}.jpg",
        width=width,
        height=height,
        rotate=0,
        mirror=False,
        boxes_xywh=((0.0, 0.0, 9.0, 9.0),) * count,
        labels=(0,) * count,
        areas=(81.0,) * count,
        crowd=(False,) * boxes + (True,) * crowds,
        annotation_ids=tuple(range(count)),
    )


MIXED = [record(1, 640, 480, 3), record(2, 480, 640, 7, crowds=5), record(3, 640, 360, 0)]


def test_census_of_mixed_orientations():
    data = Data(short_sides=(480, 800), long_side=1333, augment=Augment())
    census = take_census(data, MIXED, max_objects=100)
    # 640 x 480 at 480 and 800, its portrait twin, and 640 x 360, which the long side limits.
    assert census.shapes == 6
    assert census.worst == census.worst_grouped == (800, 1333)
    assert census.largest == (750, 1333)
    assert census.worst_ungrouped == (1066, 1333)
    assert census.objects == 7
    lines = census.lines()
    assert lines[0].startswith("census: 6 output shapes, the largest 750 x 1333; ")
    assert lines[1] == (
        "  grouping by aspect pays: mixed batches would pad to 1066 x 1333, 1.33 times the pixels"
    )


def test_census_without_grouping_says_what_it_costs():
    data = Data(short_sides=(480, 800), long_side=1333, group_by_aspect=False)
    census = take_census(data, MIXED, max_objects=5)
    assert census.worst == census.worst_ungrouped == (1066, 1333)
    assert census.objects == 5
    assert census.lines()[1] == (
        "  data.group_by_aspect: true would pad to 800 x 1333 at most, 1/1.33 of the pixels"
    )


def test_census_of_one_shape_is_one_line():
    census = take_census(Data(), [record(1, 256, 192, 4), record(2, 256, 192, 8)], max_objects=30)
    assert census.lines() == [
        "census: 1 output shape, the largest 120 x 160; worst batch 120 x 160; up to 8 objects"
    ]


def test_census_needs_images():
    with pytest.raises(DataError) as caught:
        take_census(Data(), [], 30)
    assert str(caught.value) == (
        "prepared/train.json: no training images; see prepared/report.json"
    )


def peak(images: int, size: int) -> Peak:
    return Peak(images, size, size)


def test_line_goes_through_both_peaks():
    line = fit_line([peak(2, 1000), peak(4, 1400)])
    assert (line.base_bytes, line.bytes_per_image) == (600.0, 200.0)
    assert line.at(8) == 2200
    assert str(Line(724 * MIB, 16.62 * MIB)) == "724 MiB + 16.6 MiB an image"


def test_noise_never_makes_the_line_fall():
    line = fit_line([peak(2, 1010), peak(4, 1000)])
    assert line.at(1) == line.at(64) == 1000


@pytest.mark.parametrize(
    ("batch_size", "fits", "expected"),
    [
        (8, 8, Choice(8, 1)),
        (8, 7, Choice(4, 2)),
        (8, 5, Choice(4, 2)),
        (8, 3, Choice(3, 3)),
        (8, 1, Choice(1, 8)),
        (64, 10, Choice(10, 7)),
        (10, 4, Choice(4, 3)),
        (4, 100, Choice(4, 1)),
    ],
)
def test_steps_are_cut_evenly(batch_size, fits, expected):
    assert cut(batch_size, fits) == expected
    assert expected.micro_batch * expected.accumulation >= batch_size
    assert expected.micro_batch * (expected.accumulation - 1) < batch_size


def test_choice_is_the_largest_that_fits():
    """1 GiB + 1 GiB an image: 4 images take 5 GiB, and 256 MiB are to be spared."""
    line = Line(GIB, GIB)
    assert choose(line, 8, 5 * GIB + 256 * MIB) == Choice(4, 2)
    assert choose(line, 8, 5 * GIB + 255 * MIB) == Choice(3, 3)
    assert choose(line, 8, 100 * GIB) == Choice(8, 1)
    # From 8.5 GiB on, 3% are more than 256 MiB.
    assert spare_bytes(8 * GIB) == 256 * MIB
    assert spare_bytes(100 * GIB) == 3 * GIB
    assert choose(line, 200, 100 * GIB) == cut(200, 96)


def test_too_small_a_budget_names_what_helps():
    with pytest.raises(TrainingError) as caught:
        choose(Line(GIB, GIB), 8, 2 * GIB)
    assert str(caught.value) == (
        "memory.budget_gib: a training step of one image takes 2.00 GiB and 0.25 GiB to spare, "
        "the budget is 2.00 GiB; raise it, lower data.short_sides and data.long_side, "
        "or set model.checkpointing: true"
    )


def test_budget():
    assert budget_bytes(1.5, CPU) == 3 * GIB // 2
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert GIB // 4 < budget_bytes("device", CPU) < total


def test_a_containers_limit_counts(tmp_path):
    meminfo, limit, used = (tmp_path / name for name in ("meminfo", "max", "current"))
    meminfo.write_text("MemTotal:  4000 kB\nMemFree:  10 kB\nMemAvailable:  3000 kB\n")
    assert available_bytes(meminfo, ((limit, used),)) == 3000 * 1024
    limit.write_text("max\n")
    assert available_bytes(meminfo, ((limit, used),)) == 3000 * 1024
    limit.write_text("2000000\n")
    used.write_text("500000\n")
    assert available_bytes(meminfo, ((limit, used),)) == 1500000


PLAN = MemoryPlan(
    batch_size=8,
    micro_batch=4,
    accumulation=2,
    chosen_by="measured",
    device="cpu",
    worst_height=120,
    worst_width=160,
    shapes=1,
    objects=8,
)


def test_plan_is_read_as_it_was_written(tmp_path):
    write_plan(tmp_path / "memory", PLAN, {"peaks": [1, 2]})
    path = tmp_path / "memory/memory.json"
    assert read_plan(path) == read_plan(path, batch_size=8) == PLAN
    first = path.read_bytes()
    # Other measurements, the same decision: the same bytes, so DVC does not train anew.
    write_plan(tmp_path / "memory", PLAN, {"peaks": [3, 4]})
    assert path.read_bytes() == first


def test_bad_plans_are_named(tmp_path):
    path = tmp_path / "memory.json"
    again = "run `dvc repro profile_memory`"
    with pytest.raises(TrainingError) as caught:
        read_plan(path)
    assert str(caught.value) == f"{path}: not found; {again} first"
    for text in ("{", '{"micro_batch": 3}', "[]", "3"):
        path.write_text(text)
        with pytest.raises(TrainingError) as caught:
            read_plan(path)
        assert str(caught.value) == f"{path}: no memory plan of this version; {again}"
    write_plan(tmp_path, PLAN, {})
    with pytest.raises(TrainingError) as caught:
        read_plan(path, batch_size=16)
    assert str(caught.value) == f"{path}: made for training.batch_size 8, not 16; {again}"


def test_synthetic_window_is_the_worst_batch_twice():
    first, second = synthetic_window(Probe(3, 40, 60, 5, 4))
    assert first is second
    assert first.images.shape == (3, 3, 40, 60)
    assert first.counts == (5, 5, 5)
    assert first.labels.max() < 4
    assert first.sizes.tolist() == [[40, 60], [40, 60], [30, 60]]
    corners = first.boxes_cxcywh[:, :2] - first.boxes_cxcywh[:, 2:] / 2
    assert corners.min() >= -0.1


def test_a_step_that_does_not_fit_is_named():
    def make_step():
        return lambda window: torch.empty(2**50, dtype=torch.uint8)

    with pytest.raises(TrainingError) as caught:
        measure(make_step, [Probe(2, 40, 60, 5, 4)], CPU)
    assert str(caught.value) == (
        "memory.probe_batches: a training step of 2 images of 40 x 60 pixels does not fit on cpu; "
        "lower memory.probe_batches, data.short_sides and data.long_side, "
        "or set model.checkpointing: true"
    )


def test_other_faults_of_a_step_are_not_hidden():
    def make_step():
        return lambda window: torch.zeros(2) + torch.zeros(3)

    with pytest.raises(RuntimeError, match="size of tensor"):
        measure(make_step, [Probe(2, 40, 60, 5, 4)], CPU)


def test_death_of_the_measuring_process_is_named(tmp_path):
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(
        TrainingError, match=r"^memory.probe_batches: the machine ran out of memory"
    ):
        run_guarded([sys.executable, "-c", killed], tmp_path)
    assert run_guarded([sys.executable, "-c", "raise SystemExit(3)"], tmp_path) == 3
