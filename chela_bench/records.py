"""Point and Run: the one shape that the bench writes and the reports read.

A run folder holds `run.json` (one Run) and `points.jsonl` (one Point a line). Units stand in the
names; bytes and nanoseconds are integers. What was not measured is null, and `null_reasons` says
why. A failed point carries an outcome and a reason, never a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, computed_field, field_validator, model_validator

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


class _Record(BaseModel):
    # extra="ignore": derived columns are written for scripts and recomputed on reading.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Quantiles(_Record):
    """Spread of a point's time samples, nanoseconds per call; n samples."""

    median: Nanoseconds
    q1: Nanoseconds
    q3: Nanoseconds
    min: Nanoseconds
    n: Annotated[int, Field(ge=1)]


class Hbm(_Record):
    """Bytes through device memory in one call, and where the figure comes from.

    read_bytes and write_bytes are measured (source "ncu" or "gpm"); model_bytes is the
    implementation's own formula (source "model" when nothing was measured).
    """

    read_bytes: Count | None = None
    write_bytes: Count | None = None
    model_bytes: Count | None = None
    source: Literal["ncu", "gpm", "model"] | None = None


class Static(_Record):
    """What the compiler says of a kernel: dynamic shared memory, registers, spills, residency."""

    smem_bytes: Count | None = None
    regs: Count | None = None
    spill_store_bytes: Count | None = None
    spill_load_bytes: Count | None = None
    ctas_per_sm: Count | None = None


class Telemetry(_Record):
    """NVML's reading right after the timing loop, while the device was still busy with it."""

    sm_clock_mhz: Count | None = None
    mem_clock_mhz: Count | None = None
    power_mw: Count | None = None
    temperature_c: Count | None = None


class Spent(_Record):
    """Wall seconds of a point that went into the implementation and its judge, not into the bench.

    Compiling holds the first call at a shape, autotuning included; checking the oracle, the calls
    it judges and their comparison; timing the loops of samples with the evictions and holds that
    belong to a sample.
    """

    compiling_s: float = 0.0
    checking_s: float = 0.0
    timing_s: float = 0.0


class Point(_Record):
    """One implementation at one shape, direction, dtype and configuration."""

    schema_version: int = SCHEMA_VERSION
    op: str
    impl: str
    direction: Direction
    dtype: DType
    shape: dict[str, Annotated[int, Field(ge=1)]]
    config: dict[str, ConfigValue] = Field(default_factory=dict)
    device: str  # "cpu" or the GPU's UUID
    timer: Timer = "event"
    l2: L2 | None = None  # None on CPU
    outcome: Outcome
    reason: str | None = None
    time_ns: Quantiles | None = None  # kernel time on CUDA, wall time on CPU
    wall_ns: Nanoseconds | None = None  # one call from launch to synchronised end, median
    wall_n: Count | None = None  # of so many
    host_ns: Nanoseconds | None = None  # host time of a call, measured at a tiny shape
    launches: Count | None = None  # kernels launched in one call
    floor_ns: Nanoseconds | None = None
    compulsory_bytes: Count | None = None  # every input read once, every output written once
    flops: Count | None = None  # least of any algorithm for this function
    peak_bytes: Count | None = None  # beyond the live inputs
    hbm: Hbm = Hbm()
    oracle: str | None = None
    error_rel: float | None = None  # largest over the tensors in `errors`
    error_budget: float | None = None
    errors: dict[str, float] = Field(default_factory=dict)  # per output and gradient
    static: Static = Static()
    telemetry: Telemetry = Telemetry()
    throttle: list[str] | None = None  # NVML's throttle reasons during timing; [] is none
    energy_j: float | None = None
    null_reasons: dict[str, str] = Field(default_factory=dict)  # column -> why, in an ok point
    started_utc: str | None = None
    spent_s: float | None = None  # the bench's wall time for this point, checks and compiling too
    spent: Spent | None = None  # what of it was not the bench's own

    @field_validator("reason")
    @classmethod
    def _reason_is_one_line(cls, reason: str | None) -> str | None:
        """Printable and of bounded length: it comes from other people's code."""
        if reason is None:
            return None
        return " ".join(reason.encode("utf-8", "replace").decode().split())[:500]

    @field_validator("schema_version")
    @classmethod
    def _this_schema(cls, version: int) -> int:
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version {version}; this chela-bench reads {SCHEMA_VERSION}")
        return version

    @field_validator("shape")
    @classmethod
    def _has_batch_and_length(cls, shape: dict[str, int]) -> dict[str, int]:
        if not {"B", "T"} <= set(shape):
            raise ValueError(f"a shape has at least B and T; this one has {', '.join(shape)}")
        return shape

    @model_validator(mode="after")
    def _a_failure_has_a_reason_and_no_time(self) -> Point:
        if self.outcome == "ok":
            if self.time_ns is None and self.wall_ns is None:
                raise ValueError("an ok point needs time_ns or wall_ns")
        else:
            if not self.reason:
                raise ValueError(f"a point that is {self.outcome!r} needs a reason")
            if self.time_ns is not None or self.wall_ns is not None:
                raise ValueError(f"a point that is {self.outcome!r} carries no time")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def key(self) -> str:
        """The point's identity within a run, readable: equal keys are the same measurement."""
        return point_key(self.op, self.impl, self.direction, self.dtype, self.shape, self.config)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_s(self) -> float | None:
        seconds = self.seconds
        return None if seconds is None else self.shape["B"] * self.shape["T"] / seconds

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gb_per_s(self) -> float | None:
        """Compulsory bytes over time, 10^9 bytes a second."""
        seconds = self.seconds
        if seconds is None or self.compulsory_bytes is None:
            return None
        return self.compulsory_bytes / seconds / 1e9

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tflop_per_s(self) -> float | None:
        """The function's least FLOPs over time, 10^12 a second."""
        seconds = self.seconds
        if seconds is None or self.flops is None:
            return None
        return self.flops / seconds / 1e12

    @computed_field  # type: ignore[prop-decorator]
    @property
    def x_floor(self) -> float | None:
        """Time as a multiple of the floor."""
        if self.time_ns is None or self.floor_ns is None:
            return None
        return self.time_ns.median / self.floor_ns

    @property
    def seconds(self) -> float | None:
        """Median kernel time, or wall time where kernel time is null, in seconds."""
        if self.time_ns is not None:
            return self.time_ns.median / 1e9
        return None if self.wall_ns is None else self.wall_ns / 1e9


