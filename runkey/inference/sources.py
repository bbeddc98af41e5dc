"""What `runkey predict` reads: images, folders, globs, addresses and videos, decoded in threads.

    found = find_sources(["photos/", "scans/*.tif", "drive.mp4"], out=Path("predictions"))
    for one in read_frames(found.sources, make, reading):   # what `make` returns, or a `Skipped`
        ...

Every image has a name that no other one has: its path below the folder that all sources share.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
from numpy.typing import NDArray

from runkey.data.index import IntensityRange
from runkey.errors import DataError, LockError
from runkey.files import open_plain
from runkey.hashing import sha256_bytes
from runkey.http_limits import LimitedConnection, answer_seconds
from runkey.inference.extras import import_extra
from runkey.progress import without_logins
from runkey.units import GIB, format_bytes

STDIN = "-"
"""The source that is a list of sources, a line each."""
_IMAGES = frozenset(
    "jpg jpeg jpe jfif mpo png bmp tif tiff webp gif ppm pgm pnm jp2".split()  # noqa: SIM905
)
_VIDEOS = frozenset("mp4 mov m4v mkv webm avi mpg mpeg mts m2ts ts wmv flv 3gp ogv".split())  # noqa: SIM905
"""Suffixes of the files that are taken from folders; a file that is named may have any."""
_LARGEST_FILE = GIB
_MOST_REDIRECTS = 3
_ODD_NAME = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that XML cannot hold, or that no UTF-8 is made of."""
_FRAME_STEM = re.compile(r"(.+)_frame_\d{6,}")
"""Stem of a video's frame."""
_LONGEST_STEM = 200
"""Bytes; with a frame's number and a suffix below the 255 of file systems."""
_OUTPUT_SUFFIXES = (".jpg", ".txt", ".xml", ".json")
_ADDRESS = re.compile(r"(?i)https?://")


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file or an address to predict on."""

    place: str
    """Absolute path, or the address."""
    name: str
    """Path in the outputs, with `/`; unique."""
    stem: str
    """`name` without suffix, or with it where another source differs in nothing else."""
    is_video: bool = False

    @property
    def is_address(self) -> bool:
        """Return True for an http address."""
        return bool(_ADDRESS.match(self.place))


@dataclass(frozen=True, slots=True)
class Skipped:
    """A source, or a frame of one, of which there is no prediction, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded image, or a frame of a video."""

    source: InputFile
    """Of a frame, with the frame's own name and stem."""
    image: NDArray[np.uint8]
    """[H, W, 3], upright RGB."""
    video: str = ""
    """Name of the video that the frame is of."""
    number: int | None = None
    """Of the frame in its video, from 0."""
    seconds: float | None = None
    """From the start of the video to the frame."""
    has_more: bool = False
    """True of the first frame of an animated image, or the first page of several."""


@dataclass(slots=True)
class Found:
    """The sources that arguments name."""

    base: Path
    """Folder that names are relative to."""
    sources: list[InputFile] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    """Listed, but not there."""
    others: int = 0
    """Files in folders that are neither images nor videos."""

    def check(self) -> None:
        """Raise DataError if there is nothing to predict on."""
        if not self.sources and not self.skipped:
            raise DataError(f"{self.base}: no images and no videos there")


@dataclass(frozen=True, slots=True)
class Reading:
    """How sources are read."""

    every: int = 1
    """Of a video, each frame whose number is a multiple of this."""
    workers: int = 2
    """Threads that decode; 0: none beside the caller's."""
    ahead: int = 4
    """Most decoded images that wait for the caller."""
    intensity_range: IntensityRange | None = None
    """Of grey images of more than 8 bits, see `read_image`."""


