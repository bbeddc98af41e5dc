"""Speed on a GPU, for `benchmarks.gpu_checks`: training steps, their parts, inference.

On a CPU everything is tiny, and only tries the script itself.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.gpu_common import Report, SyntheticLoader
from benchmarks.reference import Reference, open_reference
from benchmarks.speed.step import K, parameters, peer_step, split_targets
from runkey import paths
from runkey.data.dataset import normalise
from runkey.data.prepare import prepare
from runkey.files import write_json
from runkey.inference.export import write_program
from runkey.inference.module import EXPORTED, InferenceOptions
from runkey.inference.networks import ExportedTorchNetwork
from runkey.inference.speed import Choice, NetworkOpener
from runkey.model.detr import build_model
from runkey.params import Params, Training, load_params, override
from runkey.pipeline.profile_step import profile_steps
from runkey.training.build import build_training
from runkey.training.device import choose_device
from runkey.training.step import accumulate_gradients, train_step

PRESETS = Path(__file__).parents[1] / "presets"
FLOOR_MS = {"compute": 11.0, "traffic": 13.4}
"""Of a step of 16 images in bf16 on an H200: at 790 TFLOP/s, at 3.0 TB/s."""
PRECISIONS = {"bf16": "bf16", "tf32": "tf32", "fp32": "off"}
"""What is measured, and `training.precision` for it."""
_ROUNDS, _WARM_UP = 10, 4
_TINY: dict[str, Any] = {
    "model.backbone": "resnet18",
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
}
"""Changes for a CPU."""


@dataclass(frozen=True, slots=True)
class Size:
    """What is trained on: images of a step, height and width."""

    images: int
    shape: tuple[int, int]
    changes: dict[str, Any]


def _size(device: torch.device) -> Size:
    if device.type == "cuda":
        return Size(16, (800, 1333), {})
    return Size(2, (64, 96), _TINY)


# G3: a training step.


@dataclass(frozen=True, slots=True)
class Flags:
    """torch's global settings, which every contestant has of its own."""

    tf32: bool
    deterministic: bool
    benchmark: bool = False

    @classmethod
    def present(cls) -> Flags:
        """Return what is set now."""
        return cls(
            torch.backends.cuda.matmul.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
        )

    def set(self) -> None:
        """Set them."""
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32
        torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cudnn.benchmark = self.benchmark


def ways_to_train() -> dict[str, dict[str, Any]]:
    """Return the ways to run a step that runkey offers, as changes of parameters."""
    ways: dict[str, dict[str, Any]] = {
        "runkey": {"training.deterministic": True},
        "runkey, not deterministic": {"training.deterministic": False},
        "runkey, channels-last": {"training.channels_last": True},
    }
    if "compile" in Training.model_fields:
        ways["runkey, compiled"] = {"training.compile": "auto"}
    return ways


def check_training_step(device: torch.device, report: Report, reference: Path) -> None:
    """G3: time steps of R50 in runkey and the reference, in turn, with CUDA events."""
    size = _size(device)
    report.add("size", {"images": size.images, "shape": size.shape})
    report.add("floor_ms", FLOOR_MS)
    with tempfile.TemporaryDirectory() as folder:
        theirs = open_reference(reference, Path(folder)) if reference.exists() else None
        if theirs is None:
            report.leave_out("the reference DETR: no clone")
        for precision in PRECISIONS:
            if report.seconds_left < 40 and device.type == "cuda":
                report.leave_out(precision)
                continue
            report.add(precision, _measure_steps(device, size, precision, theirs, report))
            gc.collect()
            torch.cuda.empty_cache()


def _measure_steps(
    device: torch.device, size: Size, precision: str, theirs: Reference | None, report: Report
) -> dict[str, Any]:
    # In fp32 and TF32 deterministic kernels are the same ones, but for the attention's backward.
    base = parameters(
        **{"training.batch_size": size.images, "training.precision": PRECISIONS[precision]},
        **size.changes,
    )
    batch = SyntheticLoader(1, size.images, size.images, size.shape, pin=device.type == "cuda")
    window = batch.window(0)
    contestants: dict[str, tuple[Flags, Callable[[], object]]] = {}
    losses: dict[str, float] = {}
    left_out: dict[str, str] = {}
    state = build_model(base.model, K).state_dict()
    for name, changes in ways_to_train().items():
        try:
            parts = build_training(override(base, changes), K, device).step
            parts.model.load_state_dict(state)
            flags = Flags.present()
            # fp32 is without TF32 for everyone, whatever runkey's own default is.
            flags = Flags(
                precision == "tf32" or (flags.tf32 and precision == "bf16"),
                flags.deterministic,
                flags.benchmark,
            )
            flags.set()
            parts.model.eval()
            losses[name] = float(accumulate_gradients(parts, window).values["loss"])
            parts.model.train()
        except Exception as error:  # noqa: BLE001  another way may work
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        contestants[name] = flags, lambda parts=parts: train_step(parts, window, 1.0)
    if theirs is not None:
        flags = Flags(precision in ("tf32", "bf16"), False)
        flags.set()
        name = "reference DETR"
        losses[name], step = _reference_step(theirs, base, window, device, precision, state)
        contestants[name] = flags, step
    found = _time_in_turn(contestants, device, report)
    for name, row in found.items():
        row["loss"] = losses[name]
        row["images_per_second"] = round(1000 * size.images / row["gpu_ms"], 1)
        if name != "reference DETR" and "reference DETR" in found:
            row["times_faster"] = round(found["reference DETR"]["gpu_ms"] / row["gpu_ms"], 3)
        print(f"{precision}: {name}: {row['gpu_ms']:.1f} ms", flush=True)
    most = 0.05 if precision == "bf16" else 5e-3
    first = next(iter(losses.values()))
    different = {n: loss for n, loss in losses.items() if abs(loss / first - 1) > most}
    return {"ways": found, "left_out": left_out, "different_losses": different}


