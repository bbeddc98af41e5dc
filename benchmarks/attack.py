"""Attack every reader of files: 0 tracebacks, 0 hangs, 0 files outside, 0 code executed.

    python -m benchmarks.attack --count 5000
    python -m benchmarks.attack --count 200 --only params --seed 7

Each attack changes one file of a small checkout as no tool should (`tests.support.odd_files`) and
runs a command that reads it.  A worker runs many in one process: the command's own `main` with its
arguments; whatever leaves it, other than its one line and exit code, is a traceback.  One attack in
`_REAL_SHARE` is a real process.  An audit hook sees every file that is opened for writing and
every program that is started; a payload that is executed makes a file.

An attack proves nothing if the command refuses any file: one in `_SOUND_SHARE` is preceded by a
command on the sound checkout, which has to accept it, and the results count by target how many
different lines refused the changed files.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.attack_targets import GROUPS, Target

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "attack.md"
_REAL_SHARE = 50
_SOUND_SHARE = 10
_MOST_SECONDS = 20.0
PLANTED = "ATTACK_PLANTED"
"""Environment variable of the tests: faults, separated by commas, that attacks meet in turn."""
_STILL = 1.0
"""Seconds of work, without which an attack that takes longer than that waits for something."""
_FRESH = 40
"""Attacks between two fresh copies of the checkout; what was changed is put back after each."""

Found = dict[str, Any]
"""What came of an attack: number, target, what was done, verdict, seconds, printed text."""
GOOD = ("accepted", "refused")
SOUND = "sound refused"
BAD = ("traceback", "hang", "outside", "executed", "crash", "no line", SOUND)


def main() -> None:
    """Run the attacks, print what went wrong, write the page of results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=GROUPS, action="append", default=[])
    parser.add_argument("--jobs", type=int, default=1, help="groups that run at the same time")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name} of all groups")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--box", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        group, start, stop = asked.worker
        work(group, range(int(start), int(stop)), asked.seed, asked.box)
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        found = run(Path(folder), asked.count, asked.seed, asked.only, asked.jobs)
    text = "\n".join(page(found, asked, time.monotonic() - started)) + "\n"
    print(text)
    out = asked.out or (None if asked.only else RESULTS)
    if out:
        out.write_text(text, encoding="utf-8")
    if any(one["verdict"] in BAD for ones in found.values() for one in ones):
        raise SystemExit(1)


def run(
    folder: Path, count: int, seed: int, only: list[str] | None = None, jobs: int = 1
) -> dict[str, list[Found]]:
    """Run attacks in worker processes; return what came of each, by group."""
    from tests.support.attacked import make_checkout

    if not (folder / "template").is_dir():
        (folder / "template").mkdir()
        make_checkout(folder / "template")
    # Several groups in one worker: `params+records`.
    chosen = {name: sum(GROUPS[one][0] for one in name.split("+")) for name in only or GROUPS}

    def attacked(name: str) -> list[Found]:
        began = time.monotonic()
        share = -(-count * chosen[name] // sum(chosen.values()))
        found = list(_supervise(folder, name, share, seed))
        verdicts = Counter(one["verdict"] for one in found)
        print(f"{name}: {dict(verdicts)} in {time.monotonic() - began:.0f} s", file=sys.stderr)
        return found

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(chosen, pool.map(attacked, chosen), strict=True))


def _supervise(folder: Path, group: str, count: int, seed: int) -> Iterator[Found]:
    """Yield what came of a group's attacks; a worker that dies or hangs is started again."""
    done = 0
    while done < count:
        for one in _lines(folder, group, done, count, seed):
            if one["verdict"] in (*GOOD, *BAD):
                yield one
                done += one["verdict"] != SOUND


def _lines(folder: Path, group: str, done: int, count: int, seed: int) -> Iterator[Found]:
    """Yield what a worker tells; at last that it died or hangs.

    Raises:
        SystemExit: it cannot even start, which says nothing about any attack.
    """
    command = [sys.executable, "-m", "benchmarks.attack", "--box", str(folder)]
    command += ["--seed", str(seed), "--worker", group, str(done), str(count)]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, cwd=REPOSITORY, env=_environment(folder), stdout=subprocess.PIPE, stderr=errors
        ) as worker,
    ):
        assert worker.stdout
        one: Found = {}
        while not (one.get("number") == count - 1 and one["verdict"] in (*GOOD, *BAD)):
            limit = (10 if one else 20) * _MOST_SECONDS
            ready, _, _ = select.select([worker.stdout], [], [], limit)
            line = worker.stdout.readline() if ready else b""
            if not line:
                worker.kill()
                text = f"more than {limit:.0f} s"
                if ready:
                    errors.seek(0)
                    text = errors.read().decode("utf-8", "replace")[-2000:]
                if not one:
                    raise SystemExit(f"a worker cannot start: {text}")
                yield one | {"verdict": "crash" if ready else "hang", "text": text}
                return
            one = json.loads(line)
            yield one


