"""Measure where the time of a training step goes: `runkey profile`.

    profile = profile_steps(params, root, steps=20, trace=Path("trace.json"))
    hint = find_verdict(profile, params)

The steps are those of `runkey.training.loop.fit` on the prepared data, with the real loader. The
first ones warm up; the next are timed as they are; as many again run under torch's profiler, which
divides the backward pass and gives a GPU's times; in the last one, every operator's arithmetic and
memory traffic are counted. Parts are found by hooks: training knows nothing of this file.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity

from runkey import paths
from runkey.data.dataset import GlobalBatch
from runkey.identity.record import describe_cpu
from runkey.memory.choose import plan_memory
from runkey.memory.measure import CALIBRATION
from runkey.memory.predict import MODEL as MEMORY_MODEL
from runkey.params import Params
from runkey.pipeline.initial_weights import get_initial_weights
from runkey.pipeline.profile_parts import (
    AVERAGE,
    BACKBONE,
    BACKWARD,
    CLIPPING,
    COPYING,
    DECODER,
    ENCODER,
    FORWARD,
    HEADS,
    LOGGING,
    LOSS,
    MATCHING,
    MODEL,
    OPTIMIZER,
    PREPARING,
    WAITING,
    Events,
    Key,
    PartClock,
    WorkCounter,
    label_parts,
    read_events,
)
from runkey.plots.hints import BUSY_SHARE, WAIT_SHARE, Hint, host_hint, loader_hint, with_values
from runkey.progress import Steps, progress, want_bars
from runkey.tracking.log import JsonlLog
from runkey.training.build import Loader, TrainContext, TrainData, build_training
from runkey.training.device import choose_device
from runkey.training.loop import fit
from runkey.units import counted

logger = logging.getLogger(__name__)

_WARM_STEPS = 5
_PEAK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Part:
    """What a step spends in one part, on average."""

    name: str
    of: str
    """`forward` or `backward` for a part of these; else empty."""
    seconds: float
    """Wall time of the training process."""
    cpu_seconds: float
    """Of all its threads."""
    gpu_seconds: float | None
    """Of the kernels that it started; None: no GPU."""
    flops: int
    """Of matrix products, convolutions and attention."""
    bytes: int
    """That all operators read and write, as if no cache kept anything."""

    @property
    def busy_seconds(self) -> float:
        """Return the time in which the device does it; a CPU's without that of other programs."""
        return min(self.seconds, self.cpu_seconds) if self.gpu_seconds is None else self.gpu_seconds


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Where the time of a training step goes."""

    device: str
    threads: int
    """Of torch on the CPU."""
    precision: str
    images: float
    """Of a step, on average."""
    micro_batch: int
    passes: float
    """Forward passes of a step, on average."""
    steps: int
    seconds: float
    """Of a step, without a profiler."""
    profiled_seconds: float
    """Of a step under torch's profiler."""
    peak_flops: float
    """FLOP/s of a large matrix product, measured on this device in this precision."""
    peak_bytes: float
    """Bytes/s of a large copy, read and written, measured on this device."""
    parts: tuple[Part, ...]
    gpu_busy: float | None = None
    """Share of the profiled time, 0..1, in which a kernel runs; None: no GPU."""
    syncs: float | None = None
    """Times a step that the training process waits for the GPU; None: no GPU."""
    sync_seconds: float | None = None


