"""Clipping: exact values, in place, and the norms that are logged."""

import pytest
import torch

from runkey.training.clip import clip_gradients, joint_norm


def gradients():
    return [torch.tensor([[3.0, -4.0]]), torch.tensor([12.0]), torch.zeros(2, 2)]


def test_joint_norm():
    assert joint_norm(gradients()).item() == 13.0


@pytest.mark.parametrize(("threshold", "factor"), [(6.5, 0.5), (13.0, 1.0), (100.0, 1.0)])
def test_norm(threshold, factor):
    tensors = gradients()
    before, after = clip_gradients(tensors, "norm", threshold)
    assert before.item() == 13.0
    assert after.item() == pytest.approx(13 * factor, rel=1e-6)
    torch.testing.assert_close(tensors[0], torch.tensor([[3.0, -4.0]]) * factor)
    torch.testing.assert_close(tensors[1], torch.tensor([12.0]) * factor)
    assert joint_norm(tensors).item() <= threshold


def test_norm_is_as_torchs():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(5, 7)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.randn(5, 7, generator=generator)
    ours = [parameter.grad.clone() for parameter in parameters]
    before, _ = clip_gradients(ours, "norm", 0.1)
    assert torch.equal(torch.nn.utils.clip_grad_norm_(parameters, 0.1), before)
    for parameter, mine in zip(parameters, ours, strict=True):
        torch.testing.assert_close(parameter.grad, mine, rtol=1e-6, atol=0)


def test_value():
    tensors = gradients()
    before, after = clip_gradients(tensors, "value", 3.5)
    assert torch.equal(tensors[0], torch.tensor([[3.0, -3.5]]))
    assert torch.equal(tensors[1], torch.tensor([3.5]))
    assert before.item() == 13.0
    assert after.item() == pytest.approx((9 + 3.5**2 * 2) ** 0.5)


def test_none():
    tensors = gradients()
    before, after = clip_gradients(tensors, "none", 0.1)
    assert before.item() == after.item() == 13.0
    assert all(torch.equal(a, b) for a, b in zip(tensors, gradients(), strict=True))


@pytest.mark.parametrize("mode", ["norm", "value", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_norm_before_shows_what_is_not_finite(mode, value):
    """Clamping an infinity hides it, so the guard goes by the norm before."""
    tensors = [torch.ones(3), torch.tensor([1.0, value])]
    before, _ = clip_gradients(tensors, mode, 0.1)
    assert not before.isfinite()
