"""Clipping: exact values, in place, and the norms that are logged."""

import numpy as np
import pytest
import torch

from runkey import params
from runkey.training.optimizer import Clipper, joint_norm

CPU = torch.device("cpu")


def clip(tensors, mode, threshold=0.1, **options):
    section = params.Clip(mode=mode, threshold=threshold, **options)
    return Clipper(device=CPU, **section.model_dump()).clip(tensors)


def gradients():
    return [torch.tensor([[3.0, -4.0]]), torch.tensor([12.0]), torch.zeros(2, 2)]


def test_joint_norm():
    assert joint_norm(gradients()).item() == 13.0


@pytest.mark.parametrize(("threshold", "factor"), [(6.5, 0.5), (13.0, 1.0), (100.0, 1.0)])
def test_norm(threshold, factor):
    tensors = gradients()
    clipped = clip(tensors, "norm", threshold)
    assert clipped.before.item() == 13.0
    assert clipped.after.item() == pytest.approx(13 * factor, rel=1e-6)
    assert clipped.threshold.item() == threshold
    torch.testing.assert_close(tensors[0], torch.tensor([[3.0, -4.0]]) * factor)
    torch.testing.assert_close(tensors[1], torch.tensor([12.0]) * factor)
    assert joint_norm(tensors).item() <= threshold


def test_norm_is_as_torchs():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(5, 7)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.randn(5, 7, generator=generator)
    ours = [parameter.grad.clone() for parameter in parameters]
    clipped = clip(ours, "norm", 0.1)
    assert torch.equal(torch.nn.utils.clip_grad_norm_(parameters, 0.1), clipped.before)
    for parameter, mine in zip(parameters, ours, strict=True):
        torch.testing.assert_close(parameter.grad, mine, rtol=1e-6, atol=0)


def test_value():
    tensors = gradients()
    clipped = clip(tensors, "value", 3.5)
    assert torch.equal(tensors[0], torch.tensor([[3.0, -3.5]]))
    assert torch.equal(tensors[1], torch.tensor([3.5]))
    assert clipped.before.item() == 13.0
    assert clipped.after.item() == pytest.approx((9 + 3.5**2 * 2) ** 0.5)
    assert clipped.threshold is None


def test_none():
    tensors = gradients()
    clipped = clip(tensors, "none")
    assert clipped.before.item() == clipped.after.item() == 13.0
    assert all(torch.equal(a, b) for a, b in zip(tensors, gradients(), strict=True))


@pytest.mark.parametrize("mode", ["norm", "value", "percentile", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_norm_before_shows_what_is_not_finite(mode, value):
    """Clamping an infinity hides it, so the guard goes by the norm before."""
    tensors = [torch.ones(3), torch.tensor([1.0, value])]
    assert not clip(tensors, mode).before.isfinite()


def of_norm(norm):
    return [torch.full((4,), norm / 2)]


def clip_all(clipper, norms):
    return [clipper.clip(of_norm(norm)) for norm in norms]


def percentile_clipper(percentile=10.0, history=1000):
    return Clipper("percentile", 0.1, CPU, percentile=percentile, history=history)


def test_percentile_is_autoclips():
    """The threshold is numpy's percentile of the norms so far, the present one included."""
    norms = (np.random.default_rng(0).lognormal(size=40) + 0.1).tolist()
    clipped = clip_all(percentile_clipper(25), norms)
    for step, (norm, seen) in enumerate(zip(norms, clipped, strict=True), start=1):
        expected = np.percentile(np.array(norms[:step], np.float32), 25)
        assert seen.threshold.item() == pytest.approx(expected, rel=1e-5)
        assert seen.after.item() == pytest.approx(min(norm, expected), rel=1e-5)


def test_percentile_forgets_what_is_older_than_its_history():
    clipped = clip_all(percentile_clipper(50, history=3), [100, 100, 1, 2, 3])
    assert [c.threshold.item() for c in clipped] == pytest.approx([100, 100, 100, 2, 2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norms_that_are_not_finite_never_enter(bad):
    with_bad, without = percentile_clipper(50), percentile_clipper(50)
    clip_all(with_bad, [bad, 1, bad, 3, bad, 5])
    clip_all(without, [1, 3, 5])
    assert torch.equal(with_bad.state_dict()["norms"][-3:], torch.tensor([1.0, 3.0, 5.0]))
    assert clip_all(with_bad, [9])[0].threshold == clip_all(without, [9])[0].threshold == 4


def test_percentile_goes_on_from_its_state():
    norms = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    through = [c.threshold for c in clip_all(percentile_clipper(30, 5), norms)]
    first, second = percentile_clipper(30, 5), percentile_clipper(30, 5)
    clip_all(first, norms[:4])
    second.load_state_dict(first.state_dict())
    clip_all(first, [1000.0])  # a state that was handed over is nobody else's
    assert [c.threshold for c in clip_all(second, norms[4:])] == through[4:]
