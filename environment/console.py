"""The command `runkey`, which `make env` puts into .venv/bin behind two lines of its own.

The code is that of the repository that the current folder lies in, as `python -m` takes it; outside
of any, that of the repository which this environment belongs to.
"""

import sys
from pathlib import Path


def repository() -> Path:
    """The nearest folder, from the current one upward, that holds runkey/__main__.py."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return Path(sys.prefix).parent
    for folder in (here, *here.parents):
        if (folder / "runkey/__main__.py").is_file():
            return folder
    return Path(sys.prefix).parent


if __name__ == "__main__":
    sys.path.insert(0, str(repository()))
    from runkey.cli import main

    main()
