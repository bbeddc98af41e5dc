from __future__ import annotations

import pytest
import torch

from runkey.model.matcher import Outputs
from runkey.model.postprocess import Postprocess, unpack


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_tensor_holds_the_bits_of_all(dtype):
    """What one copy takes from the device, with as many classes as there are anywhere."""
    logits = torch.randn(1, 2, 40, 20_000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    outputs = Outputs(logits, torch.rand(1, 2, 40, 4, dtype=dtype))
    postprocess = Postprocess(softmax=False)
    scores, labels, boxes_xyxy = postprocess.select(logits[-1], outputs.boxes_cxcywh[-1])
    packed = postprocess.pack(outputs, SIZES)
    assert packed.shape == (2, 100, 6)
    assert packed.dtype == dtype
    for image, found in enumerate(unpack(packed)):
        assert torch.equal(found.scores, scores[image])
        assert torch.equal(found.labels, labels[image])
        height, width = SIZES[image].tolist()
        sides = torch.tensor([width, height, width, height], dtype=dtype)
        assert torch.equal(found.boxes_xyxy, boxes_xyxy[image] * sides)
    assert labels.max() > 10_000
