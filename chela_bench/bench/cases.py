"""What goes down the pipe to a worker: the session's settings, then one case at a time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from chela_bench.records import L2, ConfigValue, Direction, DType, Timer, point_key

Seconds = Annotated[float, Field(gt=0, le=604_800, allow_inf_nan=False, strict=True)]
Distribution = Literal["randn", "mean1"]
GpmWay = Literal["no", "where it can", "or refuse"]


class Limits(BaseModel):
    """Where the bench gives up, in seconds. They end a point, never the sweep."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    call_s: Seconds = 1.0
    """One call estimated above this is skipped untried."""
    sample_s: Seconds = 1.0
    """Timed samples of one point."""
    build_s: Seconds = 300.0
    """First call at a shape: compiling and autotuning."""
    phase_s: Seconds = 60.0
    """Any other phase of one point; at least 4 call_s + sample_s."""

    @model_validator(mode="after")
    def _sampling_fits_a_phase(self) -> Limits:
        if self.phase_s < 4 * self.call_s + self.sample_s:  # three samples of the longest call
            raise ValueError(
                f"phase_s = {self.phase_s:g} is too short for sampling: 4 call_s + sample_s = "
                f"{4 * self.call_s + self.sample_s:g}"
            )
        return self


class Case(BaseModel):
    """One point to be measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: str
    impl: str
    direction: Direction
    dtype: DType
    shape: dict[str, int]
    config: dict[str, ConfigValue] = Field(default_factory=dict)

    @property
    def key(self) -> str:
        return point_key(self.op, self.impl, self.direction, self.dtype, self.shape, self.config)


class Session(BaseModel):
    """How a worker measures, the same for all its cases."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str  # "cpu", "cuda" or "cuda:N"
    timer: Timer
    l2: L2
    seed: int
    inputs: Distribution
    limits: Limits
    user_impls: dict[str, str] = Field(default_factory=dict)  # name -> /path/to/file.py:function
    user_files_sha256: dict[str, str] = Field(default_factory=dict)
    energy: bool = False  # loops of two seconds around NVML's counter
    gpm: GpmWay = "no"  # bytes by NVML, in such a loop
    memory_limit_bytes: int | None = None  # CPU: allocations beyond it fail, as on a full device
