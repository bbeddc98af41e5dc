"""The profile_memory stage: predict a step's memory, draw it, and measure it on this machine."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

import torch

from runkey import paths
from runkey.hashing import sha256_file
from runkey.memory.choose import largest_fitting
from runkey.memory.decide import shown_images
from runkey.memory.measured import (
    CALIBRATION,
    MEASURED,
    Platform,
    Trial,
    add_trials,
    this_platform,
    write_cpu,
    write_gpu,
)
from runkey.memory.memory_model import MODEL, MemoryModel, read_model, write_model
from runkey.memory.predict import (
    Surroundings,
    colour_factors,
    generation_of,
    predict,
    prepared_surroundings,
)
from runkey.memory.trace.tracker import Pass
from runkey.memory.trial import Guarded, Job, Result, read_result, write_json
from runkey.params import Params, load_params
from runkey.pipeline.step_factory import step_factory
from runkey.plots.memory import draw_step
from runkey.progress import want_bars
from runkey.training.device import choose_device
from runkey.units import GIB, MIB

logger = logging.getLogger(__name__)

_CENSUS_BATCHES = 20
"""Forward passes that a trial on a GPU runs after the worst ones."""
_MOST_TRIALS = 4


def profile(root: Path) -> None:
    """Write memory/ of a workspace; on a GPU, also add what was measured to the calibration."""
    params = load_params(root / paths.PARAMS)
    want_bars(params.runtime.progress)
    device, _ = choose_device(params.runtime.device)
    around = prepared_surroundings(params, root / paths.PREPARED)
    for text in around.census.lines():
        logger.info(text)
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cuda":
            # In a process that sees no GPU, so that the prediction is the same everywhere.
            Guarded(_again("--predict"), root, os.environ | {"CUDA_VISIBLE_DEVICES": ""}).wait()
            _measure_on_gpu(params, around, root, device, Path(folder))
            return
        # At the same time as the prediction, in a process with a peak of its own.
        with _Trial(root, Path(folder), _cpu_job(params, around)) as trial:
            _write_prediction(params, around, root)
            peaks = trial.result().peaks
    measured = ", ".join(f"{peak.images} images {peak.bytes / MIB:.0f} MiB" for peak in peaks)
    out = root / paths.MEMORY
    line = write_cpu(out, sha256_file(out / MODEL), this_platform(device), peaks)
    logger.info(f"measured on this CPU: {measured}; so {line}")


def write_prediction(root: Path) -> None:
    """Write memory.json and its picture, without a measurement."""
    params = load_params(root / paths.PARAMS)
    want_bars(params.runtime.progress)
    _write_prediction(params, prepared_surroundings(params, root / paths.PREPARED), root)


def _again(*arguments: str) -> list[str]:
    """Return the command of this stage with other arguments."""
    kept = [argument for argument in sys.argv[1:] if argument == "--traceback"]
    return [sys.executable, "-m", "stages.profile_memory", *kept, *arguments]


def _write_prediction(params: Params, around: Surroundings, root: Path) -> None:
    """memory.json and its picture."""
    prediction = predict(params, around, lambda other: step_factory(other, around.num_classes))
    model, out = prediction.model, root / paths.MEMORY
    write_model(out, model)
    (out / MEASURED).unlink(missing_ok=True)
    budget = params.memory.budget_gib
    budget_gib = None if budget == "device" else budget
    images = shown_images(model, budget_gib)
    draw_step(prediction, images, out, budget_gib)
    logger.info(f"predicted for a GPU, {model.precision}: {model.gpu.line}")
    logger.info(
        f"  {images} at once: at most {model.gpu.upper(images) / GIB:.2f} GiB and the CUDA context"
    )


def _cpu_job(params: Params, around: Surroundings) -> Job:
    worst = [around.worst(images) for images in params.memory.probe_batches]
    return _job(params, around, tuple(worst))


def _job(
    params: Params,
    around: Surroundings,
    worst: tuple[Pass, ...] = (),
    census: tuple[tuple[Pass, ...], ...] = (),
    outside_bytes: int = 0,
) -> Job:
    return Job(
        worst=worst,
        census=census,
        num_classes=around.num_classes,
        colour=colour_factors(params),
        budget_gib=params.memory.budget_gib,
        outside_bytes=outside_bytes,
    )


def _measure_on_gpu(
    params: Params, around: Surroundings, root: Path, device: torch.device, folder: Path
) -> None:
    """Run trials from the predicted micro-batch on, until one fits and one more image does not."""
    out = root / paths.MEMORY
    model, digest = read_model(out / MODEL), sha256_file(out / MODEL)
    outside = generation_of(torch.cuda.get_device_capability(device)).context_bytes[1]

    def run(*worst: Pass, census: tuple[tuple[Pass, ...], ...] = ()) -> tuple[Job, Result]:
        # In a process of its own: this one never opens the GPU, whose context would take memory.
        job = _job(params, around, worst, census, outside)
        with _Trial(root, folder, job) as trial:
            return job, trial.result()

    most = params.training.batch_size
    images = largest_fitting(model.gpu.upper, most, run()[1].room_bytes) or 1
    trials: list[Trial] = []
    tried: set[int] = set()
    while images not in tried and 1 <= images <= most and len(tried) < _MOST_TRIALS:
        tried.add(images)
        job, result = run(
            around.worst(images), census=tuple(around.windows(images, _CENSUS_BATCHES))
        )
        logger.info(f"measured: {_describe(images, result, model)}")
        holds = result.holds(job)
        if holds:
            trials.append(_trial_of(images, result, model, digest, this_platform(device)))
        images += 1 if holds else -1
    write_gpu(out, digest, trials)
    add_trials(paths.store_root() / paths.HOME / CALIBRATION, trials)


def _trial_of(
    images: int, result: Result, model: MemoryModel, digest: str, platform: Platform
) -> Trial:
    """What the calibration keeps of a trial that fit."""
    peak = result.peaks[-1]
    return Trial(
        platform=platform,
        model=digest,
        images=images,
        upper_bytes=model.gpu.upper(images),
        reserved_bytes=peak.bytes,
        allocated_bytes=peak.allocated_bytes,
        outside_bytes=result.outside_bytes,
        retries=result.retries,
    )


def _describe(images: int, result: Result, model: MemoryModel) -> str:
    """Describe a trial in one line."""
    if not result.peaks:
        return f"{images} images do not fit"
    peak = result.peaks[-1]
    ratio = peak.bytes / model.gpu.upper(images)
    retries = f", {result.retries} retries" if result.retries else ""
    return (
        f"{images} images {peak.bytes / MIB:.0f} MiB ({peak.allocated_bytes / MIB:.0f} of tensors)"
        f", {ratio:.2f} of the bound{retries}; {result.outside_bytes / MIB:.0f} MiB beside it"
    )


class _Trial:
    """A trial in a process of its own."""

    def __init__(self, root: Path, folder: Path, job: Job) -> None:
        self._result = folder / "result.json"
        self._result.unlink(missing_ok=True)
        write_json(folder / "job.json", job)
        command = _again("--trial", str(folder / "job.json"), str(self._result))
        self._process = Guarded(command, root, os.environ)

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()

    def result(self) -> Result:
        """Wait until it has ended, and return its result."""
        self._process.wait()
        return read_result(self._result)
