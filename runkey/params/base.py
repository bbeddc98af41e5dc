"""What every section of params.yaml shares: frozen, unknown keys refused, bool is not a number."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A section of params.yaml.  Values are checked when it is made and cannot be changed after."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not true/false, is wanted here")
    return value


_not_bool = BeforeValidator(_no_bool)

Int = Annotated[int, _not_bool]
Float = Annotated[float, _not_bool]
PositiveInt = Annotated[int, _not_bool, Field(ge=1)]
Count = Annotated[int, _not_bool, Field(ge=0)]
PositiveFloat = Annotated[float, _not_bool, Field(gt=0)]
NonNegativeFloat = Annotated[float, _not_bool, Field(ge=0)]
Fraction = Annotated[float, _not_bool, Field(ge=0, le=1)]
