"""Archives made to do harm by their members: each is refused in a line, and nothing is written."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runkey.hashing import sha256_bytes
from runkey.registry.archive import INDEX
from runkey.registry.package import FILE
from tests.support.attacks import refused


def rewrite(archive: Path, change: Callable[[zipfile.ZipFile, dict[str, Any]], None]) -> None:
    """Write the archive again with an honest index, then let `change` add to both."""
    with zipfile.ZipFile(archive) as old:
        members = {i.filename: old.read(i) for i in old.infolist()}
    index = json.loads(members.pop(INDEX))
    with zipfile.ZipFile(archive, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
        change(new, index)
        if index is not None:
            new.writestr(INDEX, json.dumps(index))


def list_it(index: dict[str, Any], name: str, content: bytes) -> None:
    index["members"][name] = {"size": len(content), "sha256": sha256_bytes(content)}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../outside.txt", "leaves its folder"),
        ("run/../../outside.txt", "leaves its folder"),
        ("/outside.txt", "is absolute"),
        ("C:outside.txt", "is absolute"),
        ("run\\..\\outside.txt", "backslash"),
        ("run//twice", "shortest form"),
        ("./run/here", "shortest form"),
        (".git/hooks/post-checkout", "leads into .git"),
        ("run/.DVC/config", "leads into .git or .dvc"),
        ("run/line\nbreak", "control character"),
    ],
)
def test_names_that_lead_elsewhere(archive: Path, colleague: Path, name: str, why: str) -> None:
    def change(new: zipfile.ZipFile, index: dict[str, Any]) -> None:
        new.writestr(name, b"x")
        list_it(index, name, b"x")

    rewrite(archive, change)
    assert why in refused(archive, colleague)


def test_a_name_with_a_nul(archive: Path, colleague: Path) -> None:
    rewrite(archive, lambda new, index: new.writestr("run/aXb", b"x"))
    archive.write_bytes(archive.read_bytes().replace(b"run/aXb", b"run/a\0b"))
    assert "not plain; refused" in refused(archive, colleague)


def test_a_link(archive: Path, colleague: Path) -> None:
    def change(new: zipfile.ZipFile, index: dict[str, Any]) -> None:
        info = zipfile.ZipInfo("run/link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        new.writestr(info, b"/etc/passwd")
        list_it(index, "run/link", b"/etc/passwd")

    rewrite(archive, change)
    assert "'run/link' is a link" in refused(archive, colleague)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice(archive: Path, colleague: Path) -> None:
    rewrite(archive, lambda new, index: new.writestr(FILE, b"{}"))
    assert f"holds '{FILE}' twice" in refused(archive, colleague)


def test_a_member_that_is_not_listed(archive: Path, colleague: Path) -> None:
    rewrite(archive, lambda new, index: new.writestr("run/more", b"x"))
    assert "'run/more', which index.json does not list" in refused(archive, colleague)


def test_a_listed_member_that_is_not_there(archive: Path, colleague: Path) -> None:
    rewrite(archive, lambda new, index: list_it(index, "run/more", b"x"))
    assert "lacks 'run/more', which index.json lists" in refused(archive, colleague)


def test_a_member_that_belongs_to_no_run(archive: Path, colleague: Path) -> None:
    def change(new: zipfile.ZipFile, index: dict[str, Any]) -> None:
        new.writestr("setup.py", b"x")
        list_it(index, "setup.py", b"x")

    rewrite(archive, change)
    assert "'setup.py' belongs to no run" in refused(archive, colleague)


def test_a_bomb_is_read_no_further_than_listed(archive: Path, colleague: Path) -> None:
    def change(new: zipfile.ZipFile, index: dict[str, Any]) -> None:
        new.writestr("run/zeros", bytes(50_000_000), zipfile.ZIP_DEFLATED)
        index["members"]["run/zeros"] = {"size": 10, "sha256": "0" * 64}

    rewrite(archive, change)
    assert "'run/zeros' is larger than its 10 bytes" in refused(archive, colleague)


def test_a_bomb_that_says_its_size(archive: Path, colleague: Path) -> None:
    def change(new: zipfile.ZipFile, index: dict[str, Any]) -> None:
        new.writestr("run/zeros", b"0")
        index["members"]["run/zeros"] = {"size": 10**18, "sha256": "0" * 64}

    rewrite(archive, change)
    assert "unpacking needs 1000000000.1 GB, 67.1 MB of it to spare, and" in refused(
        archive, colleague
    )


def test_a_changed_byte(archive: Path, colleague: Path) -> None:
    def change(new: zipfile.ZipFile, index: dict[str, Any]) -> None:
        index["members"][FILE]["sha256"] = "0" * 64

    rewrite(archive, change)
    assert f"'{FILE}' is not what index.json lists" in refused(archive, colleague)


@pytest.mark.timeout(60)
def test_a_pipe_a_device_or_a_folder(colleague: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, Path("/dev/zero"), tmp_path):
        assert f"{place.name}: not a file" in refused(place, colleague)


def test_what_is_no_archive(colleague: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.zip"
    file.write_bytes(b"PK\x03\x04 and then nothing")
    assert "not an archive of runs, or damaged" in refused(file, colleague)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    assert "has no index.json" in refused(file, colleague)
    file.unlink()
    assert "no such file" in refused(file, colleague)


def test_data_that_cannot_be_unpacked(archive: Path, colleague: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        member = next(one for one in file.infolist() if one.compress_type == zipfile.ZIP_DEFLATED)
    content = bytearray(archive.read_bytes())
    header = content[member.header_offset :][:30]
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    content[member.header_offset + 30 + lengths] = 0x07  # a kind of block that there is not
    archive.write_bytes(content)
    assert "not an archive of runs, or damaged (Error -3" in refused(archive, colleague)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_cut_archive(archive: Path, colleague: Path, kept: float) -> None:
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * kept)])
    assert "not an archive of runs, or damaged" in refused(archive, colleague)
