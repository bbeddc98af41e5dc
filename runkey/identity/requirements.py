"""The pins of requirements.txt, derived from conda-lock.yml: the same versions without conda.

    python -m runkey.identity.requirements | uv pip compile --generate-hashes - -o requirements.txt

(`make lock` does this.)  A conda package is a Python package if it depends on Python; the tables
below name the few whose names differ, and those that exist on one side only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from runkey.errors import report_errors
from runkey.identity.environment import Package, normalise_name, read_lock
from runkey.paths import LOCK, workspace

PYTHON_NAMES: dict[str, tuple[str, ...]] = {
    "antlr-python-runtime": ("antlr4-python3-runtime",),
    "brotli-python": ("brotli",),
    "docker-py": ("docker",),
    "fastapi-core": ("fastapi",),
    "matplotlib-base": ("matplotlib",),
    # conda's mlflow-skinny carries the files of mlflow-tracing.
    "mlflow-skinny": ("mlflow-skinny", "mlflow-tracing"),
    "pyarrow-core": ("pyarrow",),
    "python-tzdata": ("tzdata",),
    "pytorch": ("torch",),
    # A program that needs no Python, but is published on the Python index too.
    "uv": ("uv",),
}
"""Conda name -> names on the Python index, where they are not the same single one."""

CONDA_ONLY = frozenset(
    {
        "cpython",  # the interpreter
        "fastapi",  # names fastapi-core and its extras
        "mlflow-ui",  # its files are in the wheel of mlflow
        "pyarrow",  # names pyarrow-core and its libraries
        "python-gssapi",  # optional in conda's own builds of other packages
        "pyu2f",  # likewise
        "pywin32-on-windows",  # empty on Linux
        "torchvision-extra-decoders",  # on the Python index torchvision does without
        "triton",  # torch's wheel pins the version it was built for
    }
)
"""Conda packages that depend on Python and have no line of their own in requirements.txt."""


def python_pins(packages: Iterable[Package]) -> dict[str, str]:
    """Version by name on the Python index of every Python package among the locked ones, sorted."""
    pins: dict[str, str] = {}
    for package in packages:
        if package.name in CONDA_ONLY:
            continue
        if package.needs_python or package.name in PYTHON_NAMES:
            for name in PYTHON_NAMES.get(package.name, (package.name,)):
                pins[normalise_name(name)] = package.version
    return dict(sorted(pins.items()))


def main() -> None:
    """Write the pins of the repository's lock to standard output, one a line."""
    with report_errors():
        for name, version in python_pins(read_lock(workspace() / LOCK)).items():
            sys.stdout.write(f"{name}=={version}\n")


if __name__ == "__main__":
    main()
