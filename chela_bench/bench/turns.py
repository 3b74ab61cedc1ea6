"""One case held ready in a worker, sampled in turns with another worker's, and judged again."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from chela_bench.bench import timing
from chela_bench.bench.cases import Case
from chela_bench.bench.estimate import refuse_if_too_long
from chela_bench.bench.job import Bench, Job
from chela_bench.bench.judge import judge_again, judge_first
from chela_bench.bench.load import load
from chela_bench.bench.measure import launches_of
from chela_bench.bench.ops import Impl
from chela_bench.bench.registry import get_op


class Held:
    """Correct before fast: judged before the first turn, and by `release` after the last.

    Raises Finished, or what the implementation raises.
    """

    def __init__(self, bench: Bench, case: Case, user_impls: dict[str, Impl]) -> None:
        op = get_op(case.op)
        impl = user_impls.get(case.impl) or op.impl(case.impl)
        bench.announce("build")
        self._bench = bench
        self._columns: dict[str, Any] = {}
        self._job = job = Job(bench, case, op, impl, load(impl.target))
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as until_held:
            refuse_if_too_long(job)
            until_held.enter_context(job.tuned())
            self._inputs = job.draw()
            judge_first(job, self._inputs, self._columns)
            bench.announce("build")
            self._call = job.call(self._inputs)
            self._call()
            bench.announce("time")
            self._launches = self._kernel_launches() if bench.cuda else None
            self._open = until_held.pop_all()

    def take(self, seconds: float) -> tuple[list[float], str]:
        """Samples in nanoseconds for about so long, at least three, and the clock they are of."""
        bench, limits = self._bench, self._bench.session.limits
        budget = timing.Budget(seconds, timing.MIN_OK_SAMPLES * limits.call_s)
        if self._launches is not None:
            with contextlib.suppress(timing.NoKernelTime):
                if bench.timer is not None:
                    return timing.event_samples(self._call, bench.timer, budget), "event"
                return timing.profiler_samples(
                    self._call, bench.evictor, budget, launches=self._launches
                ), "profiler"
            self._launches = None  # from here on too: one clock for all turns
        return timing.wall_samples(self._call, budget), "wall"

    def release(self) -> None:
        with self._open:
            judge_again(self._job, self._inputs, self._call, self._columns)

    def _kernel_launches(self) -> int | None:
        """Of one call; None where it has too many for a kernel time."""
        first_ns = timing.fastest_ns(self._call)
        launches = launches_of(self._job, self._call, first_ns)
        if launches is None:
            return None
        at_once = math.ceil(launches / timing.steps_of(self._call).count)
        return launches if at_once <= timing.MAX_LAUNCHES else None
