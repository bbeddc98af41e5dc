"""EfficientNet-Lite0: its padding, its norms, and the names of published weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from runkey import params
from runkey.model.backbones import build_backbone, rename
from runkey.model.detr import build_model

STAGE_ENDS = (1, 2, 4, 6)


def backbone_of(**settings):
    torch.manual_seed(0)
    return build_backbone(params.Model(backbone="lite0", **settings))


def as_tensorflow(body, x):
    """Return the features of stride 16 by TF's rule: ceil(side / stride) cells, padded to fit."""

    def conv(layer, x):
        total = [
            max(0, (-(-side // s) - 1) * s + k - side)
            for side, s, k in zip(x.shape[-2:], layer.stride, layer.kernel_size, strict=True)
        ]
        (top, left), (rows, columns) = (n // 2 for n in total), total
        x = F.pad(x, (left, columns - left, top, rows - top))
        return F.conv2d(x, layer.weight, None, layer.stride, 0, 1, layer.groups)

    x = F.relu6(body.bn1(conv(body.conv_stem, x)))
    for stage in body.blocks:
        for block in stage:
            if hasattr(block, "conv_pwl"):
                out = F.relu6(block.bn1(conv(block.conv_pw, x)))
                out = F.relu6(block.bn2(conv(block.conv_dw, out)))
                out = block.bn3(conv(block.conv_pwl, out))
                x = out + x if out.shape == x.shape else out
            else:
                x = F.relu6(block.bn1(conv(block.conv_dw, x)))
                x = block.bn2(conv(block.conv_pw, x))
    return x


def moved_statistics(body, images):
    """Give the norms statistics that are not those of a fresh network."""
    body.train()(images)
    return body.eval()


@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
def test_padding_is_tensorflows(size):
    body = backbone_of().body.double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    moved_statistics(body, images)
    torch.testing.assert_close(body(images)[0], as_tensorflow(body, images))


@pytest.mark.parametrize("size", [(33, 95), (64, 65), (17, 31)])
def test_any_size_is_that_of_the_image_padded_to_32(size):
    """The cells of the padding are cut off, and a mask marks what a batch has added."""
    net = backbone_of().double()
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    moved_statistics(net.body, torch.randn(2, 3, 64, 96, dtype=torch.float64))
    height, width = (-(-side // 32) * 32 for side in size)
    padded = F.pad(images, (0, width - size[1], 0, height - size[0]))
    cells = tuple(-(-side // 16) for side in size)
    [(found, padding)] = net(images, None)
    assert padding is None
    assert found.shape == (1, 112, *cells)
    torch.testing.assert_close(found, as_tensorflow(net.body, padded)[..., : cells[0], : cells[1]])
    # The same image at the corner of a batch of a larger one's size.
    mask = torch.ones(1, height, width, dtype=torch.bool)
    mask[:, : size[0], : size[1]] = False
    [(together, padding)] = net(padded, mask)
    assert torch.equal((~padding).sum((1, 2)), torch.tensor([cells[0] * cells[1]]))
    torch.testing.assert_close(together[..., : cells[0], : cells[1]], found)


def test_frozen_norms_are_live_norms_in_evaluation():
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    live = moved_statistics(backbone_of().body.double(), images)
    frozen = backbone_of(norm="frozen").body.double()
    frozen.load_state_dict(live.state_dict())
    torch.testing.assert_close(frozen(images), live(images))
    assert {norm.eps for norm in frozen.modules() if hasattr(norm, "eps")} == {1e-3}
    assert {norm.eps for norm in live.modules() if hasattr(norm, "eps")} == {1e-3}


@pytest.mark.parametrize("stages", [0, 1, 3, 8])
def test_frozen_stages_count_the_stem_and_the_blocks(stages):
    body = backbone_of(frozen_stages=stages).body
    names = ["conv_stem.", "bn1.", *(f"blocks.{i}." for i in range(5))][: stages + (stages > 0)]
    for name, parameter in body.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(names) or ("none",)), name


def test_names_of_the_package_are_renamed():
    ours = build_model(params.Model(backbone="lite0"), 2).backbone[0].body.state_dict()
    number, theirs = 0, {}
    for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1)):
        for index in range(count):
            start, first = f"blocks.{stage}.{index}.", number == 0
            for name in (one for one in ours if one.startswith(start)):
                module, rest = name.removeprefix(start).split(".", 1)
                theirs[f"_blocks.{number}.{PACKAGE[first][module]}.{rest}"] = ours[name]
            number += 1
    theirs |= {f"_conv_stem.{n}": x for n, x in body_part(ours, "conv_stem.")}
    theirs |= {f"_bn0.{n}": x for n, x in body_part(ours, "bn1.")}
    classifier = {f"{name}.weight": torch.zeros(1) for name in ("_conv_head", "_bn1", "_fc")}
    renamed = rename("lite0", theirs | classifier)
    assert {name: id(x) for name, x in renamed.items()} == {n: id(x) for n, x in ours.items()}
    assert rename("lite0", ours) == ours


PACKAGE = {
    False: {
        "conv_pw": "_expand_conv",
        "bn1": "_bn0",
        "conv_dw": "_depthwise_conv",
        "bn2": "_bn1",
        "conv_pwl": "_project_conv",
        "bn3": "_bn2",
    },
    True: {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"},
}


def body_part(state, start):
    return [(name.removeprefix(start), x) for name, x in state.items() if name.startswith(start)]
