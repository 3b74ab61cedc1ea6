"""A run as one HTML page that needs nothing else: no network and no file beside it.

Figures are the SVG files' bytes as data URIs: an image cannot run scripts, and its ids and styles
cannot meet the page's. Their text is text (`svg.fonttype` "none"): 84 points and ten figures
make 480 KB, where drawn letters would make the figures three times as large. A small script sorts
tables; the page's own policy lets nothing else run and nothing be fetched.
"""

from __future__ import annotations

import re
import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from chela_bench.records import Point, Run
from chela_bench.reports.groups import Group, drawn_beside, drawn_with, named_groups
from chela_bench.reports.rows import COLUMNS, Column, Row, columns, notes, nulls, rows
from chela_bench.reports.sheets import Sheet, sheets
from chela_bench.reports.text import duration, facts, length, machine, plain, tally, three_digits

_FIGURES = {
    "time": "time per call",
    "floor": "multiple of the floor",
    "hbm": "HBM bytes per call",
    "memory": "peak memory",
    "roofline": "roofline",
}


@dataclass(frozen=True)
class _Picture:
    name: str
    source: str  # data URI
    alt: str


@dataclass(frozen=True)
class _Failure:
    id: str
    section: str  # id of its group
    title: str
    label: str
    point: Point
    reason: str


@dataclass(frozen=True)
class _Best:
    """The fastest correct implementation at the longest length where there is one."""

    length: str
    label: str
    time: str
    multiple: str


@dataclass(frozen=True)
class _Section:
    """One group: its figures, or the section that shows them, and its table."""

    id: str
    title: str
    best: _Best | None
    pictures: tuple[_Picture, ...]
    drawn_in: tuple[str, str] | None  # id and title
    notes: tuple[str, ...]
    columns: Mapping[str, Column]
    rows: tuple[Row, ...]
    sheets: tuple[Sheet, ...]


def page(run: Run, points: Sequence[Point], svgs: Mapping[str, bytes]) -> str:
    """The whole page; `svgs` holds the figures by name, as `figures.figures` gives them.

    The same records and figures give the same page.
    """
    named = named_groups(points)
    script = _resource("report.js")
    return _template().render(
        run_id=plain(run.run_id),
        style=Markup(_resource("report.css")),
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        tally=tally(run, points),
        machine=", ".join(machine(run, points)),
        facts={**facts(run, points), "Command": plain(shlex.join(run.argv))},
        sections=[_section(run, slug, group, named, svgs) for slug, group in named.items()],
        failures=_failures(named),
        nulls=nulls(points),
    )


def _section(
    run: Run, slug: str, group: Group, named: Mapping[str, Group], svgs: Mapping[str, bytes]
) -> _Section:
    others = [other for other in named.values() if other is not group]
    shown_by = drawn_with(group, others)
    drawn = (group, drawn_beside(group, others))
    lines = any(series.ok for each in drawn if each for series in each.series)
    return _Section(
        id=slug,
        title=group.title,
        best=_best(group),
        pictures=tuple(
            _Picture(what, _uri(svgs[name]), _alt(what, group))
            for kind, what in _FIGURES.items()
            if (name := f"{slug}-{kind}") in svgs and lines
        ),
        drawn_in=next(((s, g.title) for s, g in named.items() if g is shown_by), None),
        notes=tuple(notes(group, drawn_beside(group, others))),
        columns=columns(group, COLUMNS),
        rows=tuple(rows(group)),
        sheets=tuple(sheets(run, group)),
    )


def _best(group: Group) -> _Best | None:
    for tokens in reversed(group.lengths):
        point = group.fastest(tokens)
        if point is not None and point.seconds is not None:
            return _Best(
                length(tokens),
                next(s.label for s in group.series if point in s.points),
                duration(point.seconds * 1e9) + (" (wall)" if point.time_ns is None else ""),
                "" if point.x_floor is None else three_digits(point.x_floor),
            )
    return None


def _failures(named: Mapping[str, Group]) -> dict[str, _Failure]:
    """By the point's key, numbered in the order of the tables."""
    failed = [
        (slug, group, row)
        for slug, group in named.items()
        for row in rows(group)
        if row.point.outcome != "ok"
    ]
    return {
        row.point.key: _Failure(
            f"failed-{number}",
            slug,
            group.title,
            row.label,
            row.point,
            plain(row.point.reason or ""),
        )
        for number, (slug, group, row) in enumerate(failed, start=1)
    }


def _uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + b64encode(svg).decode()


def _alt(what: str, group: Group) -> str:
    named = ", ".join(series.label for series in group.series)
    against = "TFLOP/s against FLOPs a byte" if what == "roofline" else f"{what} against tokens T"
    return f"{against}, {group.title}: {named}. The table below has the values."


def amount(text: str) -> float | None:
    """What a sheet's cell sorts by: its first number, a length in tokens; None if it has none."""
    found = re.match(r"([\d ]*\d(?:\.\d+)?)([kM]?)", text)
    if found is None:
        return None
    scale = {"k": 1024, "M": 1024**2}.get(found[2], 1)
    return float(found[1].replace(" ", "")) * scale


def _resource(name: str) -> str:
    return (files("chela_bench.reports") / "templates" / name).read_text(encoding="utf-8")


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("chela_bench.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tokens"] = length
    environment.filters["amount"] = amount
    return environment.get_template("report.html.j2")
