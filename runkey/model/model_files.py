"""A trained model on disk: `weights.pt` with tensors only, `model.json` with all else.

`weights.pt`: `{"model": state dict}`, contiguous CPU tensors; loads with `weights_only=True`.
`model.json`: `{"format": 1, "model": params, "classes": [{index, id, name}], "sizes": {...}}`.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from runkey import params
from runkey.errors import ModelError
from runkey.model.detector import Detector
from runkey.model.detr import build_model

WEIGHTS = "weights.pt"
CARD = "model.json"
_FORMAT = 1


class NamedClass(Protocol):
    """A class as `runkey.data.index.ClassName` describes it."""

    @property
    def index(self) -> int:
        """0..K-1, the row of the class head."""

    @property
    def id(self) -> int:
        """COCO category id."""

    @property
    def name(self) -> str:
        """What people call it."""


@dataclass(frozen=True, slots=True)
class CardClass:
    """A class of a saved model: its row in the class head, its COCO category id, its name."""

    index: int
    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Sizes:
    """How images are resized before the model sees them in evaluation, pixels."""

    short_side: int
    """Short side after resizing."""
    long_side: int
    """Upper bound of the long side; wins over the short side."""
    cached: bool = False
    """Whether images were shrunk to prepare's cache first.  Older models do not say."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """All that a saved model's weights do not say."""

    model: params.Model
    classes: tuple[CardClass, ...]
    sizes: Sizes


def save_model(
    folder: Path,
    state: Mapping[str, Tensor],
    model: params.Model,
    classes: Sequence[NamedClass],
    sizes: Sizes,
) -> None:
    """Write a model; the same values give the same bytes.

    Args:
        folder: made if it is not there.
        state: the detector's state dict, on any device and in any memory format.
        model: the parameters that it was built with.
        classes: the K classes, in order of their index.
        sizes: of the images that it was evaluated on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A fresh contiguous copy: neither strides nor the rest of a shared storage get into the file.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    torch.save({"model": plain}, folder / WEIGHTS)
    card = {
        "format": _FORMAT,
        "model": model.model_dump(mode="json"),
        "classes": [{"index": c.index, "id": c.id, "name": c.name} for c in classes],
        "sizes": asdict(sizes),
    }
    text = json.dumps(card, indent=2, ensure_ascii=False)
    (folder / CARD).write_text(text + "\n", encoding="utf-8")


def read_card(folder: Path) -> ModelCard:
    """The card of a saved model.

    Raises:
        ModelError: it is missing, damaged or of another format.
    """
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if card["format"] != _FORMAT:
            raise ModelError(f"{path}: format {card['format']}, this program reads {_FORMAT}")
        return ModelCard(
            params.Model.model_validate(card["model"]),
            tuple(CardClass(**entry) for entry in card["classes"]),
            Sizes(**card["sizes"]),
        )
    except FileNotFoundError:
        raise ModelError(f"{path}: not found; run `dvc repro train` first") from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:90]
        raise ModelError(f"{path}: no model card ({reason}); run `dvc repro train`") from None


def load_model(folder: Path) -> tuple[Detector, ModelCard]:
    """A saved model, on the CPU, in evaluation mode, with its card.

    Raises:
        ModelError: a file is missing or damaged, or the two do not fit together.
    """
    card = read_card(folder)
    path = folder / WEIGHTS
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    except FileNotFoundError:
        raise ModelError(f"{path}: not found; run `dvc repro train` first") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError):
        raise ModelError(f"{path}: damaged; run `dvc repro train` again") from None
    detector = build_model(card.model, len(card.classes))
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"{path}: does not fit {CARD} beside it ({reason})") from None
    return detector.eval(), card
