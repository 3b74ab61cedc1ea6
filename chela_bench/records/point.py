"""A point, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, computed_field, field_validator, model_validator

from chela_bench.records.base import (
    L2,
    SCHEMA_VERSION,
    ConfigValue,
    Count,
    Direction,
    DType,
    Modelled,
    ModelledNanoseconds,
    Nanoseconds,
    Outcome,
    Record,
    Size,
    Timer,
)
from chela_bench.records.kernels import Kernel, Static


class Quantiles(Record):
    """Spread of a point's time samples, nanoseconds per call."""

    median: Nanoseconds
    """Half of the samples are at most this."""
    q1: Nanoseconds
    """First quartile."""
    q3: Nanoseconds
    """Third quartile."""
    min: Nanoseconds
    """Fastest sample."""
    n: Size
    """Number of samples."""


class Hbm(Record):
    """Bytes through device memory in one call, and where the figure comes from."""

    read_bytes: Count | None = None
    """Bytes read, by Nsight Compute from a cold L2. Null: not measured."""
    write_bytes: Count | None = None
    """Bytes written, likewise. Null: not measured."""
    late_write_bytes: Count | None = None
    """Those of write_bytes that L2 still held when the call ended, and that left it when it was
    evicted afterwards. Null: not measured."""
    gpm_bytes: Count | None = None
    """Bytes read and written together, by NVML's GPM over a loop of calls, so with a warm L2; as
    coarse as a percent of the peak. Null: not measured."""
    model_bytes: Modelled | None = None
    """Bytes read and written by the implementation's own formula, from a cold L2; where the formula
    is by kernel, without what the card's L2 holds from one to the next (`model_l2`). Null: it has
    none for this direction, or the point did not get that far."""
    source: Literal["ncu", "gpm", "model"] | None = None
    """What `measured_bytes` comes from, or model where nothing was measured. Null: no figure."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def measured_bytes(self) -> int | None:
        """Read plus written, by ncu, else by gpm. Null: not measured."""
        if self.read_bytes is None or self.write_bytes is None:
            return self.gpm_bytes
        return self.read_bytes + self.write_bytes

    @computed_field  # type: ignore[prop-decorator]
    @property
    def measured_over_model(self) -> float | None:
        """measured_bytes over model_bytes."""
        if self.measured_bytes is None or not self.model_bytes:
            return None
        return self.measured_bytes / self.model_bytes

    @property
    def total_bytes(self) -> int | None:
        """Measured; else modelled; else None."""
        return self.model_bytes if self.measured_bytes is None else self.measured_bytes


class Telemetry(Record):
    """NVML's readings during the timing loop, the last one right after it, while the device was
    still busy with it.

    Null: failed, on a CPU, or not told by this card.
    """

    sm_clock_mhz: Count | None = None
    """SM clock, MHz: the last reading."""
    sm_clock_min_mhz: Count | None = None
    """Lowest of all readings."""
    mem_clock_mhz: Count | None = None
    """Memory clock, MHz: the last reading."""
    power_mw: Count | None = None
    """Board power, milliwatts: the last reading."""
    power_max_mw: Count | None = None
    """Highest of all readings."""
    temperature_c: Count | None = None
    """GPU temperature, degrees Celsius: the last reading."""
    temperature_max_c: Count | None = None
    """Highest of all readings."""
    memory_bytes: Count | None = None
    """Device memory in use, everyone's, bytes: the most of all readings."""
    readings: Count | None = None
    """How many there were."""


class Spent(Record):
    """Wall time of a point that went into the implementation and its judge, not into the bench."""

    compiling_s: float = 0.0
    """First calls at a shape, autotuning included, seconds."""
    checking_s: float = 0.0
    """The calls that are judged, the oracle, and their comparison, seconds."""
    timing_s: float = 0.0
    """The loops of samples, with the evictions and holds that belong to a sample, seconds."""


