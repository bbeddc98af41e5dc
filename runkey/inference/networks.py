"""What runs a model's forward pass: torch, ONNX Runtime, OpenVINO, or an exported torch program.

    network = OnnxNetwork(Path("model.onnx"))
    scores, labels, boxes_xyxy = network(images)         # uint8 [B, 3, h, w], of one shape

`open_export` opens what `runkey export-model` wrote, with its card.
"""

from __future__ import annotations

import ctypes
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat
from torch import nn

from runkey.errors import LockError, ModelError, RunkeyError
from runkey.files import FormatError, expect, open_plain, parse_json, read_json
from runkey.inference.extras import import_extra
from runkey.units import counted

Arrays = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]
"""Scores [B, n], labels [B, n], boxes xyxy [B, n, 4]; see `Network`."""
INPUT, OUTPUTS = "images", ("scores", "labels", "boxes_xyxy")
"""Names of an exported model's input and outputs."""
CARD_JSON, METADATA = "card.json", "runkey"
"""The card's file, and its name in an ONNX file's metadata."""
FILES = {"onnx": "model.onnx", "torch": "model.pt2", "openvino": "model.xml"}
"""The model's file by export format."""
_FORMAT = 1
_MOST_SHAPES = 4
"""For which OpenVINO compiles a model of their own."""
_FORMATS = {Path(name).suffix: format_ for format_, name in FILES.items()}


class Network(Protocol):
    """What runs a model's forward pass; n is at most 100."""

    def __call__(self, images: NDArray[np.uint8]) -> Arrays:
        """Run a batch of one shape.

        Args:
            images: uint8 [B, 3, h, w], as `Preprocess` makes them.

        Returns:
            Scores float32 [B, n], descending; labels int64 [B, n]; boxes xyxy float32 [B, n, 4],
            fractions of the width and height in 0..1.
        """


def find_device(name: torch.device | str | None) -> torch.device:
    """Return a device that computes here; None: the GPU if there is one, else the CPU.

    Raises:
        ModelError: there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device {name}: not to be had ({one_line(error)[:60]}); give cpu, cuda or cuda:1, or"
            " leave it out"
        ) from None
    return device


class TorchNetwork:
    """A module in torch, such as `InferenceModule`; without options, what `evaluate` computes."""

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu") -> None:
        """Args: module: uint8 images to scores, labels and boxes. device: where it runs."""
        self.device = torch.device(device)
        self.module = module.to(self.device)

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Arrays:
        """See `Network`."""
        answers = self.module(torch.from_numpy(images).to(self.device))
        return cast(Arrays, tuple(answer.cpu().numpy() for answer in answers))


class ExportedTorchNetwork(TorchNetwork):
    """A program that `torch.export` saved (`.pt2`). Loading a file can run code that is in it."""

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        """Load a program; ModelError if the file is damaged."""
        with _readable(path, "torch"), warnings.catch_warnings(), quiet_logging():
            warnings.simplefilter("ignore")  # of a buffer that is only read
            if not zipfile.is_zipfile(path):
                raise ValueError("cut short, or no program")
            program = torch.export.load(path)
        super().__init__(program.module(), device)
        self._name = path

    def __call__(self, images: NDArray[np.uint8]) -> Arrays:
        """See `Network`; ModelError for images smaller than the program takes."""
        try:
            return super().__call__(images)
        except AssertionError as error:  # how torch says that a shape is none of the program's
            height, width = images.shape[2:]
            reason = " ".join(str(error).split())[:80]
            raise ModelError(
                f"{self._name}: takes no images of {width}x{height} after resizing ({reason});"
                " export as onnx, which takes any size"
            ) from None


class OnnxNetwork:
    """An ONNX file in ONNX Runtime."""

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int | None = None,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
    ) -> None:
        """Load a model.

        Args:
            model: file, or its bytes.
            threads: of one run; None: all cores.
            providers: where it runs, by ONNX Runtime's names, or pairs of name and options.

        Raises:
            LockError: ONNX Runtime is not installed.
            ModelError: the file is damaged, or something else.
        """
        self._name = str(model) if isinstance(model, Path) else "the model's bytes"
        runtime = import_extra("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Threads that wait in a loop double the CPU time, which decoding needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors
        with _readable(model, "ONNX Runtime"):
            if isinstance(model, Path):
                open_plain(model).close()
            self.session = runtime.InferenceSession(
                model if isinstance(model, bytes) else str(model),
                options,
                providers=list(providers),
            )
            wanted = (INPUT, *OUTPUTS)
            names = [one.name for one in (*self.session.get_inputs(), *self.session.get_outputs())]
            if tuple(names) != wanted:
                raise ValueError(f"its tensors are {', '.join(names)}, not {', '.join(wanted)}")

    @property
    def card(self) -> Card | None:
        """The card in the file's metadata."""
        text = self.session.get_modelmeta().custom_metadata_map.get(METADATA)
        if text is None:
            return None
        try:
            return _check_card(parse_json(text), self._name)
        except FormatError as error:
            raise ModelError(f"{self._name}: no card of an export ({error})") from None

    def __call__(self, images: NDArray[np.uint8]) -> Arrays:
        """See `Network`."""
        return cast(Arrays, tuple(self.session.run(list(OUTPUTS), {INPUT: images})))


