"""Write a model as ONNX, as a torch program or for OpenVINO, to be run without this project.

The graphs take any batch, height and width. `runkey.pipeline.export` compares what is written here
with the model itself before it is called done.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from runkey.errors import ModelError
from runkey.files import room, write_atomically, write_json
from runkey.inference.extras import import_extra
from runkey.inference.module import InferenceModule, InferenceOptions
from runkey.inference.networks import (
    CARD_JSON,
    FILES,
    INPUT,
    METADATA,
    OUTPUTS,
    Card,
    one_line,
    quiet_logging,
)
from runkey.model.detr import Detector

Format = Literal["onnx", "torch", "openvino"]
Precision = Literal["fp32", "bf16", "int8"]

RUNTIMES = {"onnx": "onnxruntime", "torch": "torch", "openvino": "openvino"}
"""The package that runs each format."""
DETECT_PY = "detect.py"
_LOADERS = {
    "openvino": """\
    import openvino

    hint = {"INFERENCE_PRECISION_HINT": "f32" if CARD["precision"] == "fp32" else "bf16"}
    model = openvino.Core().compile_model(path, "CPU", hint)
    return lambda images: list(model([images]).values())
""",
    "torch": """\
    import warnings

    import torch

    warnings.filterwarnings("ignore", "The given buffer is not writable")  # of torch.export.load
    program = torch.export.load(path).module()
    return lambda images: [answer.numpy() for answer in program(torch.from_numpy(images))]
""",
}
"""The lines of `load_network` in detect.py, which itself is for ONNX."""
_OPSET = 17
_EXAMPLE = (2, 3, 96, 128)
_FEW, _MOST_HALF = 256, 60_000.0
"""Fewer numbers are not worth a node; float16 ends at 65,504."""
_REFUSED = {
    ("onnx", "bf16"): "ONNX Runtime has no bf16 on processors; take --format openvino, or int8",
    ("torch", "int8"): "a torch program has no int8 here; take --format onnx or openvino",
}


def check_choice(export: Format, precision: Precision) -> None:
    """Check that the packages are there, and that the format has that precision.

    Raises:
        LockError: a package is not installed.
        ModelError: the format does not have the precision.
    """
    if (export, precision) in _REFUSED:
        raise ModelError(f"{export} {precision}: {_REFUSED[export, precision]}")
    if export != "torch":
        import_extra("onnx")
        import_extra(RUNTIMES[export])
    if precision == "int8":
        import_extra("onnxruntime")


def write_export(
    detector: Detector,
    card: Card,
    folder: Path,
    *,
    options: InferenceOptions,
    calibration: Sequence[NDArray[np.uint8]] = (),
) -> None:
    """Write the model's file, card.json and detect.py into a folder.

    Args:
        detector: a trained one; it is not changed.
        card: says the format, the precision and the file's name; it is written as it is.
        folder: made if it is not there.
        options: what else makes the network faster; see `InferenceOptions`.
        calibration: for int8, images uint8 [3, h, w] that activations are measured on; empty: the
            convolutions stay in fp32.

    Raises:
        ModelError: `options` do not fit the detector.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / card["file"]
    if card["export"] == "torch":
        options = replace(options, bf16=card["precision"] == "bf16")
        write_program(detector, options, path)
    else:
        model = to_onnx(InferenceModule(detector, options))
        if card["precision"] == "int8":
            model = quantised(model, calibration, matrices=card["export"] == "onnx")
        if card["export"] == "onnx":
            write_atomically(path, _with_card(model, card))
        else:
            _write_openvino(model, path)
    write_json(folder / CARD_JSON, card)
    write_atomically(folder / DETECT_PY, detect_py(card["export"]))


def detect_py(export: str) -> str:
    """Return the text of the program beside an export."""
    text = (Path(__file__).parent / "templates" / DETECT_PY).read_text(encoding="utf-8")
    if export == "onnx":
        return text
    loader = text[text.index("    import onnxruntime") : text.index("\n\ndef read_image")]
    install = text[text.index("onnxruntime, numpy") : text.index('\n"""\n')]
    text = text.replace(install, f"{RUNTIMES[export]}, numpy and pillow.")
    return text.replace(loader, _LOADERS[export])


