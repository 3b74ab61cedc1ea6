"""The three sentences that a reader of a run needs: what is fastest, how far that is from the
floor, and how it grows with length and stands against softmax. Of each op, not of each sweep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chela_bench.records import Point
from chela_bench.reports.crossings import crossings, slope
from chela_bench.reports.fit import Slope
from chela_bench.reports.groups import Group, Series, drawn_beside, drawn_with
from chela_bench.reports.text import duration, length, listed, plain, three_digits


@dataclass(frozen=True)
class Best:
    """The fastest correct implementation at the longest length where there is one."""

    group: Group
    tokens: int
    series: Series
    point: Point

    @property
    def runner_up(self) -> tuple[str, float] | None:
        """The next implementation at this length, timed alike, and its multiple of this one's
        time."""
        alike = [
            (series.label, point.seconds / self.point.seconds)
            for series in self.group.series
            if series.impl != self.series.impl
            and (point := series.at(self.tokens)) in series.ok
            and (point.time_ns is None) == (self.point.time_ns is None)
            and point.seconds and self.point.seconds
        ]  # fmt: skip
        return min(alike, key=lambda each: each[1], default=None)

    @property
    def time(self) -> str:
        wall = " (wall)" if self.point.time_ns is None else ""
        return duration((self.point.seconds or 0.0) * 1e9) + wall


def best_of(group: Group) -> Best | None:
    for tokens in reversed(group.lengths):
        point = group.fastest(tokens)
        if point is not None:
            series = next(s for s in group.series if point in s.points)
            return Best(group, tokens, series, point)
    return None


def findings(groups: Sequence[Group]) -> dict[str, str]:
    """By what they are about; the same three for every run. What is drawn beside another function
    only stands against it."""
    own = [group for group in groups if drawn_with(group, groups) is None]
    by_op: dict[str, list[Best]] = defaultdict(list)
    for group in own:
        best = best_of(group)
        if best is not None:
            by_op[plain(group.op)].append(best)
    growth = [_growth(by_op), *_against_softmax(own, groups)]
    return {
        "Fastest": _fastest(by_op),
        "Distance from the floor": _distance(by_op),
        "Growth with T": " ".join(growth),
    }


def _fastest(by_op: Mapping[str, Sequence[Best]]) -> str:
    if not by_op:
        return "Nothing ran to a correct result."
    ops: dict[str, list[str]] = defaultdict(list)  # by implementation
    for op, bests in by_op.items():
        directions: dict[str, list[str]] = defaultdict(list)
        for best in bests:
            directions[best.series.label].append(best.group.direction)
        for label, some in directions.items():
            only = f" ({', '.join(dict.fromkeys(some))})" if len(directions) > 1 else ""
            ops[label].append(f"{op}{only}")
    each = "; ".join(f"{label} for {listed(some)}" for label, some in ops.items())
    return f"The fastest at the longest length that ran: {each}."


def _distance(by_op: Mapping[str, Sequence[Best]]) -> str:
    ratios = {
        op: [ratio for best in bests if (ratio := best.point.x_floor) is not None]
        for op, bests in by_op.items()
    }
    known = sorted((min(some), max(some), op) for op, some in ratios.items() if some)
    if not known:
        return "No floor is known: nothing was timed on a card whose ceilings were measured."
    each = ", ".join(f"{op} {_range(low, high)}" for low, high, op in known)
    return f"Time at the longest length, as a multiple of the floor: {each}."


def _growth(by_op: Mapping[str, Sequence[Best]]) -> str:
    fits = {op: [f for best in bests if (f := slope(best.series))] for op, bests in by_op.items()}
    each = ", ".join(f"{op} {_exponents(some)}" for op, some in fits.items() if some)
    if not each:
        return "Too few lengths were swept for a slope in T."
    return f"Over the longer half of the lengths their times grow as T to the power of: {each}."


def _exponents(fits: Sequence[Slope]) -> str:
    """With the widest of their intervals."""
    least, most = (f"{end(fit.slope for fit in fits):.2f}" for end in (min, max))
    half = max(fit.high - fit.slope for fit in fits)
    return f"{least if least == most else f'{least} to {most}'} \N{PLUS-MINUS SIGN}{half:.2f}"


def _against_softmax(own: Sequence[Group], groups: Sequence[Group]) -> list[str]:
    """A sentence for each two implementations that are the best of their functions."""
    clauses: dict[str, list[str]] = defaultdict(list)
    for group in own:
        beside = drawn_beside(group, groups)
        ours, theirs = best_of(group), None if beside is None else best_of(beside)
        if beside is not None and ours is not None and theirs is not None:
            pair = f"{plain(group.op)}/{ours.series.label}"
            other = f"{plain(beside.op)}/{theirs.series.label}"
            clauses[f"{pair} against {other}"].append(
                f"{group.direction} {_clause(ours.series, theirs.series, group, beside)}"
            )
    if not clauses:
        return ["No crossover against softmax: it was not measured beside the same sizes."]
    return [f"{pair}: {'; '.join(said)}." for pair, said in clauses.items()]


def _clause(ours: Series, theirs: Series, group: Group, beside: Group) -> str:
    met = [
        each
        for each in crossings(group, beside)
        if {id(each.faster), id(each.slower)} == {id(ours), id(theirs)}
    ]
    if met:
        return listed(
            [f"{'faster' if c.faster is ours else 'slower'} beyond T = {c.place}" for c in met]
        )
    mine, others = (
        {p.shape["T"]: p.time_ns.median for p in series.ok if p.time_ns}
        for series in (ours, theirs)
    )
    common = sorted(mine.keys() & others.keys())
    if not common:
        return "timed at no length in common"
    ratio = others[common[-1]] / mine[common[-1]]
    word, times = ("faster", ratio) if ratio >= 1 else ("slower", 1 / ratio)
    all_along = f"{word} from T = {length(common[0])} on, " if len(common) > 1 else ""
    return f"{all_along}{three_digits(times)} times {word} at {length(common[-1])}"


def _range(low: float, high: float) -> str:
    first, last = three_digits(low), three_digits(high)
    return first if first == last else f"{first} to {last}"
