"""A loaded model: images in, detections out.

    model = load_model_folder(Path("model"))
    found = model("a.jpg")                       # Detections
    for found in model.stream(paths): ...        # many images, in constant memory

Images go through the network in batches of one shape without padding, as in `evaluate`, so that the
batch size does not change the result.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import batched
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from runkey.errors import ModelError
from runkey.files import FormatError, read_json
from runkey.hashing import sha256_file
from runkey.identity.key import short_key
from runkey.identity.record import KEY_JSON
from runkey.inference.detections import Detections, score_limits
from runkey.inference.module import InferenceModule
from runkey.inference.networks import (
    CARD_JSON,
    Network,
    TorchNetwork,
    find_device,
    open_export,
    read_export_card,
)
from runkey.inference.options import Score
from runkey.inference.preprocess import Preprocess, Source, read_image, source_name
from runkey.inference.thresholds import (
    DEFAULT_SCORE,
    THRESHOLDS,
    class_keys,
    read_thresholds,
    score_by_class,
)
from runkey.model.weights import WEIGHTS, CardClass, Sizes, load_model
from runkey.units import counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InferenceCard:
    """What is known of a model beside its weights."""

    classes: tuple[CardClass, ...]
    """The K classes, in order of their index."""
    sizes: Sizes
    """Of the images that it was evaluated on."""
    key: str | None = None
    """Of the run that trained it."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Score of the best F1 by class name; empty if the model was not evaluated."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """The rest of an export's card.json: data, licence, environment."""


class Model:
    """A detector with its preprocessing and thresholds."""

    def __init__(self, card: InferenceCard, network: Network) -> None:
        """Args: card: classes, sizes, thresholds. network: what runs the model."""
        self.card, self.network = card, network
        self.preprocess = Preprocess(card.sizes)
        self._told = False

    def __repr__(self) -> str:
        names = ", ".join(one.name for one in self.card.classes[:4])
        more = " ..." if len(self.card.classes) > 4 else ""
        key = short_key(self.card.key) if self.card.key else "no key"
        return f"Model({key}: {counted(len(self.card.classes), 'class')}: {names}{more})"

    @overload
    def __call__(
        self,
        source: Source | torch.Tensor,
        score: Score = ...,
        nms: float | None = ...,
        batch_size: int = ...,
    ) -> Detections: ...

    @overload
    def __call__(
        self,
        source: list[Any] | tuple[Any, ...],
        score: Score = ...,
        nms: float | None = ...,
        batch_size: int = ...,
    ) -> list[Detections]: ...

    def __call__(
        self, source: Any, score: Score = "auto", nms: float | None = None, batch_size: int = 8
    ) -> Detections | list[Detections]:
        """Detect the objects of an image, or of each image of a list.

        Args:
            source: an image, see `Source`, or a list or tuple of images of any kinds and sizes.
            score: least score; 0 gives the 100 best detections that COCO's metrics count.
            nms: drop a detection that overlaps a better one of its class by more than this IoU;
                None: none, as DETR needs no suppression.
            batch_size: most images in one forward pass.

        Returns:
            Detections of an image; of a list or tuple, also of one image, a list of them in order.

        Raises:
            DataError: an image cannot be read; one line names it.
            ModelError: `score` names a class that the model does not have, or the model predicts
                NaN or infinity.
        """
        if isinstance(source, list | tuple):
            return list(self.stream(source, score, nms, batch_size))
        (found,) = self.stream([source], score, nms, batch_size)
        return found

    def stream(
        self,
        sources: Iterable[Source | torch.Tensor],
        score: Score = "auto",
        nms: float | None = None,
        batch_size: int = 8,
    ) -> Iterator[Detections]:
        """Yield the detections of each image in order; at most `batch_size` images are in memory.

        Arguments and errors are those of a call.
        """
        limits = self.score_limits(score)
        for some in batched(sources, batch_size):
            images = [read_image(one, self.card.sizes.intensity_range) for one in some]
            names = [source_name(one) for one in some]
            for found in self.detect(images, names):
                shown = found.keep(found.scores >= limits[found.labels])
                yield shown if nms is None else shown.nms(nms)

    def detect(
        self, images: Sequence[NDArray[np.uint8]], sources: Sequence[str] = ()
    ) -> list[Detections]:
        """Detect without a threshold: at most 100 detections of each image.

        Args:
            images: upright RGB images, uint8 [H, W, 3] each, of any sizes; all go through the
                network at once, grouped by their shape after resizing.
            sources: name of each image, for `Detections.source`.

        Raises:
            ModelError: the model predicts NaN or infinity.
        """
        names = sources or [""] * len(images)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        pixels = [self.preprocess(image) for image in images]
        found = self.detect_resized(pixels, sizes, names)
        return [replace(one, image=image) for one, image in zip(found, images, strict=True)]

    def detect_resized(
        self,
        pixels: Sequence[NDArray[np.uint8]],
        sizes: Sequence[tuple[int, int]],
        sources: Sequence[str],
        batch_size: int | None = None,
    ) -> list[Detections]:
        """Detect without a threshold in images that are resized already.

        Args:
            pixels: uint8 [3, h, w] each, of `Preprocess`; those of one shape go through the network
                together.
            sizes: (height, width) of the images before.
            sources: their names.
            batch_size: most images in one forward pass; None: all of one shape.

        Raises:
            ModelError: the model predicts NaN or infinity.
        """
        rows_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, one in enumerate(pixels):
            rows_of[one.shape].append(row)
        found: dict[int, Detections] = {}
        for rows in rows_of.values():
            for some in batched(rows, batch_size or len(rows)):
                answers = self.network(np.stack([pixels[row] for row in some]))
                for row, scores, labels, fractions in zip(some, *answers, strict=True):
                    frame = np.array(sizes[row][::-1] * 2, dtype=np.float32)
                    found[row] = self.detections(
                        scores, labels, fractions * frame, sizes[row], sources[row]
                    )
        return [found[row] for row in range(len(pixels))]

    def detections(
        self,
        scores: NDArray[np.float32],
        labels: NDArray[np.int64],
        boxes_xyxy: NDArray[np.float32],
        size: tuple[int, int],
        source: str,
    ) -> Detections:
        """Make the detections of an image of that (height, width), boxes in its pixels.

        Raises:
            ModelError: a score or a box is NaN or infinite.
        """
        check_finite(source or "image", scores, boxes_xyxy)
        return Detections(
            boxes_xyxy=boxes_xyxy,
            scores=scores,
            labels=labels,
            classes=self.card.classes,
            image_size=size,
            source=source,
        )

    def score_limits(self, score: Score) -> NDArray[np.float32]:
        """Return the least score of each class, [K].

        Raises:
            ModelError: `score` names a class that the model does not have.
        """
        if isinstance(score, str) and score != "auto":
            raise ModelError(f"score: {score!r}; give a number, 'auto', or numbers by class name")
        if not isinstance(score, str | Mapping):
            return score_limits(float(score), self.card.classes)
        known = self.card.thresholds
        auto = {key: known.get(key, DEFAULT_SCORE) for key in class_keys(self.card.classes)}
        chosen = score if isinstance(score, Mapping) else {}
        if not known and len(chosen) < len(auto) and not self._told:
            self._told = True
            logger.warning(
                f"score {DEFAULT_SCORE}: no {THRESHOLDS} of these weights; `dvc repro evaluate`"
                " writes evaluation/thresholds.json"
            )
        return score_limits(chosen, self.card.classes, auto)