def measure_peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the FLOP/s of a large matrix product and the bytes/s of a large copy."""
    on_gpu = device.type == "cuda"
    side, length = (8192, 2**28) if on_gpu else (512, 2**24)
    left, right, out = (torch.rand(side, side, dtype=dtype, device=device) for _ in range(3))
    source, target = (torch.zeros(length, device=device) for _ in range(2))

    def best(call: Callable[[], object]) -> float:
        seconds, end = float("inf"), time.perf_counter() + _PEAK_SECONDS
        while time.perf_counter() < end:
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if on_gpu:
                torch.cuda.synchronize(device)
            else:  # without the time of other programs
                seconds = min(seconds, time.process_time() - cpu)
            seconds = min(seconds, time.perf_counter() - wall)
        return seconds

    product = best(lambda: torch.mm(left, right, out=out))
    return 2 * side**3 / product, 2 * source.nbytes / best(lambda: target.copy_(source))


# The steps.


class _Measures:
    """One epoch of real batches: steps to warm up, to time, to profile, and one to count."""

    def __init__(
        self, loader: Loader, clock: PartClock, steps: int, device: torch.device, bar: Steps
    ) -> None:
        self.steps_per_epoch = _WARM_STEPS + 2 * steps + 1
        self.steps, self._loader, self._bar, self._device = steps, loader, bar, device
        self.clock, self.counter = clock, WorkCounter(clock)
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else it reports a missing GPU as an error
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities, acc_events=True)
        self.images = self.passes = self.latest = 0

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:  # noqa: ARG002
        """Yield the batches of as many epochs as it takes."""
        batches = (batch for number in count() for batch in self._loader.epoch(number))
        for number in range(-_WARM_STEPS, 2 * self.steps + 1):
            self._begin(number)
            with self.clock.part(WAITING):
                batch = next(batches)
            self.clock.begin(PREPARING)
            self.latest = sum(map(len, batch))
            if 0 <= number < self.steps:
                self.images += self.latest
                self.passes += len(batch)
            yield batch
            self._bar.advance()
        self.counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _begin(self, number: int) -> None:
        if number not in (0, self.steps, 2 * self.steps):
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        times = self.clock.times()
        if number == 0:
            pass
        elif number == self.steps:
            self.timed = times
            self.profiler.start()
        else:
            self.profiled = times
            self.profiler.stop()
            self.counter.__enter__()  # type: ignore[no-untyped-call]
        self.clock.restart()


def total(name: str, parts: Sequence[Part]) -> Part:
    """Return the sum of parts."""
    gpu = [one.gpu_seconds for one in parts if one.gpu_seconds is not None]
    return Part(
        name,
        "",
        sum(one.seconds for one in parts),
        sum(one.cpu_seconds for one in parts),
        sum(gpu) if gpu else None,
        sum(one.flops for one in parts),
        sum(one.bytes for one in parts),
    )


def profile_steps(
    params: Params, root: Path, *, steps: int = 20, trace: Path | None = None
) -> StepProfile:
    """Run training steps on a workspace's prepared data, and say where their time goes.

    No weights, checkpoints or runs are written.

    Args:
        params: of the training.
        root: the workspace.
        steps: how many are timed, and how many are profiled.
        trace: JSON to write, which Perfetto and chrome://tracing open; None: none.

    Raises:
        DataError: there are no prepared data.
        TrainingError: a step does not fit into memory.
    """
    device, _ = choose_device(params.runtime.device)
    want_bars(params.runtime.progress)
    micro_batch, limit = _micro_batch(params, root, device)
    data = TrainData.read(root, micro_batch)
    get_initial_weights(params, root)
    context, clock = build_training(params, len(data.class_names), device, data=data), PartClock()
    loader = context.loader
    quiet = logging.getLogger("runkey.training")
    level = quiet.level
    with (
        progress("profile", _WARM_STEPS + 2 * steps + 1, "steps") as bar,
        TemporaryDirectory() as t,
    ):
        measures = _Measures(loader, clock, steps, device, bar)
        settings = context.settings.model_copy(update={"epochs": 1})
        context = replace(label_parts(context, clock), loader=measures, settings=settings)
        quiet.setLevel(logging.WARNING)  # it would log one epoch of these steps
        try:
            fit(
                context,
                lambda _: {context.watched_metric: 0.0},
                tracker=JsonlLog(Path(t) / "train.jsonl"),
                limit=limit,
            )
        finally:
            quiet.setLevel(level)
            cast(Any, loader).close()
    if trace is not None:
        measures.profiler.export_chrome_trace(str(trace))
    return _summarise(measures, context, micro_batch, device)


def _micro_batch(params: Params, root: Path, device: torch.device) -> tuple[int, int | None]:
    """Return the micro-batch and limit of pixels that training takes here."""
    if (root / paths.MEMORY / MEMORY_MODEL).is_file():
        trials = paths.home_of(paths.store_root()) / CALIBRATION
        plan = plan_memory(params, root / paths.MEMORY, device, trials=trials)
        return plan.micro_batch, plan.limit_pixels
    training = params.training
    number = training.batch_size if training.micro_batch == "auto" else training.micro_batch
    logger.info(
        f"{paths.MEMORY}/ is missing: profiling with {counted(number, 'image')} at once; `dvc repro"
        " profile_memory` finds how many training takes"
    )
    return number, None


def _summarise(
    measures: _Measures, context: TrainContext, micro_batch: int, device: torch.device
) -> StepProfile:
    steps, timed, precision = measures.steps, measures.timed, context.step.precision
    recorded: Any = measures.profiler.events()  # type: ignore[no-untyped-call]
    events = read_events(recorded, measures.clock)
    on_gpu = device.type == "cuda"
    peaks = measure_peaks(device, precision.dtype or torch.float32)
    name = (
        torch.cuda.get_device_name(device)
        if on_gpu
        else describe_cpu(torch.backends.cpu.get_cpu_capability()).split(" (")[0]
    )
    return StepProfile(
        device=name,
        threads=torch.get_num_threads(),
        precision="fp32" if precision.dtype is None else str(precision.dtype)[6:],
        images=measures.images / steps,
        micro_batch=micro_batch,
        passes=measures.passes / steps,
        steps=steps,
        seconds=timed.seconds / steps,
        profiled_seconds=measures.profiled.seconds / steps,
        peak_flops=peaks[0],
        peak_bytes=peaks[1],
        parts=_parts(measures, events, on_gpu=on_gpu),
        gpu_busy=events.busy_seconds / measures.profiled.seconds if on_gpu else None,
        syncs=events.syncs / steps if on_gpu else None,
        sync_seconds=events.sync_seconds / steps if on_gpu else None,
    )


def _parts(measures: _Measures, events: Events, *, on_gpu: bool) -> tuple[Part, ...]:
    """Put all measurements together, in the order of a step."""
    steps, timed, counter = measures.steps, measures.timed, measures.counter
    # The work is that of the latest step, which may have fewer images than others.
    scale = measures.images / steps / measures.latest
    # The profiler divides the backward pass; how long it takes without one, the clock knows.
    backward = events.backward_shares()
    order = (LOSS, *reversed(MODEL))
    makers = [part for part in order if part in backward]
    makers += [part for part in backward if part not in order]
    keys: list[Key] = [("", WAITING), ("", PREPARING)]
    keys += [("", COPYING)] if on_gpu else []
    keys += [(FORWARD, part) for part in MODEL if part in timed.wall]
    keys += [("", MATCHING), ("", LOSS), *((BACKWARD, part) for part in makers)]
    keys += [("", CLIPPING), ("", OPTIMIZER), ("", AVERAGE), ("", LOGGING)]
    found = []
    for key in keys:
        of, name = key
        share, clocked = (backward[name], BACKWARD) if of == BACKWARD else (1.0, name)
        if clocked in timed.wall or key in events.gpu:
            found.append(
                Part(
                    name,
                    of,
                    timed.wall.get(clocked, 0.0) * share / steps,
                    timed.cpu.get(clocked, 0.0) * share / steps,
                    events.gpu.get(key, 0.0) / steps if on_gpu else None,
                    round(counter.flops[key] * scale),
                    round(counter.bytes[key] * scale),
                )
            )
    return tuple(found)


# The verdict.

_ADVICE: dict[str, tuple[tuple[str, ...], str]] = {
    "the backbone": (
        (BACKBONE,),
        "lower {data.short_sides} and {data.long_side}, or take a smaller {model.backbone}",
    ),
    "the encoder": (
        (ENCODER,),
        "lower {data.short_sides} and {data.long_side}, or {model.encoder_layers}",
    ),
    "the decoder with its heads": (
        (DECODER, HEADS),
        "lower {model.decoder_layers}, {model.num_queries} or {model.denoising.groups}",
    ),
    "matching and loss": (
        (MATCHING, LOSS),
        "lower {model.decoder_layers}, {model.num_queries} or {model.denoising.groups}",
    ),
    "updating the weights": (
        (CLIPPING, OPTIMIZER, AVERAGE),
        "raise {training.batch_size}: fewer updates for the same images, which may cost AP",
    ),
    "preparing images": ((PREPARING,), "lower {data.short_sides} and {data.long_side}"),
    "logging and checks": ((LOGGING,), "raise {runtime.log_every}"),
}


_OR_QUERIES = " or {model.num_queries}"
_LOST_SHARE = 0.3
"""More than a process that has its data waits by itself."""


def find_verdict(profile: StepProfile, params: Params) -> Hint:
    """Return what a step spends most on, and which parameter changes it.

    It is one of the hints of `runkey.plots.hints` if training waits for data, or the GPU for the
    host; else the parts that take longest, of kind `slowest`.
    """
    at_work = [one for one in profile.parts if one.name != WAITING]
    seconds = sum(one.seconds for one in at_work)
    waiting, busy = 1 - seconds / profile.seconds, profile.gpu_busy
    is_idle = busy is not None and busy < BUSY_SHARE
    if waiting >= WAIT_SHARE:
        return with_values(loader_hint(waiting), params.flat(runtime=True))
    if busy is not None and is_idle and profile.passes > 1:
        return with_values(host_hint(busy), params.flat(runtime=True))

    def cost(names: tuple[str, ...]) -> float:
        parts = [one for one in at_work if one.name in names]
        return sum(one.seconds if is_idle else one.busy_seconds for one in parts)

    name, (names, change) = max(_ADVICE.items(), key=lambda one: cost(one[1][0]))
    if not params.model.denoising.groups:
        change = change.replace(", {model.num_queries} or {model.denoising.groups}", _OR_QUERIES)
    whole = cost(tuple(one.name for one in at_work))
    seen = f"{name} takes the largest part of a step, {cost(names) / whole:.0%}"
    lost = 1 - sum(one.cpu_seconds for one in at_work) / seconds
    if busy is not None and is_idle:
        seen += f", and the GPU is busy {busy:.0%} of the time: the host is slower"
    elif busy is None and lost > _LOST_SHARE:
        seen += f", and other programs took the CPU for {lost:.0%} of the time"
    hint = Hint("slowest", seen, f"for faster steps, {change}")
    return with_values(hint, params.flat(runtime=True))
