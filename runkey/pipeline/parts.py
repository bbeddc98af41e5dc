"""What more than one stage needs: the validation, the step that is measured, JSON files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runkey import paths
from runkey.data.index import ClassName, Record, read_classes, read_index
from runkey.data.loader import EvalLoader, build_eval_loader
from runkey.evaluation.run import Evaluation, evaluate_model
from runkey.model.criterion import Criterion, build_criterion
from runkey.model.postprocess import Postprocess, build_postprocess
from runkey.params import Model as ModelParams
from runkey.params import Params
from runkey.training.device import Precision, build_precision, choose_precision


@dataclass(frozen=True)
class Validation:
    """Judges a model on the held-out images; the same in training and in the last stage."""

    records: list[Record]
    classes: list[ClassName]
    loader: EvalLoader
    postprocess: Postprocess
    criterion: Criterion
    precision: Precision

    def __call__(self, model: nn.Module, *, by_size: bool = True) -> Evaluation:
        """Detections, COCO numbers (by object size, too) and losses of a model on its device."""
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
    """The validation of `root`'s prepared data, of a model with the parameters `model`."""
    prepared = root / paths.PREPARED
    classes = read_classes(prepared / "classes.json")
    loader = build_eval_loader(params, root)
    dtype, _ = choose_precision(params.training.precision, device)
    return Validation(
        records=read_index(prepared / "val.json"),
        classes=classes,
        loader=loader,
        postprocess=build_postprocess(model),
        criterion=build_criterion(model, len(classes)),
        precision=build_precision(dtype, device),
    )


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
