"""Slurm: trials are tasks of job arrays, which run on without this process.

A batch of trials is one `sbatch` array. Its folder holds a file with a line for each task, its
script, and what each task printed; the array's comment names the folder. So a later process finds
in `squeue` what an earlier one submitted. Slurm repeats a task whose node is lost (`--requeue`),
and the script asks it to repeat one that ended with exit code 75. What a cluster wants beside that
(partition, account, time limit) comes from sbatch's own variables: SBATCH_PARTITION, ...

Nodes see this checkout's folder under the same path, as is usual with Slurm.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runkey.errors import TRY_ELSEWHERE, RunkeyError
from runkey.files import write_atomically
from runkey.sweep.executor import Ended, Trial, last_line_of
from runkey.units import GIB, MIB, counted

logger = logging.getLogger(__name__)

_TRIALS = "trials"
"""File of an array's folder: a key and the arguments of `runkey` on the line of each task."""
_BESIDE_BYTES = 1 * GIB
"""Main memory of a trial beside its training process: DVC, this command, data-loader processes."""
_MOST_RESTARTS = 5
_QUERY_SECONDS = 60.0
_PAUSE_SECONDS = 5.0
"""Between two questions to the controller, which all users of a cluster share."""
_PATIENCE = 60.0
# Slurm starts the script in the checkout. Before a time limit it sends USR1 (to this shell alone),
# when it cancels the task TERM; both ask the training for a checkpoint. A task that Slurm starts
# again because its node was lost waits until the claim of the process there counts as dead.
_SCRIPT = """\
#!/bin/sh
{options}
folder={folder}
task=$folder/$SLURM_ARRAY_TASK_ID
again=
stop() {{ kill -TERM "$child" 2>/dev/null; }}
trap 'again=yes; stop' USR1
trap stop TERM INT
rm -f "$task.code"
eval "set -- $(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$folder/trials")"
shift
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] && [ ! -e "$task.again" ]; then set -- "$@" --wait; fi
rm -f "$task.again"
{python} -m runkey "$@" &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
if [ -n "$again" ] || [ $code = {elsewhere} ]; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ]; then
    : > "$task.again"
    exec scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
  fi
fi
echo $code > "$task.code.new" && mv "$task.code.new" "$task.code"
exit $code
"""


@dataclass(frozen=True, slots=True)
class _Task:
    """A task of an array."""

    array: str
    index: int
    folder: Path

    @property
    def name(self) -> str:
        """As Slurm's commands take it."""
        return f"{self.array}_{self.index}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.index}.log"

    @property
    def code(self) -> Path:
        return self.folder / f"{self.index}.code"


