"""Training logs of every kind, as the tests of plots have them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

_PLACE = Path(__file__).parents[1] / "plots" / "conftest.py"


def _load() -> dict[str, Callable[[Path], Path]]:
    spec = importlib.util.spec_from_file_location("plot_logs", _PLACE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logs: dict[str, Callable[[Path], Path]] = module.LOGS
    return logs


LOGS = _load()
