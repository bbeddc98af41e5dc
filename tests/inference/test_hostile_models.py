"""Models from elsewhere: each odd card, network or file ends in one line, and none gives nonsense.

The networks answer constants, so that each fault of an answer is tried alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import runkey
from runkey.errors import ModelError
from runkey.inference.export import write_export
from runkey.inference.extras import import_extra
from runkey.inference.model import InferenceCard, Model, load_model_folder
from runkey.inference.module import EXPORTED
from runkey.inference.networks import CheckedNetwork, OnnxNetwork, TorchNetwork, find_device
from runkey.inference.predict import Options, find_sources, predict
from runkey.inference.thresholds import read_thresholds
from runkey.inference.tile import Tiling
from runkey.model.weights import load_model
from tests.inference.test_export import SITE, card_of
from tests.support.exportable import CLASSES, SIZES, save_images, save_small_model

needs_onnx = pytest.mark.skipif(SITE is None, reason="`make env-export` installs ONNX Runtime")
SCORES = np.array([[0.9, 0.8]], np.float32)
LABELS = np.array([[0, 1]])
BOXES = np.array([[[0, 0, 0.5, 0.5], [0.1, 0.1, 0.2, 0.2]]], np.float32)
IMAGES = np.zeros((1, 3, 48, 64), np.uint8)


class Constant(nn.Module):
    """Answers the same to any image."""

    def __init__(self, *answers: np.ndarray) -> None:
        super().__init__()
        self.answers = tuple(map(torch.from_numpy, answers))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.answers


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        ((SCORES * 37, LABELS, BOXES), "score 33.3 is not in 0..1"),
        ((-SCORES, LABELS, BOXES), "score -0.9 is not in 0..1"),
        ((SCORES * np.inf, LABELS, BOXES), "score inf is not in 0..1"),
        ((SCORES, LABELS + 7, BOXES), "class index 8, and its card has 2 classes"),
        ((SCORES, LABELS - 1, BOXES), "class index -1, and its card has 2 classes"),
        ((SCORES, LABELS, BOXES * 500), "box corner 250 is not in 0..1"),
        ((SCORES, LABELS, 1 - BOXES), "a box ends before it begins"),
        ((SCORES, LABELS.astype(np.float32), BOXES), "answers of types float32, float32, float32"),
        ((SCORES, LABELS[:, :1], BOXES), "shapes [1, 2], [1, 1], [1, 2, 4] do not fit together"),
        ((SCORES[0], LABELS[0], BOXES[0]), "answers of shapes [2], [2], [2, 4] to 1 image"),
        (
            tuple(np.repeat(one, 2, 0) for one in (SCORES, LABELS, BOXES)),
            "answers of shapes [2, 2], [2, 2], [2, 2, 4] to 1 image",
        ),
    ],
)
def test_a_networks_answer_is_checked(answers, line):
    network = CheckedNetwork(TorchNetwork(Constant(*answers)), "a.onnx", len(CLASSES))
    with pytest.raises(ModelError) as caught:
        network(IMAGES)
    assert str(caught.value).startswith("a.onnx: ")
    assert line in str(caught.value)


def test_other_types_of_a_right_answer_are_taken():
    odd = (SCORES.astype(np.float64), LABELS.astype(np.int32), BOXES.astype(np.float64))
    network = CheckedNetwork(TorchNetwork(Constant(*odd)), "a.onnx", len(CLASSES))
    scores, labels, boxes = network(IMAGES)
    assert (scores.dtype, labels.dtype, boxes.dtype) == (np.float32, np.int64, np.float32)
    none = tuple(one[:, :0] for one in (SCORES, LABELS, BOXES))
    assert CheckedNetwork(TorchNetwork(Constant(*none)), "a", 2)(IMAGES)[0].shape == (1, 0)


@pytest.mark.parametrize("which", [0, 2])
def test_nan_is_no_image_without_detections(which, tmp_path):
    answers = [SCORES, LABELS, BOXES]
    answers[which] = answers[which] * np.nan
    network = CheckedNetwork(TorchNetwork(Constant(*answers)), "a.onnx", len(CLASSES))
    model = Model(InferenceCard(CLASSES, SIZES), network)
    image = save_images(tmp_path / "images", 1)[0]
    with pytest.raises(ModelError, match=r"0\.png: the model predicts NaN or infinity"):
        model(image)
    for tiling in (None, Tiling(40, 40)):
        found = find_sources([str(image)])
        with pytest.raises(ModelError, match=r"0\.png: the model predicts NaN or infinity"):
            predict(model, found, tmp_path / "out", Options(tiling=tiling, batch_size=1))


def onnx_of(answers=(SCORES, LABELS, BOXES), external: str | None = None) -> bytes:
    """A model of constants, with a tensor in the file `external`."""
    onnx = import_extra("onnx")
    names = ("scores", "labels", "boxes_xyxy")
    tensors = [
        onnx.numpy_helper.from_array(one, f"{name}_")
        for one, name in zip(answers, names, strict=True)
    ]
    nodes = [onnx.helper.make_node("Identity", [f"{name}_"], [name]) for name in names]
    if external:
        far = onnx.TensorProto(name="far", data_type=1, dims=[4], data_location=1)
        for key, value in (("location", external), ("offset", "0"), ("length", "16")):
            entry = far.external_data.add()
            entry.key, entry.value = key, value
        tensors.append(far)
        nodes.append(onnx.helper.make_node("Add", ["far", "far"], ["sum"]))
    outputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(one.dtype), one.shape
        )
        for one, name in zip(answers, names, strict=True)
    ]
    image = onnx.helper.make_tensor_value_info("images", 2, ["b", 3, "h", "w"])
    graph = onnx.helper.make_graph(nodes, "g", [image], outputs, initializer=tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.helper.set_model_props(model, {"runkey": json.dumps(card_of("onnx"))})
    return model.SerializeToString()


@needs_onnx
@pytest.mark.parametrize("place", ["../secret.bin", "absolute", "sub/../../secret.bin"])
def test_an_onnx_file_reads_nothing_outside_its_folder(place, tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (tmp_path / "m" / "sub").mkdir(parents=True)
    where = str(tmp_path / "secret.bin") if place == "absolute" else place
    (tmp_path / "m" / "a.onnx").write_bytes(onnx_of(external=where))
    with pytest.raises(ModelError, match=r"a\.onnx: ONNX Runtime cannot read it \("):
        load_model_folder(tmp_path / "m" / "a.onnx")
    (tmp_path / "m" / "a.onnx").write_bytes(onnx_of())
    assert len(load_model_folder(tmp_path / "m" / "a.onnx")(np.zeros((9, 9, 3), np.uint8))) == 2


@needs_onnx
@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 9999, '{"format": 1}', '{"format": NaN}'])
def test_a_damaged_card_in_the_metadata_is_one_line(text, tmp_path):
    onnx = import_extra("onnx")
    model = onnx.load_model_from_string(onnx_of())
    onnx.helper.set_model_props(model, {"runkey": text})
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError) as caught:
        OnnxNetwork(tmp_path / "a.onnx").card  # noqa: B018
    assert str(caught.value).startswith(f"{tmp_path}/a.onnx: ")


@needs_onnx
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sizes": {"short_side": 0, "long_side": 9, "intensity_range": None}}, "greater than"),
        ({"sizes": {"short_side": 9**9, "long_side": 9, "intensity_range": None}}, "less than"),
        ({"sizes": {"short_side": 9, "long_side": 9, "intensity_range": [5, 1]}}, "5 to 1"),
        ({"sizes": {"short_side": 9, "long_side": 9, "intensity_range": [0, 1e999]}}, "finite"),
        ({"thresholds": {"ball": float("nan")}}, "thresholds.ball"),
        ({"thresholds": {"ball": 1e300}}, "thresholds.ball"),
        ({"thresholds": {"ball": -1}}, "thresholds.ball"),
        ({"classes": [{"index": 0, "id": 10**30, "name": "ball"}]}, "classes.0.id"),
        ({"classes": [{"index": 1, "id": 1, "name": "ball"}]}, "1 class out of order"),
    ],
)
def test_a_card_holds_no_odd_number(change, line, tmp_path):
    (tmp_path / "model.onnx").write_bytes(onnx_of())
    (tmp_path / "card.json").write_text(json.dumps(card_of("onnx") | change))
    with pytest.raises(ModelError, match=r"card\.json: ") as caught:
        load_model_folder(tmp_path)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sizes": {"short_side": 0, "long_side": 80}}, "sizes: 0; from 1"),
        ({"classes": [{"index": 1, "id": 1, "name": "a"}]}, "1 class out of order"),
        ({"model": {"hidden_dim": 2**30}}, "model.hidden_dim: 1073741824, and no tensor has"),
        ({"model": {"num_queries": 2**30}}, "model.num_queries: 1073741824, and no tensor"),
        ({"model": {"decoder_layers": 10**6}}, "1000001 layers, and "),
    ],
)
def test_model_json_takes_no_memory_that_its_weights_do_not(change, line, tmp_path):
    folder = save_small_model(tmp_path / "model")
    card = json.loads((folder / "model.json").read_text())
    if "model" in change:
        change = {"model": card["model"] | change["model"]}
    (folder / "model.json").write_text(json.dumps(card | change))
    with pytest.raises(ModelError) as caught:
        load_model_folder(folder, "cpu")
    assert line in str(caught.value)


@pytest.mark.parametrize("score", ["NaN", "1e300", "-0.1", "Infinity", "null", '"0.5"'])
def test_thresholds_are_fractions(score, tmp_path):
    path = tmp_path / "thresholds.json"
    text = (
        '{"iou": 1, "weights": "", "classes": {"ball": {%s "precision": 1, "recall": 1, "f1": 0}}}'
    )
    path.write_text(text % '"score": 0.5,')
    assert read_thresholds(path)["classes"]["ball"]["score"] == 0.5
    path.write_text(text % f'"score": {score},')
    with pytest.raises(ModelError, match=r"thresholds\.json: classes\.ball\.score"):
        read_thresholds(path)


@pytest.mark.parametrize("name", ["cuda:99", "foo", "meta", "", "xpu"])
def test_a_device_that_is_not_there_is_one_line(name):
    with pytest.raises(ModelError, match=r"not to be had .*leave it out"):
        find_device(name)
    assert find_device("cpu").type == "cpu"


@needs_onnx
@pytest.mark.parametrize("data", [b"", b"PK", b"PK\x05\x06" + bytes(18), b"x" * 5000])
def test_a_damaged_torch_program_is_one_line_without_a_log(data, tmp_path, capfd):
    (tmp_path / "model.pt2").write_bytes(data)
    (tmp_path / "card.json").write_text(json.dumps(card_of("torch")))
    with pytest.raises(ModelError, match=r"model\.pt2: torch cannot read it"):
        load_model_folder(tmp_path, trust=True)
    assert capfd.readouterr().err == ""


def test_the_small_models_of_these_tests_are_sound(tmp_path: Path):
    folder = save_small_model(tmp_path / "model")
    assert load_model_folder(folder, "cpu")(np.zeros((60, 80, 3), np.uint8), score=0).scores.size


@needs_onnx
@pytest.mark.parametrize("odd", ["pipe", "/dev/zero", "cut", "gone"])
def test_an_openvino_model_with_an_odd_bin_is_one_line(odd, tmp_path):
    detector, _ = load_model(save_small_model(tmp_path / "model"))
    write_export(detector, card_of("openvino"), tmp_path / "out", options=EXPORTED)
    weights = tmp_path / "out" / "model.bin"
    data = weights.read_bytes()
    weights.unlink()
    if odd == "pipe":
        os.mkfifo(weights)
    elif odd == "/dev/zero":
        weights.symlink_to(odd)
    elif odd == "cut":
        weights.write_bytes(data[:-9])
    with pytest.raises(ModelError, match=r"model\.xml: OpenVINO cannot read it \("):
        load_model_folder(tmp_path / "out")


def test_a_score_or_an_iou_of_nan_is_refused(tmp_path):
    model = Model(InferenceCard(CLASSES, SIZES), TorchNetwork(Constant(SCORES, LABELS, BOXES)))
    image = save_images(tmp_path / "images", 1)[0]
    for score in (float("nan"), {"ball": float("nan")}):
        with pytest.raises(ModelError, match="nan: give a number from 0 to 1"):
            model(image, score=score)
    for iou in (float("nan"), 0.0, -1.0, 2.0):
        with pytest.raises(ModelError, match="give an IoU above 0, at most 1"):
            model(image, nms=iou)


@needs_onnx
def test_a_torch_program_is_loaded_only_if_it_is_trusted(tmp_path, monkeypatch):
    detector, _ = load_model(save_small_model(tmp_path / "model"))
    for export in ("torch", "onnx"):
        write_export(detector, card_of(export), tmp_path / export, options=EXPORTED)
    opened = []
    load = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda file: opened.append(file) or load(file))
    load_model_folder(tmp_path / "onnx", "cpu")
    image = np.zeros((60, 80, 3), np.uint8)
    for place in (tmp_path / "torch", tmp_path / "torch" / "model.pt2"):
        with pytest.raises(ModelError, match=f"{place}: a torch program can execute code"):
            runkey.load(place, "cpu")
        assert not opened
        assert runkey.load(place, "cpu", trust=True)(image, score=0).scores.size
        assert opened.pop() == tmp_path / "torch" / "model.pt2"


@needs_onnx
@pytest.mark.parametrize("export", ["torch", "onnx", "openvino"])
def test_an_export_that_does_not_fit_on_the_disk_is_one_line(export, tmp_path):
    save_small_model(tmp_path / "model")
    script = (
        "import json, resource\n"
        "from pathlib import Path\n"
        "from runkey.errors import report_errors\n"
        "from runkey.inference.export import write_export\n"
        "from runkey.inference.module import EXPORTED\n"
        "from runkey.model.weights import load_model\n"
        f"detector, _ = load_model(Path({str(tmp_path / 'model')!r}))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        f"card = json.loads({json.dumps(card_of(export))!r})\n"
        "with report_errors():\n"
        f"    write_export(detector, card, Path({str(tmp_path / 'out')!r}), options=EXPORTED)\n"
    )
    # Python 3.12.1 would keep a bytecode file that the limit cuts off.
    here = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    here["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, capture_output=True, text=True, env=here, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "written" in done.stderr or "write" in done.stderr
