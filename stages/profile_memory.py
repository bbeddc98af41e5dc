"""`python -m stages.profile_memory`: predict a training step's memory; measure it where it runs.

The prediction, memory/memory.json and its picture, is the same on every machine.  Steps are run in
processes of their own (this file again, with `--trial`): they have done nothing else, and if one
takes all the memory there is, this process is left to say so.
"""

from __future__ import annotations

import sys
from pathlib import Path

from runkey import paths
from runkey.errors import report_errors
from runkey.progress import log_to_terminal


def main() -> None:
    """Write memory/."""
    log_to_terminal()
    root = paths.workspace()
    if "--trial" in sys.argv:
        job, result = sys.argv[sys.argv.index("--trial") + 1 :][:2]
        _trial(root, Path(job), Path(result))
        return
    # Here, for a trial needs neither the prediction nor its picture.
    from runkey.pipeline.profile_memory import profile, write_prediction

    if "--predict" in sys.argv:
        write_prediction(root)
    else:
        profile(root)


def _trial(root: Path, job: Path, result: Path) -> None:
    from runkey.data.index import read_classes
    from runkey.memory.trial import read_job, run_trial, write_json
    from runkey.params import load_params
    from runkey.pipeline.one_step import build_step
    from runkey.training.device import choose_device

    params = load_params(root / paths.PARAMS)
    device, _ = choose_device(params.runtime.device)
    classes = len(read_classes(root / paths.PREPARED / "classes.json"))
    outcome = run_trial(lambda: build_step(params, classes, device).step, read_job(job), device)
    write_json(result, outcome)


if __name__ == "__main__":
    with report_errors():
        main()
