"""Weights in: pretrained backbones and whole detectors, with heads matched by class name."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from runkey import params
from runkey.errors import ModelError
from runkey.model.detector import Detector
from runkey.model.model_files import CARD, WEIGHTS, read_card
from runkey.model.transfer import LoadReport, Source, transfer


def load_initial_weights(
    detector: Detector, model: params.Model, class_names: Sequence[str], root: Path | None = None
) -> LoadReport:
    """Put `model.init_from`'s or `model.backbone_weights`' weights into a new detector.

    Args:
        detector: from `build_model(model, len(class_names))`; changed in place.
        model: section `model` of params.yaml.
        class_names: names of classes 0..K-1, to find heads' rows by.
        root: folder that relative files are relative to; None: the current one.

    Returns:
        What was loaded, dropped and left new, and warnings about quietly bad settings.

    Raises:
        ModelError: a file is missing, is no weights file, or fits nowhere; or a download failed.
    """
    warnings = _warnings(model)
    if model.init_from is not None:
        path = (root or Path()) / model.init_from
        return transfer(detector, read_source(path), class_names, warnings)
    if model.backbone_weights == "none":
        return LoadReport("random weights", (), (), tuple(detector.state_dict()), warnings)
    if model.backbone_weights == "imagenet":
        source = Source("torchvision's ImageNet weights", _imagenet(model.backbone), None)
    else:
        source = read_source((root or Path()) / model.backbone_weights)
    return transfer(detector, _as_backbone(source), class_names, warnings)


def read_source(path: Path) -> Source:
    """A weights file, or the folder of one of our models, with its classes where they are known.

    Raises:
        ModelError: see `load_initial_weights`.
    """
    file = path / WEIGHTS if path.is_dir() else path
    try:
        # The reference's training checkpoints hold their command line too; it is only read past.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{file}: not found; mend model.init_from or .backbone_weights") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "cut short"
        raise ModelError(
            f"{file}: no weights file that is safe to load ({reason[:90]}); save its tensors alone"
            ' with torch.save({"model": model.state_dict()}, file)'
        ) from None
    return Source(str(path), _tensors(loaded, file), _class_names(file))


def _tensors(loaded: object, file: Path) -> dict[str, Tensor]:
    """The state dict in what was loaded, under `model`, `state_dict` or itself."""
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
    """Names of the classes of one of our models, from the card beside its weights."""
    if file.name != WEIGHTS or not file.with_name(CARD).is_file():
        return None
    return [entry.name for entry in read_card(file.parent).classes]


def _imagenet(backbone: str) -> dict[str, Tensor]:
    """The ImageNet weights that DETR starts from, torchvision's first; cached by torch.hub."""
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


def _as_backbone(source: Source) -> Source:
    """A backbone's own state dict under a detector's names; a detector's is cut to its backbone."""
    prefix = "backbone.0.body."
    if any(name.startswith(prefix) for name in source.state):
        state = {n: t for n, t in source.state.items() if n.startswith(prefix)}
    else:
        # fc is the classifier of ImageNet's 1000 classes.
        state = {prefix + n: t for n, t in source.state.items() if not n.startswith("fc.")}
    return Source(source.name, state, None)


def _warnings(model: params.Model) -> tuple[str, ...]:
    """Settings that train, but badly, and would say nothing."""
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