class SlurmExecutor:
    """Runs trials as tasks of job arrays."""

    place, is_remote = "Slurm", False

    def __init__(self, root: Path, logs: Path) -> None:
        """Find what an earlier process left in the queue.

        Args:
            root: this checkout, which all nodes see under the same path.
            logs: folder for the arrays' own folders; all nodes see it too.

        Raises:
            RunkeyError: there is no Slurm here, or its controller does not answer.
        """
        if not shutil.which("sbatch"):
            raise RunkeyError("sbatch: not found; run this on a machine that submits to Slurm")
        self._root, self._logs = root, logs
        self._waiting: list[Trial] = []
        self._running: dict[str, _Task] = {}
        self._queued = self._find_queued()
        self._asked = time.monotonic()
        cpus = _ask("sinfo", "-h", "-o", "%C").split()  # allocated/idle/other/total
        self._cpus = max(1, sum(int(line.split("/")[3]) for line in cpus))
        self._has_gpus = "gpu" in _ask("sinfo", "-h", "-o", "%G")

    def _find_queued(self) -> dict[str, _Task]:
        """Return the tasks of this checkout that Slurm has not finished, by key."""
        found = {}
        listed = _ask("squeue", "-h", "-r", "--me", "-o", "%F %K %k")
        for line in listed.splitlines():
            array, index, comment = line.split(" ", 2)
            folder = Path(comment)
            if folder.parent == self._logs and (folder / _TRIALS).is_file():
                lines = (folder / _TRIALS).read_text(encoding="utf-8").splitlines()
                found[lines[int(index)].split(" ", 1)[0]] = _Task(array, int(index), folder)
        return found

    def capacity(self) -> int:
        """See `Executor`."""
        return self._cpus

    def has_room(self, trial: Trial) -> bool:  # noqa: ARG002
        """See `Executor`: Slurm has a queue."""
        return True

    def submit(self, trial: Trial) -> None:
        """See `Executor`. The next `poll` sends what was submitted, as one array."""
        if task := self._queued.pop(trial.key, None):
            logger.info(f"{trial.key[:12]} is Slurm's task {task.name} already, log {task.log}")
            self._running[trial.key] = task
        else:
            self._waiting.append(trial)

    def poll(self) -> list[Ended]:
        """See `Executor`."""
        if self._waiting:
            self._send(self._waiting)
            self._waiting = []
        gone = dict(self._running)
        if time.monotonic() - self._asked < _PAUSE_SECONDS:
            return []
        self._asked = time.monotonic()
        if gone:
            try:
                for key in self._find_queued():
                    gone.pop(key, None)
            except RunkeyError as error:  # the controller restarts; tasks run on
                logger.warning(f"{error}; asking again")
                return []
        ended = []
        for key, task in gone.items():
            del self._running[key]
            ended.append(_end_of(key, task))
        return ended

    def _send(self, trials: list[Trial]) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="array-", dir=self._logs))
        write_batch(folder, trials, self._options(trials))
        command = ["sbatch", "--parsable", f"--comment={folder}", f"--array=0-{len(trials) - 1}"]
        command += [f"--chdir={self._root}", f"--output={folder}/%a.log", "--open-mode=append"]
        said = _ask(*command, "--requeue", str(folder / "script"))
        array = said.strip().split(";")[0]
        for index, trial in enumerate(trials):
            self._running[trial.key] = _Task(array, index, folder)
        logger.info(f"Slurm: array {array}, {counted(len(trials), 'task')}, logs {folder}/*.log")

    def _options(self, trials: list[Trial]) -> list[str]:
        """Return the script's options, which sbatch's variables in the environment replace."""
        options = ["--job-name=runkey", "--signal=B:USR1@120"]
        if self._has_gpus:
            return [*options, "--gres=gpu:1"]
        peaks = [one.peak_bytes for one in trials]
        known = [peak for peak in peaks if peak is not None]
        if len(known) == len(peaks):
            options.append(f"--mem={-(-(max(known) + _BESIDE_BYTES) // MIB)}M")
        return options

    def cancel(self, key: str) -> None:
        """See `Executor`."""
        self._waiting = [one for one in self._waiting if one.key != key]
        if task := self._running.get(key):
            _ask("scancel", task.name)

    def close(self) -> None:
        """See `Executor`."""
        end = time.monotonic() + _PATIENCE
        for key in list(self._running):
            self.cancel(key)
        while self._running and time.monotonic() < end:
            self.poll()
            time.sleep(1.0)


def write_batch(folder: Path, trials: Sequence[Trial], options: Iterable[str]) -> None:
    """Write an array's list of trials, and the script that each of its tasks runs.

    Args:
        folder: of the array.
        trials: one for each task, in the order of the tasks.
        options: of sbatch, for the script's head.
    """
    lines = (f"{one.key} {shlex.join(one.arguments)}\n" for one in trials)
    write_atomically(folder / _TRIALS, "".join(lines))
    script = _SCRIPT.format(
        folder=shlex.quote(str(folder)),
        options="".join(f"#SBATCH {option}\n" for option in options),
        python=shlex.quote(sys.executable),
        elsewhere=TRY_ELSEWHERE,
        most=_MOST_RESTARTS,
    )
    write_atomically(folder / "script", script)


def _end_of(key: str, task: _Task) -> Ended:
    """Return how a task ended that is no longer in the queue."""
    if task.code.is_file():
        code = int(task.code.read_text(encoding="ascii"))
        return Ended(key, code, last_line_of(task.log))
    # Killed before it could say so: its node is lost, it was cancelled, or it took too much.
    shown = subprocess.run(
        ["scontrol", "show", "job", "-o", task.name], capture_output=True, text=True, check=False
    ).stdout
    fields = dict(part.split("=", 1) for part in shown.split() if "=" in part)
    state = fields.get("JobState", "gone")
    return Ended(key, TRY_ELSEWHERE, f"Slurm: task {task.name} ended as {state}")


def _ask(*command: str) -> str:
    """Run one of Slurm's commands; return what it printed."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_QUERY_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RunkeyError(f"Slurm: {command[0]} does not answer") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RunkeyError(f"Slurm: {lines[-1]}")
    return done.stdout
