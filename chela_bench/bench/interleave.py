"""Configurations of one call timed in turn: a sample of each a round, in another order every round,
so that drift of clocks and temperature meets all of them alike.

They were found right before, one by one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence

from chela_bench.bench import stats, timing
from chela_bench.bench.cases import Case
from chela_bench.bench.job import Bench, Job, Results
from chela_bench.bench.load import load
from chela_bench.bench.ops import Impl
from chela_bench.bench.registry import get_op


def interleaved(
    bench: Bench, cases: Sequence[Case], user_impls: Mapping[str, Impl], seconds: float
) -> tuple[dict[str, list[float]], int]:
    """Nanoseconds a call by the case's key, and how many rounds there were: until `seconds` are
    spent, or every median is settled. A case that cannot be timed so has no samples."""
    calls = _calls(bench, cases, user_impls)
    samples: dict[str, list[float]] = {key: [] for key in calls}
    order = list(calls)
    counts = bench.cuda and bench.timer is None
    launches = {key: timing.count_launches(call) if counts else 0 for key, call in calls.items()}
    shuffle = random.Random(bench.session.seed).shuffle
    rounds, begin = 0, time.perf_counter()
    if bench.timer is not None:
        bench.timer.restart()
    while order and (rounds < timing.MIN_OK_SAMPLES or time.perf_counter() - begin < seconds):
        bench.announce("time")
        shuffle(order)
        for key in list(order):
            try:
                samples[key] += _sample(bench, calls[key], launches[key])
            except timing.NoKernelTime:
                order.remove(key)
                samples[key] = []
        rounds += 1
        if rounds >= stats.MIN_SAMPLES and all(stats.settled(samples[key]) for key in order):
            break
    return {key: taken for key, taken in samples.items() if taken}, rounds


def _calls(
    bench: Bench, cases: Sequence[Case], user_impls: Mapping[str, Impl]
) -> dict[str, Results]:
    """Compiled and warm. All on the same inputs."""
    calls: dict[str, Results] = {}
    inputs = None
    for case in cases:
        bench.announce("build")
        op = get_op(case.op)
        impl = user_impls.get(case.impl) or op.impl(case.impl)
        job = Job(bench, case, op, impl, load(impl.target))
        inputs = inputs or job.draw()
        with job.tuned():
            call = job.call(inputs)
            call()
        calls[case.key] = call
    return calls


def _sample(bench: Bench, call: Results, launches: int) -> list[float]:
    if not bench.cuda:
        return [float(timing.once_ns(call))]
    if bench.timer is not None:
        return [bench.timer.sample(call)]
    once = timing.Budget(0.0, 0.0)
    return timing.profiler_samples(call, bench.evictor, once, launches=launches)
