"""Order statistics of time samples: quantiles, and when the median is known well enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

from chela_bench.records import Quantiles

MIN_SAMPLES = 10
MIN_TIMED_NS = 50_000_000
RELATIVE_WIDTH = 0.005  # of the median, for its 95 % interval


def median(samples: Sequence[float]) -> float:
    return quantile(sorted(samples), 0.5)


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Linear interpolation between order statistics (numpy's default)."""
    position = (len(ordered) - 1) * fraction
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(samples_ns: Sequence[float]) -> Quantiles:
    """Median, quartiles and minimum of samples in nanoseconds, each at least 1."""
    ordered = sorted(samples_ns)
    return Quantiles(
        median=_whole(quantile(ordered, 0.5)),
        q1=_whole(quantile(ordered, 0.25)),
        q3=_whole(quantile(ordered, 0.75)),
        min=_whole(ordered[0]),
        n=len(ordered),
    )


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the median from order statistics; None below six samples.

    The ranks [r, n + 1 - r] (1-based) hold the median with probability 1 - 2 P(X <= r - 1) for
    X ~ Binomial(n, 1/2), whatever the distribution of the samples.
    """
    n = len(samples)
    rank, tail, term = 0, 0.0, 0.5**n if n < 1000 else 0.0
    if n >= 1000:  # normal approximation, exact to far under a rank here
        rank = math.floor((n - 1.959964 * math.sqrt(n)) / 2)
    else:
        while tail + term <= 0.025:
            tail += term
            rank += 1
            term *= (n - rank + 1) / rank
    if rank == 0:
        return None
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[n - rank]


def settled(samples_ns: Sequence[float]) -> bool:
    """Enough samples, enough timed time, and a median known to within 0.5 %."""
    if len(samples_ns) < MIN_SAMPLES or sum(samples_ns) < MIN_TIMED_NS:
        return False
    interval = median_interval(samples_ns)
    return interval is not None and interval[1] - interval[0] <= RELATIVE_WIDTH * median(samples_ns)


def _whole(nanoseconds: float) -> int:
    return max(1, round(nanoseconds))
