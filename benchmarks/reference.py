"""The reference DETR (facebookresearch/detr), built for our parameters.

    reference = open_reference(Path(".reference/detr"), Path("somewhere/empty"))
    network, criterion = reference.build(load_params(Path("params.yaml")).model)

`make reference` clones it. The parity tests and the benchmarks use it.
"""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
import tarfile
import warnings
from argparse import Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runkey import params

COMMIT = "29901c5"


@dataclass(frozen=True, slots=True)
class Reference:
    """Modules of the reference."""

    detr: Any
    misc: Any
    coco: Any
    """Its `datasets.coco`; None without pycocotools."""

    def build(self, model: params.Model, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
        """Return the network, with random weights, and its losses; K = 91."""
        arguments = Namespace(
            dataset_file="coco",
            device=str(torch.get_default_device()),
            masks=False,
            hidden_dim=model.hidden_dim,
            position_embedding="sine",
            lr_backbone=1e-5,
            backbone=model.backbone,
            dilation=model.dilation,
            dropout=dropout,
            nheads=model.num_heads,
            dim_feedforward=model.feedforward_dim,
            enc_layers=model.encoder_layers,
            dec_layers=model.decoder_layers,
            pre_norm=False,
            num_queries=model.num_queries,
            aux_loss=True,
            set_cost_class=1,
            set_cost_bbox=5,
            set_cost_giou=2,
            bbox_loss_coef=5,
            giou_loss_coef=2,
            eos_coef=model.loss.no_object,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision calls its way of asking for none outdated
            network, criterion, _ = self.detr.build(arguments)
        return network, criterion


def open_reference(repository: Path, folder: Path) -> Reference:
    """Check the reference out of a clone or a mirror into an empty folder, and import it."""
    archive = subprocess.run(
        ["git", "-C", str(repository), "archive", COMMIT, "models", "util", "datasets"],
        check=True,
        capture_output=True,
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    sys.path.insert(0, str(folder))
    try:
        names = ("models.detr", "models.backbone", "util.misc")
        detr, backbone, misc = map(importlib.import_module, names)
        coco = importlib.import_module("datasets.coco") if find_spec("pycocotools") else None
    finally:
        sys.path.remove(str(folder))
    # The rank that is not the main one does not download weights.
    backbone.is_main_process = lambda: False  # type: ignore[attr-defined]
    return Reference(detr, misc, coco)
