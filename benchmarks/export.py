"""Export the sample's run in every format, and large models; measure AP, size and time.

    python -m benchmarks.export --run CHECKOUT [--parts sample alone large gate]

CHECKOUT is a repository whose `dvc repro` has trained the sample.  `results/export.md` is written;
`--parts` measures some of it anew.  The part `alone` installs onnxruntime, numpy and pillow into an
empty environment.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runkey import params
from runkey.data.index import ImageRecord, read_classes, read_index
from runkey.inference.detections import Detections
from runkey.inference.export import write_export
from runkey.inference.module import EXPORTED, InferenceModule
from runkey.inference.networks import FILES, TorchNetwork, open_export
from runkey.model.detr import build_model
from runkey.model.weights import ModelCard, Sizes
from runkey.pipeline.export import ExportChoice, compare_export, export_model
from runkey.pipeline.run_images import detections_by_image, find_sample

REPOSITORY = Path(__file__).parents[1]
RESULT = REPOSITORY / "benchmarks" / "results" / "export.md"
CHOICES = (
    ("onnx", "fp32"),
    ("onnx", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
    ("torch", "fp32"),
    ("torch", "bf16"),
)
COCO: dict[str, Any] = {
    "norm": "frozen",
    "hidden_dim": 256,
    "num_heads": 8,
    "feedforward_dim": 2048,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "num_queries": 100,
}
LARGE = {
    "detr, R50": {"preset": "detr", "backbone": "resnet50", **COCO},
    "fast, R50": {"preset": "fast", "backbone": "resnet50", **COCO, "num_queries": 300},
    "detr, R50-DC5": {"preset": "detr", "backbone": "resnet50", "dilation": True, **COCO},
    "detr, R101": {"preset": "detr", "backbone": "resnet101", **COCO},
}
PACKAGES = ("onnxruntime==1.26.0", "numpy==2.5.1", "pillow==12.3.0")


@contextlib.contextmanager
def timed(row: dict[str, Any]) -> Iterator[None]:
    """Put processor and wall seconds into a row."""
    began, wall = time.process_time(), time.monotonic()
    yield
    row["seconds"] = time.process_time() - began
    row["wall"] = time.monotonic() - wall


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]


def sample(checkout: Path, out: Path) -> list[str]:
    """Export the checkout's run in each format and precision, gate included."""
    rows: list[tuple[Any, ...]] = []
    for export, precision in CHOICES:
        row: dict[str, Any] = {}
        with timed(row):
            choice = ExportChoice(export, precision)
            folder = out / choice.name
            done = export_model(checkout / "model", folder, choice, store=None, root=checkout)
        parity = done.parity
        rows.append(
            (export, precision, f"{parity.ap:.5f}", f"{parity.ap_lost:+.2f}",
             f"{parity.score_difference:.1e}", f"{done.size / 1e6:.1f}", f"{row['seconds']:.1f}",
             f"{row['wall']:.0f}", "yes" if parity.passed else "no")
        )  # fmt: skip
        print(*rows[-1], flush=True)
    head = (
        "format",
        "precision",
        "AP",
        "points lost",
        "scores within",
        "MB",
        "s",
        "wall s",
        "passes",
    )
    return [f"{parity.compared}; the model's AP {parity.ap_model:.5f}.", "", *table(head, rows)]


def large(out: Path) -> list[str]:
    """Export models of the sizes of COCO's, with random weights."""
    rows: list[tuple[Any, ...]] = []
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 480, 640), dtype=np.uint8)
    for name, values in LARGE.items():
        torch.manual_seed(0)
        detector = build_model(params.Model(**values), 91).eval()
        expected = TorchNetwork(InferenceModule(detector))(images)
        for export in FILES:
            row: dict[str, Any] = {}
            card: Any = {"format": 1, "key": None, "export": export, "precision": "fp32",
                         "file": FILES[export], "thresholds": {},
                         "classes": [{"index": one, "id": one, "name": str(one)}
                                     for one in range(91)],
                         "sizes": {"short_side": 480, "long_side": 640, "intensity_range": None}
                         }  # fmt: skip
            folder = out / f"{name}-{export}"
            with timed(row):
                write_export(detector, card, folder, options=EXPORTED)
            answers = open_export(folder).network(images)
            apart = float(np.abs(answers[0] - expected[0]).max())
            size = sum(file.stat().st_size for file in folder.glob("model.*")) / 1e6
            shutil.rmtree(folder)
            seconds = f"{row['seconds']:.1f}", f"{row['wall']:.0f}"
            rows.append((name, export, f"{apart:.0e}", f"{size:.0f}", *seconds))
            print(*rows[-1], flush=True)
    return table(("model", "format", "scores within", "MB", "s", "wall s"), rows)


