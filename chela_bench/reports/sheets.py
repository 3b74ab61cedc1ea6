"""Tables of what was counted, beside that of times: bytes of each call, its kernels, the roofline.

The same rows for Markdown, HTML and the terminal. A column that says nothing is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from chela_bench.records import Ceilings, Kernel, Point, Run
from chela_bench.reports.groups import Group
from chela_bench.reports.roofline import Roof, intensities
from chela_bench.reports.rows import Row, rows
from chela_bench.reports.text import length, plain, three_digits

BYTES_NOTE = (
    "Read and written: counted by hardware (ncu), from a cold L2; both: their sum, or what NVML "
    "counts over a loop (gpm). x model: over the implementation's own formula. x floor: the bytes, "
    "or the model's where nothing was counted, over every input and output once. late: written "
    "bytes that L2 held until after the call. SRAM: of a block, the most of any kernel."
)
KERNELS_NOTE = (
    "Each kernel alone under ncu, L2 cold before the first one. model: by the implementation's own "
    "formula what the kernel must move, given its own inputs and outputs, and so its floor too; in "
    "L2: MiB more, of tensors that the formula takes L2 to hold. Up to half of L2 is written only "
    "while the next kernels run, or after the call (late), so one kernel's bytes may be another's "
    "in the column written. of copy: its bytes over its time, as a share of the copy bandwidth. "
    "SRAM: static + dynamic, of a block. occupancy: achieved / "
    "allowed, limited by what stands beside it."
)
CAPTURE_NOTE = (
    "SRAM: static + dynamic, of a block. occupancy: achieved / allowed, limited by what stands "
    "beside it. Above one pass, bytes are of a warm L2 in part."
)
ROOFLINE_NOTE = (
    "The function's least FLOPs over the bytes moved and over the time; roof: the lower of the "
    "matmul rate and intensity times copy bandwidth, both measured in this run. roof set by: which "
    "of the two is lower there, not what holds the kernel back."
)


@dataclass(frozen=True)
class Sheet:
    """A table of text; the first `left` columns are words, the rest numbers."""

    name: str
    note: str
    left: int
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def without_empty(self) -> Sheet:
        kept = [
            n for n in range(len(self.header)) if n < self.left or any(row[n] for row in self.rows)
        ]
        return Sheet(
            self.name,
            self.note,
            self.left,
            tuple(self.header[n] for n in kept),
            tuple(tuple(row[n] for n in kept) for row in self.rows),
        )


def sheets(run: Run, group: Group) -> list[Sheet]:
    """Those of the group that have rows: bytes and roofline once something was measured, kernels
    once something was profiled."""
    found = rows(group)
    measured = [row for row in found if row.point.hbm.measured_bytes is not None]
    if not measured:
        return []
    bytes_ = [row for row in found if row.point.hbm.total_bytes is not None]
    named = [
        ((length(row.tokens), row.label), kernel)
        for row in measured
        for kernel in row.point.kernels
    ]
    every = [
        _bytes(bytes_),
        _kernels(("T", "implementation"), named, run.ceilings, KERNELS_NOTE),
        _roofline(found, run.ceilings),
    ]
    return [sheet.without_empty() for sheet in every if sheet.rows]


def roofline_sheet(run: Run, group: Group) -> Sheet:
    """Of measured bytes where there are any, else of modelled ones."""
    return _roofline(rows(group), run.ceilings).without_empty()


def _bytes(found: Iterable[Row]) -> Sheet:
    """Of each call: measured beside modelled, each over the floor."""
    header = (
        "T", "implementation", "time ms", "launches", "read MiB", "written MiB", "late MiB",
        "both MiB", "model MiB", "x model", "floor MiB", "x floor", "SRAM KiB", "source",
        "gpm / ncu",
    )  # fmt: skip
    lines = []
    for row in found:
        point, hbm = row.point, row.point.hbm
        if point.outcome != "ok":
            continue
        lines.append(
            (
                length(row.tokens),
                row.label,
                _time(point),
                "" if point.launches is None else f"{point.launches}",
                _mib(hbm.read_bytes),
                _mib(hbm.write_bytes),
                _mib(hbm.late_write_bytes),
                _mib(hbm.measured_bytes),
                _mib(hbm.model_bytes),
                _number(hbm.measured_over_model),
                _mib(point.compulsory_bytes),
                _number(point.hbm_x_floor),
                _sram(point.kernels),
                hbm.source or "",
                _number(_gpm_over_ncu(point)),
            )
        )
    return Sheet("HBM traffic", BYTES_NOTE, 2, header, tuple(lines))


def kernel_sheet(found: Iterable[tuple[str, Kernel]]) -> Sheet:
    """Of a capture: kernels by the number of their point, which may be empty."""
    rows = [((point,), kernel) for point, kernel in found]
    return _kernels(("point",), rows, Ceilings(), CAPTURE_NOTE).without_empty()


def _kernels(
    leading: tuple[str, ...],
    found: Iterable[tuple[tuple[str, ...], Kernel]],
    ceilings: Ceilings,
    note: str,
) -> Sheet:
    columns: dict[str, Callable[[Kernel], str]] = {
        "launches": lambda k: f"{k.launches}",
        "us": lambda k: "" if k.time_ns is None else three_digits(k.time_ns / 1e3),
        "read MiB": lambda k: _mib(k.read_bytes),
        "written MiB": lambda k: _mib(k.write_bytes),
        "both MiB": lambda k: _mib(k.measured_bytes),
        "model MiB": lambda k: _mib(k.model_bytes),
        "x model": lambda k: _number(k.measured_over_model),
        "model: in L2": _in_l2,
        "of copy": lambda k: _of_copy(k, ceilings),
        "L2 MiB": lambda k: _mib(k.l2_bytes),
        "L2 hits": lambda k: _percent(k.l2_hit_pct),
        "registers": lambda k: "" if k.regs is None else f"{k.regs}",
        "SRAM KiB": lambda k: _static_dynamic(k),
        "occupancy": lambda k: _occupancy(k),
        "limited by": lambda k: ", ".join(k.limiters),
        "waves": lambda k: _number(k.waves),
        "tensor": lambda k: _count(k.tensor_instructions),
        "local": lambda k: _count(_both(k.local_load_instructions, k.local_store_instructions)),
        "conflicts": lambda k: _count(k.bank_conflicts),
        "passes": lambda k: f"{k.passes}" if k.passes is not None and k.passes > 1 else "",
    }
    lines = [
        (*named, plain(kernel.name), *(show(kernel) for show in columns.values()))
        for named, kernel in found
    ]
    return Sheet("Kernels", note, len(leading) + 1, (*leading, "kernel", *columns), tuple(lines))


def _roofline(found: Iterable[Row], ceilings: Ceilings) -> Sheet:
    header = (
        "T", "implementation", "FLOP/byte measured", "modelled", "at the floor", "TFLOP/s",
        "roof TFLOP/s", "of the roof", "roof set by",
    )  # fmt: skip
    lines = []
    for row in found:
        point, roof = row.point, Roof.of(ceilings, row.point.dtype)
        if roof is None or point.time_ns is None or point.tflop_per_s is None:
            continue
        measured, modelled, least = intensities(point)
        known = modelled if measured is None else measured
        if known is None:
            continue
        top = roof.tflop_per_s(known)
        lines.append(
            (
                length(row.tokens),
                row.label,
                _number(measured),
                _number(modelled),
                _number(least),
                three_digits(point.tflop_per_s),
                three_digits(top),
                _percent(100 * point.tflop_per_s / top),
                "memory" if known < roof.ridge else "matmul",
            )
        )
    return Sheet("Roofline", ROOFLINE_NOTE, 2, header, tuple(lines))


def _time(point: Point) -> str:
    if point.seconds is None:
        return ""
    return three_digits(point.seconds * 1e3) + (" (wall)" if point.time_ns is None else "")


def _gpm_over_ncu(point: Point) -> float | None:
    hbm = point.hbm
    if hbm.source != "ncu" or hbm.gpm_bytes is None or not hbm.measured_bytes:
        return None
    return hbm.gpm_bytes / hbm.measured_bytes


def _sram(kernels: Sequence[Kernel]) -> str:
    """The most that a block of any kernel has."""
    known = [_both(k.smem_static_bytes, k.smem_dynamic_bytes) for k in kernels]
    most = max((size for size in known if size is not None), default=None)
    return "" if most is None else three_digits(most / 1024)


def _static_dynamic(kernel: Kernel) -> str:
    sizes = (kernel.smem_static_bytes, kernel.smem_dynamic_bytes)
    known = [three_digits(size / 1024) for size in sizes if size is not None]
    return " + ".join(known)


def _in_l2(kernel: Kernel) -> str:
    return ", ".join(f"{plain(tensor)} {_mib(size)}" for tensor, size in kernel.model_l2.items())


def _occupancy(kernel: Kernel) -> str:
    achieved, allowed = kernel.occupancy_pct, kernel.occupancy_limit_pct
    known = [_percent(share) for share in (achieved, allowed) if share is not None]
    return " / ".join(known)


def _of_copy(kernel: Kernel, ceilings: Ceilings) -> str:
    moved = kernel.measured_bytes
    if moved is None or not kernel.time_ns or not ceilings.copy_gb_per_s:
        return ""
    return _percent(100 * moved / kernel.time_ns / ceilings.copy_gb_per_s)


def _both(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _mib(size: int | None) -> str:
    return "" if size is None else three_digits(size / 2**20)


def _number(value: float | None) -> str:
    return "" if value is None else three_digits(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}".replace(",", " ")
