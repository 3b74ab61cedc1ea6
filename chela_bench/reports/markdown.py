"""A run as a Markdown page for a pull request: the fastest of each sweep, then every table, folded
away until somebody asks. It renders on a code host and reads as plain text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from chela_bench.records import Point, Run
from chela_bench.reports.groups import Group, Series, drawn_beside, groups
from chela_bench.reports.rows import COLUMNS, Column, Row, columns, notes
from chela_bench.reports.rows import rows as rows_of
from chela_bench.reports.sheets import Sheet, sheets
from chela_bench.reports.text import facts, length, plain, tally

_COLUMNS = (
    "time ms", "x floor", "tokens/s", "bytes/token", "parameters", "GFLOP", "TFLOP/s", "peak MiB",
    "HBM MiB", "host us", "mJ", "error / budget",
)  # fmt: skip
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])")


def summary(run: Run, points: Sequence[Point]) -> str:
    """Machine, method, command, the fastest, one table a group, what has no time and why."""
    around = [(name, escaped(fact)) for name, fact in facts(run, points).items()]
    parts = [f"# {escaped(run.run_id)}", escaped(tally(run, points))]
    parts += [table(["", ""], around, left=2)]
    parts += ["Command:", f"    {plain(shlex.join(run.argv))}"]
    found = groups(points)
    parts += _glance(found)
    for group in found:
        said = notes(group, drawn_beside(group, found))
        parts += [f"## {escaped(group.title)}", *map(escaped, said)]
        tables = [part for sheet in sheets(run, group) for part in _sheet(sheet)]
        parts += _folded(f"{len(group.points)} points", [_times(group), *tables])
    failed = [(g, s, p) for g in found for s in g.series for p in s.failed]
    if failed:
        parts += ["## Points without a time", *_folded(f"{len(failed)} points", [_failed(failed)])]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no table cell of its own."""
    safe = _SPECIAL.sub(lambda match: "\\" + match.group(), plain(text))
    return "".join(_ENTITIES.get(character, character) for character in safe)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    """A Markdown table of safe cells; the first `left` columns are text, the rest numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _glance(found: Sequence[Group]) -> list[str]:
    """The fastest correct of each group, at the longest length that something reached."""
    rows = []
    for group in found:
        reached = [tokens for tokens in group.lengths if group.fastest(tokens) is not None]
        if reached:
            best = next(row for row in rows_of(group) if row.fastest and row.tokens == reached[-1])
            cells = [COLUMNS[name].cell(best.point)[1] for name in ("time ms", "x floor")]
            rows.append([escaped(group.title), length(best.tokens), escaped(best.label), *cells])
    header = ["fastest at the longest T", "T", "implementation", "time ms", "x floor"]
    return [table(header, rows, left=3)] if rows else []


def _folded(about: str, parts: Sequence[str]) -> list[str]:
    return [f"<details><summary>{about}</summary>", *parts, "</details>"]


def _sheet(sheet: Sheet) -> list[str]:
    cells = [[escaped(cell) for cell in row] for row in sheet.rows]
    return [f"### {sheet.name}", escaped(sheet.note), table(sheet.header, cells, left=sheet.left)]


def _times(group: Group) -> str:
    shown = columns(group, [n for n in _COLUMNS if group.is_layer or n != "TFLOP/s"])
    cells = [
        [length(row.tokens), escaped(row.label), *_measured(row, shown.values())]
        for row in rows_of(group)
    ]
    return table(["T", "implementation", *shown], cells, left=2)


def _measured(row: Row, shown: Iterable[Column]) -> list[str]:
    """The outcome of a failed point stands where its time would."""
    time, *others = (column.cell(row.point)[1] for column in shown)
    return [f"**{time}**" if row.fastest else time or row.point.outcome, *others]


def _failed(failed: Sequence[tuple[Group, Series, Point]]) -> str:
    rows = [
        [
            escaped(group.title),
            escaped(series.label),
            length(point.shape["T"]),
            point.outcome,
            escaped(point.reason or ""),
        ]
        for group, series, point in failed
    ]
    return table(["sweep", "implementation", "T", "outcome", "reason"], rows, left=5)
