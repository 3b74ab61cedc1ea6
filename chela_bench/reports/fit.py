"""How time grows with length: the exponent p of time = c * T**p, and down to where that holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Two-sided 95 % critical values of Student's t for 1 to 10 degrees of freedom.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
HOLDS = 1.1  # a time within this factor of the fitted line lies on it


class Slope(NamedTuple):
    """Exponent of T, and its 95 % confidence interval."""

    slope: float
    low: float
    high: float


class Break(NamedTuple):
    """The longest length whose time lies off the fitted line, and its time over the line's."""

    tokens: int
    ratio: float


def fitted_slope(lengths: Sequence[int], seconds: Sequence[float]) -> Slope | None:
    """Least squares of log(seconds) on log(length), over the longer half of the lengths.

    Short lengths are launch-bound or leave the device half empty, and would hide the exponent
    that the figure is about. So only the longer half counts, rounded up, and never fewer than
    three lengths. None if there are not three. Raises ValueError unless all values are positive.
    """
    used = _longer_half(lengths, seconds)
    if not used:
        return None
    x, y = (_centred([math.log(value) for value in values]) for values in zip(*used, strict=True))
    spread = _product(x, x)
    slope = _product(x, y) / spread
    residual = [b - slope * a for a, b in zip(x, y, strict=True)]
    freedom = len(used) - 2
    error = math.sqrt(_product(residual, residual) / freedom / spread)
    half = _t_95(freedom) * error
    return Slope(slope, slope - half, slope + half)


def fitted_break(lengths: Sequence[int], seconds: Sequence[float]) -> Break | None:
    """Where `fitted_slope`'s line ends, going from the longest length to the shortest: the first
    one that is more than 10 % off it. None if none is, or there is no line."""
    fit, used = fitted_slope(lengths, seconds), _longer_half(lengths, seconds)
    if fit is None:
        return None
    constant = math.fsum(math.log(s) - fit.slope * math.log(t) for t, s in used) / len(used)
    for tokens, time in sorted(zip(lengths, seconds, strict=True), reverse=True):
        ratio = time / math.exp(constant + fit.slope * math.log(tokens))
        if not 1 / HOLDS <= ratio <= HOLDS:
            return Break(tokens, ratio)
    return None


def _longer_half(lengths: Sequence[int], seconds: Sequence[float]) -> list[tuple[int, float]]:
    """What is fitted; empty where there are not three lengths."""
    if len(lengths) != len(seconds):
        raise ValueError(f"wanted one time a length, got {len(seconds)} for {len(lengths)} lengths")
    if any(value <= 0 for value in (*lengths, *seconds)):
        raise ValueError("wanted lengths and times above zero: their logarithms are fitted")
    distinct = sorted(set(lengths))
    if len(distinct) < 3:
        return []
    longer = set(distinct[-max(3, (len(distinct) + 1) // 2) :])
    return [(t, s) for t, s in zip(lengths, seconds, strict=True) if t in longer]


def _centred(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]


def _product(x: Sequence[float], y: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def _t_95(freedom: int) -> float:
    """Critical value; beyond the table the normal one with its first two 1/freedom terms."""
    if freedom <= len(_T_95):
        return _T_95[freedom - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2
