"""`runkey profile`: where the time of real training steps goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_debug_images import prepared

__all__ = ["prepared"]
SMALL = (
    *("-S", "data.short_sides=[32]", "-S", "data.long_side=48", "-S", "training.batch_size=4"),
    *("-S", "model.hidden_dim=32", "-S", "model.num_heads=2", "-S", "model.feedforward_dim=32"),
)
STEP = [
    "waiting for data",
    "preparing images",
    *("forward", "backbone", "encoder", "decoder", "heads"),
    *("matching", "loss"),
    *("backward", "loss", "heads", "decoder", "encoder", "backbone"),
    *("clipping gradients", "optimizer", "moving average", "logging and checks"),
    "a step",
]


def test_it_shows_every_part_of_a_step(prepared, run):
    before = {path.relative_to(prepared) for path in prepared.rglob("*")}
    code, out, errors = run("profile", "--steps", "2", "--trace", "trace.json", *SMALL)
    assert code == 0, errors
    assert out.startswith("A training step of 4 images, in one forward pass, takes ")
    table = out.split("\n\n")[1].splitlines()
    assert [line[:20].strip() for line in table[1:]] == STEP
    assert " GFLOP/s " in table[STEP.index("backbone") + 1]
    assert "verdict: " in out
    assert "the trace: trace.json" in out
    left = {path.relative_to(prepared) for path in prepared.rglob("*")} - before
    # Decoded images are kept for whoever reads them next.
    assert {path for path in left if path.parts[0] != ".runkey"} == {Path("trace.json")}
    assert {path.parts[1] for path in left if len(path.parts) > 1} <= {"decoded"}
    assert "memory/ is missing: profiling with 4 images at once" in errors
    assert "epoch 1/1" not in errors
    events = json.loads((prepared / "trace.json").read_text())["traceEvents"]
    labels = [e["name"] for e in events if e["name"].startswith("runkey: ")]
    assert labels.count("runkey: backbone") == 2
    assert labels.count("runkey: waiting for data") == 2


def test_parts_add_up_to_the_step(prepared, run):
    code, out, _ = run("profile", "--steps", "2", "--json", *SMALL, "-S", "training.micro_batch=2")
    assert code == 0
    found = json.loads(out)
    assert (found["images"], found["passes"], found["micro_batch"]) == (4, 2, 2)
    assert sum(one["seconds"] for one in found["parts"]) == pytest.approx(found["seconds"])
    flops = {(one["of"], one["name"]): one["flops"] for one in found["parts"]}
    # Of each convolution, the gradients of input and weights: but of the first one's images.
    assert flops["forward", "backbone"] < flops["backward", "backbone"]
    assert flops["backward", "backbone"] < 2 * flops["forward", "backbone"]
    for part in ("encoder", "decoder"):
        ratio = flops["backward", part] / flops["forward", part]
        assert 1.5 < ratio < 2.5, part
    assert flops["", "optimizer"] == 0
    assert found["gpu_busy"] is None
    assert set(found["verdict"]) == {"kind", "seen", "change"}


def test_it_needs_prepared_data(root, run):
    code, out, errors = run("profile")
    assert (code, out) == (1, "")
    assert "classes.json: not found; run `dvc repro prepare` first" in errors