class Point(Record):
    """One implementation at one shape, direction, dtype and configuration."""

    schema_version: int = SCHEMA_VERSION
    """Version of this schema; others are refused."""
    op: str
    """The function, as `chela-bench list` names it."""
    impl: str
    """The implementation of it; `file.py:function` for a user's own."""
    direction: Direction
    """fwd: forward; bwd: backward alone; fwdbwd: both in one call; decode: a step of one token of
    each sequence, with a cache of nearly T tokens: the mean over 64 steps, one block of the
    streaming convolution, at whose end the share that is due of larger transforms."""
    dtype: DType
    """Of inputs and outputs."""
    shape: dict[str, Size]
    """Sizes by dimension: B batch, T tokens, H heads, K key, V value, D width. B and T always."""
    config: dict[str, ConfigValue] = Field(default_factory=dict)
    """Settings by name: block sizes and the op's options. Empty: the defaults."""
    device: str
    """`cpu`, or the GPU's UUID."""
    timer: Timer = "event"
    """event: between two CUDA events; profiler: the sum of kernel spans. A CPU has the wall clock
    whatever stands here."""
    l2: L2 | None = None
    """cold: the L2 cache is evicted before each sample; warm: left as it is. Null: on a CPU."""
    outcome: Outcome
    """ok, or what kept it from a time: wrong (result off, or a time that is impossible), oom (out
    of memory), out_of_resources (shared memory, registers), compile_error, timeout, crash,
    skipped (not tried)."""
    reason: str | None = None
    """One line, why it failed. Null: the outcome is ok."""
    time_ns: Quantiles | None = None
    """Time of a call (decode: of a step, as everything below): kernel time on a GPU, wall time on
    a CPU. Null: failed, or no kernel time could be taken; then wall_ns stands alone."""
    rounds: Count | None = None
    """Rounds in which configurations were timed in turn, that the samples come from. Null: timed
    by itself."""
    wall_ns: Nanoseconds | None = None
    """One call from launch to synchronised end, nanoseconds, median. Null: failed."""
    wall_n: Count | None = None
    """Number of samples behind wall_ns. Null: failed."""
    host_ns: Nanoseconds | None = None
    """Host time of a call at T = 64, nanoseconds: its launch cost. Null: failed, on a CPU, or it
    does not take that length."""
    launches: Count | None = None
    """Kernels launched in one call. Null: failed before they were counted, on a CPU, or too many to
    count."""
    floor_ns: ModelledNanoseconds | None = None
    """Least time on this card, nanoseconds: compulsory_bytes over copy bandwidth, or flops over
    matmul rate if that is longer. Null: on a CPU, or the ceilings were not measured."""
    compulsory_bytes: Modelled | None = None
    """Every input read once and every output written once, bytes; of a step what it needs of the
    state too. Null: decode of an op that has no such model, as in older records."""
    flops: Modelled | None = None
    """Least floating-point operations of any algorithm for the function. Null: as
    compulsory_bytes."""
    parameters: Modelled | None = None
    """Numbers that the layer learns. Null: the op is no layer, or an older record."""
    peak_bytes: Count | None = None
    """Peak memory of a call beyond its live inputs, of a step beyond its cache too, bytes. Null:
    failed before it was read, or on a CPU."""
    hbm: Hbm = Hbm()
    """Bytes through device memory."""
    kernels: list[Kernel] = Field(default_factory=list)
    """Of one call, in the order of their first launch. Empty: not profiled by Nsight Compute."""
    oracle: str | None = None
    """What the result was compared with. Null: not tried, or it died first."""
    error_rel: float | None = None
    """Largest relative error over the tensors in errors. Null: not compared, or not finite."""
    error_budget: float | None = None
    """Error that is allowed; from the dtype's rounding. Null: not compared."""
    errors: dict[str, float] = Field(default_factory=dict)
    """Relative error by tensor, output and gradients; those that are finite."""
    static: Static = Static()
    """What the compiler says of the kernel."""
    telemetry: Telemetry = Telemetry()
    """Clocks, power and temperature."""
    throttle: list[str] | None = None
    """NVML's throttle reasons in any reading during timing; empty: none. Null: failed, on a CPU, or
    not told by this card."""
    energy_j: float | None = None
    """Energy of a call, joules: the card's own counter over at least two seconds of calls. Null:
    not asked for (`--energy`), failed, or not told by this card."""
    null_reasons: dict[str, str] = Field(default_factory=dict)
    """Column -> why it is null, in an ok point. A null without a reason was not asked for."""
    started_utc: str | None = None
    """Start of the point, ISO 8601. Null: not tried."""
    spent_s: float | None = None
    """The bench's wall time for this point, checks and compiling too, seconds. Null: not tried."""
    spent: Spent | None = None
    """What of spent_s was not the bench's own. Null: not tried, or the worker died."""

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
        """B * T over time; decode: B over time."""
        seconds = self.seconds
        return None if seconds is None else self.tokens / seconds

    @computed_field  # type: ignore[prop-decorator]
    @property
    def hbm_bytes_per_token(self) -> float | None:
        """Bytes through device memory, measured, else modelled, over B * T; decode: over B."""
        moved = self.hbm.total_bytes
        return None if moved is None else moved / self.tokens

    @computed_field  # type: ignore[prop-decorator]
    @property
    def hbm_x_floor(self) -> float | None:
        """Bytes through device memory, measured, else modelled, over compulsory_bytes."""
        moved = self.hbm.total_bytes
        return None if moved is None or not self.compulsory_bytes else moved / self.compulsory_bytes

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
    def tokens(self) -> int:
        """That a call computes."""
        return self.shape["B"] * (1 if self.direction == "decode" else self.shape["T"])

    @property
    def seconds(self) -> float | None:
        """Median kernel time, or wall time where kernel time is null, in seconds."""
        if self.time_ns is not None:
            return self.time_ns.median / 1e9
        return None if self.wall_ns is None else self.wall_ns / 1e9


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
        parts.append(config_label(config))
    return "/".join(parts)


def config_label(config: Mapping[str, object]) -> str:
    """`BLOCK_T=64,num_warps=4`, by name."""
    return ",".join(f"{name}={config[name]}" for name in sorted(config))


def shape_label(shape: Mapping[str, int]) -> str:
    """`B1-T1024-H16-K128-V128`."""
    return "-".join(f"{name}{size}" for name, size in shape.items())
