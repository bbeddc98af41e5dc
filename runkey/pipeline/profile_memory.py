"""The profile_memory stage: predict a step's memory, draw it, and measure steps on this machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from runkey import paths
from runkey.files import write_json
from runkey.hashing import sha256_file
from runkey.memory.batch_shapes import BatchShapes, Step, prepared_shapes
from runkey.memory.choose import largest_fitting, shown_images
from runkey.memory.measure import (
    CALIBRATION,
    MEASURED,
    Trial,
    TrialJob,
    TrialResult,
    add_trials,
    read_as,
    this_platform,
    wait_for,
    write_cpu,
    write_gpu,
)
from runkey.memory.predict import (
    MODEL,
    MemoryModel,
    batch_fields,
    predict,
    read_model,
    write_model,
)
from runkey.memory.trace.events import MicroBatch
from runkey.memory.trace.gpu import Gpu
from runkey.params import Params, load_params
from runkey.pipeline.initial_weights import check_initial_weights
from runkey.pipeline.step_factory import step_factory
from runkey.plots.memory import draw_step
from runkey.processes import without_interrupts
from runkey.progress import want_bars
from runkey.training.device import choose_device
from runkey.units import GIB, MIB, counted

logger = logging.getLogger(__name__)

_SAMPLED = 20
"""Micro-batches that a trial on a GPU runs after the largest ones."""
_MOST_TRIALS = 4


def profile(root: Path, *, only_predict: bool = False) -> None:
    """Write memory/ of a workspace; on a GPU, keep what was measured for the next prediction.

    `only_predict` writes memory.json and its picture only.
    """
    params = load_params(root / paths.PARAMS)
    want_bars(params.runtime.progress)
    if not only_predict:
        check_initial_weights(params, root)
    shapes = prepared_shapes(params, root / paths.PREPARED)
    if only_predict:
        _write_prediction(params, shapes, root)
        return
    device, _ = choose_device(params.runtime.device)
    for text in shapes.statistics.lines():
        logger.info(text)
    if device.type == "cuda":
        # With no GPU visible, so that the prediction is the same everywhere.
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        with without_interrupts():
            process = subprocess.Popen(_stage_command("--predict"), cwd=root, env=environment)
        wait_for(process)
        _measure_on_gpu(params, shapes, root, device)
        return
    worst = tuple(map(shapes.worst, params.memory.probe_batches))
    fields = batch_fields(params, shapes.num_classes)
    job = TrialJob(worst, (), fields, params.memory.budget_gib, outside_bytes=0)
    with _trial(root, job) as result:
        _write_prediction(params, shapes, root)  # meanwhile
        peaks = result().peaks
    measured = ", ".join(
        f"{counted(peak.images, 'image')} {peak.bytes / MIB:.0f} MiB" for peak in peaks
    )
    out = root / paths.MEMORY
    line = write_cpu(out, sha256_file(out / MODEL), this_platform(device), peaks)
    logger.info(f"measured on this CPU: {measured}; so {line}")


def _write_prediction(params: Params, shapes: BatchShapes, root: Path) -> None:
    prediction = predict(params, shapes, lambda other: step_factory(other, shapes.num_classes))
    model, out = prediction.model, root / paths.MEMORY
    write_model(out, model)
    (out / MEASURED).unlink(missing_ok=True)
    budget = params.memory.budget_gib
    budget_gib = None if budget == "device" else budget
    images = shown_images(model, budget_gib)
    draw_step(prediction, images, out, budget_gib)
    logger.info(f"predicted for a GPU, {model.precision}: {model.gpu.line}")
    most = model.gpu.upper(images) / GIB
    logger.info(f"  {images} at once: at most {most:.2f} GiB and the CUDA context")


# Steps that are run, in processes of their own: the peak of each is its own.


def _stage_command(*arguments: str) -> list[str]:
    kept = [argument for argument in sys.argv[1:] if argument == "--traceback"]
    return [sys.executable, "-m", "stages.profile_memory", *kept, *arguments]


@contextmanager
def _trial(root: Path, job: TrialJob) -> Iterator[Callable[[], TrialResult]]:
    """Run a job until the block ends at the latest; yield a function that waits for its result."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "job.json", Path(folder) / "result.json"
        write_json(asked, asdict(job))
        command = _stage_command("--trial", str(asked), str(answer))
        with without_interrupts():
            process = subprocess.Popen(command, cwd=root)

        def result() -> TrialResult:
            wait_for(process)
            return read_as(TrialResult, answer)

        try:
            yield result
        finally:
            process.terminate()
            process.wait()


def _measure_on_gpu(params: Params, shapes: BatchShapes, root: Path, device: torch.device) -> None:
    """Run steps from the predicted micro-batch on, until one passes and one more does not."""
    out = root / paths.MEMORY
    model, digest = read_model(out / MODEL), sha256_file(out / MODEL)
    outside = Gpu(torch.cuda.get_device_capability(device)).context_bytes
    fields = batch_fields(params, shapes.num_classes)

    def run(*worst: MicroBatch, sampled: tuple[Step, ...] = ()) -> tuple[TrialJob, TrialResult]:
        # This process never opens the GPU, whose context takes memory.
        job = TrialJob(worst, sampled, fields, params.memory.budget_gib, outside)
        with _trial(root, job) as result:
            return job, result()

    most = params.training.batch_size
    images = largest_fitting(model.gpu.upper, most, run()[1].budget_bytes) or 1
    trials: list[Trial] = []
    tried: set[int] = set()
    while images not in tried and 1 <= images <= most and len(tried) < _MOST_TRIALS:
        tried.add(images)
        sampled = tuple(shapes.steps(images, _SAMPLED))
        job, result = run(shapes.worst(images), sampled=sampled)
        logger.info(f"measured: {_describe(images, result, model)}")
        passed = result.passed(job)
        if passed:
            peak = result.peaks[-1]
            trial = Trial(
                platform=this_platform(device),
                model=digest,
                images=images,
                upper_bytes=model.gpu.upper(images),
                reserved_bytes=peak.bytes,
                allocated_bytes=peak.allocated_bytes,
                outside_bytes=result.outside_bytes,
                retries=result.retries,
            )
            trials.append(trial)
        images += 1 if passed else -1
    write_gpu(out, digest, trials)
    add_trials(paths.store_root() / paths.HOME / CALIBRATION, trials)


def _describe(images: int, result: TrialResult, model: MemoryModel) -> str:
    if not result.peaks:
        return f"no room for {counted(images, 'image')}"
    peak = result.peaks[-1]
    ratio = peak.bytes / model.gpu.upper(images)
    retries = f", {counted(result.retries, 'retry')}" if result.retries else ""
    return (
        f"{counted(images, 'image')} {peak.bytes / MIB:.0f} MiB"
        f" ({peak.allocated_bytes / MIB:.0f} of tensors), {ratio:.2f} of the"
        f" bound{retries}; {result.outside_bytes / MIB:.0f} MiB beside it"
    )