def _reference_step(
    theirs: Reference,
    params: Params,
    window: Any,
    device: torch.device,
    precision: str,
    state: dict[str, Tensor],
) -> tuple[float, Callable[[], None]]:
    """The reference's loss without dropout, and its step; images are on the device already."""
    with torch.device("cpu"):
        model, criterion = theirs.build(params.model, dropout=params.model.dropout)
    model.load_state_dict(state)
    model, criterion = model.to(device), criterion.to(device)
    batch = window[0].to(device)
    samples = theirs.misc.NestedTensor(*normalise(batch))
    targets = split_targets(batch)

    def loss() -> Tensor:
        half = precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            outputs = model(samples)
        if half:  # its losses are not made for half precision
            outputs = _to_float(outputs)
        losses = criterion(outputs, targets)
        parts = [losses[name] * weight for name, weight in criterion.weight_dict.items()]
        return torch.stack(parts).sum()

    model.eval()
    without_dropout = loss().item()
    model.train()
    return without_dropout, peer_step(model, loss)


def _to_float(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _to_float(value) for name, value in tree.items()}
    return [_to_float(one) for one in tree] if isinstance(tree, list) else tree.float()


def _time_in_turn(
    contestants: dict[str, tuple[Flags, Callable[[], object]]],
    device: torch.device,
    report: Report,
) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by CUDA events (on a CPU wall time), and of the host's part."""
    on_gpu = device.type == "cuda"
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    rounds, warm_up = (_ROUNDS, _WARM_UP) if on_gpu else (2, 1)
    for number in range(-warm_up, rounds):
        if number > 1 and report.seconds_left < 5:
            break
        for name, (flags, step) in contestants.items():
            flags.set()
            with _clock(on_gpu) as read:
                step()
                host = 1000 * (time.perf_counter() - read.started)
            if number >= 0:
                times[name].append((read.ms, host))
    return {
        name: {
            "gpu_ms": round(median(gpu for gpu, _ in rows), 3),
            "gpu_ms_least": round(min(gpu for gpu, _ in rows), 3),
            "gpu_ms_most": round(max(gpu for gpu, _ in rows), 3),
            "host_ms": round(median(host for _, host in rows), 3),
            "rounds": len(rows),
        }
        for name, rows in times.items()
    }


@dataclass(slots=True)
class _Reading:
    started: float
    ms: float = 0.0


@contextmanager
def _clock(on_gpu: bool) -> Iterator[_Reading]:
    if not on_gpu:
        reading = _Reading(time.perf_counter())
        yield reading
        reading.ms = 1000 * (time.perf_counter() - reading.started)
        return
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    reading = _Reading(time.perf_counter())
    yield reading
    end.record()
    torch.cuda.synchronize()
    reading.ms = begin.elapsed_time(end)


# G9: the parts of a step.


