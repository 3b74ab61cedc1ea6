"""Time and memory against length, as matplotlib figures; `render` turns one into bytes.

Both axes are logarithmic, so that T**p is a straight line of slope p. The strip below them names
what failed, at its length and without a number.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import matplotlib
from matplotlib.figure import Figure

from chela_bench.records import ConfigValue, Point, Run
from chela_bench.reports.drawing import Line, Miss, Picture, Quantity, draw
from chela_bench.reports.fit import fitted_slope
from chela_bench.reports.groups import OTHER_FUNCTIONS, Group, Series, groups, reading_order
from chela_bench.reports.style import Style, settings, styles, tint
from chela_bench.reports.text import duration, machine, memory, plain

Format = Literal["svg", "png", "pdf"]

_PICTURE_DPI = 200
_NO_DATES: dict[Format, dict[str, None]] = {
    "svg": {"Date": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
}


@dataclass(frozen=True)
class _Sweep:
    """A group, the group of another function that is drawn beside it, and everyone's style."""

    run: Run
    group: Group
    beside: Group | None
    styles: Mapping[str, Style]

    @property
    def drawn(self) -> list[tuple[Series, Style, str]]:
        """Each series with its style and name."""
        other = self.beside.series if self.beside else ()
        op = plain(self.beside.op) if self.beside else ""
        return [
            *((s, self._style(s, self.group), s.label) for s in self.group.series),
            *(
                (s, self._style(s, self.beside), f"{op}/{s.label} (another function)")
                for s in other
            ),
        ]

    def _style(self, series: Series, group: Group | None) -> Style:
        """Configurations of one implementation share its style, each paler than the one before."""
        family = [each for each in group.series if each.impl == series.impl] if group else []
        family.sort(key=lambda each: reading_order(each.points[0]))
        colour, marker = self.styles[series.impl]
        return Style(tint(colour, 0.65 * family.index(series) / len(family)), marker)


def figures(run: Run, points: Sequence[Point]) -> dict[str, Figure]:
    """Every figure of a run: `linear_attention-fwd-bf16-B1-H16-K128-V128-time` and `...-memory`.

    The names are safe as file names. An op that is drawn beside another has no figure of its own.
    """
    sweeps = _sweeps(run, points)
    beside = [sweep.beside for sweep in sweeps]
    found: dict[str, Figure] = {}
    for sweep in sweeps:
        if any(sweep.group is group for group in beside):
            continue
        slug = sweep.group.slug
        while f"{slug}-time" in found:
            slug += "_"
        found[f"{slug}-time"] = draw(_time_picture(sweep))
        memory_picture = _memory_picture(sweep)
        if memory_picture is not None:
            found[f"{slug}-memory"] = draw(memory_picture)
    return found


def time_figure(
    run: Run,
    points: Sequence[Point],
    *,
    op: str,
    direction: str,
    dtype: str,
    dims: Mapping[str, ConfigValue],
) -> Figure:
    """Median time against length, with quartiles, the floor, and each line's exponent of T.

    The exponent is `fitted_slope`'s, over the longer half of a line's lengths, with its 95 %
    interval. Points of softmax_attention at the same direction, dtype and dims are drawn dashed
    beside linear_attention, as another function. dims is as `groups.dims_of` gives it.
    """
    return draw(_time_picture(_sweep(run, points, op, direction, dtype, dims)))


def memory_figure(
    run: Run,
    points: Sequence[Point],
    *,
    op: str,
    direction: str,
    dtype: str,
    dims: Mapping[str, ConfigValue],
) -> Figure | None:
    """Peak memory beyond the live inputs against length; None where none was measured."""
    picture = _memory_picture(_sweep(run, points, op, direction, dtype, dims))
    return None if picture is None else draw(picture)


def render(figure: Figure, format: Format) -> bytes:
    """The figure as a file's content; the same figure gives the same bytes, at any time."""
    content = io.BytesIO()
    with matplotlib.rc_context(settings()):
        figure.savefig(content, format=format, dpi=_PICTURE_DPI, metadata=_NO_DATES[format])
    return content.getvalue()


def _sweeps(run: Run, points: Sequence[Point]) -> list[_Sweep]:
    found = groups(points)
    impls: dict[str, set[str]] = defaultdict(set)
    for point in points:
        impls[point.op].add(point.impl)
    sweeps = []
    for group in found:
        other = OTHER_FUNCTIONS.get(group.op, "")
        beside = next((g for g in found if g.is_like(replace(group, op=other))), None)
        looks = styles(impls[group.op] | impls.get(other, set()))
        sweeps.append(_Sweep(run, group, beside, looks))
    return sweeps


