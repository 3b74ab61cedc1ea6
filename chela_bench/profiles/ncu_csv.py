"""Reads the CSV of ncu's raw page: one row a launch, merged into one row a kernel. Pure.

Around the table stand lines of the tool's own (`==PROF==`); its second row holds units. Numbers
have separators, and which ones is the locale's choice: 33,564.50 or 33.564,50.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from chela_bench.errors import RecordError
from chela_bench.profiles import ncu
from chela_bench.records import Kernel

_PUSHED = "thread Domain:Push/Pop_Range"
_POINT = re.compile(rf'[:"]{ncu.RANGE}-(begin|(?P<late>late-)?(?P<point>\d+))[:"]')
_BYTES = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}
_BYTES_A_BLOCK = {f"{unit}/block": scale for unit, scale in _BYTES.items()}
_SCALES = {  # field of what is counted in bytes or nanoseconds -> unit -> how many
    "time_ns": {
        "ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9,
        "nsecond": 1.0, "usecond": 1e3, "msecond": 1e6, "second": 1e9,
    },
    **dict.fromkeys(("read_bytes", "write_bytes", "l2_bytes"), _BYTES),
    **dict.fromkeys(("smem_static_bytes", "smem_dynamic_bytes"), _BYTES_A_BLOCK),
}  # fmt: skip
_LIMITS = {
    "launch__occupancy_limit_registers": "registers",
    "launch__occupancy_limit_shared_mem": "shared memory",
    "launch__occupancy_limit_warps": "warps",
    "launch__occupancy_limit_blocks": "blocks",
    "launch__occupancy_limit_barriers": "barriers",
}
_COUNTS = {  # Kernel's field -> metric, whole numbers
    "time_ns": ncu.TIME,
    "read_bytes": ncu.READ,
    "write_bytes": ncu.WRITTEN,
    "l2_bytes": ncu.L2_BYTES,
    "local_load_instructions": ncu.LOCAL_LOADS,
    "local_store_instructions": ncu.LOCAL_STORES,
    "tensor_instructions": ncu.TENSOR,
    "bank_conflicts": ncu.CONFLICTS,
    "regs": "launch__registers_per_thread",
    "smem_static_bytes": "launch__shared_mem_per_block_static",
    "smem_dynamic_bytes": "launch__shared_mem_per_block_dynamic",
    "threads": "launch__block_size",
    "passes": "profiler__replayer_passes",
}
_SHARES = {
    "l2_hit_pct": ncu.L2_HITS,
    "occupancy_pct": ncu.OCCUPANCY,
    "occupancy_limit_pct": "sm__maximum_warps_per_active_cycle_pct",
    "waves": "launch__waves_per_multiprocessor",
}
_SUMMED = (
    "time_ns", "read_bytes", "write_bytes", "model_bytes", "l2_bytes", "local_load_instructions",
    "local_store_instructions", "tensor_instructions", "bank_conflicts",
)  # fmt: skip
_MEANS = ("l2_hit_pct", "occupancy_pct")


@dataclass(frozen=True)
class Launch:
    """One row: a kernel with one launch, and the point whose range it was in; `late` if it only
    evicted what the point's call, or the tool at its beginning, had left in L2."""

    point: int | None
    kernel: Kernel
    late: bool = False


@dataclass(frozen=True)
class Capture:
    launches: tuple[Launch, ...]
    missing: tuple[str, ...] = ()  # metrics that were asked for and have no column
    torn: bool = False  # its last row is cut off, and was dropped

    def by_point(self) -> dict[int | None, list[Kernel]]:
        """Kernels of each point. Not of the one that a torn capture ends in, which may lack some;
        launches outside of any point stand under None."""
        return {point: merged(kernels) for point, kernels in self.launched().items()}

    def launched(self) -> dict[int | None, list[Kernel]]:
        """The same, launch by launch."""
        found: dict[int | None, list[Kernel]] = {}
        for launch in self.launches:
            if not launch.late:
                found.setdefault(launch.point, []).append(launch.kernel)
        if self.torn and self.launches:
            found.pop(self.launches[-1].point, None)
        return found

    def late_bytes(self) -> dict[int, int]:
        """Bytes that each point's call had written, and that left L2 only after it."""
        found: dict[int, int] = {}
        for launch in self.launches:
            written = launch.kernel.write_bytes
            if launch.late and launch.point is not None and written is not None:
                found[launch.point] = found.get(launch.point, 0) + written
        return found


