"""Runs as one HTML page that needs nothing else: no network and no file beside it.

Figures are the SVG files' bytes as data URIs: an image cannot run scripts, and its ids and styles
cannot meet the page's. Their text is text (`svg.fonttype` "none"): 112 points and twelve figures
make 570 KB, where drawn letters would make the figures three times as large. A small script sorts
and filters tables and draws samples; the page's own policy lets nothing else run and nothing be
fetched. What draws, or needs pandas, is imported by the pages that show something of it.
"""

from __future__ import annotations

import re
import shlex
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from chela_bench.records import AtlasRow, Point, Refused, Run
from chela_bench.reports.findings import best_of, findings
from chela_bench.reports.groups import Group, drawn_beside, drawn_with, failures, named_groups
from chela_bench.reports.quantities import (
    counted_sheets,
    error_by_length_sheet,
    error_sheet,
    hbm_sheet,
    memory_sheet,
)
from chela_bench.reports.rows import COLUMNS, Column, Null, Row, columns, notes, nulls, rows
from chela_bench.reports.samples import written_samples
from chela_bench.reports.scaling import scaling
from chela_bench.reports.sheets import Sheet
from chela_bench.reports.text import (
    facts,
    length,
    lengths,
    machine,
    plain,
    subject,
    tally,
    three_digits,
)
from chela_bench.verdicts import Comparison

_FIGURES = {
    "time": "time per call",
    "floor": "multiple of the floor",
    "memory": "peak memory",
    "hbm": "HBM bytes per call",
    "roofline": "roofline",
    "error": "relative error",
}
_READ_BY_SCRIPT = re.compile(r"\d[\d.]*(e[-+]\d+)?[kM]?( [%m])?")  # as report.js has it
_MOST_BESIDE = 12  # columns of a table that stands beside another
NO_SAMPLES = "Samples are not on record here: their distributions cannot be shown."


@dataclass(frozen=True)
class Atlas:
    """What `chela-bench atlas` found, and its heat maps as SVG files by name."""

    rows: Sequence[AtlasRow]
    refused: Sequence[Refused]
    archs: Sequence[str]
    maps: Mapping[str, bytes]


@dataclass(frozen=True)
class Reported:
    """A run, and what is shown of it besides: figures by name, time samples by a point's key."""

    run: Run
    points: Sequence[Point]
    svgs: Mapping[str, bytes]
    samples: Mapping[str, Sequence[int]] | None = None
    atlas: Atlas | None = None


@dataclass(frozen=True)
class _Picture:
    name: str
    source: str  # data URI
    alt: str


@dataclass(frozen=True)
class _Failure:
    """Lengths at which an implementation has no time for one reason."""

    id: str
    section: str  # id of its group
    title: str
    label: str
    tokens: int  # the first
    lengths: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class _Best:
    """The fastest correct implementation at the longest length where there is one."""

    tokens: int
    length: str
    label: str
    seconds: float
    time: str
    multiple: str
    runner_up: tuple[str, str] | None  # the next implementation's label and multiple of the time


@dataclass(frozen=True)
class _Block:
    """Figures of one quantity and their tables."""

    id: str
    name: str
    pictures: tuple[_Picture, ...]
    sheets: tuple[Sheet, ...]

    @property
    def wide(self) -> bool:
        """Whether it takes the page's whole width."""
        broad = any(len(sheet.header) > _MOST_BESIDE for sheet in self.sheets)
        return broad or self.name == "Time" or len(self.pictures) > 1


@dataclass(frozen=True)
class _Section:
    """One group: its figures, or the section that shows them, and its tables."""

    id: str
    title: str
    best: _Best | None
    drawn_in: tuple[str, str] | None  # id and title
    notes: tuple[str, ...]
    columns: Mapping[str, Column]
    rows: tuple[Row, ...]
    blocks: tuple[_Block, ...]  # time first, with the rows; then what there is of the others


@dataclass(frozen=True)
class _Part:
    """One run."""

    prefix: str  # of its ids
    run_id: str
    subject: str
    tally: str
    machine: str
    findings: Mapping[str, str]
    facts: Mapping[str, str]
    sections: tuple[_Section, ...]
    samples: Mapping[str, str] | None  # by key, as `written_samples`
    atlas: _Block | None
    atlas_notes: tuple[str, ...]
    failures: Mapping[str, _Failure]  # by a point's key
    nulls: Sequence[Null]


@dataclass(frozen=True)
class _Compared:
    id: str
    title: str
    notes: tuple[str, ...]
    picture: _Picture | None
    sheet: Sheet


