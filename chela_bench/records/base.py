"""What all records are made of."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

Outcome = Literal[
    "ok", "wrong", "oom", "out_of_resources", "compile_error", "timeout", "crash", "skipped"
]
Direction = Literal["fwd", "bwd", "fwdbwd", "decode"]
DType = Literal["fp32", "bf16", "fp16"]
Timer = Literal["event", "profiler"]
L2 = Literal["cold", "warm"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
DTYPES: tuple[DType, ...] = get_args(DType)

_MOST = 2**63  # no measured figure comes near it; a table's column and a float take what is below
_MOST_MODELLED = 2**256  # formulas answer for shapes that no machine holds
Count = Annotated[int, Field(ge=0, lt=_MOST)]
Modelled = Annotated[int, Field(ge=0, lt=_MOST_MODELLED)]
ModelledNanoseconds = Annotated[int, Field(gt=0, lt=_MOST_MODELLED)]
Size = Annotated[int, Field(ge=1, lt=_MOST)]
Nanoseconds = Annotated[int, Field(gt=0, lt=_MOST)]


def _in_64_bits(value: int | str | bool) -> int | str | bool:
    if isinstance(value, int) and not -_MOST < value < _MOST:
        raise ValueError("an integer of 64 bits was wanted")
    return value


ConfigValue = Annotated[int | str | bool, AfterValidator(_in_64_bits)]
TIE = 1.01  # times the fastest: configurations no slower are as fast


class Record(BaseModel):
    # extra="ignore": derived columns are written for scripts and recomputed on reading.
    model_config = ConfigDict(
        extra="ignore", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
