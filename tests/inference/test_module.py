"""InferenceModule computes what `evaluate` computes, and its options change rounding alone."""

import copy

import pytest
import torch
from torch import nn

from runkey import params
from runkey.data.dataset import Batch, Normalisation, normalise
from runkey.errors import ModelError
from runkey.inference.module import EXPORTED, InferenceModule, InferenceOptions
from runkey.model.detr import build_model
from runkey.model.postprocess import build_postprocess

SMALL = {"hidden_dim": 32, "num_heads": 4, "feedforward_dim": 48, "num_queries": 20}
MODELS = {
    "fast": params.Model(**SMALL),
    "detr": params.Model(preset="detr", **SMALL),
    "fast frozen": params.Model(norm="frozen", **SMALL),
    "R18": params.Model(preset="detr", backbone="resnet18", norm="frozen", **SMALL),
    "R50-DC5": params.Model(
        preset="detr", backbone="resnet50", norm="frozen", dilation=True, **SMALL
    ),
    "fast lite0": params.Model(backbone="lite0", norm="frozen", **SMALL),
    "fast lite0 levels": params.Model(backbone="lite0", feature_strides=(8, 16, 32), **SMALL),
}


def detector_of(name):
    """A detector with statistics in its norms, so that folding them is not the identity."""
    torch.manual_seed(3)
    detector = build_model(MODELS[name], 4).eval()
    for module in detector.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.data.uniform_(0.8, 1.2)
            module.bias.data.normal_(0, 0.1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    # Frozen norms compute their scale when their constants are loaded.
    detector.load_state_dict(detector.state_dict())
    return detector


def images_of(batch, height, width):
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def evaluated(detector, preset, images):
    """What `evaluate` does with images of one shape, for a size of 1 x 1: fractions."""
    count, _, height, width = images.shape
    batch = Batch(
        images=images,
        sizes=torch.tensor([[height, width]] * count),
        boxes_cxcywh=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        counts=(0,) * count,
        image_ids=tuple(range(count)),
        original_sizes=torch.ones(count, 2, dtype=torch.int64),
    )
    pixels, _ = normalise(batch, Normalisation(detector.body.mean, detector.body.std))
    with torch.no_grad():
        outputs = detector(pixels, None)
        return build_postprocess(preset)(outputs, batch.original_sizes)


@pytest.mark.parametrize("name", MODELS)
def test_it_gives_the_bits_of_evaluate(name):
    detector = detector_of(name)
    images = images_of(2, 61, 83)
    expected = evaluated(detector, MODELS[name], images)
    scores, labels, boxes = InferenceModule(detector)(images)
    assert scores.dtype == boxes.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert scores.shape[1] == (80 if "fast" in name else 20)
    for index, found in enumerate(expected):
        assert torch.equal(scores[index], found.scores)
        assert torch.equal(labels[index], found.labels)
        assert torch.equal(boxes[index], found.boxes_xyxy)
    assert (scores[:, :-1] >= scores[:, 1:]).all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_folded_norms_and_last_heads_change_rounding_alone(name, channels_last):
    detector = detector_of(name)
    before = copy.deepcopy(detector.state_dict())
    images = images_of(2, 61, 83)
    options = InferenceOptions(fold_norms=True, last_layer_only=True, channels_last=channels_last)
    module = InferenceModule(detector, options)
    assert not any(hasattr(part, "running_var") for part in module.modules())
    for got, expected in zip(module(images), InferenceModule(detector)(images), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    assert all(torch.equal(before[name], value) for name, value in detector.state_dict().items())


def test_bf16_changes_scores_by_little_and_gives_float32():
    detector = detector_of("fast")
    images = images_of(2, 64, 80)
    scores, _, boxes = InferenceModule(detector, InferenceOptions(bf16=True))(images)
    apart = (scores - InferenceModule(detector)(images)[0]).abs().max()
    assert 1e-5 < apart < 0.05
    assert scores.dtype == boxes.dtype == torch.float32


def test_a_cut_decoder_is_the_layer_before_the_cut():
    for name in ("fast", "detr"):
        detector = detector_of(name)
        images = images_of(1, 64, 64)
        module = InferenceModule(detector, InferenceOptions(decoder_layers=1))
        assert len(module.detector.transformer.decoder.layers) == 1
        pixels, _ = normalise(
            Batch(images, torch.tensor([[64, 64]]), torch.zeros(0, 4), torch.zeros(0).long(),
                  (0,), (0,), torch.tensor([[1, 1]]))
        )  # fmt: skip
        outputs = detector(pixels, None)
        expected = module.postprocess.select(outputs.logits[0], outputs.boxes_cxcywh[0])
        torch.testing.assert_close(module(images)[0], expected[0])
        assert not torch.equal(module(images)[0], InferenceModule(detector)(images)[0])


def test_proposals_alone_are_those_of_the_encoder():
    detector = detector_of("fast")
    images = images_of(2, 64, 64)
    module = InferenceModule(detector, InferenceOptions(proposals_only=True))
    module.detector.transformer.decoder = None  # it does not run
    pixels = images.float() * module.scale + module.offset
    proposals = detector(pixels, None).proposals
    expected = module.postprocess.select(proposals.logits, proposals.boxes_cxcywh)
    torch.testing.assert_close(module(images)[0], expected[0])


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("detr", {"proposals_only": True}, "proposals only: preset detr has no proposals"),
        ("fast", {"decoder_layers": 0}, "decoder layers: 0; this model has 2, give 1 to 2"),
        ("detr", {"decoder_layers": 3}, "decoder layers: 3; this model has 2, give 1 to 2"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(name, options, line):
    with pytest.raises(ModelError, match=line):
        InferenceModule(detector_of(name), InferenceOptions(**options))


@pytest.mark.parametrize(("name", "least"), [("fast", 16), ("R18", 33)])
def test_an_exported_program_takes_other_batches_and_sizes_and_leaves_the_model_alone(name, least):
    """24 x 24 pixels are 9 tokens of the compact backbone: fewer than the 20 queries."""
    module = InferenceModule(detector_of(name), EXPORTED)
    sizes = (24, 24) if name == "fast" else (96, 96), (37, 53)
    others = [images_of(batch, *size) for batch, size in zip((3, 1), sizes, strict=True)]
    before = [module(images) for images in others]
    dims = {0: torch.export.Dim("batch")}
    dims |= {axis: torch.export.Dim(f"axis{axis}", min=least) for axis in (2, 3)}
    program = torch.export.export(module, (images_of(2, 48, 64),), dynamic_shapes=(dims,))
    for images, wanted in zip(others, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(module(images), wanted, strict=True))
        for got, expected in zip(program.module()(images), wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
