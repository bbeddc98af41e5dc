from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from runkey.model.boxes import cxcywh_to_xyxy, full_precision, overlaps


@pytest.fixture
def boxes():
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(2, 7, 2, generator=generator, dtype=torch.float64)
    size = torch.rand(2, 7, 2, generator=generator, dtype=torch.float64) + 0.01
    return torch.cat((centre, size), -1)


def test_formats_go_round(boxes):
    back = box_convert(cxcywh_to_xyxy(boxes), "xyxy", "cxcywh")
    torch.testing.assert_close(back, boxes)
    assert cxcywh_to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.6])).tolist() == pytest.approx(
        [0.4, 0.1, 0.6, 0.7]
    )


def test_overlaps_of_all_pairs_are_torchvisions(boxes):
    a, b = cxcywh_to_xyxy(boxes)
    iou, giou = overlaps(a[:, None], b)
    torch.testing.assert_close(iou, box_iou(a, b))
    torch.testing.assert_close(giou, generalized_box_iou(a, b))
    assert giou.min() < 0 < iou.max()


def test_overlaps_of_pairs_have_gradients(boxes):
    first, second = boxes
    first = first.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: overlaps(cxcywh_to_xyxy(x), cxcywh_to_xyxy(second))[1], first
    )


def test_only_half_precision_is_widened():
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert full_precision(torch.ones(2, dtype=dtype)).dtype == expected
