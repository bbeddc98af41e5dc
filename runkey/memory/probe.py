"""The trial: training steps of the worst shape on the device at hand, and their peak.

    peaks = measure(make_step, probes, device)

`make_step` comes from the floors above, which know the training step; it builds the model, the
criterion, the optimizer and the moving average on the device, and returns the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from runkey.data.batch import Batch, Window
from runkey.errors import TrainingError

# Builds everything that trains, and returns a whole optimizer step over a window.
MakeStep = Callable[[], Callable[[Window], object]]

_STEPS = 2  # The first one makes the optimizer's state; the second has it from the start.
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Probe:
    """One trial."""

    images: int
    """Images of a forward pass."""
    height: int
    width: int
    objects: int
    """Boxes of each image."""
    num_classes: int

    def __str__(self) -> str:
        return f"{self.images} images of {self.height} x {self.width} pixels"


@dataclass(frozen=True, slots=True)
class Peak:
    """What a trial took."""

    images: int
    bytes: int
    """CPU: largest resident set of the process.  GPU: memory reserved by the allocator, and what
    was taken before the first tensor (the CUDA context, other processes)."""
    allocated_bytes: int
    """GPU: the part of it that tensors took.  CPU: the same as `bytes`."""


def measure(make_step: MakeStep, probes: Sequence[Probe], device: torch.device) -> list[Peak]:
    """The peaks of trials in this process, which should have done little else.

    On a CPU the later ones find the heap in pieces: measured for 8 images of 480 x 640, the line
    through 2 and 4 lies 5-10% above what a fresh process takes.

    Args:
        make_step: see `MakeStep`.
        probes: from few images to many, since a process's peak never falls.
        device: where `make_step` trains.

    Raises:
        TrainingError: a trial does not fit in memory.
    """
    assert [p.images for p in probes] == sorted(p.images for p in probes)
    taken = _taken_before(device)
    step = make_step()
    peaks = []
    for probe in probes:
        window = synthetic_window(probe)
        try:
            for _ in range(_STEPS):
                step(window)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise TrainingError(
                f"memory.probe_batches: a training step of {probe} does not fit on {device.type}; "
                "lower memory.probe_batches, data.short_sides and data.long_side, "
                "or set model.checkpointing: true"
            ) from None
        peaks.append(_peak(probe.images, taken, device))
    return peaks


def synthetic_window(probe: Probe) -> Window:
    """Two forward passes' worth of images: the second runs while the first's gradients are there.

    The last image is smaller, as in a real batch that pads.
    """
    rng = torch.Generator().manual_seed(probe.images)
    boxes = probe.images * probe.objects
    sizes = torch.tensor([[probe.height, probe.width]] * probe.images)
    sizes[-1, 0] = max(1, probe.height * 3 // 4)
    pixels = (probe.images, 3, probe.height, probe.width)
    batch = Batch(
        images=torch.randint(0, 256, pixels, dtype=torch.uint8, generator=rng),
        sizes=sizes,
        boxes_cxcywh=torch.rand(boxes, 4, generator=rng) * 0.4 + 0.3,
        labels=torch.randint(0, probe.num_classes, (boxes,), generator=rng),
        counts=(probe.objects,) * probe.images,
        image_ids=tuple(range(probe.images)),
        original_sizes=sizes,
        colour=torch.ones(probe.images, 3),
    )
    return batch, batch


def peak_resident_bytes(status: Path = _STATUS) -> int:
    """Largest resident set that this process has had, bytes.

    Not `getrusage`, whose maximum a process inherits from the one that started it.
    """
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the GPU's allocator, or the CPU's, got no memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _taken_before(device: torch.device) -> int:
    """GPU memory in use before the first tensor, bytes; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _peak(images: int, taken: int, device: torch.device) -> Peak:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        reserved = torch.cuda.max_memory_reserved(device)
        return Peak(images, reserved + taken, torch.cuda.max_memory_allocated(device) + taken)
    resident = peak_resident_bytes()
    return Peak(images, resident, resident)
