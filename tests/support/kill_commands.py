"""Commands and stages that are killed at random moments, and what must hold afterwards.

A round copies a start state to the work folder, always the same path, runs the command, kills it
(everything, as a machine that goes down, or one process, as a kernel that is out of memory), runs
it again until it ends by itself, and compares the work folder with that of a round without kills.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from runkey.hashing import sha256_bytes
from runkey.identity.record import RunPointer
from runkey.registry.dvc_cache import md5_file
from runkey.tracking.store import Store, free_port, start_server, stop_server, wait_until_healthy
from tests.support.kill_digest import log_of
from tests.support.kill_project import parameters
from tests.support.project import Project, begin_project, clean_environment

LR = "lr=0.0005"
_LONGEST_SECONDS = 600.0
_OLD_SECONDS = 2 * 86400.0
_TREES = ("prepared", "memory", "model", "metrics", "evaluation", "page", "got")
"""Folders whose files have the same bytes in every round; logs are compared without their times."""
_OF_THE_DAY = re.compile(r"second|wait|time|memory\.measured|images_per")
_SKIPPED = re.compile(
    r"/\.git/(?!refs/|worktrees/)|/__pycache__|/\.dvc/tmp/|/\.dvc/cache/|/store/|/site/|\.db-journal$"
    r"|/\.git/refs/exps|/remote\.git/|/server/artifacts"
)
_HEX = re.compile(r"[0-9a-f]{8,}")


@dataclass(frozen=True)
class Case:
    """A command to kill."""

    name: str
    state: str
    """Where a round begins, see `Bench`."""
    command: tuple[str, ...]
    """Arguments of DVC, or of `python -m`."""
    folder: str = "repository"
    """Of the work folder, where it runs."""
    server: bool = False
    """True if it needs the team's server."""
    damage: Callable[[Path], str] | None = None
    """Damages a file of the start state, and says how; nothing is killed then."""


@dataclass
class Round:
    """What became of a command."""

    kills: Counter[str] = field(default_factory=Counter)
    lives: list[tuple[int, str]] = field(default_factory=list)
    """Exit code and output of each start."""
    faults: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    """What gc named and removed."""
    damaged: str = ""


class Bench:
    """Start states, each a copy of the work folder.

    begun, prepared, profiled, trained, evaluated: the pipeline up to a stage.  done: all of it,
    committed, with git and DVC remotes.  exported, published: done, and a second clone without
    results.  littered: done, with what `gc` deletes.  interrupted: profiled, with a training that
    was killed in its middle, when MLflow had a part of its log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.repository = Project(self.work / "repository")
        self.port = free_port()
        self.quiet: dict[tuple[str, ...], tuple[float, dict[str, Any]]] = {}
        """By state and command."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return clean_environment() | {"DVC_SITE_CACHE_DIR": str(self.work / "site")}

    def key(self) -> str:
        return str(self.repository.json("run.json")["key"])

    def restore(self, state: str) -> None:
        """Make the work folder that of a start state."""
        saved = self.folder / "states" / state
        if not saved.exists():
            _STATES[state](self)
            saved.parent.mkdir(exist_ok=True)
            _copy_tree(self.work, saved)
        shutil.rmtree(self.work, ignore_errors=True)
        _copy_tree(saved, self.work)

    def dvc(self, *arguments: str, folder: str = "repository") -> None:
        Project(self.work / folder).run(
            str(Path(sys.executable).with_name("dvc")), *arguments, env=self.environment
        )

    def runkey(self, *arguments: str, folder: str = "repository") -> str:
        command = (sys.executable, "-m", "runkey", *arguments)
        return Project(self.work / folder).run(*command, env=self.environment).stdout

    @contextmanager
    def served(self, wanted: bool = True) -> Iterator[None]:
        """The team's server, on what the work folder has of it."""
        if not wanted:
            yield
            return
        home = self.work / "server"
        home.mkdir(exist_ok=True)
        with contextlib.chdir(self.folder):  # not below the work folder: it is not to be killed
            store = Store(f"sqlite:///{home / 'mlflow.db'}", home / "artifacts", home)
            process = start_server(store, self.port)
        try:
            wait_until_healthy(self.address, process)
            yield
        finally:
            stop_server(process)

    def start(self, case: Case) -> tuple[subprocess.Popen[bytes], Path]:
        """Start a case's command."""
        output = self.folder / "output.txt"
        tool = [sys.executable, "-m", "dvc"] if case.command[0] == "dvc" else [sys.executable, "-m"]
        words = [
            w.format(key=self.key(), address=self.address) if "{" in w else w for w in case.command
        ]
        command = [*tool, *(words[1:] if words[0] == "dvc" else words)]
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=self.work / case.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return process, output


