"""Exports: each format computes what the model does, for any batch and size, and runs alone."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runkey.errors import ModelError
from runkey.inference import networks
from runkey.inference.export import check_choice, quantised, to_onnx, write_export
from runkey.inference.extras import import_extra
from runkey.inference.model import load_model_folder
from runkey.inference.module import EXPORTED, InferenceModule, InferenceOptions
from runkey.inference.networks import FILES, OnnxNetwork, TorchNetwork, open_export
from runkey.inference.preprocess import read_image
from runkey.model.weights import load_model
from tests.support.exportable import CLASSES, save_images, save_small_model

REPOSITORY = Path(__file__).parents[2]
SITE = next(REPOSITORY.glob(".venv-export/lib/python3*/site-packages"), None)
pytestmark = pytest.mark.skipif(SITE is None, reason="`make env-export` installs ONNX Runtime")
SHAPES = ((1, 48, 64), (3, 60, 48), (2, 24, 80))


def card_of(export: str, precision: str = "fp32", **changes) -> dict:
    return {
        "format": 1,
        "key": None,
        "export": export,
        "precision": precision,
        "file": FILES[export],
        "classes": [{"index": one.index, "id": one.id, "name": one.name} for one in CLASSES],
        "sizes": {"short_side": 48, "long_side": 80, "intensity_range": None},
        "thresholds": {"ball": 0.25},
        **changes,
    }


@pytest.fixture(scope="module", params=["fast", "detr"])
def detector(request, tmp_path_factory):
    return load_model(save_small_model(tmp_path_factory.mktemp("m") / "model", request.param))[0]


def images_of(count: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height)
    return rng.integers(0, 256, (count, 3, height, width), dtype=np.uint8)


def assert_same(answers, expected, within: float) -> None:
    for got, wanted in zip(answers, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=within)


ODD = [(2, 97, 131), (1, 64, 96), (2, 35, 200)]


@pytest.mark.parametrize("strides", ["auto", (8, 16, 32)])
@pytest.mark.parametrize("export", ["torch", "onnx", "openvino"])
def test_a_body_that_pads_gives_its_numbers_for_odd_sizes(export, strides, tmp_path):
    """What is exported pads, and cuts off, as the model does; the two are what `evaluate` runs."""
    changes = {"backbone": "lite0", "feature_strides": strides}
    detector, _ = load_model(save_small_model(tmp_path / "model", **changes))
    write_export(detector, card_of(export), tmp_path / "out", options=EXPORTED)
    network, model = open_export(tmp_path / "out").network, TorchNetwork(InferenceModule(detector))
    for shape in ODD:
        images = images_of(*shape)
        assert_same(network(images), model(images), 2e-5)


@pytest.mark.parametrize("export", ["onnx", "openvino"])
def test_an_export_gives_the_models_numbers_for_any_batch_and_size(detector, export, tmp_path):
    write_export(detector, card_of(export), tmp_path / "out", options=EXPORTED)
    network, model = open_export(tmp_path / "out").network, TorchNetwork(InferenceModule(detector))
    for shape in SHAPES:  # 24 x 80 are 30 tokens of the compact backbone
        images = images_of(*shape)
        assert_same(network(images), model(images), 1e-5)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"card.json", "detect.py", FILES[export]} <= names


@pytest.mark.parametrize(("preset", "precision"), [("fast", "fp32"), ("detr", "bf16")])
def test_an_exported_torch_program(preset, precision, tmp_path):
    detector, _ = load_model(save_small_model(tmp_path / "model", preset))
    write_export(detector, card_of("torch", precision), tmp_path / "out", options=EXPORTED)
    network, model = open_export(tmp_path / "out").network, TorchNetwork(InferenceModule(detector))
    for shape in SHAPES:
        images = images_of(*shape)
        apart = np.abs(network(images)[0] - model(images)[0]).max()
        assert apart < 1e-5 if precision == "fp32" else 1e-4 < apart < 0.1
    with pytest.raises(ModelError, match=r"model\.pt2: takes no images of 80x8 after resizing \("):
        network(images_of(1, 8, 80))


def test_int8_quantises_convolutions_by_images_and_products_by_each_run(detector):
    plain = to_onnx(InferenceModule(detector, EXPORTED))
    model = OnnxNetwork(plain)
    images = [image[0] for image in (images_of(1, 48, 64), images_of(1, 60, 48))]
    onnx = import_extra("onnx")
    counts = []
    for given in (images, []):
        made = quantised(plain, given)
        kinds = [node.op_type for node in onnx.load_model_from_string(made).graph.node]
        counts.append((kinds.count("QuantizeLinear") > 0, kinds.count("MatMulInteger") > 5))
        for shape in SHAPES:
            answers = OnnxNetwork(made)(images_of(*shape))
            assert np.abs(answers[0] - model(images_of(*shape))[0]).max() < 0.2
    assert counts == [(True, True), (False, True)]
    assert quantised(plain, images) == quantised(plain, images)


@pytest.mark.parametrize(
    ("export", "precision", "line"),
    [
        ("onnx", "bf16", "onnx bf16: ONNX Runtime has no bf16 on processors; take --format openv"),
        ("torch", "int8", "torch int8: a torch program has no int8 here; take --format onnx"),
    ],
)
def test_what_a_format_lacks_is_refused(export, precision, line):
    with pytest.raises(ModelError) as caught:
        check_choice(export, precision)
    assert str(caught.value).startswith(line)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An ONNX export, and the folder of the model that it was made of."""
    folder = tmp_path_factory.mktemp("exported")
    detector, _ = load_model(save_small_model(folder / "model"))
    write_export(detector, card_of("onnx"), folder / "out", options=EXPORTED)
    return folder