def find_sources(
    arguments: Iterable[str],
    *,
    out: Path | None = None,
    allow_urls: bool = False,
    listed: Iterable[str] = (),
) -> Found:
    """Find the images and videos that arguments name, without opening them.

    A folder stands for all images and videos below it, sorted, but for hidden files. A file that
    several arguments name is taken once.

    Args:
        arguments: paths, globs (`**` for folders below), addresses, or `-` for `listed`.
        out: folder of predictions, which is left out of the folders that hold it.
        allow_urls: whether addresses may be read.
        listed: lines that `-` stands for; what is not there is in `skipped`.

    Raises:
        DataError: an argument names nothing, or an address that may not be read.
    """
    finder = _Finder(out.absolute() if out else None, allow_urls)
    for argument in arguments:
        if argument != STDIN:
            finder.add(argument)
            continue
        for line in filter(None, map(str.strip, listed)):
            try:
                finder.add(line)
            except DataError as error:
                finder.found.skipped.append(Skipped(line, str(error).removeprefix(f"{line}: ")))
    return finder.finish()


class _Finder:
    """Collects places from arguments, then names them."""

    def __init__(self, out: Path | None, allow_urls: bool) -> None:
        self.found = Found(Path.cwd())
        self._out, self._allow_urls = out, allow_urls
        self._places: dict[str, bool] = {}
        """Absolute path or address -> True for a video."""
        self._folders: list[str] = []

    def add(self, argument: str) -> None:
        """Add what an argument names."""
        if _ADDRESS.match(argument):
            if not self._allow_urls:
                raise DataError(
                    f"{without_logins(argument)}: an address; --allow-urls lets predict read it"
                )
            self._places[argument] = False
            return
        path = Path(os.path.abspath(Path(argument).expanduser()))  # noqa: PTH100 - keeps links
        if path.is_dir():
            self._add_folder(path)
        elif path.exists() or path.is_symlink():
            self._add_file(path)
        elif glob.has_magic(argument):
            matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - `**` as in shells
            if not matches:
                raise DataError(f"{argument}: matches no file")
            for match in matches:
                if Path(match).is_dir():
                    continue
                self._add_file(Path(match))
        else:
            raise DataError(f"{argument}: no such file or folder")

    def _add_file(self, path: Path) -> None:
        self._folders.append(str(path.parent))
        self._places[str(path)] = _suffix(path.name) in _VIDEOS

    def _add_folder(self, root: Path) -> None:
        self._folders.append(str(root))
        seen = {root.resolve()}
        for folder, below, files in os.walk(root, onerror=self._unread, followlinks=True):
            here = Path(folder)
            # A link to a folder above would never end.
            below[:] = sorted(
                name
                for name in below
                if not name.startswith(".")
                and here / name != self._out
                and _is_new((here / name).resolve(), seen)
            )
            for name in sorted(files):
                suffix = _suffix(name)
                if name.startswith("."):
                    continue
                if suffix in _IMAGES or suffix in _VIDEOS:
                    self._places[str(here / name)] = suffix in _VIDEOS
                else:
                    self.found.others += 1

    def _unread(self, error: OSError) -> None:
        """Add a folder that cannot be listed, such as one without the right to read it."""
        reason = f"a folder that cannot be read ({error.strerror})"
        self.found.skipped.append(Skipped(os.fspath(error.filename or "."), reason))

    def finish(self) -> Found:
        """Name all places."""
        found = self.found
        if self._folders:
            found.base = Path(os.path.commonpath(self._folders))
        names: dict[str, str] = {}
        addresses = [place for place in self._places if _ADDRESS.match(place)]
        for place in self._places.keys() - addresses:
            names[place] = Path(place).relative_to(found.base).as_posix()
        taken = set(names.values())
        for place in addresses:
            names[place] = _address_name(place, taken)
            taken.add(names[place])
        videos = {names[place] for place, is_video in self._places.items() if is_video}
        stems = _stems([names[place] for place in self._places], videos)
        for place, is_video in self._places.items():
            name = names[place]
            if _ODD_NAME.search(name):
                reason = "its name holds a control character or is not UTF-8; rename it"
                found.skipped.append(Skipped(ascii(name)[1:-1], reason))
                continue
            found.sources.append(InputFile(place, name, stems[name], is_video))
        return found


