"""Measures one case on this process's device: estimate, check, time, check again.

Correct before fast: a time is kept only if the implementation has just matched its oracle on this
very shape and dtype, and does so again after timing, on fresh inputs.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch

from chela_bench.bench import timing
from chela_bench.bench.bounds import point_of, shortest_ns
from chela_bench.bench.cases import Case, Limits
from chela_bench.bench.estimate import refuse_if_too_long
from chela_bench.bench.job import Bench, Finished, Job, Results
from chela_bench.bench.judge import judge_again, judge_first
from chela_bench.bench.load import load
from chela_bench.bench.modelled import modelled_bytes
from chela_bench.bench.ops import Impl
from chela_bench.bench.registry import get_op
from chela_bench.bench.stats import median, summarise
from chela_bench.profiles import gpm, nvml
from chela_bench.records import Hbm, Outcome, Point

TINY_TOKENS = 64  # where host time is measured
SLOW_NS = 20_000_000  # a call this slow may be a loop over tokens: launches are looked at shorter
SHORT_TOKENS = 512
ENERGY_S, GPM_S = 2.0, 1.0  # the energy counter is coarse; GPM wants a tenth of a second
LEAD_S = 0.25  # before them: what NVML tells is up to 0.1 s old, and must not be of an idle card
_TIMES = (
    "time_ns", "wall_ns", "wall_n", "host_ns", "telemetry", "throttle", "energy_j", "gpm_bytes",
)  # fmt: skip

_NULL_ON_CPU = {
    "floor_ns": "CPU: the floor is defined for device memory",
    "peak_bytes": "CPU: torch's allocator keeps no peak",
    "host_ns": "CPU: a call returns when it is done",
    "launches": "CPU: nothing is launched",
    "telemetry": "CPU: no NVML",
    "throttle": "CPU: no NVML",
}


def measure(bench: Bench, case: Case, user_impls: dict[str, Impl]) -> tuple[Point, list[float]]:
    """The case's point and its time samples in nanoseconds (empty unless the outcome is ok).

    Exceptions of the implementation escape; the worker turns them into outcomes.
    """
    op = get_op(case.op)
    impl = user_impls.get(case.impl) or op.impl(case.impl)
    bench.announce("build")
    job = Job(bench, case, op, impl, load(impl.target))
    columns: dict[str, Any] = {}
    nulls: dict[str, str] = {} if bench.cuda else dict(_NULL_ON_CPU)
    samples: list[float] = []
    outcome: Outcome = "ok"
    reason: str | None = None
    try:
        refuse_if_too_long(job)
        with job.tuned():
            inputs = job.draw()
            judge_first(job, inputs, columns)
            bench.announce("build")
            with bench.spending("compiling"):
                call = job.call(inputs)
                call()
            samples = _time(job, call, columns, nulls)
            judge_again(job, inputs, call, columns)
    except Finished as finished:
        outcome, reason = finished.outcome, finished.reason
        columns = {name: value for name, value in columns.items() if name not in _TIMES}
        samples = []
    modelled = modelled_bytes(case, op, impl, bench.l2_bytes)
    hbm = _with_gpm(modelled, columns.pop("gpm_bytes", None))
    point = point_of(
        case,
        bench.session,
        bench.device_name,
        bench.ceilings,
        outcome=outcome,
        reason=reason,
        oracle=f"float64 {op.oracle.rpartition(':')[2]}",
        null_reasons=nulls,
        hbm=hbm,
        **columns,
    )
    return point, samples


def _with_gpm(hbm: Hbm, gpm_bytes: int | None) -> Hbm:
    if gpm_bytes is None:
        return hbm
    return hbm.model_copy(update={"gpm_bytes": gpm_bytes, "source": "gpm"})


def _time(job: Job, call: Results, columns: dict[str, Any], nulls: dict[str, str]) -> list[float]:
    """Fills in the time columns and returns the samples that the shown time comes from."""
    bench = job.bench
    with bench.spending("timing"):
        first_ns = timing.fastest_ns(call)
    job.known_seconds[job.tokens] = first_ns * timing.steps_of(call).count / 1e9
    bench.announce("time")
    budget = _budget(bench.session.limits)
    if not bench.cuda:
        with bench.spending("timing"):
            samples = _enough(timing.wall_samples(call, budget))
        columns["time_ns"] = summarise(samples)
        columns["wall_ns"], columns["wall_n"] = columns["time_ns"].median, len(samples)
        return samples
    with bench.spending("timing"):
        walls = _enough(
            timing.wall_samples(call, timing.Budget(min(0.2, budget.samples_s), budget.at_most_s))
        )
    columns["wall_ns"], columns["wall_n"] = max(1, round(median(walls))), len(walls)
    with bench.sampler() as sampled:
        samples = _kernel_samples(job, call, first_ns, columns, nulls)
        if samples:
            columns["time_ns"] = summarise(samples)
            _refuse_impossible(job, columns["time_ns"].median)
        bench.announce("time")
        timing.keep_busy(call, first_ns)
    columns["telemetry"], columns["throttle"] = sampled.reading, sampled.throttle
    _count_in_a_loop(job, call, first_ns, columns, nulls)
    columns["peak_bytes"] = _peak_bytes(call)
    _add_host_ns(job, columns, nulls)
    return samples or walls


def _kernel_samples(
    job: Job, call: Results, first_ns: int, columns: dict[str, Any], nulls: dict[str, str]
) -> list[float]:
    """Samples of kernel time; none, and the reason, where a call cannot have one."""
    bench = job.bench
    launches = launches_of(job, call, first_ns)
    if launches == 0:
        raise Finished("wrong", "the call launches nothing on the GPU")
    at_once = None if launches is None else math.ceil(launches / timing.steps_of(call).count)
    columns["launches"] = at_once
    if launches is None or at_once is None or at_once > timing.MAX_LAUNCHES:
        nulls["time_ns"] = f"over {timing.MAX_LAUNCHES} launches a call: wall time stands alone"
        if launches is None:
            nulls["launches"] = f"not counted beyond {timing.MAX_LAUNCHES} at T = {SHORT_TOKENS}"
        return []
    budget = _budget(bench.session.limits)
    try:
        with bench.spending("timing"):
            if bench.timer is not None:
                samples = timing.event_samples(call, bench.timer, budget)
            else:
                samples = timing.profiler_samples(call, bench.evictor, budget, launches=launches)
    except timing.NoKernelTime as refusal:
        nulls["time_ns"] = f"{refusal}: wall time stands alone"
        return []
    return _enough(samples)


def _count_in_a_loop(
    job: Job, call: Results, call_ns: int, columns: dict[str, Any], nulls: dict[str, str]
) -> None:
    """Energy and, by GPM, bytes of a call: NVML's counters over calls in a row, where asked for."""
    bench, uuid = job.bench, job.bench.device_name
    session = bench.session
    wanted = [n for n, on in (("energy_j", session.energy), ("hbm.gpm_bytes", session.gpm != "no"))
              if on]  # fmt: skip
    if not wanted:
        return
    if timing.steps_of(call).count > 1:
        nulls |= dict.fromkeys(wanted, "steps in a row would count the copies of their cache")
        return
    bench.announce("time")
    with bench.spending("timing"), contextlib.ExitStack() as held:
        timing.repeat(call, call_ns, for_s=LEAD_S)
        before_mj = nvml.energy_mj(uuid) if session.energy else None
        counted = held.enter_context(gpm.Counted(uuid)) if session.gpm != "no" else None
        calls = timing.repeat(call, call_ns, for_s=ENERGY_S if session.energy else GPM_S)
    if session.energy:
        after_mj = nvml.energy_mj(uuid)
        if before_mj is None or after_mj is None or after_mj <= before_mj:
            nulls["energy_j"] = "NVML: this card does not count its energy"
        else:
            columns["energy_j"] = (after_mj - before_mj) / 1e3 / calls
    if counted is not None:
        if counted.total_bytes is None:
            nulls["hbm.gpm_bytes"] = counted.reason or "GPM: nothing counted"
        else:
            columns["gpm_bytes"] = round(counted.total_bytes / calls)
    bench.announce("time")


