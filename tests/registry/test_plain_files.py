"""What reads a file neither waits at a pipe nor reads a device without end: it says so."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runkey.data.decode import decode_rgb
from runkey.data.scan import _decode
from runkey.files import open_plain, read_plain
from runkey.hashing import sha256_file
from runkey.identity.code import hash_files
from runkey.identity.inputs import HASHES, FileHashes
from runkey.identity.record_cache import open_records, remove_record
from runkey.model.weights import read_source
from runkey.params import parse_params
from runkey.plots.log import read_log
from runkey.registry.archive import check_weights, unpack
from runkey.registry.dvc_cache import md5_file
from runkey.tracking.log import JsonlLog
from runkey.training.checkpoint import _opened
from tests.support.project import TINY


def _records(path: Path) -> None:
    with open_records(path):
        pass


def _checkpoint(path: Path) -> None:
    with _opened(path):
        pass


READERS: dict[str, Callable[[Path], object]] = {
    "a": open_plain,
    "b": read_plain,
    "c": sha256_file,
    "d": md5_file,
    "e.py": lambda path: hash_files([path.name], path.parent),
    "runs.sqlite": _records,
    "old.sqlite": lambda path: remove_record(path, "run"),
    "b.safetensors": read_source,
    "b.pth": read_source,
    "a.safetensors": lambda path: check_weights(path, path.name),
    "a.pth": lambda path: check_weights(path, path.name),
    "run.zip": lambda path: unpack(path, path.parent),
    "train.jsonl": read_log,
    "a.pt": _checkpoint,
    "a.png": lambda path: decode_rgb(path, 0, False),
    "b.png": lambda path: _decode(path, parse_params(TINY).data),
}


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise AssertionError("it still waits after 5 s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["a pipe", "/dev/zero"])
@pytest.mark.parametrize("name", READERS)
def test_no_plain_file_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    place(tmp_path / name, kind)
    with pytest.raises(Exception, match=r"(?i)not a file|device, not|unreadable"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("kind", ["a pipe", "/dev/zero"])
def test_what_may_be_missing_is_gone_without(tmp_path: Path, kind: str) -> None:
    for path in (tmp_path / HASHES, tmp_path / "train.jsonl"):
        path.parent.mkdir(exist_ok=True)
        place(path, kind)
    (tmp_path / "file").write_text("x")
    assert FileHashes(tmp_path).md5(tmp_path / "file") == md5_file(tmp_path / "file")
    log = JsonlLog(tmp_path / "train.jsonl", quiet=True)
    log.log({"train/loss": 1.0}, 1)
    log.close()
    assert log.lost_lines == 1


def place(path: Path, kind: str) -> None:
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(kind)
