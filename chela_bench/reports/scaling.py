"""How a group's times grow with length: exponents, where they cease to hold, who overtakes whom."""

from __future__ import annotations

from chela_bench.reports.crossings import Crossing, bend, crossings, crossings_within, slope
from chela_bench.reports.groups import Group, Series
from chela_bench.reports.sheets import Sheet
from chela_bench.reports.text import length, plain, three_digits

GROWTH_NOTE = (
    "Time as c T^p, fitted over the longer half of each one's lengths. Breaks at: going to shorter "
    "lengths, the first whose time is more than 10 % off that line, and how many times the line's "
    "it is. Ends: the first length beyond the last result, and why there is none."
)
CROSSOVER_NOTE = (
    "Straight between measured lengths, time and T both in logarithms; kernel times alone. "
    "Among the implementations here, and with the function drawn beside them."
)


def scaling(group: Group, beside: Group | None) -> list[Sheet]:
    """Growth and crossovers, where more than one length was swept; either may have no rows."""
    if len(group.lengths) < 2:
        return []
    growth = [row for series in group.series if (row := _growth(series))]
    header = (
        "implementation", "exponent p", "lowest", "highest", "fitted", "breaks at", "x line",
        "ends",
    )  # fmt: skip
    met = crossings_within(group)
    if beside is not None:
        met += crossings(group, beside)
        met.sort(key=lambda each: each.tokens)
    crossed = [_crossover(each, group, beside) for each in met]
    columns = ("T", "faster beyond", "slower beyond", "time ms", "between")
    return [
        Sheet("Growth with T", GROWTH_NOTE, 1, header, tuple(growth)).without_empty(),
        Sheet("Crossovers", CROSSOVER_NOTE, 3, columns, tuple(crossed)),
    ]


def _growth(series: Series) -> tuple[str, ...] | None:
    """None where nothing ran."""
    if not series.ok:
        return None
    fit, broken = slope(series), bend(series)
    lengths = [point.shape["T"] for point in series.ok]
    first = lengths[-max(3, (len(lengths) + 1) // 2) :][0]
    beyond = next((p for p in series.failed if p.shape["T"] > lengths[-1]), None)
    return (
        series.label,
        "" if fit is None else f"{fit.slope:.2f}",
        "" if fit is None else f"{fit.low:.2f}",
        "" if fit is None else f"{fit.high:.2f}",
        "" if fit is None else f"{length(first)}..{length(lengths[-1])}",
        "" if broken is None else length(broken.tokens),
        "" if broken is None else three_digits(broken.ratio),
        "" if beyond is None else f"{length(beyond.shape['T'])}: {beyond.outcome}",
    )


def _crossover(each: Crossing, group: Group, beside: Group | None) -> tuple[str, ...]:
    before, after = each.between
    return (
        each.place,
        _named(each.faster, group, beside),
        _named(each.slower, group, beside),
        three_digits(each.seconds * 1e3),
        length(before) if before == after else f"{length(before)}..{length(after)}",
    )


def _named(series: Series, group: Group, beside: Group | None) -> str:
    other = beside is not None and series not in group.series
    return f"{plain(beside.op)}/{series.label}" if beside is not None and other else series.label
