"""The locked environment: packages of conda-lock.yml, pins of requirements.txt, what is installed.

`python -m runkey.identity.environment` prints the pins that requirements.txt is made from (see
`make requirements`): conda-lock.yml's versions of the packages that depend on Python.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from runkey.errors import LockError, report_errors
from runkey.files import FormatError, read_plain, read_text
from runkey.hashing import sha256_bytes
from runkey.identity.dvc_yaml import read_yaml_text
from runkey.identity.kept import keep
from runkey.paths import LOCK, workspace

EXTRAS = ".venv-export"
"""Folder of what `make env-export` installs; no stage needs it and no lock holds it."""

PLATFORM = "linux-64"
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)")


class LockedPackage(NamedTuple):
    """One locked package, identified to the build."""

    name: str
    version: str
    build: str
    """conda's build string, such as `py312h868fb18_0`; empty for a package from a Python index."""
    hash: str
    """`sha256:<hex>`, or `md5:<hex>` where the lock has no better."""
    needs_python: bool = False
    """Whether it depends on Python; follows from the build, so it is not hashed."""

    def row(self) -> list[str]:
        """Return `[name, version, build, hash]`, as it enters the key."""
        return list(self[:4])


def read_lock(path: Path, platform: str = PLATFORM) -> tuple[LockedPackage, ...]:
    """Return the packages of one platform in a conda-lock file, sorted.

    Raises:
        LockError: the file is missing, is not a conda-lock file, or lacks the platform.
    """
    try:
        lock = read_yaml_text(path)
    except FileNotFoundError:
        raise LockError(f"{path.name}: not found; `git checkout {path.name}` restores it") from None
    except ValueError as error:
        raise LockError(f"{path.name}: {error}; `git checkout {path.name}` restores it") from None
    entries = lock.get("package") if isinstance(lock, dict) else None
    if not isinstance(entries, list):
        raise LockError(f"{path.name}: holds no packages; `make lock` writes it anew")
    try:
        packages = sorted(
            _package(entry)
            for entry in entries
            if entry["platform"] == platform and entry.get("category", "main") == "main"
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise LockError(
            f"{path.name}: a package entry lacks {error}; is it conda-lock's?"
        ) from None
    if not packages:
        raise LockError(f"{path.name}: holds no packages for {platform}")
    return tuple(packages)


def _package(entry: Mapping[str, Any]) -> LockedPackage:
    hashes = entry["hash"]
    kind = "sha256" if "sha256" in hashes else "md5"
    needs = entry.get("dependencies") or {}
    # The file is `<name>-<version>-<build>.conda`.
    file = str(entry["url"]).rsplit("/", 1)[-1].removesuffix(".conda").removesuffix(".tar.bz2")
    return LockedPackage(
        name=entry["name"],
        version=entry["version"],
        build=file.rsplit("-", 1)[-1] if entry["manager"] == "conda" else "",
        hash=f"{kind}:{hashes[kind]}",
        needs_python="python" in needs or "python_abi" in needs,
    )


def environment_preimage(lock: Path, platform: str = PLATFORM) -> dict[str, Any]:
    """Return what the environment part hashes: the platform and its packages."""

    def read() -> dict[str, Any]:
        packages = [p.row() for p in read_lock(lock, platform)]
        if sha256_bytes(read_plain(lock)) != sha256:  # before the value is kept
            raise LockError(f"{lock.name}: changed while it was read; repeat the command")
        return {"platform": platform, "packages": packages}

    if not lock.is_file():
        read_lock(lock, platform)  # says what is missing
    sha256 = sha256_bytes(read_plain(lock))
    return keep(f"lock {platform} {sha256}", read)


def normalise_name(name: str) -> str:
    """Return a distribution's normalised name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_requirements(path: Path) -> dict[str, str]:
    """Return version by normalised name of every `name==version`; LockError if there is none."""
    try:
        lines = read_text(path).splitlines()
    except (FileNotFoundError, FormatError) as error:
        what = "not found" if isinstance(error, FileNotFoundError) else error
        raise LockError(f"{path.name}: {what}; `git checkout {path.name}` restores it") from None
    pins = {normalise_name(m[1]): m[2] for m in map(_PIN.match, lines) if m}
    if not pins:
        raise LockError(f"{path.name}: pins no package; `make lock` writes it anew")
    return pins


def locked_cuda(packages: Mapping[str, str] | tuple[LockedPackage, ...]) -> str | None:
    """Return the CUDA version of the locked torch, such as `12.9`; None: a CPU build.

    conda and the Python index have different builds of one torch version: conda's build string
    names its CUDA (`cuda129_...`); a wheel depends on the packages of its CUDA.
    """
    if isinstance(packages, Mapping):
        runtime = (v for name, v in packages.items() if name.startswith("nvidia-cuda-runtime"))
        return next((".".join(version.split(".")[:2]) for version in runtime), None)
    builds = (re.match(r"cuda(\d+)(\d)_", p.build) for p in packages if p.name == "pytorch")
    return next((f"{build[1]}.{build[2]}" for build in builds if build), None)


def installed_cuda() -> str | None:
    """Return the CUDA version of the installed torch; None: a CPU build, or no torch.

    The wheel's version does not tell (`2.10.0` for every build), so this reads torch/version.py,
    without the seconds that importing torch takes.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def installed_packages() -> dict[str, str]:
    """Return version by normalised name of every distribution that this interpreter can import.

    This project itself is left out: the key has its code file by file. So is `EXTRAS`, which may be
    on the path of a process that exported a model.
    """
    # Here: it takes 0.03 s, and no key needs it.
    import importlib.metadata

    found: dict[str, str] = {}
    folders = [folder for folder in sys.path if EXTRAS not in Path(folder).parts]
    for distribution in importlib.metadata.distributions(path=folders):
        metadata = distribution.metadata  # each access parses the file again
        if metadata["Name"]:
            # Python imports the first on the path.
            found.setdefault(normalise_name(metadata["Name"]), metadata["Version"])
    found.pop("runkey", None)
    return dict(sorted(found.items()))


def differences(locked: Mapping[str, str], installed: Mapping[str, str]) -> list[str]:
    """List locked packages that are not installed so: `numpy: locked 2.5.1, installed 2.4.0`."""
    return [
        f"{name}: locked {version}, installed {installed.get(name, 'none')}"
        for name, version in sorted(locked.items())
        if installed.get(name) != version
    ]


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
    # A program without Python that is on the Python index too.
    "uv": ("uv",),
}
"""Conda name -> names on the Python index, where they differ."""

