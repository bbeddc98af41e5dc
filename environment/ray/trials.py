"""Run trials as tasks of a Ray cluster.  runkey.sweep.ray starts this with the Python of .venv-ray.

    .venv-ray/bin/python environment/ray/trials.py ADDRESS

It reads one JSON object a line from standard input, a trial to start or to cancel, and writes one a
line to standard output: a trial has started on a node, or has ended with an exit code.  It imports
nothing of runkey, which is not in that environment.  At the end of its input it ends the tasks that
still run, and leaves the cluster as it is.
"""

import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

POLL_SECONDS = 0.5
TRY_ELSEWHERE = 75
SHOWN_LINES = 20
"""Last lines of a trial's output, sent back with its exit code."""
# Runs between a worker and its trial.  When a sweep ends, Ray kills a worker's children and process
# group.  The trial is the child of this program, in another group; the kernel sends it SIGTERM when
# this program dies, so that it writes a checkpoint.
GUARD = f"""\
import ctypes, signal, subprocess, sys
die_with_parent = ctypes.CDLL(None).prctl
die_with_parent(1, signal.SIGKILL)
trial = subprocess.Popen(
    sys.argv[1:], start_new_session=True, preexec_fn=lambda: die_with_parent(1, signal.SIGTERM)
)
signal.signal(signal.SIGTERM, lambda *_: trial.terminate())
code = trial.wait()
sys.exit({TRY_ELSEWHERE} if code < 0 else code)
"""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Board:
    """What tasks report while they run."""

    def __init__(self) -> None:
        self.events: list[dict] = []

    def add(self, event: dict) -> None:
        """Keep an event."""
        self.events.append(event)

    def take(self) -> list[dict]:
        """Return the events since the last call."""
        taken, self.events = self.events, []
        return taken


def run_trial(job: dict, board) -> dict:  # noqa: ANN001
    """Run a trial's command in the repository of this node; return how it ended."""
    node = ray.get_runtime_context().get_node_id()
    place = {"key": job["key"], "node": node, "host": ray.util.get_node_ip_address()}
    folder = Path(os.environ.get("RUNKEY_REPOSITORY", job["folder"]))
    if not folder.is_dir():
        text = f"{folder}: not on this node; clone the repository there, or set RUNKEY_REPOSITORY"
        return place | {"event": "ended", "code": TRY_ELSEWHERE, "text": f"error: {text}"}
    log = folder / job["log"]
    log.parent.mkdir(parents=True, exist_ok=True)
    own = folder / ".venv/bin/python"
    command = [sys.executable, "-c", GUARD]
    command += [str(own) if own.exists() else job["python"], "-m", "runkey", *job["arguments"]]
    # A worker's other variables name Ray's own Python.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON"))}
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=inherited | job["environment"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        started = {"event": "started", "log": str(log), "pid": process.pid}
        board.add.remote(place | started)  # a task that waits for an answer gives its CPU away
        code = process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return place | {"event": "ended", "code": code, "text": "".join(lines[-SHOWN_LINES:])}


def interrupt(pid: int) -> None:
    """Ask a trial on this node to end."""
    os.kill(pid, 15)


def gpu_bytes() -> int:
    """Return the memory of this node's smallest GPU; 0 where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return min((int(line) * 2**20 for line in listed.split()), default=0)


def alive_nodes() -> list[dict]:
    """Return Ray's description of each node that lives."""
    return [node for node in ray.nodes() if node["Alive"]]


def on_node(node: str, *, soft: bool) -> NodeAffinitySchedulingStrategy:
    """Return what places a task on a node; `soft`: or on another one if that is gone."""
    return NodeAffinitySchedulingStrategy(node, soft=soft)


class Trials:
    """The trials that run as tasks."""

    def __init__(self) -> None:
        self.board = Board.remote()
        self.task = ray.remote(max_retries=-1)(run_trial)
        self.running: dict = {}
        """Key by task."""
        self.started: dict[str, dict] = {}
        """Where each trial runs, by key."""
        self.tried: defaultdict[str, list[str]] = defaultdict(list)
        """Nodes on which a trial ended with `TRY_ELSEWHERE`, by key."""
        nodes = alive_nodes()
        ask = ray.remote(num_cpus=0, max_retries=0)(gpu_bytes)
        asked = [
            ask.options(scheduling_strategy=on_node(node["NodeID"], soft=False)).remote()
            for node in nodes
            if node["Resources"].get("GPU")
        ]
        self.gpu_bytes = min(filter(None, ray.get(asked)), default=0)
        self.node_bytes = [int(node["Resources"].get("memory", 0)) for node in nodes]

    def start(self, job: dict) -> None:
        """Start a trial, on a node where it has not been tried yet if there is one."""
        peak = job["peak_bytes"]
        largest = self.gpu_bytes or max(self.node_bytes)
        if peak and peak > largest:
            text = (
                f"error: it takes up to {peak / 2**30:.2f} GiB, the largest device of the cluster"
            )
            text += f" has {largest / 2**30:.2f}"
            write({"key": job["key"], "event": "ended", "code": 1, "text": text})
            return
        options: dict = {"name": job["key"], "num_cpus": 1}
        if self.gpu_bytes:  # Ray counts GPUs in steps of 1/10,000
            share = math.ceil((peak or largest) / self.gpu_bytes * 10_000) / 10_000
            options["num_gpus"] = min(1, share)
        else:
            options["memory"] = peak or min(self.node_bytes)
        tried = self.tried[job["key"]]
        others = [node["NodeID"] for node in alive_nodes() if node["NodeID"] not in tried]
        if tried and others:
            options["scheduling_strategy"] = on_node(others[0], soft=True)
        self.running[self.task.options(**options).remote(job, self.board)] = job["key"]

    def cancel(self, key: str) -> None:
        """Ask a trial to end; one that has not started never does."""
        if place := self.started.get(key):
            end = ray.remote(num_cpus=0, max_retries=0)(interrupt)
            end.options(scheduling_strategy=on_node(place["node"], soft=False)).remote(place["pid"])
            return
        for reference, other in self.running.items():
            if other == key:
                ray.cancel(reference)

    def poll(self) -> None:
        """Write what happened since the last call."""
        references = list(self.running)
        done, _ = ray.wait(references, num_returns=len(references), timeout=POLL_SECONDS)
        for event in ray.get(self.board.take.remote()):
            if event["key"] in self.running.values():
                self.started[event["key"]] = event
                write(event)
        for reference in done:
            key = self.running.pop(reference)
            self.started.pop(key, None)
            try:
                event = ray.get(reference)
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                event = {"key": key, "event": "ended", "code": TRY_ELSEWHERE, "text": lines[0]}
            if event["code"] == TRY_ELSEWHERE and "node" in event:
                self.tried[key].append(event["node"])
            write(event)


def write(event: dict) -> None:
    """Write a line for the process that started this one."""
    ANSWERS.write(json.dumps(event) + "\n")
    ANSWERS.flush()


def main() -> None:
    """Start and follow trials until standard input ends."""
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="warning", namespace="runkey")
    trials = Trials()
    write({"event": "ready", "cpus": int(ray.cluster_resources().get("CPU", 1))})
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            asked.put(line)
        asked.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        while not (trials.running and asked.empty()):
            line = asked.get()
            if not line:
                return
            job = json.loads(line)
            if "cancel" in job:
                trials.cancel(job["cancel"])
            else:
                trials.start(job)
        trials.poll()


if __name__ == "__main__":
    # Ray prints on standard output too: from here on that is standard error.
    ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main()
