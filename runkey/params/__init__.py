"""params.yaml: the schema, and its one reader.

    params = load_params(root / "params.yaml")
    params.lr, params.model.num_queries

YAML 1.2, as DVC reads it: PyYAML would turn the `5e-05` that `dvc exp run -S lr=5e-5` writes into
a string.
"""

from __future__ import annotations

from runkey.params.data import Augment, Checks, Data
from runkey.params.load import load_params, override, parse_params
from runkey.params.model import Denoising, LossWeights, Model
from runkey.params.root import Params
from runkey.params.training import (
    Clip,
    EarlyStopping,
    Evaluate,
    Memory,
    Optimizer,
    Runtime,
    Schedule,
    Training,
)

__all__ = [
    "Augment",
    "Checks",
    "Clip",
    "Data",
    "Denoising",
    "EarlyStopping",
    "Evaluate",
    "LossWeights",
    "Memory",
    "Model",
    "Optimizer",
    "Params",
    "Runtime",
    "Schedule",
    "Training",
    "load_params",
    "override",
    "parse_params",
]
