"""What tables say of a point, the same in Markdown and in HTML: rows, columns, notes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from chela_bench.records import Point
from chela_bench.reports.crossings import comparison
from chela_bench.reports.groups import OTHER_FUNCTIONS, Group, Series
from chela_bench.reports.text import memory, plain, three_digits

MODEL = "model"
STEPS = (
    "A step of one token of each sequence, its cache nearly full with T: the mean over a block of "
    "64 steps."
)
_LAYER_COLUMNS, _STEP_COLUMNS = ("parameters", "GFLOP"), ("bytes/token",)


class Moved(NamedTuple):
    """Bytes through device memory in one call, and where the figure comes from."""

    size: int
    source: str  # "ncu", "gpm" or MODEL


@dataclass(frozen=True)
class Row:
    """One point in a table."""

    tokens: int
    label: str  # of its series
    point: Point
    fastest: bool  # of the correct ones at this length


@dataclass(frozen=True)
class Column:
    """The amount that a cell shows, to sort by, and how it is written; null is an empty cell."""

    value: Callable[[Point], float | None]
    written: Callable[[Point, float], str]

    def cell(self, point: Point) -> tuple[float | None, str]:
        """A failed point has no number."""
        value = self.value(point) if point.outcome == "ok" else None
        return value, "" if value is None else self.written(point, value)


@dataclass(frozen=True)
class Null:
    """A column that correct points leave empty, why, and which (`every point`, or op/impl)."""

    column: str
    reason: str
    where: str


def hbm_bytes(point: Point) -> Moved | None:
    """Measured, read plus written; else modelled; else None."""
    hbm, total = point.hbm, point.hbm.total_bytes
    if total is None:
        return None
    modelled = hbm.measured_bytes is None
    return Moved(total, MODEL if modelled else hbm.source or "measured")


def rows(group: Group) -> list[Row]:
    """By length, then from the fastest implementation to the slowest; failures last."""
    found: list[tuple[int, Series, Point]] = [
        (tokens, series, point)
        for tokens in group.lengths
        for series in group.series
        if (point := series.at(tokens)) is not None
    ]
    found.sort(key=lambda row: (row[0], row[2].seconds is None, row[2].seconds or 0.0))
    return [
        Row(tokens, series.label, point, point is group.fastest(tokens))
        for tokens, series, point in found
    ]


def notes(group: Group, beside: Group | None = None) -> Iterator[str]:
    """What a reader of the group's table must know, and how the group beside it compares."""
    for op, other in OTHER_FUNCTIONS.items():
        if group.op == other:
            yield f"Another function than {plain(op)}, for comparison."
    ok = [point for point in group.points if point.outcome == "ok"]
    if any(point.time_ns is None for point in ok):
        yield "(wall): from launch to synchronised end; too many launches for a kernel time."
    if group.direction == "decode":
        yield STEPS
    yield from comparison(group, beside)


def columns(group: Group, names: Iterable[str]) -> dict[str, Column]:
    """Those of the names, in this order, that say something of the group: what a layer learns and
    computes stands at layers, bytes of a token at steps, energy where it was measured."""
    quiet = set() if group.is_layer else set(_LAYER_COLUMNS)
    quiet |= set() if group.direction == "decode" else set(_STEP_COLUMNS)
    quiet |= set() if any(p.energy_j is not None for p in group.points) else {"mJ"}
    return {name: COLUMNS[name] for name in names if name not in quiet}


def nulls(points: Iterable[Point]) -> list[Null]:
    """What was not measured, by column."""
    ok = [point for point in points if point.outcome == "ok"]
    empty: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in ok:
        for null in point.null_reasons.items():
            empty[null].append(point)
    return [
        Null(
            plain(column),
            plain(why),
            "every point"
            if len(members) == len(ok)
            else ", ".join(sorted({plain(f"{point.op}/{point.impl}") for point in members})),
        )
        for (column, why), members in sorted(empty.items())
    ]


def _in(unit: float, value: Callable[[Point], float | None]) -> Column:
    return Column(value, lambda _, amount: three_digits(amount / unit))


def _time(point: Point, seconds: float) -> str:
    return three_digits(seconds * 1e3) + (" (wall)" if point.time_ns is None else "")


def _first_quartile(point: Point) -> int | None:
    return None if point.time_ns is None else point.time_ns.q1


def _quartiles(point: Point, _: float) -> str:
    time = point.time_ns
    if time is None:
        return ""
    return f"{three_digits(time.q1 / 1e6)}\N{EN DASH}{three_digits(time.q3 / 1e6)}"


def _samples(point: Point) -> int | None:
    return point.wall_n if point.time_ns is None else point.time_ns.n


def _moved(point: Point) -> int | None:
    moved = hbm_bytes(point)
    return None if moved is None else moved.size


def _with_source(point: Point, size: float) -> str:
    moved = hbm_bytes(point)
    return f"{three_digits(size / 2**20)} ({moved.source if moved else MODEL})"


def _with_budget(point: Point, error: float) -> str:
    budget = "" if point.error_budget is None else f" / {point.error_budget:.1e}"
    return f"{error:.1e}{budget}"


def engineering(value: float) -> str:
    """`62.5M`, `1.20G`."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if float(three_digits(value / scale)) >= 1:
            return f"{three_digits(value / scale)}{unit}"
    return three_digits(value)


COLUMNS = {
    "time ms": Column(lambda p: p.seconds, _time),
    "quartiles ms": Column(_first_quartile, _quartiles),
    "samples": Column(_samples, lambda _, n: f"{n:d}"),
    "x floor": _in(1, lambda p: p.x_floor),
    "tokens/s": Column(lambda p: p.tokens_per_s, lambda _, rate: engineering(rate)),
    "bytes/token": Column(lambda p: p.hbm_bytes_per_token, lambda _, size: memory(size)),
    "parameters": Column(lambda p: p.parameters, lambda _, count: engineering(count)),
    "GFLOP": _in(1e9, lambda p: p.flops),
    "GB/s": _in(1, lambda p: p.gb_per_s),
    "TFLOP/s": _in(1, lambda p: p.tflop_per_s),
    "peak MiB": _in(2**20, lambda p: p.peak_bytes),
    "HBM MiB": Column(_moved, _with_source),
    "host us": _in(1e3, lambda p: p.host_ns),
    "mJ": _in(1e-3, lambda p: p.energy_j),
    "error / budget": Column(lambda p: p.error_rel, _with_budget),
}
