"""A small set of cases in which every two values of different factors meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Greedy: each case is the best of a few that complete one pair still missing."""
    generator = random.Random(seed)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(factors, 2)
        for x in factors[a]
        for y in factors[b]
    }
    order = sorted(missing, key=repr)
    cases = []
    for pair in order:
        if pair not in missing:
            continue
        tries = [_completed(pair, factors, generator) for _ in range(30)]
        best = max(tries, key=lambda case: len(_pairs(case) & missing))
        missing -= _pairs(best)
        cases.append(best)
    return cases


def _completed(
    pair: tuple[tuple[str, Any], ...],
    factors: Mapping[str, Sequence[Any]],
    generator: random.Random,
) -> dict[str, Any]:
    given = dict(pair)
    return {name: given.get(name, generator.choice(values)) for name, values in factors.items()}


def _pairs(case: Mapping[str, Any]) -> set[tuple[tuple[str, Any], ...]]:
    return set(itertools.combinations(case.items(), 2))