def _is_new(path: Path, seen: set[Path]) -> bool:
    if path in seen:
        return False
    seen.add(path)
    return True


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix() if path.suffix else name


def _stems(names: Sequence[str], videos: Set[str]) -> dict[str, str]:
    """Return a stem for each name, so that no file of one source is also one of another.

    It is the name without suffix, with it where another source differs in nothing else, and
    numbered where that is taken too: `a.jpg`, `a.png` and `a.jpg.png` would share `a.jpg`.
    """
    short = Counter(map(_without_suffix, names))
    wanted = {name: _cut(_without_suffix(name), name, short) for name in names}
    counts = Counter(wanted.values())
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    films = {match[1] for name in short if (match := _FRAME_STEM.fullmatch(name))}
    taken: set[str] = set()
    found = {}
    for name, stem in wanted.items():
        chosen, number = stem, 1
        while (
            chosen in taken
            or (chosen != stem and chosen in counts)
            or any(f"{chosen}{suffix}" in folders for suffix in _OUTPUT_SUFFIXES)
            or (name in videos and chosen in films)
        ):
            number += 1
            chosen = f"{stem}_{number}"
        taken.add(chosen)
        found[name] = chosen
    return found


def _cut(stem: str, name: str, short: Mapping[str, int]) -> str:
    """Return the stem, or the name where others have that stem; not too long for a file's name."""
    chosen = stem if short[stem] == 1 else name
    folder, slash, last = chosen.rpartition("/")
    data = last.encode("utf-8", "surrogateescape")
    if len(data) <= _LONGEST_STEM:
        return chosen
    begin = data[: _LONGEST_STEM - 9].decode("utf-8", "ignore")
    return f"{folder}{slash}{begin}~{sha256_bytes(data)[:8]}"


def _address_name(address: str, taken: set[str]) -> str:
    """Return the last part of an address, numbered if another source has that name."""
    last = unquote(urlsplit(address).path).rpartition("/")[2]
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", last).lstrip(".")[:120] or "image"
    path, number, chosen = PurePosixPath(name), 1, name
    while chosen in taken:
        number += 1
        chosen = f"{path.stem}_{number}{path.suffix}"
    return chosen


