"""How fast a trained model runs: choices that need no training, their times, and which one to take.

    networks = {choice: opener.open(choice) for choice in format_choices(...)}
    times = time_networks(networks, batches, seconds=60)
    pick(report.measured, max_ap_loss=0.2)

`runkey speed KEY` measures AP and time of every choice and writes speed.json, from which
`runkey export-model --max-ap-loss` takes the fastest choice. Networks are timed interleaved, one
batch each in turn, so that whatever else runs on the machine slows all of them alike.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from runkey.errors import ModelError
from runkey.files import FormatError, expect, read_json, write_json
from runkey.hashing import sha256_file
from runkey.identity.key import short_key
from runkey.inference.export import quantised, to_onnx
from runkey.inference.module import InferenceModule, InferenceOptions
from runkey.inference.networks import Network, OnnxNetwork, OpenVinoNetwork, TorchNetwork
from runkey.model.detr import Detector
from runkey.model.weights import WEIGHTS
from runkey.units import counted

SPEED_JSON, FRONTIER_PNG = Path("speed/speed.json"), Path("speed/frontier.png")
"""Beside `model/`, as evaluation/ is."""
_FORMAT = 1

Runtime = Literal["torch", "compiled", "onnx", "openvino", "tensorrt"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]

AS_TRAINED = InferenceOptions()


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a trained model."""

    runtime: Runtime = "torch"
    """torch: eager. compiled: torch.compile. onnx: ONNX Runtime. tensorrt: ONNX Runtime's."""
    precision: Precision = "fp32"
    options: InferenceOptions = AS_TRAINED
    nms: float | None = None
    """IoU above which the worse of two boxes of a class is dropped; None: no suppression."""

    @property
    def name(self) -> str:
        """Such as `openvino bf16, 1 decoder layer`."""
        return ", ".join([f"{self.runtime} {self.precision}", *self._changes()])

    @property
    def is_exported(self) -> bool:
        """Return True if `runkey export-model` can write it."""
        return self.runtime in ("onnx", "openvino") and self.nms is None

    def _changes(self) -> list[str]:
        options, parts = self.options, []
        if self.runtime in ("torch", "compiled"):
            parts += ["last heads"] if options.last_layer_only else []
            parts += ["folded norms"] if options.fold_norms else []
            parts += ["channels-last"] if options.channels_last else []
        if options.proposals_only:
            parts.append("proposals only")
        elif options.decoder_layers is not None:
            parts.append(counted(options.decoder_layers, "decoder layer"))
        return parts + ([] if self.nms is None else [f"NMS {self.nms:g}"])


AS_EVALUATED = Choice()
"""What `evaluate` runs; AP losses and speed-ups are relative to it."""

_LAST = InferenceOptions(last_layer_only=True)
_FOLDED = replace(_LAST, fold_norms=True)
_CHANNELS_LAST = replace(_FOLDED, channels_last=True)
_NMS_IOU = 0.8


def format_choices(runtimes: Sequence[Runtime], *, on_gpu: bool = False) -> list[Choice]:
    """Return the choices of runtime and number format, the whole model in each.

    Args:
        runtimes: those that this machine has.
        on_gpu: leave out what is for CPUs (int8, OpenVINO).
    """
    choices = [AS_EVALUATED]
    choices += [Choice("torch", "fp32", options) for options in (_LAST, _FOLDED, _CHANNELS_LAST)]
    choices.append(Choice("torch", "bf16", _CHANNELS_LAST))
    if "compiled" in runtimes:
        choices.append(Choice("compiled", "bf16" if on_gpu else "fp32", _CHANNELS_LAST))
    if "onnx" in runtimes:
        choices.append(Choice("onnx", "fp32", _FOLDED))
        choices += [] if on_gpu else [Choice("onnx", "int8", _FOLDED)]
    if "openvino" in runtimes and not on_gpu:
        in_openvino: tuple[Precision, ...] = ("fp32", "bf16", "int8")
        choices += [Choice("openvino", one, _FOLDED) for one in in_openvino]
    if "tensorrt" in runtimes and on_gpu:
        choices.append(Choice("tensorrt", "fp16", _FOLDED))
    return choices


