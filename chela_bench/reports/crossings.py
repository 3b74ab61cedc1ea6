"""Where a function overtakes another with length, and how fast each grows: a group beside another.

Two lines cross where the logarithms of their times, straight between measured lengths in the
logarithm of T, are equal. Kernel times are compared with kernel times alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations, pairwise
from math import log
from typing import NamedTuple

from chela_bench.reports.fit import Break, Slope, fitted_break, fitted_slope
from chela_bench.reports.groups import Group, Series
from chela_bench.reports.text import length, lengths, three_digits


class Crossing(NamedTuple):
    """Of two lines: `tokens` and `seconds` where they meet, and who is faster beyond."""

    tokens: float
    seconds: float
    faster: Series
    slower: Series
    between: tuple[int, int]  # measured lengths

    @property
    def place(self) -> str:
        """`9.12k`."""
        return _about(self.tokens)

    @property
    def measured(self) -> str:
        """` (between 8k and 10k)`, unless they met at a measured length."""
        before, after = self.between
        return "" if before == after else f" (between {length(before)} and {length(after)})"


def crossings(group: Group, beside: Group) -> list[Crossing]:
    """Of each series of the one with each of the other, by length."""
    found = [
        crossing
        for ours in group.series
        for theirs in beside.series
        for crossing in _crossings(ours, theirs)
    ]
    return sorted(found, key=lambda crossing: crossing.tokens)


def crossings_within(group: Group) -> list[Crossing]:
    """Of every two series of the group, by length."""
    found = [c for one, other in combinations(group.series, 2) for c in _crossings(one, other)]
    return sorted(found, key=lambda crossing: crossing.tokens)


def slope(series: Series) -> Slope | None:
    """Of the series' times; None where kernel and wall times would be fitted together."""
    return fitted_slope(*_times(series))


def bend(series: Series) -> Break | None:
    """Where the exponent of the series' times changes; None as `slope`."""
    return fitted_break(*_times(series))


def _times(series: Series) -> tuple[list[int], list[float]]:
    """Lengths and seconds; none where they are of two clocks."""
    if len({point.time_ns is None for point in series.ok}) != 1:
        return [], []
    return [p.shape["T"] for p in series.ok], [p.seconds or 0.0 for p in series.ok]


def slope_label(fit: Slope) -> str:
    """`T^0.98 ±0.01`."""
    return f"T^{fit.slope:.2f}\N{NO-BREAK SPACE}±{fit.high - fit.slope:.2f}"


def comparison(group: Group, beside: Group | None) -> list[str]:
    """Sentences: who overtakes whom where, who is faster throughout, and how times grow."""
    if beside is None:
        return []
    said = [
        f"{each.faster.label} overtakes {each.slower.label} at T = {each.place}{each.measured}."
        for each in crossings(group, beside)
    ]
    throughout: dict[tuple[str, bool, str], list[str]] = defaultdict(list)
    for ours in group.series:
        for theirs in beside.series:
            ratios = _log_ratios(ours, theirs)
            signs = {ratio < 0 for ratio in ratios.values()}
            if len(ratios) > 1 and len(signs) == 1:
                where = lengths(ratios, sorted({*group.lengths, *beside.lengths}))
                throughout[theirs.label, signs.pop(), where].append(ours.label)
    said += [
        f"{'Faster' if faster else 'Slower'} than {other} at {where}: {', '.join(names)}."
        for (other, faster, where), names in throughout.items()
    ]
    fits = [(s.label, fit) for s in (*group.series, *beside.series) if (fit := slope(s))]
    if fits:
        each = ", ".join(f"{label} {slope_label(fit)}" for label, fit in fits)
        said.append(f"Time over the longer half of each one's lengths, ±95 %: {each}.")
    return said


def _crossings(ours: Series, theirs: Series) -> list[Crossing]:
    ratios = _log_ratios(ours, theirs)
    apart = [(tokens, ratio) for tokens, ratio in ratios.items() if ratio]
    found = []
    for (before, first), (after, last) in pairwise(apart):
        if (first > 0) == (last > 0):
            continue
        equal = [tokens for tokens in ratios if before < tokens < after]
        if equal:  # measured so: where they part
            before, after, first, last = equal[-1], equal[-1], 0.0, -first
        share = first / (first - last)
        tokens = before * (after / before) ** share
        start, end = (_kernel_seconds(ours)[tokens] for tokens in (before, after))
        seconds = start * (end / start) ** share
        faster, slower = (ours, theirs) if last < 0 else (theirs, ours)
        found.append(Crossing(tokens, seconds, faster, slower, (before, after)))
    return found


def _log_ratios(ours: Series, theirs: Series) -> dict[int, float]:
    """log(ours / theirs) at the lengths that both have, ascending."""
    mine, others = _kernel_seconds(ours), _kernel_seconds(theirs)
    return {tokens: log(mine[tokens] / others[tokens]) for tokens in mine if tokens in others}


def _kernel_seconds(series: Series) -> Mapping[int, float]:
    timed = [(p.shape["T"], p.time_ns.median / 1e9) for p in series.ok if p.time_ns is not None]
    return dict(timed)


def _about(tokens: float) -> str:
    """`9.12k`, `532`, `1.05M`."""
    for scale, unit in ((2.0**20, "M"), (2.0**10, "k")):
        if tokens >= scale:
            return f"{three_digits(tokens / scale)}{unit}"
    return three_digits(tokens)