def read_frames[T](
    sources: Iterable[InputFile], make: Callable[[Frame], T], reading: Reading
) -> Generator[T | Skipped]:
    """Decode all sources, in order; yield what `make` returns of each, or why there is nothing.

    Files are decoded and made by `reading.workers` threads; only `reading.ahead` results wait.
    """
    jobs = (job for source in sources for job in _jobs(source, make, reading))
    if not reading.workers:
        yield from (job() for job in jobs)
        return
    pool = ThreadPoolExecutor(reading.workers, thread_name_prefix="decode")
    waiting: deque[Future[T | Skipped]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > reading.ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs[T](
    source: InputFile, make: Callable[[Frame], T], reading: Reading
) -> Iterator[Callable[[], T | Skipped]]:
    """Yield what is to be done for each image of a source."""
    if not source.is_video:
        yield partial(_read_still, source, make, reading.intensity_range)
        return
    try:
        for frame in _video_frames(source, reading.every):
            yield partial(_made, frame.source, make, frame)
    except (LockError, DataError) as error:
        yield partial(Skipped, source.name, str(error))


def _read_still[T](
    source: InputFile, make: Callable[[Frame], T], intensity_range: IntensityRange | None
) -> T | Skipped:
    """Read a file or an address, and decode it."""
    from runkey.inference.preprocess import read_image  # torch

    try:
        data = _download(source.place) if source.is_address else _read_file(source.place)
        image = read_image(data, intensity_range)
        return _made(source, make, Frame(source, image, has_more=_has_more(data)))
    except DataError as error:
        reason = str(error).removeprefix("image bytes: ").partition("; runkey reads")[0]
        return Skipped(source.name, reason)
    except MemoryError:
        return Skipped(source.name, "too large for the memory of this machine")


def _made[T](source: InputFile, make: Callable[[Frame], T], frame: Frame) -> T | Skipped:
    try:
        return make(frame)
    except MemoryError:
        return Skipped(source.name, "too large for the memory of this machine")


def _read_file(place: str) -> bytes:
    try:
        with open_plain(Path(place)) as file:
            size = os.fstat(file.fileno()).st_size
            # A file may grow while it is read.
            data = file.read(_LARGEST_FILE + 1) if size <= _LARGEST_FILE else b""
            if (size := max(size, len(data))) > _LARGEST_FILE:
                raise DataError(f"{format_bytes(size)}; at most {format_bytes(_LARGEST_FILE)}")
            return data
    except FileNotFoundError:
        raise DataError("not found") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from None


def _has_more(data: bytes) -> bool:
    """Return True for an animation or a file of several pages; a phone's MPO is neither."""
    from runkey.data.decode import open_image  # torch

    try:
        with open_image(data) as image:
            return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # noqa: BLE001 - PIL raises almost any type on bad bytes
        return False


# Addresses.


class _Http(LimitedConnection, HTTPConnection):
    pass


class _Https(LimitedConnection, HTTPSConnection):
    pass


def _download(address: str) -> bytes:
    """Return what an address answers, within the limits of `runkey.http_limits`."""
    for _ in range(_MOST_REDIRECTS + 1):
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DataError("leads to an address that is not http")
        kind = _Https if parts.scheme == "https" else _Http
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection: Any = kind(parts.hostname, parts.port, timeout=answer_seconds())
            try:
                connection.request("GET", target, headers={"Accept-Encoding": "identity"})
                answer = connection.getresponse()
                if answer.status in (301, 302, 303, 307, 308):
                    address = urljoin(address, answer.getheader("Location", ""))
                    continue
                if answer.status != 200:
                    raise DataError(f"the server answers {answer.status} {answer.reason}")
                data: bytes = answer.read()
                return data
            finally:
                connection.close()
        except (OSError, HTTPException, ValueError) as error:
            raise DataError(f"cannot be fetched ({error})") from None
    raise DataError(f"more than {_MOST_REDIRECTS} redirects")


# Videos.


def count_frames(source: InputFile, every: int) -> int:
    """Return how many frames of a video are read, as its header says; 1 if it does not."""
    try:
        with _opened(source.place) as container:
            frames = int(container.streams.video[0].frames)
    except Exception:  # noqa: BLE001 - reading the frames says what is wrong
        return 1
    return max(1, -(-frames // every))


def _opened(place: str) -> Any:
    """Open a video that is a plain file, and that names no other files or addresses to be read."""
    open_plain(Path(place)).close()
    return import_extra("av").open(place, options={"protocol_whitelist": "file"})


def _video_frames(source: InputFile, every: int) -> Iterator[Frame]:
    """Decode each `every`-th frame of a video, upright.

    Raises:
        LockError: PyAV is not installed.
        DataError: the file is no video, or damaged; earlier frames are yielded before.
    """
    av = import_extra("av")
    number = -1
    try:
        with _opened(source.place) as container:
            if not container.streams.video:
                raise DataError("holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                if number % every == 0:
                    yield _video_frame(source, number, frame)
    except (av.FFmpegError, OSError, ValueError) as error:
        read = f"after frame {number}: " if number >= 0 else ""
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{read}is cut short or damaged ({reason})") from None
    if number < 0:
        raise DataError("holds no frame that can be decoded")


def _video_frame(source: InputFile, number: int, frame: Any) -> Frame:
    # Phones store the angle (counterclockwise) by which a player turns the frames.
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    image = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), k=turns))
    stem = f"{source.stem}_frame_{number:06d}"
    return Frame(
        source=replace(source, name=f"{stem}.jpg", stem=stem),
        image=image,
        video=source.name,
        number=number,
        seconds=None if frame.time is None else round(float(frame.time), 3),
    )
