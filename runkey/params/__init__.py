"""params.yaml: its schema, its only reader, and the presets.

    params = load_params(root / "params.yaml")
    params.lr, params.model.num_queries

The file is YAML 1.2, as DVC reads it: PyYAML would read the `5e-05` that `dvc exp run -S lr=5e-5`
writes as a string.
"""

from __future__ import annotations

from runkey.params.load import as_text, changed_params, load_params, override, parse_params
from runkey.params.schema import (
    Augment,
    Checks,
    Clip,
    Data,
    EarlyStopping,
    Model,
    Optimizer,
    Params,
    Runtime,
    Schedule,
    Training,
)

__all__ = [
    "Augment",
    "Checks",
    "Clip",
    "Data",
    "EarlyStopping",
    "Model",
    "Optimizer",
    "Params",
    "Runtime",
    "Schedule",
    "Training",
    "as_text",
    "changed_params",
    "load_params",
    "override",
    "parse_params",
]
