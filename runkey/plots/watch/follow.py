"""Follows the log of a training until the training ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runkey.plots.hints import all_hints
from runkey.plots.log import GrowingLog, TrainingLog
from runkey.plots.samples import SAMPLES, read_samples
from runkey.plots.watch.tell import Teller, ended

PAUSE_SECONDS = 1.0


def follow(
    log: Path,
    title: str,
    params: Mapping[str, Any],
    is_alive: Callable[[], bool],
    say: Callable[[str], None],
    *,
    pause_seconds: float = PAUSE_SECONDS,
) -> bool:
    """Show a training until it ends: its curves on a terminal, lines elsewhere.

    Args:
        log: its JSONL file, which must be there.
        title: of the training: key and name.
        params: its parameters by dotted name, for hints; {} if they are not known.
        is_alive: whether somebody still writes the log.
        say: prints a line.
        pause_seconds: between two looks.

    Returns:
        Whether it came to its end; False: it was interrupted.
    """
    samples = log.with_name(SAMPLES)
    # The folder of a training goes when it is recorded; what is open can still be read.
    file = os.open(log, os.O_RDONLY)
    try:
        growing = GrowingLog(Path(f"/proc/self/fd/{file}"))
        if sys.stdout.isatty() and find_spec("rich"):
            with _drawing(title, params, samples) as show:
                return _until_it_ends(growing, is_alive, show, pause_seconds)
        say(title)
        teller = Teller(params, samples)

        def tell(log: TrainingLog) -> None:
            for line in teller.new_lines(log):
                say(line)

        return _until_it_ends(growing, is_alive, tell, pause_seconds)
    finally:
        os.close(file)


def _until_it_ends(
    growing: GrowingLog,
    is_alive: Callable[[], bool],
    show: Callable[[TrainingLog], None],
    pause_seconds: float,
) -> bool:
    while True:
        going = is_alive()  # before reading: what a trainer wrote last is read, too
        growing.update()
        show(growing.log)
        if ended(growing.log) or not going:
            return bool(ended(growing.log))
        time.sleep(pause_seconds)


@contextmanager
def _drawing(
    title: str, params: Mapping[str, Any], samples: Path
) -> Iterator[Callable[[TrainingLog], None]]:
    """Draws a log over what was drawn before."""
    from rich.console import Console
    from rich.live import Live

    from runkey.plots.watch.screen import screen

    console = Console(highlight=False)
    # Dots tell curves apart by colour alone; plain marks have a shape for each.
    dots = (
        console.encoding.lower().startswith("utf")
        and console.color_system is not None
        and not console.no_color
    )
    with Live(console=console, auto_refresh=False) as live:

        def show(log: TrainingLog) -> None:
            hints = all_hints(log, params, read_samples(samples))
            live.update(
                screen(
                    title,
                    log,
                    hints,
                    time.time(),
                    console.width,
                    console.height,
                    dots=dots,
                ),
                refresh=True,
            )

        yield show
