"""What each figure of a run says: records in, `drawing.Picture` out.

Time, its multiple of the floor, HBM bytes, peak memory and error, each against length. A series
that has no value at a length leaves a gap, never a number; what failed stands in the strip.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chela_bench.records import Point, Run
from chela_bench.reports.crossings import crossings, slope, slope_label
from chela_bench.reports.drawing import Line, Mark, Miss, Picture, Quantity
from chela_bench.reports.groups import (
    OTHER_FUNCTIONS,
    Group,
    Series,
    drawn_beside,
    drawn_with,
    named_groups,
    reading_order,
)
from chela_bench.reports.roofline import Roof
from chela_bench.reports.roofline_drawing import RoofPicture, track
from chela_bench.reports.rows import MODEL, hbm_bytes
from chela_bench.reports.style import INK, Style, styles, tint
from chela_bench.reports.text import duration, machine, memory, plain, three_digits

_Value = tuple[int, float]  # length, amount


@dataclass(frozen=True)
class Sweep:
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

    def is_other(self, series: Series) -> bool:
        """Whether it is another function's, drawn for comparison."""
        return series not in self.group.series

    def _style(self, series: Series, group: Group | None) -> Style:
        """Configurations of one implementation share its style, each paler than the one before."""
        family = [each for each in group.series if each.impl == series.impl] if group else []
        family.sort(key=lambda each: reading_order(each.points[0]))
        colour, marker = self.styles[series.impl]
        return Style(tint(colour, 0.65 * family.index(series) / len(family)), marker)


def sweeps(run: Run, points: Sequence[Point]) -> dict[str, Sweep]:
    """What has figures of its own, by slug: not a group that is drawn beside another."""
    found = named_groups(points)
    impls: dict[str, set[str]] = defaultdict(set)
    for point in points:
        impls[point.op].add(point.impl)
    return {
        slug: Sweep(
            run,
            group,
            drawn_beside(group, found.values()),
            styles(impls[group.op] | impls.get(OTHER_FUNCTIONS.get(group.op, ""), set())),
        )
        for slug, group in found.items()
        if drawn_with(group, found.values()) is None
    }


def time_picture(sweep: Sweep) -> Picture:
    run, group = sweep.run, sweep.group
    lines = [
        Line(
            name=name + _slope(series),
            style=style,
            values=tuple((p.shape["T"], p.seconds * 1e9) for p in series.ok if p.seconds),
            spread=tuple((p.shape["T"], q.q1, q.q3) for p in series.ok if (q := p.time_ns)),
            dashed=sweep.is_other(series),
            hollow=any(p.time_ns is None for p in series.ok),
        )
        for series, style, name in sweep.drawn
        if series.ok
    ]
    met = [] if sweep.beside is None else crossings(group, sweep.beside)
    notes = [f"{each.faster.label} overtakes {each.slower.label} at {each.place}" for each in met]
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
        nothing="no time: nothing in this sweep succeeded",
        notes=tuple(notes),
        marks=tuple(Mark(each.tokens, each.seconds * 1e9, each.place) for each in met),
        floor=tuple((tokens, floor) for tokens, floor in floors if floor is not None),
        floor_name=_floor_name(sweep),
    )


def floor_picture(sweep: Sweep) -> Picture | None:
    """Kernel time over the floor; None where no point has both."""
    lines, untimed = [], []
    for series, style, name in sweep.drawn:
        timed = [(p, q, f) for p in series.ok if (q := p.time_ns) and (f := p.floor_ns)]
        if timed:
            values = tuple((p.shape["T"], q.median / f) for p, q, f in timed)
            spread = tuple((p.shape["T"], q.q1 / f, q.q3 / f) for p, q, f in timed)
            lines.append(Line(name, style, values, spread, dashed=sweep.is_other(series)))
        elif series.ok:
            untimed.append(name)
    if not lines:
        return None
    notes = [f"no kernel time: {', '.join(untimed)}"] if untimed else []
    if any(line.dashed for line in lines):
        notes.append("each function over its own floor")
    tokens = sorted({tokens for line in lines for tokens, _ in line.values})
    return _picture(
        sweep,
        Quantity("kernel time as a multiple of the floor", _multiple, 10, (1, 2, 5)),
        lines=tuple(lines),
        misses=_misses(sweep),
        notes=tuple(notes),
        floor=tuple((t, 1.0) for t in tokens),
        floor_name=_floor_name(sweep),
    )


