"""A sweep as tables for a terminal: lengths down, implementations across, as many as fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from chela_bench.records import Point, Run
from chela_bench.reports.columns import column_width, indented, line, room, table, tables
from chela_bench.reports.crossings import comparison
from chela_bench.reports.groups import (
    OTHER_FUNCTIONS,
    Group,
    Series,
    drawn_beside,
    failures,
    groups,
)
from chela_bench.reports.rows import COLUMNS, STEPS, engineering
from chela_bench.reports.sheets import Sheet, sheets
from chela_bench.reports.sparklines import Scale, distance, distances
from chela_bench.reports.text import duration, length, lengths, machine, tally, three_digits


def sweep_table(
    run: Run, points: Sequence[Point], *, beside: Sequence[str] = ("HBM traffic",)
) -> RenderableType:
    """One table for each op, direction, dtype and shape; what failed and why; a line of counts.

    A cell is the median time and its multiple of the floor, coloured by that; `*` marks the fastest
    correct implementation of its row. Below each column a sparkline over the lengths, except where
    the encoding has no blocks. Columns that do not fit the width continue in a further block. What
    was skipped at every length has no column, unless nothing else has one. `beside` names the
    sheets that follow where something was counted.
    """
    return _Sweep(run, tuple(points), tuple(beside))


@dataclass(frozen=True)
class _Sweep:
    run: Run
    points: tuple[Point, ...]
    beside: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield line(" | ".join(machine(self.run, self.points)), "dim")
        found = groups(self.points)
        for group in found:
            yield Text()
            yield _heading(group)
            scale = None if options.ascii_only else Scale.of(group)
            yield from _blocks(group, options.max_width, scale)
            yield from _legend(group, scale)
            if _coloured(console) and any(p.x_floor is not None for p in group.points):
                yield distances()
            yield from _sheets(self.run, group, options.max_width, self.beside)
            yield from map(line, _rates(group))
            yield from map(line, comparison(group, drawn_beside(group, found)))
            yield from _failures(group)
        yield Text()
        yield line(tally(self.run, self.points), "bold")


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _heading(group: Group) -> Text:
    heading = line(group.title, "bold")
    for op, other in OTHER_FUNCTIONS.items():
        if group.op == other:
            heading.append(f" (another function than {op})", "italic")
    return heading


def _blocks(group: Group, width: int, scale: Scale | None) -> Iterator[RenderableType]:
    """The group's columns, cut where the width ends; every block repeats the lengths."""
    below = [] if scale is None else [Text("")]
    tokens_column = [Text(length(tokens)) for tokens in group.lengths]
    leading = [("T", [*tokens_column, *([] if scale is None else [Text("trend", "dim")])])]
    floors = [group.floor_ns(tokens) for tokens in group.lengths]
    if any(floors):
        leading.append(("floor", [*(Text(duration(f) if f else "-") for f in floors), *below]))
    if group.is_layer:
        learnt = [group.parameters(tokens) for tokens in group.lengths]
        flops = [group.flops(tokens) for tokens in group.lengths]
        sizes = [Text("-" if n is None else engineering(n)) for n in learnt]
        counts = [Text("-" if n is None else three_digits(n / 1e9)) for n in flops]
        leading += [("params", [*sizes, *below]), ("GFLOP", [*counts, *below])]
    tried = [s for s in group.series if any(p.outcome != "skipped" for p in s.points)]
    waiting = [(series.label, _cells(group, series, scale)) for series in tried or group.series]
    if group.is_layer and waiting and room(leading, width) < column_width(*waiting[0]):
        yield table([(name, cells[: len(group.lengths)]) for name, cells in leading], width)
        yield Text()
        leading = leading[:1]
    yield from tables(leading, waiting, width)


def sheet_table(sheet: Sheet) -> RenderableType:
    """One sheet, cut where the width ends, with its note."""
    return _Sheet(sheet)


