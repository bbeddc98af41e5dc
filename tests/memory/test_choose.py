"""What fits, what is asked for, what would help; how much there is."""

from __future__ import annotations

import os

import pytest
import torch

from runkey.errors import TrainingError
from runkey.memory.choose import Choice, choose, split_evenly
from runkey.memory.measure import (
    MemoryBudget,
    available_bytes,
    cpu_line,
    memory_budget,
    spare_bytes,
)
from runkey.memory.predict import Line, line_through
from runkey.units import GIB, MIB

CPU = torch.device("cpu")
LINE = Line(GIB, GIB)


def budget(size: float) -> MemoryBudget:
    return MemoryBudget(round(size), "of the test")


def test_line_goes_through_both_peaks():
    line = line_through((4, 1400), (2, 1000))
    assert (line.base_bytes, line.bytes_per_image) == (600.0, 200.0)
    assert line.at(8) == 2200
    assert str(Line(724 * MIB, 16.62 * MIB)) == "724 MiB + 16.6 MiB an image"


def test_noise_never_makes_the_line_fall():
    line = line_through((2, 1010), (4, 1000))
    assert line.at(1) == line.at(64) == 1000


@pytest.mark.parametrize(
    ("batch_size", "fits", "expected"),
    [
        (8, 8, (8, 1)),
        (8, 7, (4, 2)),
        (8, 5, (4, 2)),
        (8, 3, (3, 3)),
        (8, 1, (1, 8)),
        (64, 10, (10, 7)),
        (10, 4, (4, 3)),
        (4, 100, (4, 1)),
    ],
)
def test_steps_are_cut_evenly(batch_size, fits, expected):
    micro_batch, passes = split_evenly(batch_size, fits)
    assert (micro_batch, passes) == expected
    assert micro_batch * passes >= batch_size > micro_batch * (passes - 1)


def test_choice_is_the_largest_that_fits():
    """1 GiB + 1 GiB an image: 4 images take 5 GiB."""
    assert choose(LINE.at, budget(5 * GIB), 8) == Choice(4, 2, "up to 4 fit")
    assert choose(LINE.at, budget(5 * GIB - 1), 8).micro_batch == 3
    assert choose(LINE.at, budget(100 * GIB), 8).micro_batch == 8


def test_a_checkpoints_micro_batch_is_kept_if_it_fits():
    assert choose(LINE.at, budget(9 * GIB), 8, saved=3) == Choice(3, 3, "the checkpoint's")
    assert choose(LINE.at, budget(3 * GIB), 8, saved=3).micro_batch == 2


def test_a_number_is_obeyed():
    """Even where it does not fit: who names a number knows why."""
    assert choose(LINE.at, budget(GIB), 8, micro_batch=5) == Choice(4, 2, "training.micro_batch")


def test_what_would_fit_is_named_with_its_bytes():
    ways = {
        "data.long_side: 600": round(1.9 * GIB),
        "model.checkpointing: true": round(1.25 * GIB),
        "data.group_by_aspect: false": 3 * GIB,
        "training.precision: bf16": round(1.5 * GIB),
    }
    with pytest.raises(TrainingError) as caught:
        choose(LINE.at, budget(1.5 * GIB), 8, saved=4, alternatives=ways)
    start = (
        "memory.budget_gib: a training step of one image takes up to 2.00 GiB, there are 1.50 GiB "
        "(of the test); "
    )
    assert str(caught.value) == (
        start + "it would fit with model.checkpointing: true (1.25 GiB), "
        "or with training.precision: bf16 (1.50 GiB)"
    )
    with pytest.raises(TrainingError) as caught:
        choose(LINE.at, budget(GIB), 8, alternatives=dict(list(ways.items())[:2]))
    assert str(caught.value) == (
        start.replace("1.50", "1.00") + "no single change makes it fit: "
        "model.checkpointing: true (1.25 GiB), data.long_side: 600 (1.90 GiB)"
    )


def test_what_is_spared():
    assert spare_bytes(8 * GIB) == 256 * MIB
    # From 8.5 GiB on, 3% are more than 256 MiB.
    assert spare_bytes(100 * GIB) == 3 * GIB


def test_the_budget_is_less_what_is_spared():
    found = memory_budget(4.0, CPU, 0)
    assert found.bytes == 4 * GIB - 256 * MIB
    assert found.text == "4.00 GiB memory.budget_gib less 0.25 to spare"
    assert memory_budget(4.0, CPU, GIB).bytes == 3 * GIB - 256 * MIB
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert GIB // 4 < memory_budget("device", CPU, 0).bytes < total


def test_a_containers_limit_counts(tmp_path):
    meminfo, limit, used = (tmp_path / name for name in ("meminfo", "max", "current"))
    meminfo.write_text("MemTotal:  4000 kB\nMemFree:  10 kB\nMemAvailable:  3000 kB\n")
    assert available_bytes(meminfo, ((limit, used),)) == 3000 * 1024
    limit.write_text("max\n")
    assert available_bytes(meminfo, ((limit, used),)) == 3000 * 1024
    limit.write_text("2000000\n")
    used.write_text("500000\n")
    assert available_bytes(meminfo, ((limit, used),)) == 1500000


def test_a_cpus_process_takes_more_than_its_tensors():
    line = cpu_line(Line(100 * MIB, 10 * MIB))
    assert line.at(4) > 600 * MIB + 140 * MIB
