from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from runkey import params
from runkey.model.backbones import ResNet, conv_norm
from runkey.model.detr import build_model

PLAIN = {"dilation": False, "frozen_norm": False, "frozen_stages": 0, "checkpointing": False}


@pytest.fixture
def images(formula):
    return formula.images(2, 64, 96).float()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_are_torchvisions(name, images):
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    ours = ResNet(name, **PLAIN).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == []
    assert unexpected == ["fc.weight", "fc.bias"]
    trunk = nn.Sequential(*list(theirs.children())[:-2])
    torch.testing.assert_close(ours(images), trunk(images))
    assert ours(images).shape == (2, ours.num_channels, 2, 3)


def test_frozen_norms_are_live_norms_in_evaluation(images):
    images = images.double()
    live = ResNet("resnet18", **PLAIN).double()
    live(images)  # moves the running statistics
    frozen = ResNet("resnet18", **PLAIN | {"frozen_norm": True}).double()
    frozen.load_state_dict(live.state_dict(), strict=True)
    torch.testing.assert_close(frozen(images), live.eval()(images))
    assert not [n for n, _ in frozen.named_parameters() if "bn" in n]


def test_frozen_norm_keeps_the_activations_dtype(formula):
    """A float32 scale would turn bfloat16 activations into float32 ones, twice the memory."""
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv_norm(conv, norm, formula.images(1, 8, 8).float())
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("stages", [0, 1, 2, 5])
def test_frozen_stages_do_not_train(stages, images):
    body = ResNet("resnet18", **PLAIN | {"frozen_stages": stages}).train()
    before = copy.deepcopy(body.state_dict())
    body(images).sum().backward() if stages < 5 else body(images)
    frozen = ("conv1", "bn1", "layer1.", "layer2.", "layer3.", "layer4.")[: stages + (stages > 0)]
    for name, parameter in body.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    for name, value in body.state_dict().items():
        if name.endswith("running_mean"):
            assert torch.equal(value, before[name]) == name.startswith(frozen), name


@pytest.mark.parametrize("backbone", ["compact", "resnet18"])
@pytest.mark.parametrize("preset", ["fast", "detr"])
def test_checkpointing_changes_no_number(backbone, preset, images):
    """Outputs, gradients, and the norms' statistics, which must not be counted twice."""
    model = params.Model(preset=preset, backbone=backbone, hidden_dim=32, num_heads=4, dropout=0.1)
    torch.manual_seed(0)
    plain = build_model(model, 3)
    lean = build_model(model.model_copy(update={"checkpointing": True}), 3)
    lean.load_state_dict(plain.state_dict())
    for net in (plain, lean):
        torch.manual_seed(1)
        outputs = net(images, None)
        (outputs.logits.square().sum() + outputs.boxes_cxcywh.square().sum()).backward()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, lean.state_dict()[name]), name
    for (name, ours), (_, theirs) in zip(
        plain.named_parameters(), lean.named_parameters(), strict=True
    ):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert torch.equal(ours.grad, theirs.grad), name
