"""What all records are made of."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

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

Count = Annotated[int, Field(ge=0)]
Nanoseconds = Annotated[int, Field(gt=0)]
ConfigValue = int | str | bool
TIE = 1.01  # times the fastest: configurations no slower are as fast


class Record(BaseModel):
    # extra="ignore": derived columns are written for scripts and recomputed on reading.
    model_config = ConfigDict(
        extra="ignore", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