def _environment(folder: Path) -> dict[str, str]:
    strange = ("DVC_", "MLFLOW_", "GIT_", "PYTEST_", "RUNKEY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    own = {"HOME": folder / "home", "TMPDIR": folder / "tmp", "MPLCONFIGDIR": folder / "home"}
    for path in own.values():
        path.mkdir(exist_ok=True)
    return {
        **kept,
        **{name: str(path) for name, path in own.items()},
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # A question that fails waits and asks again while there is time: here there is none.
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "0.3",
        # No connection stays open, as each attack finds another file in the database's place.
        "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
    }


# --- a worker

_PROGRAMS = (Path(sys.executable).name, "python", "git", "uv", "conda", "uname")
"""What may be started."""


class Watch:
    """What the process reads, what it writes outside its folders, which programs it starts."""

    def __init__(self, inside: tuple[Path, ...]) -> None:
        own = tuple(os.path.realpath(path) for path in inside)
        self._inside = (*own, "/dev/null", "/dev/tty", "/proc/self", "/dev/shm")
        self.events: list[str] = []
        self.read: set[str] = set()
        """Paths of files that were opened, after a slash; of a database a URI."""
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if isinstance(path, str | bytes | os.PathLike):
                self.read.add(f"/{os.fsdecode(path)}")
                if writes:
                    self._check(event, path)
        elif event == "sqlite3.connect":
            self.read.add(os.fsdecode(arguments[0]))
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
            self._check(event, arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._check(event, arguments[1])
        elif event == "subprocess.Popen":
            if (program := Path(os.fsdecode(arguments[0])).name) not in _PROGRAMS:
                self.events.append(f"executed: {program}")
        elif event in ("os.system", "os.exec", "os.posix_spawn"):
            self.events.append(f"executed: {event} {arguments[:1]}")

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        name = Path(os.fsdecode(path))
        # Removing or replacing a link leaves what it points to.
        keeps = event.endswith(("remove", "rename", "symlink", "link"))
        whole = Path(os.path.realpath(name.parent), name.name)
        place = str(whole) if keeps else os.path.realpath(name)
        if not place.startswith(self._inside):
            self.events.append(f"outside: {event} {place}")


def _queued_seconds() -> float:
    """Return how long this thread has waited for a core so far."""
    return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9


def work(group: str, numbers: range, seed: int, box: Path) -> None:
    """Run attacks in this process; print a line of JSON on each."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from benchmarks import attack  # not as __main__: what commands import is this module too

    def tell(what: Found) -> None:
        print(json.dumps(what), file=out)

    attacker = attack.Attacker(group, seed, box, tell)
    if planted := os.environ.get(PLANTED):
        attacker.plant(planted.split(","))
    tell({"verdict": "ready"})
    for number in numbers:
        if group == "answers":
            tell(attacker.ask(number))
            continue
        if number % _SOUND_SHARE == 0 and not planted:
            tell(attacker.read_sound(number))
        tell(attacker.attack(number))


class Attacker:
    """Runs the attacks of a group in a checkout."""

    def __init__(self, group: str, seed: int, box: Path, tell: Callable[[Found], None]) -> None:
        from benchmarks import attack_readers
        from tests.support.attacked import OTHER

        self.group, self.seed, self.box, self.tell = group, seed, box, tell
        folder = Path(tempfile.mkdtemp(prefix=f"box-{group}-", dir=box))
        self.checkout, self.template = folder / "checkout", box / "template"
        self._restore(renewed=True)
        key = json.loads((self.checkout / "run.json").read_text())["key"]
        self.names = {"OTHER": OTHER, "KEY": key}
        every = [one for name in group.split("+") for one in GROUPS[name][1]]
        # Without `make env-export` there is no export to attack.
        self.targets = [one for one in every if self._files(one)]
        self.readers = attack_readers.READERS
        self.watch = Watch((folder, box / "tmp", box / "home"))

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

    def read_sound(self, number: int) -> Found:
        """Run one of the commands on the sound checkout, each in its turn."""
        pairs = [(one, command) for one in self.targets for command in dict.fromkeys(one.commands)]
        target, command = pairs[number // _SOUND_SHARE % len(pairs)]
        self.watch.read.clear()
        found = self._result(number, target, f"nothing; {command}", command, real=False)
        files = [str(path.relative_to(self.checkout)) for path in self._files(target)]
        opened = tuple(name.partition("?")[0] for name in self.watch.read)
        if not any(name.endswith(f"/{one}") for one in files for name in opened):
            found |= {"verdict": SOUND, "text": f"{command}: does not open {target.path}"}
        self._restore(renewed=command.startswith("import"))
        return found | {"verdict": "sound" if found["verdict"] == "accepted" else SOUND}

    def attack(self, number: int) -> Found:
        """Run one attack, which number and seed draw."""
        from tests.support.odd_files import odd_content, place_odd

        draw = random.Random(f"{self.seed}:{self.group}:{number}")
        target = draw.choice(self.targets)
        path = draw.choice(self._files(target))
        before = path.read_bytes()
        what, content = odd_content(target.kind, before, path, draw)
        command = draw.choice(target.commands)
        real = number % _REAL_SHARE == 0 and ":" not in command
        what = f"{path.relative_to(self.checkout)}: {what}; {command}{' in a process' * real}"
        place_odd(path, content)
        found = self._result(number, target, what, command, real=real)
        self._put_back(path, before)
        took_in = command.startswith("import") and found["verdict"] == "accepted"
        self._restore(renewed=took_in or (number + 1) % _FRESH == 0)
        return found

    def _files(self, target: Target) -> list[Path]:
        return sorted(self.checkout.glob(target.path.replace("OTHER", self.names["OTHER"])))

    def ask(self, number: int) -> Found:
        """Ask everything of a server that answers as none should."""
        from tests.support import odd_server

        odd_server.DRIP_SECONDS = 0.05
        answer = next(islice(odd_server.server_answers(self.seed), number, None))
        one = {"number": number, "target": "every question", "what": str(answer)[:200]}
        self.tell(one | {"verdict": "begun"})
        with odd_server.OddServer() as server:
            server.answer = answer
            home = Path(tempfile.mkdtemp(dir=self.checkout.parent))
            text = "\n".join(odd_server.faults(server.address, home))
        verdict = "refused" if not text else "hang" if "took" in text else "traceback"
        return one | {"verdict": verdict, "text": text[-3000:]}

    def _result(self, number: int, target: Target, what: str, command: str, *, real: bool) -> Found:
        """Run a command; tell what it is before, and return what came of it."""
        one = {"number": number, "target": f"{target.path} ({target.kind})", "what": what}
        self.tell(one | {"verdict": "begun"})
        self.watch.events.clear()
        began, used = time.monotonic() - _queued_seconds(), sum(os.times()[:4])
        code, text = self._run(command, real=real)
        # On a busy machine 20 s by the clock may be 2 s of work: then only standing still counts.
        seconds, used = time.monotonic() - _queued_seconds() - began, sum(os.times()[:4]) - used
        if _STILL < used < _MOST_SECONDS:
            seconds = min(seconds, _MOST_SECONDS)
        verdict = self._verdict(code, text, seconds)
        text = "\n".join(self.watch.events[:5]) or text[-3000:]
        return one | {"verdict": verdict, "seconds": round(seconds, 2), "text": text}

    def _verdict(self, code: int | None, text: str, seconds: float) -> str:
        from tests.support.odd_files import MARKER

        if any(self.checkout.parent.rglob(MARKER)) or (REPOSITORY / MARKER).exists():
            return "executed"
        if self.watch.events:
            return self.watch.events[0].partition(":")[0]
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
            line = [sys.executable, "-m", "runkey", *words]
            done = subprocess.run(line, capture_output=True, timeout=600, check=False)
            return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace")
        data = io.BytesIO()
        printed = io.TextIOWrapper(data, encoding="utf-8", write_through=True)
        code: int | None = 0
        with redirect_stdout(printed), redirect_stderr(printed):
            try:
                self._call(words)
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 0
            except BaseException:  # noqa: BLE001 - this is what is looked for
                code = None
                printed.write(traceback.format_exc())
        return code, data.getvalue().decode("utf-8", "replace")

    def _call(self, words: list[str]) -> None:
        from runkey.cli import main as runkey
        from runkey.errors import report_errors

        if ":" in words[0]:
            with report_errors():
                self.readers[words[0]](self.checkout, self.names)
            return
        sys.argv = ["runkey", *words]
        runkey()

    def _put_back(self, path: Path, content: bytes) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def _restore(self, *, renewed: bool) -> None:
        """Copy anew what commands write, or the whole checkout."""
        if renewed:
            shutil.rmtree(self.checkout, ignore_errors=True)
            self.checkout.mkdir(exist_ok=True)
            shutil.copytree(self.template, self.checkout, symlinks=True, dirs_exist_ok=True)
            os.chdir(self.checkout)
            return
        for name in ("prepared", "plots", "there", "run.json", ".runkey", "mlflow.db"):
            source, target = self.template / name, self.checkout / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            elif source.is_file():
                shutil.copy2(source, target)


# --- results


def _kind(one: Found) -> str:
    """What a refusal says in its last two lines, without the names and numbers of this one."""
    said = " ".join(one["text"].splitlines()[-2:])
    return re.sub(r"\S*[/\d]\S*|'[^']*'|\"[^\"]*\"", "…", said)


def _rows(first: str, ones: dict[str, list[Found]]) -> list[str]:
    """Return a table of counts by group or target, with the share of the commonest refusal."""
    lines = [f"| {first} | attacks | accepted | refused | lines | {' | '.join(BAD)} |"]
    lines += ["|" + "---|" * (5 + len(BAD))]
    for name, some in ones.items():
        counts = Counter(one["verdict"] for one in some)
        refusals = Counter(_kind(one) for one in some if one["verdict"] == "refused")
        often = max(refusals.values(), default=0) / (counts["refused"] or 1)
        said = f"{len(refusals)}, {often:.0%}" if any(refusals) else "-"
        numbers = (
            sum(counts.values()) - counts[SOUND],
            counts["accepted"],
            counts["refused"],
            said,
        )
        rest = (counts[verdict] for verdict in BAD)
        lines.append(f"| {name} | {' | '.join(map(str, (*numbers, *rest)))} |")
    return lines


def page(found: dict[str, list[Found]], asked: argparse.Namespace, seconds: float) -> list[str]:
    """Return the results as Markdown: counts by group and target, and each fault."""
    every = [one for ones in found.values() for one in ones]
    targets: defaultdict[str, list[Found]] = defaultdict(list)
    faults: defaultdict[str, list[str]] = defaultdict(list)
    for name, ones in found.items():
        for one in ones:
            targets[f"`{one['target']}`"].append(one)
            if one["verdict"] in BAD:
                last = ["", *one["text"].strip().splitlines()][-1]
                where = f"{one['number']} ({one['what'][:120]})"
                faults[f"{name} {one['verdict']}: {last[:160]}"].append(where)
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    only = "".join(f" --only {name}" for name in asked.only)
    lines = [
        "# Attacks on every reader",
        "",
        f"    python -m benchmarks.attack --count {asked.count} --seed {asked.seed}{only}",
        "",
        f"{sum(one['verdict'] != SOUND for one in every)} attacks in {seconds:.0f} s on"
        f" {platform.machine()}, {asked.jobs} of {os.cpu_count()} cores, Python"
        f" {platform.python_version()}, {time.strftime('%Y-%m-%d')}, commit"
        f" {commit.stdout.strip()}; the slowest took"
        f" {max((one.get('seconds', 0.0) for one in every), default=0.0):.1f} s.",
        "",
        "`accepted`: the change did no harm, or the command went on without the file. `lines`: how",
        "many different lines refused, and the share of the commonest: near 100%, the attacks did",
        "not get past that check. `no line`: an exit code without its one line. `sound refused`:",
        f"before each {_SOUND_SHARE}th attack a command reads the sound checkout, in turn.",
        "",
        *_rows("group", found),
        "",
        *_rows("target", targets),
    ]
    if faults:
        lines += ["", "Faults, by their last line:", ""]
        lines += [f"- {len(ones)}x {text}: {ones[0]}" for text, ones in sorted(faults.items())]
    return lines


if __name__ == "__main__":
    main()
