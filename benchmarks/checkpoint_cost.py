"""What checkpoints and guards cost: seconds of a training step with both and with neither, paired.

    python -m benchmarks.checkpoint_cost --prepared CHECKOUT [--rounds 6] [--epochs 4] [--clock cpu]

CHECKOUT is a repository whose `prepare` has run.  Every round trains the sample preset twice in
this process, once each way, in turn, from the same weights on the same images; the weights
afterwards must be the same.  Times are of all steps from the third on, with every checkpoint that
was due; evaluations are left out.  `--clock cpu` counts the processor's time of the whole process,
the writing thread's too, which other work on the machine hardly touches; it does not see waits for
the disk.  `results/checkpoint_cost.md` is written anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from runkey import paths
from runkey.data.dataset import GlobalBatch
from runkey.data.index import read_classes
from runkey.params import Params, load_params
from runkey.training.build import Loader, Replacements, TrainData, build_loader, build_training
from runkey.training.checkpoint import FolderCheckpoints, Interval
from runkey.training.guard import Guard
from runkey.training.loop import fit
from runkey.training.optimizer import Ema, guarded_step
from runkey.training.step import RunningStatistics

REPOSITORY = Path(__file__).parents[1]
RESULT = REPOSITORY / "benchmarks" / "results" / "checkpoint_cost.md"
WARM_UP = 2
MOST = 0.03
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class TimedLoader:
    """Passes windows on, and notes when each was asked for."""

    def __init__(self, loader: Loader, clock: Callable[[], float]) -> None:
        self._loader, self._clock = loader, clock
        self.times: list[float] = []

    @property
    def steps_per_epoch(self) -> int:
        """Windows in an epoch."""
        return self._loader.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:
        """The windows of an epoch."""
        for window in self._loader.epoch(epoch, start_step):
            self.times.append(self._clock())
            yield window
        self.times.append(self._clock())


@dataclass(frozen=True)
class Result:
    """One training."""

    step_seconds: float
    """Mean."""
    weights: dict[str, Tensor]
    checkpoints: int
    """Files that were written while it ran."""


@contextmanager
def unguarded() -> Iterator[None]:
    """A step without all that watches over it: the step as it would be written without guards."""

    @torch.no_grad()
    def update(self: Ema, _: Tensor) -> None:
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.current_decay())
        for average, weight in self._copies:
            average.copy_(weight)
        self.updates += 1

    with ExitStack() as stack:
        for target, name, instead in (
            (Ema, "update", update),
            (RunningStatistics, "copy", lambda _: []),
            (RunningStatistics, "restore", lambda *_: None),
            (Guard, "note", lambda *_: None),
            (Guard, "act", lambda _: None),
            (Guard, "act_before_evaluation", lambda _: None),
        ):
            stack.enter_context(patch.object(target, name, instead))
        step = guarded_step.__module__.replace("optimizer", "step")
        plain = patch(f"{step}.guarded_step", lambda optimizer, _: optimizer.step())
        stack.enter_context(plain)
        yield


def train(params: Params, root: Path, folder: Path | None, clock: Callable[[], float]) -> Result:
    """Train; with checkpoints and guards if there is a folder for them."""
    device = torch.device("cpu")
    classes = len(read_classes(root / paths.PREPARED / "classes.json"))
    loader = TimedLoader(_loader(params, root), clock)
    written = []

    def evaluate(_: nn.Module) -> dict[str, float]:
        return {"val/AP": 0.5}

    checkpoints = None
    if folder is not None:
        fingerprint = {"key": "rk2-", "device": device.type}
        interval = Interval("auto")
        checkpoints = FolderCheckpoints(folder, fingerprint, interval=interval)
        save = checkpoints.save
        checkpoints.save = lambda *a, **k: (written.append(1), save(*a, **k))  # type: ignore[method-assign]
    with ExitStack() as stack:
        if folder is None:
            stack.enter_context(unguarded())
        context = build_training(params, classes, device, replace=Replacements(loader=loader))
        result = fit(context, evaluate, checkpoints=checkpoints)
    times = loader.times[WARM_UP:]
    # At an epoch's end a time is noted twice; what lies between is the evaluation.
    taken = [after - before for before, after in pairwise(times)]
    steps = result.step - WARM_UP
    return Result(sum(taken) / steps, result.best_weights, len(written))


def _loader(params: Params, root: Path) -> Loader:
    runtime = {"workers": 0, "prefetch": 1, "pin_memory": False}
    params = params.model_copy(update={"runtime": params.runtime.model_copy(update=runtime)})
    data = TrainData(root, (), params.training.batch_size)
    return build_loader(params, data, torch.device("cpu"))


def main() -> int:
    """Measure, write the table; 1 if both together cost more than they may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    chosen = parser.parse_args()
    params = load_params(REPOSITORY / "presets" / "sample.yaml")
    training = params.training.model_copy(update={"epochs": chosen.epochs, "evaluate_every": 99})
    runtime = params.runtime.model_copy(update={"progress": False})
    params = params.model_copy(update={"training": training, "runtime": runtime})
    with_them, without, saved = [], [], 0
    for number in range(chosen.rounds):
        with tempfile.TemporaryDirectory(dir=chosen.prepared) as folder:
            places = [Path(folder), None] if number % 2 else [None, Path(folder)]
            clock = CLOCKS[chosen.clock]
            results = {place: train(params, chosen.prepared, place, clock) for place in places}
        on, off = results[next(p for p in places if p)], results[None]
        if any(not torch.equal(on.weights[name], off.weights[name]) for name in off.weights):
            raise SystemExit("the weights differ: checkpoints or guards change the training")
        with_them.append(on.step_seconds)
        without.append(off.step_seconds)
        saved += on.checkpoints
        print(f"round {number + 1}: {on.step_seconds * 1000:.1f} ms with, ", end="")
        print(f"{off.step_seconds * 1000:.1f} ms without, {on.checkpoints} checkpoints", flush=True)
    ratio = statistics.median(a / b for a, b in zip(with_them, without, strict=True)) - 1
    steps = chosen.epochs * _loader(params, chosen.prepared).steps_per_epoch
    what = f"{chosen.rounds} pairs of {steps} steps, {chosen.clock} time"
    text = _table(with_them, without, ratio, what, saved)
    RESULT.write_text(text, encoding="utf-8")
    print(json.dumps({"ratio": round(ratio, 4), "most": MOST, "pairs": chosen.rounds}))
    return 0 if ratio <= MOST else 1


def _table(
    with_them: list[float], without: list[float], ratio: float, what: str, saved: int
) -> str:
    rows = "".join(
        f"| {a * 1000:.1f} | {b * 1000:.1f} | {a / b - 1:+.2%} |\n"
        for a, b in zip(with_them, without, strict=True)
    )
    return (
        "# Checkpoints and guards: what they cost\n\n"
        f"`python -m benchmarks.checkpoint_cost`: sample preset, {what}, in turn in one process,\n"
        f"{saved} checkpoints in all; {os.cpu_count()} cores, {platform.machine()}, torch "
        f"{torch.__version__}. Weights afterwards: the same bits.\n\n"
        "| ms a step with both | without | |\n|---|---|---|\n"
        f"{rows}\nMedian of the pairs' ratios: {ratio:+.2%} (at most {MOST:+.0%}).\n"
    )


if __name__ == "__main__":
    sys.exit(main())
