"""A trial: training steps in a process that has done nothing else, and what they took at most.

    result = run_trial(make_step, job, device)

`make_step` comes from the floors above, which know the training step; it builds the model, the
criterion, the optimizer and the moving average on the device, and returns the step.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from runkey.data.dataset import GlobalBatch
from runkey.errors import TrainingError
from runkey.memory.choose import room_on
from runkey.memory.memory_model import MIB, Line
from runkey.memory.trace.record import synthetic_batch
from runkey.memory.trace.tracker import Pass

# What a process takes on a CPU, from the bytes of its tensors.


_PROCESS_BYTES = 700 * MIB
"""Python, torch and MLflow before any tensor."""
_HEAP_FACTOR = 1.5
"""Resident bytes a byte of tensors: the heap's pieces, and what oneDNN lays out anew."""


def cpu_line(tensors: Line) -> Line:
    """Peak resident set over the images of a forward pass; rather too much than too little."""
    return Line(
        _PROCESS_BYTES + _HEAP_FACTOR * tensors.base_bytes, _HEAP_FACTOR * tensors.bytes_per_image
    )


# A measuring process, whose death for want of memory has a line of its own.


_SHELL = 128


class Guarded:
    """A process that runs beside this one, with its output streams."""

    def __init__(self, command: Sequence[str], root: Path, environment: Mapping[str, str]) -> None:
        """Start a command in the folder `root`."""
        self._process = subprocess.Popen(command, cwd=root, env=environment)

    def stop(self) -> None:
        """End the process if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            TrainingError: the kernel killed it, as it does with what takes too much memory.
            SystemExit: it ended with another error, of which it has told.
        """
        code = self._process.wait()
        if code in (-signal.SIGKILL, _SHELL + signal.SIGKILL):
            raise TrainingError(
                "memory.probe_batches: the machine ran out of memory while training steps were "
                "measured; lower memory.probe_batches, data.short_sides and data.long_side, "
                "or set model.checkpointing: true"
            )
        if code:
            raise SystemExit(code)


# Builds everything that trains, and returns a whole optimizer step over a window.
MakeStep = Callable[[], Callable[[GlobalBatch], object]]

_STEPS = 2  # The first one makes the optimizer's state; the second has it from the start.
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Job:
    """What a trial runs."""

    worst: tuple[Pass, ...]
    """From few images to many, since a process's peak never falls; each in two steps of two
    passes, so that one runs while the gradients of another are there.  None: only ask for room."""
    census: tuple[tuple[Pass, ...], ...]
    """Steps after those."""
    num_classes: int
    colour: int | None
    budget_gib: float | Literal["device"]
    """GPU: `memory.budget_gib`, which the allocator is kept to."""
    outside_bytes: int
    """GPU: what the process is taken to have beside the allocator."""


@dataclass(frozen=True, slots=True)
class Peak:
    """What training steps have taken at most."""

    images: int
    bytes: int
    """CPU: largest resident set of the process.  GPU: memory held by the allocator."""
    allocated_bytes: int
    """GPU: the part of it that tensors and workspaces took.  CPU: the same as `bytes`."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a trial went."""

    peaks: tuple[Peak, ...]
    """After each of the job's `worst`, the last one after its `census` too; fewer if memory did
    not suffice."""
    retries: int
    """GPU: times that the allocator gave its cache back to go on."""
    outside_bytes: int
    """GPU: what the process took beside the allocator, as far as it can be told from others."""
    room_bytes: int
    """GPU: what the allocator could hold."""

    def holds(self, job: Job) -> bool:
        """Whether all steps ran without a retry."""
        return len(self.peaks) == len(job.worst) and not self.retries


def run_trial(make_step: MakeStep, job: Job, device: torch.device) -> Result:
    """Run a job in this process, which should have done little else.

    On a CPU later peaks find the heap in pieces: measured for 8 images of 480 x 640, the line
    through 2 and 4 lies 5-10% above what a fresh process takes.

    Args:
        make_step: see `MakeStep`.
        job: what to run.
        device: where `make_step` trains.

    Raises:
        TrainingError: it does not fit in a CPU's memory.
    """
    others = room = 0
    if device.type == "cuda":
        others = _used_by_others(device)
        room = max(0, room_on(job.budget_gib, device, job.outside_bytes).bytes)
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    peaks: list[Peak] = []
    try:
        for images in _run(make_step, job):
            peaks.append(_peak(images, device))
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        if device.type == "cpu":
            raise TrainingError(too_large(job.worst[len(peaks)])) from None
    return _result(tuple(peaks), device, others, room)


def _run(make_step: MakeStep, job: Job) -> Iterator[int]:
    """Run the steps; yields the images of each of `worst` when its steps are done."""
    if not job.worst:
        return
    step = make_step()
    for one in job.worst:
        windows: list[tuple[Pass, ...]] = [(one, one)] * _STEPS
        if one is job.worst[-1]:
            windows += job.census
        for window in windows:
            step(tuple(synthetic_batch(p, job.num_classes, job.colour) for p in window))
        yield one.batch


def too_large(one: Pass) -> str:
    """The line for a trial that does not fit."""
    return (
        f"memory.probe_batches: a training step of {one.batch} images of {one.height} x "
        f"{one.width} pixels does not fit in memory; lower memory.probe_batches, "
        "data.short_sides and data.long_side, or set model.checkpointing: true"
    )


def peak_resident_bytes(status: Path = _STATUS) -> int:
    """Largest resident set that this process has had, bytes.

    Not `getrusage`, whose maximum a process inherits from the one that started it.
    """
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def write_json(path: Path, content: Job | Result) -> None:
    """Write a job, or its result, for another process."""
    path.write_text(json.dumps(asdict(content)), encoding="utf-8")


def read_job(path: Path) -> Job:
    """Read what `write_json` wrote."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    worst = tuple(Pass(**one) for one in tree["worst"])
    census = tuple(tuple(Pass(**one) for one in window) for window in tree["census"])
    return Job(**tree | {"worst": worst, "census": census})


def read_result(path: Path) -> Result:
    """Read what `write_json` wrote."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    return Result(**tree | {"peaks": tuple(Peak(**one) for one in tree["peaks"])})


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the GPU's allocator, or the CPU's, got no memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _peak(images: int, device: torch.device) -> Peak:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        reserved = torch.cuda.max_memory_reserved(device)
        return Peak(images, reserved, torch.cuda.max_memory_allocated(device))
    resident = peak_resident_bytes()
    return Peak(images, resident, resident)


def _result(peaks: tuple[Peak, ...], device: torch.device, others: int, room: int) -> Result:
    if device.type != "cuda":
        return Result(peaks, 0, 0, 0)
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device) - others
    retries = int(torch.cuda.memory_stats(device)["num_alloc_retries"])
    return Result(peaks, retries, max(0, outside), room)


def _used_by_others(device: torch.device) -> int:
    """GPU memory in use before this process takes any, bytes; 0 if nvidia-smi is not there."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [program, gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    used = answer.stdout.strip()
    return int(used) * MIB if used.isdigit() else 0