def play(bench: Bench, case: Case, rng: random.Random, kills: int) -> Round:
    """One round of a case with so many kills at most; 0: the quiet one, which is remembered."""
    name = (case.state, *case.command)
    if kills and name not in bench.quiet:
        play(bench, case, rng, 0)
    bench.restore(case.state)
    done, quiet = Round(), bench.quiet.get(name) if kills else None
    if case.damage and quiet:
        done.damaged = case.damage(bench.work / case.folder)
    with bench.served(case.server):
        while not (done.lives and done.lives[-1][0] == 0) and len(done.lives) < kills + 3:
            began = time.monotonic()
            process, output = bench.start(case)
            killed = ""
            if quiet and not case.damage and done.kills.total() < kills:
                killed = _kill(process, rng, rng.uniform(0.3, 1.0) * quiet[0], bench.work)
            code = process.wait(_LONGEST_SECONDS)
            done.kills[killed] += bool(killed)
            text = output.read_text(errors="replace")
            done.lives.append((code, text))
            if "Traceback (most recent call last)" in text:
                done.faults.append(f"traceback: {text[-1500:]}")
            if "unable to read: 'dvc.lock'" in text or "'./dvc.lock' validation failed" in text:
                (bench.work / case.folder / "dvc.lock").unlink()  # docs/troubleshooting.md
            elif "Unable to read RWLock-file" in text or "it is being blocked by" in text:
                # The same; the second is of a killed DVC whose number another process has by now.
                (bench.work / case.folder / ".dvc/tmp/rwlock").unlink()
            elif not killed and code:
                done.faults.append(f"exit code {code}, not killed: {text[-1500:]}")
            seconds = time.monotonic() - began
        end_all(bench.work)
        found = outcome(bench, case)
        if quiet is None:
            done.faults += found["faults"]
            if done.faults:
                raise RuntimeError(f"{case.name}, which nobody killed: {done.faults}")
            bench.quiet[name] = seconds, found
            return done
        expected = dict(quiet[1])
        if case.name == "log" and "the log lacks the values" in " ".join(done.lives[-1][1].split()):
            del expected["log"]  # what is gone is gone, and it is said; MLflow gets no such log
            logs = [name for name in expected["files"] if "/artifacts/logs/" in name]
            expected["files"] = expected["files"] - Counter(logs)
        done.leftovers = _collect_garbage(bench, case, found, expected)
        if done.leftovers:
            found = outcome(bench, case)
        done.faults += found["faults"] + differences(expected, found)
    return done


