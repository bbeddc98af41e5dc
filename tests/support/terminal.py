"""A real terminal of 100 columns, and what is left on it.

written = on_terminal([sys.executable, "-c", "print('a line')"], cwd=root)
lines = screen(written)
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

COLUMNS = 100
ROWS = 40
_PIECE = re.compile(r"\x1b\[([0-9;?]*)([a-zA-Z])|([\s\S])")


def on_terminal(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    columns: int = COLUMNS,
) -> tuple[int, str]:
    """Run a command whose three streams are a terminal.

    Returns:
        Its exit code, and all that it wrote, control sequences included.
    """
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=cwd,
        env=kept | {"TERM": "xterm-256color"} | dict(env or {}),
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            some = os.read(ours, 1 << 16)
        except OSError:  # Linux's way to say that nobody holds the other end any more
            break
        if not some:
            break
        written += some
    os.close(ours)
    return process.wait(), written.decode()


def screen(written: str) -> list[str]:
    """The lines that are left: bars that were drawn over or erased are gone, colours too.

    Lines are not broken at the terminal's edge, so that one sees which are too long.
    """
    rows: list[list[str]] = [[]]
    row = column = 0
    for match in _PIECE.finditer(written):
        number, letter, character = match.groups()
        if letter == "A":
            row = max(0, row - int(number or 1))
        elif letter == "K":
            rows[row] = [] if number == "2" else rows[row][:column]
        elif character == "\r":
            column = 0
        elif character == "\n":
            row += 1
            if row == len(rows):
                rows.append([])
        elif character and character >= " ":
            line = rows[row]
            line += " " * (column - len(line))
            line[column : column + 1] = [character]
            column += 1
    return ["".join(line).rstrip() for line in rows]