@dataclass(frozen=True)
class _Sheet:
    sheet: Sheet

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _sheet_lines(self.sheet, options.max_width)


def _sheet_lines(sheet: Sheet, width: int) -> Iterator[RenderableType]:
    columns = [
        (name, [Text(row[n], overflow="fold") for row in sheet.rows])
        for n, name in enumerate(sheet.header)
    ]
    head, rest = columns[: sheet.left], columns[sheet.left :]
    yield from tables(head, rest, width, repeated=len(head), words=len(head) - 1)
    yield line(sheet.note, "dim")


def _sheets(run: Run, group: Group, width: int, names: Sequence[str]) -> Iterator[RenderableType]:
    for sheet in (sheet for sheet in sheets(run, group) if sheet.name in names):
        yield Text()
        yield line(sheet.name, "bold")
        yield from _sheet_lines(sheet, width)


def _rates(group: Group) -> Iterator[str]:
    """Of steps, each one's tokens a second and bytes for a token."""
    if group.direction != "decode":
        return
    yield STEPS
    for tokens in group.lengths:
        for series in group.series:
            point = series.at(tokens)
            if point is not None and (rate := COLUMNS["tokens/s"].cell(point)[1]):
                size = COLUMNS["bytes/token"].cell(point)[1]
                moved = f", {size} HBM a token" if size else ""
                yield f"{length(tokens)}: {series.label} {rate} tokens/s{moved}"


def _cells(group: Group, series: Series, scale: Scale | None) -> list[Text]:
    """One a length: time, multiple of the floor and mark, each part as wide as its widest; then the
    sparkline."""
    parts = [_parts(group, series.at(tokens), tokens) for tokens in group.lengths]
    timed = [part for part in parts if len(part) == 3]
    widths = [max((len(column) for column in each), default=0) for each in zip(*timed, strict=True)]
    cells = []
    for part, tokens in zip(parts, group.lengths, strict=True):
        if len(part) == 3:
            point = series.at(tokens)
            time, multiple, mark = (p.rjust(w) for p, w in zip(part, widths, strict=True))
            cell = f"{time} {multiple}{mark}" if widths[1] else f"{time}{mark}"
            near = distance(point.x_floor if point else None)
            cells.append(Text(cell, f"bold {near}" if part[2].strip() else near))
        else:
            cells.append(Text(part[0] + " ", "dim" if part[0] in ("-", "skipped") else "red"))
    return cells if scale is None else [*cells, scale.line(series, group.lengths)]


def _parts(group: Group, point: Point | None, tokens: int) -> tuple[str, ...]:
    """(time, multiple, mark), or a single word where there is no time."""
    if point is None:
        return ("-",)
    if point.outcome != "ok" or point.seconds is None:
        return (point.outcome,)
    if point.time_ns is None:
        multiple = "wall"
    else:
        multiple = "" if point.x_floor is None else f"{three_digits(point.x_floor)}x"
    return (
        duration(point.seconds * 1e9), multiple, "*" if point is group.fastest(tokens) else " ",
    )  # fmt: skip


def _legend(group: Group, scale: Scale | None) -> Iterator[Text]:
    ok = [point for point in group.points if point.outcome == "ok"]
    notes = ["* fastest correct"] if ok else []
    if any(point.x_floor is not None for point in ok):
        notes.append("x multiple of the floor")
    if any(point.time_ns is None for point in ok):
        notes.append("wall: from launch to synchronised end, too many launches for kernel time")
    if scale is not None:
        notes.append(scale.note)
    if notes:
        yield line("; ".join(notes), "dim")


def _failures(group: Group) -> Iterator[RenderableType]:
    for failure in failures(group):
        where = "; ".join(
            f"{label} at {lengths(tokens, group.lengths)}" for label, tokens in failure.where
        )
        yield line(f"{failure.outcome}: {where}")
        yield indented(failure.reason, "dim")
