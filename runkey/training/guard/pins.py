"""The checkpoint before a bad step is kept, so that the step can be looked at later."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from runkey.training.checkpoint.names import find_saved

# Each holds as much as a checkpoint.
_KEPT = 3

_NAME = re.compile(r"bad-step-(\d{8,})\.ckpt")


def pin_before(folder: Path, step: int) -> Path | None:
    """Give the newest checkpoint from before a step a second name, under which it stays.

    Args:
        folder: of the training; another thread may be removing checkpoints.
        step: the bad one's number, from 1: a checkpoint of fewer steps than this.

    Returns:
        The new name; None if there is no such checkpoint.

    Raises:
        OSError: the file system has no hard links, or refuses.
    """
    path = folder / f"bad-step-{step:08d}.ckpt"
    for saved in find_saved(folder):
        if saved.step >= step:
            continue
        with suppress(FileNotFoundError):  # removed meanwhile
            path.unlink(missing_ok=True)
            path.hardlink_to(folder / saved.name)
            for old in sorted(find_pins(folder))[:-_KEPT]:
                find_pins(folder)[old].unlink()
            return path
    return None


def find_pins(folder: Path) -> dict[int, Path]:
    """The checkpoints that were kept, by the bad step's number."""
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match.group(1)): path for match, path in matches if match}
