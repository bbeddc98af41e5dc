"""What belongs to which part of a step: FLOPs counted by hand, a GPU's events, the verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from runkey.model.criterion import build_criterion
from runkey.params import load_params
from runkey.params.render import preset_file
from runkey.pipeline.profile_parts import (
    BACKBONE,
    BACKWARD,
    COPYING,
    DECODER,
    ENCODER,
    FORWARD,
    LOGGING,
    MATCHING,
    OPTIMIZER,
    PartClock,
    WorkCounter,
    label_parts,
    read_events,
)
from runkey.pipeline.profile_step import Part, StepProfile, find_verdict, measure_peaks
from runkey.training.build import TrainContext
from runkey.training.loop import take_step
from runkey.training.state import LoopState
from tests.support.fitting import build
from tests.support.squares import CLASSES, SquaresLoader, detector_params, make_detector

CPU = torch.device("cpu")
PARAMS = load_params(preset_file("sample"))


def test_flops_are_those_counted_by_hand():
    """B 2, 8 x 8 pixels, 4 channels in 2 groups; then attention whose values are narrower."""
    convolution = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
    images = torch.randn(2, 4, 8, 8, requires_grad=True)
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    query.requires_grad_()
    clock = PartClock()
    with WorkCounter(clock) as counter:
        with clock.part(BACKBONE):
            features = convolution(images)
        with clock.part(ENCODER):
            attended = F.scaled_dot_product_attention(query, key, value)
        (features.sum() + attended.sum()).backward()
    forward = 2 * (2 * 6 * 8 * 8) * (2 * 3 * 3)
    assert counter.flops[FORWARD, BACKBONE] == forward
    assert counter.flops[BACKWARD, BACKBONE] == 2 * forward
    assert counter.flops[FORWARD, ENCODER] == 2 * 2 * 3 * 5 * 7 * (8 + 4)
    # Of the query alone: the gradient of the weights, then its own.
    assert counter.flops[BACKWARD, ENCODER] == counter.flops[FORWARD, ENCODER]
    assert counter.bytes[FORWARD, BACKBONE] == 4 * (2 * 4 * 64 + 6 * 2 * 9 + 2 * 6 * 64)


def test_flops_of_fused_attention():
    """As wide values take torch's fused kernel, whose backward pass computes the weights again."""
    query, key = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7))
    clock = PartClock()
    with WorkCounter(clock) as counter, clock.part(DECODER):
        F.scaled_dot_product_attention(query, key, key).sum().backward()
    product = 2 * (2 * 3) * 5 * 7 * 8
    assert counter.flops[FORWARD, DECODER] == 2 * product
    assert counter.flops[BACKWARD, DECODER] == 5 * product


def context() -> TrainContext:
    parameters = detector_params()
    criterion = build_criterion(parameters.model, CLASSES)
    return build(make_detector(parameters), criterion, SquaresLoader(), parameters)


def states(context: TrainContext) -> list[torch.Tensor]:
    state, batches = LoopState(), context.loader.epoch(0)
    context.step.model.train()
    for batch in batches:
        take_step(context, state, batch, [])
    return [one.clone() for one in context.step.model.state_dict().values()]


def test_labels_change_no_bit():
    plain, labelled = context(), label_parts(context(), PartClock())
    for before, after in zip(states(plain), states(labelled), strict=True):
        assert torch.equal(before, after)


def test_a_part_without_those_inside_it():
    clock = PartClock()
    with clock.part(DECODER):
        with clock.part(BACKBONE):
            sum(range(200_000))
        before = clock.times()
    times = clock.times()
    assert set(times.wall) == {LOGGING, DECODER, BACKBONE}
    assert times.wall[BACKBONE] == before.wall[BACKBONE] > times.wall[DECODER]
    assert sum(times.wall.values()) == pytest.approx(times.seconds)


def event(name, start, end, *, node=-1, thread=1, kernels=(), parent=None, gpu=False):
    """Microseconds; kernels: (name, start, end)."""
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    made = FunctionEvent(0, name, thread, start, end, sequence_nr=node, device_type=kind)
    for kernel, begin, stop in kernels:
        made.append_kernel(kernel, 0, stop - begin)
    if parent is not None:
        made.set_cpu_parent(parent)
    return made


