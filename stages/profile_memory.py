"""Predict a training step's memory, and measure it: `python -m stages.profile_memory`.

The prediction, memory/memory.json and its picture, is the same on every machine. Steps run in
processes of their own (this file again, with `--trial`): these have done nothing else, and if one
takes all the memory there is, this process is left to report it.
"""

import sys
from pathlib import Path

from runkey import paths
from runkey.errors import report_errors
from runkey.identity.audit import watch_reads
from runkey.progress import log_to_terminal


def main() -> None:
    """Write memory/, or with `--predict` or `--trial` a part of it."""
    root = paths.workspace()
    watch_reads(root, "profile_memory")
    if "--trial" in sys.argv:
        from runkey.pipeline.step_factory import run_trial_job

        job, result = sys.argv[sys.argv.index("--trial") + 1 :][:2]
        run_trial_job(root, Path(job), Path(result))
        return
    # Imported here: a trial needs neither the prediction nor its picture.
    from runkey.pipeline.profile_memory import profile

    profile(root, only_predict="--predict" in sys.argv)


if __name__ == "__main__":
    with report_errors():
        log_to_terminal()
        main()
