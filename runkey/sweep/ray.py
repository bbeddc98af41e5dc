"""Ray: each trial is a task of a cluster that runs already.

Ray is not in this environment: a process with the Python of `.venv-ray` (`make env-ray`) talks to
the cluster (`environment/ray/trials.py`), and this one talks to that process in JSON lines. When
this process dies, that one ends the tasks, whose trainings write a checkpoint and end.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from runkey.errors import RunkeyError
from runkey.sweep.executor import Ended, Trial, last_line

logger = logging.getLogger(__name__)

PYTHON = ".venv-ray/bin/python"
PROGRAM = "environment/ray/trials.py"
_PASSED = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")
"""Variables that trials get from this process. Credentials are not sent: each node has its own."""
_LOGS = ".runkey/sweeps"
_START_SECONDS = 120.0
_PATIENCE = 60.0


class RayExecutor:
    """Runs trials as tasks of a Ray cluster, each in the clone of the node it lands on."""

    is_remote = True

    def __init__(self, root: Path, address: str, logs: Path) -> None:
        """Connect to the cluster.

        Args:
            root: this checkout. A node looks for its own clone in the same folder, or in the one
                that RUNKEY_REPOSITORY names where `ray start` ran.
            address: `HOST:PORT`, `ray://HOST:PORT`, or `auto` for the cluster of this machine.
            logs: folder here for what Ray prints. What a trial prints is in the node's clone, in
                `.runkey/sweeps/<key of the sweep>/<key>.log`.

        Raises:
            RunkeyError: Ray's environment is missing, or the cluster does not answer.
        """
        self.place = "Ray" if address == "auto" else f"Ray at {address}"
        self._root, self._logs = root, Path(_LOGS, logs.parent.name)
        self._ended: list[Ended] = []
        self._running: set[str] = set()
        if not (root / PYTHON).is_file():
            raise RunkeyError(f"{PYTHON}: not found; `make env-ray` installs Ray for --on ray")
        self._errors = logs / "ray.log"
        logs.mkdir(parents=True, exist_ok=True)
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(root / PYTHON), str(root / PROGRAM), address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"PYTHONPATH": ""},
                start_new_session=True,  # Ctrl-C reaches this process alone, which cancels
            )
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            ready = self._events.get(timeout=_START_SECONDS)
        except queue.Empty:
            ready = {}
        if ready.get("event") != "ready":
            self._process.kill()
            raise RunkeyError(f"{self.place}: {self._why()}; `ray status` shows what runs there")
        self._cpus = max(1, int(ready["cpus"]))

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        self._events.put({"event": "gone"})

    def _why(self) -> str:
        text = self._errors.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return (lines or ["no answer"])[-1]

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RunkeyError(f"{self.place}: {self._why()}; see {self._errors}") from None

    def capacity(self) -> int:
        """See `Executor`."""
        return self._cpus

    def has_room(self, trial: Trial) -> bool:  # noqa: ARG002
        """See `Executor`: Ray has a queue."""
        return True

    def submit(self, trial: Trial) -> None:
        """See `Executor`."""
        self._running.add(trial.key)
        self._write(
            {
                "key": trial.key,
                "arguments": trial.arguments,
                "peak_bytes": trial.peak_bytes,
                "folder": str(self._root),
                "python": sys.executable,
                "log": str(self._logs / f"{trial.key}.log"),
                "environment": {name: os.environ[name] for name in _PASSED if name in os.environ},
            }
        )

    def poll(self) -> list[Ended]:
        """See `Executor`."""
        while not self._events.empty():
            event = self._events.get()
            if event["event"] == "gone":
                raise RunkeyError(f"{self.place}: {self._why()}; see {self._errors}")
            if event["event"] == "started":
                logger.info(f"{event['key'][:12]} is on {event['host']}, log {event['log']}")
            elif event["key"] in self._running:
                self._running.discard(event["key"])
                said = last_line(event["text"])
                self._ended.append(Ended(event["key"], event["code"], said))
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, key: str) -> None:
        """See `Executor`."""
        if key in self._running:
            self._write({"cancel": key})

    def close(self) -> None:
        """See `Executor`. The end of its input ends the process, and with it what still runs."""
        assert self._process.stdin
        end = time.monotonic() + _PATIENCE
        for key in self._running:
            self.cancel(key)
        while self._running and self._process.poll() is None and time.monotonic() < end:
            self.poll()
            time.sleep(0.1)
        self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
