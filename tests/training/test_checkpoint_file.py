"""The file: what is read is what was written, or it is refused."""

import pickle
import subprocess
import sys

import pytest
import torch

from runkey.training.checkpoint import (
    TEMPORARY,
    DamagedError,
    read_facts,
    read_file,
    write_file,
)
from tests.support import checkpoint_kit as kit

TENSORS = {
    "weights": [torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.arange(5)],
    "step": 7,
    "rate": 1e-3,
    "name": None,
    "betas": (0.9, 0.999),
}


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "file.ckpt"
    assert write_file(path, {"step": 7, "key": "rk2-"}, TENSORS)[0] == path.name
    return path


def test_what_is_read_is_what_was_written(written):
    facts, tensors, digest = read_file(written)
    assert facts == {"step": 7, "key": "rk2-"} == read_facts(written)
    assert kit.equal(tensors, TENSORS)
    assert len(digest) == 64
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_the_same_content_has_the_same_hash(written, tmp_path):
    first = read_file(written)[2]
    _, again = write_file(tmp_path / "other.pt", {"step": 7, "key": "rk2-"}, TENSORS)
    assert again == first
    name, other = write_file(tmp_path / "x-HASH.pt", {"step": 8, "key": "rk2-"}, TENSORS)
    assert other != first
    assert name == f"x-{other[:12]}.pt"
    assert read_file(tmp_path / name)[2] == other


def test_a_file_cut_short_anywhere_is_refused(written):
    whole = written.read_bytes()
    lengths = {0, 10, 84, 85, 86, len(whole) // 2, len(whole) - 1, *range(90, len(whole), 97)}
    for length in lengths:
        written.write_bytes(whole[:length])
        with pytest.raises(DamagedError):
            read_file(written)


def test_a_changed_byte_anywhere_is_refused(written):
    whole = written.read_bytes()
    for place in [0, 30, 85, 90, *range(100, len(whole), 89), len(whole) - 1]:
        changed = bytearray(whole)
        changed[place] ^= 1
        written.write_bytes(changed)
        with pytest.raises(DamagedError):
            read_file(written)


@pytest.mark.parametrize("content", [b"", b"text\n", b"PK\x03\x04" + b"\0" * 200])
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "step-00000001.ckpt"
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="it is no checkpoint"):
        read_file(path)
    with pytest.raises(DamagedError, match="it is no checkpoint"):
        read_facts(path)


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path):
    with pytest.raises(DamagedError, match="No such file"):
        read_file(tmp_path / "none.ckpt")
    with pytest.raises(DamagedError, match="a folder or a device, not a file"):
        read_file(tmp_path)


class Opens:
    """What a pickle could do that is read without care."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_no_code_is_run(tmp_path):
    path = tmp_path / "file.ckpt"
    with pytest.raises(SystemExit, match="ran"):
        pickle.loads(pickle.dumps(Opens()))  # noqa: S301
    write_file(path, {}, {"weights": Opens()})
    with pytest.raises(DamagedError, match="something else than tensors"):
        read_file(path)


def test_a_full_disk_leaves_nothing(small_disk):
    path = small_disk / "file.ckpt"
    with pytest.raises(OSError, match="No space left on device"):
        write_file(path, {}, {"weights": torch.zeros(1_000_000)})
    assert list(small_disk.iterdir()) == []
    write_file(path, {}, {"weights": torch.zeros(1_000)})
    assert read_file(path)[1]["weights"].shape == (1_000,)


def test_killed_while_writing_no_file_has_the_name(tmp_path):
    script = (
        "import os, sys, torch; from pathlib import Path\n"
        "from runkey.training.checkpoint import write_file\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "write_file(Path(sys.argv[1]), {}, {'weights': torch.zeros(100)})\n"
    )
    path = tmp_path / "step-00000001.ckpt"
    command = [sys.executable, "-c", script, str(path)]
    assert subprocess.run(command, timeout=120, check=False).returncode == -9
    assert [one.name for one in tmp_path.iterdir()] == ["step-00000001.ckpt" + TEMPORARY]
