"""Networks of timm as bodies: a ConvNeXt and a ViT from configuration, with random weights."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from runkey import params
from runkey.errors import ParamsError
from runkey.model.backbones import build_backbone, check, rename, spec_of, strides_of
from runkey.model.detr import build_model

CONVNEXT, VIT = "timm:convnext_atto", "timm:vit_tiny_patch16_224"


def backbone_of(name, **settings):
    torch.manual_seed(0)
    return build_backbone(params.Model(backbone=name, **settings))


def test_what_timm_says_of_them():
    spec = spec_of(CONVNEXT)
    assert (spec.strides, spec.channels) == ((4, 8, 16, 32), (40, 80, 160, 320))
    assert (spec.default_stride, spec.pad_multiple, spec.mean) == (16, 32, (0.485, 0.456, 0.406))
    spec = spec_of(VIT)
    assert (spec.strides, spec.channels, spec.pad_multiple) == ((16,), (192,), 16)
    assert (spec.mean, spec.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("timm:convnext_atom", "lacks it; did you mean convnext_atto"),
        ("timm:vgg11", "gives no feature maps for images of any size"),
    ],
)
def test_what_timm_does_not_have_is_refused(name, text):
    with pytest.raises(ParamsError, match=text):
        check(params.Model(backbone=name))


@pytest.mark.parametrize("name", [CONVNEXT, VIT, "timm:tf_efficientnet_lite0"])
def test_features_are_timms(name):
    """Of the image padded with zeros to whole cells, with the weights that timm's network has."""
    net = backbone_of(name).eval()
    sizes = {"dynamic_img_size": True} if name == VIT else {}
    whole = timm.create_model(name.removeprefix("timm:"), pretrained=False, **sizes).eval()
    weights = rename(name, whole.state_dict())
    missing, _ = net.body.load_state_dict(weights, strict=False)
    assert missing == []
    images = torch.randn(1, 3, 224, 200)
    padded = F.pad(images, (0, -200 % spec_of(name).pad_multiple))
    found = whole.forward_intermediates(padded, intermediates_only=True)
    expected = [one for one in found if one.shape[-2] == 14][-1][..., :13]
    [(features, padding)] = net(images, None)
    assert padding is None
    torch.testing.assert_close(features, expected)


def test_lite0_is_timms():
    """Our own lite0 computes what timm's does: the two are written apart."""
    theirs = backbone_of("timm:tf_efficientnet_lite0", feature_strides=(8, 16, 32)).eval().double()
    ours = backbone_of("lite0", feature_strides=(8, 16, 32)).eval().double()
    state = {n.removeprefix("model."): x for n, x in theirs.body.state_dict().items()}
    ours.body.load_state_dict(rename("lite0", state))
    images = torch.randn(1, 3, 97, 130, dtype=torch.float64)
    for (own, _), (other, _) in zip(ours(images, None), theirs(images, None), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("stages", [0, 1, 2, 4])
def test_frozen_stages_count_feature_levels(stages):
    body = backbone_of(CONVNEXT, frozen_stages=stages).body.train()
    frozen = ["stem.", *(f"stages.{level}." for level in range(stages))][: stages + (stages > 0)]
    for name, parameter in body.model.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(frozen) or ("none",)), name
    assert body.model.stages[0].training == (stages < 1)


def test_frozen_norms_are_constants():
    body = backbone_of("timm:resnet18", norm="frozen").body.train()
    before = {name: x.clone() for name, x in body.state_dict().items() if "running" in name}
    body(torch.randn(2, 3, 64, 64))
    after = body.state_dict()
    assert before
    assert all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize(
    ("name", "strides"), [(CONVNEXT, "auto"), (CONVNEXT, (8, 16, 32)), (VIT, "auto")]
)
def test_a_detector_of_it_takes_a_step(name, strides):
    model = params.Model(backbone=name, feature_strides=strides, hidden_dim=32, num_heads=4)
    torch.manual_seed(0)
    net = build_model(model, 3)
    outputs = net(torch.randn(2, 3, 90, 118), None)
    (outputs.logits.square().sum() + outputs.boxes_cxcywh.square().sum()).backward()
    gradients = [x.grad for x in net.backbone.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert strides_of(model) == ((16,) if strides == "auto" else strides)
