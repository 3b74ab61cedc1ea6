"""Statistics of verdicts: against scipy and against brute force, and at the edges."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from chela_bench.bench import verdict
from chela_bench.bench.verdict import Limit, gated, paired, parse_limit, unpaired, unrest, verdicts
from chela_bench.errors import UsageError
from tests.records import samples


@pytest.mark.parametrize("n", [1, 2, 5, 8, 31, 90])
def test_sign_tail_is_the_binomial(n):
    for k in range(n + 1):
        assert verdict.sign_tail(k, n) == pytest.approx(scipy.stats.binom.sf(k - 1, n, 0.5))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_benjamini_hochberg_is_scipys(p):
    expected = scipy.stats.false_discovery_control(p)
    assert verdict.benjamini_hochberg(p) == pytest.approx(list(expected))
    assert verdict.benjamini_hochberg([]) == []


@pytest.mark.parametrize("n", [6, 7, 12, 21, 31])
def test_the_interval_is_the_bootstraps(n):
    """The closed form against 40,000 resamples; of an even number it is the wider one."""
    rng = np.random.default_rng(n)
    x = np.sort(rng.lognormal(0, 0.1, n))
    resampled = np.sort(rng.choice(x, (40_000, n)), axis=1)
    low, high = resampled[:, (n - 1) // 2], resampled[:, n // 2]
    expected = (
        np.quantile(low, 0.025, method="inverted_cdf"),
        np.quantile(high, 0.975, method="inverted_cdf"),
    )
    assert verdict.median_interval(x) == pytest.approx(expected)


def test_the_ratios_interval_is_the_bootstraps():
    rng = np.random.default_rng(1)
    before, after = rng.lognormal(0, 0.02, 21), rng.lognormal(0.05, 0.02, 15)
    medians = [np.median(rng.choice(x, (40_000, len(x))), axis=1) for x in (before, after)]
    expected = np.quantile(medians[1] / medians[0], [0.025, 0.975])
    found = unpaired(list(before), list(after))
    assert [found.low, found.high] == pytest.approx(expected, rel=2e-3)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        pairs = [(1.0, float(r)) for r in rng.lognormal(np.log(1.03), 0.01, 16)]
        evidence = paired(pairs)
        held += evidence.low <= 1.03 <= evidence.high
    assert held / 400 >= 0.93


def test_a_ratio_lies_in_its_interval():
    """Where the median of all samples is another than that of blocks, too."""
    after = [1.0, 1.0, 3.0, 3.0, 3.0] * 24 + [1.0] * 35
    found = unpaired([1.0] * len(after), after)
    assert found.low <= found.ratio <= found.high
    assert found.ratio == 3 and found.after_ns == 1


@pytest.mark.parametrize("pairs", [[(2.0, 2.0)] * 10, [(3.0, 3.3), (3.1, 3.2)] * 6])
def test_sides_can_be_exchanged(pairs):
    forward, back = paired(pairs), paired([(b, a) for a, b in pairs])
    assert forward.low == pytest.approx(1 / back.high)
    assert forward.p_above(1.01) == pytest.approx(back.p_below(1 / 1.01))


def test_no_chance_is_claimed_that_so_few_samples_cannot_give():
    """Three against three, far apart: no test at 5 % can tell."""
    few = unpaired([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    assert few.p_above(1.0) >= 1 / 20
    [(word, _)] = verdicts([few], noise=[0.01])
    assert word == "unclear"
    [(within, _)] = gated([few], [1.05])
    assert within is None


def test_p_of_stored_samples_is_no_smaller_than_it_may_be():
    """Under no change at all, p below q at most so often: the test is conservative."""
    rng = np.random.default_rng(3)
    p = [
        unpaired(list(rng.normal(1, 0.01, 20)), list(rng.normal(1, 0.01, 20))).p_above(1.0)
        for _ in range(500)
    ]
    for q in (0.01, 0.05, 0.2):
        assert np.mean(np.array(p) <= q) <= q + 0.02


@pytest.mark.parametrize(
    ("change", "word"), [(1.0, "same"), (1.04, "slower"), (0.96, "faster"), (1.017, "unclear")]
)
def test_words(change, word):
    evidence = unpaired(samples(1e6), samples(1e6 * change, seed=1))
    assert [w for w, _ in verdicts([evidence], noise=[0.015])] == [word]


def test_many_points_are_corrected_for():
    """Clear enough alone, not among forty that show nothing."""
    borderline = paired([(1.0, 1.03)] * 9 + [(1.0, 0.999)])
    nothing = paired([(1.0, 1.0 + 0.001 * (-1) ** i) for i in range(10)])
    assert verdicts([borderline], noise=[0.006])[0][0] == "slower"
    assert verdicts([borderline, *[nothing] * 39], noise=[0.006] * 40)[0][0] == "unclear"


def test_unrest_takes_a_verdict_back():
    calm = unpaired(samples(1e6), samples(1.08e6, seed=1))
    restless = dataclasses.replace(calm, slack=0.04)
    assert gated([calm], [1.05])[0][0] is False
    assert gated([restless], [1.05])[0][0] is None
    assert [w for w, _ in verdicts([restless], noise=[0.05])] == ["unclear"]


def test_unrest_is_told_from_scatter():
    steady = samples(1e6, n=200, scatter=0.02)
    assert unrest(steady) == []
    drifting = [ns * (1 + 0.03 * i / 200) for i, ns in enumerate(samples(1e6, n=200))]
    assert unrest(drifting)[0] == ("drift by", pytest.approx(0.02, abs=0.004))
    two_clocks = [ns * (1.12 if i % 80 < 20 else 1) for i, ns in enumerate(samples(1e6, n=200))]
    assert "spread over" in [what for what, _ in unrest(two_clocks)]
    switched = [*samples(1e6, n=197), 1.12e6, 1.12e6, 1.12e6]
    assert "end off their median by" in [what for what, _ in unrest(switched)]
    assert unrest([1.0]) == []


def test_blocks_keep_every_sample_and_the_order():
    assert list(verdict.blocked([3.0, 1.0])) == [3.0, 1.0]
    found = verdict.blocked([float(i) for i in range(100)])
    assert len(found) == verdict.BLOCKS and list(found) == sorted(found)
    assert found[0] == pytest.approx(1.0) and found[-1] == pytest.approx(98.0, abs=1)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("5%,2us", Limit(0.05, 2000.0)),
        ("2us", Limit(0.0, 2000.0)),
        ("0%", Limit(0.0, 0.0)),
        (" 2.5% , 1ms ", Limit(0.025, 1e6)),
        ("300ns", Limit(0.0, 300.0)),
    ],
)
def test_limits(text, limit):
    assert parse_limit(text) == limit
    assert parse_limit(str(limit)) == limit


@pytest.mark.parametrize(
    "text", ["", "5", "5 percent", "5%,5%", "2us,3ms", "-5%", "1e3%", "nan%", "5%;2us", "9" * 400]
)
def test_a_limit_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="5%,2us"):
        parse_limit(text)


def test_a_limit_is_both_percent_and_time():
    """5 % of 10 us is less than 2 us: there the time decides; above 40 us the percentage does."""
    limit = parse_limit("5%,2us")
    assert limit.threshold(10_000, 0.0) == pytest.approx(1.2)
    assert limit.threshold(1e6, 0.0) == pytest.approx(1.05)
    assert limit.threshold(1e6, 0.08) == pytest.approx(1.08)
