import itertools

from tests.pairwise import pairwise


def test_every_two_values_meet_in_few_cases():
    factors = {"a": range(5), "b": "xyz", "c": [True, False], "d": [1, 2]}
    cases = pairwise(factors)
    for first, second in itertools.combinations(factors, 2):
        met = {(case[first], case[second]) for case in cases}
        assert met == set(itertools.product(factors[first], factors[second]))
    assert 15 <= len(cases) <= 20
    assert cases == pairwise(factors)
