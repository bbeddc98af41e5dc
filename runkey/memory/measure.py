"""Find what memory a machine has, and measure training steps in a process of their own.

    result = run_trial(factory, job, device)

memory/measured.json holds what steps took on this machine. DVC does not cache it, since it differs
from run to run; where it is missing, or belongs to another memory.json, the prediction counts.
.runkey/memory.json keeps trials on GPUs, which correct later predictions.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter

from runkey.errors import TrainingError
from runkey.files import expect, read_json, write_json
from runkey.memory.predict import Line, line_through
from runkey.memory.trace.events import MicroBatch
from runkey.memory.trace.record import BatchFields, StepFactory, synthetic_batch
from runkey.units import GIB, MIB, counted

MEASURED = "measured.json"
CALIBRATION = "memory.json"

_PROCESS_BYTES = 700 * MIB
"""CPU: Python, torch and MLflow before any tensor."""
_HEAP_FACTOR = 1.5
"""CPU: resident bytes for each byte of tensors: a fragmented heap, and oneDNN's own layouts."""
_SPARE_BYTES = 256 * MIB
_SPARE_PART = 0.03
_MEMINFO = Path("/proc/meminfo")
# A container's limit and use, with cgroups version 2 and version 1.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def cpu_line(tensors: Line) -> Line:
    """Return the peak resident memory on a CPU over the images, estimated from above."""
    return Line(
        _PROCESS_BYTES + _HEAP_FACTOR * tensors.base_bytes, _HEAP_FACTOR * tensors.bytes_per_image
    )


# The budget.


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The bytes that a training step may take."""

    bytes: int
    text: str
    """How it is made up, such as `16.00 GiB memory.budget_gib less 0.48 to spare`."""


def spare_bytes(budget_bytes: int) -> int:
    """Return what is left free of a budget: max(256 MiB, 3%)."""
    return max(_SPARE_BYTES, round(_SPARE_PART * budget_bytes))


def memory_budget(
    budget_gib: float | Literal["device"], device: torch.device, outside_bytes: int
) -> MemoryBudget:
    """Return what tensors may take on a device that this process has nothing on yet.

    Args:
        budget_gib: `memory.budget_gib`: GiB for the process, or "device" for all that is free.
        device: where training runs.
        outside_bytes: what the process takes beside tensors. GPU: the CUDA context and kernels.
            CPU: 0, since the whole process is measured there.
    """
    if budget_gib != "device":
        budget, what = round(budget_gib * GIB), "memory.budget_gib"
    elif device.type == "cpu":
        budget, what = available_bytes(_MEMINFO, _CGROUPS), "available"
    else:
        free, total = torch.cuda.mem_get_info(device)
        # Our context is missing already, or at least that much of others.
        budget = free + min(outside_bytes, total - free)
        what = f"free on {torch.cuda.get_device_name(device)}"
    spare = spare_bytes(budget)
    beside = f", {outside_bytes / GIB:.2f} for the CUDA context" if outside_bytes else ""
    text = f"{budget / GIB:.2f} GiB {what} less {spare / GIB:.2f} to spare{beside}"
    return MemoryBudget(budget - spare - outside_bytes, text)


def available_bytes(meminfo: Path, cgroups: tuple[tuple[Path, Path], ...]) -> int:
    """Return the main memory that a new process can have.

    Args:
        meminfo: the kernel's table; its `MemAvailable` counts caches that it would give up.
        cgroups: files with a limit and with the current use; missing ones set no limit.
    """
    available = _kib(meminfo, "MemAvailable")
    for limit, used in cgroups:
        text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
        if text != "max":
            available = min(available, int(text) - int(used.read_text(encoding="ascii")))
    return available


def _kib(table: Path, name: str) -> int:
    """Read a size from one of the kernel's tables; returns bytes."""
    lines = table.read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[name].split()[0]) * 1024


# A trial: training steps in a process that has done nothing else.


_STEPS = 2  # The first one allocates the optimizer's state; the second has it from the start.
_STATUS = Path("/proc/self/status")
_NO_MEMORY = "can't allocate memory"  # what the CPU's allocator says
_WAY_OUT = (
    "lower memory.probe_batches, data.short_sides and data.long_side, "
    "or set model.checkpointing: true"
)


