from __future__ import annotations

import itertools

import pytest
import torch

from runkey.model.boxes import cxcywh_to_xyxy, overlaps
from runkey.model.criterion import QualityLoss, SoftmaxLoss
from runkey.model.matcher import Layers, Matcher, Targets

K, L, B, Q = 3, 2, 3, 5
NAMES = ("decoder layer 1", "decoder layer 2")


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(1)
    boxes = torch.rand(L, B, Q, 4, generator=generator) * 0.5 + 0.2
    return Layers(NAMES, torch.randn(L, B, Q, K, generator=generator), boxes)


@pytest.fixture
def targets():
    generator = torch.Generator().manual_seed(2)
    boxes = torch.rand(6, 4, generator=generator) * 0.5 + 0.2
    return Targets(boxes, torch.tensor([0, 1, 2, 2, 1, 0]), (4, 0, 2))


def matcher(**weights):
    kind = QualityLoss(1.5)
    return Matcher(kind.cost, **({"classification": 2.0, "l1": 5.0, "giou": 2.0} | weights))


def cost_of(prediction_set, targets, layer, image, query, target, kind=None):
    """One cost, from its definition."""
    logits = prediction_set.logits[layer, image, query]
    box = prediction_set.boxes_cxcywh[layer, image, query]
    p = logits.sigmoid()[targets.labels[target]].double()
    true = targets.boxes_cxcywh[target]
    giou = overlaps(cxcywh_to_xyxy(box), cxcywh_to_xyxy(true))[1]
    focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    return (2 * focal + 5 * (box - true).abs().sum() - 2 * giou).item()


def test_assignment_is_the_cheapest_of_all(predictions, targets):
    """Against every way of choosing queries for an image's boxes."""
    matches = matcher()(predictions, targets)
    found = {}
    for flat, target in zip(matches.predictions.tolist(), matches.targets.tolist(), strict=True):
        layer, rest = divmod(flat, B * Q)
        found.setdefault((layer, rest // Q), {})[target] = rest % Q
    first = 0
    for image, count in enumerate(targets.counts):
        own = range(first, first + count)
        first += count
        for layer in range(L):
            cheapest = min(
                itertools.permutations(range(Q), count),
                key=lambda queries, own=own, layer=layer, image=image: sum(
                    cost_of(predictions, targets, layer, image, q, t)
                    for q, t in zip(queries, own, strict=True)
                ),
            )
            expected = dict(zip(own, cheapest, strict=True))
            assert found.get((layer, image), {}) == expected


def test_images_do_not_see_each_other(predictions, targets):
    """A batch is matched as its images are one by one."""
    together = matcher()(predictions, targets)
    pairs = set(zip(together.predictions.tolist(), together.targets.tolist(), strict=True))
    alone, first = set(), 0
    for image, count in enumerate(targets.counts):
        own = slice(first, first + count)
        one = Layers(NAMES, predictions.logits[:, [image]], predictions.boxes_cxcywh[:, [image]])
        match = matcher()(one, Targets(targets.boxes_cxcywh[own], targets.labels[own], (count,)))
        for flat, target in zip(match.predictions.tolist(), match.targets.tolist(), strict=True):
            layer, query = divmod(flat, Q)
            alone.add(((layer * B + image) * Q + query, first + target))
        first += count
    assert pairs == alone


def test_more_boxes_than_queries_match_every_query(predictions):
    boxes = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.3
    targets = Targets(boxes, torch.zeros(8, dtype=torch.int64), (8, 0, 0))
    matches = matcher()(predictions, targets)
    assert len(matches.predictions) == L * Q
    assert len(set(matches.predictions.tolist())) == L * Q


def test_batch_without_boxes_matches_nothing(predictions):
    targets = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (0,) * B)
    matches = matcher()(predictions, targets)
    assert len(matches.predictions) == len(matches.targets) == 0
    assert matches.predictions.dtype == torch.int64


def test_softmax_cost_is_minus_the_probability(predictions, targets):
    cost = SoftmaxLoss(0.1, K - 1).cost(
        predictions.logits, targets.image_index(), targets.labels % (K - 1)
    )
    probability = predictions.logits.softmax(-1)
    for n, image in enumerate(targets.image_index().tolist()):
        expected = -probability[:, image, :, targets.labels[n] % (K - 1)]
        torch.testing.assert_close(cost[n], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("what", ["logits", "boxes"])
def test_what_is_not_finite_is_named_and_matched_all_the_same(what, value, predictions, targets):
    expected = matcher()(predictions, targets)
    values = predictions.logits if what == "logits" else predictions.boxes_cxcywh
    values[1, 2] = value
    matches = matcher()(predictions, targets)
    assert matches.fault == f"{what} of decoder layer 2, image 3 of the batch, are not finite"
    assert len(matches.predictions) == len(expected.predictions)
    # What is finite is matched as ever: layer 1, and the image before.
    others = [i for i, p in enumerate(expected.predictions.tolist()) if p < (B + 2) * Q]
    assert torch.equal(matches.predictions[others], expected.predictions[others])
    assert expected.fault == ""


def test_a_query_that_is_not_finite_is_chosen_last(predictions, targets):
    predictions.boxes_cxcywh[0, 0, 2] = torch.nan
    first = matcher()(predictions, targets).predictions
    assert 2 not in first[:4].tolist()  # layer 1, image 1: four boxes, five queries
    predictions.boxes_cxcywh[0, 0, 1] = torch.nan
    assert len({1, 2} & set(matcher()(predictions, targets).predictions[:4].tolist())) == 1


def test_true_boxes_that_are_not_finite_are_named(predictions, targets):
    targets.boxes_cxcywh[0, 0] = torch.inf
    assert matcher()(predictions, targets).fault.startswith("the true boxes of this batch")
