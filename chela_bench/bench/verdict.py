"""Is B slower than A? Ratio, interval and verdict from time samples; pure, and the same every time.

Intervals are the bootstrap's, without its dice: of a median, the distribution over all resamples
has a closed form (the k-th of n samples bounds it with a binomial probability): nothing is drawn.
Probabilities are the sign test's and order statistics', which hold whatever the distribution.

    paired    live: one ratio a round of A and B side by side; median over rounds
    unpaired  stored: two sets of samples, each cut in blocks of neighbours, which are not
              independent; the ratio of medians over blocks' medians
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from chela_bench.bench import stats
from chela_bench.errors import UsageError
from chela_bench.verdicts import Verdict

CONFIDENCE = 0.95  # of the intervals that are shown
COMPARE_ALPHA = 0.05  # of changes called faster or slower, the share that may be none
GATE_ALPHA = 0.001  # of failures, the share that may be none
FEWEST = 6  # rounds, or blocks of samples: of fewer, no 95 % interval of a median exists
BLOCKS = 31  # of stored samples; odd, so that a median is one of them
SAME = 0.01  # an interval within 1 % of none is called the same
_WIDE = 0.025  # what blocks of one side may spread over: more is several clocks, not noise
RESTLESS = 0.02  # unrest that may hide a change from an interval within noise

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Limit:
    """Change of time that is allowed: both must be exceeded."""

    relative: float
    ns: float

    def threshold(self, before_ns: float, noise: float) -> float:
        """The ratio above which a time is too long: above the limit in percent, in time, and above
        the machine's own noise."""
        return 1 + max(self.relative, self.ns / before_ns, noise)

    def __str__(self) -> str:
        parts = [f"{self.relative * 100:g}%"] if self.relative or not self.ns else []
        return ",".join([*parts, f"{self.ns / 1000:g}us"] if self.ns else parts)


@dataclass(frozen=True)
class Evidence:
    """What the samples say of after / before."""

    before_ns: float
    after_ns: float
    ratio: float
    low: float
    high: float
    count: int  # rounds, or blocks of the side that has fewer
    _ratios: Floats | None = None  # paired
    _blocks: tuple[Floats, Floats] | None = None  # unpaired
    slack: float = 0.0  # what the sides' own unrest may add to the ratio or take from it
    doubts: tuple[str, ...] = field(default=())

    def p_above(self, threshold: float) -> float:
        """Chance of such samples, at most, were the true ratio not above the threshold."""
        threshold *= 1 + self.slack
        if self._ratios is not None:
            return sign_tail(int(np.sum(self._ratios > threshold)), len(self._ratios))
        assert self._blocks is not None
        before, after = self._blocks
        return _separation(before * threshold, after)

    def p_below(self, threshold: float) -> float:
        """Chance of such samples, at most, were the true ratio not below the threshold."""
        threshold /= 1 + self.slack
        if self._ratios is not None:
            return sign_tail(int(np.sum(self._ratios < threshold)), len(self._ratios))
        assert self._blocks is not None
        before, after = self._blocks
        return _separation(after, before * threshold)

    @property
    def surest_low(self) -> float:
        return self.low / (1 + self.slack)

    @property
    def surest_high(self) -> float:
        return self.high * (1 + self.slack)


def parse_limit(text: str) -> Limit:
    """`5%`, `2us`, or both: `5%,2us`; ns, us, ms."""
    relative, absolute = 0.0, 0.0
    seen = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*(%|ns|us|ms)\s*", part)
        unit = "" if match is None else match.group(2)
        kind = "%" if unit == "%" else "time"
        if match is None or kind in seen:
            raise UsageError(
                "--limit takes a percentage, a time or both, as in 5%,2us (ns, us, ms); "
                f"got {text!r}"
            )
        seen.add(kind)
        if unit == "%":
            relative = float(match.group(1)) / 100
        else:
            absolute = float(match.group(1)) * {"ns": 1, "us": 1e3, "ms": 1e6}[unit]
    return Limit(relative, absolute)


def paired(rounds: Sequence[tuple[float, float]]) -> Evidence:
    """Evidence of rounds (before, after), each side's median nanoseconds in that round."""
    before, after = np.array(rounds, dtype=np.float64).T
    ratios = np.sort(after / before)
    low, high = median_interval(ratios)
    return Evidence(
        before_ns=float(np.median(before)),
        after_ns=float(np.median(after)),
        ratio=float(np.median(ratios)),
        low=low,
        high=high,
        count=len(ratios),
        _ratios=ratios,
    )


