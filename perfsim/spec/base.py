"""The base of every description: frozen, closed to unknown keys, finite, and comparable by content."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from perfsim.errors import InputError
from perfsim.units import parse_quantity


class Spec(BaseModel):
    """A frozen description; an unknown key, NaN or infinity is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def _quantity(dimension: str) -> BeforeValidator:
    def parse(value: object) -> object:
        if not isinstance(value, (str, int, float)):
            return value
        try:
            return parse_quantity(value, dimension)
        except InputError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(parse, json_schema_input_type=float | str)


Bytes = Annotated[float, _quantity("bytes"), Field(ge=0)]
Bandwidth = Annotated[float, _quantity("bytes/s"), Field(gt=0)]
Seconds = Annotated[float, _quantity("seconds"), Field(ge=0)]
FlopRate = Annotated[float, _quantity("FLOP/s"), Field(gt=0)]
Hertz = Annotated[float, _quantity("hertz"), Field(gt=0)]
Watts = Annotated[float, _quantity("watts"), Field(ge=0)]
