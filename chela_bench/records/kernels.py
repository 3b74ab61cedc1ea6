"""What Nsight Compute and the compiler say of kernels: of a point's, and of an atlas'."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, computed_field

from chela_bench.records.base import ConfigValue, Count, Direction, DType, Record, Size


class Kernel(Record):
    """A kernel of a call, by Nsight Compute: all launches of one name, grid, block, registers and
    shared memory.

    Null: this ncu, card or run does not tell. Percentages are means over the launches, by time.
    """

    name: str
    """As it is called in its source."""
    launches: Size = 1
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


class Static(Record):
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


class AtlasRow(Record):
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
    constants: dict[str, ConfigValue | float | None]
    """All of its constants by name. Null: a pointer that is none."""
    types: dict[str, str] = Field(default_factory=dict)
    """Of its other arguments by name, as Triton writes them; `:16` of multiples of 16."""
    asked: list[dict[str, ConfigValue]]
    """Configurations of the call that launch it: what `--axis` said. Empty settings: the
    defaults."""
    directions: list[Direction]
    """Of the calls that launch it."""
    lens: list[Size]
    """T of the calls that launch it, tokens."""
    arch: str
    """Architecture that it was compiled for: `sm_90`, `gfx942`."""
    triton: str
    """Triton's version, on which all of this depends."""
    outcome: Literal["ok", "out_of_resources", "compile_error", "timeout", "crash"]
    """ok; out_of_resources: it compiles and does not fit; or how its compiler ended."""
    fits: bool
    """Whether a block of it runs there; false where its compiler did not get to say."""
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

    @property
    def known(self) -> bool:
        """Whether its compiler got to say that it fits, or that it does not."""
        return self.outcome not in ("timeout", "crash")


class Refused(Record):
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
    tokens: Count
    """T."""
    reason: str
    """What it says."""