def parse(text: str, metrics: Sequence[str] = ()) -> Capture:
    """RecordError, with what ncu said, if there is no table in the text, or one of another page."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        said = ncu.complaint(text)
        nothing = f"no table of ncu's raw page (--csv --page raw) in {_begin(text)}"
        raise RecordError(str(said) if said else nothing)
    table = [line for line in lines[start:] if line.startswith('"')]
    if len(table) == 1 and not text.endswith("\n"):
        raise RecordError("the capture is cut off in its first line; write it again")
    header, *rows = csv.reader(io.StringIO("\n".join(table)))
    if "Kernel Name" not in header or "Metric Name" in header:
        raise RecordError(
            f"ncu's raw page was wanted (--csv --page raw); this table has {', '.join(header[:12])}"
        )
    for number_of, row in enumerate(rows[:-1], start=1):
        if len(row) != len(header):
            raise RecordError(
                f"row {number_of} of ncu's table has {len(row)} cells; its header has {len(header)}"
            )
    cut = not text.endswith("\n") and _cut(table[-1])
    torn = bool(rows) and (cut or len(rows[-1]) != len(header))
    whole = rows[:-1] if torn else rows
    units = dict(zip(header, whole[0], strict=True)) if whole and not whole[0][0] else {}
    whole = [row for row in whole if row[0]]
    number = _Numbers(header, whole)
    launches = tuple(_launch(dict(zip(header, row, strict=True)), units, number) for row in whole)
    missing = tuple(name for name in metrics if name not in header)
    return Capture(launches, missing, torn)


def merged(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Launches of one kernel, grid, block, registers and shared memory as one, in order of the
    first."""
    alike: dict[tuple[object, ...], list[Kernel]] = {}
    for kernel in kernels:
        smem = kernel.smem_static_bytes, kernel.smem_dynamic_bytes
        key = (kernel.name, kernel.grid, kernel.threads, kernel.regs, *smem)
        alike.setdefault(key, []).append(kernel)
    return [_as_one(each) for each in alike.values()]


def with_detail(kernels: Sequence[Kernel], detail: Sequence[Kernel]) -> list[Kernel]:
    """The kernels, and beside their bytes what another run counted of kernels of the same name,
    grid and launches; a kernel that it did not see stays as it is."""
    fields = ("l2_bytes", "l2_hit_pct", "local_load_instructions", "local_store_instructions",
              "tensor_instructions", "bank_conflicts", "occupancy_pct")  # fmt: skip
    left = {(k.name, k.grid, k.launches, k.regs): k for k in detail}
    found = []
    for kernel in kernels:
        more = left.get((kernel.name, kernel.grid, kernel.launches, kernel.regs))
        counted = {} if more is None else {name: getattr(more, name) for name in fields}
        found.append(kernel.model_copy(update=counted))
    return found


def _as_one(kernels: Sequence[Kernel]) -> Kernel:
    if len(kernels) == 1:
        return kernels[0]
    one: dict[str, object] = {"launches": sum(kernel.launches for kernel in kernels)}
    for name in _SUMMED:
        values = [getattr(kernel, name) for kernel in kernels]
        one[name] = None if None in values else sum(values)
    for name in _MEANS:
        values = [getattr(kernel, name) for kernel in kernels]
        weights = [kernel.time_ns or 1 for kernel in kernels]
        parts = [] if None in values else [v * w for v, w in zip(values, weights, strict=True)]
        one[name] = sum(parts) / sum(weights) if parts else None
    held: Counter[str] = Counter()
    for kernel in kernels:
        held.update(kernel.model_l2)
    one["model_l2"] = dict(held)
    passes = [kernel.passes for kernel in kernels if kernel.passes is not None]
    return kernels[0].model_copy(update={**one, "passes": max(passes, default=None)})


