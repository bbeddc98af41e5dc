"""Import the packages of `make env-export`, which no stage needs and no lock holds."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from runkey.errors import LockError
from runkey.identity.environment import EXTRAS

_REPOSITORY = Path(__file__).parents[2]


def import_extra(module: str) -> Any:
    """Import a module such as `onnxruntime`, from .venv-export if this environment has none.

    The folder goes last on `sys.path` and stays there: it holds no package of .venv.

    Args:
        module: dotted name; of a submodule, that one is returned.

    Raises:
        LockError: the module is not installed, or does not load.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError:
        folders = map(str, _REPOSITORY.glob(f"{EXTRAS}/lib/python3*/site-packages"))
        sys.path += [folder for folder in folders if folder not in sys.path]
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        missing = getattr(error, "name", None) == package
        reason = "is not installed" if missing else f"does not load ({error})"
        raise LockError(f"{package} {reason}; run `make env-export`") from None
