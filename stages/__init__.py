"""The stages of dvc.yaml, one file each; what they do is in `runkey.pipeline`."""

import io
import os
import sys
from importlib.util import find_spec

# Before torch is imported: threads that spin while they wait slow a step tenfold as soon as
# anything else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Show each line at once, in a file or a pipe too: people follow a training while it runs.
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(line_buffering=True)

# DVC starts the first `python` on PATH: the system's, unless an environment is activated. Checked
# before anything of runkey is imported, which that Python may be too old to read.
if find_spec("pydantic") is None:
    sys.exit(
        f"error: {sys.executable}: no package pydantic; `source .venv/bin/activate` or `make repro`"
    )

from runkey.errors import report_early_interrupt

report_early_interrupt()
