"""Choices, their times, and which one is taken."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from runkey import params
from runkey.errors import ModelError
from runkey.hashing import sha256_file
from runkey.inference.extras import import_extra
from runkey.inference.module import InferenceOptions
from runkey.inference.speed import (
    AS_EVALUATED,
    SPEED_JSON,
    Choice,
    Measured,
    NetworkOpener,
    SpeedReport,
    Timing,
    cut_choices,
    find_report,
    format_choices,
    read_report,
    time_networks,
    write_report,
)
from runkey.model.detr import build_model

FOLDED = InferenceOptions(fold_norms=True, last_layer_only=True)
ONNX, BF16 = Choice("onnx", "fp32", FOLDED), Choice("openvino", "bf16", FOLDED)
PROPOSALS = Choice("openvino", "bf16", replace(FOLDED, proposals_only=True))


def measured(choice: Choice, ap: float, cpu_ms: float, wall_ms: float = 1.0) -> Measured:
    return Measured(choice, ap, 0.9, Timing(cpu_ms, wall_ms, 9))


@pytest.fixture
def report() -> SpeedReport:
    return SpeedReport(
        key="rk2-" + "ab" * 32,
        weights="0" * 64,
        device="cpu",
        threads=1,
        batch=1,
        images=100,
        on_gpu=False,
        measured=(
            measured(AS_EVALUATED, 0.660, 9.0),
            measured(ONNX, 0.660, 4.8),
            measured(BF16, 0.659, 3.6),
            measured(PROPOSALS, 0.652, 2.0),
            measured(replace(PROPOSALS, nms=0.8), 0.6585, 2.1),
            measured(Choice("onnx", "int8", FOLDED), 0.655, 4.0),
        ),
        left_out={"compiled": "no compiler"},
    )


def test_the_fastest_choice_that_loses_little(report):
    assert report.pick(0.0).choice == ONNX
    assert report.pick(0.1).choice == BF16
    assert report.pick(0.2).choice == replace(PROPOSALS, nms=0.8)
    assert report.pick(0.2, exported=True).choice == BF16, "exports hold no suppression"
    assert report.pick(1.0).choice == PROPOSALS
    slower = replace(report, on_gpu=True)
    assert slower.pick(1.0).choice == AS_EVALUATED, "on a GPU wall times count"


def test_a_loss_that_nothing_keeps_to_is_refused(report):
    worse = replace(report, measured=(report.measured[0], measured(BF16, 0.65, 1.0)))
    with pytest.raises(ModelError, match=r"--max-ap-loss 0.5: .* loses 1.00 points"):
        worse.pick(0.5, exported=True)
    with pytest.raises(ModelError, match="make env-export"):
        replace(report, measured=report.measured[:1]).pick(0.5, exported=True)


def test_the_frontier_is_what_nothing_beats(report):
    shown = [(one.timing.cpu_ms, one.ap) for one in report.frontier()]
    assert shown == [(2.0, 0.652), (2.1, 0.6585), (3.6, 0.659), (4.8, 0.660)]


def test_names_say_what_differs():
    assert AS_EVALUATED.name == "torch fp32"
    assert replace(PROPOSALS, nms=0.8).name == "openvino bf16, proposals only, NMS 0.8"
    assert Choice("onnx", "fp32", replace(FOLDED, decoder_layers=1)).name == (
        "onnx fp32, 1 decoder layer"
    )
    assert Choice("torch", "fp32", FOLDED).name == "torch fp32, last heads, folded norms"


def test_choices_follow_from_machine_and_model():
    assert {one.runtime for one in format_choices(["torch"])} == {"torch"}
    runtimes = ["torch", "compiled", "onnx", "openvino", "tensorrt"]
    on_cpu, on_gpu = format_choices(runtimes), format_choices(runtimes, on_gpu=True)
    assert on_cpu[0] == on_gpu[0] == AS_EVALUATED
    assert {one.runtime for one in on_cpu} == {"torch", "compiled", "onnx", "openvino"}
    assert {one.runtime for one in on_gpu} == {"torch", "compiled", "onnx", "tensorrt"}
    assert len({one.name for one in on_cpu}) == len(on_cpu), "names tell them apart"
    cuts = cut_choices(BF16, 3, has_proposals=True)
    assert [one.options.decoder_layers for one in cuts] == [2, 1, None, None, None]
    assert [one.nms for one in cuts] == [None, None, None, 0.8, 0.8]
    assert cut_choices(BF16, 1, has_proposals=False) == [replace(BF16, nms=0.8)]


def test_medians_of_interleaved_times():
    order = []

    def network(name, milliseconds):
        def run(images):
            order.append(name)
            end = time.process_time() + milliseconds * len(images) / 1000
            while time.process_time() < end:
                pass

        return run

    batch = np.zeros((2, 3, 8, 8), dtype=np.uint8)
    times = time_networks(
        {AS_EVALUATED: network("slow", 4), ONNX: network("fast", 1)}, [batch], seconds=0, least=5
    )
    assert order == ["slow", "fast"] * 6, "once to warm up, then in turn"
    assert times[ONNX].batches == 5
    assert times[ONNX].cpu_ms == pytest.approx(1, rel=0.3), "milliseconds an image"
    assert times[AS_EVALUATED].cpu_ms == pytest.approx(4, rel=0.3)
    assert times[AS_EVALUATED].wall_ms >= 0.9 * times[AS_EVALUATED].cpu_ms


def test_report_in_a_file(report, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights.safetensors").write_bytes(b"weights")
    with pytest.raises(ModelError, match="not found; `runkey speed KEY` writes it"):
        find_report(model)
    path = tmp_path / SPEED_JSON
    write_report(path, report)
    assert read_report(path) == report
    with pytest.raises(ModelError, match="of other weights"):
        find_report(model)
    own = replace(report, weights=sha256_file(model / "weights.safetensors"))
    write_report(path, own)
    assert find_report(model) == own
    for text in ("{", "[]", '{"format": 2}', '{"format": 1, "key": 3}'):
        path.write_text(text)
        with pytest.raises(ModelError, match=r"speed\.json"):
            read_report(path)


@pytest.fixture(scope="module")
def detector():
    section = params.Model(hidden_dim=16, num_heads=2, feedforward_dim=16, num_queries=6)
    torch.manual_seed(0)
    return build_model(section, 3).eval()


def test_networks_of_all_choices_agree(detector, tmp_path):
    import_extra("openvino")
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 40, 56), dtype=np.uint8)
    opener = NetworkOpener(detector, tmp_path, calibration=lambda: list(images[:, 0]))
    expected = opener.open(AS_EVALUATED)(images[0])
    choices = format_choices(["torch", "onnx", "openvino"])
    assert len(choices) == 10
    for choice in choices:
        scores, labels, boxes = opener.open(choice)(images[0])
        within = 1e-5 if choice.precision == "fp32" else 0.02
        np.testing.assert_allclose(scores, expected[0], atol=within, err_msg=choice.name)
        assert labels.dtype == np.int64
        assert boxes.shape == (2, len(scores[0]), 4)
    # Whole and quantised, for OpenVINO another one: its matrix products stay as they are.
    assert len(list(tmp_path.glob("*.onnx"))) == 3


def test_any_number_of_shapes_in_openvino(detector, tmp_path):
    """The first shapes have a compiled model each, the others share one."""
    import_extra("openvino")
    opener = NetworkOpener(detector, tmp_path)
    network, torch_network = (
        opener.open(Choice("openvino", "fp32", FOLDED)),
        opener.open(AS_EVALUATED),
    )
    shapes = [(1, 3, 24, 32 + 8 * number) for number in range(6)] + [(2, 3, 24, 32)]
    for shape in [*shapes, *shapes]:
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        np.testing.assert_allclose(network(images)[0], torch_network(images)[0], atol=1e-5)
