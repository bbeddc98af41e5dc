from __future__ import annotations

import pytest
import torch

from runkey.model.matcher import Outputs
from runkey.model.postprocess import Postprocess


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 6, 30, generator=generator)
    return Outputs(logits, torch.rand(2, 2, 6, 4, generator=generator))


SIZES = torch.tensor([[100, 200], [50, 30]])


def test_best_hundred_pairs_of_query_and_class(outputs):
    for image, found in enumerate(Postprocess(softmax=False)(outputs, SIZES)):
        scores = outputs.logits[-1, image].sigmoid()
        pairs = [(scores[q, k].item(), q, k) for q in range(6) for k in range(30)]
        pairs = sorted(pairs, key=lambda pair: -pair[0])[:100]
        assert found.scores.tolist() == pytest.approx([score for score, _, _ in pairs])
        assert found.labels.tolist() == [k for _, _, k in pairs]
        height, width = SIZES[image].tolist()
        for box, (_, q, _) in zip(found.boxes_xyxy.tolist(), pairs, strict=True):
            x, y, w, h = outputs.boxes_cxcywh[-1, image, q].tolist()
            expected = [(x - w / 2) * width, (y - h / 2) * height]
            expected += [(x + w / 2) * width, (y + h / 2) * height]
            inside = [
                min(max(v, 0), end) for v, end in zip(expected, (width, height) * 2, strict=True)
            ]
            assert box == pytest.approx(inside, rel=1e-4, abs=1e-4)


def test_fewer_pairs_than_a_hundred_are_all_kept(outputs):
    small = Outputs(outputs.logits[..., :3], outputs.boxes_cxcywh)
    assert [len(d.scores) for d in Postprocess(softmax=False)(small, SIZES)] == [18, 18]


def test_softmax_gives_each_query_its_best_class(outputs):
    for image, found in enumerate(Postprocess(softmax=True)(outputs, SIZES)):
        best = outputs.logits[-1, image].softmax(-1)[:, :-1].max(-1)
        order = best.values.argsort(descending=True)
        torch.testing.assert_close(found.scores, best.values[order])
        assert torch.equal(found.labels, best.indices[order])


def test_equal_scores_keep_their_order():
    outputs = Outputs(torch.zeros(1, 1, 4, 3), torch.rand(1, 1, 4, 4))
    (found,) = Postprocess(softmax=False)(outputs, SIZES[:1])
    assert found.labels.tolist() == [0, 1, 2] * 4


def test_half_precision_outputs_give_full_precision_boxes(outputs):
    half = Outputs(outputs.logits.bfloat16(), outputs.boxes_cxcywh.bfloat16())
    (found, _) = Postprocess(softmax=False)(half, SIZES)
    assert found.boxes_xyxy.dtype == found.scores.dtype == torch.float32
