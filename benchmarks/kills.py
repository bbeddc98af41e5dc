"""Kill stages and commands at random moments, damage files; all must end as if undisturbed.

    python -m benchmarks.kills --kills 60                     # all; writes results/kills.md
    python -m benchmarks.kills --kills 4 --only train gc      # some of them; prints the table
    python -m benchmarks.kills --kills 0 --damages 30         # damaged files only

Compared with an undisturbed round: the bits of every output, MLflow's runs and points, records,
run-cache entries, DVC's cache, files left over (which `runkey gc` must name and remove).  The
training alone, at chosen moments of a checkpoint: `benchmarks.training_kills`.
"""

from __future__ import annotations

import argparse
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from tests.support.kill_commands import CASES, DAMAGES, Bench, Case, Round, play

RESULT = Path("benchmarks/results/kills.md")


@dataclass
class Row:
    """What became of a case in all its rounds."""

    case: Case
    rounds: list[Round] = field(default_factory=list)

    def cells(self) -> list[str]:
        """The row of the table."""
        kills = sum((r.kills for r in self.rounds), Counter[str]())
        left = Counter(name for r in self.rounds for name in r.leftovers)
        faults = sum(bool(r.faults) for r in self.rounds)
        damaged = ", ".join(dict.fromkeys(r.damaged for r in self.rounds if r.damaged))
        return [
            self.case.name,
            damaged or f"{kills['all']} + {kills['one']}",
            str(sum(len(r.lives) for r in self.rounds)),
            ", ".join(f"{n} x {name}" if n > 1 else name for name, n in left.items()) or "none",
            f"**{faults} of {len(self.rounds)} rounds**" if faults else "none",
        ]


def run(folder: Path, cases: Sequence[Case], kills: int, seed: int) -> list[Row]:
    """Play rounds of one or two kills, of each case in turn, until there were so many kills."""
    rng, bench = random.Random(seed), Bench(folder)
    rows = {case.name: Row(case) for case in cases}  # a file damaged in several ways is one row
    done = 0
    with suppress(KeyboardInterrupt):  # the table is of what was done
        while done < kills:
            for case in cases:
                if done >= kills:
                    break
                began = time.monotonic()
                wanted = 1 if case.damage else min(rng.choice([1, 1, 2]), kills - done)
                played = play(bench, case, rng, wanted)
                done += 1 if case.damage else played.kills.total()
                rows[case.name].rounds.append(played)
                what = played.damaged or dict(played.kills)
                codes = [code for code, _ in played.lives]
                seconds = time.monotonic() - began
                print(
                    f"{done}/{kills} {case.name}: {what}, exit codes {codes}, {seconds:.0f} s",
                    flush=True,
                )
                said = [text.strip().splitlines()[-1:] for code, text in played.lives if code]
                for told in (*said, *played.leftovers, *(f"FAULT {f}" for f in played.faults)):
                    print(f"    {told}", flush=True)
                if played.faults:
                    print(played.lives[-1][1][-5000:], flush=True)
    return list(rows.values())


def as_text(kills: Sequence[Row], damages: Sequence[Row], command: str, minutes: float) -> str:
    """Format the results as a page."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    cpu = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    )
    threads = len(
        [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "processor" in line]
    )
    lines = [
        "# Stages and commands killed at random moments",
        "",
        f"`{command}`, {date.today()}, commit {commit};",
        f"{threads} cores ({cpu.partition(': ')[2]}),",
        f"Python {platform.python_version()}; {minutes:.0f} minutes. How: `benchmarks/kills.py`.",
    ]
    heads = (
        (kills, ("killed", "kills: all processes + one of them")),
        (damages, ("damaged before it goes on", "how")),
    )
    for rows, head in heads:
        if any(row.rounds for row in rows):
            names = (*head, "starts", "left, named and removed by `runkey gc`", "faults")
            lines += ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
            lines += [f"| {' | '.join(row.cells())} |" for row in rows if row.rounds]
    total = sum((r.kills for row in kills for r in row.rounds), Counter[str]()).total()
    broken = [(row, r) for row in (*kills, *damages) for r in row.rounds if r.faults]
    lines += ["", f"{total} kills, {len(broken)} rounds with faults."]
    lines += [f"- {row.case.name}: {fault[:300]!r}" for row, r in broken for fault in r.faults]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run; exit code 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs, over all cases in turn")
    parser.add_argument("--damages", type=int, default=len(DAMAGES), help="damaged files, in turn")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases; else all")
    parser.add_argument("--seed", type=int, default=0, help="decides when and how")
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, and to leave")
    options = parser.parse_args()
    wanted = set(options.only or ())
    if unknown := wanted - {case.name for case in (*CASES, *DAMAGES)}:
        parser.error(f"no case {', '.join(sorted(unknown))}")
    cases, damages = (
        [case for case in some if not wanted or case.name in wanted] for some in (CASES, DAMAGES)
    )
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        folder.mkdir(exist_ok=True)
        killed = run(folder, cases, options.kills if cases else 0, options.seed)
        damaged = run(folder, damages, options.damages if damages else 0, options.seed)
    command = " ".join(["python -m benchmarks.kills", *sys.argv[1:]])
    text = as_text(killed, damaged, command, (time.monotonic() - began) / 60)
    if not wanted:
        RESULT.write_text(text)
    print(text)
    return 1 if any(r.faults for row in (*killed, *damaged) for r in row.rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