def test_kernels_belong_to_the_part_that_started_them():
    """Two streams; the backward pass in a thread of its own; a copy to the GPU and two waits."""
    clock = PartClock()
    leaf = torch.zeros(1, requires_grad=True)
    with clock.part(BACKBONE):
        node = (leaf * 2).grad_fn._sequence_nr()
    forward = event("runkey: backbone", 0, 100)
    matching = event("runkey: matching", 100, 400)
    back = event("autograd::engine::evaluate_function: MulBackward0", 400, 500, node=node, thread=2)
    rest = event("autograd::engine::evaluate_function: AccumulateGrad", 500, 520, thread=2)
    kernels = {
        "conv": (50, 150),
        "gemm": (120, 250),
        "copy": (0, 30),
        "wgrad": (450, 600),
        "add": (600, 610),
        "adam": (700, 800),
    }
    started = {
        "conv": event("aten::conv2d", 10, 20, parent=forward),
        "gemm": event("aten::mm", 110, 120, parent=matching),
        "copy": event("aten::copy_", 0, 5),
        "wgrad": event("aten::convolution_backward", 410, 420, thread=2, parent=back),
        "add": event("aten::add_", 505, 510, thread=2, parent=rest),
        "adam": event("aten::_fused_adamw_", 690, 695, parent=event("runkey: optimizer", 690, 700)),
    }
    for name, made in started.items():
        shown = "Memcpy HtoD (Pinned -> Device)" if name == "copy" else name
        made.append_kernel(shown, 0, kernels[name][1] - kernels[name][0])
    forward.append_kernel("runkey: backbone", 0, 100)  # the profiler's own mark on the GPU
    on_gpu = [event(name, *span, gpu=True) for name, span in kernels.items()]
    on_gpu.append(event("runkey: backbone", 0, 1000, gpu=True))
    waits = [event("cudaStreamSynchronize", 300, 390), event("cudaEventSynchronize", 900, 910)]
    found = read_events([*on_gpu, *waits, forward, matching, back, rest, *started.values()], clock)
    microseconds = {key: round(1e6 * seconds) for key, seconds in found.gpu.items()}
    assert microseconds == {
        (FORWARD, BACKBONE): 100,
        ("", MATCHING): 130,
        ("", COPYING): 30,
        (BACKWARD, BACKBONE): 160,
        ("", OPTIMIZER): 100,
    }
    assert found.busy_seconds == pytest.approx((30 + 200 + 160 + 100) / 1e6)
    assert (found.syncs, round(1e6 * found.sync_seconds)) == (2, 100)
    assert found.backward == {BACKBONE: pytest.approx(120e-6)}


def profiled(busy: float | None = None, passes: float = 1.0, **seconds: float) -> StepProfile:
    parts = tuple(
        Part(name.replace("_", " "), "", value, value, None if busy is None else value, 0, 0)
        for name, value in seconds.items()
    )
    whole = sum(seconds.values())
    return StepProfile(
        "GPU", 1, "fp32", 8.0, 8, passes, 20, whole, whole, 1e12, 1e11, parts, gpu_busy=busy
    )


@pytest.mark.parametrize(
    ("profile", "kind", "seen", "change"),
    [
        (
            profiled(waiting_for_data=0.2, backbone=0.8),
            "loader",
            "training waits for data 20% of its time",
            "runtime.workers (now auto)",
        ),
        (
            profiled(0.4, 2.0, waiting_for_data=0.1, backbone=0.8),
            "host",
            "the GPU is busy 40% of the time",
            "training.micro_batch (now auto)",
        ),
        (
            profiled(0.9, backbone=0.3, encoder=0.2, decoder=0.2, heads=0.2),
            "slowest",
            "the decoder with its heads takes the largest part of a step, 44%",
            "model.decoder_layers (now 2) or model.num_queries (now 30)",
        ),
        (
            profiled(0.3, backbone=0.3, encoder=0.2),
            "slowest",
            "the backbone takes the largest part of a step, 60%, and the GPU is busy 30%",
            "data.short_sides (now [120])",
        ),
    ],
)
def test_the_verdict_names_the_parameter(profile, kind, seen, change):
    hint = find_verdict(profile, PARAMS)
    assert hint.kind == kind
    assert hint.seen.startswith(seen)
    assert change in hint.change


def test_other_programs_are_named():
    profile = profiled(waiting_for_data=0.1, backbone=0.9)
    parts = tuple(replace(one, cpu_seconds=one.seconds / 2) for one in profile.parts)
    hint = find_verdict(replace(profile, parts=parts), PARAMS)
    assert hint.seen.endswith("other programs took the CPU for 50% of the time")


def test_the_peaks_are_of_this_machine(monkeypatch):
    monkeypatch.setattr("runkey.pipeline.profile_step._PEAK_SECONDS", 0.05)
    flops, transfer = measure_peaks(CPU, torch.float32)
    assert 1e9 < flops < 1e13
    assert 1e8 < transfer < 1e12
