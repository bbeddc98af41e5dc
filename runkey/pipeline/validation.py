"""The evaluation on the val split, the same during training and in the evaluate stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from runkey import paths
from runkey.data.index import ClassName, ImageRecord, read_classes, read_index
from runkey.data.loader import EvalLoader, build_eval_loader
from runkey.evaluation.run import Evaluation, evaluate_model
from runkey.model.criterion import Criterion, build_criterion
from runkey.model.postprocess import Postprocess, build_postprocess
from runkey.params import Model as ModelParams
from runkey.params import Params
from runkey.training.device import Precision, build_precision


@dataclass(frozen=True)
class Validation:
    """Evaluates a model on the val images."""

    records: list[ImageRecord]
    classes: list[ClassName]
    loader: EvalLoader
    postprocess: Postprocess
    criterion: Criterion
    precision: Precision

    def __call__(self, model: nn.Module, *, by_size: bool = True) -> Evaluation:
        """Compute detections, COCO metrics (also by object size) and losses of a model.

        It is on the device of the validation, in evaluation mode.
        """
        return evaluate_model(
            model,
            self.postprocess,
            self.loader,
            self.records,
            self.classes,
            self.precision.device,
            autocast=self.precision.autocast,
            criterion=self.criterion,
            by_size=by_size,
        )


def build_validation(
    params: Params, model: ModelParams, root: Path, device: torch.device
) -> Validation:
    """Build the validation of a model on a workspace's prepared data.

    Raises:
        DataError: the data set is not prepared.
    """
    prepared = root / paths.PREPARED
    classes = read_classes(prepared / "classes.json")
    loader = build_eval_loader(params, root)
    return Validation(
        records=read_index(prepared / "val.json"),
        classes=classes,
        loader=loader,
        postprocess=build_postprocess(model),
        criterion=build_criterion(model, len(classes)),
        precision=build_precision(params.training.precision, device),
    )