def check_finite(name: str, scores: NDArray[np.float32], boxes: NDArray[np.float32]) -> None:
    """Raise ModelError, which names the image, if a score or a box is NaN or infinite."""
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        raise ModelError(
            f"{name}: the model predicts NaN or infinity; train again with a lower lr or with"
            " optimizer.clip"
        )


def load_model_folder(
    path: Path | str, device: str | torch.device | None = None, *, trust: bool = False
) -> Model:
    """Load a saved model: the folder `model/` of a run, or an export.

    Args:
        path: a folder with model.json and weights.safetensors, or what `open_export` opens.
        device: such as `cpu` or `cuda:1`; None: the GPU if there is one. ONNX Runtime and OpenVINO
            run on the CPU.
        trust: load a program of `torch.export` too, which can execute code that is in it.

    Raises:
        ModelError: the folder holds no model, or a damaged one; there is no such device; or it is a
            torch program that is not trusted.
    """
    folder = Path(path)
    device = find_device(device)
    if folder.is_file() or (folder / CARD_JSON).is_file():
        return _load_export(folder, device, trust=trust)
    detector, card = load_model(folder)
    network = TorchNetwork(InferenceModule(detector), device)
    return Model(
        InferenceCard(
            classes=card.classes,
            sizes=card.sizes,
            key=_key(folder),
            thresholds=find_thresholds(folder),
        ),
        network,
    )


def _load_export(path: Path, device: str | torch.device, *, trust: bool) -> Model:
    file = Path(read_export_card(path / CARD_JSON)["file"]) if path.is_dir() else path
    if file.suffix == ".pt2" and not trust:
        raise ModelError(
            f"{path}: a torch program can execute code that is in it; if you trust whoever exported"
            " it, say so: `runkey predict --trust`, `runkey.load(..., trust=True)`; ONNX and"
            " OpenVINO exports execute none"
        )
    export = open_export(path, device)
    card = export.card
    known = ("format", "key", "classes", "sizes", "thresholds")
    return Model(
        InferenceCard(
            classes=tuple(CardClass(**one) for one in card["classes"]),
            sizes=Sizes(**card["sizes"]),
            key=card["key"],
            thresholds=card["thresholds"],
            about={name: value for name, value in card.items() if name not in known},
        ),
        export.network,
    )


def find_thresholds(folder: Path) -> Mapping[str, float]:
    """Return the thresholds of a saved model's weights, by class name; empty if there are none.

    They lie in the folder, or in `../evaluation/` beside it.
    """
    weights = folder / WEIGHTS
    for path in (folder / THRESHOLDS, folder.absolute().parent / "evaluation" / THRESHOLDS):
        if path.is_file() and weights.is_file():
            thresholds = read_thresholds(path)
            if thresholds["weights"] == sha256_file(weights):
                return score_by_class(thresholds)
    return {}


def _key(folder: Path) -> str | None:
    """The key in key.json beside the weights."""
    try:
        key = read_json(folder / Path(KEY_JSON).name, dict[str, Any]).get("key")
    except (OSError, FormatError):
        return None
    return key if isinstance(key, str) else None