def _launch(row: dict[str, str], units: dict[str, str], number: _Numbers) -> Launch:
    def amount(metric: str) -> float | None:
        return number(row.get(metric, ""), metric)

    columns: dict[str, object] = {name: amount(metric) for name, metric in _SHARES.items()}
    for name, metric in _COUNTS.items():
        value = amount(metric)
        scale = 1.0 if value is None else _scale(name, metric, units.get(metric, ""))
        columns[name] = None if value is None else round(value * scale)
    limits = {what: value for name, what in _LIMITS.items() if (value := amount(name)) is not None}
    fewest = min(limits.values(), default=None)
    ranges = next((cell for name, cell in row.items() if name.startswith(_PUSHED)), "")
    found = _POINT.search(ranges)
    kernel = Kernel(
        name=row["Kernel Name"] or "unnamed",
        grid=row.get("Grid Size") or None,
        limiters=[what for what, value in limits.items() if value == fewest],
        **columns,  # type: ignore[arg-type]
    )
    if found is None:
        return Launch(None, kernel)
    if found["point"] is None:
        return Launch(None, kernel, late=True)
    return Launch(int(found["point"]), kernel, late=found["late"] is not None)


def _scale(field: str, metric: str, unit: str) -> float:
    """Of what has no unit, and of what is neither bytes nor time, 1."""
    known = _SCALES.get(field)
    if known is None or not unit:
        return 1.0
    if unit not in known:
        raise RecordError(f"{metric} is in {unit!r}; units of it are: {', '.join(known)}")
    return known[unit]


@dataclass
class _Numbers:
    """Reads numbers as the table writes them; every cell of a metric is evidence."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    decimal: str = field(init=False)

    def __post_init__(self) -> None:
        metrics = [n for n, name in enumerate(self.header) if "__" in name]
        points = {mark for row in self.rows for n in metrics if (mark := _decimal_mark(row[n]))}
        if len(points) > 1:
            raise RecordError("numbers with decimal points and with decimal commas in one table")
        self.decimal = points.pop() if points else "."

    def __call__(self, cell: str, metric: str) -> float | None:
        bare = "".join(c for c in cell if not c.isspace() and c not in "'\u2019")
        bare = bare.replace("," if self.decimal == "." else ".", "").replace(self.decimal, ".")
        if not bare or bare in ("n/a", "nan"):
            return None
        try:
            value = float(bare)
        except ValueError:
            raise RecordError(f"{metric} should be a number; ncu gives {cell!r}") from None
        if not 0 <= value < float("inf"):
            raise RecordError(f"{metric} should be a count; ncu gives {cell!r}")
        return value


def _decimal_mark(cell: str) -> str | None:
    """What can only be a decimal mark in this number: the last of two marks, or one that three
    digits do not follow. None: it tells nothing (`1,024`, `17`, a word)."""
    if not re.fullmatch(r"[\d.,\s'\u2019]+", cell):
        return None
    marks = re.findall(r"[.,]", cell)
    if not marks:
        return None
    if len(set(marks)) == 2:
        return str(marks[-1])
    whole, fraction = re.split(r"[.,]", cell, maxsplit=1)
    if len(marks) > 1:  # thousands, so that the other one would be the decimal mark
        return "," if marks[0] == "." else "."
    mark: str = marks[0]
    return mark if len(fraction) != 3 or len(whole) > 3 or whole == "0" else None


def _cut(line: str) -> bool:
    """Whether a row of quoted cells ends inside one."""
    return not line.endswith('"') or line.count('"') % 2 == 1


def _begin(text: str) -> str:
    shown = " ".join(text.split())
    return repr(shown[:80]) if shown else "an empty text"
