"""The reader of text from elsewhere: limits, types, one line; and files written whole or not."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runkey.files import (
    FormatError,
    WriteError,
    check_tree,
    copy_atomically,
    parse_json,
    read_json,
    read_text,
    write_atomically,
)
from runkey.identity.dvc_yaml import read_yaml_text
from tests.support.checkpoint_kit import small_disk  # noqa: F401
from tests.support.odd_files import RAW_JSON

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Form:
    name: str
    sizes: dict[str, int]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON (line 1, column 1: Expecting value)"),
        ('{"name": 1,}', "not JSON (line 1, column 11: Illegal trailing comma"),
        ("[" * 10_000, "nested more than 100 levels deep"),
        ('{"a":' * 500 + "1" + "}" * 500, "recursion limit exceeded"),
        ("1" * 5000, "holds a number of 5000 digits"),
        ('{"a": 1, "a": 2}', "holds the name 'a' twice"),
        (r'"\ud800"', "Invalid JSON: unexpected end of hex escape"),
        ('{"name": "x"}', "sizes: Field required"),
        ('{"name": "x", "sizes": {"a": "1"}}', "sizes.a: Input should be a valid integer"),
        ("[]", "Input should be an object"),
    ],
)
def test_json_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_json(text, Form)
    said = str(caught.value)
    assert why.split("(line")[0] in said
    assert "\n" not in said


@pytest.mark.parametrize("raw", RAW_JSON, ids=range(len(RAW_JSON)))
def test_small_and_large_json_are_read_with_the_same_strictness(raw: str) -> None:
    """Text with few brackets is parsed once, other text twice; both are for a value of any type."""
    brackets = "[]," * 200
    for text in (f'{{"a": {raw}}}', f'["ü", {raw}]', f"[{raw}, 1.50, -0.0, 1e-7, null]"):
        assert _outcome(f"[{brackets} {text}]", -1) == _outcome(f"[{text}]", -1)


def _outcome(text: str, place: int) -> str:
    try:
        return json.dumps(parse_json(text)[place])
    except FormatError:
        return "refused"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_of_any_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('{"name": "ü", "sizes": {"a": 1}}'.encode(encoding))
    assert read_json(path, Form) == Form("ü", {"a": 1})


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    for name, why in {
        "pipe": "a folder or a device, not a file",
        "zero": "a folder or a device, not a file",
        ".": "directory|not a file",
        "itself": "cannot be read",
    }.items():
        with pytest.raises(FormatError, match=why):
            read_text(tmp_path / name)
    (tmp_path / "large").write_bytes(b" " * 101)
    with pytest.raises(FormatError, match="larger than 100 B"):
        read_text(tmp_path / "large", 100)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 60_000, "nested more than 100 levels deep"),
        ("- " * 500 + "x", "nested more than 100 levels deep"),
        ("a: &a [*a]", "not YAML at line 1"),
        ("a: b: c", "not YAML at line 1"),
        ("? [a]\n: b", "not YAML"),
    ],
)
def test_yaml_of_dvc_is_refused_in_one_line(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "dvc.yaml").write_text(text)
    with pytest.raises(FormatError, match=why):
        read_yaml_text(tmp_path / "dvc.yaml")


def test_a_tree_of_aliases_is_not_walked_to_its_end() -> None:
    tree: Any = ["x"] * 10
    for _ in range(9):
        tree = [tree] * 10
    with pytest.raises(FormatError, match="aliases"):
        check_tree(tree)


def test_a_full_disk_leaves_the_old_file_and_says_how_much_is_wanted(small_disk: Path) -> None:  # noqa: F811
    path = small_disk / "file"
    write_atomically(path, "old")
    (small_disk / "large").write_bytes(bytes(900_000))
    for write in (write_atomically, _copied):
        with pytest.raises(WriteError) as caught:
            write(path, bytes(600_000))
        assert caught.value.errno == errno.ENOSPC
        assert str(caught.value).startswith(
            f"{path}: cannot be written (No space left on device); 600.0 kB are wanted, "
        )
        assert "free in" in str(caught.value)
        assert path.read_text() == "old"
        assert sorted(p.name for p in small_disk.iterdir()) == ["file", "large"]


def _copied(path: Path, data: bytes) -> None:
    source = path.parents[1] / "source"
    source.write_bytes(data)
    copy_atomically(source, path)


@pytest.mark.parametrize("command", ["preset sample --force", "report --to page.html"])
def test_a_command_writes_whole_files_or_none(tmp_path: Path, command: str) -> None:
    """With a limit on the size of files, as on a full disk: one line, the old file stays."""
    (tmp_path / "stages").mkdir()
    old = {"params.yaml": "lr: 1\nseed: 0\n", "page.html": "old"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "run.json").write_text(_MANIFEST)
    done = subprocess.run(
        [sys.executable, "-m", "runkey", *command.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
        capture_output=True,
        text=True,
        check=False,
    )
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1, done.stderr
    assert line.startswith("error: ")
    assert "cannot be written (File too large)" in line
    assert "are wanted" in line
    assert {name: (tmp_path / name).read_text() for name in old} == old
    assert not list(tmp_path.glob(".*"))


_MANIFEST = """{"key": "rk2-0", "stage": "train", "parts": {}, "run_id": null, "schema": "run1",
 "witness": {"device": "cpu", "micro_batch": 1, "world_size": 1, "threads": 1, "precision": "off",
 "interpreter": "x", "packages": {}, "package_differences": [], "files": [], "dirty": false,
 "undeclared_files": [], "commit": null, "variables": {}}}"""