def alone(checkout: Path, out: Path) -> list[str]:
    """Run an export's detect.py in an environment of its own, on the val images."""
    choice = ExportChoice()
    folder = out / "alone"
    export_model(checkout / "model", folder, choice, store=None, root=checkout)
    from pycocotools.coco import COCO as Truth  # noqa: N811
    from pycocotools.cocoeval import COCOeval

    python = out / "environment/bin/python"
    uv = (sys.executable, "-m", "uv", "--quiet")
    subprocess.run([*uv, "venv", "--python", sys.executable, out / "environment"], check=True)
    # ONNX Runtime asks for protobuf, flatbuffers and packaging, which only its tools import.
    install = (*uv, "pip", "install", "--no-deps", "--python", python, *PACKAGES)
    subprocess.run(install, check=True)
    files = (file for file in python.parents[1].rglob("*") if not file.is_symlink())
    size = sum(file.stat().st_size for file in files) / 1e6
    truth_file = checkout / "data/annotations/instances_val.json"
    ids = {one["file_name"]: one["id"] for one in json.loads(truth_file.read_text())["images"]}
    images = sorted((checkout / "data/val").iterdir())
    command = [python, "-I", folder / "detect.py", "--score", "0", *images]
    environment = {"PATH": os.environ["PATH"]}
    began = time.monotonic()
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    wall = time.monotonic() - began
    results = []
    for line in map(json.loads, said.stdout.splitlines()):
        for one in line["detections"]:
            left, top, right, bottom = one["box_xyxy"]
            results.append(
                {"image_id": ids[Path(line["file"]).name], "category_id": one["id"],
                 "bbox": [left, top, right - left, bottom - top], "score": one["score"]}
            )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth = Truth(str(truth_file))
        judged = COCOeval(truth, truth.loadRes(results), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    ap = f"AP {judged.stats[0]:.5f} on {len(ids)} val images"
    about = f"{', '.join(PACKAGES)}, nothing else: {size:.1f} MB."
    about += " `detect.py` of the ONNX export in fp32:"
    return [f"{about} {ap}, {wall:.0f} s.", ""]


def gate(checkout: Path, out: Path) -> list[str]:
    """Compare exports of R50 and R101 with the models on the sample's val images.

    Their weights are random, so the ground truth is what the model itself finds best.
    """
    records = read_index(checkout / "prepared/val.safetensors")
    classes = read_classes(checkout / "prepared/classes.json")
    files = [checkout / "data" / record.file for record in records]
    card = ModelCard(params.Model(), (), Sizes(120, 160))
    images = find_sample(card, None, None, files)
    rows: list[tuple[Any, ...]] = []
    for name in ("detr, R50", "detr, R101"):
        torch.manual_seed(0)
        detector = build_model(params.Model(**LARGE[name]), len(classes)).eval()
        network, truth = TorchNetwork(InferenceModule(detector)), []
        for pixels in images.batches():
            for number, found in detections_by_image(network(pixels.images), pixels).items():
                truth.append(with_truth(records[number], number, found))
        sample = replace(images, records=truth, classes=classes)
        for export in FILES:
            row: dict[str, Any] = {}
            made: Any = {"format": 1, "key": None, "export": export, "precision": "fp32",
                         "file": FILES[export], "thresholds": {},
                         "classes": [{"index": one.index, "id": one.id, "name": one.name}
                                     for one in classes],
                         "sizes": {"short_side": 120, "long_side": 160, "intensity_range": None}
                         }  # fmt: skip
            folder = out / f"gate-{name}-{export}"
            with timed(row):
                write_export(detector, made, folder, options=EXPORTED)
                parity = compare_export(detector, folder, ExportChoice(export), sample)
            shutil.rmtree(folder)
            seconds = f"{row['seconds']:.0f}", f"{row['wall']:.0f}"
            aps = f"{parity.ap:.5f}", f"{parity.ap_model:.5f}"
            passes = "yes" if parity.passed else "no"
            rows.append((name, export, *aps, f"{parity.score_difference:.0e}", *seconds, passes))
            print(*rows[-1], flush=True)
    head = ("model", "format", "AP", "the model's AP", "scores within", "s", "wall s", "passes")
    about = f"{len(files)} images of 160 x 120; the truth is what the model itself finds best."
    return [about, "", *table(head, rows)]


def with_truth(record: ImageRecord, number: int, found: Detections) -> ImageRecord:
    """Return the record, under a number, with the four best detections as its objects."""
    boxes = found.boxes_xyxy[:4].astype(float)
    sides = boxes[:, 2:] - boxes[:, :2]
    return replace(
        record,
        id=number,
        boxes_xywh=tuple(map(tuple, np.hstack([boxes[:, :2], sides]).tolist())),
        labels=tuple(found.labels[:4].tolist()),
        areas=tuple(sides.prod(1).tolist()),
        crowd=(False,) * 4,
        annotation_ids=tuple(range(4)),
    )


PARTS = {
    "sample": "The sample's run, gate included",
    "alone": "detect.py in an empty environment",
    "large": "Large models, random weights, one image of 480 x 640",
    "gate": "R50 and R101 through the gate, random weights, the sample's val images",
}


def main() -> None:
    """Measure the chosen parts, and write the page; it keeps the others."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    checkout = chosen.run.absolute()
    kept = RESULT.read_text().split("\n## ")[1:] if RESULT.is_file() else []
    sections = {text.split("\n")[0]: text for text in kept}
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        measure = {
            "sample": lambda: sample(checkout, out),
            "alone": lambda: alone(checkout, out),
            "large": lambda: large(out),
            "gate": lambda: gate(checkout, out),
        }
        for part in chosen.parts:
            lines = measure[part]()
            load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
            lines += [f"{time.strftime('%Y-%m-%d')}; load at the end: {load}.", ""]
            sections[PARTS[part]] = "\n".join([PARTS[part], "", *lines])
    about = (
        f"`python -m benchmarks.export --run CHECKOUT`; one thread of {platform.machine()}, Python"
        f" {platform.python_version()}, torch {torch.__version__}. `s` is processor time, `wall s`"
        " of a machine that does other work too."
    )
    written = [sections[title] for title in PARTS.values() if title in sections]
    text = "\n## ".join([f"# Exports\n\n{about}\n", *written])
    RESULT.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
