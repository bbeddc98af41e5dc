"""Atomic writes, sizes and durations as text, log messages on the terminal."""

import json
import logging
import os

import pytest

from runkey.files import replacing, write_atomically, write_json
from runkey.progress import log_to_terminal
from runkey.units import format_age, format_bytes, format_seconds


def test_a_written_file_is_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, "old")
    write_atomically(path, b"new \xff")
    assert path.read_bytes() == b"new \xff"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.mkdir()
    (path / "inside").write_text("kept")
    with pytest.raises(OSError, match="directory"):
        write_atomically(path, "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (path / "inside").read_text() == "kept"


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "numbers.json"
    write_json(path, {"ü": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": 1}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (45_100_000, "45.1 MB"), (3e12, "3000.0 GB")],
)
def test_sizes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text", "age"),
    [
        (-1, "0 s", "-1 s"),
        (59.4, "59 s", "59 s"),
        (130, "2 min 10 s", "2 min"),
        (11_100, "3 h 05 min", "3.08 h"),
        (270_000, "75 h 00 min", "3.12 d"),
    ],
)
def test_durations(seconds, text, age):
    assert format_seconds(seconds) == text
    assert format_age(seconds) == age


def test_log_messages_reach_the_terminal_once_and_folded(capsys):
    log_to_terminal()
    log_to_terminal()
    logger = logging.getLogger("runkey.somewhere")
    logger.info("epoch %d", 3)
    logger.warning("%s", "word " * 30)
    logger.debug("not shown")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "epoch 3"
    assert lines[1].startswith("warning: word")
    assert len(lines) == 3
    assert max(len(line) for line in lines) <= 100


def test_a_link_in_a_shared_folder_is_not_followed(tmp_path):
    """Somebody who guesses the temporary name could have us write over a file of ours."""
    mine = tmp_path / "mine"
    mine.write_text("kept")
    names = set()
    for number in range(50):
        path = tmp_path / f"file{number}"
        path.symlink_to(mine)  # the target itself, too, is replaced and not written through
        with replacing(path) as file:
            (temporary,) = set(tmp_path.glob(".file*"))
            names.add(temporary.name.rpartition("-")[2])
            file.write(b"new")
        assert not path.is_symlink()
        assert path.read_text() == "new"
    assert mine.read_text() == "kept"
    assert len(names) == 50


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_files_follow_the_umask_and_secrets_are_the_owners(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "deep" / "file", "text")
        write_atomically(tmp_path / "secret", "text", mode=0o600)
        write_atomically(tmp_path / "secret", "again", mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "deep" / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "deep").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
