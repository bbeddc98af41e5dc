"""A measuring process, whose death for want of memory has a line of its own.

Imports nothing that takes memory or time.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from runkey.errors import TrainingError

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