class OpenVinoNetwork:
    """A model in OpenVINO's format (model.xml beside model.bin), on the CPU."""

    def __init__(self, path: Path, *, precision: str = "fp32", threads: int | None = None) -> None:
        """Load a model.

        Args:
            path: of the .xml file, or of an ONNX file.
            precision: `fp32`, `bf16`, or `int8`, where all but quantised layers are in bf16.
            threads: of one run; None: all cores.

        Raises:
            LockError: OpenVINO is not installed.
            ModelError: the file is damaged.
        """
        core = import_extra("openvino").Core()
        # OpenVINO would take bf16 by itself where the processor has it.
        hints = {"INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16"}
        if threads:
            hints["INFERENCE_NUM_THREADS"] = str(threads)
        with _readable(path, "OpenVINO"):
            files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
            for file in files:  # a pipe would be waited for
                open_plain(file).close()
            self._model = core.read_model(str(path))
        self._core, self._hints = core, hints
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, images: NDArray[np.uint8]) -> Arrays:
        """See `Network`."""
        answers = self._compiled_for(images.shape)([images])
        scores, labels, boxes = (answers[index] for index in range(len(OUTPUTS)))
        return scores, labels.astype(np.int64), boxes

    def _compiled_for(self, shape: tuple[int, ...]) -> Any:
        """The model compiled for a shape, which takes up to half less time than one for any.

        Further shapes share one for any: each compiled model has its own copy of the weights.
        """
        if shape not in self._compiled and len(self._compiled) >= _MOST_SHAPES:
            shape = ()
        if shape not in self._compiled:
            model = self._model.clone()
            if shape:
                model.reshape(list(shape))
            with _own_signal_stack():
                self._compiled[shape] = self._core.compile_model(model, "CPU", self._hints)
        return self._compiled[shape]


class _SignalStack(ctypes.Structure):
    """C's `stack_t`."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _own_signal_stack() -> Iterator[None]:
    """Put this thread's signal stack back at the end.

    OpenVINO's compiler leaves a smaller one, on which a signal such as Ctrl-C has ended processes
    with PYTHONFAULTHANDLER.
    """
    before, libc = _SignalStack(), ctypes.CDLL(None)
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


class CheckedNetwork:
    """A network of unknown origin: what it raises or answers wrongly becomes one line."""

    def __init__(self, network: Network, name: str, classes: int) -> None:
        """Args: network: any. name: of its file, for messages. classes: how many it knows."""
        self.network, self.name, self._classes = network, name, classes

    def __call__(self, images: NDArray[np.uint8]) -> Arrays:
        """See `Network`.

        Raises:
            ModelError: the network fails, or does not answer what `Network` says. NaN is let
                through: who knows the image names it.
        """
        try:
            answers = self.network(images)
        except RunkeyError:
            raise
        except Exception as error:  # noqa: BLE001 - each runtime has its own types
            size = f"{images.shape[3]}x{images.shape[2]}"
            raise ModelError(
                f"{self.name}: fails on {counted(len(images), 'image')} of {size} after resizing"
                f" ({one_line(error)})"
            ) from None
        if fault := self._fault(answers, len(images)):
            raise ModelError(f"{self.name}: {fault}; `runkey export-model` writes what fits")
        scores, labels, boxes = answers
        return (
            scores.astype(np.float32, copy=False),
            labels.astype(np.int64, copy=False),
            boxes.astype(np.float32, copy=False),
        )

    def _fault(self, answers: Arrays, images: int) -> str | None:
        scores, labels, boxes = answers
        shapes = ", ".join(str(list(one.shape)) for one in answers)
        if scores.ndim != 2 or len(scores) != images:
            return f"answers of shapes {shapes} to {counted(images, 'image')}"
        if labels.shape != scores.shape or boxes.shape != (*scores.shape, 4):
            return f"answers of shapes {shapes} do not fit together"
        kinds = "".join(one.dtype.kind for one in answers)
        if kinds not in ("fif", "fuf"):
            return f"answers of types {', '.join(str(one.dtype) for one in answers)}"
        if labels.size and not 0 <= labels.min() <= labels.max() < self._classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            return f"class index {wrong}, and its card has {counted(self._classes, 'class')}"
        for what, values in (("score", scores), ("box corner", boxes)):
            if outside := values[(values < -_ROUNDING) | (values > 1 + _ROUNDING)].tolist():
                return f"{what} {outside[0]:g} is not in 0..1"
        if (boxes[..., 2:] < boxes[..., :2] - _ROUNDING).any():
            return "a box ends before it begins"
        return None


_ROUNDING = 1e-3
"""By which int8 or bf16 may leave 0..1."""
_Fraction = Annotated[float, Field(ge=0, le=1)]
_ShortSide = Annotated[int, Field(ge=1, le=2**14)]
_LongSide = Annotated[int, Field(ge=1, le=2**32)]


class _Class(TypedDict):
    index: int
    id: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    name: str


class _Sizes(TypedDict):
    short_side: _ShortSide
    long_side: _LongSide
    intensity_range: tuple[FiniteFloat, FiniteFloat] | None


class Card(TypedDict):
    """card.json of an export: what its reader needs to know."""

    format: int
    key: str | None
    """Of the run that trained the model."""
    export: str
    """`onnx`, `torch` or `openvino`."""
    precision: str
    """`fp32`, `bf16` or `int8`."""
    file: str
    """The model's file, beside the card."""
    classes: list[_Class]
    sizes: _Sizes
    """Of images, pixels; see `runkey.model.weights.Sizes`."""
    thresholds: dict[str, _Fraction]
    """Score of the best F1 on the val images, by class name."""
    weights: NotRequired[str]
    """sha256 of the trained weights."""
    preset: NotRequired[str]
    options: NotRequired[dict[str, Any]]
    """Those of `InferenceOptions` that are set."""
    parts: NotRequired[dict[str, str]]
    """Digests of the key's four parts."""
    data: NotRequired[dict[str, Any]]
    """md5 and number of the training data's images."""
    started_from: NotRequired[dict[str, str | None]]
    """Key of the run whose weights training began with, their sha256, the parameter's name."""
    pretrained: NotRequired[dict[str, str]]
    """Published weights that training began with: name, file, sha256, licence."""
    licence: NotRequired[list[str]]
    """What the training data say of their licences and authors."""
    environment: NotRequired[dict[str, str]]
    """Versions of Python and of the packages that made the export."""