def test_the_loader_takes_a_folder_a_file_and_an_onnx_file_alone(exported, tmp_path):
    (tmp_path / "alone.onnx").write_bytes((exported / "out/model.onnx").read_bytes())
    model, image = load_model_folder(exported / "model"), save_images(tmp_path)[1]
    expected = model(image, score=0)
    for path in (exported / "out", exported / "out/model.onnx", tmp_path / "alone.onnx"):
        other = load_model_folder(path)
        found = other(image, score=0)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=1e-3)
        assert other.card.thresholds == {"ball": 0.25}
        assert found.names == expected.names


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda f: (f / "model.onnx").write_bytes(b"x" * 50), "model.onnx: ONNX Runtime cannot re"),
        (lambda f: (f / "model.onnx").unlink(), "model.onnx: not found; export the model again"),
        (lambda f: (f / "card.json").write_text("{"), "card.json: no card of an export ("),
        (lambda f: (f / "card.json").write_text('{"format": 9}'), "format 9, this program reads 1"),
        (
            lambda f: (f / "card.json").write_text(json.dumps(card_of("onnx", file="../a.onnx"))),
            "file '../a.onnx': no model's file beside the card",
        ),
    ],
)
def test_a_damaged_export_is_one_line(exported, tmp_path, damage, line):
    for file in (exported / "out").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(ModelError) as caught:
        open_export(tmp_path)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_onnx_file_of_another_model_is_refused(exported, tmp_path):
    onnx = import_extra("onnx")
    model = onnx.load(str(exported / "out/model.onnx"))
    model.graph.output.pop()
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(ModelError, match="its tensors are images, scores, labels, not images, sc"):
        open_export(tmp_path / "other.onnx")


ALONE = f"""\
import sys
sys.path.append({str(SITE)!r})
for name in ("torch", "runkey", "pycocotools", "scipy"):
    sys.modules[name] = None
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_detect_py_sees_what_the_loader_sees_without_this_project(exported, tmp_path):
    """Of 16-bit grey, transparent and EXIF-turned files too; a broken one is named."""
    from PIL import Image

    paths = save_images(tmp_path / "in")
    wide = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "in/wide.png")
    Image.open(paths[0]).convert("LA").save(tmp_path / "in/clear.png")
    (tmp_path / "in/broken.jpg").write_bytes(b"\xff\xd8\xff")
    files = sorted((tmp_path / "in").iterdir())
    options = ["--score", "0", "--draw", str(tmp_path / "drawn")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(exported / "out/detect.py"), *options, *files],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"{tmp_path}/in/broken.jpg: cannot be read (")
    assert len(done.stderr.splitlines()) == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["file"] for line in lines] == [str(f) for f in files if f.suffix == ".png"]
    model = load_model_folder(exported / "model")
    for line in lines:
        found = model(line["file"], score=0)
        detections = line["detections"]
        assert len(detections) == len(found) == 24
        np.testing.assert_allclose([d["score"] for d in detections], found.scores, atol=1e-5)
        boxes = [d["box_xyxy"] for d in detections]
        np.testing.assert_allclose(boxes, found.boxes_xyxy, atol=1e-2)
        assert [d["class"] for d in detections] == found.names
        drawn = tmp_path / "drawn" / Path(line["file"]).name
        with Image.open(drawn) as image:
            assert image.size == found.image_size[::-1] == read_image(drawn).shape[1::-1]


@pytest.mark.parametrize(("export", "precision"), [("openvino", "int8"), ("torch", "fp32")])
def test_detect_py_runs_other_exports_as_the_loader_does(tmp_path, monkeypatch, export, precision):
    monkeypatch.setattr(networks, "_MOST_SHAPES", 0)  # compiled for any shape, as in detect.py
    detector, _ = load_model(save_small_model(tmp_path / "model"))
    card = card_of(export, precision, thresholds={"ball": 0, "cube": 0})
    images = [image[0] for image in (images_of(1, 48, 64), images_of(1, 60, 48))]
    write_export(detector, card, tmp_path / "out", options=EXPORTED, calibration=images)
    assert "onnx" not in (tmp_path / "out/detect.py").read_text()
    path = save_images(tmp_path / "in")[0]
    alone = ALONE.replace('"torch", ', "") if export == "torch" else ALONE
    done = subprocess.run(
        [sys.executable, "-I", "-c", alone, str(tmp_path / "out/detect.py"), path],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert not done.stderr
    found = load_model_folder(tmp_path / "out", trust=True)(path, score=0)
    scores = [one["score"] for one in json.loads(done.stdout)["detections"]]
    np.testing.assert_allclose(scores, found.scores, atol=1e-5)


class SignalStack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    @classmethod
    def now(cls) -> tuple[int, int, int]:
        found = cls()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
        return found.start, found.flags, found.size


def test_openvino_leaves_the_signal_stack_of_the_process(tmp_path):
    """Its compiler sets a smaller one, on which a signal ended processes with faulthandler."""
    detector, _ = load_model(save_small_model(tmp_path / "model"))
    write_export(detector, card_of("openvino"), tmp_path / "out", options=EXPORTED)
    before = SignalStack.now()
    network = open_export(tmp_path / "out").network
    for shape in SHAPES:
        network(images_of(*shape))
    assert SignalStack.now() == before
    # A job in the background of a shell ignores the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_options_are_exported(tmp_path):
    detector, _ = load_model(save_small_model(tmp_path / "model"))
    options = InferenceOptions(proposals_only=True, fold_norms=True)
    network = OnnxNetwork(to_onnx(InferenceModule(detector, options)))
    images = images_of(2, 48, 64)
    assert_same(network(images), TorchNetwork(InferenceModule(detector, options))(images), 1e-5)