def _budget(limits: Limits) -> timing.Budget:
    """Three calls as long as the longest that is tried at all are always given their time."""
    at_most_s = max(limits.sample_s, timing.MIN_OK_SAMPLES * limits.call_s)
    return timing.Budget(limits.sample_s, at_most_s)


def _enough(samples: list[float]) -> list[float]:
    if len(samples) < timing.MIN_OK_SAMPLES:
        raise Finished(
            "timeout",
            f"only {len(samples)} of the {timing.MIN_OK_SAMPLES} samples wanted came before the "
            "time limit",
        )
    return samples


def launches_of(job: Job, call: Results, first_ns: int) -> int | None:
    """Launches of one call, or None if a short sequence already takes more than MAX_LAUNCHES."""
    if first_ns > SLOW_NS and job.tokens > SHORT_TOKENS:
        with contextlib.suppress(Exception), job.at(SHORT_TOKENS) as short:  # it need not take it
            if timing.count_launches(short) > timing.MAX_LAUNCHES:
                return None
        job.bench.announce("time")
    return timing.count_launches(call)


def _peak_bytes(call: Results) -> int:
    """Peak of allocated memory during a call, beyond what was live before it: inputs, a cache."""
    steps = timing.steps_of(call)
    steps.rewind()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    steps.run()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before)


def _add_host_ns(job: Job, columns: dict[str, Any], nulls: dict[str, str]) -> None:
    known = job.bench.host_ns
    if job.series not in known:
        try:
            with job.at(TINY_TOKENS) as call, job.bench.spending("timing"):
                known[job.series] = timing.host_ns(call)
        except Exception as error:  # it need not take another length; its point stands
            nulls["host_ns"] = f"at T = {TINY_TOKENS}: {type(error).__name__}: {error}"[:200]
            return
    columns["host_ns"] = known[job.series]


def _refuse_impossible(job: Job, time_ns: int) -> None:
    bench = job.bench
    cold = bench.session.l2 == "cold"
    shortest = shortest_ns(bench.ceilings, job.case, bench.l2_bytes, cold=cold)
    if time_ns < 0.9 * shortest:
        raise Finished(
            "wrong",
            f"broken measurement: {time_ns} ns is below 0.9x of the {shortest:.0f} ns that the "
            "bytes and FLOPs need",
        )
