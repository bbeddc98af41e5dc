"""The evaluation on a held-out split, the same during training and in the evaluate stage."""

from __future__ import annotations

from pathlib import Path

import torch

from runkey import paths
from runkey.data.dataset import Normalisation
from runkey.data.index import SplitName, index_file, read_classes, read_index
from runkey.data.loader import build_eval_loader
from runkey.evaluation.run import Validation
from runkey.model.backbones import spec_of
from runkey.model.criterion import build_criterion
from runkey.model.postprocess import build_postprocess
from runkey.params import Model, Params
from runkey.training.device import build_precision


def build_validation(
    params: Params, model: Model, root: Path, device: torch.device, split: SplitName = "val"
) -> Validation:
    """Build the validation of a model on a workspace's prepared data; DataError without them."""
    prepared = root / paths.PREPARED
    classes = read_classes(prepared / "classes.json")
    spec = spec_of(model.backbone)
    return Validation(
        records=list(read_index(index_file(prepared, split))),
        classes=classes,
        batches=build_eval_loader(params, root, split),
        device=device,
        postprocess=build_postprocess(model),
        criterion=build_criterion(model, len(classes)),
        autocast=build_precision(params.training.precision, device).autocast,
        normalisation=Normalisation(spec.mean, spec.std),
    )
