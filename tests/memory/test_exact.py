"""The tracing engine is exact: real and fake tensors, torch's backward pass and ours, agree."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from runkey.memory.trace.record import synthetic_batch
from runkey.memory.trace.torch_private import BackwardRun, replaced_backward, run_backward

FAST = ("fast", "detr, dropout, no average")
every_training = pytest.mark.parametrize("training", FAST, indirect=True)


def check_four_ways(training, trace, in_order, monkeypatch):
    # A dispatch mode, which the tracer is, makes torch's engine take every tensor for a subclass,
    # and of those it never sums in place.  How it sums without one: the next test.
    monkeypatch.setattr(BackwardRun, "is_sole", lambda *_: False)
    real = trace(training, fake=False, own=False)
    own = trace(training, fake=False, own=True)
    assert own.result == real.result
    assert all(torch.equal(a, b) for a, b in zip(own.gradients, real.gradients, strict=True))
    assert len(real.gradients) > 50
    fakes = [trace(training, fake=True, own=way) for way in (False, True)]
    assert fakes[0].result == fakes[1].result
    is_half = training.params.training.precision != "off"
    for step in range(2):
        wanted = events_of(real.steps[step], in_order)
        assert events_of(own.steps[step], in_order) == wanted
        fake = events_of(fakes[1].steps[step], in_order)
        assert fake == events_of(fakes[0].steps[step], in_order)
        assert len(fake) == len(wanted) > 1000
        if not is_half:
            assert fake == wanted
    if is_half:
        # torch's fake layer norm on a CPU keeps statistics in 16 bits, the real one in float32.
        # On a GPU autocast runs layer norm in float32, and there is no such difference.
        assert fakes[0].result.allocated == pytest.approx(real.result.allocated, rel=1e-3)
    else:
        assert fakes[0].result == real.result


def check_real_allocations(training, build, in_order):
    """What the CPU's allocator is asked for, kernels' own needs and all, in a whole step."""
    seen, weights = [], []
    for own in (False, True):
        built, fields = build(training)
        window = tuple(synthetic_batch(one, fields) for one in training.micro_batches)
        with replaced_backward(run_backward) if own else nullcontext():
            built.step(window)
            gc.collect()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
                built.step(window)
        seen.append(sizes_only(in_order(allocations(prof))))
        weights.append([p.detach().clone() for p in built.model.parameters()])
    assert len(seen[0]) > 1000
    assert seen[1] == seen[0]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def events_of(trace, in_order):
    return in_order([(e.kind == "alloc", e.block, e.bytes) for e in trace.events])


def allocations(prof):
    found = []

    def walk(event):
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.alloc_size, fields.ptr))
        for child in event.children:
            walk(child)

    for event in prof.profiler.kineto_results.experimental_event_tree():
        walk(event)
    alive, events = set(), []
    for _, size, ptr in sorted(found, key=lambda event: event[0]):
        # What was there before is freed with or without a size, as the profiler happens to know it.
        if size > 0 or ptr in alive:
            (alive.add if size > 0 else alive.remove)(ptr)
            events.append((size > 0, ptr, abs(size)))
    return events


def sizes_only(events):
    """Some events have one time: which of two blocks of a size went first cannot be told."""
    return [e if isinstance(e, int) else sorted(size for _, size in e) for e in events]


@every_training
def test_four_ways_agree_event_by_event(training, trace, in_order, monkeypatch):
    check_four_ways(training, trace, in_order, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_ways_agree_on_twelve_trainings(training, trace, in_order, monkeypatch):
    check_four_ways(training, trace, in_order, monkeypatch)


@every_training
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_the_cpu_is_asked_for_the_same_memory(training, build, in_order):
    check_real_allocations(training, build, in_order)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_the_cpu_is_asked_for_the_same_memory_by_twelve_trainings(training, build, in_order):
    check_real_allocations(training, build, in_order)


def net(a, b):
    x = a * b
    y = x.exp() + x.sin() + x * 2.0
    z = torch.cat([y, a.t()])
    return (z * z).sum() + y.expand(2, *y.shape).sum() + b.sum()


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_sums_and_leaves_as_torch_has_them(in_order):
    """Sums of three gradients, views, a gradient of a broadcast, one in another layout."""
    seen = []
    for run in (torch.Tensor.backward, run_backward):
        a, b = (torch.randn(64, 64, requires_grad=True) for _ in range(2))
        loss = net(a, b)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            run(loss)
        assert a.grad.stride() == (64, 1)
        seen.append(sizes_only(in_order(allocations(prof))))
    assert len(seen[0]) > 20
    assert seen[1] == seen[0]
