"""Run the measuring process so that its death for want of memory has a line of its own.

Imports nothing that takes memory or time: this process only waits.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from runkey.errors import TrainingError

_SHELL = 128


def run_guarded(command: Sequence[str], root: Path) -> int:
    """Run a command with this process's output streams, and return its exit code.

    Args:
        command: the process that measures.
        root: its current folder.

    Raises:
        TrainingError: the kernel killed it, as it does with what takes too much memory.
    """
    code = subprocess.run(command, cwd=root, check=False).returncode
    if code in (-signal.SIGKILL, _SHELL + signal.SIGKILL):
        raise TrainingError(
            "memory.probe_batches: the machine ran out of memory while training steps were "
            "measured; lower memory.probe_batches, data.short_sides and data.long_side, "
            "or set model.checkpointing: true"
        )
    return code