def page(
    run: Run,
    points: Sequence[Point],
    svgs: Mapping[str, bytes],
    samples: Mapping[str, Sequence[int]] | None = None,
    atlas: Atlas | None = None,
) -> str:
    """The whole page of one run; `svgs` holds the figures by name, as `figures.figures` and
    `figures.heat_maps` give them.

    The same records and figures give the same page.
    """
    return pages([Reported(run, points, svgs, samples, atlas)])


def pages(
    reported: Sequence[Reported], comparisons: Sequence[tuple[Comparison, bytes | None]] = ()
) -> str:
    """One page of several runs: comparisons, each with its figure, then run by run."""
    script = _resource("report.js")
    return _template().render(
        style=Markup(_resource("report.css")),
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        parts=[_part(each, number) for number, each in enumerate(reported, start=1)],
        comparisons=[
            _compared(comparison, svg, number)
            for number, (comparison, svg) in enumerate(comparisons, start=1)
        ],
        no_samples=NO_SAMPLES,
    )


def _part(reported: Reported, number: int) -> _Part:
    run, points, atlas = reported.run, reported.points, reported.atlas
    prefix = "" if number == 1 else f"run{number}-"
    named = named_groups(points)
    samples = reported.samples
    return _Part(
        prefix=prefix,
        run_id=plain(run.run_id),
        subject=subject(run, points),
        tally=tally(run, points),
        machine=", ".join(machine(run, points)),
        findings=findings(list(named.values())),
        facts={**facts(run, points), "Command": plain(shlex.join(run.argv))},
        sections=tuple(
            _section(reported, slug, group, named, prefix) for slug, group in named.items()
        ),
        samples=None if samples is None else {k: written_samples(s) for k, s in samples.items()},
        atlas=None if atlas is None else _atlas(atlas, prefix),
        atlas_notes=() if atlas is None else _atlas_notes(atlas),
        failures=_failures(named, prefix),
        nulls=nulls(points),
    )


def _section(
    reported: Reported, slug: str, group: Group, named: Mapping[str, Group], prefix: str
) -> _Section:
    others = [other for other in named.values() if other is not group]
    shown_by = drawn_with(group, others)
    beside = drawn_beside(group, others)
    return _Section(
        id=prefix + slug,
        title=group.title,
        best=_best(group),
        drawn_in=next(((prefix + s, g.title) for s, g in named.items() if g is shown_by), None),
        notes=tuple(notes(group, beside)),
        columns=columns(group, COLUMNS),
        rows=tuple(rows(group)),
        blocks=tuple(
            block
            for block in _blocks(reported, slug, group, beside, prefix + slug)
            if block.name == "Time" or block.pictures or block.sheets
        ),
    )


def _blocks(
    reported: Reported, slug: str, group: Group, beside: Group | None, id_: str
) -> Iterator[_Block]:
    drawn, svgs = any(s.ok for g in (group, beside) if g for s in g.series), reported.svgs

    def block(name: str, kinds: Sequence[str], *found: Sheet | None) -> _Block:
        pictures = [
            _Picture(_FIGURES[kind], _uri(svgs[f"{slug}-{kind}"]), _alt(_FIGURES[kind], group))
            for kind in kinds
            if f"{slug}-{kind}" in svgs and drawn
        ]
        word = name.lower().replace(" ", "-")
        filled = tuple(sheet for sheet in found if sheet is not None and sheet.rows)
        return _Block(f"{id_}-{word}", name, tuple(pictures), filled)

    counted = counted_sheets(reported.run, group)
    yield block("Time", ["time", "floor"], *scaling(group, beside))
    yield block("Memory", ["memory"], memory_sheet(group))
    yield block(
        "HBM", ["hbm"], hbm_sheet(group), counted.get("HBM traffic"), counted.get("Kernels")
    )
    yield block("Roofline", ["roofline"], counted.get("Roofline"))
    if any(series.config for series in group.series):
        yield _block_sizes(reported, slug, group, id_)
    yield block("Error", ["error"], error_by_length_sheet(group), error_sheet(group))


def _block_sizes(reported: Reported, slug: str, group: Group, id_: str) -> _Block:
    from chela_bench.reports.tune import block_maps, block_sheet

    maps = tuple(
        _Picture(f"block sizes of {impl}", _uri(reported.svgs[name]), _map_alt(impl, group))
        for name, (impl, _) in block_maps(reported.run, slug, group).items()
        if name in reported.svgs
    )
    sizes = block_sheet(group)
    return _Block(f"{id_}-block-sizes", "Block sizes", maps, (sizes,) if sizes.rows else ())