CONDA_ONLY = frozenset(
    {
        "cpython",  # the interpreter
        "fastapi",  # names fastapi-core and its extras
        "mlflow-ui",  # its files are in the wheel of mlflow
        "pyarrow",  # names pyarrow-core and its libraries
        "python-gil",  # says that the interpreter has its global lock
        "python-gssapi",  # optional in conda's own builds of other packages
        "pyu2f",  # likewise
        "pywin32-on-windows",  # empty on Linux
        "torchvision-extra-decoders",  # on the Python index torchvision does without
        "triton",  # torch's wheel pins the version it was built for
    }
)
"""Conda packages that depend on Python and have no line in requirements.txt."""


def python_pins(packages: Iterable[LockedPackage]) -> dict[str, str]:
    """Return version by Python index name of every locked Python package, sorted."""
    pins: dict[str, str] = {}
    for package in packages:
        if package.name in CONDA_ONLY:
            continue
        if package.needs_python or package.name in PYTHON_NAMES:
            for name in PYTHON_NAMES.get(package.name, (package.name,)):
                pins[normalise_name(name)] = package.version
    return dict(sorted(pins.items()))


def main() -> None:
    """Print the pins of the repository's lock, one per line."""
    with report_errors():
        for name, version in python_pins(read_lock(workspace() / LOCK)).items():
            sys.stdout.write(f"{name}=={version}\n")


if __name__ == "__main__":
    main()
