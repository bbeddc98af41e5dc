"""run.json: the key of a run, its MLflow run, and the environment it ran in.

The key says what was requested, the run environment what was there: device, micro-batch, packages,
files.  On a CPU, two runs of one key in equal environments give the same bits.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Self

from runkey.errors import LockError, RecipeError
from runkey.files import write_atomically
from runkey.identity.code import foreign_files, imported_files, undeclared
from runkey.identity.environment import (
    differences,
    installed_packages,
    interpreter,
    read_requirements,
)
from runkey.identity.key import Recipe

SCHEMA = "run1"
REQUIREMENTS = Path("requirements.txt")
_VARIABLES = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHASHSEED", "PYTHONPATH")
_FAMILIES = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "ATEN_"),
    *("TORCH_", "PYTORCH_", "CUDA_", "CUBLAS_", "CUDNN_", "NCCL_", "NVIDIA_", "TORCHINDUCTOR_"),
)
"""Prefixes: threads, kernels and precision of arithmetic, search paths of libraries."""


@dataclass(frozen=True, kw_only=True)
class RunEnvironment:
    """What a run really ran with; not part of the key."""

    device: str
    """Kind and name, such as `cpu x86_64` or `cuda NVIDIA H200`."""
    micro_batch: int
    """Images per forward pass."""
    world_size: int
    """Training processes."""
    threads: int
    """Threads of one process's operators."""
    precision: str = "off"
    """Mixed precision that was used: off, bf16 or fp16."""
    interpreter: str
    """Python's implementation and version, system and machine."""
    packages: dict[str, str]
    """Version by name of every installed package."""
    package_differences: list[str]
    """Differences from requirements.txt, such as `numpy: locked 2.5.1, installed 2.4.0`."""
    files: list[str]
    """The imported files of the repository."""
    undeclared_files: list[str]
    """Imported files that the key does not cover; files from outside the repository and the locked
    packages with their whole path."""
    commit: str | None
    """Checked-out git commit; None outside git."""
    dirty: bool
    """Whether tracked files differed from it."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables that can change the last bits of a result."""


@dataclass(frozen=True, kw_only=True)
class RunManifest:
    """The contents of run.json."""

    key: str
    """Key of the stage that ran, `rk2-<hex>`."""
    stage: str
    parts: dict[str, str]
    """Hash of each part of the key."""
    run_id: str | None
    """MLflow run; None if it was not logged there."""
    witness: RunEnvironment
    schema: str = field(default=SCHEMA)

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False)
        write_atomically(path, text + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest.

        Raises:
            RecipeError: the file is missing, is not JSON, or holds other fields.
        """
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"{path}: not found; `dvc repro train` writes it") from None
        except ValueError:
            raise RecipeError(f"{path}: not JSON; `dvc checkout {path.name}` restores it") from None
        try:
            if stored["schema"] != SCHEMA:
                raise RecipeError(
                    f"{path}: schema {stored['schema']!r}; this runkey reads {SCHEMA}"
                )
            return cls(**{**stored, "witness": RunEnvironment(**stored["witness"])})
        except (KeyError, TypeError):
            names = ", ".join(f.name for f in fields(cls))
            raise RecipeError(f"{path}: not a run's manifest, which holds {names}") from None


def capture_environment(
    root: Path,
    recipe: Recipe,
    *,
    device: str,
    micro_batch: int,
    world_size: int,
    threads: int,
    precision: str = "off",
) -> RunEnvironment:
    """Return the environment of this process; call it at the end, when all is imported."""
    packages = installed_packages()
    try:
        package_differences = differences(read_requirements(root / REQUIREMENTS), packages)
    except LockError as error:
        # A copy of the code alone, on a bare GPU machine, is no reason to stop.
        package_differences = [str(error)]
    files = imported_files(root)
    code = recipe.preimages["code"]
    return RunEnvironment(
        device=device,
        micro_batch=micro_batch,
        world_size=world_size,
        threads=threads,
        precision=precision,
        interpreter=interpreter(),
        packages=packages,
        package_differences=package_differences,
        files=list(files),
        undeclared_files=[
            *undeclared(files, code["files"], root, code["excluded"]),
            *foreign_files(root),
        ],
        commit=_git(root, "rev-parse", "HEAD"),
        dirty=bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        variables={n: value for n, value in sorted(os.environ.items()) if value and _counts(n)},
    )


def _counts(variable: str) -> bool:
    named = variable in _VARIABLES or variable.startswith(_FAMILIES)
    # The folder of compiled kernels changes no result, and torch sets it itself.
    return named and not variable.endswith("_CACHE_DIR")


def make_manifest(recipe: Recipe, run_id: str | None, witness: RunEnvironment) -> RunManifest:
    """Return the manifest of a run of a recipe."""
    return RunManifest(
        key=recipe.key, stage=recipe.stage, parts=recipe.parts, run_id=run_id, witness=witness
    )


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
