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
TIE = 1.01  # times the fastest: configurations no slower are as fast


class _Record(BaseModel):
    # extra="ignore": derived columns are written for scripts and recomputed on reading.
    model_config = ConfigDict(
        extra="ignore", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Quantiles(_Record):
    """Spread of a point's time samples, nanoseconds per call."""

    median: Nanoseconds
    """Half of the samples are at most this."""
    q1: Nanoseconds
    """First quartile."""
    q3: Nanoseconds
    """Third quartile."""
    min: Nanoseconds
    """Fastest sample."""
    n: Annotated[int, Field(ge=1)]
    """Number of samples."""


class Hbm(_Record):
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
    model_bytes: Count | None = None
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


class Kernel(_Record):
    """A kernel of a call, by Nsight Compute: all launches of one name, grid, block, registers and
    shared memory.

    Null: this ncu, card or run does not tell. Percentages are means over the launches, by time.
    """

    name: str
    """As it is called in its source."""
    launches: Annotated[int, Field(ge=1)] = 1
    """In one call; times, bytes and instructions are sums over them."""
    grid: str | None = None
    """Programs in x, y and z: `(128, 1, 1)`."""
    threads: Count | None = None
    """Of a block."""
    time_ns: Count | None = None
    """Under the profiler, one kernel at a time."""
    read_bytes: Count | None = None
    """From device memory."""
    write_bytes: Count | None = None
    """To device memory, while it ran: up to half of L2 leaves that only while the next ones run, or
    after the call (`late_write_bytes`)."""
    model_bytes: Count | None = None
    """Read from device memory and written to it, by the implementation's own formula, for a cold
    L2. It is the kernel's floor too: what it must move, given its own inputs and outputs. Null: it
    has no formula by kernel, that leaves this one out, or an older record."""
    model_l2: dict[str, Count] = Field(default_factory=dict)
    """Beyond model_bytes, what the formula takes L2 to hold for it: tensor -> bytes."""
    l2_bytes: Count | None = None
    """Through the L2 cache, read and written."""
    l2_hit_pct: float | None = None
    """Of the L2 cache's accesses, those that it held."""
    regs: Count | None = None
    """Registers a thread."""
    smem_static_bytes: Count | None = None
    """Shared memory of a block that was fixed when it was compiled."""
    smem_dynamic_bytes: Count | None = None
    """Shared memory of a block that the launch asked for: Triton's and Gluon's."""
    local_load_instructions: Count | None = None
    """Warp instructions that read local memory: spills."""
    local_store_instructions: Count | None = None
    """Warp instructions that write local memory."""
    tensor_instructions: Count | None = None
    """Warp instructions on the tensor cores."""
    bank_conflicts: Count | None = None
    """In shared memory."""
    occupancy_pct: float | None = None
    """Warps resident on an SM, of the most that there can be: achieved."""
    occupancy_limit_pct: float | None = None
    """The same as the launch allows it: theoretical."""
    limiters: list[str] = Field(default_factory=list)
    """What allows no further block on an SM: registers, shared memory, warps, blocks, barriers."""
    waves: float | None = None
    """Blocks over those that fit on the card at once."""
    passes: Count | None = None
    """Replays that the profiler's bytes took. Above 1 they are of a warm L2, in part."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def measured_bytes(self) -> int | None:
        """Read plus written."""
        if self.read_bytes is None or self.write_bytes is None:
            return None
        return self.read_bytes + self.write_bytes

    @computed_field  # type: ignore[prop-decorator]
    @property
    def measured_over_model(self) -> float | None:
        """measured_bytes over model_bytes."""
        if self.measured_bytes is None or not self.model_bytes:
            return None
        return self.measured_bytes / self.model_bytes


class Static(_Record):
    """What the compiler says of a kernel: of those that a call launches, the one with the most
    shared memory among those that the configuration changes. Null: it was not asked."""

    kernel: str | None = None
    """Which one."""
    smem_bytes: Count | None = None
    """Dynamic shared memory of a block, bytes."""
    regs: Count | None = None
    """Registers a thread."""
    spill_store_bytes: Count | None = None
    """Spilled to local memory, bytes a thread."""
    spill_load_bytes: Count | None = None
    """Read back from local memory, bytes a thread."""
    ctas_per_sm: Count | None = None
    """Blocks resident on an SM at once."""
    num_warps: Count | None = None
    """Warps of a block."""
    compile_ms: Count | None = None
    """What compiling all that the configuration changes took, milliseconds."""


class Telemetry(_Record):
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


class Spent(_Record):
    """Wall time of a point that went into the implementation and its judge, not into the bench."""

    compiling_s: float = 0.0
    """First calls at a shape, autotuning included, seconds."""
    checking_s: float = 0.0
    """The calls that are judged, the oracle, and their comparison, seconds."""
    timing_s: float = 0.0
    """The loops of samples, with the evictions and holds that belong to a sample, seconds."""


class Point(_Record):
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
    shape: dict[str, Annotated[int, Field(ge=1)]]
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
    floor_ns: Nanoseconds | None = None
    """Least time on this card, nanoseconds: compulsory_bytes over copy bandwidth, or flops over
    matmul rate if that is longer. Null: on a CPU, or the ceilings were not measured."""
    compulsory_bytes: Count | None = None
    """Every input read once and every output written once, bytes; of a step what it needs of the
    state too. Null: decode of an op that has no such model, as in older records."""
    flops: Count | None = None
    """Least floating-point operations of any algorithm for the function. Null: as
    compulsory_bytes."""
    parameters: Count | None = None
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


class Environment(_Record):
    """The machine. On a CPU run the GPU's fields are null, as is what a card does not tell."""

    device: Literal["cuda", "cpu"]
    """What was measured on."""
    name: str
    """The GPU's name, or the CPU's."""
    uuid: str | None = None
    """The GPU's, as nvidia-smi -L shows it."""
    compute_capability: str | None = None
    """`9.0` on an H100."""
    sm_count: Count | None = None
    """Streaming multiprocessors."""
    memory_bytes: Count | None = None
    """Device memory, bytes."""
    l2_bytes: Count | None = None
    """L2 cache, bytes."""
    smem_per_block_bytes: Count | None = None
    """Most shared memory that a block can ask for, bytes."""
    smem_per_sm_bytes: Count | None = None
    """Shared memory of an SM, bytes."""
    driver: str | None = None
    """NVIDIA driver."""
    cuda: str | None = None
    """CUDA version that torch was built for."""
    ecc: bool | None = None
    """Whether ECC is on."""
    mig: bool | None = None
    """Whether MIG is on."""
    power_limit_mw: Count | None = None
    """Power limit in force, milliwatts."""
    max_sm_clock_mhz: Count | None = None
    """Highest SM clock, MHz."""
    max_mem_clock_mhz: Count | None = None
    """Highest memory clock, MHz."""
    cpu: str
    """The CPU's name."""
    cpu_threads: Count
    """Threads that the operating system shows."""
    os: str
    """Operating system and kernel."""
    python: str
    """Python version."""


class Ceilings(_Record):
    """What the card can do, measured on it in this run."""

    copy_gb_per_s: float | None = None
    """Copy bandwidth, 10^9 bytes a second, read plus written. Null: on a CPU."""
    matmul_tflop_per_s: dict[DType, float] = Field(default_factory=dict)
    """Rate of large matrix products by dtype, 10^12 FLOPs a second; fp32: of tf32 products. Empty:
    on a CPU."""


class Device(_Record):
    """A GPU of a sweep on several."""

    environment: Environment
    """As a run's own."""
    ceilings: Ceilings = Ceilings()
    """As a run's own."""


class Cost(_Record):
    """What the last session of a run took, and whose it was."""

    wall_s: float
    """Wall time, seconds summed over the workers."""
    compiling_s: float
    """First calls at a shape, autotuning included, of all points, seconds."""
    checking_s: float
    """Checking of all points, seconds."""
    timing_s: float
    """Timing of all points, seconds."""
    profiling_s: float = 0.0
    """Nsight Compute's part: kernels run again under it, seconds."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def own_s(self) -> float:
        """What was none of these, seconds: starting workers, measuring ceilings, drawing inputs,
        counting launches, reading NVML, passing and writing results."""
        others_s = self.compiling_s + self.checking_s + self.timing_s + self.profiling_s
        own_s = self.wall_s - others_s
        return round(max(0.0, own_s), 6)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def own_share(self) -> float:
        """own_s over wall_s."""
        return round(self.own_s / self.wall_s, 6) if self.wall_s else 0.0


class Run(_Record):
    """What surrounds the points: when, how, on what, with which versions."""

    schema_version: int = SCHEMA_VERSION
    """Version of this schema; others are refused."""
    run_id: str
    """The run folder's name."""
    started_utc: str
    """ISO 8601."""
    finished_utc: str | None = None
    """ISO 8601. Null: interrupted, or still going."""
    argv: list[str]
    """The command line."""
    source_sha256: str | None = None
    """Of the package's Python files: which code measured. Null: an older record."""
    git_sha: str | None = None
    """Commit of the package's checkout. Null: not a checkout."""
    git_dirty: bool | None = None
    """Whether tracked files differed from the commit. Null: not a checkout."""
    seed: int
    """Of the inputs and of the order of points."""
    inputs: str
    """Distribution of the timed inputs: randn, or mean1 (k, v, and x of convolution and layer, with
    mean 1)."""
    settings: dict[str, object]
    """The resolved plan; `--resume` goes on only with equal settings."""
    planned_points: Count
    """Points that the settings make."""
    versions: dict[str, str]
    """Versions of what a figure depends on, by package."""
    environment: Environment
    """The machine."""
    ceilings: Ceilings = Ceilings()
    """What the card can do."""
    other_devices: list[Device] = Field(default_factory=list)
    """The further GPUs of a sweep on several; `environment` and `ceilings` are the first one's."""
    cost: Cost | None = None
    """What the run's last session took, and whose it was. Null: interrupted, or still going."""


class AtlasRow(_Record):
    """One kernel as compiled for one architecture: what a point's call would launch there.

    Null: it did not compile, unless a field says otherwise.
    """

    op: str
    """The op whose call launches it."""
    impl: str
    """The implementation of it."""
    kernel: str
    """The kernel, without `_kernel`."""
    language: Literal["triton", "gluon"]
    """gluon: scheduled by hand, and for one architecture alone."""
    dtype: DType
    """Of the call's inputs."""
    config: dict[str, ConfigValue]
    """Block sizes, warps and stages that the kernel is launched with."""
    constants: dict[str, int | float | str | bool | None]
    """All of its constants by name. Null: a pointer that is none."""
    types: dict[str, str] = Field(default_factory=dict)
    """Of its other arguments by name, as Triton writes them; `:16` of multiples of 16."""
    asked: list[dict[str, ConfigValue]]
    """Configurations of the call that launch it: what `--axis` said. Empty settings: the
    defaults."""
    directions: list[Direction]
    """Of the calls that launch it."""
    lens: list[int]
    """T of the calls that launch it, tokens."""
    arch: str
    """Architecture that it was compiled for: `sm_90`, `gfx942`."""
    triton: str
    """Triton's version, on which all of this depends."""
    outcome: Literal["ok", "out_of_resources", "compile_error", "timeout", "crash"]
    """ok; out_of_resources: it compiles and does not fit; or how its compiler ended."""
    fits: bool
    """Whether a block of it runs there."""
    reason: str | None = None
    """Why it does not: what it needs and what there is. Null: it fits."""
    smem_bytes: Count | None = None
    """Shared memory of a block, bytes."""
    regs: Count | None = None
    """Registers a thread."""
    spill_store_bytes: Count | None = None
    """Spilled to local memory, bytes a thread."""
    spill_load_bytes: Count | None = None
    """Read back from local memory, bytes a thread."""
    stack_bytes: Count | None = None
    """Local memory of a thread, bytes; spills lie there."""
    tmem_columns: Count | None = None
    """Columns of tensor memory (sm_100, sm_103)."""
    ctas_per_sm: Count | None = None
    """Blocks resident on an SM at once. Null: not modelled for this architecture."""
    limiter: str | None = None
    """What keeps more from being resident: shared memory, registers, tensor memory, warps or
    blocks."""
    tensor_core: str | None = None
    """Matrix instruction that it issues: HGMMA (wgmma), UTCHMMA (tcgen05), HMMA (mma), v_mfma.
    Null: none."""
    instructions: Count | None = None
    """Instructions in its code."""
    instruction_counts: dict[str, Count] = Field(default_factory=dict)
    """Of them matrix products, copies to shared memory, local loads and stores, barriers."""
    compile_ms: Count | None = None
    """What compiling took, milliseconds, when it was last done."""
    cubin_sha256: str | None = None
    """Of the binary."""

    @property
    def spill_bytes(self) -> int:
        return (self.spill_store_bytes or 0) + (self.spill_load_bytes or 0)


class Refused(_Record):
    """A call that launches nothing on an architecture, since the host function does not take it."""

    op: str
    """The op."""
    impl: str
    """The implementation of it."""
    arch: str
    """Architecture that was asked about."""
    direction: Direction
    """Of the call."""
    asked: dict[str, ConfigValue]
    """What `--axis` said."""
    tokens: int
    """T."""
    reason: str
    """What it says."""


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


def document(run: Run, points: list[Point]) -> str:
    """The `--json` document: `{"run": {...}, "points": [...]}`."""
    return json.dumps(
        {"run": run.model_dump(mode="json"), "points": [p.model_dump(mode="json") for p in points]},
        indent=2,
    )
