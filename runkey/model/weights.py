"""Load initial weights: a pretrained backbone or a detector, its heads matched by class name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from runkey import params
from runkey.errors import ModelError
from runkey.model.detr import Detector
from runkey.model.model_files import (
    CARD,
    OLD_WEIGHTS,
    WEIGHTS,
    read_card,
    read_weights,
    weights_file,
)

# Names of COCO's category ids, for heads trained with ids as class indices. The ids run to 90 with
# gaps: (first id, names of it and the ids after it).
_RUNS: tuple[tuple[int, str], ...] = (
    (1, "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant"),
    (13, "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe"),
    (27, "backpack,umbrella"),
    (31, "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat"),
    (40, "baseball glove,skateboard,surfboard,tennis racket,bottle"),
    (46, "wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot"),
    (58, "hot dog,pizza,donut,cake,chair,couch,potted plant,bed"),
    (67, "dining table"),
    (70, "toilet"),
    (72, "tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator"),
    (84, "book,clock,vase,scissors,teddy bear,hair drier,toothbrush"),
)

NUM_COCO_IDS = 91
"""Logits of the reference's COCO models without no-object: ids 0..90."""


def coco_names() -> list[str]:
    """Return the name of each id 0..90, empty where COCO has no category."""
    names = [""] * NUM_COCO_IDS
    for first, run in _RUNS:
        for offset, name in enumerate(run.split(",")):
            names[first + offset] = name
    return names


# Tensors with a row per class, and with a row per query.
_CLASS_ROWS = ("class_embed.weight", "class_embed.bias", "label_embed.weight")
_QUERY_ROWS = ("query_embed.weight", "query_content.weight")
# What both presets compute in the same way under the same name.
_COMMON = ("backbone.", "transformer.encoder.")
_MOST_DROPS = 12


@dataclass(frozen=True, slots=True)
class PretrainedWeights:
    """Weights to start from."""

    name: str
    """Its name in messages."""
    state: dict[str, Tensor]
    class_names: list[str] | None
    """Classes 0..K-1 of its heads; None: unknown."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Which tensors of a detector were loaded."""

    source: str
    loaded: tuple[str, ...]
    """Names of loaded tensors, with the number of rows if not all were loaded."""
    dropped: tuple[str, ...]
    """Names of the source's tensors that were not used, and why."""
    new: tuple[str, ...]
    """Names of tensors that keep their random values."""
    warnings: tuple[str, ...] = ()
    """Settings that make training fail quietly."""

    def lines(self) -> list[str]:
        """Format the report: counts by part of the model, dropped tensors, warnings."""
        lines = [f"initial weights: {self.source}"]
        if self.loaded:
            lines.append(f"  loaded {len(self.loaded)}: {_by_part(self.loaded)}")
            lines += [f"    {entry}" for entry in self.loaded if " " in entry]
        if self.dropped:
            lines.append(f"  dropped {len(self.dropped)}: {_by_part(self.dropped)}")
            lines += [f"    {entry}" for entry in self.dropped[:_MOST_DROPS]]
            if len(self.dropped) > _MOST_DROPS:
                lines.append(f"    and {len(self.dropped) - _MOST_DROPS} more")
        # Not for a model with random weights, where everything is new.
        if self.new and (self.loaded or self.dropped):
            lines.append(f"  new {len(self.new)}: {_by_part(self.new)}")
        return lines + [f"  warning: {warning}" for warning in self.warnings]


def transfer(
    detector: Detector,
    source: PretrainedWeights,
    class_names: Sequence[str],
    warnings: tuple[str, ...],
) -> LoadReport:
    """Copy the tensors that fit into `detector`, in place.

    Args:
        detector: keeps its random values where nothing fits.
        source: the weights.
        class_names: the detector's classes 0..K-1.
        warnings: passed on to the report.

    Raises:
        ModelError: nothing fits.
    """
    target = detector.state_dict()  # refers to the parameters: copying into it loads them
    state, dropped = _usable(source, "proposal_head.class_embed.weight" in target)
    their_names = _source_class_names(source)
    loaded, new = [], []
    for name, ours in target.items():
        if name.endswith("num_batches_tracked"):
            continue
        found = state.get(name)
        note = None if found is None else _copy(name, ours, found, their_names, class_names)
        if found is None or note is None:
            new.append(name)
            if found is not None:
                dropped.append(f"{name}: {_why(name, ours, found, their_names)}")
        else:
            loaded.append(f"{name}{note}")
    dropped += [
        f"{name}: this model has none"
        for name in state
        if name not in target and not name.endswith("num_batches_tracked")
    ]
    if not loaded:
        raise ModelError(
            f"{source.name}: none of its {len(source.state)} tensors fits this model"
            f" (its first is {next(iter(source.state))}, ours {next(iter(target))})"
        )
    return LoadReport(source.name, tuple(loaded), tuple(dropped), tuple(new), warnings)


