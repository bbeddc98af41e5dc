"""A trained model on disk: `weights.safetensors` with its tensors, `model.json` with all else.

`weights.safetensors`: the state dict, contiguous CPU tensors; nothing in it can run code.
`model.json`: `{"format": 1, "model": params, "classes": [{index, id, name}], "sizes": {...}}`.
Models of runkey 0.1 hold `weights.pt` instead: `{"model": state dict}` by `torch.save`.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from runkey import params
from runkey.errors import ModelError
from runkey.files import write_atomically, write_json
from runkey.model.build import build_model
from runkey.model.detr import Detector

WEIGHTS = "weights.safetensors"
OLD_WEIGHTS = "weights.pt"
"""What models of runkey 0.1 have in place of `WEIGHTS`."""
CARD = "model.json"
_FORMAT = 1


class NamedClass(Protocol):
    """A class, such as `runkey.data.index.ClassName`."""

    @property
    def index(self) -> int:
        """Row of the class head, 0..K-1."""

    @property
    def id(self) -> int:
        """COCO category id."""

    @property
    def name(self) -> str:
        """Its name."""


@dataclass(frozen=True, slots=True)
class CardClass:
    """A class of a saved model: its row in the class head, its COCO category id, its name."""

    index: int
    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Sizes:
    """Image sizes in evaluation, pixels."""

    short_side: int
    """Short side after resizing."""
    long_side: int
    """Upper bound of the long side; it takes precedence over the short side."""
    cached: bool = False
    """Whether images were first shrunk for prepare's cache. Older models do not record it."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The parameters, classes and image sizes of a saved model."""

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
    """Write a model; equal values give equal bytes.

    Args:
        folder: created if it is missing.
        state: the detector's state dict, on any device and in any memory format.
        model: the parameters that it was built with.
        classes: the K classes, in order of their index.
        sizes: of the images that it was evaluated on.
    """
    # A contiguous copy: neither strides nor the rest of a shared storage get into the file.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    write_atomically(folder / WEIGHTS, safetensors.torch.save(plain, {"format": "pt"}))
    card = {
        "format": _FORMAT,
        "model": model.model_dump(mode="json"),
        "classes": [{"index": c.index, "id": c.id, "name": c.name} for c in classes],
        "sizes": asdict(sizes),
    }
    write_json(folder / CARD, card)


def read_card(folder: Path) -> ModelCard:
    """Read the card of a saved model.

    Raises:
        ModelError: the card is missing, damaged or of another format.
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


def weights_file(folder: Path) -> Path:
    """Return the weights file of a saved model, or the path where it is missing."""
    old = folder / OLD_WEIGHTS
    new = folder / WEIGHTS
    return old if old.is_file() and not new.is_file() else new


def read_weights(path: Path) -> Any:
    """Read a `.safetensors` file, or what `torch.save` wrote, without running code from it.

    Returns:
        The state dict of a `.safetensors` file; else whatever was saved, tensors on the CPU.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or holds something other than tensors and plain values.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # The reference's training checkpoints hold their command line too; it is only read past.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        text = str(error).strip()
        raise ValueError(text.splitlines()[0] if text else "cut short") from None


def load_model(folder: Path) -> tuple[Detector, ModelCard]:
    """Load a saved model, on the CPU and in evaluation mode, with its card.

    Raises:
        ModelError: a file is missing or damaged, or the weights do not fit the card.
    """
    card = read_card(folder)
    path = weights_file(folder)
    try:
        state = read_weights(path)
        state = state["model"] if path.name == OLD_WEIGHTS else state
    except FileNotFoundError:
        raise ModelError(f"{path}: not found; run `dvc repro train` first") from None
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{path}: damaged; run `dvc repro train` again") from None
    detector = build_model(card.model, len(card.classes))
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"{path}: does not fit {CARD} beside it ({reason})") from None
    return detector.eval(), card
