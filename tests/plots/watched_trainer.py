"""A process that writes a log as a training does: lock, lines, end.  `trainer.py FOLDER LOG MODE`.

Modes: `ends` writes all and ends; `hangs` stops in the middle and waits to be killed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from runkey.training.lock import locked


def main(folder: Path, log: Path, mode: str) -> None:
    lines = log.read_text().splitlines(keepends=True)
    with locked(folder), (folder / "train.jsonl").open("w") as file:
        for number, line in enumerate(lines):
            file.write(line)
            file.flush()
            if number == len(lines) // 2:
                sys.stdout.write("half\n")
                sys.stdout.flush()
                time.sleep(600 if mode == "hangs" else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