def _usable(source: PretrainedWeights, target_is_fast: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The source's tensors that mean the same in the target's preset, and why others do not."""
    state = source.state
    is_detector = any(name.startswith("class_embed.") for name in state)
    if not is_detector or _is_fast(state) == target_is_fast:
        return state, []
    reason = f"preset {'fast' if _is_fast(state) else 'detr'} computes something else with it"
    refused = [f"{name}: {reason}" for name in state if not name.startswith(_COMMON)]
    return {n: tensor for n, tensor in state.items() if n.startswith(_COMMON)}, refused


def _is_fast(state: dict[str, Tensor]) -> bool:
    return any(name.startswith("proposal_head.") for name in state)


def _source_class_names(source: PretrainedWeights) -> list[str] | None:
    """The source's class names; COCO's for a head of the reference's size."""
    head = source.state.get("class_embed.weight")
    if source.class_names is None and head is not None and not _is_fast(source.state):
        return coco_names() if len(head) == NUM_COCO_IDS + 1 else None
    return source.class_names


def _copy(
    name: str, ours: Tensor, found: Tensor, their_names: Sequence[str] | None, names: Sequence[str]
) -> str | None:
    """Copy the rows of `found` that fit into `ours`.

    Returns:
        "" if all rows were copied, a note if some were, None if none was.
    """
    if name.endswith(_CLASS_ROWS):
        return _copy_classes(ours, found, their_names, names)
    if name.endswith(_QUERY_ROWS) and ours.shape[1:] == found.shape[1:]:
        rows = min(len(ours), len(found))
        ours[:rows] = found[:rows]
        return "" if len(ours) == len(found) else f" (queries 1 to {rows} of {len(ours)})"
    if ours.shape != found.shape:
        return None
    ours.copy_(found)
    return ""


def _copy_classes(
    ours: Tensor, found: Tensor, their_names: Sequence[str] | None, names: Sequence[str]
) -> str | None:
    """Copy the rows of common classes, and no-object's, which is the last of a softmax head."""
    if their_names is None or ours.shape[1:] != found.shape[1:]:
        return None
    extra = len(found) - len(their_names)
    if extra not in (0, 1) or len(ours) - len(names) != extra:
        return None
    rows = {_plain(name): row for row, name in enumerate(their_names) if name}
    common = [(row, rows[_plain(name)]) for row, name in enumerate(names) if _plain(name) in rows]
    for row, their_row in common:
        ours[row] = found[their_row]
    if extra:
        ours[-1] = found[-1]
    if not common and not extra:
        return None
    if len(common) == len(names) == len(their_names):
        return ""
    missing = [name for name in names if _plain(name) not in rows]
    also = " and no-object" if extra else ""
    note = f" ({len(common)} of {len(names)} classes{also}"
    return f"{note}; new: {', '.join(missing)})" if missing else f"{note})"


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def _why(name: str, ours: Tensor, found: Tensor, their_names: Sequence[str] | None) -> str:
    """Why a tensor of the right name was not loaded."""
    if name.endswith(_CLASS_ROWS) and ours.shape[1:] == found.shape[1:]:
        return "it does not say its classes" if their_names is None else "no class in common"
    return f"shape {list(found.shape)}, here {list(ours.shape)}"


def _by_part(names: Sequence[str]) -> str:
    """Counts as in `backbone 120, transformer 60, class_embed 2`."""
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

    Returns:
        What was loaded and dropped, what stays random, and warnings about settings.

    Raises:
        ModelError: a file is missing, is no weights file, or does not fit; or a download failed.
    """
    warnings = _warnings(model)
    if model.init_from is not None:
        path = (root or Path()) / model.init_from
        return transfer(detector, read_source(path), class_names, warnings)
    if model.backbone_weights == "none":
        return LoadReport("random weights", (), (), tuple(detector.state_dict()), warnings)
    if model.backbone_weights == "imagenet":
        source = PretrainedWeights(
            "torchvision's ImageNet weights", _imagenet(model.backbone), None
        )
    else:
        source = read_source((root or Path()) / model.backbone_weights)
    return transfer(detector, _as_backbone(source), class_names, warnings)


def read_source(path: Path) -> PretrainedWeights:
    """Read a weights file or the folder of a saved model.

    Raises:
        ModelError: see `load_initial_weights`.
    """
    file = weights_file(path) if path.is_dir() else path
    try:
        loaded = read_weights(file)
    except FileNotFoundError:
        raise ModelError(f"{file}: not found; mend model.init_from or .backbone_weights") from None
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"{file}: no weights file that is safe to load ({str(error)[:90]}); save its tensors"
            ' alone with torch.save({"model": model.state_dict()}, file)'
        ) from None
    return PretrainedWeights(str(path), _tensors(loaded, file), _class_names(file))


def _tensors(loaded: object, file: Path) -> dict[str, Tensor]:
    """The state dict in a loaded file: under `model`, under `state_dict`, or the whole."""
    if isinstance(loaded, dict):
        for key in ("model", "state_dict"):
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not loaded:
        raise ModelError(f"{file}: holds no state dict; expected names with tensors, or 'model'")
    odd = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
    if odd:
        raise ModelError(f"{file}: {odd[0]!r} is no tensor; expected a state dict, or 'model'")
    return loaded


def _class_names(file: Path) -> list[str] | None:
    """Class names of a saved model, from the card beside its weights."""
    if file.name not in (WEIGHTS, OLD_WEIGHTS) or not file.with_name(CARD).is_file():
        return None
    return [entry.name for entry in read_card(file.parent).classes]


def _imagenet(backbone: str) -> dict[str, Tensor]:
    """Torchvision's first ImageNet weights, which DETR starts from; cached by torch.hub."""
    from torchvision import models  # seconds of import that other weights do not need

    weights = models.get_model_weights(backbone)["IMAGENET1K_V1"]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            weights.url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (URLError, OSError, RuntimeError) as error:
        file = weights.url.rsplit("/", 1)[-1]
        raise ModelError(
            f"model.backbone_weights: imagenet: {backbone}'s weights could not be downloaded"
            f" ({' '.join(str(error).split())[:90]}); place {file} in {folder},"
            " or name its path in model.backbone_weights"
        ) from None
    return state


def _as_backbone(source: PretrainedWeights) -> PretrainedWeights:
    """The backbone of a detector's state dict, or a backbone's own under a detector's names."""
    prefix = "backbone.0.body."
    if any(name.startswith(prefix) for name in source.state):
        state = {n: t for n, t in source.state.items() if n.startswith(prefix)}
    else:
        # fc is the classifier of ImageNet's 1000 classes.
        state = {prefix + n: t for n, t in source.state.items() if not n.startswith("fc.")}
    return PretrainedWeights(source.name, state, None)


def _warnings(model: params.Model) -> tuple[str, ...]:
    """Settings that train badly without an error."""
    warnings = []
    pretrained = model.init_from is not None or model.backbone_weights != "none"
    if model.norm == "frozen" and not pretrained:
        warnings.append(
            "model.norm: frozen without pretrained weights: no layer of the backbone is"
            " normalised; set norm: live, or backbone_weights: imagenet"
        )
    if model.frozen_stages and not pretrained:
        warnings.append(
            f"model.frozen_stages: {model.frozen_stages} without pretrained weights: these stages"
            " stay random; set frozen_stages: 0, or backbone_weights: imagenet"
        )
    if model.init_from is not None and model.backbone_weights != "none":
        warnings.append(
            f"model.backbone_weights: {model.backbone_weights} is not read, as model.init_from"
            " brings a backbone"
        )
    return tuple(warnings)