def _sweep(
    run: Run,
    points: Sequence[Point],
    op: str,
    direction: str,
    dtype: str,
    dims: Mapping[str, ConfigValue],
) -> _Sweep:
    wanted = Group(op, direction, dtype, dims, ())
    found = (sweep for sweep in _sweeps(run, points) if sweep.group.is_like(wanted))
    return next(found, _Sweep(run, wanted, None, {}))


def _time_picture(sweep: _Sweep) -> Picture:
    run, group = sweep.run, sweep.group
    lines = [
        Line(
            name=name + _slope(series),
            style=style,
            values=tuple((p.shape["T"], p.seconds * 1e9) for p in series.ok if p.seconds),
            spread=tuple((p.shape["T"], q.q1, q.q3) for p in series.ok if (q := p.time_ns)),
            dashed=series not in group.series,
            hollow=any(p.time_ns is None for p in series.ok),
        )
        for series, style, name in sweep.drawn
        if series.ok
    ]
    notes = []
    if any("T^" in line.name for line in lines):
        notes.append("T^p ±95 %: fitted over the longer half of a line's lengths")
    if any(line.hollow for line in lines):
        notes.append("hollow: wall time")
    floors = [(tokens, group.floor_ns(tokens)) for tokens in group.lengths]
    on_cpu = run.environment.device == "cpu"
    return _picture(
        sweep,
        Quantity("time per call" if on_cpu else "kernel time per call", duration, 10, (1, 2, 5)),
        lines=tuple(lines),
        misses=_misses(sweep),
        nothing="no time: nothing in this sweep succeeded" if group.points else "no points",
        notes=tuple(notes),
        floor=tuple((tokens, floor) for tokens, floor in floors if floor is not None),
        floor_name=_floor_name(sweep),
    )


def _memory_picture(sweep: _Sweep) -> Picture | None:
    lines, unused = [], []
    for series, style, name in sweep.drawn:
        measured = [(p.shape["T"], p.peak_bytes) for p in series.ok if p.peak_bytes is not None]
        values = tuple((tokens, size) for tokens, size in measured if size)
        zeros = tuple(tokens for tokens, size in measured if not size)
        if values:
            lines.append(Line(name, style, values, dashed=series not in sweep.group.series))
        if zeros:  # no place for them on a logarithmic axis
            unused.append(Miss(f"{name}: 0 B", style.colour, zeros))
    if not lines and not unused:
        return None
    return _picture(
        sweep,
        Quantity("peak memory beyond the inputs", memory, 16, (1, 2, 4, 8)),
        lines=tuple(lines),
        misses=(*_misses(sweep), *unused),
        nothing="no memory used beyond the inputs",
    )


def _picture(
    sweep: _Sweep,
    quantity: Quantity,
    *,
    lines: tuple[Line, ...],
    misses: tuple[Miss, ...],
    nothing: str,
    notes: tuple[str, ...] = (),
    floor: tuple[tuple[int, float], ...] = (),
    floor_name: str = "",
) -> Picture:
    group = sweep.group
    dims = " ".join(f"{name}={size}" for name, size in group.dims.items())
    return Picture(
        title=plain(f"{group.op} · {group.direction} · {group.dtype} · {dims}"),
        subtitle="  ·  ".join(machine(sweep.run, group.points)),
        lengths=group.lengths,
        quantity=quantity,
        lines=lines,
        misses=misses,
        nothing=nothing,
        notes=notes,
        floor=floor,
        floor_name=floor_name,
    )


def _slope(series: Series) -> str:
    """`  T^0.98 ±0.01`; nothing where kernel and wall times would be fitted together."""
    if len({point.time_ns is None for point in series.ok}) != 1:
        return ""
    fit = fitted_slope([p.shape["T"] for p in series.ok], [p.seconds or 0.0 for p in series.ok])
    if fit is None:
        return ""
    return f"  T^{fit.slope:.2f}\N{NO-BREAK SPACE}±{fit.high - fit.slope:.2f}"


def _misses(sweep: _Sweep) -> tuple[Miss, ...]:
    """One row of the strip for each series and outcome."""
    rows = []
    for series, style, name in sweep.drawn:
        by_outcome: dict[str, list[int]] = defaultdict(list)
        for point in series.failed:
            by_outcome[point.outcome].append(point.shape["T"])
        for outcome, tokens in by_outcome.items():
            rows.append(Miss(f"{name}: {outcome}", style.colour, tuple(tokens)))
    return tuple(rows)


def _floor_name(sweep: _Sweep) -> str:
    """The floor is copying time, unless the least FLOPs at the matmul rate take longer."""
    copy = sweep.run.ceilings.copy_gb_per_s
    copying = copy is not None and all(
        point.floor_ns <= 1.01 * point.compulsory_bytes / copy
        for point in sweep.group.points
        if point.floor_ns is not None and point.compulsory_bytes is not None
    )
    if copying:
        return f"HBM floor at {copy:.0f} GB/s"
    return "floor: HBM copy or matmul rate, whichever is longer"