def unpaired(before_ns: Sequence[float], after_ns: Sequence[float]) -> Evidence:
    """Evidence of two sets of samples, each in the order taken."""
    blocks = (np.sort(blocked(before_ns)), np.sort(blocked(after_ns)))
    low, high = _ratio_interval(*blocks)
    before, after = (float(np.median(side)) for side in blocks)
    medians = [float(np.median(np.asarray(side))) for side in (before_ns, after_ns)]
    return Evidence(
        before_ns=medians[0],
        after_ns=medians[1],
        ratio=after / before,  # what the interval is of; the samples' may lie outside of it
        low=low,
        high=high,
        count=min(map(len, blocks)),
        _blocks=blocks,
    )


def blocked(samples_ns: Sequence[float]) -> Floats:
    """Medians of at most BLOCKS blocks of neighbouring samples, in order."""
    if len(samples_ns) <= BLOCKS:
        return np.array(samples_ns, dtype=np.float64)
    ends = [len(samples_ns) * number // BLOCKS for number in range(BLOCKS + 1)]
    return np.array([stats.median(samples_ns[i:j]) for i, j in itertools.pairwise(ends)])


def median_of(samples_ns: Sequence[float]) -> float | None:
    return float(np.median(np.asarray(samples_ns))) if samples_ns else None


def unrest(samples_ns: Sequence[float]) -> list[tuple[str, float]]:
    """How a side's own time strays while it is measured, and how far, relative: what is more than
    what its samples scatter from one to the next."""
    blocks = blocked(samples_ns)
    if len(blocks) < FEWEST:
        return []
    samples = np.asarray(samples_ns)
    middle = float(np.median(samples))
    scatter = float(np.median(np.abs(np.diff(samples)))) / 0.954 / middle  # one sigma, if normal
    of_block = 1.25 * scatter / math.sqrt(len(samples) / len(blocks))  # one sigma of its median
    thirds = [stats.median(part.tolist()) for part in np.array_split(blocks, 3)]
    ordered = np.sort(blocks)
    at_end = float(np.median(samples[-3:])) / middle  # the clock is read right after them
    strays = (
        ("drift by", max(thirds) / min(thirds) - 1, max(SAME, 2.5 * of_block)),
        ("spread over", float(ordered[-2] / ordered[1]) - 1, max(_WIDE, 6 * of_block)),
        ("end off their median by", max(at_end, 1 / at_end) - 1, max(_WIDE, 3 * scatter)),
    )
    return [(what, size) for what, size, allowed in strays if size > allowed]


def verdicts(
    evidence: Sequence[Evidence], *, noise: Sequence[float], alpha: float = COMPARE_ALPHA
) -> list[tuple[Verdict, float]]:
    """Verdict and corrected p of every point: a change counts if its interval excludes all that is
    noise and it stays unlikely after correcting for the number of points."""
    raw = [
        min(1.0, 2 * min(e.p_above(1 + n), e.p_below(1 / (1 + n))))
        for e, n in zip(evidence, noise, strict=True)
    ]
    found: list[tuple[Verdict, float]] = []
    for e, n, p in zip(evidence, noise, benjamini_hochberg(raw), strict=True):
        band = 1 + max(n, SAME)
        verdict: Verdict = "unclear"
        if e.count < FEWEST:
            pass
        elif p <= alpha and e.surest_low > 1 + n:
            verdict = "slower"
        elif p <= alpha and e.surest_high < 1 / (1 + n):
            verdict = "faster"
        elif e.low >= 1 / band and e.high <= band and e.slack <= RESTLESS:
            verdict = "same"
        found.append((verdict, p))
    return found


def gated(
    evidence: Sequence[Evidence], thresholds: Sequence[float], *, alpha: float = GATE_ALPHA
) -> list[tuple[bool | None, float]]:
    """Of every point whether it is within its threshold (None: unclear), and the corrected p that
    it is not."""
    raw = [e.p_above(t) for e, t in zip(evidence, thresholds, strict=True)]
    found: list[tuple[bool | None, float]] = []
    for e, threshold, p in zip(evidence, thresholds, benjamini_hochberg(raw), strict=True):
        within: bool | None = None
        if e.count < FEWEST:
            pass
        elif p <= alpha and e.surest_low > threshold:
            within = False
        elif e.surest_high <= threshold:
            within = True
        found.append((within, p))
    return found


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Adjusted p: rejecting those below q keeps the expected share of false ones among the rejected
    at most q (Benjamini and Hochberg 1995)."""
    if not p:
        return []
    given = np.asarray(p, dtype=np.float64)
    order = np.argsort(given)[::-1]
    scaled = given[order] * len(given) / np.arange(len(given), 0, -1)
    adjusted = np.empty_like(scaled)
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(scaled))
    return [float(value) for value in adjusted]


def sign_tail(successes: int, n: int) -> float:
    """P(X >= successes), X ~ Binomial(n, 1/2): the sign test."""
    return float(_sign_tails(n)[successes])


def median_interval(ordered: Floats, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The bootstrap's percentile interval of the median, over all resamples; ordered ascending.

    Of an even number, the lower end is that of the lower middle one, the upper end of the upper.
    """
    n = len(ordered)
    tail = (1 - confidence) / 2
    lower, upper = np.cumsum(_median_weights(n, low=True)), np.cumsum(_median_weights(n, low=False))
    at_low = int(np.argmax(lower > tail))
    at_high = int(np.argmax(upper >= 1 - tail - 1e-12))
    return float(ordered[at_low]), float(ordered[at_high])


def _ratio_interval(before: Floats, after: Floats) -> tuple[float, float]:
    """The bootstrap's percentile interval of median(after) / median(before), over all resamples."""
    tail = (1 - CONFIDENCE) / 2
    ends = []
    for low, fraction in ((True, tail), (False, 1 - tail)):
        ratios = (after[:, None] / before[None, :]).ravel()
        weights = np.outer(
            _median_weights(len(after), low=low), _median_weights(len(before), low=not low)
        ).ravel()
        order = np.argsort(ratios)
        reached = np.cumsum(weights[order])
        at = int(np.argmax(reached > fraction if low else reached >= fraction - 1e-12))
        ends.append(float(ratios[order][at]))
    return ends[0], ends[1]


@functools.lru_cache(maxsize=512)
def _median_weights(n: int, *, low: bool) -> Floats:
    """Probability that a resample's (lower or upper) median is the k-th of n ordered samples.

    The j-th of n draws is among the first k samples if at least j draws are: Binomial(n, k / n).
    """
    rank = (n + 1) // 2 if low else n // 2 + 1
    draws = np.arange(n + 1)
    log_choose = np.array([math.lgamma(n + 1) - math.lgamma(d + 1) - math.lgamma(n - d + 1)
                           for d in draws])  # fmt: skip
    reached = np.ones(n)
    for k in range(1, n):
        log_p = log_choose + draws * math.log(k / n) + (n - draws) * math.log1p(-k / n)
        reached[k - 1] = min(1.0, float(np.exp(log_p[rank:]).sum()))
    return np.diff(reached, prepend=0.0)


@functools.lru_cache(maxsize=512)
def _sign_tails(n: int) -> Floats:
    log_p = np.array([math.lgamma(n + 1) - math.lgamma(d + 1) - math.lgamma(n - d + 1)
                      for d in range(n + 1)])  # fmt: skip
    p = np.exp(log_p - n * math.log(2))
    tails: Floats = np.minimum(1.0, np.cumsum(p[::-1])[::-1])
    return tails


def _separation(smaller: Floats, larger: Floats) -> float:
    """Chance, at most, of samples so far apart were median(smaller) >= median(larger).

    The least alpha at which the intervals of both medians by order statistics, each at alpha / 2,
    do not overlap: the r-th from the top of one, the r-th from the bottom of the other.
    """
    best = 1.0
    m, n = len(smaller), len(larger)
    for r in range(1, n // 2 + 1):
        bound = larger[r - 1]  # median(larger) is above it but for this chance
        chance = sign_tail(n - r + 1, n)
        above = int(np.sum(smaller >= bound))  # median(smaller) is below it but for this one
        if 2 * max(chance, sign_tail(m - above, m)) < best:
            best = 2 * max(chance, sign_tail(m - above, m))
    return min(1.0, best)
