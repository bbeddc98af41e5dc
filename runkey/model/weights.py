"""Weights on disk: saved models, and the initial weights of a training.

A trained model is a folder with two files.
`weights.safetensors`: the state dict, contiguous CPU tensors; nothing in it can run code.
`model.json`: `{"format": 1, "model": params, "classes": [{index, id, name}], "sizes": {...}}`.
Models of runkey 0.1 hold `weights.pt` instead: `{"model": state dict}` by `torch.save`.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import PickleError
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from runkey import params
from runkey.errors import ModelError
from runkey.files import expect, open_plain, read_json, write_atomically, write_json
from runkey.identity import initial_weights
from runkey.identity.pinned_weights import BACKBONE_WEIGHTS, DETECTORS, INIT_FROM, pinned_by
from runkey.model import backbones
from runkey.model.detr import Detector, build_model
from runkey.units import counted

WEIGHTS, OLD_WEIGHTS, CARD = (
    initial_weights.WEIGHTS,
    initial_weights.OLD_WEIGHTS,
    initial_weights.CARD,
)
_FORMAT = 1
_LARGEST_SIDE = 2**32
"""As in params.yaml."""

_State = dict[str, Tensor]
"""Tensors by name."""


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
    intensity_range: tuple[float, float] | None = None
    """Of grey images of more than 8 bits, as in `data.intensity_range`."""

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that no image has."""
        for side in (self.short_side, self.long_side):
            if not 1 <= side <= _LARGEST_SIDE:
                raise ValueError(f"sizes: {side}; from 1 to {_LARGEST_SIDE} pixels")
        low, high = self.intensity_range or (0.0, 1.0)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"sizes.intensity_range: {low:g} to {high:g}")


@dataclass(frozen=True, slots=True)
class Pretrained:
    """Published weights that training began with, by itself or by way of another run's."""

    name: str
    """As `runkey weights` lists them."""
    file: str
    sha256: str
    licence: str

    def __str__(self) -> str:
        return f"{self.name} ({self.file}, sha256 {self.sha256}, {self.licence})"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The parameters, classes and image sizes of a saved model."""

    model: params.Model
    """What it was built with."""
    classes: tuple[CardClass, ...]
    """The K classes, in order of their index."""
    sizes: Sizes
    """Of the images that it was evaluated on."""
    pretrained: Pretrained | None = None
    """Whose licence the weights may carry; None: none, or weights that are not known."""

    def __post_init__(self) -> None:
        """Raise ValueError for classes out of order."""
        if [one.index for one in self.classes] != list(range(len(self.classes))):
            raise ValueError(f"classes: {counted(len(self.classes), 'class')} out of order")


def save_model(folder: Path, state: Mapping[str, Tensor], card: ModelCard) -> None:
    """Write a model into a folder; equal values on any device, in any layout, give equal bytes."""
    # A contiguous copy: neither strides nor the rest of a shared storage get into the file.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    write_atomically(folder / WEIGHTS, safetensors.torch.save(plain, {"format": "pt"}))
    tree = TypeAdapter(ModelCard).dump_python(card, mode="json")
    write_json(folder / CARD, {"format": _FORMAT} | tree)


def read_card(folder: Path) -> ModelCard:
    """Read the card of a saved model.

    Raises:
        ModelError: the card is missing, damaged or of another format.
    """
    path = folder / CARD
    try:
        card = read_json(path)
        if card["format"] != _FORMAT:
            raise ModelError(f"{path}: format {card['format']}, this program reads {_FORMAT}")
        made: ModelCard = expect(ModelCard, card)
        return made
    except FileNotFoundError:
        raise ModelError(f"{path}: not found; run `dvc repro train` first") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:90]
        raise ModelError(f"{path}: no model card ({reason}); run `dvc repro train`") from None


def _weights_file(folder: Path) -> Path:
    """Return the weights file of a saved model, or the path where it is missing."""
    old, new = folder / OLD_WEIGHTS, folder / WEIGHTS
    return old if old.is_file() and not new.is_file() else new


def _read_state(path: Path) -> _State:
    """Read a file's state dict onto the CPU, without running code from it.

    It is the whole of a `.safetensors` file; of what `torch.save` wrote the whole, or what is
    under `model` or `state_dict`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged or holds something else; what, and the way out.
    """
    loaded: Any
    try:
        if path.suffix == ".safetensors":
            with open_plain(path):
                loaded = safetensors.torch.load_file(path)
        else:
            # The reference's checkpoints hold their command line too; it is only read past.
            names = torch.serialization.safe_globals([argparse.Namespace])
            with names, open_plain(path) as file:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, PickleError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"no weights file that is safe to load ({_reason(error)}); save its tensors"
            ' alone with torch.save({"model": model.state_dict()}, file)'
        ) from None
    if isinstance(loaded, dict):
        inner = (loaded.get(key) for key in ("model", "state_dict"))
        loaded = next((one for one in inner if isinstance(one, dict)), loaded)
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError("holds no state dict; expected names with tensors, or 'model'")
    odd = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{odd[0]!r} is no tensor; expected a state dict, or 'model'")
    return loaded


def _reason(error: Exception) -> str:
    """Say in a few words why a weights file could not be read."""
    if isinstance(error, PickleError | KeyError):  # torch's text is a page, or a byte's number
        return "torch.save has not written it, or it holds more than tensors"
    text = str(error).strip()
    return text.splitlines()[0][:90] if text else "cut short"


def load_model(folder: Path) -> tuple[Detector, ModelCard]:
    """Load a saved model, on the CPU and in evaluation mode, with its card.

    Raises:
        ModelError: a file is missing or damaged, or the weights do not fit the card.
    """
    card = read_card(folder)
    path = _weights_file(folder)
    try:
        state = _read_state(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: not found; run `dvc repro train` first") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ModelError(f"{path}: damaged; run `dvc repro train` again") from None
    try:
        _check_dimensions(card.model, state)
        detector = build_model(card.model, len(card.classes))
        detector.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"{path}: does not fit {CARD} beside it ({reason})") from None
    return detector.eval(), card


def _check_dimensions(model: params.Model, state: _State) -> None:
    """Raise ValueError for a model that is larger than its weights, before memory is taken."""
    largest = max(max(tensor.shape, default=0) for tensor in state.values())
    for name in ("hidden_dim", "feedforward_dim", "num_queries"):
        if (value := getattr(model, name)) > largest:
            raise ValueError(f"model.{name}: {value}, and no tensor has more than {largest} rows")
    if (layers := model.encoder_layers + model.decoder_layers) > len(state):
        raise ValueError(f"{counted(layers, 'layer')}, and {counted(len(state), 'tensor')}")


# Initial weights.


NUM_COCO_IDS = 91
"""Logits of the reference's COCO models without no-object: ids 0..90."""


