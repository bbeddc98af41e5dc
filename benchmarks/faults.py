"""A training on two machines that lose each other: who says so, when, and what a restart gives.

    python -m benchmarks.faults                    # as root; all faults, about half an hour
    python -m benchmarks.faults --stage cut pause  # some of them, with the real train stage

Machines are namespaces with a network, process ids and a host name of their own, joined by virtual
cables (`tests.support.nodes`). Each runs one of two ranks: of a toy that `runkey.training.loop`
trains under a real claim (`tests.support.rank_trainings.endure`), or `python -m stages.train`. A
fault comes in the third epoch. Without arguments benchmarks/results/faults.md is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

from runkey.hashing import sha256_file
from tests.support.nodes import Network, Node, why_not
from tests.support.project import REPOSITORY, TINY, begin_project, clean_environment

RESULTS = Path(__file__).parent / "results" / "faults.md"
EPOCHS = 8
EPOCH_OF_FAULT = f"epoch {3:{len(str(EPOCHS))}}/"
LONGEST = 900.0
"""Seconds for a training to end."""


class Rank:
    """One rank on its machine."""

    def __init__(
        self, node: Node, rank: int, command: list[str], root: Path, log: Path, **more: str
    ) -> None:
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": "29500",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "EPOCHS": str(EPOCHS),
            "STEP_SECONDS": "0.3",
        }
        self.log, self.rank, self.node = log, rank, node
        with log.open("wb") as output:
            self.process: Popen[bytes] = node.start(
                command,
                root,
                clean_environment() | environment | more,
                output,
            )

    @property
    def said(self) -> str:
        """What it printed so far, in one line."""
        return " ".join(self.log.read_text(errors="replace").split())

    @property
    def last_line(self) -> str:
        """The last that it said, without the fold at 100 columns."""
        lines = self.log.read_text(errors="replace").rstrip().splitlines()
        while len(lines) > 1 and lines[-1].startswith("  "):
            lines[-2:] = [f"{lines[-2]} {lines[-1].strip()}"]
        return lines[-1] if lines else ""

    def wait_for(self, text: str) -> None:
        """Wait until it has printed a text."""
        end = time.monotonic() + LONGEST
        while text not in self.log.read_text(errors="replace"):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"rank {self.rank} never said {text!r}: {self.said[-2000:]}")
            time.sleep(0.05)

    def named(self, began: float, text: str = "error: ") -> float:
        """Wait until it says what is wrong; return the seconds since then."""
        end = began + LONGEST
        while text not in self.log.read_text(errors="replace") and time.monotonic() < end:
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        return time.monotonic() - began

    def wait(self, began: float) -> float:
        """Wait until it ends; return the seconds since then."""
        self.process.wait(LONGEST)
        return time.monotonic() - began


@dataclass
class Row:
    """What became of one fault."""

    fault: str
    named: dict[int, float] = field(default_factory=dict)
    """Seconds until a rank named it, by rank."""
    ended: float | None = None
    """Seconds until all of them had ended."""
    line: str = ""
    lost: str = ""
    bits: str = ""
    claim: str = ""
    code: str = ""


Injected = Callable[[Network, list[Rank]], None]


@dataclass(frozen=True)
class Fault:
    """Something that happens to one of two ranks, from which the other has to recover."""

    text: str
    inject: Injected
    names: tuple[int, ...] = ()
    """Ranks that must name it and end; none: training goes on."""
    wakes: int | None = None
    """The suspended machine that goes on when they have ended."""


def _pause_and_wake(seconds: float, start: Injected, end: Injected) -> Injected:
    def inject(network: Network, ranks: list[Rank]) -> None:
        start(network, ranks)
        time.sleep(seconds)
        end(network, ranks)

    return inject


def _on(node: int, what: str, *arguments: Any) -> Injected:
    return lambda network, _: getattr(network.nodes[node], what)(*arguments)


def _both(*parts: Injected) -> Injected:
    def inject(network: Network, ranks: list[Rank]) -> None:
        for part in parts:
            part(network, ranks)

    return inject


_KILL, _STOP, _GO, _TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM
_SLOW = ("tbf", "rate", "2mbit", "burst", "16kb", "latency", "200ms")

FAULTS: dict[str, Fault] = {
    "kill": Fault("rank 1 is killed, its machine stays", _on(1, "signal", _KILL), (0,)),
    "kill-0": Fault("rank 0 is killed, its machine stays", _on(0, "signal", _KILL), (1,)),
    "cut": Fault("machine of rank 1: cable pulled", _on(1, "cut"), (0, 1)),
    "drop": Fault("the switch drops all of rank 0's packets", _on(0, "drop"), (0, 1)),
    "cut-kill": Fault(
        "machine of rank 1: cable pulled, then it is gone (no FIN)",
        _both(_on(1, "cut"), _on(1, "signal", _KILL)),
        (0,),
    ),
    "cut-kill-0": Fault(
        "machine of rank 0: cable pulled, then it is gone (no FIN)",
        _both(_on(0, "cut"), _on(0, "signal", _KILL)),
        (1,),
    ),
    "pause": Fault("rank 1 is suspended (SIGSTOP)", _on(1, "signal", _STOP), (0,)),
    "pause-0": Fault(
        "rank 0 is suspended, and goes on after rank 1 ended",
        _on(0, "signal", _STOP),
        (1,),
        wakes=0,
    ),
    "blink": Fault(
        "cable pulled for 8 s",
        _pause_and_wake(8, _on(1, "cut"), _on(1, "mend")),
    ),
    "nap": Fault(
        "rank 1 is suspended for 8 s",
        _pause_and_wake(8, _on(1, "signal", _STOP), _on(1, "signal", _GO)),
    ),
    "slow": Fault("cable of rank 1 has 2 Mbit/s", _on(1, "shape", *_SLOW)),
    "term": Fault("SIGTERM to rank 1", _on(1, "signal", _TERM), (0, 1)),
}
STARTS = {
    "absent": "rank 1 never starts; SIGTERM to rank 0",
    "unresolved": "rank 1 cannot resolve MASTER_ADDR",
}


class Bench:
    """A training, and what it gives undisturbed."""

    def __init__(self, folder: Path, *, stage: bool) -> None:
        self.folder, self._stage = folder, stage
        self._first = folder / "first"
        if stage:
            runtime = {"checkpoint_seconds": 0, "device": "cpu", "workers": 0}
            training = {"epochs": EPOCHS, "evaluate_every": 2, "early_stopping": {"enabled": False}}
            asked = TINY | {"training": TINY["training"] | training}
            project = begin_project(self._first, asked | {"runtime": TINY["runtime"] | runtime})
            for name in ("prepare", "profile_memory"):
                project.run(sys.executable, "-m", f"stages.{name}")
        else:
            self._first.mkdir()
        self._expected: dict[str, str] = {}
        self._expected = self._restart("undisturbed", self._copy("undisturbed"))[1]

    def try_fault(self, name: str) -> Row:
        """Inject a fault in a training, start it again, compare."""
        fault, row, root = FAULTS[name], Row(FAULTS[name].text), self._copy(name)
        with self._ranks(root, name) as (network, ranks):
            ranks[0].wait_for(EPOCH_OF_FAULT)
            began = time.monotonic()
            fault.inject(network, ranks)
            if not fault.names:
                for rank in ranks:
                    rank.wait(began)
                row.line, row.lost = "", "nothing"
                row.bits = "same" if _weights(root) == self._expected else "OTHER"
                row.code = "/".join(str(rank.process.returncode) for rank in ranks)
                return row
            text = "stopped by SIGTERM" if name == "term" else "error: "
            for number in fault.names:
                row.named[number] = ranks[number].named(began, text)
            row.ended = max(ranks[number].wait(began) for number in fault.names)
            row.line = ranks[fault.names[0]].last_line
            row.code = "/".join(str(ranks[n].process.returncode) for n in fault.names)
            if fault.wakes is None:
                row.claim = _claim(root)
            else:
                network.nodes[fault.wakes].signal(_GO)
                ranks[fault.wakes].wait(began)
                row.claim = _claim(root)
                row.line += " | woken: " + ranks[fault.wakes].last_line
            done = [int(n) for rank in ranks for n in re.findall(r"after step (\d+)", rank.said)]
        resumed, weights = self._restart(name, root)
        row.lost = f"{max([*done, resumed]) - resumed} steps"
        row.bits = "same" if weights == self._expected else "OTHER"
        return row

    def try_start(self, name: str) -> Row:
        """Start ranks that cannot find each other; then start them right."""
        row, root = Row(STARTS[name]), self._copy(name)
        with Network(2) as network:
            began = time.monotonic()
            ranks = [self._rank(network, 0, root, name)]
            if name == "unresolved":
                ranks.append(self._rank(network, 1, root, name, MASTER_ADDR="nosuch"))
                row.named[1] = ranks[1].named(began)
                row.ended = ranks[1].wait(began)
                row.line = ranks[1].last_line
            ranks[0].wait_for("still waits for")
            if name == "absent":
                row.named[0] = time.monotonic() - began
                row.line = ranks[0].last_line
            sent = time.monotonic()
            network.nodes[0].signal(_TERM)
            stopped = ranks[0].named(sent, "stopped by SIGTERM")
            ranks[0].wait(sent)
            row.line += f" | {stopped:.1f} s after SIGTERM: {ranks[0].last_line}"
            row.code = "/".join(str(rank.process.returncode) for rank in reversed(ranks))
            row.lost = "nothing"
        row.bits = "same" if self._restart(name, root)[1] == self._expected else "OTHER"
        return row

    def _restart(self, name: str, root: Path) -> tuple[int, dict[str, str]]:
        """Train to the end; return the step that was resumed from, and the weights."""
        with self._ranks(root, f"{name}-again") as (_, ranks):
            for rank in ranks:
                rank.wait(0)
            said = ranks[0].said
        if failed := [rank.said[-500:] for rank in ranks if rank.process.returncode]:
            raise RuntimeError(f"started again: {failed}")
        found = re.search(r"resuming after step (\d+) of", said)
        return int(found[1]) if found else 0, _weights(root)

    def _copy(self, name: str) -> Path:
        return shutil.copytree(self._first, self.folder / f"of-{name}", symlinks=True)

    def _rank(self, network: Network, rank: int, root: Path, name: str, **more: str) -> Rank:
        log, module = self.folder / f"{name}-{rank}.log", ["-m", "stages.train"]
        if not self._stage:
            module = ["-m", "tests.support.ranks", "endure", str(root / "result-%.pt"), str(root)]
            more["PYTHONPATH"] = str(REPOSITORY)
        return Rank(network.nodes[rank], rank, [sys.executable, *module], root, log, **more)

    @contextmanager
    def _ranks(self, root: Path, name: str) -> Iterator[tuple[Network, list[Rank]]]:
        with Network(2) as network:
            yield network, [self._rank(network, rank, root, name) for rank in range(2)]


def _weights(root: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in sorted((root / "model").glob("weights*"))}


def _claim(root: Path) -> str:
    """State of the newest claim, and whether its beat still counts."""
    path = max((root / ".runkey/claims").glob("*.json"), default=None)
    if path is None:
        return "none"
    before = json.loads(path.read_text())
    time.sleep(12)  # a beat comes every 10 s
    after = json.loads(path.read_text())
    return f"{after['state']}, {'BEATS' if after['beat'] != before['beat'] else 'no beat'}"


def _table(rows: list[Row]) -> str:
    head = (
        "| fault | named after, s | ended, s | exit | lost | claim | bits after restart |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    body = ""
    for row in rows:
        named = ", ".join(f"rank {n}: {s:.1f}" for n, s in row.named.items()) or "-"
        ended = "-" if row.ended is None else f"{row.ended:.0f}"
        cells = (row.fault, named, ended, row.code, row.lost, row.claim or "-", row.bits)
        body += f"| {' | '.join(cells)} |\n"
    return head + body


def main() -> None:
    """Try the faults, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, *STARTS, []], default=[])
    parser.add_argument("--stage", action="store_true", help="run the real train stage")
    parser.add_argument("--at-once", type=int, default=1, help="networks beside each other")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"faults: {reason}")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(Path(folder), stage=asked.stage)

        def attempt(name: str) -> Row:
            try:
                row = bench.try_fault(name) if name in FAULTS else bench.try_start(name)
            except (RuntimeError, TimeoutExpired, OSError, AssertionError) as error:
                row = Row(name, bits=f"NOT SEEN: {str(error)[-300:]}")
            print(f"{_table([row]).splitlines()[-1]}\n    {row.line}", flush=True)
            return row

        with ThreadPoolExecutor(asked.at_once) as pool:
            rows = list(pool.map(attempt, asked.faults or [*FAULTS, *STARTS]))
        if not asked.faults:
            asked.out.write_text(_page(rows, asked.at_once), encoding="utf-8")


PAGE = """# Ranks that lose each other

`python -m benchmarks.faults{options}`, {day}, Python {python}, as root; 2 cores
with load {load:.0f} from other work. Two machines (namespaces with a network, process ids and a
host name of their own, joined by virtual cables) train a toy with `runkey.training.loop`
over gloo, {steps} steps, under a claim, with a checkpoint after each step. The fault comes in the
third epoch.

Named: when the line was printed. Ended: when the processes were gone, which takes Python and torch
a while. Exit 75: try again elsewhere or later. Lost: steps that the restart took again. Claim:
after the end. Bits: weights after both ranks were started again, against those of a training that
nothing happened to.

{table}
## What they say
{lines}
"""


def _page(rows: list[Row], at_once: int) -> str:
    return PAGE.format(
        options=f" --at-once {at_once}" if at_once > 1 else "",
        day=time.strftime("%Y-%m-%d"),
        python=platform.python_version(),
        load=os.getloadavg()[2],
        steps=3 * EPOCHS,
        table=_table(rows),
        lines="\n".join(f"- {row.fault}: `{row.line.strip()}`" for row in rows if row.line),
    )


if __name__ == "__main__":
    main()
