"""Parameter groups, rates, and the update that can be left out on the device."""

import copy

import pytest
import torch
from torch import nn

from runkey import params
from runkey.errors import TrainingError
from runkey.training.optimizer import (
    build_optimizer,
    guarded_step,
    set_rates,
    trained_parameters,
)
from tests.support import toy


def groups(optimizer):
    return {group["name"]: group for group in optimizer.param_groups}


def test_backbone_has_its_own_rate():
    model = toy.ToyModel()
    optimizer = build_optimizer(
        model, params.Optimizer(backbone_lr_factor=0.1, weight_decay=0.02), 1e-3
    )
    by_name = groups(optimizer)
    assert set(by_name) == {"backbone", "rest"}
    assert [id(p) for p in by_name["backbone"]["params"]] == [
        id(p) for p in model.backbone.parameters()
    ]
    assert len(by_name["rest"]["params"]) == 2
    set_rates(optimizer, 0.5)
    assert by_name["backbone"]["lr"] == pytest.approx(0.5e-4)
    assert by_name["rest"]["lr"] == pytest.approx(0.5e-3)
    assert by_name["rest"]["weight_decay"] == by_name["backbone"]["weight_decay"] == 0.02
    assert by_name["rest"]["fused"]


def test_no_decay_for_biases_and_norms():
    model = toy.ToyModel()
    section = params.Optimizer(decay_norm_and_bias=False, weight_decay=0.1, beta1=0.8, beta2=0.9)
    by_name = groups(build_optimizer(model, section, 1e-3))
    assert set(by_name) == {"backbone", "backbone/no_decay", "rest", "rest/no_decay"}
    assert {p.ndim for p in by_name["rest/no_decay"]["params"]} == {1}
    assert {p.ndim for p in by_name["backbone"]["params"]} == {4}
    assert by_name["rest"]["weight_decay"] == 0.1
    assert by_name["rest/no_decay"]["weight_decay"] == 0
    assert by_name["rest"]["betas"] == (0.8, 0.9)


def test_frozen_parameters_are_left_out():
    model = toy.ToyModel()
    model.backbone[0].requires_grad_(False)
    optimizer = build_optimizer(model, params.Optimizer(), 1e-3)
    held = {id(p) for p in trained_parameters(optimizer)}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert id(model.backbone[0].weight) not in held


def test_factor_zero_freezes_the_backbone():
    model = toy.ToyModel()
    optimizer = build_optimizer(model, params.Optimizer(backbone_lr_factor=0), 1e-3)
    assert set(groups(optimizer)) == {"rest"}
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_nothing_to_train_is_refused():
    with pytest.raises(TrainingError, match="every parameter of the model is frozen"):
        build_optimizer(toy.ToyModel().requires_grad_(False), params.Optimizer(), 1e-3)


def test_skipped_step_changes_no_bit():
    torch.manual_seed(0)
    module = nn.Linear(5, 3)
    optimizer = build_optimizer(module, params.Optimizer(), 1e-2)
    for _ in range(2):  # moments of their own
        module(torch.randn(4, 5)).square().sum().backward()
        guarded_step(optimizer, torch.tensor(0.0))
        optimizer.zero_grad()
    weights = copy.deepcopy(module.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    assert state[0]["step"].item() == 2
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    guarded_step(optimizer, torch.tensor(1.0))
    assert all(torch.equal(weights[k], v) for k, v in module.state_dict().items())
    for index, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[index][name], value) for name, value in moments.items())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    guarded_step(optimizer, torch.tensor(0.0))
    assert not torch.equal(weights["weight"], module.weight)
    assert optimizer.state_dict()["state"][0]["step"].item() == 3


def test_one_step_is_adamws_formula():
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    module = nn.Module()
    module.weight = parameter
    optimizer = build_optimizer(module, params.Optimizer(weight_decay=0.1), 0.01)
    set_rates(optimizer, 0.5)
    parameter.grad = torch.tensor([0.5, 0.25])
    guarded_step(optimizer, torch.tensor(0.0))
    # First step: both moments' corrections cancel, so each element moves by its rate.
    expected = torch.tensor([1.0, -2.0]) * (1 - 0.005 * 0.1) - 0.005 * torch.ones(2)
    torch.testing.assert_close(parameter.data, expected)
