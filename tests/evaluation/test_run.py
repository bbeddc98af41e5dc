"""The real model over real files: the evaluation's batch size changes nothing."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from runkey.data.dataset import normalise
from runkey.data.index import ClassName, ImageRecord, read_index, write_index
from runkey.data.loader import build_eval_loader
from runkey.errors import RunkeyError
from runkey.evaluation.run import Validation, detect, same_shape_batches
from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.model.matcher import Targets
from runkey.model.postprocess import build_postprocess
from runkey.params import Data, Model
from tests.support.workspace import loader_params

CPU = torch.device("cpu")
CLASSES = [ClassName(0, 7, "a"), ClassName(1, 3, "b"), ClassName(2, 90, "c")]
# Landscape and portrait, mixed sizes; three of them equal.
SIZES = [(90, 60), (60, 90), (96, 40), (90, 60), (64, 64), (50, 96), (90, 60), (33, 64), (96, 33)]
DATA = Data(path="data", short_sides=(48,), long_side=80)
MODELS = {
    "fast": Model(hidden_dim=32, num_heads=2, feedforward_dim=48, num_queries=8, dropout=0.1),
    "detr": Model(
        preset="detr",
        hidden_dim=32,
        num_heads=2,
        feedforward_dim=48,
        num_queries=8,
        dropout=0.1,
        loss={"classification": 1.0},
    ),
}


class Double(nn.Module):
    """The detector in float64, in which rounding cannot hide an influence of padding."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector.double()

    def forward(self, images, padding_mask):
        return self.detector(images.double(), padding_mask)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A val split as `prepare` leaves it, in a workspace."""
    root = tmp_path_factory.mktemp("workspace")
    (root / "data").mkdir()
    (root / "prepared").mkdir()
    rng = np.random.default_rng(3)
    records = []
    for number, (width, height) in enumerate(SIZES):
        picture = Image.fromarray(rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8))
        picture.resize((width, height)).save(root / "data" / f"{number}.png")
        count = number % 4
        corners = rng.uniform(0, 0.5, (count, 2)) * [width, height]
        sides = rng.uniform(0.2, 0.5, (count, 2)) * [width, height]
        records.append(
            ImageRecord(
                id=100 - number,
                file=f"{number}.png",
                width=width,
                height=height,
                rotate=0,
                mirror=False,
                boxes_xywh=tuple(map(tuple, np.hstack([corners, sides]).tolist())),
                labels=tuple(rng.integers(0, 3, count).tolist()),
                areas=tuple(sides.prod(axis=1).tolist()),
                crowd=tuple(i == 2 for i in range(count)),
                annotation_ids=tuple(range(count)),
            )
        )
    write_index(root / "prepared" / "val.safetensors", records)
    return root


def loader(root, batch_size):
    return build_eval_loader(loader_params(DATA, batch_size=batch_size), root)


def evaluation(root, preset, batch_size):
    torch.manual_seed(0)
    section = MODELS[preset]
    model = Double(build_model(section, len(CLASSES)))
    records = read_index(root / "prepared" / "val.safetensors")
    return validation(records, loader(root, batch_size), section)(model)


def validation(records, batches, section):
    criterion = build_criterion(section, len(CLASSES))
    return Validation(records, CLASSES, batches, CPU, build_postprocess(section), criterion)


def by_image(found):
    return {id_: found.keep(found.images == i) for i, id_ in enumerate(found.ids.tolist())}


@pytest.mark.parametrize("preset", MODELS)
def test_batch_size_changes_nothing(prepared, preset):
    alone = evaluation(prepared, preset, 1)
    assert len(alone.detections.ids) == len(SIZES)
    assert alone.losses["loss"] > 0
    for batch_size in (3, 8):
        other = evaluation(prepared, preset, batch_size)
        others = by_image(other.detections)
        for image_id, found in by_image(alone.detections).items():
            same = others[image_id]
            # float64 inside, float32 outside
            assert np.allclose(found.scores, same.scores, rtol=2e-7, atol=0), batch_size
            assert np.array_equal(found.labels, same.labels), batch_size
            assert np.allclose(found.boxes_xywh, same.boxes_xywh, rtol=1e-5, atol=2e-5), batch_size
        assert other.result.summary == alone.result.summary
        assert other.losses == pytest.approx(alone.losses, rel=1e-9)


def test_padding_would_change_something(prepared):
    """What the grouping by shape is for: the same model on a padded batch answers otherwise."""
    torch.manual_seed(0)
    model = Double(build_model(MODELS["fast"], len(CLASSES))).eval()
    [padded] = [b for b in loader(prepared, 8) if len(set(map(tuple, b.sizes.tolist()))) > 2][:1]
    with torch.no_grad():
        together = model(*normalise(padded)).boxes_cxcywh[-1]
        alone = torch.cat(
            [model(*normalise(b)).boxes_cxcywh[-1] for b in same_shape_batches(padded)]
        )
    order = [i for b in same_shape_batches(padded) for i in b.image_ids]
    place = [order.index(i) for i in padded.image_ids]
    assert (together - alone[place]).abs().max() > 1e-6


def test_same_shape_batches_keep_everything(prepared):
    for batch in loader(prepared, 8):
        parts = list(same_shape_batches(batch))
        assert sorted(i for p in parts for i in p.image_ids) == sorted(batch.image_ids)
        assert sum(len(p.labels) for p in parts) == len(batch.labels)
        starts = np.cumsum((0, *batch.counts))
        for part in parts:
            [(height, width)] = {tuple(size) for size in part.sizes.tolist()}
            assert part.images.shape == (len(part), 3, height, width)
            boxes = part.boxes_cxcywh.split(part.counts)
            labels = part.labels.split(part.counts)
            for k, image_id in enumerate(part.image_ids):
                row = batch.image_ids.index(image_id)
                assert torch.equal(part.images[k], batch.images[row, :, :height, :width])
                assert torch.equal(part.original_sizes[k], batch.original_sizes[row])
                mine = slice(starts[row], starts[row + 1])
                assert torch.equal(boxes[k], batch.boxes_cxcywh[mine])
                assert torch.equal(labels[k], batch.labels[mine])


def test_loss_is_that_of_one_batch(prepared):
    """Three images of one shape: the loss that training would compute of them together."""
    section = MODELS["fast"]
    torch.manual_seed(0)
    model, criterion = build_model(section, 3).eval(), build_criterion(section, 3)
    batch = max(
        (p for b in loader(prepared, 9) for p in same_shape_batches(b)), key=lambda p: len(p)
    )
    assert len(batch) == 3
    with torch.no_grad():
        outputs = model(*normalise(batch))
    targets = Targets(batch.boxes_cxcywh, batch.labels, batch.counts)
    expected = criterion(outputs, targets, criterion.normaliser(batch.counts))
    records = [
        r for r in read_index(prepared / "prepared" / "val.safetensors") if r.id in batch.image_ids
    ]
    found = validation(records, [batch], section)(model)
    assert found.losses["loss"] == pytest.approx(float(expected.total), rel=1e-6)
    parts = [v for k, v in found.losses.items() if k.startswith("loss_")]
    assert sum(parts) == pytest.approx(found.losses["loss"], rel=1e-6)


def test_boxes_are_in_original_pixels_and_ids_are_the_data_sets(prepared):
    found = evaluation(prepared, "fast", 3)
    ids = {r.id for r in read_index(prepared / "prepared" / "val.safetensors")}
    assert set(found.detections.ids.tolist()) == ids
    widest = (found.detections.boxes_xywh[:, :2] + found.detections.boxes_xywh[:, 2:]).max()
    assert 64 < widest < 200  # the longest side of an original is 96 pixels
    metrics = found.metrics()
    assert {"val/AP", "val/AP50", "val/AP75", "val/loss", "val/loss_giou"} <= set(metrics)
    assert all(np.isfinite(v) for v in metrics.values())


def test_model_is_left_as_it_was(prepared):
    section = MODELS["fast"]
    model = build_model(section, 3).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    entered = []

    @contextmanager
    def autocast():
        entered.append(1)
        yield

    batches = loader(prepared, 4)
    detect(model, build_postprocess(section), batches, CPU, autocast)
    assert model.training
    assert len(entered) >= len(list(batches))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    # What the evaluation cached must not stop the next training step.
    batch = next(iter(batches))
    model(*normalise(batch)).boxes_cxcywh.sum().backward()


def test_nan_weights_are_one_line(prepared):
    section = MODELS["fast"]
    model = build_model(section, 3)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    records = read_index(prepared / "prepared" / "val.safetensors")
    with pytest.raises(RunkeyError, match=r"^image \d+: the model predicts NaN"):
        validation(records, loader(prepared, 4), section)(model)