def _kill(process: subprocess.Popen[bytes], rng: random.Random, after: float, work: Path) -> str:
    """SIGKILL after some seconds; to all processes in the work folder, or to one."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(after)
        return ""
    if rng.random() < 0.6:
        end_all(work)
        return "all"
    victims = processes(work)
    if not victims:
        return ""
    with suppress(psutil.NoSuchProcess):
        rng.choice(victims).kill()
    return "one"


def processes(work: Path) -> list[psutil.Process]:
    """Processes whose current folder is in the work folder."""
    return [
        process
        for process in psutil.process_iter(["cwd", "status"])
        if process.info["status"] != "zombie"
        and process.info["cwd"]
        and Path(process.info["cwd"]).is_relative_to(work)
    ]


def end_all(work: Path) -> None:
    """SIGKILL to all processes in the work folder, until there are none."""
    while left := processes(work):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)  # so that none starts another one meanwhile
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.1)


def outcome(bench: Bench, case: Case) -> dict[str, Any]:
    """What rounds of a case must have in common, and what is wrong in itself (`faults`)."""
    root = bench.work / case.folder
    faults = [f"DVC's cache: {name} is damaged" for name in _damaged_objects(root)]
    faults += [f"unreadable run-cache entry {p.name}" for p in _entries(root) if not p.read_text()]
    found: dict[str, Any] = {"bits": _bits(root), "entries": _entry_names(root)}
    databases = {"MLflow": root / "mlflow.db", "server": bench.work / "server/mlflow.db"}
    for name, database in databases.items():
        if database.exists():
            found[f"{name} runs"], doubled = _runs_of(database)
            faults += [f"{name} has twice {point}" for point in doubled]
    if (root / ".runkey/runs.sqlite").exists():
        with closing(sqlite3.connect(root / ".runkey/runs.sqlite")) as database:
            rows = database.execute("SELECT key, status FROM runs").fetchall()
        found["records"] = Counter(f"{key[:12]} {status}" for key, status in rows)
    if (root / "logs/train.jsonl").exists():
        found["log"] = sha256_bytes(json.dumps(log_of(root)).encode())
    found["files"] = _names(bench.work)
    found["faults"] = faults
    return found


def differences(quiet: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """How an outcome differs from the quiet one."""
    told = []
    for name, expected in quiet.items():
        if name == "faults" or found.get(name) == expected:
            continue
        got = found.get(name)
        if isinstance(expected, Counter):
            got = got or Counter()
            pairs = (("lost", expected - got), ("too many", got - expected))
            told += [f"{name}: {what}: {dict(some.most_common(5))}" for what, some in pairs if some]
        elif isinstance(expected, dict):
            names = sorted(n for n in {*expected, *got} if expected.get(n) != got.get(n))
            told.append(f"{name} differ: {names[:8]}")
        else:
            told.append(f"{name} differs")
    return told


def _collect_garbage(
    bench: Bench, case: Case, found: dict[str, Any], quiet: dict[str, Any]
) -> list[str]:
    """Let `runkey gc` delete what a kill left, as if two days had passed; return what it named."""
    extra = found["files"] - quiet["files"]
    if not differences(quiet, found):
        return []
    for path in _files(bench.work):
        if _normal(bench.work, path) in extra:
            for place in (path, *path.parents):
                if place == bench.work / case.folder:
                    break
                old = time.time() - _OLD_SECONDS
                for one in (place, *(place.glob("*.db-journal") if place.is_dir() else ())):
                    os.utime(one, (old, old), follow_symlinks=False)
    named = json.loads(bench.runkey("gc", "--json", "--apply", folder=case.folder))["items"]
    return [f"{item['kind']} {_HEX.sub('H', Path(item['name']).name)}" for item in named]


def _bits(root: Path) -> dict[str, str]:
    """sha256 of each file that every round writes with the same bytes."""
    found = {}
    for top in _TREES:
        for path in sorted((root / top).rglob("*")):
            if path.is_file() and path.name != "measured.json":
                found[path.relative_to(root).as_posix()] = sha256_bytes(_without_clock(path))
    return found


def _without_clock(path: Path) -> bytes:
    if path.suffix == ".html":  # a report tells when it was written
        return re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d", b"", path.read_bytes())
    if path.suffix != ".json":
        return path.read_bytes()

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: kept(v) for k, v in value.items() if not _OF_THE_DAY.search(k)}
        return [kept(v) for v in value] if isinstance(value, list) else value

    return json.dumps(kept(json.loads(path.read_text()))).encode()


def _runs_of(database: Path) -> tuple[Counter[str], list[Any]]:
    """Runs by key and status; points that a run has more than once."""
    with closing(sqlite3.connect(database)) as connection:
        runs = connection.execute(
            "SELECT value, status FROM runs JOIN tags USING (run_uuid)"
            " WHERE key = 'key' AND lifecycle_stage = 'active'"
        ).fetchall()
        doubled = connection.execute(
            "SELECT key, step, count(*) FROM metrics WHERE key NOT LIKE 'system/%'"
            " GROUP BY run_uuid, key, step HAVING count(*) > 1"
        ).fetchall()
    return Counter(f"{key[:12]} {status}" for key, status in runs), doubled[:5]


def _entries(root: Path) -> list[Path]:
    return [path for path in (root / ".dvc/cache/runs").rglob("*") if path.is_file()]


def _entry_names(root: Path) -> Counter[str]:
    """Number of run-cache entries by command; those behind run.json differ from run to run."""
    first_lines = (p.read_text().partition("\n")[0] for p in _entries(root))
    return Counter(line.removeprefix("cmd: ") for line in first_lines)


def _damaged_objects(root: Path) -> list[str]:
    """Objects of DVC's cache whose bytes are not those of their name."""
    objects = (p for p in (root / ".dvc/cache/files/md5").rglob("*") if p.is_file())
    names = {path: path.parent.name + path.name.removesuffix(".dir") for path in objects}
    return [
        name
        for path, name in names.items()
        if re.fullmatch("[0-9a-f]{32}", name) and md5_file(path) != name
    ]