@dataclass(frozen=True, slots=True)
class Export:
    """What `runkey export-model` wrote, ready to run."""

    card: Card
    network: Network


def open_export(path: Path, device: torch.device | str = "cpu") -> Export:
    """Open an export: its folder, or the model's file in it; an ONNX file needs nothing beside it.

    Args:
        path: a folder with card.json, or a file .onnx, .pt2 or .xml.
        device: where an exported torch program runs; the others run on the CPU.

    Raises:
        LockError: what runs it is not installed.
        ModelError: no export, or a damaged one.
    """
    if path.is_dir():
        card = read_export_card(path / CARD_JSON)
        file = path / Path(card["file"]).name
        return _checked(card, open_network(file, card["precision"], device), file)
    if path.suffix not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ModelError(f"{path}: no exported model; its files end with {known}")
    if path.suffix == ".onnx":
        network = OnnxNetwork(path)
        return _checked(network.card or read_export_card(path.with_name(CARD_JSON)), network, path)
    card = read_export_card(path.with_name(CARD_JSON))
    return _checked(card, open_network(path, card["precision"], device), path)


def _checked(card: Card, network: Network, file: Path) -> Export:
    return Export(card, CheckedNetwork(network, str(file), len(card["classes"])))


def open_network(path: Path, precision: str, device: torch.device | str = "cpu") -> Network:
    """Open the model's file of an export; see `open_export`."""
    if not path.is_file():
        raise ModelError(f"{path}: not found; export the model again")
    openers: Mapping[str, Callable[[], Network]] = {
        ".onnx": lambda: OnnxNetwork(path),
        ".pt2": lambda: ExportedTorchNetwork(path, device),
        ".xml": lambda: OpenVinoNetwork(path, precision=precision),
    }
    return openers[path.suffix]()


def read_export_card(path: Path) -> Card:
    """Read card.json.

    Raises:
        ModelError: it is missing, damaged or of another format.
    """
    try:
        return _check_card(read_json(path), str(path))
    except FileNotFoundError:
        raise ModelError(f"{path}: not found; `runkey export-model` writes it") from None
    except FormatError as error:
        raise ModelError(f"{path}: no card of an export ({error})") from None


def _check_card(tree: Any, where: str) -> Card:
    if isinstance(tree, dict) and tree.get("format") != _FORMAT:
        raise ModelError(f"{where}: format {tree.get('format')}, this program reads {_FORMAT}")
    try:
        card: Card = expect(Card, tree)
    except FormatError as error:
        raise ModelError(f"{where}: no card of an export ({error})") from None
    if Path(card["file"]).name != card["file"] or Path(card["file"]).suffix not in _FORMATS:
        raise ModelError(f"{where}: file {card['file']!r}: no model's file beside the card")
    low, high = card["sizes"]["intensity_range"] or (0.0, 1.0)
    if not low < high:
        raise ModelError(f"{where}: sizes.intensity_range: {low:g} to {high:g}")
    if [one["index"] for one in card["classes"]] != list(range(len(card["classes"]))):
        raise ModelError(f"{where}: {counted(len(card['classes']), 'class')} out of order")
    return card


@contextmanager
def _readable(model: Path | bytes, reader: str) -> Iterator[None]:
    """Turn what a reader raises on a damaged file, of any type, into one line."""
    try:
        yield
    except (LockError, ModelError):
        raise
    except Exception as error:  # noqa: BLE001
        name = str(model) if isinstance(model, Path) else "the model's bytes"
        raise ModelError(f"{name}: {reader} cannot read it ({one_line(error)})") from None


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Hide what others log, such as the tracebacks of `torch.export.load`."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def one_line(error: Exception) -> str:
    """Return what an error says, on one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__
