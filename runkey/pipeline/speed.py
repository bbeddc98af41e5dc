"""`runkey speed`: measure AP and time of every way to run a trained model, on its val images."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from runkey.errors import LockError, ModelError
from runkey.evaluation.run import evaluate_detections
from runkey.hashing import sha256_file
from runkey.identity.record import describe_cpu
from runkey.inference.detections import Detections
from runkey.inference.export import Format, Precision
from runkey.inference.extras import import_extra
from runkey.inference.networks import Network, find_device
from runkey.inference.speed import (
    AS_EVALUATED,
    FRONTIER_PNG,
    SPEED_JSON,
    Choice,
    Measured,
    NetworkOpener,
    Runtime,
    SpeedReport,
    cut_choices,
    find_report,
    format_choices,
    time_networks,
    write_report,
)
from runkey.model.detr import FastDetr
from runkey.model.weights import WEIGHTS, load_model
from runkey.pipeline import export
from runkey.pipeline.record import Addition, add_to_run
from runkey.pipeline.run_images import (
    Pixels,
    Sample,
    detections_by_image,
    find_sample,
    read_recipe,
)
from runkey.plots.speed import draw_frontier
from runkey.progress import each
from runkey.tracking.store import Store, in_one_line
from runkey.units import counted

ON_CPU: tuple[Runtime, ...] = ("torch", "onnx", "openvino")
ON_GPU: tuple[Runtime, ...] = ("torch", "compiled", "onnx", "tensorrt")
_PACKAGES: dict[Runtime, str] = {"onnx": "onnxruntime", "openvino": "openvino"}
_TIMED = 32
"""Val images that are timed, in turn."""
_FORMAT_LOSS = 0.5
"""AP, in points, that the runtime and number format may lose in which cuts are measured."""


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """What to measure, and for how long."""

    limit: int | None = 500
    """Most val images that AP is measured on; None: all."""
    batch: int = 1
    """Images in a forward pass that is timed."""
    threads: int = 1
    seconds: float = 60.0
    """Wall time of the final timing; a quarter of it goes into choosing what to cut."""
    runtimes: tuple[Runtime, ...] | None = None
    """None: `ON_CPU` or `ON_GPU`."""


def measure_speed(
    folder: Path, root: Path | None, options: SpeedOptions, device: torch.device | str | None = None
) -> SpeedReport:
    """Measure AP and time of every way to run a model, on its run's val images.

    First each runtime and number format that is installed, with the whole model; then cuts of the
    model, and NMS, in the fastest of these that loses at most `_FORMAT_LOSS` points of AP.

    Args:
        folder: of the trained model.
        root: the workspace with the run's val images.
        options: what to measure.
        device: where torch runs; None: the GPU if there is one.

    Raises:
        ModelError: the folder holds no model.
        DataError: the workspace has not the run's val images.
    """
    torch.set_num_threads(options.threads)
    detector, card = load_model(folder)
    recipe = read_recipe(folder)
    if recipe is None:
        raise ModelError(
            f"{folder}: no key.json, which names the run whose val images are needed; give a run's"
            " key or its model/"
        )
    sample = find_sample(card, recipe, root, limit=options.limit)
    device = find_device(device)
    on_gpu = device.type == "cuda"
    asked = options.runtimes or (ON_GPU if on_gpu else ON_CPU)
    left_out = missing_runtimes(asked, on_gpu=on_gpu)
    runtimes = [one for one in asked if one not in left_out]
    with tempfile.TemporaryDirectory() as name:
        opener = NetworkOpener(
            detector,
            Path(name),
            threads=options.threads,
            device=device,
            calibration=sample.calibration,
        )
        bench = _Bench(opener, sample, timed_batches(sample, options.batch))
        bench.open(format_choices(runtimes, on_gpu=on_gpu))
        report = SpeedReport(
            key=recipe["key"],
            weights=sha256_file(folder / WEIGHTS),
            device=_device_name(device),
            threads=options.threads,
            batch=options.batch,
            images=sample.count,
            on_gpu=on_gpu,
            measured=bench.measure(options.seconds / 4),
            versions=_versions(),
        )
        layers = len(detector.transformer.decoder.layers)
        best = report.pick(_FORMAT_LOSS).choice
        bench.open(cut_choices(best, layers, has_proposals=isinstance(detector, FastDetr)))
        # All of them again: times of different minutes do not compare.
        measured = bench.measure(options.seconds)
    return replace(report, measured=measured, left_out=left_out | bench.failed)


@dataclass
class _Bench:
    opener: NetworkOpener
    sample: Sample
    batches: list[NDArray[np.uint8]]
    networks: dict[Choice, Network] = field(default_factory=dict)
    scores: dict[Choice, tuple[float, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def open(self, choices: Sequence[Choice]) -> None:
        """Open the networks of some choices, and measure their AP; `failed` names the others."""
        for choice in each("measure AP", list(choices), "choices"):
            try:
                network = self.opener.open(choice)
                self.scores[choice] = average_precision(network, self.sample, choice.nms)
                self.networks[choice] = network
            # Compilers and runtimes raise errors of any type; the others are measured all the same.
            except Exception as error:
                if choice == AS_EVALUATED:
                    raise
                self.failed[choice.name] = in_one_line(error)

    def measure(self, seconds: float) -> tuple[Measured, ...]:
        """Time all networks that are open."""
        callers = {choice: _with_nms(one, choice.nms) for choice, one in self.networks.items()}
        times = time_networks(callers, self.batches, seconds=seconds)
        return tuple(Measured(one, *self.scores[one], times[one]) for one in callers)


def average_precision(
    network: Network, sample: Sample, nms: float | None = None
) -> tuple[float, float]:
    """Return AP and AP50 of a network on val images, 0..1."""
    found: dict[int, Detections] = {}
    for pixels in sample.batches():
        found |= detections_by_image(network(pixels.images), pixels)
    if nms is not None:
        found = {image_id: one.nms(nms) for image_id, one in found.items()}
    result = evaluate_detections(sample.records, sample.classes, found)
    return result.summary["AP"] or 0.0, result.summary["AP50"] or 0.0


def _with_nms(network: Network, iou: float | None) -> Callable[[NDArray[np.uint8]], object]:
    if iou is None:
        return network

    def run(images: NDArray[np.uint8]) -> object:
        count = len(images)
        pixels = Pixels(images, tuple(range(count)), ((1, 1),) * count)
        found = detections_by_image(network(images), pixels)
        return [one.nms(iou) for one in found.values()]

    return run


def missing_runtimes(runtimes: Sequence[Runtime], *, on_gpu: bool) -> dict[str, str]:
    """Return the runtimes that this machine lacks, each with the reason and the way out."""
    missing: dict[str, str] = {}
    for runtime, module in _PACKAGES.items():
        try:
            import_extra("onnx")
            import_extra(module)
        except LockError as error:
            missing[runtime] = str(error)
    if "compiled" in runtimes and not on_gpu and not (shutil.which("g++") or shutil.which("c++")):
        missing["compiled"] = "torch.compile needs a C++ compiler (g++)"
    providers = []
    if on_gpu and not missing:
        providers = import_extra("onnxruntime").get_available_providers()
    if on_gpu and "CUDAExecutionProvider" not in providers:
        missing.setdefault("onnx", "needs onnxruntime-gpu in place of onnxruntime")
    if "TensorrtExecutionProvider" not in providers:
        missing["tensorrt"] = "needs a GPU, onnxruntime-gpu and TensorRT"
    return {name: why for name, why in missing.items() if name in runtimes}


def timed_batches(sample: Sample, batch: int) -> list[NDArray[np.uint8]]:
    """Return some images in batches of exactly `batch`; of shapes with fewer images, none."""
    found: list[NDArray[np.uint8]] = []
    waiting: dict[tuple[int, ...], list[NDArray[np.uint8]]] = {}
    for pixels in sample.batches():
        for image in pixels.images:
            same = waiting.setdefault(image.shape, [])
            same.append(image)
            if len(same) == batch:
                found.append(np.stack(same))
                same.clear()
        if len(found) * batch >= _TIMED:
            break
    if found:
        return found
    most = max(waiting.values(), key=len)
    return [np.stack([most[i % len(most)] for i in range(batch)])]


def parse_runtimes(text: str | None) -> tuple[Runtime, ...] | None:
    """Read names separated by commas; ModelError names one that is unknown."""
    if text is None:
        return None
    known = get_args(Runtime)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ModelError(f"--runtimes: {name!r}; runtimes are {', '.join(known)}")
    return tuple(one for one in known if one in names)


# --- the result: files, the run's record, text


def save_speed(report: SpeedReport, folder: Path, store: Store | None) -> str:
    """Write speed.json and the picture beside a model, and add them to its run; return a line."""
    top = folder.absolute().parent
    write_report(top / SPEED_JSON, report)
    draw_frontier(report, top / FRONTIER_PNG)
    place = f"{top / SPEED_JSON.parent}/: {SPEED_JSON.name}, {FRONTIER_PNG.name}"
    fastest = report.pick(_FORMAT_LOSS)
    addition = Addition(
        tags={"speed": f"{fastest.choice.name}: {_gain(report, fastest)}"},
        files=[SPEED_JSON, FRONTIER_PNG],
        root=top,
    )
    return f"{place}; {add_to_run(store, report.key, addition)}"


def fastest_export(folder: Path, max_ap_loss: float) -> tuple[export.ExportChoice, str]:
    """Return what to export, and its name: the fastest measured choice that loses little.

    Raises:
        ModelError: the model's speed was not measured, or no choice loses so little.
    """
    choice = find_report(folder).pick(max_ap_loss, exported=True).choice
    chosen = export.ExportChoice(
        cast(Format, choice.runtime), cast(Precision, choice.precision), choice.options, max_ap_loss
    )
    return chosen, choice.name


def table(report: SpeedReport) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of the table; `*` marks the frontier."""
    best = report.frontier()
    columns = ["choice", "AP", "AP lost", "CPU ms", "wall ms", "speedup"]
    rows = [
        [
            f"{'*' if one in best else ' '} {one.choice.name}",
            f"{one.ap:.4f}",
            f"{100 * (report.base.ap - one.ap):+.2f}",
            f"{one.timing.cpu_ms:.3g}",
            f"{one.timing.wall_ms:.3g}",
            f"{report.ms(report.base) / report.ms(one):.2f}",
        ]
        for one in report.measured
    ]
    return columns, rows