def _files(work: Path) -> Iterator[Path]:
    for top, folders, names in os.walk(work):
        for name in (*names, *(f for f in folders if not any(Path(top, f).iterdir()))):
            path = Path(top, name)
            if not _SKIPPED.search(f"/{path.relative_to(work)}"):
                yield path


def _normal(work: Path, path: Path) -> str:
    return re.sub(r"\.g\d+\.json$", ".gN.json", _HEX.sub("H", path.relative_to(work).as_posix()))


def _names(work: Path) -> Counter[str]:
    """Files of the work folder, ids in their names left out; of claims, whether there are any."""
    names = Counter(_normal(work, path) for path in _files(work))
    return Counter({name: 1 if "/claims/" in name else n for name, n in names.items()})


def _copy_tree(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(target)], check=True)


# Start states.


def _begin(bench: Bench) -> None:
    shutil.rmtree(bench.work, ignore_errors=True)
    begin_project(bench.repository.root, parameters(3))


def _after(state: str, stage: str) -> Callable[[Bench], None]:
    def make(bench: Bench) -> None:
        bench.restore(state)
        bench.dvc("repro", stage)

    return make


def _finish(bench: Bench) -> None:
    bench.restore("drawn")
    project = bench.repository
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "results")
    project.run("git", "init", "-q", "--bare", str(bench.work / "remote.git"))
    project.run("git", "remote", "add", "origin", str(bench.work / "remote.git"))
    bench.dvc("remote", "modify", "store", "url", str(bench.work / "store"))
    project.run("git", "commit", "-q", "-a", "-m", "remotes")
    project.run("git", "push", "-q", "origin", "HEAD")
    bench.dvc("push", "data.dvc")


def _clone(bench: Bench) -> None:
    """A second clone with the data and no results."""
    target = bench.work / "second"
    bench.repository.run("git", "clone", "-q", str(bench.work / "remote.git"), str(target))
    bench.dvc("pull", "data.dvc", folder="second")


def _export(bench: Bench) -> None:
    bench.restore("done")
    bench.runkey("export", bench.key(), str(bench.work / "run.zip"))
    _clone(bench)


def _publish(bench: Bench) -> None:
    bench.restore("done")
    with bench.served():
        bench.runkey("publish", bench.key(), "--server", bench.address)
    _clone(bench)


def _serve(bench: Bench) -> None:
    bench.restore("done")
    with bench.served():
        pass


def _interrupt(bench: Bench) -> None:
    """A training killed when it has checkpoints, best weights, a record and points in MLflow."""
    bench.restore("profiled")
    params = bench.repository.root / "params.yaml"
    params.write_text(params.read_text().replace("  epochs: 3\n", "  epochs: 30\n"))
    process, _ = bench.start(Case("train", "profiled", ("dvc", "repro", "train")))
    home = bench.repository.root / ".runkey"
    while not (sent := [p for p in map(RunPointer.read, home.glob("rk2-*")) if p and p.sent]):
        assert process.poll() is None, "the training ended too early"
        time.sleep(0.01)
    end_all(bench.work)
    process.wait()
    assert sent
    assert list(home.glob("rk2-*/best-*"))
    assert list(home.glob("rk2-*/step-*.ckpt"))


def _litter(bench: Bench) -> None:
    """A failed run, a claim that another one replaced, old leftovers."""
    bench.restore("done")
    params = bench.repository.root / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("lr: 0.001", "lr: 0.0004"))
    process, _ = bench.start(Case("train", "done", ("dvc", "repro", "train")))
    while not list(bench.work.glob("repository/.runkey/rk2-*/*.ckpt")):
        assert process.poll() is None, "the training ended too early"
        time.sleep(0.01)
    end_all(bench.work)
    process.wait()
    params.write_text(text)
    for folder in bench.work.glob("repository/.runkey/rk2-*"):
        shutil.rmtree(folder)  # else it could be resumed, and its run stays
    bench.repository.run("git", "checkout", "-q", "--", ".")
    bench.dvc("checkout", "--force")
    for name in (".export-litter", ".import-litter", "reproduce/litter"):
        (bench.repository.root / ".runkey" / name).mkdir(parents=True)
        (bench.repository.root / ".runkey" / name / "file").write_bytes(b"0" * 100_000)
    for path in _files(bench.repository.root / ".runkey"):
        os.utime(path, (1e9, 1e9))
        os.utime(path.parent, (1e9, 1e9))


