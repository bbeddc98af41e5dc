"""Inference time against the reference DETR, and images a second from JPEG files.

    python -m benchmarks.inference latency --reference .reference/detr [--backbones r50 r101]
    python -m benchmarks.inference throughput --model model --images data/images

`latency`: one image, one thread, random weights that the reference and this project share. All
networks are in one process and run in turn, the reference in eager mode among them, so that what
else the machine does meets all of them alike; medians of processor time. `throughput`: whole
`Model`s, from files to detections. Both need `make env-export`, and write what they measured to
benchmarks/results/inference.json, from which `table` prints the tables of results/inference.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.reference import Reference, open_reference
from runkey.identity.record import describe_cpu
from runkey.inference.model import Model, load_model_folder
from runkey.inference.module import InferenceOptions
from runkey.inference.preprocess import read_image
from runkey.inference.speed import AS_EVALUATED, Choice, NetworkOpener, time_networks
from runkey.model.detr import build_model
from runkey.model.weights import load_model
from runkey.params import load_params

REPOSITORY = Path(__file__).parents[1]
RESULT = REPOSITORY / "benchmarks" / "results" / "inference.json"
NUM_CLASSES = 91
FOLDED = InferenceOptions(fold_norms=True, last_layer_only=True)
CHANNELS_LAST = InferenceOptions(fold_norms=True, last_layer_only=True, channels_last=True)
CHOICES = (
    AS_EVALUATED,
    Choice("torch", "fp32", FOLDED),
    Choice("torch", "fp32", CHANNELS_LAST),
    Choice("torch", "bf16", CHANNELS_LAST),
    Choice("onnx", "fp32", FOLDED),
    Choice("openvino", "fp32", FOLDED),
    Choice("openvino", "bf16", FOLDED),
    Choice("openvino", "int8", FOLDED),
)
REFERENCE = "reference DETR, eager"


def main() -> None:
    """Measure, and add the result to the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    latency = commands.add_parser("latency")
    latency.add_argument("--reference", type=Path, required=True, help="a clone or mirror of DETR")
    latency.add_argument("--backbones", nargs="+", default=["r50", "r101"])
    latency.add_argument("--sizes", nargs="+", default=["800x1066", "480x640"])
    latency.add_argument("--rounds", type=int, default=7)
    throughput = commands.add_parser("throughput")
    throughput.add_argument("--model", type=Path, required=True)
    throughput.add_argument("--images", type=Path, required=True)
    throughput.add_argument("--batch", type=int, default=8)
    throughput.add_argument("--rounds", type=int, default=5)
    for command in (latency, throughput):
        command.add_argument("--only", nargs="+", help="choices whose name begins so")
    commands.add_parser("table")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.command == "table":
        print_tables()
        return
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    choices = [one for one in CHOICES if one.name.startswith(tuple(chosen.only or ("",)))]
    if chosen.command == "latency":
        with tempfile.TemporaryDirectory() as folder:
            reference = open_reference(chosen.reference, Path(folder))
            for backbone, size in product(chosen.backbones, chosen.sizes):
                height, width = map(int, size.split("x"))
                row = measure_latency(reference, backbone, (height, width), choices, chosen.rounds)
                found.setdefault("latency", {})[f"{backbone} {size}"] = row
                found["machine"] = machine()
                RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    else:
        found["throughput"] = measure_throughput(
            chosen.model, chosen.images, choices, chosen.batch, chosen.rounds
        )
    found["machine"] = machine()
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print_tables()


VERSIONS = ("torch", "onnxruntime", "openvino", "numpy", "Pillow")


