"""The moving average's formula, buffers and start."""

import copy

import pytest
import torch
from torch import nn

from runkey import params
from runkey.model.detr import build_model
from runkey.training.optimizer import Ema

DONE, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def test_formula():
    module = nn.Linear(2, 1, bias=False)
    ema = Ema(module, decay=0.5)
    expected = module.weight.detach().clone()
    decays = []
    for n in range(12):
        with torch.no_grad():
            module.weight.fill_(n)
        decays.append(min(0.5, (1 + n) / (10 + n)))
        expected = decays[-1] * expected + (1 - decays[-1]) * n
        assert ema.current_decay() == decays[-1]
        ema.update(DONE)
    torch.testing.assert_close(ema.module.weight, expected)
    assert decays[:2] == [0.1, 2 / 11]
    assert decays[-1] == 0.5


def test_buffers_are_averaged_and_counters_copied():
    module = nn.BatchNorm1d(3)
    ema = Ema(module, decay=0.9)
    module.train()(torch.full((4, 3), 10.0) + torch.arange(4.0)[:, None])
    ema.update(DONE)  # the first decay is 0.1
    torch.testing.assert_close(ema.module.running_mean, 0.9 * module.running_mean)
    assert ema.module.num_batches_tracked.item() == 1


def test_the_module_itself_is_left_alone():
    module = nn.Linear(2, 2)
    before = copy.deepcopy(module.state_dict())
    ema = Ema(module, 0.9)
    ema.update(DONE)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in module.parameters())


def test_frozen_weights_stay_as_they_are():
    module = nn.Linear(2, 2)
    module.weight.requires_grad_(False)
    ema = Ema(module, 0.9)
    with torch.no_grad():
        module.bias.add_(1)
    for _ in range(3):
        ema.update(DONE)
    assert torch.equal(ema.module.weight, module.weight)
    assert not torch.equal(ema.module.bias, module.bias - 1)


def test_state_dict_round_trip():
    module = nn.Linear(2, 2)
    first, second = Ema(module, 0.99), Ema(nn.Linear(2, 2), 0.99)
    first.update(DONE)
    second.load_state_dict(first.state_dict())
    assert second.updates == 1
    assert second.current_decay() == first.current_decay() == pytest.approx(2 / 11)
    assert torch.equal(second.module.weight, first.module.weight)


def real_model():
    torch.manual_seed(0)
    model = build_model(params.Model(hidden_dim=32, num_heads=2, feedforward_dim=64), 3)
    return model.to(memory_format=torch.channels_last)


def moved(model):
    """Weights and statistics as another step could leave them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
        for buffer in model.buffers():
            buffer.add_(1)


def bits(module):
    # As bytes: torch.equal takes -0 for 0.
    return {n: t.clone().contiguous().numpy().tobytes() for n, t in module.state_dict().items()}


def test_bits_are_those_of_a_plain_average():
    """Laying the averages out in one piece changes no order of arithmetic."""
    model = real_model()
    ema, plain = Ema(model, 0.99), copy.deepcopy(model)
    for n in range(12):
        moved(model)
        ema.update(DONE)
        decay = min(0.99, (1 + n) / (10 + n))
        with torch.no_grad():
            for average, weight in zip(
                [*plain.parameters(), *plain.buffers()],
                [*model.parameters(), *model.buffers()],
                strict=True,
            ):
                if average.is_floating_point():
                    average.lerp_(weight, 1 - decay)
                else:
                    average.copy_(weight)
    assert bits(ema.module) == bits(plain)
    strides = [t.stride() for t in ema.module.state_dict().values()]
    assert strides == [t.stride() for t in model.state_dict().values()]


def test_a_skipped_step_leaves_it_as_it_is_to_the_bit():
    model = real_model()
    with torch.no_grad():
        model.class_embed.bias.fill_(-0.0)
    ema = Ema(model, 0.99)
    before = bits(ema.module)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    ema.update(SKIPPED)
    assert bits(ema.module) == before
    assert ema.updates == 1


def test_a_saved_average_is_loaded_into_its_place():
    model = real_model()
    first, second = Ema(model, 0.9), Ema(model, 0.9)
    moved(model)
    first.update(DONE)
    second.load_state_dict(first.state_dict())
    assert bits(first.module) == bits(second.module)
    moved(model)
    for ema in (first, second):
        ema.update(DONE)
    assert bits(first.module) == bits(second.module)
