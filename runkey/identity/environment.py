"""The environment part of a key: the packages that conda-lock.yml holds for one platform.

What is really installed is no part of the key; `installed_packages` and `differences` record it
beside the key, in the run's witness.
"""

from __future__ import annotations

import platform as this_machine
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from runkey.errors import LockError
from runkey.identity.locktext import lock_entries
from runkey.identity.yamltext import read_yaml_text

PLATFORM = "linux-64"
CATEGORY = "main"

_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)")


@dataclass(frozen=True, order=True)
class Package:
    """One locked package: what tells its build from every other."""

    name: str
    version: str
    build: str
    """conda's build string, such as `py312h868fb18_0`; empty for a package from a Python index."""
    hash: str
    """`sha256:<hex>`, or `md5:<hex>` where the lock has no better."""
    needs_python: bool = False
    """Whether it lists Python among its dependencies.  Follows from the build, so not hashed."""

    def row(self) -> list[str]:
        """`[name, version, build, hash]`, as it enters the key."""
        return list(astuple(self)[:4])


def read_lock(path: Path, platform: str = PLATFORM) -> tuple[Package, ...]:
    """The packages of one platform in a conda-lock file, sorted.

    Raises:
        LockError: the file is missing, is no conda-lock file, or does not know the platform.
    """
    entries = _entries(path)
    try:
        packages = sorted(
            _package(entry)
            for entry in entries
            if entry["platform"] == platform and entry.get("category", CATEGORY) == CATEGORY
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise LockError(
            f"{path.name}: a package entry lacks {error}; is it conda-lock's?"
        ) from None
    if not packages:
        raise LockError(f"{path.name}: holds no packages for {platform}")
    return tuple(packages)


def _entries(path: Path) -> list[Any]:
    """What stands under `package`, not yet checked."""
    try:
        entries: Any = lock_entries(path.read_text(encoding="utf-8"))
        if entries is None:
            lock = read_yaml_text(path)
            entries = lock.get("package") if isinstance(lock, dict) else None
    except FileNotFoundError:
        raise LockError(f"{path.name}: not found; `git checkout {path.name}` restores it") from None
    except UnicodeDecodeError:
        raise LockError(
            f"{path.name}: not UTF-8 text; `git checkout {path.name}` restores it"
        ) from None
    except ValueError as error:
        raise LockError(f"{path.name}: {error}; `git checkout {path.name}` restores it") from None
    if not isinstance(entries, list):
        raise LockError(f"{path.name}: holds no packages; `make lock` writes it anew")
    return entries


def _package(entry: Mapping[str, Any]) -> Package:
    hashes = entry["hash"]
    kind = "sha256" if "sha256" in hashes else "md5"
    needs = entry.get("dependencies") or {}
    return Package(
        name=entry["name"],
        version=entry["version"],
        build=_build(entry) if entry["manager"] == "conda" else "",
        hash=f"{kind}:{hashes[kind]}",
        needs_python="python" in needs or "python_abi" in needs,
    )


def _build(entry: Mapping[str, Any]) -> str:
    """The last of the three parts of `<name>-<version>-<build>.conda`."""
    file = str(entry["url"]).rsplit("/", 1)[-1]
    return file.removesuffix(".conda").removesuffix(".tar.bz2").rsplit("-", 1)[-1]


def environment_preimage(lock: Path, platform: str = PLATFORM) -> dict[str, Any]:
    """What the environment part hashes: the platform and its packages, nothing else of the file.

    Raises:
        LockError: see `read_lock`.
    """
    return {"platform": platform, "packages": [p.row() for p in read_lock(lock, platform)]}


def normalise_name(name: str) -> str:
    """A distribution's name in the one form that compares equal (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_requirements(path: Path) -> dict[str, str]:
    """Version by normalised name of every `name==version` in a requirements file.

    Raises:
        LockError: the file is missing or pins nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise LockError(f"{path.name}: not found; `git checkout {path.name}` restores it") from None
    pins = {normalise_name(m[1]): m[2] for m in map(_PIN.match, lines) if m}
    if not pins:
        raise LockError(f"{path.name}: pins no package; `make lock` writes it anew")
    return pins


def locked_cuda(packages: Mapping[str, str] | tuple[Package, ...]) -> str | None:
    """The CUDA version that the locked torch is built for, such as `12.9`; None: for the CPU.

    conda and the Python index have different builds of one version of torch: conda's build string
    names its CUDA (`cuda129_...`); the wheel depends on the packages of the CUDA it is built for.

    Args:
        packages: of conda-lock.yml, or the pins of requirements.txt.
    """
    if isinstance(packages, Mapping):
        runtime = (v for name, v in packages.items() if name.startswith("nvidia-cuda-runtime"))
        return next((".".join(version.split(".")[:2]) for version in runtime), None)
    builds = (re.match(r"cuda(\d+)(\d)_", p.build) for p in packages if p.name == "pytorch")
    return next((f"{build[1]}.{build[2]}" for build in builds if build), None)


def installed_cuda() -> str | None:
    """The CUDA version that the installed torch is built for; None: for the CPU, or no torch.

    The wheel's version does not say (`2.10.0` for every build), so this reads the assignment in
    torch/version.py, without the seconds that an import of torch takes.
    """
    import importlib.util  # not at the top: no key needs it

    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def installed_packages() -> dict[str, str]:
    """Version by normalised name of every distribution that this interpreter can import.

    Without this project itself, whose code the key has file by file.
    """
    # Not at the top: it costs 0.03 s, which no key needs.
    import importlib.metadata

    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        # Every access parses the file anew.
        metadata = distribution.metadata
        if metadata["Name"]:
            # The first on the path is the one that is imported.
            found.setdefault(normalise_name(metadata["Name"]), metadata["Version"])
    found.pop("runkey", None)
    return dict(sorted(found.items()))


def differences(locked: Mapping[str, str], installed: Mapping[str, str]) -> list[str]:
    """A line per locked package that is missing or of another version.

    Such as `numpy: locked 2.5.1, installed 2.4.0`; packages that are not locked do not count.
    """
    return [
        f"{name}: locked {version}, installed {installed.get(name, 'none')}"
        for name, version in sorted(locked.items())
        if installed.get(name) != version
    ]


def interpreter() -> str:
    """Implementation, version and machine, such as `CPython 3.12.13 Linux x86_64`."""
    return " ".join(
        (
            this_machine.python_implementation(),
            this_machine.python_version(),
            this_machine.system(),
            this_machine.machine(),
        )
    )
