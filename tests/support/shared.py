"""Data sets that are not ours to ship: tests that need one are skipped where it is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NAME = "RUNKEY_SHARED"


def shared_data(name: str) -> Path:
    """The folder of a data set, `data/NAME` below the folder that RUNKEY_SHARED names."""
    folder = Path(os.environ.get(NAME, "")) / "data" / name
    if not os.environ.get(NAME) or not folder.is_dir():
        pytest.skip(f"needs data/{name} in the folder that {NAME} names; it is not ours to ship")
    return folder