def check_profile(device: torch.device, report: Report, _: Path) -> None:
    """G9: profile real steps as `runkey profile` does, on made-up images; R50, then the sample."""
    size = _size(device)
    height, width = size.shape
    r50 = parameters(
        **{
            "training.batch_size": size.images,
            "training.micro_batch": size.images,
            "training.precision": "bf16" if device.type == "cuda" else "off",
            "data.short_sides": [min(height, width)],
            "data.long_side": max(height, width),
            "data.augment.crop_probability": 0.0,
        },
        **size.changes,
    )
    sample = load_params(PRESETS / "sample.yaml")
    # Files of three eighths of the size, as COCO's are: decoding and resizing are real.
    jobs = {
        "R50": (r50, (height * 3 // 8, width * 3 // 8)),
        "sample": (sample, (120, 160)),
        "R50 again, without the loader's wait": (
            override(r50, {"data.cache_gib": 8.0}),
            (height * 3 // 8, width * 3 // 8),
        ),
    }
    for name, (params, shape) in jobs.items():
        if report.seconds_left < 20 and device.type == "cuda":
            report.leave_out(name)
            continue
        runtime = {"runtime.device": device.type, "runtime.progress": False}
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            _make_data(root / params.data.path, shape, 6 * params.training.batch_size)
            params = override(params, runtime)
            prepare(params.data, root, root / paths.PREPARED, params.model.num_queries)
            found = asdict(profile_steps(params, root, steps=20 if device.type == "cuda" else 2))
        report.add(name, found | {"achieved": list(_achieved(found))})
        print(f"{name}: {1000 * found['seconds']:.1f} ms a step", flush=True)


def _achieved(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield FLOP/s and bytes/s of each part, and their shares of this device's peaks."""
    for part in found["parts"]:
        seconds = part["gpu_seconds"] or part["seconds"]
        if seconds:
            flops, moved = part["flops"] / seconds, part["bytes"] / seconds
            yield {
                "part": f"{part['of']} {part['name']}".strip(),
                "ms": round(1000 * seconds, 3),
                "tflops": round(flops / 1e12, 3),
                "of_peak": round(flops / found["peak_flops"], 3),
                "gigabytes_per_second": round(moved / 1e9, 1),
                "of_peak_bytes": round(moved / found["peak_bytes"], 3),
            }


def _make_data(folder: Path, shape: tuple[int, int], count: int) -> None:
    """Write a COCO folder of smooth random JPEG images with seven boxes each."""
    rng = np.random.default_rng(0)
    height, width = shape
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for number in range(1, count + 1):
        small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        name = f"{number}.jpg"
        picture = Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)
        picture.save(folder / "images" / name, quality=90)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for _ in range(7):
            sides = rng.uniform(0.1, 0.5, 2) * (width, height)
            corner = rng.random(2) * ((width, height) - sides)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(rng.integers(1, 11)),
                    "bbox": [*map(float, corner), *map(float, sides)],
                    "area": float(sides.prod()),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, 11)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "annotations.json", content)


# G7: inference.


_LAST = InferenceOptions(fold_norms=True, last_layer_only=True, channels_last=True)
_CHOICES = {
    "eager fp32": Choice("torch", "fp32"),
    "eager fp32, folded": Choice("torch", "fp32", _LAST),
    "eager bf16, folded": Choice("torch", "bf16", _LAST),
    "exported fp32": None,
    "compiled bf16, folded": Choice("compiled", "bf16", _LAST),
    "compiled fp32, folded": Choice("compiled", "fp32", _LAST),
}
"""Most valuable first; what takes long to build comes last."""


def check_inference(device: torch.device, report: Report, _: Path) -> None:
    """G7: milliseconds from pixels on the host to detections, R50 and R101, batches of 1 and 8."""
    on_gpu = device.type == "cuda"
    choose_device(device.type)
    backbones = ("r50", "r101") if on_gpu else ("r50",)
    shape, batches = ((800, 1333), (1, 8)) if on_gpu else ((64, 96), (1, 2))
    changes = {} if on_gpu else _TINY
    rng = np.random.default_rng(0)
    detectors = {}
    for backbone in backbones:
        section = override(
            load_params(PRESETS / f"coco-detr-{backbone}.yaml"),
            {"model.backbone_weights": "none"} | changes,
        ).model
        torch.manual_seed(0)
        detectors[backbone] = build_model(section, K).eval()
    images = {count: rng.integers(0, 256, (count, 3, *shape), dtype=np.uint8) for count in batches}
    eager: dict[tuple[str, int], Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for (name, choice), backbone in product(_CHOICES.items(), backbones):
            if report.seconds_left < (60 if "compiled" in name else 15) and on_gpu:
                report.leave_out(f"{backbone}, {name}")
                continue
            try:
                network = _open(detectors[backbone], choice, Path(folder, backbone), device)
                rows = [
                    _latency(network, pixels, eager, (backbone, count), name)
                    for count, pixels in images.items()
                ]
            except Exception as error:  # noqa: BLE001  other ways may work
                rows = [{"backbone": backbone, "way": name, "error": f"{error}"[:300]}]
            report.add("rows", rows)
            print(*rows, sep="\n", flush=True)


def _open(
    detector: nn.Module, choice: Choice | None, folder: Path, device: torch.device
) -> Callable[[Any], Any]:
    folder.mkdir(exist_ok=True)
    if choice is not None:
        return NetworkOpener(detector, folder, device=device).open(choice)
    write_program(detector.cpu(), EXPORTED, folder / "model.pt2")
    return ExportedTorchNetwork(folder / "model.pt2", device)


def _latency(
    network: Callable[[Any], Any],
    pixels: Any,
    eager: dict[tuple[str, int], Any],
    key: tuple[str, int],
    name: str,
) -> dict[str, Any]:
    """Median, least and most milliseconds of a batch; results are on the host, so it is whole."""
    start = time.perf_counter()
    scores = network(pixels)[0]
    first = time.perf_counter() - start
    eager.setdefault(key, scores)
    times = []
    for _ in range(20 if first < 0.5 else 5):
        start = time.perf_counter()
        network(pixels)
        times.append(1000 * (time.perf_counter() - start))
    count = min(scores.shape[1], 100)
    return {
        "backbone": key[0],
        "batch": key[1],
        "way": name,
        "ms": round(median(times), 3),
        "ms_least": round(min(times), 3),
        "first_call_seconds": round(first, 2),
        "largest_score_difference": float(np.abs(scores[:, :count] - eager[key][:, :count]).max()),
    }
