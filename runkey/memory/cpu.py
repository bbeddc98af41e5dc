"""What a process takes on a CPU, from the bytes of its tensors."""

from __future__ import annotations

from runkey.memory.line import MIB, Line

_PROCESS_BYTES = 700 * MIB
"""Python, torch and MLflow before any tensor."""
_HEAP_FACTOR = 1.5
"""Resident bytes a byte of tensors: the heap's pieces, and what oneDNN lays out anew."""


def cpu_line(tensors: Line) -> Line:
    """Peak resident set over the images of a forward pass; rather too much than too little."""
    return Line(
        _PROCESS_BYTES + _HEAP_FACTOR * tensors.base_bytes, _HEAP_FACTOR * tensors.bytes_per_image
    )
