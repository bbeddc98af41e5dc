"""Predict on many images and videos, one after the other, in constant memory.

    found = find_sources(["photos/"], out=Path("predictions"))
    summary = predict(model, found, Path("predictions"), Options())

Threads decode, resize and draw; this one runs the network, on batches of one shape.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import batched
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runkey.errors import DataError
from runkey.files import LARGE, FormatError, read_json, write_json
from runkey.inference.detections import Detections
from runkey.inference.draw import DRAWN_SIDES, fitted
from runkey.inference.model import Model, check_finite
from runkey.inference.options import Options, parse_score
from runkey.inference.sources import (
    Found,
    Frame,
    Reading,
    Skipped,
    count_frames,
    find_sources,
    read_frames,
)
from runkey.inference.thresholds import class_keys
from runkey.inference.tile import Tiling, ViewDetections, merge_views
from runkey.inference.writers import (
    MARK,
    About,
    Outputs,
    Prediction,
    claim_folder,
    held_folder,
    write_skipped,
)
from runkey.progress import Steps, progress
from runkey.units import MIB, counted
from runkey.version import __version__

__all__ = ["Options", "Summary", "find_sources", "parse_score", "predict"]

logger = logging.getLogger(__name__)

_GROUPED = 4
"""Batches whose images are grouped by shape."""
_HELD = 256 * MIB
"""Bytes of decoded images that wait for the network, at most."""
_FRAME_QUALITY = 95
_SHOWN = 8
"""Classes of a score's error."""


@dataclass(slots=True)
class Summary:
    """What a run of `predict` did."""

    folder: Path
    images: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    """Detections by class name."""
    skipped: list[Skipped] = field(default_factory=list)
    first_of_several: list[str] = field(default_factory=list)
    """Animations and files of several pages, of which the first image was taken."""
    seconds: float = 0.0
    was_there: bool = False
    """Whether the folder held earlier predictions."""
    kinds: tuple[str, ...] = ()


def predict(model: Model, found: Found, folder: Path, options: Options) -> Summary:
    """Predict on all sources, and write the outputs that `options.kinds` names.

    Args:
        model: a loaded model.
        found: of `find_sources`.
        folder: of the outputs; what an earlier run wrote there is replaced.
        options: how.

    Raises:
        DataError: there is nothing to predict on, or the folder holds something else.
        ModelError: a score names an unknown class, or the model gives NaN.
        KeyboardInterrupt: after Ctrl-C; what was predicted until then is written.
    """
    found.check()
    limits = model.score_limits(options.score)
    ids = _image_ids(found, options)
    names = [one.name for one in model.card.classes]
    keys = class_keys(model.card.classes)
    scores = dict(zip(keys, map(float, np.round(limits, 4)), strict=True))
    about = {"program": f"runkey predict {__version__}", "key": model.card.key, "score": scores}
    mark = {
        **about,
        "nms": options.nms,
        "tile": options.tiling and asdict(options.tiling),
        **options.about,
    }
    summary = Summary(folder, skipped=list(found.skipped))
    with held_folder(folder):
        summary.was_there = claim_folder(folder, {**mark, "finished": False})
        workers = _workers() if options.workers is None else options.workers
        started, finished = time.monotonic(), False
        total = sum(
            count_frames(one, options.every) if one.is_video else 1 for one in found.sources
        )
        shared = About(model.card.classes, found.base, total, about, ids, workers)
        outputs = Outputs(folder, options.kinds, shared)
        run = _Run(model, limits, options, outputs.kinds, summary)
        try:
            with (
                _delayed_interrupts() as delayed,
                outputs,
                progress("predict", total, "images") as steps,
            ):
                for one in run.predictions(found, workers, steps):
                    with delayed():
                        outputs.add(one)
            finished = True
        finally:
            summary.kinds = outputs.kinds
            summary.images, summary.seconds = outputs.images, time.monotonic() - started
            for index, count in outputs.objects.items():
                summary.objects[names[index]] += count
            write_skipped(folder, ((one.name, one.reason) for one in summary.skipped))
            mark |= {"images": summary.images, "skipped": len(summary.skipped)}
            mark |= {"seconds": round(summary.seconds, 2), "finished": finished}
            write_json(folder / MARK, mark)
    return summary


