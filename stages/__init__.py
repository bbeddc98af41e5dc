"""The stages of dvc.yaml, one file each: read parameters, call the library, write outputs."""

import io
import os
import sys

# Before torch is imported: threads that wait by spinning slow a step tenfold as soon as anything
# else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Each line when it is said, into a file or a pipe too: a training is followed while it runs.
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(line_buffering=True)