def coco_names() -> list[str]:
    """Return the name of each id 0..90, for heads with ids as class indices; empty for gaps."""
    from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

    names = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return ["" if name in ("__background__", "N/A") else name for name in names]


# Tensors with a row per class, and with a row per query.
_CLASS_ROWS = ("class_embed.weight", "class_embed.bias", "label_embed.weight")
_QUERY_ROWS = ("query_embed.weight", "query_content.weight")
# What both presets compute in the same way under the same name.
_COMMON = ("backbone.", "transformer.encoder.")
_COUNTER = "num_batches_tracked"  # of batch norm, which no computation reads
_BODY = "backbone.0.body."
_MOST_DROPS = 12
_LEAST_FIT = 0.1
"""Fraction of a file's tensors: weights of which fewer fit are of another architecture."""


@dataclass(frozen=True, slots=True)
class PretrainedWeights:
    """Weights to start from."""

    name: str
    """Its name in messages."""
    state: _State
    class_names: list[str] | None
    """Classes 0..K-1 of its heads; None: unknown."""
    renamed: tuple[str, ...] = ()
    """Pairs `theirs to ours` of tensors with another name in their file."""
    dropped: tuple[str, ...] = ()
    """Names of the file's tensors that no body has, such as the classifier's."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Which tensors of a detector were loaded."""

    source: str
    loaded: tuple[str, ...]
    """Names of loaded tensors, with the number of rows if not all were loaded."""
    renamed: tuple[str, ...]
    """Those that have another name in the source, as `theirs to ours`."""
    dropped: tuple[str, ...]
    """Names of the source's tensors that were not used, and why."""
    new: tuple[str, ...]
    """Names of tensors that keep their random values."""
    warnings: tuple[str, ...]
    """Settings that make training fail quietly."""

    def lines(self) -> list[str]:
        """Format the report: counts by part of the model, dropped tensors, warnings."""
        lines = [f"initial weights: {self.source}"]
        if self.loaded:
            lines.append(f"  loaded {len(self.loaded)}: {_by_part(self.loaded)}")
            lines += [f"    {entry}" for entry in self.loaded if " " in entry]
        if self.renamed:
            lines.append(f"  renamed {len(self.renamed)}, the first {self.renamed[0]}")
        if self.dropped:
            lines.append(f"  dropped {len(self.dropped)}: {_by_part(self.dropped)}")
            lines += [f"    {entry}" for entry in self.dropped[:_MOST_DROPS]]
            if len(self.dropped) > _MOST_DROPS:
                lines.append(f"    and {len(self.dropped) - _MOST_DROPS} more")
        # Not for a model with random weights, where everything is new.
        if self.new and (self.loaded or self.dropped):
            lines.append(f"  left random {len(self.new)}: {_by_part(self.new)}")
        return lines + [f"  warning: {warning}" for warning in self.warnings]


