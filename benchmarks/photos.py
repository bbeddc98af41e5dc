"""Train presets on small sets of photographs within a budget of CPU seconds; print AP and AP50.

    .venv/bin/python benchmarks/photos.py photos raccoons=../shared/data/raccoons --seconds 300
    .venv/bin/python benchmarks/photos.py photos -S model.frozen_stages=4 -S lr=5e-4 SET=FOLDER ...
    .venv/bin/python benchmarks/photos.py --table            # the table of all results so far

A set is a COCO folder; it is prepared once, into --work (remove that after a change of the split).
The epochs are set so that the whole schedule, evaluations included, takes the CPU seconds of one
thread: a few steps and an evaluation are measured first.  AP is that of the weights that `train`
keeps, on the set's val images.  Each training adds a line to benchmarks/results/photos.jsonl.  Sets
of images: benchmarks/photo_sets.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runkey import paths
from runkey.data.prepare import prepare
from runkey.params import Params
from runkey.params.load import override, parse_params, parse_yaml
from runkey.pipeline.validation import build_validation
from runkey.training.build import TrainContext, TrainData, build_training
from runkey.training.loop import fit, take_step
from runkey.training.state import LoopState

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/results/photos.jsonl"
CPU = torch.device("cpu")
_STEPS = 6
"""Steps that are measured, after as many that are not."""


@dataclass(frozen=True)
class Workspace:
    """A prepared set."""

    name: str
    root: Path

    @classmethod
    def prepared(cls, name: str, data: Path, work: Path, params: Params) -> Workspace:
        """Prepare a COCO folder into `work`, if it is not there yet."""
        root = work / name
        if not (root / paths.PREPARED / "classes.json").is_file():
            root.mkdir(parents=True, exist_ok=True)
            link = root / params.data.path
            link.unlink(missing_ok=True)
            link.symlink_to(data.resolve(), target_is_directory=True)
            weights = root / ".weights"
            weights.unlink(missing_ok=True)
            weights.symlink_to(REPOSITORY / ".weights", target_is_directory=True)
            prepare(params.data, root, root / paths.PREPARED, params.model.num_queries)
        return cls(name, root)

    def build(self, params: Params) -> TrainContext:
        """Build a training whose steps are one forward pass."""
        data = TrainData.read(self.root, params.training.batch_size)
        return build_training(params, len(data.class_names), CPU, data=data)


@dataclass(frozen=True)
class Pace:
    """CPU seconds on this machine."""

    build: float
    step: float
    evaluation: float

    @classmethod
    def measured(cls, workspace: Workspace, params: Params) -> Pace:
        """Measure some steps and an evaluation of a training that is thrown away."""
        started = time.process_time()
        context = workspace.build(params)
        validation = build_validation(params, params.model, workspace.root, CPU)
        built = time.process_time() - started
        state, step = LoopState(), 0
        context.step.model.train()
        while step < 2 * _STEPS:
            for batch in context.loader.epoch(step):
                if step == _STEPS:
                    started = time.process_time()
                if step == 2 * _STEPS:
                    break
                take_step(context, state, batch, [])
                step += 1
        stepped = time.process_time()
        validation(context.evaluated_module.eval())
        evaluation = time.process_time() - stepped
        return cls(built, (stepped - started) / _STEPS, evaluation)

    def epochs(self, seconds: float, steps: int, evaluations: int) -> int:
        """Return how many epochs fit into some seconds with that many evaluations."""
        left = seconds - self.build - evaluations * self.evaluation
        return max(1, math.floor(left / (steps * self.step)))


def train(workspace: Workspace, params: Params) -> dict[str, Any]:
    """Train once; return AP, AP50 and CPU seconds at each evaluation, and of the best weights."""
    curve: list[dict[str, float]] = []
    started, wall = time.process_time(), time.perf_counter()
    context = workspace.build(params)
    validation = build_validation(params, params.model, workspace.root, CPU)

    def evaluate(module: nn.Module) -> Mapping[str, float]:
        metrics = validation(module).metrics("val/")
        seconds = time.process_time() - started
        point = {"AP": metrics["val/AP"], "AP50": metrics["val/AP50"], "loss": metrics["val/loss"]}
        curve.append({name: round(value, 4) for name, value in point.items()})
        curve[-1]["cpu_seconds"] = round(seconds, 1)
        return metrics

    state = fit(context, evaluate)
    assert state.best
    return {
        "AP": round(state.best.metrics["val/AP"], 4),
        "AP50": round(state.best.metrics["val/AP50"], 4),
        "best_epoch": state.best.epoch,
        "cpu_seconds": round(time.process_time() - started, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "train_loss": round(state.history[-1]["train/epoch_loss"], 3),
        "curve": curve,
    }


def run(wanted: argparse.Namespace) -> None:
    """Train the arm on every set with every seed, and keep each result."""
    changes: dict[str, Any] = {"training.cpu_threads": 1, "data.checks": {"level": "drop"}}
    changes |= dict(wanted.changes)
    tree = parse_yaml((REPOSITORY / f"presets/{wanted.preset}.yaml").read_text())
    shown = " ".join(f"{name}={json.dumps(value)}" for name, value in wanted.changes)
    for name, folder in wanted.sets:
        params = override(parse_params(tree), changes)
        workspace = Workspace.prepared(name, folder, wanted.work, params)
        pace = Pace.measured(workspace, params)
        steps = workspace.build(params).loader.steps_per_epoch
        epochs = wanted.epochs or pace.epochs(wanted.seconds, steps, wanted.evaluations)
        every = math.ceil(epochs / wanted.evaluations)
        for seed in wanted.seeds:
            values = {"training.epochs": epochs, "training.evaluate_every": every, "seed": seed}
            result = train(workspace, override(params, values))
            row = {
                "arm": wanted.name or f"{wanted.preset} {shown}".strip(),
                "preset": wanted.preset,
                "changes": dict(wanted.changes),
                "set": name,
                "seed": seed,
                "budget": wanted.seconds,
                "epochs": epochs,
                "step_ms": round(1000 * pace.step),
                "ms_per_image": round(1000 * pace.step / params.training.batch_size, 1),
            } | result
            with wanted.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            del row["curve"], row["changes"]
            print(json.dumps(row), flush=True)


def table(path: Path) -> str:
    """Return the table of all arms: the mean over seeds of AP and AP50 for each set and budget."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        groups[row["set"], row["budget"], row["arm"]].append(row)
    lines = [
        "| set | budget, CPU s | arm | seeds | epochs | ms/image | CPU s | AP | AP50 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, budget, arm), rows in sorted(groups.items()):
        means = {
            key: statistics.mean(row[key] for row in rows)
            for key in ("AP", "AP50", "cpu_seconds", "ms_per_image")
        }
        aps = ", ".join(f"{row['AP']:.3f}" for row in rows) if len(rows) > 1 else ""
        lines.append(
            f"| {name} | {budget:g} | {arm} | {len(rows)} | {rows[-1]['epochs']}"
            f" | {means['ms_per_image']:.0f} | {means['cpu_seconds']:.0f}"
            f" | {means['AP']:.3f}{f' ({aps})' if aps else ''} | {means['AP50']:.3f} |"
        )
    return "\n".join(lines)


def _change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, parse_yaml(value)


def _set(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder:
        raise argparse.ArgumentTypeError(f"{text}: NAME=FOLDER is wanted")
    return name, Path(folder)


def main() -> None:
    """Train an arm, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", nargs="?", default="photos")
    parser.add_argument("sets", nargs="*", type=_set, metavar="NAME=FOLDER")
    parser.add_argument("-S", dest="changes", action="append", type=_change, default=[])
    parser.add_argument("--name", help="of the arm in the table; default: preset and changes")
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU seconds of a training")
    parser.add_argument("--epochs", type=int, help="in place of the measured number")
    parser.add_argument("--evaluations", type=int, default=6, help="of a training")
    parser.add_argument("--seeds", type=lambda t: [int(s) for s in t.split(",")], default=[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "runkey-photos"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    wanted = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING)
    if wanted.table:
        print(table(wanted.results))
        return
    run(wanted)


if __name__ == "__main__":
    main()
