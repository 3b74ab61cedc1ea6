"""Order statistics against numpy and against simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chela_bench.bench import stats


@given(st.lists(st.floats(1, 1e12), min_size=1, max_size=200))
def test_quantiles_are_numpys(samples):
    found = stats.summarise(samples)
    expected = np.quantile(samples, [0.5, 0.25, 0.75, 0.0])
    got = [found.median, found.q1, found.q3, found.min]
    assert got == pytest.approx(expected, rel=1e-9, abs=0.51)  # rounded to whole nanoseconds
    assert found.n == len(samples)


@pytest.mark.parametrize("n", range(1, 6))
def test_five_samples_have_no_interval(n):
    assert stats.median_interval([1.0] * n) is None


@pytest.mark.parametrize(
    ("n", "rank"), [(6, 1), (10, 2), (20, 6), (100, 40), (999, 469), (1000, 469), (10000, 4902)]
)
def test_ranks_are_the_published_ones(n, rank):
    """Ranks of the 95 % interval as in tables of the sign test (Conover, 1999, A3)."""
    low, high = stats.median_interval([float(i) for i in range(1, n + 1)])
    assert (low, high) == (rank, n + 1 - rank)


@pytest.mark.parametrize("n", [6, 15, 60, 2000])
def test_the_interval_holds_the_median_95_times_of_100(n):
    rng = np.random.default_rng(n)
    hits = 0
    for _ in range(600):
        low, high = stats.median_interval(list(rng.exponential(size=n)))
        hits += low <= np.log(2) <= high
    assert hits / 600 >= 0.93


def test_settled_wants_samples_time_and_a_narrow_interval():
    assert not stats.settled([1e7] * 9)  # too few
    assert not stats.settled([1e3] * 1000)  # 1 ms in all
    assert stats.settled([1e7] * 10)
    assert not stats.settled([1e7, 1.2e7] * 20)  # two modes: the median lies anywhere between
