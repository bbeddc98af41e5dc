"""The moving average's formula, buffers and start."""

import copy

import pytest
import torch
from torch import nn

from runkey.training.ema import Ema


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
        ema.update()
    torch.testing.assert_close(ema.module.weight, expected)
    assert decays[:2] == [0.1, 2 / 11]
    assert decays[-1] == 0.5


def test_buffers_are_averaged_and_counters_copied():
    module = nn.BatchNorm1d(3)
    ema = Ema(module, decay=0.9)
    module.train()(torch.full((4, 3), 10.0) + torch.arange(4.0)[:, None])
    ema.update()  # the first decay is 0.1
    torch.testing.assert_close(ema.module.running_mean, 0.9 * module.running_mean)
    assert ema.module.num_batches_tracked.item() == 1


def test_the_module_itself_is_left_alone():
    module = nn.Linear(2, 2)
    before = copy.deepcopy(module.state_dict())
    ema = Ema(module, 0.9)
    ema.update()
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
        ema.update()
    assert torch.equal(ema.module.weight, module.weight)
    assert not torch.equal(ema.module.bias, module.bias - 1)


def test_state_dict_round_trip():
    module = nn.Linear(2, 2)
    first, second = Ema(module, 0.99), Ema(nn.Linear(2, 2), 0.99)
    first.update()
    second.load_state_dict(first.state_dict())
    assert second.updates == 1
    assert second.current_decay() == first.current_decay() == pytest.approx(2 / 11)
    assert torch.equal(second.module.weight, first.module.weight)