def _atlas(atlas: Atlas, prefix: str) -> _Block:
    from chela_bench.reports.atlas import atlas_sheets

    maps = tuple(
        _Picture(plain(name), _uri(svg), f"Heat map: {plain(name)}. The tables below have values.")
        for name, svg in atlas.maps.items()
    )
    return _Block(f"{prefix}atlas", "Atlas", maps, tuple(atlas_sheets(atlas.rows, atlas.archs)))


def _atlas_notes(atlas: Atlas) -> tuple[str, ...]:
    from chela_bench.reports.atlas import CELLS_NOTE, problem_lines
    from chela_bench.reports.atlas import tally as atlas_tally

    versions = ", ".join(sorted({plain(row.triton) for row in atlas.rows}))
    said = f"{atlas_tally(atlas.rows)}, by Triton {versions or 'of no version'}; nothing ran."
    return said, f"A cell: {CELLS_NOTE}.", *problem_lines(atlas.rows, atlas.refused)


def _compared(comparison: Comparison, svg: bytes | None, number: int) -> _Compared:
    from chela_bench.reports import changes

    before, after = plain(comparison.before.label), plain(comparison.after.label)
    relative = ", of multiples of each machine's floor" if comparison.across_machines else ""
    drawn = None
    if svg is not None:
        drawn = _Picture("ratios", _uri(svg), "Ratios of times. The table below has the values.")
    said = [
        f"{changes.counts(comparison)}. Ratios are {after} over {before}{relative}, with 95 % "
        "intervals; unclear: between a change and noise, for the reason given.",
        *(f"{plain(note)}." for note in comparison.notes),
    ]
    return _Compared(
        id=f"comparison-{number}",
        title=f"{before} compared with {after}",
        notes=tuple(said),
        picture=drawn,
        sheet=changes.sheet(comparison),
    )


def _best(group: Group) -> _Best | None:
    best = best_of(group)
    if best is None:
        return None
    multiple, runner_up = best.point.x_floor, best.runner_up
    return _Best(
        best.tokens,
        length(best.tokens),
        best.series.label,
        best.point.seconds or 0.0,
        best.time,
        "" if multiple is None else three_digits(multiple),
        None if runner_up is None else (runner_up[0], three_digits(runner_up[1])),
    )


def _failures(named: Mapping[str, Group], prefix: str) -> dict[str, _Failure]:
    """By the point's key; what failed alike shares one, as in `show`, but of one implementation."""
    found: dict[str, _Failure] = {}
    number = 0
    for slug, group in named.items():
        for series in group.series:
            for alike in failures(replace(group, series=(series,))):
                [(label, tokens)] = alike.where
                number += 1
                failure = _Failure(
                    f"{prefix}failed-{number}", prefix + slug, group.title, label, tokens[0],
                    lengths(tokens, group.lengths), alike.outcome, alike.reason,
                )  # fmt: skip
                found |= {p.key: failure for p in series.failed if p.shape["T"] in tokens}
    return found


def _uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + b64encode(svg).decode()


def _alt(what: str, group: Group) -> str:
    named = ", ".join(series.label for series in group.series)
    against = "TFLOP/s against FLOPs a byte" if what == "roofline" else f"{what} against tokens T"
    return f"{against}, {group.title}: {named}. The table below has the values."


def _map_alt(impl: str, group: Group) -> str:
    return f"Time over two settings of {impl}, {group.title}. The table below has the values."


def amount(text: str) -> float | None:
    """What a sheet's cell sorts by: its first number, a length in tokens; None if it has none."""
    found = re.match(r"([\d ]*\d(?:\.\d+)?(?:e[+-]\d+)?)([kM]?)", text)
    if found is None:
        return None
    scale = {"k": 1024, "M": 1024**2}.get(found[2], 1)
    return float(found[1].replace(" ", "")) * scale


def _sort_key(text: str) -> str:
    """The attribute that a sheet's cell sorts by, unless the script reads it from the text."""
    value = amount(text)
    if value is None or _READ_BY_SCRIPT.fullmatch(text):
        return ""
    return Markup(' data-value="{:.9g}"').format(value)


def _resource(name: str) -> str:
    return (files("chela_bench.reports") / "templates" / name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("chela_bench.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tokens"] = length
    environment.filters["sort_key"] = _sort_key
    return environment.get_template("report.html.j2")
