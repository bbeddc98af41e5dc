from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from runkey import params
from runkey.errors import ParamsError
from runkey.model.backbones import build_backbone, check, spec_of, strides_of
from runkey.model.backbones.layers import FrozenNorm, conv_norm, convolve
from runkey.model.detr import build_model


def body_of(name, **settings):
    return build_backbone(params.Model(backbone=name, **settings)).body


@pytest.fixture
def images(formula):
    return formula.images(2, 64, 96).float()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_are_torchvisions(name, images):
    images = images.double()  # in float32 another algorithm of a convolution shows
    theirs = getattr(torchvision.models, name)(weights=None).double().eval()
    ours = body_of(name).double().eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == []
    assert unexpected == ["fc.weight", "fc.bias"]
    trunk = nn.Sequential(*list(theirs.children())[:-2])
    torch.testing.assert_close(ours(images), [trunk(images)])
    assert ours(images)[0].shape == (2, spec_of(name).channels[-1], 2, 3)


def test_frozen_norms_are_live_norms_in_evaluation(images):
    images = images.double()
    live = body_of("resnet18").double()
    live(images)  # moves the running statistics
    frozen = body_of("resnet18", norm="frozen").double()
    frozen.load_state_dict(live.state_dict(), strict=True)
    torch.testing.assert_close(frozen(images), live.eval()(images))
    assert not [n for n, _ in frozen.named_parameters() if "bn" in n]


def test_frozen_norm_keeps_the_activations_dtype(formula):
    """A float32 scale would turn bfloat16 activations into float32 ones, twice the memory."""
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), FrozenNorm(4)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv_norm(conv, norm, formula.images(1, 8, 8).float())
    assert out.dtype == torch.bfloat16


def by_definition(norm, x):
    """Torchvision's frozen batch norm."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def test_what_a_frozen_norm_keeps_follows_its_constants_and_the_kernel(formula):
    """Whatever changes them: loading, a cast, a copy that is averaged, an optimizer."""
    conv, norm = nn.Conv2d(3, 4, 3, bias=False).requires_grad_(False), FrozenNorm(4)
    pair, images = nn.Sequential(conv, norm), formula.images(1, 8, 8).float()
    norm.keeps_kernel = True

    def check(pair):
        conv, norm = pair
        x = images.to(conv.weight.dtype)
        torch.testing.assert_close(conv_norm(conv, norm, x), by_definition(norm, conv(x)))

    check(pair)
    state = {name: torch.rand_like(value) + 0.5 for name, value in pair.state_dict().items()}
    pair.load_state_dict(state | {"1.num_batches_tracked": torch.tensor(3)})
    check(pair)
    kept = norm.kernel(conv)
    assert norm.kernel(conv) is kept
    twin = copy.deepcopy(pair)
    torch._foreach_lerp_([twin[0].weight], [torch.rand_like(conv.weight)], 0.5)
    check(twin)
    assert norm.kernel(conv) is kept
    conv.weight.mul_(2.0)
    check(pair)
    conv.weight = nn.Parameter(torch.rand_like(conv.weight), requires_grad=False)
    check(pair)
    check(pair.double())
    pair.float()
    with torch.inference_mode():
        check(pair)
    conv.requires_grad_(True)
    conv_norm(conv, norm, images).sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize("images", [1, 16])
@pytest.mark.parametrize(("side", "stride"), [(8, 1), (32, 1), (32, 2)])
def test_convolutions_of_one_pixel_are_torchs(images, side, stride):
    """In values and gradients, whichever algorithm computes them."""
    conv = nn.Conv2d(6, 5, 1, stride)
    x = torch.randn(images, 6, side, side, requires_grad=True)
    results = []
    for out in (F.conv2d(x, conv.weight, conv.bias, stride), convolve(conv, x, *conv.parameters())):
        inputs = (x, *conv.parameters())
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages", [0, 1, 2, 5])
def test_frozen_stages_do_not_train(stages, images):
    body = body_of("resnet18", frozen_stages=stages).train()
    before = copy.deepcopy(body.state_dict())
    body(images)[0].sum().backward() if stages < 5 else body(images)
    frozen = ("conv1", "bn1", "layer1.", "layer2.", "layer3.", "layer4.")[: stages + (stages > 0)]
    for name, parameter in body.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    for name, value in body.state_dict().items():
        if name.endswith("running_mean"):
            assert torch.equal(value, before[name]) == name.startswith(frozen), name


@pytest.mark.parametrize("backbone", ["compact", "resnet18", "lite0"])
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


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"backbone": "resnet19"},
            "model.backbone = 'resnet19': should be compact, resnet18, resnet34, resnet50,"
            " resnet101, lite0 or timm:NAME",
        ),
        (
            {"dilation": True},
            "model.dilation = true: needs resnet50 or resnet101, not compact",
        ),
        (
            {"feature_strides": (8, 16)},
            "model.feature_strides = [8, 16]: backbone compact has no 16, but 4, 8",
        ),
        ({"frozen_stages": 4}, "model.frozen_stages = 4: backbone compact has 3"),
    ],
)
def test_what_a_body_does_not_have_is_refused(settings, text):
    model = params.Model(**settings)
    for refuses in (check, build_backbone):
        with pytest.raises(ParamsError) as raised:
            refuses(model)
        assert str(raised.value) == text


def test_bodies_are_known_without_torch():
    code = "import sys; from runkey.model.backbones import check, spec_of; spec_of('lite0')"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("backbone", ["compact", "resnet18", "resnet50", "lite0"])
@pytest.mark.parametrize("preset", ["fast", "detr"])
def test_several_levels_become_tokens(backbone, preset):
    """Each level's tokens are its cells; a mask changes no number, and all levels are trained."""
    strides = (4, 8) if backbone == "compact" else (8, 16, 32)
    model = params.Model(
        backbone=backbone, preset=preset, feature_strides=strides, hidden_dim=32, num_heads=4
    )
    torch.manual_seed(0)
    net = build_model(model, 3)
    images = torch.randn(2, 3, 64, 96)
    memory = net.encode(images, None)
    cells = [(-(-64 // stride), -(-96 // stride)) for stride in strides]
    assert [level.shape for level in memory.levels] == cells
    assert memory.tokens.shape == (2, sum(h * w for h, w in cells), 32)
    assert strides_of(model) == strides
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    torch.testing.assert_close(net(images, mask).logits, net(images, None).logits)
    outputs = net(images, None)
    (outputs.logits.square().sum() + outputs.boxes_cxcywh.square().sum()).backward()
    for name, parameter in net.named_parameters():
        if name.startswith(("level_embed", "input_proj", "backbone")):
            assert parameter.grad is not None, name


def test_dilation_changes_the_last_stride():
    model = params.Model(backbone="resnet50", dilation=True)
    assert strides_of(model) == (16,)
    both = model.model_copy(update={"feature_strides": (8, 16)})
    assert strides_of(both) == (8, 16)
    assert build_backbone(both).channels == (512, 2048)