@dataclass(frozen=True, slots=True)
class TrialJob:
    """What a trial runs."""

    worst: tuple[MicroBatch, ...]
    """From few images to many, since a process's peak never falls. Each runs in two steps of two
    micro-batches, so that one runs while the gradients of another are alive. Empty: only report
    the budget."""
    sampled: tuple[tuple[MicroBatch, ...], ...]
    """Steps after those."""
    fields: BatchFields
    budget_gib: float | Literal["device"]
    """GPU: `memory.budget_gib`, which caps the allocator."""
    outside_bytes: int
    """GPU: what the process is assumed to take outside the allocator."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that training steps took."""

    images: int
    bytes: int
    """CPU: peak resident memory of the process. GPU: bytes reserved by the allocator."""
    allocated_bytes: int
    """GPU: the part of it that tensors and workspaces took. CPU: the same as `bytes`."""


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What a trial measured."""

    peaks: tuple[Peak, ...]
    """After each of the job's `worst`, the last one after `sampled` too; fewer if memory ran
    out."""
    retries: int = 0
    """GPU: times that the allocator freed its cache to go on."""
    outside_bytes: int = 0
    """GPU: what the process took outside the allocator, without other processes where known."""
    budget_bytes: int = 0
    """GPU: what the allocator could hold."""

    def passed(self, job: TrialJob) -> bool:
        """Return True if all steps ran without a retry."""
        return len(self.peaks) == len(job.worst) and not self.retries


def run_trial(factory: StepFactory, job: TrialJob, device: torch.device) -> TrialResult:
    """Run a job in this process, which should have done little else.

    On a CPU, later peaks find a fragmented heap: for 8 images of 480 x 640, the line through 2 and
    4 lies 5-10% above what a fresh process takes.

    Raises:
        TrainingError: it does not fit in a CPU's memory.
    """
    others = budget = 0
    if device.type == "cuda":
        others = _used_by_others(device)
        budget = max(0, memory_budget(job.budget_gib, device, job.outside_bytes).bytes)
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    peaks: list[Peak] = []
    try:
        for images in _run(factory, job, device):
            peaks.append(_peak(images, device))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _NO_MEMORY not in str(error):
            raise
        if device.type == "cpu":
            one = job.worst[len(peaks)]
            raise TrainingError(
                f"memory.probe_batches: a training step of {counted(one.images, 'image')} of "
                f"{one.height} x {one.width} pixels does not fit in memory; {_WAY_OUT}"
            ) from None
    if device.type != "cuda":
        return TrialResult(tuple(peaks))
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device) - others
    retries = int(torch.cuda.memory_stats(device)["num_alloc_retries"])
    return TrialResult(tuple(peaks), retries, max(0, outside), budget)


def _run(factory: StepFactory, job: TrialJob, device: torch.device) -> Iterator[int]:
    """Run the steps; yield the images of each of `worst` when its steps are done."""
    if not job.worst:
        return
    step = factory(device).step
    for one in job.worst:
        sampled = job.sampled if one is job.worst[-1] else ()
        for micro_batches in ((one, one),) * _STEPS + sampled:
            step(tuple(synthetic_batch(sizes, job.fields) for sizes in micro_batches))
        yield one.images


def read_as[T](kind: type[T], path: Path) -> T:
    """Read a dataclass that `write_json` wrote with `asdict`."""
    return TypeAdapter(kind).validate_json(path.read_bytes())


def _peak(images: int, device: torch.device) -> Peak:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        reserved = torch.cuda.max_memory_reserved(device)
        return Peak(images, reserved, torch.cuda.max_memory_allocated(device))
    # Not by `getrusage`, whose maximum a process inherits from the one that started it.
    resident = _kib(_STATUS, "VmHWM")
    return Peak(images, resident, resident)


def _used_by_others(device: torch.device) -> int:
    """GPU memory in use before this process takes any, bytes; 0 without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [program, gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    used = answer.stdout.strip()
    return int(used) * MIB if used.isdigit() else 0


def wait_for(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a measuring process, whose output is not captured.

    Raises:
        TrainingError: the kernel killed it, as it does when memory runs out.
        SystemExit: it ended with another error, which it has printed.
    """
    code = process.wait()
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):  # itself, or as a shell tells
        raise TrainingError(
            "memory.probe_batches: the machine ran out of memory while training steps were "
            f"measured; {_WAY_OUT}"
        )
    if code:
        raise SystemExit(code)


# .runkey/memory.json: trials on this machine, which correct the next prediction.


_FORMAT = 1
_MOST_TRIALS = 200
_DRIVER = Path("/proc/driver/nvidia/version")
_LEAST = 0.5
"""No measurement lowers a bound further, since a trial runs for some steps only."""
_MARGIN = 1.01


@dataclass(frozen=True, slots=True)
class Platform:
    """What memory depends on beside the training itself."""

    device: str
    driver: str
    torch: str


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial that passed: what it took against what was predicted."""

    platform: Platform
    model: str
    """sha256 of the memory.json that predicted."""
    images: int
    """Micro-batch."""
    upper_bytes: int
    """Predicted: most bytes that the allocator holds."""
    reserved_bytes: int
    """Measured: the same."""
    allocated_bytes: int
    """Measured: what tensors and workspaces took of it."""
    outside_bytes: int
    """Measured: what the process took outside the allocator."""
    retries: int
    """Times that the allocator freed its cache to go on."""


@dataclass(frozen=True, slots=True)
class Correction:
    """How trials correct a prediction."""

    factor: float = 1.0
    """On upper bounds."""
    outside_bytes: int | None = None
    """None: never measured here."""


def this_platform(device: torch.device) -> Platform:
    """Return the platform of a device."""
    if device.type != "cuda":
        return Platform(device.type, "", torch.__version__)
    text = _DRIVER.read_text(encoding="utf-8") if _DRIVER.is_file() else ""
    version = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text)
    driver = version.group(1) if version else "unknown"
    return Platform(torch.cuda.get_device_name(device), driver, torch.__version__)


def read_trials(path: Path) -> tuple[Trial, ...]:
    """Read the trials of a machine, oldest first; none if there is no file.

    Raises:
        TrainingError: the file is damaged.
    """
    try:
        tree = read_json(path)
        if tree["format"] != _FORMAT:
            raise ValueError("another format")
        return TypeAdapter(tuple[Trial, ...]).validate_python(tree["trials"])
    except FileNotFoundError:
        return ()
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:90]
        raise TrainingError(
            f"{path}: no trials of this version ({reason}); delete it, the next "
            "`dvc repro -f profile_memory` on a GPU writes it anew"
        ) from None


