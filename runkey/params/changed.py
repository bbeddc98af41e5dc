"""Which parameters are not as the schema has them by default."""

from __future__ import annotations

import json
from collections.abc import Mapping

from runkey.params.load import parse_params

ALWAYS = ("lr", "seed")
"""Those without a default."""


def as_text(value: object) -> str:
    """A parameter as MLflow and records have it: 5e-05, true, [120, 140], none."""
    return value if isinstance(value, str) else json.dumps(value)


def changed_params(values: Mapping[str, str]) -> dict[str, str]:
    """Those of the parameters, by dotted name as text, that are not the default."""
    plain = parse_params({"lr": 1.0, "seed": 0}).flat(runtime=True)
    default = {name: as_text(value) for name, value in plain.items()}
    return {n: v for n, v in values.items() if n in ALWAYS or v != default.get(n)}
