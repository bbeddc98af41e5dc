"""Which files and addresses are predicted on, under which names, and what decoding them gives."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runkey.errors import DataError, LockError
from runkey.inference import sources
from runkey.inference.sources import (
    Frame,
    InputFile,
    Reading,
    Skipped,
    count_frames,
    find_sources,
    read_frames,
)
from tests.support.small_model import film, has_av, photograph


def write(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            photograph(number).save(path)


def names(found: sources.Found) -> list[str]:
    return [one.name for one in found.sources]


def test_a_folder_gives_its_images_in_order_but_no_hidden_ones(tmp_path: Path) -> None:
    write(tmp_path, "b.jpg", "a.PNG", "below/c.webp", "note.txt", ".hidden.jpg", ".git/d.jpg")
    found = find_sources([str(tmp_path)])
    assert names(found) == ["a.PNG", "b.jpg", "below/c.webp"]
    assert (found.base, found.others, found.skipped) == (tmp_path, 1, [])


def test_a_file_that_is_named_twice_is_taken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "x/a.jpg", "x/b.jpg", "y/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert names(find_sources(["x", "x/a.jpg", "x/*.jpg", "**/b.jpg"])) == ["a.jpg", "b.jpg"]
    # Names are below the folder that all share, so that no two are equal.
    assert names(find_sources(["x", "y"])) == ["x/a.jpg", "x/b.jpg", "y/a.jpg"]
    assert names(find_sources(["**/a.jpg"])) == ["x/a.jpg", "y/a.jpg"]


def test_a_file_with_the_letters_of_a_glob_in_its_name(tmp_path: Path) -> None:
    write(tmp_path, "a[1].jpg", "a1.jpg")
    assert names(find_sources([str(tmp_path / "a[1].jpg")])) == ["a[1].jpg"]


def test_stems_differ_where_only_suffixes_do(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "a.png", "b.jpg")
    assert [one.stem for one in find_sources([str(tmp_path)]).sources] == ["a.jpg", "a.png", "b"]


def test_the_outputs_inside_a_folder_are_no_sources(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "predictions/images/a.jpg")
    found = find_sources([str(tmp_path)], out=tmp_path / "predictions")
    assert names(found) == ["a.jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "real", "a.jpg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/b.jpg").symlink_to(tmp_path / "real/a.jpg")
    assert names(find_sources([str(tmp_path / "in")])) == ["b.jpg", "link/a.jpg"]


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("nowhere.jpg", "no such file or folder"),
        ("*.tiff", "matches no file"),
        ("https://name:secret@example.org/a.jpg", "an address; --allow-urls"),
    ],
)
def test_arguments_that_name_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=reason) as raised:
        find_sources([argument])
    assert "secret" not in str(raised.value)


def test_a_list_names_what_is_not_there_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "x/b.jpg")
    lines = [f"{tmp_path}/a.jpg\n", "\n", f"{tmp_path}/gone.jpg\n", f"{tmp_path}/x\n"]
    found = find_sources(["-"], listed=lines)
    assert names(found) == ["a.jpg", "x/b.jpg"]
    assert found.skipped == [Skipped(f"{tmp_path}/gone.jpg", "no such file or folder")]


def test_names_that_no_file_of_labels_can_hold(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    for name in (b"b\n.jpg", b"c\xff.jpg"):
        os.link(tmp_path / "a.jpg", os.fsencode(tmp_path) + b"/" + name)
    found = find_sources([str(tmp_path)])
    assert names(found) == ["a.jpg"]
    assert [one.name for one in found.skipped] == ["b\\n.jpg", "c\\udcff.jpg"]


def read(found: sources.Found, workers: int = 2, **more: Any) -> list[Frame | Skipped]:
    return list(read_frames(found.sources, lambda frame: frame, Reading(workers=workers, **more)))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_images_come_in_order_and_bad_ones_are_named(tmp_path: Path, workers: int) -> None:
    write(tmp_path, *(f"{number:02}.png" for number in range(12)))
    whole = (tmp_path / "03.png").read_bytes()
    (tmp_path / "03.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "05.png").write_bytes(b"")
    (tmp_path / "07.png").write_bytes(b"<html>")
    (tmp_path / "09.png").unlink()
    os.mkfifo(tmp_path / "09.png")
    answers = read(find_sources([str(tmp_path)]), workers)
    bad = {one.name: one.reason for one in answers if isinstance(one, Skipped)}
    assert list(bad) == ["03.png", "05.png", "07.png", "09.png"]
    assert "cut short or damaged" in bad["03.png"]
    assert "is empty" in bad["05.png"]
    assert "no image of a known format" in bad["07.png"]
    assert "not a file" in bad["09.png"]
    good = [one for one in answers if isinstance(one, Frame)]
    assert [one.source.name for one in good] == [f"{n:02}.png" for n in (0, 1, 2, 4, 6, 8, 10, 11)]
    assert np.array_equal(good[3].image, np.asarray(photograph(4)))


def test_no_more_images_are_decoded_than_may_wait(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number:02}.png" for number in range(20)))
    decoded: list[str] = []

    def make(frame: Frame) -> str:
        decoded.append(frame.source.name)
        return frame.source.name

    stream = read_frames(find_sources([str(tmp_path)]).sources, make, Reading(workers=2, ahead=3))
    assert next(stream) == "00.png"
    assert next(stream) == "01.png"
    stream.close()
    assert len(decoded) <= 6


def test_the_first_of_several_images_of_a_file(tmp_path: Path) -> None:
    frames = [photograph(number) for number in range(3)]
    for name in ("a.gif", "b.webp", "c.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "d.gif")
    frames[0].save(tmp_path / "e.jpg", "MPO", save_all=True, append_images=frames[1:])
    answers = read(find_sources([str(tmp_path)]))
    assert [one.has_more for one in answers if isinstance(one, Frame)] == [
        *[True] * 3,
        *[False] * 2,
    ]
    for frame in answers[1:3]:
        assert isinstance(frame, Frame)
        assert np.array_equal(frame.image, np.asarray(frames[0]))


# Addresses.


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        where = self.path.partition("?")[0]
        if where == "/loop.jpg":
            self.send_response(302)
            self.send_header("Location", "/loop.jpg")
        elif where == "/moved.jpg":
            self.send_response(301)
            self.send_header("Location", "/there/a.png")
        elif where == "/out.jpg":
            self.send_response(301)
            self.send_header("Location", "file:///etc/passwd")
        elif where == "/there/a.png":
            self.send_response(200)
        else:
            self.send_response(404)
        self.end_headers()
        if where == "/there/a.png":
            photograph(1).save(self.wfile, "PNG")

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    thread.join()
    made.server_close()


def test_addresses_are_fetched_if_they_may_be(server: str) -> None:
    paths = ["there/a.png?x=1", "moved.jpg", "none.jpg", "loop.jpg", "out.jpg", "there/a.png?x=2"]
    found = find_sources([f"{server}/{path}" for path in paths], allow_urls=True)
    assert names(found) == ["a.png", "moved.jpg", "none.jpg", "loop.jpg", "out.jpg", "a_2.png"]
    answers = {
        one.name if isinstance(one, Skipped) else one.source.name: one for one in read(found)
    }
    for name in ("a.png", "moved.jpg", "a_2.png"):
        frame = answers[name]
        assert isinstance(frame, Frame)
        assert np.array_equal(frame.image, np.asarray(photograph(1)))
    assert answers["none.jpg"] == Skipped("none.jpg", "the server answers 404 Not Found")
    assert answers["loop.jpg"] == Skipped("loop.jpg", "more than 3 redirects")
    assert answers["out.jpg"] == Skipped("out.jpg", "leads to an address that is not http")


def test_an_answer_that_is_too_large_and_a_server_that_is_not_there(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runkey.http_limits.LARGEST", 100)
    found = find_sources([f"{server}/there/a.png", "http://127.0.0.1:9/b.jpg"], allow_urls=True)
    large, gone = read(found)
    assert large == Skipped("a.png", "cannot be fetched (the answer has more than 0 MiB)")
    assert isinstance(gone, Skipped)
    assert "cannot be fetched" in gone.reason


# Videos.


@pytest.mark.skipif(not has_av(), reason="`make env-export` installs PyAV")
def test_frames_of_a_video(tmp_path: Path) -> None:
    film(tmp_path / "clip.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:900])
    photograph(0).save(tmp_path / "z.jpg")
    found = find_sources([str(tmp_path)])
    assert [count_frames(one, 4) for one in found.sources[:2]] == [3, 1]
    answers = read(found, every=4)
    frames = [one for one in answers if isinstance(one, Frame)]
    assert [one.source.name for one in frames] == [
        "clip_frame_000000.jpg",
        "clip_frame_000004.jpg",
        "clip_frame_000008.jpg",
        "z.jpg",
    ]
    assert [(one.number, one.seconds) for one in frames[:3]] == [(0, 0.0), (4, 0.8), (8, 1.6)]
    assert [round(float(one.image.mean()), -1) for one in frames[:3]] == [0, 80, 160]
    (bad,) = (one for one in answers if isinstance(one, Skipped))
    assert bad.name == "cut.mp4"
    assert bad.reason == "holds no video"


@pytest.mark.skipif(not has_av(), reason="`make env-export` installs PyAV")
@pytest.mark.parametrize(
    ("matrix", "size", "corner"),
    [
        ((1, 0, 0, 1), (64, 48), (0, 0)),
        ((0, 1, -1, 0), (48, 64), (1, 0)),  # a phone held upright: clockwise
        ((-1, 0, 0, -1), (64, 48), (1, 1)),
        ((0, -1, 1, 0), (48, 64), (0, 1)),
    ],
)
def test_a_phones_video_is_turned_upright(
    matrix: tuple[int, ...], size: tuple[int, int], corner: tuple[int, int], tmp_path: Path
) -> None:
    """A player shows the pixel (x, y) at (a x + c y, b x + d y); the file says a, b, c, d."""
    film(tmp_path / "clip.mp4", 2, corner=True)
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    begin = content.index(b"tkhd") + 44
    a, b, c, d = (65536 * one for one in matrix)  # 16.16 fixed point
    content[begin : begin + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    (tmp_path / "clip.mp4").write_bytes(content)
    frames = read(find_sources([str(tmp_path / "clip.mp4")]))
    for frame in frames:
        assert isinstance(frame, Frame)
        assert Image.fromarray(frame.image).size == size
        height, width = frame.image.shape[:2]
        white = {
            (x, y)
            for x in (0, 1)
            for y in (0, 1)
            if frame.image[4 if y == 0 else height - 5, 4 if x == 0 else width - 5].min() > 200
        }
        assert white == {corner}
    assert len(frames) == 2


def test_a_video_without_its_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str) -> Any:
        raise LockError(f"{module} is not installed; run `make env-export`")

    monkeypatch.setattr(sources, "import_extra", missing)
    (tmp_path / "a.mp4").write_bytes(b"x")
    photograph(0).save(tmp_path / "b.jpg")
    found = find_sources([str(tmp_path)])
    assert count_frames(found.sources[0], 1) == 1
    first, second = read(found)
    assert first == Skipped("a.mp4", "av is not installed; run `make env-export`")
    assert isinstance(second, Frame)


def test_a_file_is_known_by_its_content_and_a_name_of_any_suffix(tmp_path: Path) -> None:
    photograph(0).save(tmp_path / "scan", "PNG")
    (frame,) = read(find_sources([str(tmp_path / "scan")]))
    assert isinstance(frame, Frame)
    assert frame.source == InputFile(str(tmp_path / "scan"), "scan", "scan")
    assert Image.fromarray(frame.image).size == (80, 60)