def hbm_picture(sweep: Sweep) -> Picture | None:
    """HBM bytes of a call, measured where they were, else modelled; None where neither is.

    The floor is the compulsory bytes. Where both kinds are drawn, the modelled are hollow.
    """
    found: list[tuple[Series, Style, str, str, list[_Value]]] = []
    unknown = []
    for series, style, name in sweep.drawn:
        by_source: dict[str, list[_Value]] = defaultdict(list)
        for point in series.ok:
            if (moved := hbm_bytes(point)) is not None:
                by_source[moved.source].append((point.shape["T"], moved.size))
        found += [(series, style, name, source, by_source[source]) for source in sorted(by_source)]
        if series.ok and not by_source:
            unknown.append(name)
    if not found:
        return None
    sources = sorted({source for *_, source, _ in found})
    lines, zeros = [], []
    for series, style, name, source, values in found:
        full = f"{name} ({source})" if len(sources) > 1 else name
        hollow = source == MODEL and len(sources) > 1
        line, zero = _above_zero(full, style, values, sweep.is_other(series), hollow=hollow)
        lines += line
        zeros += zero
    how = " or ".join(
        "modelled" if source == MODEL else f"measured ({source})" for source in sources
    )
    compulsory = [(tokens, sweep.group.compulsory_bytes(tokens)) for tokens in sweep.group.lengths]
    return _picture(
        sweep,
        Quantity(f"HBM bytes per call, {how}", memory, 16, (1, 2, 4, 8)),
        lines=tuple(lines),
        misses=(*_misses(sweep), *zeros),
        nothing="no HBM bytes",
        notes=(f"neither measured nor modelled: {', '.join(unknown)}",) if unknown else (),
        floor=tuple((tokens, size) for tokens, size in compulsory if size),
        floor_name="compulsory bytes: each input and output once",
    )


def memory_picture(sweep: Sweep) -> Picture | None:
    """Peak memory beyond the live inputs; None where none was measured."""
    lines, zeros = [], []
    for series, style, name in sweep.drawn:
        values = [(p.shape["T"], p.peak_bytes) for p in series.ok if p.peak_bytes is not None]
        line, zero = _above_zero(name, style, values, sweep.is_other(series))
        lines += line
        zeros += zero
    if not lines and not zeros:
        return None
    return _picture(
        sweep,
        Quantity("peak memory beyond the inputs", memory, 16, (1, 2, 4, 8)),
        lines=tuple(lines),
        misses=(*_misses(sweep), *zeros),
        nothing="no memory used beyond the inputs",
    )


def error_picture(sweep: Sweep) -> Picture | None:
    """Error of correct points, and what rounding allows; None where none was compared."""
    lines, zeros, unknown = [], [], []
    for series, style, name in sweep.drawn:
        values = [(p.shape["T"], p.error_rel) for p in series.ok if p.error_rel is not None]
        line, zero = _above_zero(name, style, values, sweep.is_other(series), zero="error 0")
        lines += line
        zeros += zero
        if series.ok and not values:
            unknown.append(name)
    if not lines and not zeros:
        return None
    return _picture(
        sweep,
        Quantity("relative error, against float64", lambda value: f"{value:.1e}", 10, (1, 2, 5)),
        lines=tuple(lines),
        misses=(*_misses(sweep), *zeros),
        nothing="every error is 0",
        notes=(f"error not recorded: {', '.join(unknown)}",) if unknown else (),
        limits=_budgets(sweep),
    )


def _budgets(sweep: Sweep) -> tuple[Line, ...]:
    """One for all that are allowed the same; of several each says whose. They differ by function,
    and in fp32 by what the operands are rounded to."""
    found: list[tuple[dict[int, float], list[Series]]] = []
    for series, _, _ in sweep.drawn:
        own = {p.shape["T"]: p.error_budget for p in series.points if p.error_budget}
        for budgets, sharing in found:
            common = own.keys() & budgets.keys()
            if common and all(math.isclose(own[t], budgets[t], rel_tol=0.01) for t in common):
                budgets.update(own)
                sharing.append(series)
                break
        else:
            if own:
                found.append((own, [series]))
    names = [_whose(sweep, sharing, [each for _, each in found]) for _, sharing in found]
    return tuple(
        Line(
            f"error budget of {name}" if len(found) > 1 else "error budget",
            Style(tint(INK, 0.6 * i / len(found)), ""),
            tuple(sorted(budgets.items())),
            dashed=all(map(sweep.is_other, sharing)),
        )
        for i, (name, (budgets, sharing)) in enumerate(zip(names, found, strict=True))
    )


