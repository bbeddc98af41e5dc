"""`python -m runkey`: the command line."""

from __future__ import annotations

import sys
from importlib.util import find_spec

if find_spec("typer") is None:
    sys.exit(
        f"error: {sys.executable}: no package typer; `source .venv/bin/activate` or `make repro`"
    )

from runkey.cli import main

if __name__ == "__main__":
    main()
