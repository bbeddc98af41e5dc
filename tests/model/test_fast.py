from __future__ import annotations

import pytest
import torch
from torch import nn

from runkey import params
from runkey.model.boxes import cxcywh_to_xyxy, overlaps
from runkey.model.criterion import build_criterion
from runkey.model.detr import Denoiser, build_model
from runkey.model.matcher import Targets
from runkey.model.postprocess import build_postprocess

K = 4


@pytest.fixture
def small():
    return params.Model(hidden_dim=32, num_heads=4, feedforward_dim=48, num_queries=10)


@pytest.fixture
def net(small, formula):
    net = build_model(small, K)
    formula.fill(net)
    return net


class Patches(nn.Module):
    """Features without borders: what a convolution sees of the padding is the backbone's affair."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 96, 8, stride=8)

    def forward(self, images):
        return [self.conv(images)]


@pytest.mark.parametrize("preset", ["fast", "detr"])
def test_padding_changes_nothing_behind_the_backbone(preset, small, formula):
    """An image has the same detections however far it is padded, few tokens or many."""
    net = build_model(small.model_copy(update={"preset": preset}), K)
    net.backbone[0].body = Patches()
    net = net.double().eval()
    formula.fill(net)
    for height, width in ((16, 24), (64, 96)):
        images = formula.images(1, height, width)
        padded = torch.zeros(2, 3, 128, 160, dtype=torch.float64)
        padded[0, :, :height, :width] = images
        padding = torch.zeros(2, 128, 160, dtype=torch.bool)
        padding[0, height:] = True
        padding[0, :, width:] = True
        alone, beside = net(images, None), net(padded, padding)
        torch.testing.assert_close(beside.logits[:, :1], alone.logits)
        torch.testing.assert_close(beside.boxes_cxcywh[:, :1], alone.boxes_cxcywh)


def test_outputs_have_the_stated_shapes_and_precision(net, formula):
    images, targets = formula.images(2, 40, 56).float(), None
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(images, None, targets)
    assert outputs.logits.shape == (2, 2, 10, K)
    assert outputs.boxes_cxcywh.shape == (2, 2, 10, 4)
    assert outputs.proposals.logits.shape == (2, 10, K)
    for values in (outputs.logits, outputs.boxes_cxcywh, outputs.proposals.boxes_cxcywh):
        assert values.dtype == torch.float32
    assert 0 <= outputs.boxes_cxcywh.min() <= outputs.boxes_cxcywh.max() <= 1


@pytest.mark.parametrize("side", [0.1, 0.4])
def test_the_first_boxes_of_a_new_model_have_the_size_of_the_parameter(side, small, formula):
    net = build_model(small.model_copy(update={"initial_box": side}), K)
    boxes_cxcywh = net(formula.images(1, 40, 56).float(), None).proposals.boxes_cxcywh
    torch.testing.assert_close(boxes_cxcywh[..., 2:], torch.full((1, 10, 2), side))


def test_fewer_tokens_than_queries_are_filled_up(net, formula):
    outputs = net(formula.images(2, 16, 16).float(), None)
    assert outputs.proposals.logits.shape == (2, 10, K)
    assert outputs.logits.shape == (2, 2, 10, K)
    assert outputs.logits.isfinite().all()


def test_denoising_queries_are_not_seen_by_the_others(small, formula):
    """Learned queries answer the same with and without them."""
    with_groups = small.model_copy(update={"denoising": params.schema.Denoising(groups=3)})
    net = build_model(with_groups, K).double()
    formula.fill(net)
    images, targets = formula.images(2, 40, 56), formula.targets((3, 1), K)
    alone, together = net(images, None), net(images, None, targets)
    torch.testing.assert_close(together.logits, alone.logits)
    torch.testing.assert_close(together.boxes_cxcywh, alone.boxes_cxcywh)
    assert together.denoising.logits.shape == (2, 2, 9, K)
    assert net.eval()(images, None, targets).denoising is None


def test_a_denoising_group_does_not_see_another_nor_filling():
    denoiser = Denoiser(8, K, groups=2, label_noise=0.0, box_noise=0.0)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.1], [0.6, 0.6, 0.2, 0.2]])
    noised = denoiser(Targets(boxes, torch.tensor([0, 1, 2]), (2, 1)), 1)
    # Image 0: group a, a, group b, b, learned; image 1: a, filling, b, filling, learned.
    first = [[1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
    second = [[1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [0, 0, 1, 0, 1], [0, 0, 1, 0, 1], [0, 0, 0, 0, 1]]
    assert noised.mask[:, 0].int().tolist() == [first, second]
    assert noised.slots.tolist() == [0, 1, 2, 3, 4, 6]
    assert noised.targets.tolist() == [0, 1, 0, 1, 2, 2]


def test_denoising_noise_stays_within_its_bounds():
    denoiser = Denoiser(8, K, groups=50, label_noise=0.5, box_noise=0.4)
    box = torch.tensor([[0.5, 0.5, 0.2, 0.3]])
    targets = Targets(box, torch.tensor([1]), (1,))
    torch.manual_seed(0)
    noised = denoiser(targets, 1)
    moved = noised.box_logits.sigmoid()[0] - box
    bound = torch.tensor([0.04, 0.06, 0.08, 0.12])
    assert (moved.abs() <= bound + 1e-6).all()
    assert (moved.abs().amax(0) > 0.8 * bound).all()
    swapped = (noised.content[0] != denoiser.label_embed.weight[1]).any(1).float().mean()
    assert 0.2 < swapped < 0.55  # a random label is the true one once in K


def test_layers_learn_from_their_own_loss_only(net, formula):
    """References are detached: the last box has no gradient through the first layer's box head."""
    outputs = net.double()(formula.images(1, 40, 56), None)
    assert outputs.proposals is not None
    (grad,) = torch.autograd.grad(
        outputs.boxes_cxcywh[-1].sum(), outputs.proposals.boxes_cxcywh, allow_unused=True
    )
    assert grad is None