def cut_choices(best: Choice, decoder_layers: int, *, has_proposals: bool) -> list[Choice]:
    """Return the same runtime and number format with less of the model, and with NMS.

    Args:
        best: the fastest of `format_choices`.
        decoder_layers: of the whole model.
        has_proposals: True for preset fast, whose encoder proposes boxes.
    """
    cuts = [replace(best.options, decoder_layers=n) for n in range(decoder_layers - 1, 0, -1)]
    if has_proposals:
        cuts.append(replace(best.options, proposals_only=True))
    choices = [replace(best, options=options) for options in cuts]
    return [*choices, *(replace(one, nms=_NMS_IOU) for one in [best, *choices[-1:]])]


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians of one network's times, milliseconds an image."""

    cpu_ms: float
    """Processor time of all threads."""
    wall_ms: float
    batches: int
    """How many were timed."""


def time_networks(
    networks: Mapping[Choice, Callable[[NDArray[np.uint8]], object]],
    batches: Iterable[NDArray[np.uint8]],
    *,
    seconds: float,
    least: int = 5,
    most: int = 200,
) -> dict[Choice, Timing]:
    """Time all networks in turn on the same batches, until `seconds` are over.

    Args:
        networks: what to time; each has run once on every shape before the clock starts.
        batches: uint8 [B, 3, h, w]; they are repeated.
        seconds: wall time to spend, but at least `least` and at most `most` batches are timed.
        least: fewest batches for a median.
        most: batches after which it ends early.
    """
    shown = list(batches)
    for one in {batch.shape: batch for batch in shown}.values():
        for network in networks.values():
            network(one)
    times: dict[Choice, list[tuple[float, float]]] = {choice: [] for choice in networks}
    started, done = time.perf_counter(), 0
    for batch in cycle(shown):
        for choice, network in networks.items():
            cpu, wall = time.process_time(), time.perf_counter()
            network(batch)
            used = time.process_time() - cpu, time.perf_counter() - wall
            times[choice].append((used[0] / len(batch), used[1] / len(batch)))
        done += 1
        if done >= most or (done >= least and time.perf_counter() - started > seconds):
            break
    return {
        choice: Timing(
            cpu_ms=1000 * median(cpu for cpu, _ in rows),
            wall_ms=1000 * median(wall for _, wall in rows),
            batches=done,
        )
        for choice, rows in times.items()
    }