def to_onnx(module: InferenceModule) -> bytes:
    """Convert a module to an ONNX model with free batch, height and width."""
    import_extra("onnx")
    buffer = io.BytesIO()
    free = {INPUT: {0: "batch", 2: "height", 3: "width"}}
    free |= {name: {0: "batch"} for name in OUTPUTS}
    with _quiet():
        # By tracing: torch's newer exporter takes ten times as long, and more packages.
        torch.onnx.export(
            module,
            (torch.zeros(_EXAMPLE, dtype=torch.uint8),),
            cast(Any, buffer),
            dynamo=False,
            opset_version=_OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_axes=free,
        )
    return buffer.getvalue()


def halve_weights(network: bytes) -> bytes:
    """Store the weights of an ONNX model in float16; it computes in float32 as before.

    Small tensors, and those with numbers that float16 cannot hold, stay as they are.
    """
    onnx = import_extra("onnx")
    model = onnx.load_from_string(network)
    casts = []
    for weight in model.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < _FEW or np.abs(values).max() > _MOST_HALF:
            continue
        name = weight.name
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        to = onnx.TensorProto.FLOAT
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=to))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    halved: bytes = model.SerializeToString()
    return halved


def write_program(detector: Detector, options: InferenceOptions, path: Path) -> None:
    """Write a program of `torch.export` with free batch, height and width.

    Its least height and width are one pixel more than the backbone's largest stride.
    """
    module = InferenceModule(detector, options)
    least = detector.body.strides[-1] + 1
    sides = {axis: torch.export.Dim(f"axis{axis}", min=least) for axis in (2, 3)}
    free = {0: torch.export.Dim("batch"), **sides}
    example = torch.zeros(_EXAMPLE, dtype=torch.uint8)
    with _quiet():
        program = torch.export.export(module, (example,), dynamic_shapes=(free,))
    # Not to the file: on a full disk torch's own writer ends the process.
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_atomically(path, buffer.getvalue())


def quantised(model: bytes, images: Sequence[NDArray[np.uint8]], *, matrices: bool = True) -> bytes:
    """Quantise an ONNX model to int8.

    Convolutions get ranges that are measured on images (per channel; the first and the projection
    behind the backbone stay in fp32), matrix products the ranges of each run.

    Args:
        model: see `to_onnx`.
        images: uint8 [3, h, w]; none: convolutions stay in fp32.
        matrices: quantise matrix products, too. OpenVINO is faster without.
    """
    onnx, quantization = import_extra("onnx"), import_extra("onnxruntime.quantization")
    reader = _Reader({INPUT: image[None]} for image in images)
    nodes = onnx.load_model_from_string(model).graph.node
    convolutions = [node.name for node in nodes if node.op_type == "Conv"]
    with TemporaryDirectory() as name, _quiet():
        start, middle, end = (str(Path(name) / f"{step}.onnx") for step in range(3))
        Path(start).write_bytes(model)
        if images:
            quantization.quantize_static(
                start,
                middle,
                reader,
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_exclude=[convolutions[0], convolutions[-1]],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
            start = middle
        if not matrices:
            return Path(start).read_bytes()
        quantization.quantize_dynamic(start, end, op_types_to_quantize=["MatMul", "Gemm"])
        return Path(end).read_bytes()


class _Reader:
    """Hands ONNX Runtime the inputs that it measures activations on."""

    def __init__(self, inputs: Iterable[dict[str, Any]]) -> None:
        self._inputs = iter(inputs)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._inputs, None)


def versions(export: Format) -> dict[str, str]:
    """Return the versions of Python and of the packages that made an export and run it."""
    names = {"torch", "numpy", "pillow", RUNTIMES[export], *(["onnx"] * (export != "torch"))}
    return {"python": sys.version.split()[0]} | {name: version(name) for name in sorted(names)}


def _with_card(model: bytes, card: Card) -> bytes:
    """The ONNX model with the card in its metadata."""
    onnx = import_extra("onnx")
    proto = onnx.load_model_from_string(model)
    proto.producer_name = "runkey"
    onnx.helper.set_model_props(proto, {METADATA: json.dumps(card, ensure_ascii=False)})
    return cast(bytes, proto.SerializeToString())


def _write_openvino(model: bytes, path: Path) -> None:
    openvino = import_extra("openvino")
    with TemporaryDirectory() as name:
        source = Path(name) / FILES["onnx"]
        write_atomically(source, model)
        try:
            openvino.save_model(openvino.Core().read_model(source), path, compress_to_fp16=False)
        except RuntimeError as error:
            raise ModelError(
                f"{path}: OpenVINO cannot write it ({one_line(error)}); {room(path, len(model))}"
            ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what exporters warn of: traced constants, their own future, a step that needs none."""
    with quiet_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
