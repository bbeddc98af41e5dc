"""`python -m stages.profile_memory`: measure a training step, choose the micro-batch.

It starts itself anew with `--measure` and waits: a process that has done nothing else is measured,
and if it takes all the memory there is, this one is left to say so.
"""

from __future__ import annotations

import sys
from pathlib import Path

from runkey import paths
from runkey.errors import report_errors
from runkey.memory.guard import run_guarded


def main() -> None:
    """Write memory/."""
    root = paths.workspace()
    if "--measure" in sys.argv:
        _measure(root)
        return
    again = [argument for argument in sys.argv[1:] if argument == "--traceback"]
    command = [sys.executable, "-m", "stages.profile_memory", "--measure", *again]
    raise SystemExit(run_guarded(command, root))


def _measure(root: Path) -> None:
    # Here, for the waiting process needs none of it: torch alone is seconds of import.
    from runkey.data.index import read_classes
    from runkey.memory.profile import profile
    from runkey.params import load_params
    from runkey.training.device import choose_device
    from stages._parts import build_step

    params = load_params(root / paths.PARAMS)
    device, _ = choose_device(params.runtime.device)
    prepared = root / paths.PREPARED
    classes = len(read_classes(prepared / "classes.json"))
    profile(
        params,
        prepared=prepared,
        out=root / paths.MEMORY,
        make_step=lambda: build_step(params, classes, device),
        device=device,
        say=print,
    )


if __name__ == "__main__":
    with report_errors():
        main()
