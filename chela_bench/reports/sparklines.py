"""How far from the floor, at a glance: a block a length, and a colour a distance.

Colours run from cyan to magenta, which colour-blind readers tell apart; the number always stands
there too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from chela_bench.records import Point
from chela_bench.reports.groups import Group, Series
from chela_bench.reports.text import duration, three_digits

BLOCKS = "▁▂▃▄▅▆▇█"
GAP = "·"
_DISTANCES = ((2.0, "cyan"), (5.0, ""), (20.0, "yellow"), (math.inf, "magenta"))


@dataclass(frozen=True)
class Scale:
    """One for all series of a group: from the floor, or where there is none the least time a token,
    to the most that a series takes."""

    low: float
    high: float
    of_floor: bool

    @classmethod
    def of(cls, group: Group) -> Scale | None:
        """None where no series has two values to compare."""
        of_floor = any(point.x_floor is not None for point in group.points)
        per_series = [[_value(p, of_floor) for p in series.ok] for series in group.series]
        values = [value for some in per_series for value in some if value is not None]
        if max((len(some) for some in per_series), default=0) < 2 or not values:
            return None
        return cls(1.0 if of_floor else min(values), max(values), of_floor)

    def line(self, series: Series, lengths: Sequence[int]) -> Text:
        """A block a length, its height logarithmic."""
        text = Text()
        for tokens in lengths:
            point = series.at(tokens)
            value = None if point is None else _value(point, self.of_floor)
            if value is None:
                text.append(GAP, "dim")
            else:
                text.append(self._block(value), distance(value) if self.of_floor else "")
        return text

    def _block(self, value: float) -> str:
        whole = math.log(self.high / self.low)
        height = math.log(max(value / self.low, 1.0)) / whole if whole > 0 else 0.0
        return BLOCKS[min(int(height * len(BLOCKS)), len(BLOCKS) - 1)]

    @property
    def note(self) -> str:
        if self.of_floor:
            return f"trend: multiple of the floor, {BLOCKS[0]} 1x to {BLOCKS[-1]} {_x(self.high)}"
        ends = f"{BLOCKS[0]} {duration(self.low)} to {BLOCKS[-1]} {duration(self.high)}"
        return f"trend: time a token, {ends}"


def distance(x_floor: float | None) -> str:
    """The style of a multiple of the floor."""
    if x_floor is None:
        return ""
    return next(style for limit, style in _DISTANCES if x_floor <= limit)


def distances() -> Text:
    """What the colours say."""
    text = Text("colours: ", "dim")
    for limit, style in _DISTANCES:
        last = math.isinf(limit)
        text.append("beyond" if last else f"to {limit:.0f}x", style or "default")
        text.append("" if last else ", ", "dim")
    return text


def _value(point: Point, of_floor: bool) -> float | None:
    if point.outcome != "ok" or point.seconds is None:
        return None
    return point.x_floor if of_floor else point.seconds * 1e9 / point.shape["T"]


def _x(value: float) -> str:
    return f"{three_digits(value)}x"