def _whose(sweep: Sweep, sharing: Sequence[Series], all_sharing: Sequence[Sequence[Series]]) -> str:
    """The function, if no other budget is one of its own; else the implementations."""
    kinds = [{sweep.is_other(series) for series in each} for each in all_sharing]
    mine = {sweep.is_other(series) for series in sharing}
    if len(mine) == 1 and sum(bool(mine & kind) for kind in kinds) == 1:
        group = sweep.beside if True in mine else sweep.group
        return plain((group or sweep.group).op)
    return ", ".join(series.label for series in sharing)


def roofline_picture(sweep: Sweep) -> RoofPicture | None:
    """None where a ceiling was not measured, or no point has kernel time, FLOPs and bytes.

    Of the group alone: another function's FLOPs are others.
    """
    group, roof = sweep.group, Roof.of(sweep.run.ceilings, sweep.group.dtype)
    if roof is None:
        return None
    found = [
        track(name, style, series.ok)
        for series, style, name in sweep.drawn
        if not sweep.is_other(series)
    ]
    tracks = tuple(each for each in found if each is not None)
    if not tracks:
        return None
    measured = any(each.measured for each in tracks)
    notes = ["hollow: modelled bytes"] if measured else ["bytes modelled, none measured"]
    return RoofPicture(
        title=_title(group),
        subtitle="  ·  ".join(machine(sweep.run, group.points)),
        roof=roof,
        tracks=tracks,
        notes=(*notes, "each line over the lengths of T"),
    )


def _title(group: Group) -> str:
    dims = " ".join(f"{name}={size}" for name, size in group.dims.items())
    return plain(f"{group.op} · {group.direction} · {group.dtype} · {dims}")


def _above_zero(
    name: str,
    style: Style,
    values: Sequence[_Value],
    dashed: bool,
    *,
    hollow: bool = False,
    zero: str = "0 B",
) -> tuple[list[Line], list[Miss]]:
    """A line of what has a logarithm, and a row of the strip for the rest."""
    drawn = tuple((tokens, size) for tokens, size in values if size)
    zeros = tuple(tokens for tokens, size in values if not size)
    return (
        [Line(name, style, drawn, dashed=dashed, hollow=hollow)] if drawn else [],
        [Miss(f"{name}: {zero}", style.colour, zeros)] if zeros else [],
    )


def _picture(
    sweep: Sweep,
    quantity: Quantity,
    *,
    lines: tuple[Line, ...],
    misses: tuple[Miss, ...],
    nothing: str = "",
    notes: tuple[str, ...] = (),
    marks: tuple[Mark, ...] = (),
    floor: tuple[tuple[int, float], ...] = (),
    floor_name: str = "",
    limits: tuple[Line, ...] = (),
) -> Picture:
    group = sweep.group
    return Picture(
        title=_title(group),
        subtitle="  ·  ".join(machine(sweep.run, group.points)),
        lengths=group.lengths,
        quantity=quantity,
        lines=lines,
        misses=misses,
        nothing=nothing,
        notes=notes,
        marks=marks,
        floor=floor,
        floor_name=floor_name,
        limits=limits,
    )


def _slope(series: Series) -> str:
    """`  T^0.98 ±0.01`, if there is a fit."""
    fit = slope(series)
    return "" if fit is None else f"  {slope_label(fit)}"


def _misses(sweep: Sweep) -> tuple[Miss, ...]:
    """One row of the strip for each series and outcome."""
    rows = []
    for series, style, name in sweep.drawn:
        by_outcome: dict[str, list[int]] = defaultdict(list)
        for point in series.failed:
            by_outcome[point.outcome].append(point.shape["T"])
        for outcome, tokens in by_outcome.items():
            rows.append(Miss(f"{name}: {outcome}", style.colour, tuple(tokens)))
    return tuple(rows)


def _multiple(value: float) -> str:
    return f"{three_digits(value)}x"


def _floor_name(sweep: Sweep) -> str:
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
