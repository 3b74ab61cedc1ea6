"""What surrounds the points."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field, computed_field

from chela_bench.records.base import SCHEMA_VERSION, Count, DType, Record
from chela_bench.records.point import Point


class Environment(Record):
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


class Ceilings(Record):
    """What the card can do, measured on it in this run."""

    copy_gb_per_s: float | None = None
    """Copy bandwidth, 10^9 bytes a second, read plus written. Null: on a CPU."""
    matmul_tflop_per_s: dict[DType, float] = Field(default_factory=dict)
    """Rate of large matrix products by dtype, 10^12 FLOPs a second; fp32: of tf32 products. Empty:
    on a CPU."""


class Device(Record):
    """A GPU of a sweep on several."""

    environment: Environment
    """As a run's own."""
    ceilings: Ceilings = Ceilings()
    """As a run's own."""


class Cost(Record):
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


class Run(Record):
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


def document(run: Run, points: list[Point]) -> str:
    """The `--json` document: `{"run": {...}, "points": [...]}`."""
    return json.dumps(
        {"run": run.model_dump(mode="json"), "points": [p.model_dump(mode="json") for p in points]},
        indent=2,
    )
