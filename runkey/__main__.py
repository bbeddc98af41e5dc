"""`python -m runkey`: the command line."""

from __future__ import annotations

from runkey.cli import main

if __name__ == "__main__":
    main()