def test_two_runs_are_the_same_bits(small, formula):
    """Some steps of training, with denoising and dropout, under deterministic algorithms."""
    model = small.model_copy(
        update={"denoising": params.schema.Denoising(groups=2), "dropout": 0.1}
    )
    targets = formula.targets((3, 0, 1), K)
    targets = Targets(targets.boxes_cxcywh.float(), targets.labels, targets.counts)
    states = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(3)
            net, criterion = build_model(model, K), build_criterion(model, K)
            optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
            for _ in range(3):
                outputs = net(formula.images(3, 40, 56).float(), None, targets)
                criterion(outputs, targets, criterion.normaliser(targets.counts)).total.backward()
                optimizer.step()
                optimizer.zero_grad()
            states.append(net.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("preset", ["fast", "detr"])
def test_a_few_images_are_learnt(preset):
    """100 steps on two images of coloured squares find the squares and their colours."""
    torch.manual_seed(0)
    model = params.Model(preset=preset, hidden_dim=32, num_heads=4, num_queries=10)
    net, criterion = build_model(model, 3), build_criterion(model, 3)
    images = torch.zeros(2, 3, 64, 64)
    images[0, 0, 8:32, 8:32] = 2
    images[0, 1, 36:60, 30:54] = 2
    images[1, 2, 20:44, 24:60] = 2
    boxes = [[20, 20, 24, 24], [42, 48, 24, 24], [42, 32, 36, 24]]
    targets = Targets(torch.tensor(boxes) / 64, torch.tensor([0, 1, 2]), (2, 1))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(100):
        losses = criterion(net(images, None), targets, criterion.normaliser((2, 1)))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    found = build_postprocess(model)(net(images, None), torch.full((2, 2), 64))
    for image, labels in ((0, [0, 1]), (1, [2])):
        best = found[image].labels[: len(labels)].tolist()
        assert sorted(best) == labels
        true = cxcywh_to_xyxy(torch.tensor([boxes[label] for label in best], dtype=torch.float32))
        iou, _ = overlaps(found[image].boxes_xyxy[: len(labels)], true)
        assert iou.min() > 0.5
