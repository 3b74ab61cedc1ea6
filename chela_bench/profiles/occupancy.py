"""How many blocks of a kernel an SM holds at once, by architecture, and what limits them.

Source of the table: NVIDIA's CUDA C++ programming guide, "Technical Specifications per Compute
Capability", and its occupancy calculator (cuda_occupancy.h), whose rounding this repeats: registers
go to a warp in units of 256, warps to one of four parts of an SM, shared memory to a block in units
of 128 bytes with 1 KB of the system's own from sm_80 on. Tensor memory: 512 columns an SM.
"""

from __future__ import annotations

from dataclasses import dataclass

from chela_bench.errors import UsageError

_KB = 1024
_REGISTERS, _REGISTER_UNIT, _MOST_REGISTERS = 65536, 256, 255
_PARTS = 4  # of an SM, each with a scheduler and a quarter of the registers
_SMEM_UNIT = 128
_THREADS = 1024  # in a block
TMEM_COLUMNS = 512


@dataclass(frozen=True)
class Arch:
    """What one multiprocessor of a kind of GPU has, and how Triton names it."""

    name: str  # sm_90, gfx942
    processors: int  # of a card of this kind, for host functions that ask
    smem_per_block: int  # bytes
    smem_per_sm: int = 0
    smem_reserved: int = 0  # of each block
    warps: int = 0
    blocks: int = 0
    tmem_columns: int = 0

    @property
    def backend(self) -> str:
        return "cuda" if self.name.startswith("sm_") else "hip"

    @property
    def capability(self) -> int:
        """90 of sm_90; 0 of another maker's."""
        return int(self.name.removeprefix("sm_")) if self.backend == "cuda" else 0

    @property
    def warp_size(self) -> int:
        return 32 if self.backend == "cuda" else 64


def _nvidia(
    capability: int, processors: int, per_sm_kb: int, warps: int, blocks: int, tmem: int = 0
) -> Arch:
    reserved = 1 if capability >= 80 else 0
    return Arch(
        f"sm_{capability}", processors, (per_sm_kb - reserved) * _KB, per_sm_kb * _KB,
        reserved * _KB, warps, blocks, tmem,
    )  # fmt: skip


ARCHS = {
    arch.name: arch
    for arch in (
        _nvidia(75, 40, 64, 32, 16),  # T4
        _nvidia(80, 108, 164, 64, 32),  # A100
        _nvidia(86, 84, 100, 48, 16),  # A40
        _nvidia(87, 16, 164, 48, 16),  # Orin
        _nvidia(89, 142, 100, 48, 24),  # L40S
        _nvidia(90, 132, 228, 64, 32),  # H100
        _nvidia(100, 148, 228, 64, 32, TMEM_COLUMNS),  # B200
        _nvidia(103, 148, 228, 64, 32, TMEM_COLUMNS),  # B300
        _nvidia(120, 188, 100, 48, 24),  # RTX PRO 6000
        Arch("gfx942", 304, 64 * _KB),  # MI300X; its occupancy is not modelled
    )
}


def find_arch(name: str) -> Arch:
    if name not in ARCHS:
        raise UsageError(f"no architecture {name!r}; there are: {', '.join(ARCHS)}")
    return ARCHS[name]


@dataclass(frozen=True)
class Needs:
    """Of one block; registers of one thread. None: not known."""

    warps: int
    smem_bytes: int
    regs: int | None = None
    tmem_columns: int = 0


@dataclass(frozen=True)
class Occupancy:
    ctas_per_sm: int | None  # None: not modelled
    limiter: str | None  # what there would have to be more of
    problem: str | None  # why not even one block runs: what it needs and what there is

    @property
    def fits(self) -> bool:
        return self.problem is None


def occupancy(arch: Arch, needs: Needs) -> Occupancy:
    """Blocks of the kernel that one SM holds at once, as far as its resources say."""
    problem = _problem(arch, needs)
    if problem is not None:
        limiter, text = problem
        return Occupancy(0, limiter, text)
    if not arch.smem_per_sm:
        return Occupancy(None, None, None)
    limits = _limits(arch, needs)
    limiter = min(limits, key=limits.__getitem__)
    if limits[limiter] == 0:  # a block fits, but for what rounding adds
        return Occupancy(0, limiter, f"one block needs more {limiter} than {arch.name} has")
    return Occupancy(limits[limiter], limiter, None)


def _problem(arch: Arch, needs: Needs) -> tuple[str, str] | None:
    if needs.smem_bytes > arch.smem_per_block:
        return "shared memory", (
            f"needs {_kb(needs.smem_bytes)} KB of shared memory, {arch.name} has "
            f"{_kb(arch.smem_per_block)} KB a block"
        )
    if needs.tmem_columns > arch.tmem_columns:
        return "tensor memory", (
            f"needs {needs.tmem_columns} columns of tensor memory, {arch.name} has "
            f"{arch.tmem_columns}"
        )
    threads = needs.warps * arch.warp_size
    if threads > _THREADS:
        return "warps", f"needs {threads} threads a block, there are {_THREADS}"
    if arch.backend == "cuda" and needs.regs is not None:
        wanted = _registers(needs) * needs.warps
        if wanted > _REGISTERS:
            return "registers", f"needs {wanted} registers a block, an SM has {_REGISTERS}"
    return None


def _limits(arch: Arch, needs: Needs) -> dict[str, int]:
    """Blocks that each resource allows."""
    warps = max(1, needs.warps)
    limits = {"blocks": arch.blocks, "warps": arch.warps // warps}
    smem = _rounded(needs.smem_bytes + arch.smem_reserved, _SMEM_UNIT)
    if smem:
        limits["shared memory"] = arch.smem_per_sm // smem
    if needs.regs:
        each_part = _REGISTERS // _PARTS // _registers(needs)
        limits["registers"] = each_part * _PARTS // _rounded(warps, _PARTS)
    if needs.tmem_columns:
        limits["tensor memory"] = arch.tmem_columns // needs.tmem_columns
    # Of equals the one that a block size changes is named.
    order = ("shared memory", "registers", "tensor memory", "warps", "blocks")
    return {name: limits[name] for name in order if name in limits}


def _registers(needs: Needs) -> int:
    """Of a warp."""
    return _rounded(min(needs.regs or 0, _MOST_REGISTERS) * 32, _REGISTER_UNIT)


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _kb(size: int) -> str:
    return f"{size / _KB:.4g}"