class Environment(_Record):
    """The machine. `device` is "cuda" or "cpu"; GPU fields are null on a CPU run."""

    device: Literal["cuda", "cpu"]
    name: str
    uuid: str | None = None
    compute_capability: str | None = None
    sm_count: Count | None = None
    memory_bytes: Count | None = None
    l2_bytes: Count | None = None
    smem_per_block_bytes: Count | None = None
    smem_per_sm_bytes: Count | None = None
    driver: str | None = None
    cuda: str | None = None
    ecc: bool | None = None
    mig: bool | None = None
    power_limit_mw: Count | None = None
    max_sm_clock_mhz: Count | None = None
    max_mem_clock_mhz: Count | None = None
    cpu: str
    cpu_threads: Count
    os: str
    python: str


class Ceilings(_Record):
    """Measured on this card in this run. Copy bandwidth counts bytes read plus bytes written."""

    copy_gb_per_s: float | None = None
    matmul_tflop_per_s: dict[DType, float] = Field(default_factory=dict)  # fp32: tf32 dots


class Device(_Record):
    """A GPU of a sweep on several."""

    environment: Environment
    ceilings: Ceilings = Ceilings()


class Cost(_Record):
    """What the last session of a run took, seconds summed over its workers, and whose it was.

    own_s is what was neither compiling, checking nor timing: starting workers, measuring ceilings,
    drawing inputs, counting launches, reading NVML, passing and writing results.
    """

    wall_s: float
    compiling_s: float
    checking_s: float
    timing_s: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def own_s(self) -> float:
        return max(0.0, self.wall_s - self.compiling_s - self.checking_s - self.timing_s)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def own_share(self) -> float:
        """own_s over wall_s."""
        return self.own_s / self.wall_s if self.wall_s else 0.0


class Run(_Record):
    """What surrounds the points: when, how, on what, with which versions."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    started_utc: str
    finished_utc: str | None = None  # null: interrupted or still going
    argv: list[str]
    source_sha256: str | None = None  # of the package's files: which code measured
    git_sha: str | None = None
    git_dirty: bool | None = None
    seed: int
    inputs: str  # distribution of the timed inputs
    settings: dict[str, object]  # the resolved plan settings; `--resume` compares them
    planned_points: Count
    versions: dict[str, str]
    environment: Environment
    ceilings: Ceilings = Ceilings()
    other_devices: list[Device] = Field(default_factory=list)  # beside the first one above
    cost: Cost | None = None


def point_key(
    op: str,
    impl: str,
    direction: str,
    dtype: str,
    shape: Mapping[str, int],
    config: Mapping[str, ConfigValue],
) -> str:
    """`linear_attention/fla_chunk/fwd/bf16/B1-T1024-H16-K128-V128`, plus `/NAME=value,...`."""
    parts = [op, impl, direction, dtype, shape_label(shape)]
    if config:
        parts.append(",".join(f"{name}={config[name]}" for name in sorted(config)))
    return "/".join(parts)


def shape_label(shape: Mapping[str, int]) -> str:
    """`B1-T1024-H16-K128-V128`."""
    return "-".join(f"{name}{size}" for name, size in shape.items())


def document(run: Run, points: list[Point]) -> str:
    """The `--json` document: `{"run": {...}, "points": [...]}`."""
    return json.dumps(
        {"run": run.model_dump(mode="json"), "points": [p.model_dump(mode="json") for p in points]},
        indent=2,
    )
