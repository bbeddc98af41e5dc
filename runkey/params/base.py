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
        raise ValueError("should be a number, not true or false")
    return value


_not_bool = BeforeValidator(_no_bool)

# The range first, so that it stays on the number and the JSON schema shows it.
PositiveInt = Annotated[int, Field(ge=1), _not_bool]
Count = Annotated[int, Field(ge=0), _not_bool]
Seed = Annotated[int, Field(ge=0, lt=2**32), _not_bool]
Stages = Annotated[int, Field(ge=0, le=5), _not_bool]
PositiveFloat = Annotated[float, Field(gt=0), _not_bool]
NonNegativeFloat = Annotated[float, Field(ge=0), _not_bool]
Fraction = Annotated[float, Field(ge=0, le=1), _not_bool]
BelowOne = Annotated[float, Field(ge=0, lt=1), _not_bool]
OpenFraction = Annotated[float, Field(gt=0, lt=1), _not_bool]
Percent = Annotated[float, Field(gt=0, le=100), _not_bool]
Rate = Annotated[float, Field(gt=0, le=1), _not_bool]
