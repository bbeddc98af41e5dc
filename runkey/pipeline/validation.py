"""The evaluation on the val split, the same during training and in the evaluate stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from runkey import paths
from runkey.data.index import ClassName, ImageRecord, read_classes, read_index
from runkey.data.loader import build_eval_loader
from runkey.evaluation.run import Evaluation, evaluate_model
from runkey.model.criterion import build_criterion
from runkey.model.postprocess import build_postprocess
from runkey.params import Model, Params
from runkey.training.device import build_precision


@dataclass(frozen=True)
class Validation:
    """The val images, and what evaluates a model on them."""

    records: list[ImageRecord]
    classes: list[ClassName]
    evaluate: Callable[..., Evaluation]
    """`evaluate_model` of a model on the validation's device; takes `by_size` too."""


def build_validation(params: Params, model: Model, root: Path, device: torch.device) -> Validation:
    """Build the validation of a model on a workspace's prepared data.

    Raises:
        DataError: the data set is not prepared.
    """
    prepared = root / paths.PREPARED
    records, classes = read_index(prepared / "val.json"), read_classes(prepared / "classes.json")
    evaluate = partial(
        evaluate_model,
        postprocess=build_postprocess(model),
        batches=build_eval_loader(params, root),
        records=records,
        classes=classes,
        device=device,
        autocast=build_precision(params.training.precision, device).autocast,
        criterion=build_criterion(model, len(classes)),
    )
    return Validation(records, classes, evaluate)