class _Run:
    """The way of images through decoding, network and thresholds."""

    def __init__(
        self,
        model: Model,
        limits: NDArray[np.float32],
        options: Options,
        kinds: Sequence[str],
        summary: Summary,
    ) -> None:
        self._model, self._limits, self._options = model, limits, options
        self._summary = summary
        self._with_frames = "frames" in kinds
        self._side = DRAWN_SIDES[1] if "images" in kinds else 420 if "sheet" in kinds else 0

    def predictions(self, found: Found, workers: int, steps: Steps) -> Iterator[Prediction]:
        """Yield the predictions of all images, in order."""
        # With tiles, whole images wait: each may be large.
        ahead = 1 if self._options.tiling else max(2 * workers, min(self._options.batch_size, 64))
        reading = Reading(
            self._options.every, workers, ahead, self._model.card.sizes.intensity_range
        )
        loaded = read_frames(found.sources, self._load, reading)
        with closing(loaded):
            for images in self._groups(loaded, steps):
                for image, detections in zip(images, self._detect(images), strict=True):
                    steps.advance()
                    yield self._prediction(image, detections)

    def _groups(self, loaded: Iterator[_Loaded | Skipped], steps: Steps) -> Iterator[list[_Loaded]]:
        """Collect images until there are enough of them for batches of one shape."""
        most = 1 if self._options.tiling else _GROUPED * self._options.batch_size
        group: list[_Loaded] = []
        size = 0
        for one in loaded:
            if isinstance(one, Skipped):
                self._summary.skipped.append(one)
                steps.advance()
                continue
            if one.frame.has_more:
                self._summary.first_of_several.append(one.frame.source.name)
            group.append(one)
            size += one.bytes
            if len(group) >= most or size > _HELD:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _load(self, frame: Frame) -> _Loaded:
        """Keep of a decoded image what is needed later; threads call this."""
        picture = jpeg = None
        if self._side:
            picture = fitted(Image.fromarray(frame.image), self._side)
        if self._with_frames and frame.video:
            data = io.BytesIO()
            Image.fromarray(frame.image).save(data, "JPEG", quality=_FRAME_QUALITY)
            jpeg = data.getvalue()
        size = (frame.image.shape[0], frame.image.shape[1])
        pixels = frame.image if self._options.tiling else self._model.preprocess(frame.image)
        return _Loaded(_without_image(frame), size, pixels, picture, jpeg)

    def _detect(self, images: Sequence[_Loaded]) -> list[Detections]:
        if self._options.tiling:
            return [self._detect_tiled(one, self._options.tiling) for one in images]
        found = self._model.detect_resized(
            [one.pixels for one in images],
            [one.size for one in images],
            [one.frame.source.place for one in images],
            self._options.batch_size,
        )
        return [self._suppressed(one.keep(one.scores >= self._limits[one.labels])) for one in found]

    def _detect_tiled(self, image: _Loaded, tiling: Tiling) -> Detections:
        views = tiling.views(*image.size)
        found: list[ViewDetections] = []
        for some in [views[:1], *batched(views[1:], self._options.batch_size)]:
            cuts = (image.pixels[top:bottom, left:right] for left, top, right, bottom in some)
            answers = self._model.network(np.stack([self._model.preprocess(cut) for cut in cuts]))
            check_finite(image.frame.source.name, answers[0], answers[2])
            found += [
                ViewDetections(view, *answer) for view, *answer in zip(some, *answers, strict=True)
            ]
        merged = merge_views(found, image.size, tiling, self._limits)
        return self._suppressed(
            self._model.detections(*merged, image.size, image.frame.source.place)
        )

    def _suppressed(self, found: Detections) -> Detections:
        return found if self._options.nms is None else found.nms(self._options.nms)

    def _prediction(self, image: _Loaded, detections: Detections) -> Prediction:
        frame = image.frame
        return Prediction(
            name=frame.source.name,
            stem=frame.source.stem,
            place=frame.source.place,
            detections=detections,
            picture=image.picture,
            frame=image.jpeg,
            video=frame.video,
            number=frame.number,
            seconds=frame.seconds,
        )


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A decoded image, as far as it is needed."""

    frame: Frame
    """Without pixels."""
    size: tuple[int, int]
    """Height and width."""
    pixels: NDArray[np.uint8]
    """The network's input [3, h, w]; with tiles the whole image [H, W, 3]."""
    picture: Image.Image | None
    """To draw on."""
    jpeg: bytes | None

    @property
    def bytes(self) -> int:
        """Return the memory that it takes."""
        drawn = 3 * self.picture.width * self.picture.height if self.picture else 0
        return self.pixels.nbytes + drawn + len(self.jpeg or b"")