def _by_part(names: Sequence[str]) -> str:
    """Count as in `backbone 120, transformer 60, class_embed 2`."""
    parts = Counter(name.split(".", 1)[0] for name in names)
    return ", ".join(f"{part} {count}" for part, count in parts.items())


def load_initial_weights(
    detector: Detector, model: params.Model, class_names: Sequence[str], root: Path | None = None
) -> LoadReport:
    """Load the weights that `model.init_from` or `model.backbone_weights` names.

    Args:
        detector: from `build_model(model, len(class_names))`; changed in place.
        model: section `model` of params.yaml.
        class_names: names of classes 0..K-1, to match the heads' rows.
        root: folder that relative paths start from; None: the current one.

    Raises:
        ModelError: a file is missing, is no weights file, or hardly fits; or a download failed.
    """
    target = detector.state_dict()  # refers to the parameters: copying into it loads them
    source, warnings = _source(model, root or Path()), _warnings(model)
    if source is None:
        return LoadReport("random weights", (), (), (), tuple(target), warnings)
    state, unused = _usable(source.state, "proposal_head.class_embed.weight" in target)
    loaded, new, dropped = [], [], [*source.dropped, *unused]
    for name, ours in target.items():
        if name.endswith(_COUNTER):
            continue
        if name not in state:
            new.append(name)
            continue
        try:
            note = _copy(name, ours, state[name], source.class_names, class_names)
            loaded.append(name + note)
        except ValueError as misfit:
            new.append(name)
            dropped.append(f"{name}: {misfit}")
    others = [name for name in state if name not in target and not name.endswith(_COUNTER)]
    dropped += [f"{name}: this model has none" for name in others]
    if len(loaded) < _LEAST_FIT * len(source.state):
        few = f"only {len(loaded)}" if loaded else "none"
        raise ModelError(
            f"{source.name}: {few} of its {counted(len(source.state), 'tensor')} fits this model"
            f" (its first is {next(iter(source.state))}, ours {next(iter(target))})"
        )
    _check_body(source.name, target, new)
    return LoadReport(
        source.name, tuple(loaded), source.renamed, tuple(dropped), tuple(new), warnings
    )


def _check_body(source: str, target: Mapping[str, Tensor], new: Sequence[str]) -> None:
    """Raise ModelError if under half of the body was loaded: the rest would start at random."""
    body = [n for n in target if n.startswith(_BODY) and not n.endswith(_COUNTER)]
    fits = len(body) - sum(name.startswith(_BODY) for name in new)
    if 2 * fits < len(body):
        missing = next(name for name in new if name.startswith(_BODY)).removeprefix(_BODY)
        raise ModelError(
            f"{source}: {fits} of the body's {counted(len(body), 'tensor')} fit, under half"
            f" ({missing} does not); set model.backbone to the body that the weights are of"
        )


def _source(model: params.Model, root: Path) -> PretrainedWeights | None:
    if model.init_from is not None:
        return _read(INIT_FROM, model.init_from, model.backbone, root)
    if model.backbone_weights == "none":
        return None
    return _as_backbone(
        _read(BACKBONE_WEIGHTS, model.backbone_weights, model.backbone, root), model.backbone
    )


def _read(param: str, value: str, backbone: str, root: Path) -> PretrainedWeights:
    """Read the weights that a parameter names; ModelError if a download is not there."""
    path = initial_weights.readable_path(param, value, root, backbone)
    published = pinned_by(param, value, backbone)
    if published and not path.is_file():
        raise ModelError(
            f"{param} = {value}: {path} is not there; `runkey weights {published.name}` gets it"
        )
    source = read_source(path)
    return replace(source, name=published.about) if published else source


def _usable(state: _State, target_is_fast: bool) -> tuple[_State, list[str]]:
    """Return the tensors that mean the same in the target's preset, and why others do not."""
    is_detector = any(name.startswith("class_embed.") for name in state)
    if not is_detector or _is_fast(state) == target_is_fast:
        return state, []
    reason = f"preset {'fast' if _is_fast(state) else 'detr'} computes something else with it"
    refused = [f"{name}: {reason}" for name in state if not name.startswith(_COMMON)]
    return {n: tensor for n, tensor in state.items() if n.startswith(_COMMON)}, refused


def _is_fast(state: _State) -> bool:
    return any(name.startswith("proposal_head.") for name in state)