def machine(names: Sequence[str] = VERSIONS) -> dict[str, Any]:
    """Describe what the numbers were measured on, with the versions of packages."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return {
        "cpu": describe_cpu(torch.backends.cpu.get_cpu_capability()),
        "cores": os.cpu_count(),
        "load": [round(one, 1) for one in os.getloadavg()],
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        **found,
    }


def measure_latency(
    reference: Reference,
    backbone: str,
    size: tuple[int, int],
    choices: Sequence[Choice],
    rounds: int,
) -> dict[str, Any]:
    """Time one image of a size in the reference and in each choice; milliseconds."""
    section = load_params(REPOSITORY / "presets" / f"coco-detr-{backbone}.yaml").model
    section = section.model_copy(update={"backbone_weights": "none"})
    torch.manual_seed(0)
    theirs = reference.build(section)[0].eval()
    detector = build_model(section, NUM_CLASSES).eval()
    detector.load_state_dict(theirs.state_dict())
    image = np.random.default_rng(0).integers(0, 256, (1, 3, *size), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        # Random images: of int8 only the time is meant.
        opener = NetworkOpener(
            detector, Path(folder), threads=1, calibration=lambda: [image[0, :, :96, :128]]
        )
        networks: dict[Any, Callable[[NDArray[np.uint8]], Any]] = {
            REFERENCE: reference_network(reference, theirs)
        }
        networks |= {choice: opener.open(choice) for choice in choices}
        check_same(networks, image)
        times = time_networks(networks, [image], seconds=0, least=rounds)
    return {
        str(getattr(choice, "name", choice)): [round(one.cpu_ms, 1), round(one.wall_ms, 1)]
        for choice, one in times.items()
    }


def reference_network(reference: Reference, model: nn.Module) -> Callable[[NDArray[np.uint8]], Any]:
    """The reference as its `evaluate` runs it: normalised, padded into a batch, postprocessed."""
    postprocess = reference.detr.PostProcess()
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    @torch.no_grad()
    def run(images: NDArray[np.uint8]) -> Any:
        pixels = [(torch.from_numpy(image).float() / 255 - mean) / std for image in images]
        outputs = model(reference.misc.nested_tensor_from_tensor_list(pixels))
        (found,) = postprocess(outputs, torch.tensor([images.shape[2:]]))
        best = found["scores"].sort(descending=True, stable=True)
        return best.values[None].numpy(), found["labels"][best.indices][None].numpy(), None

    return run


def check_same(
    networks: dict[Any, Callable[[NDArray[np.uint8]], Any]], image: NDArray[np.uint8]
) -> None:
    """Raise unless the fp32 networks give the reference's scores."""
    scores = {name: np.asarray(network(image)[0])[0] for name, network in networks.items()}
    for name, found in scores.items():
        difference = float(np.abs(found - scores[REFERENCE]).max())
        if getattr(name, "precision", "fp32") == "fp32" and difference > 1e-4:
            raise SystemExit(f"{name}: scores differ from the reference's by {difference:.2g}")


def measure_throughput(
    model: Path, images: Path, choices: Sequence[Choice], batch: int, rounds: int
) -> dict[str, Any]:
    """Count images a second from JPEG files to detections, in batches, for each choice."""
    files = sorted(images.rglob("*.jpg"))
    base, (detector, _) = load_model_folder(model, "cpu"), load_model(model)
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        some = [base.preprocess(read_image(file)) for file in files[:64]]
        opener = NetworkOpener(detector, Path(folder), threads=1, calibration=lambda: some)
        models = {one.name: Model(base.card, opener.open(one)) for one in choices}
        for number in range(rounds + 1):
            for name, one in models.items():
                cpu, wall = time.process_time(), time.perf_counter()
                count = sum(1 for _ in one.stream(files, batch_size=batch))
                used = time.process_time() - cpu, time.perf_counter() - wall
                if number:  # the first is for warming up
                    found.setdefault(name, []).append((count / used[0], count / used[1]))
    rates = {
        name: [round(median(cpu for cpu, _ in rows), 1), round(median(wall for _, wall in rows), 1)]
        for name, rows in found.items()
    }
    return {"files": len(files), "batch": batch, "rounds": rounds, "rates": rates}


def print_tables() -> None:
    """Print the Markdown tables of results/inference.md."""
    found = json.loads(RESULT.read_text())
    for title, row in found.get("latency", {}).items():
        print(f"\n| {title} | CPU ms | wall ms | x |\n|---|---|---|---|")
        base = row[REFERENCE][0]
        for name, (cpu, wall) in row.items():
            print(f"| {name} | {cpu:.0f} | {wall:.0f} | {base / cpu:.2f} |")
    if rates := found.get("throughput", {}).get("rates"):
        print("\n| sample | images a CPU second | a wall second |\n|---|---|---|")
        for name, (cpu, wall) in rates.items():
            print(f"| {name} | {cpu:.0f} | {wall:.0f} |")
    print(f"\n{json.dumps(found['machine'])}")


if __name__ == "__main__":
    main()