@dataclass(frozen=True, slots=True)
class Measured:
    """A choice with its accuracy and time."""

    choice: Choice
    ap: float
    """COCO AP in 0..1, on the val images of `SpeedReport.images`."""
    ap50: float
    timing: Timing


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """The content of speed.json."""

    key: str
    """Of the run."""
    weights: str
    """sha256 of model/weights.safetensors."""
    device: str
    """Such as `cpu AMD EPYC, avx512_bf16` or `cuda NVIDIA H200`."""
    threads: int
    batch: int
    """Images in a forward pass that was timed."""
    images: int
    """Val images that AP was measured on."""
    on_gpu: bool
    """True: times are wall times, as a GPU's work takes no processor time."""
    measured: tuple[Measured, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    """Runtimes that were not measured, and why."""
    versions: dict[str, str] = field(default_factory=dict)

    def ms(self, one: Measured) -> float:
        """Return the milliseconds an image that choices are compared by."""
        return one.timing.wall_ms if self.on_gpu else one.timing.cpu_ms

    @property
    def base(self) -> Measured:
        """The model as `evaluate` runs it."""
        return next(one for one in self.measured if one.choice == AS_EVALUATED)

    def frontier(self) -> list[Measured]:
        """Return the choices that no other one beats in both AP and time, fastest first."""
        best: list[Measured] = []
        for one in sorted(self.measured, key=lambda m: (self.ms(m), -m.ap)):
            if not best or one.ap > best[-1].ap:
                best.append(one)
        return best

    def pick(self, max_ap_loss: float, *, exported: bool = False) -> Measured:
        """Return the fastest choice that loses little.

        Args:
            max_ap_loss: AP that it may lose, in points (hundredths).
            exported: only choices that `runkey export-model` can write.

        Raises:
            ModelError: no choice loses so little.
        """
        least = self.base.ap - max_ap_loss / 100
        fit = [
            one
            for one in self.measured
            if one.ap >= least - 1e-9 and (one.choice.is_exported or not exported)
        ]
        if not fit:
            among = [one.ap for one in self.measured if one.choice.is_exported or not exported]
            if not among:
                raise ModelError(
                    f"{SPEED_JSON}: holds no choice that can be exported; run `make env-export`,"
                    f" then `runkey speed {short_key(self.key)}`"
                )
            loss = 100 * (self.base.ap - max(among))
            raise ModelError(
                f"--max-ap-loss {max_ap_loss:g}: every choice loses more; the best loses {loss:.2f}"
                " points"
            )
        return min(fit, key=self.ms)


def write_report(path: Path, report: SpeedReport) -> None:
    """Write speed.json."""
    tree = TypeAdapter(SpeedReport).dump_python(report, mode="json")
    write_json(path, {"format": _FORMAT} | tree)


def read_report(path: Path) -> SpeedReport:
    """Read speed.json.

    Raises:
        ModelError: it is missing, damaged or of another format.
    """
    again = "`runkey speed KEY` writes it"
    try:
        tree = read_json(path, dict[str, Any])
        if tree.pop("format") != _FORMAT:
            raise ModelError(f"{path}: another format; {again} again")
        report: SpeedReport = expect(SpeedReport, tree)
        if not any(one.choice == AS_EVALUATED for one in report.measured):
            raise ModelError(f"{path}: lacks the model as evaluated; {again} again")
        return report
    except FileNotFoundError:
        raise ModelError(f"{path}: not found; {again}") from None
    except (FormatError, KeyError):
        raise ModelError(f"{path}: no speed report; {again} again") from None


def find_report(folder: Path) -> SpeedReport:
    """Read the report on a saved model, in `speed/` beside its folder.

    Raises:
        ModelError: there is none, or it is of other weights.
    """
    path = folder.absolute().parent / SPEED_JSON
    report = read_report(path)
    weights = folder / WEIGHTS
    if not weights.is_file() or sha256_file(weights) != report.weights:
        raise ModelError(f"{path}: of other weights than {folder}; run `runkey speed` again")
    return report


class NetworkOpener:
    """Makes the network of each choice from a detector; exported files go into a folder, once."""

    def __init__(
        self,
        detector: Detector,
        folder: Path,
        *,
        threads: int = 1,
        device: torch.device | str = "cpu",
        calibration: Callable[[], Sequence[NDArray[np.uint8]]] = lambda: (),
    ) -> None:
        """Open nothing yet.

        Args:
            detector: in evaluation mode; it is not changed.
            folder: for exported files.
            threads: of ONNX Runtime and OpenVINO; torch has its own setting.
            device: where torch runs.
            calibration: reads training images, uint8 [3, h, w], for int8.
        """
        self._detector, self._folder, self._threads = detector, folder, threads
        self._device, self._calibration = torch.device(device), calibration
        self._exported: dict[tuple[InferenceOptions, str], Path] = {}

    def open(self, choice: Choice) -> Network:
        """Make a network.

        Raises:
            LockError: its package is not installed.
            ModelError: an option does not fit the detector.
        """
        if choice.runtime in ("torch", "compiled"):
            return self._torch(choice)
        path = self._onnx(choice)
        if choice.runtime == "openvino":
            return OpenVinoNetwork(path, precision=choice.precision, threads=self._threads)
        return OnnxNetwork(path, threads=self._threads, providers=self._providers(choice))

    def _providers(self, choice: Choice) -> list[Any]:
        """Where ONNX Runtime runs a choice; on a GPU what has no kernel there runs on the CPU."""
        if self._device.type != "cuda":
            return ["CPUExecutionProvider"]
        device = {"device_id": self._device.index or 0}
        providers: list[Any] = [("CUDAExecutionProvider", device), "CPUExecutionProvider"]
        if choice.runtime == "tensorrt":
            half = {"trt_fp16_enable": choice.precision == "fp16"}
            providers.insert(0, ("TensorrtExecutionProvider", device | half))
        return providers

    def _onnx(self, choice: Choice) -> Path:
        """Write the ONNX file of a choice's options, quantised for int8, unless it is there."""
        is_int8 = choice.precision == "int8"
        options = replace(choice.options, channels_last=False)
        what = options, choice.runtime if is_int8 else ""
        if what not in self._exported:
            if is_int8:
                whole = self._onnx(replace(choice, precision="fp32")).read_bytes()
                matrices = choice.runtime == "onnx"
                model = quantised(whole, self._calibration(), matrices=matrices)
            else:
                model = to_onnx(InferenceModule(self._detector, options))
            path = self._folder / f"{len(self._exported)}.onnx"
            path.write_bytes(model)
            self._exported[what] = path
        return self._exported[what]

    def _torch(self, choice: Choice) -> Network:
        options = replace(choice.options, bf16=choice.precision == "bf16")
        module: Any = InferenceModule(copy.deepcopy(self._detector), options)
        if choice.runtime == "compiled":
            module = torch.compile(module, dynamic=True)
        return TorchNetwork(module, self._device)