def _without_image(frame: Frame) -> Frame:
    return Frame(
        frame.source,
        np.empty((0, 0, 3), np.uint8),
        frame.video,
        frame.number,
        frame.seconds,
        frame.has_more,
    )


def _image_ids(found: Found, options: Options) -> dict[str, int]:
    """Return the ids that --coco FILE gives the images, and log how many it lacks or has more."""
    if options.coco is None:
        return {}
    known = read_image_ids(options.coco)
    ids = match_ids([one.name for one in found.sources if not one.is_video], known)
    if not ids:
        raise DataError(f"{options.coco}: names none of the images")
    unknown, left = len(found.sources) - len(ids), len(known) - len(ids)
    if unknown:
        logger.warning(f"{options.coco}: lacks {counted(f'{unknown:,}', 'image')} of the sources")
    if left:
        logger.warning(
            f"{options.coco}: has {counted(f'{left:,}', 'image')} more, without predictions"
        )
    return ids


def read_image_ids(path: Path) -> dict[str, int]:
    """Return the ids of a COCO file's images by `file_name`.

    Raises:
        DataError: it cannot be read, or holds no such list.
    """
    try:
        coco = read_json(path, most=LARGE)
        entries = {str(one["file_name"]): int(one["id"]) for one in coco["images"]}
    except FileNotFoundError:
        raise DataError(f"{path}: not found") from None
    except (FormatError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: no COCO file with a list of images ({error})") from None
    return entries


def match_ids(names: Sequence[str], ids: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of images by their name here, which may have other folders above it.

    A file matches by its whole name, else by the last part of it if only one image has that.
    """
    lasts = Counter(PurePosixPath(name).name for name in ids)
    own = Counter(PurePosixPath(name).name for name in names)
    by_last = {PurePosixPath(name).name: number for name, number in ids.items()}
    found = {}
    for name in names:
        last = PurePosixPath(name).name
        if name in ids:
            found[name] = ids[name]
        elif lasts[last] == own[last] == 1:
            found[name] = by_last[last]
    return found


def _workers() -> int:
    return min(8, len(os.sched_getaffinity(0)))


@contextmanager
def _delayed_interrupts() -> Iterator[Any]:
    """Yield a context in which Ctrl-C waits for the end of the block; it must not cut a row."""
    if threading.current_thread() is not threading.main_thread():
        yield nullcontext
        return
    state = {"inside": False, "asked": False}
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:  # noqa: ARG001
        if state["inside"]:
            state["asked"] = True
        else:
            raise KeyboardInterrupt

    @contextmanager
    def delayed() -> Iterator[None]:
        state["inside"] = True
        try:
            yield
        finally:
            state["inside"] = False
        if state["asked"]:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield delayed
    finally:
        signal.signal(signal.SIGINT, before)