def describe(report: SpeedReport, model: str, max_ap_loss: float) -> list[str]:
    """Return the lines below the table."""
    base = report.base
    lines = [
        f"times: medians, an image, batch {report.batch}, {counted(report.threads, 'thread')},"
        f" {report.device}; AP lost: points against the model as evaluated, on {report.images} val"
        " images; *: no other choice is both faster and better"
    ]
    lines += [f"left out: {name}: {why}" for name, why in report.left_out.items()]
    try:
        fastest = report.pick(max_ap_loss)
        lines.append(
            f"fastest that loses at most {counted(f'{max_ap_loss:g}', 'point')}:"
            f" {fastest.choice.name},"
            f" {_gain(report, fastest)}, AP {fastest.ap:.3f} ({base.ap:.3f})"
        )
        written = report.pick(max_ap_loss, exported=True)
        lines.append(
            f"`runkey export-model {model} --max-ap-loss {max_ap_loss:g}` writes"
            f" {written.choice.name}, {_gain(report, written)}"
        )
    except ModelError as error:
        lines.append(str(error))
    return lines


def _gain(report: SpeedReport, one: Measured) -> str:
    return f"{report.ms(report.base) / report.ms(one):.2f} times as fast"


def as_dict(report: SpeedReport, max_ap_loss: float) -> dict[str, Any]:
    """Return the report for JSON, with what is best."""
    tree: dict[str, Any] = TypeAdapter(SpeedReport).dump_python(report, mode="json")
    names = [one.choice.name for one in report.frontier()]
    return tree | {"frontier": names, "fastest": report.pick(max_ap_loss).choice.name}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return describe_cpu(torch.backends.cpu.get_cpu_capability()).partition(",")[0]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "onnxruntime", "openvino"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
