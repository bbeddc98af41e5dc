"""The stages of dvc.yaml, one file each: read parameters, call the library, write outputs."""

import io
import os
import sys
from importlib.util import find_spec

# Before torch is imported: threads that wait by spinning slow a step tenfold as soon as anything
# else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Each line when it is said, into a file or a pipe too: a training is followed while it runs.
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(line_buffering=True)

# DVC starts the first `python` on PATH, which is the system's where nothing was activated.  Said
# before anything of runkey is imported, for that Python may be too old to read it.
if find_spec("pydantic") is None:
    sys.exit(
        f"error: {sys.executable}: no package pydantic; `source .venv/bin/activate` or `make repro`"
    )
