"""The memory profile: census, measurement, line, choice.

    def make_step() -> Callable[[Window], object]:
        setup = build_setup(model, criterion, ...)      # runkey.training, on the device
        def step(window: Window) -> None:
            train_step(setup.machinery, window, 1.0)    # the real step, and the moving average's
            if setup.ema is not None:
                setup.ema.update()
        return step

    profile(params, prepared=..., out=root / MEMORY, make_step=make_step, device=device, say=print)

`memory` knows no training, so the stage, which does, lends it the step.  The stage measures in a
process that has done nothing else, started by `runkey.memory.guard.run_guarded`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from runkey.data.index import read_classes, read_index
from runkey.memory.budget import budget_bytes
from runkey.memory.census import Census, take_census
from runkey.memory.choose import GIB, MIB, Choice, Line, choose, cut, fit_line, spare_bytes
from runkey.memory.plan import MemoryPlan, write_plan
from runkey.memory.probe import MakeStep, Probe, measure
from runkey.params import Params


def profile(
    params: Params,
    *,
    prepared: Path,
    out: Path,
    make_step: MakeStep,
    device: torch.device,
    say: Callable[[str], None],
) -> MemoryPlan:
    """Measure training steps, choose the micro-batch, write memory.json and measured.json.

    Args:
        params: data, model.num_queries, training and memory are read.
        prepared: prepare's output folder.
        out: folder to write.
        make_step: builds what trains on `device` and returns its step.
        device: where training will run.
        say: takes lines of report.

    Raises:
        DataError: prepare has not run, or left no image.
        TrainingError: nothing fits in the budget or on the device.
    """
    limits = [n for n in (params.data.max_objects, params.model.num_queries) if n]
    census = take_census(params.data, read_index(prepared / "train.json"), min(limits))
    for text in census.lines():
        say(text)
    classes = len(read_classes(prepared / "classes.json"))
    probes = [
        Probe(images, *census.worst, census.objects, classes)
        for images in params.memory.probe_batches
    ]
    # Before this process takes its part.
    budget = budget_bytes(params.memory.budget_gib, device)
    peaks = measure(make_step, probes, device)
    line = fit_line(peaks)
    measured = ", ".join(f"{peak.images} images {peak.bytes / MIB:.0f} MiB" for peak in peaks)
    say(f"peak of a training step on {device.type}: {measured}; so {line}")
    choice = _choice(params, line, budget)
    _say_choice(choice, line, budget, say)
    plan = _plan(params, census, choice, device)
    write_plan(
        out,
        plan,
        {
            "peaks": [asdict(peak) for peak in peaks],
            "line": asdict(line),
            "predicted_bytes": line.at(choice.micro_batch),
            "spare_bytes": spare_bytes(budget),
            "budget_bytes": budget,
            "census": asdict(census),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
    )
    return plan


def _choice(params: Params, line: Line, budget: int) -> Choice:
    """A number in training.micro_batch decides; auto: the line does."""
    training = params.training
    if training.micro_batch == "auto":
        return choose(line, training.batch_size, budget)
    return cut(training.batch_size, training.micro_batch)


def _say_choice(choice: Choice, line: Line, budget: int, say: Callable[[str], None]) -> None:
    need, spare = line.at(choice.micro_batch), spare_bytes(budget)
    say(
        f"micro-batch {choice.micro_batch}, {choice.accumulation} forward "
        f"{'pass' if choice.accumulation == 1 else 'passes'} a step: {need / GIB:.2f} GiB and "
        f"{spare / GIB:.2f} to spare, of {budget / GIB:.2f} GiB"
    )
    if need + spare > budget:
        say("warning: training.micro_batch asks for more than the budget; auto would choose less")


def _plan(params: Params, census: Census, choice: Choice, device: torch.device) -> MemoryPlan:
    training = params.training
    return MemoryPlan(
        batch_size=training.batch_size,
        micro_batch=choice.micro_batch,
        accumulation=choice.accumulation,
        chosen_by="measured" if training.micro_batch == "auto" else "training.micro_batch",
        device=device.type,
        worst_height=census.worst[0],
        worst_width=census.worst[1],
        shapes=census.shapes,
        objects=census.objects,
    )
