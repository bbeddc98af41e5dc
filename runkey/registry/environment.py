"""Compare what is installed with the lock; export the locked environment of a recorded run.

Python packages, and the CUDA version that torch is built for, are compared with requirements.txt,
which is derived from the lock; in a conda environment all packages and builds with conda-lock.yml.
"""

from __future__ import annotations

import filecmp
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runkey.errors import RegistryError
from runkey.files import copy_atomically, read_json
from runkey.identity.environment import (
    LockedPackage,
    environment_preimage,
    installed_cuda,
    installed_packages,
    locked_cuda,
    normalise_name,
    python_pins,
    read_lock,
    read_requirements,
)
from runkey.identity.key import part_digest
from runkey.identity.record import Record
from runkey.paths import LOCK, REQUIREMENTS
from runkey.registry.snapshot import checked_out, has_snapshot


@dataclass(frozen=True)
class PackageDifference:
    """A package that is not installed as it is locked."""

    name: str
    locked: str | None
    """Version; in a conda environment `version build`. None: not locked."""
    installed: str | None
    """Likewise; None: not installed."""

    def __str__(self) -> str:
        return f"{self.name}: locked {self.locked}, installed {self.installed or 'none'}"


@dataclass(frozen=True, kw_only=True)
class EnvironmentComparison:
    """The comparison of an environment with its lock."""

    environment: str
    """Its folder."""
    against: str
    """The file that names what is locked."""
    same: int
    """Number of packages installed as locked."""
    missing: list[PackageDifference]
    """Locked and not installed; like the others, sorted by name."""
    other: list[PackageDifference]
    """Of another version or build, or for another CUDA."""
    extra: list[PackageDifference]
    """Installed and not locked, which is no fault."""
    python: str
    """Version of this interpreter."""
    locked_python: str
    cuda: str | None
    """CUDA version of the installed torch; None: built for the CPU, or not installed."""
    way_out: str
    """Command that installs what is locked; empty if everything is."""

    @property
    def agrees(self) -> bool:
        """True if everything is installed as locked."""
        return not self.missing and not self.other

    def as_dict(self) -> dict[str, Any]:
        """Format for JSON."""
        return {"agrees": self.agrees, **asdict(self)}


def compare_environment(folder: Path) -> EnvironmentComparison:
    """Compare what this interpreter can import with the lists in a folder, such as the repository.

    Raises:
        LockError: conda-lock.yml or requirements.txt of the folder cannot be read.
        RegistryError: a record of conda's is damaged.
    """
    prefix, conda = Path(sys.prefix), Path(os.environ.get("CONDA_PREFIX", ""))
    packages = read_lock(folder / LOCK)
    python = platform.python_version()
    locked_python = next((p.version for p in packages if p.name == "python"), python)
    cuda = installed_cuda()
    if conda.resolve() == prefix.resolve() and (conda / "conda-meta").is_dir():
        against = LOCK
        locked, installed = _conda_lists(prefix, packages)
    else:
        against = REQUIREMENTS
        locked, installed = read_requirements(folder / REQUIREMENTS), installed_packages()
        wanted = locked_cuda(locked)
        if locked.get("torch") == installed.get("torch") and wanted != cuda:
            for names, version in ((locked, wanted), (installed, cuda)):
                names["torch's build"] = f"for CUDA {version}" if version else "for the CPU"
        if python.split(".")[:2] != locked_python.split(".")[:2]:
            locked["python"], installed["python"] = locked_python, python
    every = sorted(locked.keys() | installed.keys())
    pairs = [PackageDifference(name, locked.get(name), installed.get(name)) for name in every]
    differing = [pair for pair in pairs if pair.locked != pair.installed]
    missing = [pair for pair in differing if pair.installed is None]
    other = [pair for pair in differing if None not in (pair.installed, pair.locked)]
    return EnvironmentComparison(
        environment=str(prefix),
        against=str(against),
        same=len(pairs) - len(differing),
        missing=missing,
        other=other,
        extra=[pair for pair in differing if pair.locked is None],
        python=python,
        locked_python=locked_python,
        cuda=cuda,
        way_out=_way_out(folder, prefix, against) if missing or other else "",
    )


def _conda_lists(
    prefix: Path, packages: tuple[LockedPackage, ...]
) -> tuple[dict[str, str], dict[str, str]]:
    """Version and build by name of what is locked, and of what is installed.

    A package that pip put over conda's stands for it.
    """
    locked = {p.name: f"{p.version} {p.build}" for p in packages}
    installed, files = dict[str, str](), set[str]()
    for path in sorted((prefix / "conda-meta").glob("*.json")):
        try:
            record = read_json(path)
            installed[str(record["name"])] = f"{record['version']} {record['build']}"
            files |= set(record.get("files", ()))
        except (ValueError, KeyError, TypeError):
            raise RegistryError(
                f"{path}: not a record of conda's; `conda install --force-reinstall` the package"
            ) from None
    pins = python_pins(packages)
    for path in sorted(prefix.glob("lib/python3*/site-packages/*.dist-info")):
        name, _, version = path.stem.partition("-")
        name = normalise_name(name)
        by_conda = f"{path.relative_to(prefix).as_posix()}/METADATA" in files
        if not by_conda and name != "runkey":  # the project, in editable form
            locked.pop(name, None)
            locked |= {name: pins[name]} if name in pins else {}
            installed[name] = f"{version} by pip"
    return locked, installed


def _way_out(folder: Path, prefix: Path, against: Path) -> str:
    if against == LOCK:
        return f"conda-lock install --prefix {prefix} {LOCK}"
    if prefix.resolve() == (folder / ".venv").resolve():
        # `make env` does nothing while its mark is there, whatever was installed by hand.
        return "rm -f .venv/requirements.installed && make env"
    return "make env, then .venv/bin/runkey"


def export_environment(root: Path, record: Record, target: Path) -> list[Path]:
    """Write a run's lock and requirements, from its snapshot, to a folder; return the files.

    Raises:
        RegistryError: the run has no snapshot, it is not here, its lock is not that of the run's
            key, or `target` holds other files of these names.
    """
    oid = record.details.snapshot if record.details else None
    if oid is None:
        raise RegistryError(f"{record.label}: the run kept no snapshot of its code")
    if not has_snapshot(root, oid):
        raise RegistryError(
            f"{record.label}: its snapshot {oid[:12]} is not in this repository;"
            f" `runkey fetch {record.label}` brings it"
        )
    files = [target / name for name in (LOCK, REQUIREMENTS)]
    with checked_out(root, oid, [LOCK.name, REQUIREMENTS.name]) as folder:
        for path in files:
            if path.exists() and not filecmp.cmp(path, folder / path.name, shallow=False):
                raise RegistryError(f"{path}: is there, with other content; name another folder")
        digest = part_digest("environment", environment_preimage(folder / LOCK))
        if digest != record.run.parts["environment"]:
            raise RegistryError(f"{record.label}: the lock in its snapshot is not that of its key")
        target.mkdir(parents=True, exist_ok=True)
        for path in files:
            copy_atomically(folder / path.name, path)
    return files