def _copy(
    name: str, ours: Tensor, found: Tensor, their_names: Sequence[str] | None, names: Sequence[str]
) -> str:
    """Copy the rows of `found` that fit into `ours`; return a note if not all do.

    Raises:
        ValueError: none fits, and why.
    """
    if ours.shape[1:] == found.shape[1:]:
        if name.endswith(_CLASS_ROWS):
            return _copy_classes(ours, found, their_names, names)
        if name.endswith(_QUERY_ROWS):
            rows = min(len(ours), len(found))
            ours[:rows] = found[:rows]
            if len(ours) == len(found):
                return ""
            both = f"of its {len(found)}" if len(found) > rows else f"of {len(ours)}"
            return f" (queries 1 to {rows} {both})"
    if ours.shape != found.shape:
        raise ValueError(f"shape {list(found.shape)}, here {list(ours.shape)}")
    ours.copy_(found)
    return ""


def _copy_classes(
    ours: Tensor, found: Tensor, their_names: Sequence[str] | None, names: Sequence[str]
) -> str:
    """Copy the rows of common classes, and no-object's, which is the last of a softmax head."""
    if their_names is None:
        raise ValueError("it does not say its classes")
    extra = len(found) - len(their_names)
    rows = {_plain(name): row for row, name in enumerate(their_names) if name}
    common = [(row, rows[_plain(name)]) for row, name in enumerate(names) if _plain(name) in rows]
    if extra not in (0, 1) or len(ours) - len(names) != extra or not (common or extra):
        raise ValueError("no class in common")
    for row, their_row in common:
        ours[row] = found[their_row]
    if extra:
        ours[-1] = found[-1]
    if len(common) == len(names) == len(their_names):
        return ""
    missing = [name for name in names if _plain(name) not in rows]
    notes = [f"{len(common)} of {counted(len(names), 'class')}{' and no-object' if extra else ''}"]
    if missing:
        notes.append(f"new: {', '.join(missing)}")
    if len(rows) > len(common):
        notes.append(f"{len(rows) - len(common)} of its {len(rows)} dropped")
    return f" ({'; '.join(notes)})"


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def read_source(path: Path) -> PretrainedWeights:
    """Read a weights file or the folder of a saved model.

    Raises:
        ModelError: see `load_initial_weights`.
    """
    file = initial_weights.weights_file(path)
    try:
        state = _read_state(file)
    except FileNotFoundError:
        raise ModelError(f"{file}: not found; mend model.init_from or .backbone_weights") from None
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from None
    return PretrainedWeights(str(path), state, _class_names(file, state))


def _class_names(file: Path, state: _State) -> list[str] | None:
    """Class names from the card beside a saved model; COCO's for a head of the reference's size."""
    if file.name in (WEIGHTS, OLD_WEIGHTS) and file.with_name(CARD).is_file():
        return [entry.name for entry in read_card(file.parent).classes]
    head = state.get("class_embed.weight")
    is_reference = head is not None and len(head) == NUM_COCO_IDS + 1 and not _is_fast(state)
    return coco_names() if is_reference else None


def _as_backbone(source: PretrainedWeights, backbone: str) -> PretrainedWeights:
    """Return the backbone of a detector, or a backbone's own weights by a detector's names."""
    state = source.state
    if own := {n: tensor for n, tensor in state.items() if n.startswith(_BODY)}:
        return PretrainedWeights(source.name, own, None)
    body = backbones.rename(backbone, state)
    ours = {id(tensor): name for name, tensor in body.items()}
    pairs = [(name, ours.get(id(tensor))) for name, tensor in state.items()]
    renamed = tuple(f"{old} to {new}" for old, new in pairs if new not in (None, old))
    dropped = tuple(f"{old}: not of the body" for old, new in pairs if new is None)
    named = {_BODY + name: tensor for name, tensor in body.items()}
    return PretrainedWeights(source.name, named, None, renamed, dropped)


def _warnings(model: params.Model) -> tuple[str, ...]:
    """Return the settings that train badly without an error."""
    random = model.init_from is None and model.backbone_weights == "none"
    is_dc5 = (model.init_from or "").endswith("-dc5")
    settings = (
        (
            random and model.norm == "frozen",
            "model.norm: frozen without pretrained weights: no layer of the backbone is"
            " normalised; set norm: live, or backbone_weights: imagenet",
        ),
        (
            random and model.frozen_stages,
            f"model.frozen_stages: {model.frozen_stages} without pretrained weights: these stages"
            " stay random; set frozen_stages: 0, or backbone_weights: imagenet",
        ),
        (
            model.init_from is not None and model.backbone_weights != "none",
            f"model.backbone_weights: {model.backbone_weights} is not read, as model.init_from"
            " brings a backbone",
        ),
        (
            model.init_from in DETECTORS and model.dilation != is_dc5,
            f"model.dilation: {str(model.dilation).lower()}, while the weights are of a model"
            f" {'with' if is_dc5 else 'without'} dilation",
        ),
    )
    return tuple(text for is_set, text in settings if is_set)