_STATES: dict[str, Callable[[Bench], None]] = {
    "begun": _begin,
    "prepared": _after("begun", "prepare"),
    "profiled": _after("prepared", "profile_memory"),
    "trained": _after("profiled", "train"),
    "evaluated": _after("trained", "evaluate"),
    "drawn": _after("evaluated", "plots"),
    "done": _finish,
    "served": _serve,
    "exported": _export,
    "published": _publish,
    "interrupted": _interrupt,
    "littered": _litter,
}


# Files that are damaged between two starts.

FORMS: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
}


def _damage(pattern: str, form: str) -> Callable[[Path], str]:
    """Damage the last file that a pattern finds."""

    def damage(root: Path) -> str:
        path = sorted(root.glob(pattern))[-1]
        path.chmod(0o644)
        path.write_bytes(FORMS[form](path.read_bytes()))
        return form

    return damage


_TRAIN = ("dvc", "repro", "train")
_FETCH = ("runkey", "fetch", "{key}", "--server", "{address}")

CASES = (
    Case("prepare", "begun", ("dvc", "repro", "prepare")),
    Case("profile_memory", "prepared", ("dvc", "repro", "profile_memory")),
    Case("train", "profiled", _TRAIN),
    Case("evaluate", "trained", ("dvc", "repro", "evaluate")),
    Case("plots", "evaluated", ("dvc", "repro", "plots")),
    Case("report", "done", ("runkey", "report", "--to", "page/report.html")),
    Case("get", "done", ("runkey", "get", "{key}", "--to", "got")),
    Case("index", "done", ("runkey", "index")),
    Case("gc", "littered", ("runkey", "gc", "--apply")),
    Case("export", "done", ("runkey", "export", "{key}", "../run.zip", "--force")),
    Case("import", "exported", ("runkey", "import", "../run.zip"), folder="second"),
    Case("publish", "served", ("runkey", "publish", "{key}", "--server", "{address}"), server=True),
    Case("fetch", "published", _FETCH, folder="second", server=True),
    Case("reproduce", "done", ("runkey", "reproduce", "{key}")),
    Case("exp run --temp", "done", ("dvc", "exp", "run", "--temp", "-S", LR)),
    Case("exp run --queue", "done", ("tests.support.kill_commands", "queue")),
)

_EVALUATE = ("dvc", "repro", "evaluate")

DAMAGES = tuple(
    Case(name, state, command, damage=_damage(pattern, form))
    for form in FORMS
    for name, state, command, pattern in (
        ("newest checkpoint", "interrupted", _TRAIN, ".runkey/rk2-*/step-*.ckpt"),
        ("best weights", "interrupted", _TRAIN, ".runkey/rk2-*/best-*"),
        ("log", "interrupted", _TRAIN, ".runkey/rk2-*/train.jsonl"),
        ("claim", "interrupted", _TRAIN, ".runkey/claims/*.json"),
        ("record", "interrupted", _TRAIN, ".runkey/runs.sqlite"),
        ("run pointer", "interrupted", _TRAIN, ".runkey/rk2-*/run_id"),
        ("dvc.lock", "interrupted", _TRAIN, "dvc.lock"),
        ("run.json", "trained", _EVALUATE, "run.json"),
        ("model", "trained", _EVALUATE, "model/*.safetensors"),
        ("prepared", "prepared", ("dvc", "repro", "profile_memory"), "prepared/train.safetensors"),
    )
)
"""Each kind of file in each form."""


def run_queue() -> int:
    """Queue an experiment, work the queue off, return 1 if one of DVC's processes failed."""
    queued = _dvc("exp", "run", "--queue", "-S", LR)
    if queued is None or _dvc("queue", "start") is None:
        return 1
    name = queued.split("'")[-2]  # DVC shows an earlier one, whose worker was killed, as Running
    end = time.monotonic() + _LONGEST_SECONDS / 2
    while time.monotonic() < end:
        rows = _dvc("queue", "status")
        if rows is None:
            return 1
        # No row for a moment: DVC moves the experiment from one list to the next.
        states = re.findall(rf"(?m)^\S+ +{name} .* (\w+)\s*$", rows)
        if states and states[0] not in ("Queued", "Running"):
            sys.stdout.write(rows)
            return 0 if states[0] == "Success" else 1
        time.sleep(1)
    return 1


def _dvc(*arguments: str) -> str | None:
    """DVC's output; None if it failed, or was killed."""
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return None if done.returncode else done.stdout


if __name__ == "__main__":
    sys.exit(run_queue())
