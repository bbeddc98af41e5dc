"""Attack every reader of files: 0 tracebacks, 0 hangs, 0 files outside, 0 code executed.

    python -m benchmarks.attack --count 5000
    python -m benchmarks.attack --count 200 --only params --seed 7

Each attack changes one file of a small checkout as no tool should (`tests.support.odd_files`) and
runs a command that reads it.  A worker runs many in one process: the command's own `main` with its
arguments; whatever leaves it, other than its one line and exit code, is a traceback.  One attack in
`_REAL_SHARE` is a real process.  An audit hook sees every file that is opened for writing and
every program that is started; a payload that is executed makes a file.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "attack.md"
_REAL_SHARE = 50
_MOST_SECONDS = 20.0
PLANTED = "ATTACK_PLANTED"
"""Environment variable of the tests: faults, separated by commas, that attacks meet in turn."""
_STILL = 1.0
"""Seconds of work, without which an attack that takes longer than that waits for something."""
_FRESH = 40
"""Attacks between two fresh copies of the checkout; what was changed is put back after each."""

Verdict = str
GOOD = ("accepted", "refused")
BAD = ("traceback", "hang", "outside", "executed", "crash", "no line")


@dataclass(frozen=True)
class Target:
    """A file, what it holds, and the commands that read it."""

    path: str
    """Below the checkout; KEY and OTHER stand for the two keys, * for any of several files."""
    kind: str
    """json, jsonl, yaml, zip, weights, image, sqlite or bytes."""
    commands: tuple[str, ...]
    """Of `runkey`, with words between spaces; `stage:NAME` or `read:NAME` for other code."""


_READING = (
    "list",
    "show KEY",
    "gc",
    "summary",
    "list --where AP>0.1",
    "verify KEY",
    "show OTHER",
    "diff KEY .",
)
_DVC = ("key", "key --explain", "stage:own_data_note", "diff . KEY", "read:dataset")
GROUPS: dict[str, tuple[int, tuple[Target, ...]]] = {
    # Weight, targets.
    "data": (
        24,
        (
            Target("data/annotations/instances_train.json", "json", ("stage:prepare",)),
            Target("data/annotations/instances_val.json", "json", ("stage:prepare",)),
            Target("data/train/*", "image", ("stage:prepare",)),
        ),
    ),
    "params": (
        18,
        (
            Target("params.yaml", "yaml", ("params", "params", "params", "key", "summary", "gc")),
            Target("presets/sample.yaml", "yaml", ("read:preset",)),
        ),
    ),
    "records": (
        20,
        (
            Target("run.json", "json", ("summary", "gc", "read:manifest", "verify KEY")),
            Target("model/key.json", "json", ("report",)),
            Target("metrics/*", "json", ("summary",)),
            Target(".runkey/claims/*", "json", _READING),
            Target(
                ".runkey/OTHER/run_id",
                "json",
                ("gc", "read:pointer", "replay OTHER", "watch OTHER"),
            ),
            Target(".runkey/OTHER/description.json", "json", ("replay OTHER", "watch OTHER")),
            Target("mlartifacts/*/artifacts/record.json", "json", ("index", "verify KEY")),
            Target("mlartifacts/*/artifacts/model/key.json", "json", ("verify KEY", "diff KEY .")),
            Target(
                "mlartifacts/*/artifacts/run.json",
                "json",
                ("verify KEY", "diff KEY .", "get KEY --to there"),
            ),
            Target(".runkey/runs.sqlite", "sqlite", _READING),
            Target(".runkey/runs.sqlite", "bytes", _READING),
        ),
    ),
    "dvc": (
        14,
        (
            Target("dvc.yaml", "yaml", _DVC),
            Target("data.dvc", "yaml", _DVC),
            Target("dvc.lock", "yaml", ("diff . KEY",)),
            Target("conda-lock.yml", "yaml", ("key", "env check")),
            Target("requirements.txt", "bytes", ("env check",)),
            Target(".dvc/config", "bytes", ("key", "gc")),
            Target(".dvc/cache/files/md5/*/*.dir", "json", ("diff . KEY", "read:part")),
        ),
    ),
    "logs": (
        10,
        (
            Target("logs/train.jsonl", "jsonl", ("read:curves", "report", "summary", "watch")),
            Target("logs/system.jsonl", "jsonl", ("read:curves", "report")),
            Target(
                ".runkey/OTHER/train.jsonl", "jsonl", ("watch OTHER", "report OTHER", "read:resume")
            ),
            Target("evaluation/*", "json", ("read:evaluation", "read:evaluation", "report")),
            Target("prepared/*.json", "json", ("read:prepared", "read:evaluation", "report")),
        ),
    ),
    "archives": (8, (Target("run.zip", "zip", ("import run.zip",)),)),
    "weights": (
        6,
        (
            Target("model/weights.safetensors", "weights", ("read:model", "read:check")),
            Target("model/model.json", "json", ("read:model",)),
            Target(".runkey/OTHER/*.pt", "bytes", ("read:checkpoint",)),
        ),
    ),
    "answers": (6, ()),
}


def main() -> None:
    """Run the attacks, print what went wrong, write the table of results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=GROUPS, action="append", default=[])
    parser.add_argument(
        "--out", type=Path, default=None, help=f"default: {RESULTS.name} of all groups"
    )
    parser.add_argument(
        "--worker", nargs=3, metavar=("GROUP", "FROM", "TO"), help=argparse.SUPPRESS
    )
    parser.add_argument("--box", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        group, start, stop = asked.worker
        work(group, range(int(start), int(stop)), asked.seed, asked.box)
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        found = run(Path(folder), asked.count, asked.seed, asked.only)
    lines = table(found, asked, time.monotonic() - started)
    print("\n".join(lines))
    out = asked.out or (None if asked.only else RESULTS)
    if out:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if any(one["verdict"] in BAD for ones in found.values() for one in ones):
        raise SystemExit(1)


def run(
    folder: Path, count: int, seed: int, only: list[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Run attacks in worker processes; return what came of each, by group."""
    from tests.support.attacked import make_checkout

    if not (folder / "template").is_dir():
        (folder / "template").mkdir()
        make_checkout(folder / "template")
    # Several groups in one worker: `params+records`.
    chosen = {name: sum(GROUPS[one][0] for one in name.split("+")) for name in only or GROUPS}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, weight in chosen.items():
        share = -(-count * weight // sum(chosen.values()))
        began = time.monotonic()
        found[name] = list(_supervise(folder, name, range(share), seed))
        verdicts = Counter(one["verdict"] for one in found[name])
        print(f"{name}: {dict(verdicts)} in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return found


def _supervise(folder: Path, group: str, numbers: range, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the results of a group's attacks; a worker that dies or hangs is started again."""
    done, count = numbers.start, numbers.stop
    while done < count:
        command = [
            sys.executable,
            "-m",
            "benchmarks.attack",
            "--box",
            str(folder),
            "--seed",
            str(seed),
        ]
        with subprocess.Popen(
            [*command, "--worker", group, str(done), str(count)],
            cwd=REPOSITORY,
            env=_environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as worker:
            assert worker.stdout
            assert worker.stderr
            what, limit = "the imports", 20 * _MOST_SECONDS
            while done < count:
                ready, _, _ = select.select([worker.stdout], [], [], limit)
                line = worker.stdout.readline() if ready else ""
                if not line:
                    worker.kill()
                    verdict = "crash" if ready else "hang"
                    text = worker.stderr.read()[-2000:] if ready else f"more than {limit:.0f} s"
                    yield {"number": done, "verdict": verdict, "what": what, "text": text}
                    done += 1
                    break
                one = json.loads(line)
                if one["verdict"] == "begun":
                    what = one["what"]
                elif one["verdict"] != "ready":
                    yield one
                    done += 1
                limit = 10 * _MOST_SECONDS


def _environment(folder: Path) -> dict[str, str]:
    strange = ("DVC_", "MLFLOW_", "GIT_", "PYTEST_", "RUNKEY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    for name in ("home", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    own = {"HOME": folder / "home", "TMPDIR": folder / "tmp", "MPLCONFIGDIR": folder / "home"}
    return (
        kept
        | {name: str(path) for name, path in own.items()}
        | {
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "DVC_NO_ANALYTICS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            # A question that fails waits and asks again while there is time: here there is none.
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "0.3",
        }
    )


# --- a worker


class Watch:
    """What the process writes outside its folders, and which programs it starts."""

    def __init__(self, inside: tuple[Path, ...]) -> None:
        self._inside = tuple(os.path.realpath(path) for path in inside)
        self.events: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            ):
                self._check("outside: open", path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
            self._check(f"outside: {event}", arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._check(f"outside: {event}", arguments[1])
        elif event == "subprocess.Popen":
            program = Path(os.fsdecode(arguments[0])).name
            if program not in (
                "git",
                Path(sys.executable).name,
                "python",
                "uv",
                "conda",
                "uname",
            ):
                self.events.append(f"executed: {program}")
        elif event in ("os.system", "os.exec", "os.posix_spawn"):
            self.events.append(f"executed: {event} {arguments[:1]}")

    def _check(self, what: str, path: Any) -> None:
        if isinstance(path, int):
            return
        name = Path(os.fsdecode(path))
        # Removing or replacing a link leaves what it points to.
        keeps = what.endswith(("remove", "rename", "symlink", "link"))
        whole = Path(os.path.realpath(name.parent), name.name)
        place = str(whole) if keeps else os.path.realpath(name)
        if not place.startswith((*self._inside, "/dev/null", "/dev/tty", "/proc/self", "/dev/shm")):
            self.events.append(f"{what} {place}")


def work(group: str, numbers: range, seed: int, box: Path) -> None:
    """Run attacks in this process; print a line of JSON on each."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    checkout = Path(tempfile.mkdtemp(prefix=f"box-{group}-", dir=box)) / "checkout"
    shutil.copytree(box / "template", checkout, symlinks=True)
    os.chdir(checkout)
    from benchmarks import attack  # not as __main__: what commands import is this module too

    def tell(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=out)

    attacker = attack.Attacker(group, seed, box, checkout, tell)
    if planted := os.environ.get(PLANTED):
        attacker.plant(planted.split(","))
    tell({"verdict": "ready"})
    for number in numbers:
        tell(attacker.attack(number))


class Attacker:
    """Runs the attacks of a group in a checkout."""

    def __init__(
        self,
        group: str,
        seed: int,
        box: Path,
        checkout: Path,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        from tests.support.attacked import OTHER

        self.tell = tell
        self.group, self.seed, self.box, self.checkout = group, seed, box, checkout
        self.names = {"OTHER": OTHER, "KEY": json.loads((checkout / "run.json").read_text())["key"]}
        from benchmarks import attack_readers

        self.readers = attack_readers.READERS
        self.watch = Watch((checkout.parent, box / "tmp", box / "home"))
        self.number = 0
        self.took_in = False
        """Whether an archive was accepted, so that the checkout holds its run."""

    def plant(self, names: list[str]) -> None:
        """Give each command a fault, so that a test sees the harness find it."""
        outside = self.box.parent / "planted"
        faults: dict[str, Callable[[], object]] = {
            "traceback": lambda: {}["planted"],
            "outside": lambda: outside.write_text("planted"),
            "executed": lambda: os.system("true"),
            "crash": lambda: os.kill(os.getpid(), 11),
            "no line": lambda: sys.exit(1),
        }
        turn = iter(names)
        self._call = lambda _: faults[next(turn)]()  # type: ignore[method-assign, assignment]

    def attack(self, number: int) -> dict[str, Any]:
        """Run one attack; return its verdict, what was done, and the text that was printed."""
        draw = random.Random(f"{self.seed}:{self.group}:{number}")
        if self.group == "answers":
            return self._answers(number)
        target = draw.choice([one for name in self.group.split("+") for one in GROUPS[name][1]])
        self._renew(number)
        path = self._path(target.path, draw)
        before = path.read_bytes()
        what, content = odd_content(target.kind, before, path, draw)
        command = draw.choice(target.commands)
        self.tell({"verdict": "begun", "what": f"{path.name}: {what}; {command}"})
        real = number % _REAL_SHARE == 0 and ":" not in command
        place_odd(path, content)
        self.watch.events.clear()
        began, used = time.monotonic(), time.process_time()
        code, text = self._run(command, real=real)
        # On a busy machine 20 s by the clock may be 2 s of work: then only standing still counts.
        seconds, used = time.monotonic() - began, time.process_time() - used
        if _STILL < used < _MOST_SECONDS:
            seconds = min(seconds, _MOST_SECONDS)
        self._put_back(path, before)
        found = {
            "number": number,
            "what": f"{path.relative_to(self.checkout)}: {what}; {command}{' in a process' * real}",
            "verdict": self._verdict(code, text, seconds),
            "seconds": round(seconds, 2),
            "text": text[-3000:],
        }
        self.took_in = command.startswith("import") and found["verdict"] == "accepted"
        if self.watch.events:
            found["text"] = "\n".join(self.watch.events[:5])
        return found

    def _verdict(self, code: int | None, text: str, seconds: float) -> Verdict:
        from tests.support.odd_files import MARKER

        if any(self.checkout.parent.rglob(MARKER)) or (REPOSITORY / MARKER).exists():
            return "executed"
        if self.watch.events:
            return "executed" if "executed" in self.watch.events[0] else "outside"
        if code is None or "Traceback (most recent call last)" in text:
            return "traceback"
        if seconds > _MOST_SECONDS:
            return "hang"
        if code in (0, 3):
            return "accepted"
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        return "refused" if code == 1 and len(lines) == 1 else "no line"

    def _run(self, command: str, *, real: bool) -> tuple[int | None, str]:
        """Run a command; return its exit code, None for a traceback, and all that it printed."""
        words = [self.names.get(word, word) for word in command.split(" ")]
        if real:
            done = subprocess.run(
                [sys.executable, "-m", "runkey", *words],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=60,
                check=False,
            )
            return done.returncode, done.stdout + done.stderr
        printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        code: int | None = 0
        with redirect_stdout(printed), redirect_stderr(printed):
            try:
                self._call(words)
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 0
            except BaseException:  # noqa: BLE001 - this is what is looked for
                code = None
                printed.write(traceback.format_exc())
        printed.seek(0)
        data = printed.buffer.getvalue()  # type: ignore[attr-defined]
        return code, data.decode("utf-8", "replace")

    def _call(self, words: list[str]) -> None:
        from runkey.errors import report_errors

        kind, colon, name = words[0].partition(":")
        if colon:
            with report_errors():
                self.readers[f"{kind}:{name}"](self.checkout, self.names)
            return
        from runkey.cli import main as runkey

        sys.argv = ["runkey", *words]
        runkey()

    def _path(self, pattern: str, draw: random.Random) -> Path:
        pattern = pattern.replace("OTHER", self.names["OTHER"])
        return draw.choice(sorted(self.checkout.glob(pattern)))

    def _put_back(self, path: Path, content: bytes) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def _renew(self, number: int) -> None:
        """Copy the checkout anew now and then; a command may have changed it."""
        changed = self.number and (number - self.number >= _FRESH or self.took_in)
        if not changed and self.number:
            for name in ("prepared", "plots", "there", "run.json", ".runkey", "mlflow.db"):
                self._refresh(name)
            return
        if changed:
            shutil.rmtree(self.checkout, ignore_errors=True)
            self.checkout.mkdir(exist_ok=True)
            shutil.copytree(self.box / "template", self.checkout, symlinks=True, dirs_exist_ok=True)
            os.chdir(self.checkout)
        self.number = max(number, 1)

    def _refresh(self, name: str) -> None:
        source, target = self.box / "template" / name, self.checkout / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.is_file():
            shutil.copy2(source, target)

    def _answers(self, number: int) -> dict[str, Any]:
        """Ask everything of a server that answers as none should."""
        from itertools import islice

        from tests.support import odd_server
        from tests.support.odd_server import OddServer, faults, server_answers

        odd_server.DRIP_SECONDS = 0.05
        answer = next(islice(server_answers(self.seed), number, None))
        with OddServer() as server:
            server.answer = answer
            home = Path(tempfile.mkdtemp(dir=self.checkout.parent))
            found = faults(server.address, home)
        text = "\n".join(found)
        verdict = "refused" if not found else "hang" if "took" in text else "traceback"
        return {
            "number": number,
            "what": str(answer)[:200],
            "verdict": verdict,
            "text": text[-3000:],
        }


def odd_content(
    kind: str, before: bytes, path: Path, draw: random.Random
) -> tuple[str, bytes | str]:
    """Return what takes the place of a file: bytes, or the name of something that is no file."""
    from runkey.registry.archive import INDEX
    from tests.support import odd_files

    if draw.random() < 0.04:
        what = draw.choice(("folder", "pipe", "link to itself", "link to /dev/zero", "gone"))
        return what, what
    if kind == "sqlite":
        return odd_cells(path, draw), "changed"
    if kind == "zip" and draw.random() < 0.8:
        return odd_files.odd_zip(before, draw, INDEX)
    if kind == "weights" and draw.random() < 0.6:
        return odd_files.odd_safetensors(before, draw)
    if kind == "image" and draw.random() < 0.5:
        return odd_files.odd_png(draw)
    if kind in ("json", "jsonl", "yaml"):
        return odd_files.odd_text(before.decode(), kind, draw)
    return odd_files.odd_bytes(before, draw)


def odd_cells(path: Path, draw: random.Random) -> str:
    """Change cells of the cache of runs, as a broken program would."""
    import sqlite3
    from contextlib import closing

    from tests.support.odd_files import RAW_JSON, odd_value

    columns = (
        "run key name status started ended experiment artifact_uri metrics tags params details"
    )
    column = draw.choice(columns.split())
    value = odd_value(draw)
    if draw.random() < 0.4:
        value = draw.choice(RAW_JSON)
    elif not isinstance(value, str | float | None):
        value = json.dumps(value)
    if isinstance(value, str):
        value = value.encode("utf-8", "replace").decode()
    with closing(sqlite3.connect(path)) as database:
        few = " WHERE rowid = 1" if draw.random() < 0.7 else ""
        try:
            database.execute(f"UPDATE runs SET {column} = ?{few}", (value,))
        except sqlite3.IntegrityError:
            database.execute("DELETE FROM runs")
        database.commit()
    return f"{column} = {str(value)[:60]!r}"


def place_odd(path: Path, content: bytes | str) -> None:
    """Put it in the place of a file."""
    if content == "changed":
        return
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content.startswith("link"):
        path.symlink_to(path if "itself" in content else "/dev/zero")


# --- results


def table(
    found: dict[str, list[dict[str, Any]]], asked: argparse.Namespace, seconds: float
) -> list[str]:
    """Return the results as Markdown: counts by group, and each fault."""
    total = sum(map(len, found.values()))
    lines = [
        "# Attacks on every reader",
        "",
        f"    python -m benchmarks.attack --count {asked.count} --seed {asked.seed}",
        "",
        f"{total} attacks in {seconds / 60:.0f} min on {platform.machine()},"
        f" {os.cpu_count()} cores, Python {platform.python_version()}.  `no line`: an exit code",
        "without its one line.  `accepted`: the change did no harm, or the command went on without",
        "the file.",
        "",
        "| group | attacks | accepted | refused | " + " | ".join(BAD) + " |",
        "|" + "---|" * (4 + len(BAD)),
    ]
    for name, ones in found.items():
        counts = Counter(one["verdict"] for one in ones)
        numbers = [len(ones), *(counts[verdict] for verdict in (*GOOD, *BAD))]
        lines.append(f"| {name} | " + " | ".join(map(str, numbers)) + " |")
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for name, ones in found.items():
        for one in ones:
            if one["verdict"] in BAD:
                last = ["", *one["text"].strip().splitlines()][-1]
                kinds[f"{name} {one['verdict']}: {last[:160]}"].append(
                    f"{one['number']} ({one['what'][:120]})"
                )
    if kinds:
        lines += ["", "Faults, by their last line:", ""]
        lines += [f"- {len(ones)}x {text}: {ones[0]}" for text, ones in sorted(kinds.items())]
    return lines


if __name__ == "__main__":
    main()