def add_trials(path: Path, new: Sequence[Trial]) -> None:
    """Add trials; the latest of each platform, model and micro-batch is kept."""
    same = {(one.platform, one.model, one.images) for one in new}
    old = [t for t in read_trials(path) if (t.platform, t.model, t.images) not in same]
    trials = [asdict(one) for one in (*old, *new)][-_MOST_TRIALS:]
    write_json(path, {"format": _FORMAT, "trials": trials})


def correction(trials: Sequence[Trial], platform: Platform, model: str) -> Correction:
    """Return how the trials of a platform correct a prediction.

    Trials of this memory.json correct it in both directions; those of others only upwards, since
    another training need not leave as much unused. `model` is the sha256 of memory.json.
    """
    here = [t for t in trials if t.platform == platform and not t.retries]
    if not here:
        return Correction()
    own = [t.reserved_bytes / t.upper_bytes for t in here if t.model == model]
    others = [t.reserved_bytes / t.upper_bytes for t in here if t.model != model]
    factor = max(_LEAST, max(own) * _MARGIN) if own else max(1.0, max(others) * _MARGIN)
    return Correction(factor, max(t.outside_bytes for t in here))


# memory/measured.json.


def write_cpu(folder: Path, model: str, platform: Platform, peaks: Sequence[Peak]) -> Line:
    """Write the peaks of a CPU, for the memory.json with sha256 `model`; return their line."""
    line = line_through(*((peak.images, peak.bytes) for peak in (peaks[0], peaks[-1])))
    trees = [asdict(peak) for peak in peaks]
    content = {"model": model, "platform": asdict(platform), "peaks": trees, "line": asdict(line)}
    write_json(folder / MEASURED, content)
    return line


def write_gpu(folder: Path, model: str, trials: Sequence[Trial]) -> None:
    """Write the trials on a GPU."""
    trees = [asdict(trial) for trial in trials]
    write_json(folder / MEASURED, {"model": model, "trials": trees})


def read_line(folder: Path, model: str) -> Line | None:
    """Return the line measured on a CPU for the memory.json with this sha256, if there is one."""
    path = folder / MEASURED
    if not path.is_file():
        return None
    try:
        tree = read_json(path)
        known = tree["model"] == model and "line" in tree
        line: Line | None = expect(Line, tree["line"]) if known else None
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(
            f"{path}: not what was measured ({error}); run `dvc repro -f profile_memory`"
        ) from None
    return line
