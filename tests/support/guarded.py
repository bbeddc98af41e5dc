"""Trainings with a small guard, and windows whose numbers are huge at some steps."""

import dataclasses

import torch

from runkey.model.criterion import build_criterion
from runkey.training.build import TrainContext
from tests.support.fitting import build
from tests.support.squares import CLASSES, detector_params

LAYER = "transformer.encoder.layers.0.linear2"
GUARD = {"max_skips": 3, "window_steps": 50, "anchor_steps": 4, "max_rollbacks": 1}


def poisoned(steps, factor=1e38):
    """Windows with one true box whose numbers are huge, at some steps."""

    def change(step, window):
        if step not in steps:
            return window
        boxes = window[0].boxes_cxcywh.clone()
        boxes[0] *= factor
        return (dataclasses.replace(window[0], boxes_cxcywh=boxes), *window[1:])

    return change


def guarded(guard=None, **sections):
    training = {"epochs": 4, "guard": GUARD | (guard or {})} | sections.pop("training", {})
    return detector_params(training=training, **sections)


def context_of(parameters, model, loader) -> TrainContext:
    return build(model, build_criterion(parameters.model, CLASSES), loader, parameters)


def bits(tree):
    """All tensors as bytes (torch.equal takes -0 for 0), but for the planted module's counter."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone().contiguous().numpy().tobytes()
    if isinstance(tree, dict):
        return {k: bits(v) for k, v in tree.items() if not str(k).endswith((".count", "updates"))}
    return [bits(item) for item in tree] if isinstance(tree, list | tuple) else tree
