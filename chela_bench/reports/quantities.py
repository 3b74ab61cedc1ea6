"""Tables beside a group's figures: implementations down, lengths across, one quantity each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from chela_bench.records import Point, Run
from chela_bench.reports.groups import Group
from chela_bench.reports.roofline import Roof
from chela_bench.reports.rows import MODEL, hbm_bytes, rows
from chela_bench.reports.sheets import Sheet, roofline_sheet, sheets
from chela_bench.reports.text import length, plain, three_digits

MEMORY_NOTE = "Peak MiB of a call beyond its inputs, by length."
HBM_NOTE = "MiB through device memory in one call, by length; m: by the implementation's formula."
ERROR_BY_LENGTH_NOTE = (
    "Relative error against the oracle, by length: the largest of all outputs and gradients."
)
ERROR_NOTE = (
    "largest in: the output or gradient of the largest error; each has a column where they are "
    "few. budget: what rounding in this dtype allows; of budget: error over it."
)
_MOST_TENSORS = 8  # with a column each


def memory_sheet(group: Group) -> Sheet:
    return _by_length(
        "Peak memory",
        MEMORY_NOTE,
        group,
        lambda p: "" if p.peak_bytes is None else three_digits(p.peak_bytes / 2**20),
    )


def hbm_sheet(group: Group) -> Sheet:
    def written(point: Point) -> str:
        moved = hbm_bytes(point)
        if moved is None:
            return ""
        return three_digits(moved.size / 2**20) + (" m" if moved.source == MODEL else "")

    return _by_length("HBM bytes", HBM_NOTE, group, written)


def counted_sheets(run: Run, group: Group) -> dict[str, Sheet]:
    """By name: what was counted, and the roofline of modelled bytes where nothing was."""
    found = {sheet.name: sheet for sheet in sheets(run, group)}
    if "Roofline" not in found and Roof.of(run.ceilings, group.dtype) is not None:
        modelled = roofline_sheet(run, group)
        if modelled.rows:
            found[modelled.name] = modelled
    return found


def error_by_length_sheet(group: Group) -> Sheet:
    return _by_length("Error", ERROR_BY_LENGTH_NOTE, group, lambda p: _small(p.error_rel))


def error_sheet(group: Group) -> Sheet:
    """A row a correct point; what was wrong has its error in its reason. A column each for
    several outputs and gradients, but not for as many as a layer has."""
    compared = [p for p in rows(group) if p.point.outcome == "ok" and p.point.error_rel is not None]
    tensors = list(dict.fromkeys(name for row in compared for name in row.point.errors))
    shown = tensors if 1 < len(tensors) <= _MOST_TENSORS else []
    header = (
        "T", "implementation", "largest in", "of budget", "error", "budget", *map(plain, shown)
    )  # fmt: skip
    lines = []
    for row in compared:
        point, error, budget = row.point, row.point.error_rel, row.point.error_budget
        worst = max(point.errors, key=point.errors.__getitem__, default="")
        share = "" if error is None or not budget else f"{three_digits(100 * error / budget)} %"
        each = (point.errors.get(name) for name in shown)
        lines.append(
            (
                length(row.tokens),
                row.label,
                plain(worst),
                share,
                *map(_small, (error, budget, *each)),
            )
        )
    return Sheet("Error and budget", ERROR_NOTE, 3, header, tuple(lines)).without_empty()


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _by_length(name: str, note: str, group: Group, written: Callable[[Point], str]) -> Sheet:
    """Of correct points; an implementation that has none is left out."""

    def lines() -> Iterator[tuple[str, ...]]:
        for series in group.series:
            at = {point.shape["T"]: written(point) for point in series.ok}
            if any(at.values()):
                yield series.label, *(at.get(tokens, "") for tokens in group.lengths)

    header = ("implementation", *map(length, group.lengths))
    return Sheet(name, note, 1, header, tuple(lines())).without_empty()
