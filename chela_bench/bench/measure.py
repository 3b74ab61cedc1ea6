"""Measures one case on this process's device: draw, estimate, check, time, check again.

Correct before fast: a time is kept only if the implementation has just matched its oracle on this
very shape and dtype, with freshly allocated memory full of NaN, and does so again after timing on
fresh inputs of the other distribution.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chela_bench.bench import check, timing
from chela_bench.bench.cases import Case, Limits, Session
from chela_bench.bench.inputs import DTYPES, Draw, Inputs
from chela_bench.bench.load import load
from chela_bench.bench.ops import Impl, Op, get_op
from chela_bench.bench.stats import summarise
from chela_bench.records import Ceilings, Hbm, Outcome, Point, Telemetry

TINY_TOKENS = 64  # where host time is measured
PROBE_STEP = 16  # a length is estimated from one PROBE_STEP times shorter
SHORTEST_PROBE = 1024  # tokens; up to here nothing is estimated

Function = Callable[..., Any]


class Finished(Exception):
    """The point is over before its time was taken: an outcome other than ok, and why."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, reason


@dataclass
class Bench:
    """A device with what is known of it, and what has been learnt about implementations so far."""

    session: Session
    device: torch.device
    device_name: str  # "cpu" or the GPU's UUID, as it stands in every point
    l2_bytes: int
    ceilings: Ceilings
    telemetry: Callable[[], tuple[Telemetry, list[str] | None]]
    announce: Callable[[str], None]  # tells the parent which phase begins
    timer: timing.EventTimer | None = None
    evictor: timing.L2Evictor | None = None
    seconds_at: dict[tuple[str, ...], dict[int, float]] = field(default_factory=dict)
    host_ns: dict[tuple[str, ...], int] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


@dataclass
class Job:
    """One case, its op and implementation looked up."""

    bench: Bench
    case: Case
    op: Op
    impl: Impl
    function: Function

    @property
    def tokens(self) -> int:
        return self.case.shape["T"]

    @property
    def series(self) -> tuple[str, ...]:
        """All that identifies the case but its length."""
        dims = tuple(f"{k}{v}" for k, v in self.case.shape.items() if k != "T")
        config = tuple(f"{k}={v}" for k, v in sorted(self.case.config.items()))
        return (self.case.op, self.case.impl, self.case.direction, self.case.dtype, *dims, *config)

    def draw(self, *, tokens: int | None = None, seed: int = 0, other: bool = False) -> Inputs:
        """The case's inputs; `other` takes the distribution that is not timed."""
        distribution = self.bench.session.inputs
        if other:
            distribution = "mean1" if distribution == "randn" else "randn"
        shape = {**self.case.shape, "T": self.tokens if tokens is None else tokens}
        make: Callable[[Draw], Inputs] = load(self.op.inputs)
        return make(
            Draw(
                shape,
                DTYPES[self.case.dtype],
                self.bench.device,
                self.bench.session.seed + seed,
                distribution,
            )
        )

    def output(self, inputs: Inputs) -> Tensor:
        return _first(self.function(*inputs.arguments(inputs.tensors), **self.case.config))


def measure(bench: Bench, case: Case, user_impls: dict[str, Impl]) -> tuple[Point, list[float]]:
    """The case's point and its time samples in nanoseconds (empty unless the outcome is ok).

    Exceptions of the implementation escape; the worker turns them into outcomes.
    """
    op = get_op(case.op)
    impl = user_impls.get(case.impl) or op.impl(case.impl)
    bench.announce("build")
    job = Job(bench, case, op, impl, load(impl.target))
    columns: dict[str, Any] = {}
    nulls: dict[str, str] = {}
    samples: list[float] = []
    try:
        _refuse_if_too_long(job)
        inputs = job.draw()
        budget, errors = _check(job, inputs, poisoned=True)
        columns |= {"errors": errors, "error_rel": max(errors.values()), "error_budget": budget}
        samples = _time(job, inputs, columns, nulls)
        del inputs
        _refuse_impossible(job, columns)
        _check(job, job.draw(seed=1, other=True), poisoned=False)
        outcome: Outcome = "ok"
        reason: str | None = None
    except Finished as finished:
        outcome, reason = finished.outcome, finished.reason
        timed = ("time_ns", "wall_ns", "host_ns", "telemetry", "throttle")
        columns = {name: value for name, value in columns.items() if name not in timed}
        samples = []
    finally:
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
    known = {**bounds(bench.ceilings, case, op, impl), **columns, "null_reasons": nulls}
    point = Point(
        **case.model_dump(),
        device=bench.device_name,
        timer=bench.session.timer,
        l2=bench.session.l2 if bench.cuda else None,
        outcome=outcome,
        reason=reason,
        oracle=f"float64 {op.oracle.rpartition(':')[2]}",
        **known,
    )
    return point, samples


def bounds(ceilings: Ceilings, case: Case, op: Op, impl: Impl) -> dict[str, Any]:
    """Compulsory bytes, least FLOPs, the floor they imply on this card, and modelled HBM bytes."""
    if case.direction == "decode":
        return {}
    itemsize = DTYPES[case.dtype].itemsize
    columns: dict[str, Any] = {
        "compulsory_bytes": sum(op.compulsory_bytes(case.shape, itemsize, case.direction)),
        "flops": op.flops(case.shape, case.direction),
    }
    floor = floor_ns(ceilings, case.dtype, columns["compulsory_bytes"], columns["flops"])
    if floor:
        columns["floor_ns"] = max(1, round(floor))
    if impl.hbm_bytes is not None and case.direction == "fwd":
        if isinstance(impl.hbm_bytes, str):  # a kernel file's own model knows its configuration
            config = {k: v for k, v in case.config.items() if k not in op.options}
            modelled = load(impl.hbm_bytes)(case.shape, config, itemsize=itemsize)
        else:
            modelled = impl.hbm_bytes(case.shape, itemsize)
        columns["hbm"] = Hbm(model_bytes=modelled, source="model")
    return columns


def floor_ns(ceilings: Ceilings, dtype: str, moved_bytes: float, flops: float) -> float:
    """The longer of bytes over copy bandwidth and FLOPs over the matmul rate; 0 if unmeasured."""
    floor = 0.0
    if ceilings.copy_gb_per_s:
        floor = moved_bytes / ceilings.copy_gb_per_s
    rate = ceilings.matmul_tflop_per_s.get(dtype)  # type: ignore[call-overload]
    if rate:
        floor = max(floor, flops / rate / 1e3)
    return floor


# --- the call ------------------------------------------------------------------------------------


def _make_call(job: Job, inputs: Inputs) -> Callable[[], Sequence[Tensor]]:
    """The timed call: `fwd` without autograd; `fwdbwd` forward and every input's gradient for a
    fixed do; `bwd` the gradients alone, of a forward run once."""
    if job.case.direction == "fwd":
        inputs.requires_grad_(False)

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return [job.output(inputs)]

        return forward
    leaves = list(inputs.requires_grad_(True).tensors.values())
    if job.case.direction == "bwd":
        kept = job.output(inputs)
        kept_gradient = _output_gradient(job, kept)
        return lambda: torch.autograd.grad(kept, leaves, kept_gradient, retain_graph=True)
    output_gradient = _output_gradient(job, job.output(inputs))

    def forward_backward() -> Sequence[Tensor]:
        output = job.output(inputs)
        return [output, *torch.autograd.grad(output, leaves, output_gradient)]

    return forward_backward


def _output_gradient(job: Job, output: Tensor) -> Tensor:
    generator = torch.Generator(job.bench.device).manual_seed(job.bench.session.seed + 7)
    noise = torch.randn(
        output.shape, generator=generator, device=output.device, dtype=torch.float32
    )
    return noise.to(output.dtype)


# --- estimate ------------------------------------------------------------------------------------


def _refuse_if_too_long(job: Job) -> None:
    limit_s = job.bench.session.limits.call_s
    estimate_s = _estimated_seconds(job, job.tokens)
    if estimate_s is not None and estimate_s > limit_s:
        raise Finished("skipped", f"estimated {estimate_s:.3g} s > limit {limit_s:g} s")


def _estimated_seconds(job: Job, tokens: int) -> float | None:
    """Seconds of one call at `tokens`, from another length already run or a shorter one run now.

    Up to SHORTEST_PROBE tokens nothing is estimated (None): there it is simply run.
    """
    if tokens <= SHORTEST_PROBE:
        return None
    known = job.bench.seconds_at.setdefault(job.series, {})
    longer = min((length for length in known if length > tokens), default=None)
    if longer is not None and known[longer] <= job.bench.session.limits.call_s:
        return known[longer]
    shorter = max((length for length in known if length <= tokens), default=0)
    if shorter * PROBE_STEP < tokens:
        probe = max(SHORTEST_PROBE, tokens // PROBE_STEP)
        estimate_s = _estimated_seconds(job, probe)
        if estimate_s is None or estimate_s <= job.bench.session.limits.call_s:
            known[probe] = _probed_seconds(job, probe)
            shorter = probe
        else:
            known[probe], shorter = estimate_s, probe
    growth: float = (tokens / shorter) ** job.impl.growth
    return known[shorter] * growth


def _probed_seconds(job: Job, tokens: int) -> float:
    try:
        call = _make_call(job, job.draw(tokens=tokens))
        call()  # compiles
        return timing.fastest_ns(call) / 1e9
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise Finished("oom", f"out of memory already at T = {tokens}: {error}") from error


# --- check ---------------------------------------------------------------------------------------


def _check(job: Job, inputs: Inputs, *, poisoned: bool) -> tuple[float, dict[str, float]]:
    """Errors of output and gradients against the oracle; raises Finished("wrong") above budget."""
    bench, case = job.bench, job.case
    directions_budget = check.error_budget(
        case.dtype,
        roundings=job.op.roundings[case.direction],
        tokens=job.tokens,
        operands=job.impl.fp32_operands if case.dtype == "fp32" else None,
    )
    names = ["o"] if case.direction == "fwd" else ["o", *(f"d{name}" for name in inputs.tensors)]
    kinds: list[check.ErrorKind] = [job.op.output_kind]
    if case.direction != "fwd":
        kinds += inputs.kinds.values()
    bench.announce("build")  # the first call at this shape compiles and autotunes
    with _poisoned_memory(job) if poisoned else _plain_memory():
        actual = [tensor.detach() for tensor in _results(job, inputs)]
    bench.announce("check")
    exact = _oracle(job, inputs)
    errors: dict[str, float] = {}
    for name, kind, got, wanted in zip(names, kinds, actual, exact, strict=True):
        if got.shape != wanted.shape or got.dtype != DTYPES[case.dtype]:
            raise Finished(
                "wrong",
                f"{name} should be {list(wanted.shape)} {case.dtype}; "
                f"it is {list(got.shape)} {got.dtype}",
            )
        errors[name] = check.error_of(got, wanted, kind)
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= directions_budget:
        when = "" if poisoned else "after timing, on fresh inputs, "
        size = "not finite" if math.isinf(errors[worst]) else f"off by {errors[worst]:.2e}"
        raise Finished("wrong", f"{when}{worst} is {size}; budget {directions_budget:.2e}")
    return directions_budget, errors


def _results(job: Job, inputs: Inputs) -> Sequence[Tensor]:
    """Output and, unless the direction is fwd, all gradients, by the implementation."""
    if job.case.direction == "fwd":
        return _make_call(job, inputs)()
    inputs.requires_grad_(True)
    output = job.output(inputs)
    gradient = _output_gradient(job, output)
    return [output, *torch.autograd.grad(output, list(inputs.tensors.values()), gradient)]


def _oracle(job: Job, inputs: Inputs) -> Sequence[Tensor]:
    """The same in float64 by the op's oracle, on the same rounded inputs."""
    exact_inputs = inputs.to(torch.float64)
    function: Function = load(job.op.oracle)
    options = {name: value for name, value in job.case.config.items() if name in job.op.options}
    if job.case.direction == "fwd":
        with torch.no_grad():
            return [_first(function(*exact_inputs.arguments(exact_inputs.tensors), **options))]
    exact_inputs.requires_grad_(True)
    output = _first(function(*exact_inputs.arguments(exact_inputs.tensors), **options))
    gradient = _output_gradient(job, output.detach().to(DTYPES[job.case.dtype])).to(torch.float64)
    leaves = list(exact_inputs.tensors.values())
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


@contextmanager
def _poisoned_memory(job: Job) -> Iterator[None]:
    """Memory that nobody wrote reads as NaN.

    torch fills every torch.empty with NaN in deterministic mode. Compiled code allocates past
    that, and would be compiled anew for the mode: for it, the caching allocator's free blocks are
    filled with NaN instead.
    """
    if job.impl.compiled:
        if job.bench.cuda:
            torch.cuda.empty_cache()
            free_bytes, _ = torch.cuda.mem_get_info()
            nan = torch.full((free_bytes // 16,), math.nan, device=job.bench.device)
            del nan
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "does not have a deterministic implementation"
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _plain_memory() -> Iterator[None]:
    yield


# --- time ----------------------------------------------------------------------------------------


def _time(job: Job, inputs: Inputs, columns: dict[str, Any], nulls: dict[str, str]) -> list[float]:
    """Fills in the time columns and returns the samples."""
    bench, limits = job.bench, job.bench.session.limits
    bench.announce("build")
    call = _make_call(job, inputs)
    call()
    first_ns = timing.fastest_ns(call)
    bench.seconds_at.setdefault(job.series, {})[job.tokens] = first_ns / 1e9
    bench.announce("time")
    if not bench.cuda:
        timed = timing.time_on_cpu(call, _budget(limits))
        _keep(timed, columns)
        columns["wall_ns"] = columns["time_ns"].median
        nulls |= {
            "floor_ns": "CPU: the floor is defined for device memory",
            "peak_bytes": "CPU: torch's allocator keeps no peak",
            "host_ns": "CPU: a call returns when it is done",
            "throttle": "CPU: no NVML",
        }
        return timed.samples_ns
    columns["wall_ns"] = timing.wall_ns(call)
    samples = _time_on_cuda(job, call, first_ns, columns, nulls)
    columns["telemetry"], columns["throttle"] = bench.telemetry()
    columns["peak_bytes"] = _peak_bytes(call)
    columns["host_ns"] = _host_ns(job)
    return samples


def _time_on_cuda(
    job: Job, call: timing.Call, first_ns: int, columns: dict[str, Any], nulls: dict[str, str]
) -> list[float]:
    bench, limits = job.bench, job.bench.session.limits
    launches = _launches(job, call, first_ns)
    columns["launches"] = launches
    if launches is None or launches > timing.MAX_LAUNCHES:
        nulls["time_ns"] = (
            f"more than {timing.MAX_LAUNCHES} launches a call: wall time stands alone"
        )
        return []
    try:
        if bench.session.timer == "profiler":
            timed = timing.time_with_profiler(call, bench.evictor, _budget(limits))
        else:
            assert bench.timer is not None
            timed = timing.time_with_events(call, bench.timer, _budget(limits))
    except timing.CannotHold:
        nulls["time_ns"] = "the call synchronises or fills the launch queue: wall time stands alone"
        return []
    _keep(timed, columns)
    return timed.samples_ns


def _budget(limits: Limits) -> timing.Budget:
    """Three calls as long as the longest that is tried at all are always given their time."""
    at_most_s = max(limits.sample_s, timing.MIN_OK_SAMPLES * limits.call_s)
    return timing.Budget(limits.sample_s, at_most_s)


def _keep(timed: timing.Timed, columns: dict[str, Any]) -> None:
    if len(timed.samples_ns) < timing.MIN_OK_SAMPLES:
        raise Finished(
            "timeout",
            f"only {len(timed.samples_ns)} of the {timing.MIN_OK_SAMPLES} samples wanted came "
            "before the time limit",
        )
    columns["time_ns"] = summarise(timed.samples_ns)


def _launches(job: Job, call: timing.Call, first_ns: int) -> int | None:
    """Launches of one call, or None if a short sequence already takes more than MAX_LAUNCHES."""
    if first_ns > 20e6:  # perhaps a loop over tokens: profiling it whole would take seconds
        short = _make_call(job, job.draw(tokens=min(job.tokens, 512)))
        if timing.count_launches(short) > timing.MAX_LAUNCHES:
            return None
    return timing.count_launches(call)


def _peak_bytes(call: timing.Call) -> int:
    """Peak of allocated memory during a call, beyond what was live before it (the inputs)."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before)


def _host_ns(job: Job) -> int:
    known = job.bench.host_ns
    if job.series not in known:
        call = _make_call(job, job.draw(tokens=TINY_TOKENS))
        for _ in range(3):
            call()
        known[job.series] = timing.host_ns(call)
    return known[job.series]


def _refuse_impossible(job: Job, columns: dict[str, Any]) -> None:
    """A time below 0.9x of what bytes and FLOPs need did not do the work.

    Taken off the bytes: writes that L2 may still hold, and, warm, inputs that it may hold already.
    """
    time_ns = columns.get("time_ns")
    if time_ns is None or not job.bench.cuda:
        return
    case, op = job.case, job.op
    itemsize = DTYPES[case.dtype].itemsize
    read, written = op.compulsory_bytes(case.shape, itemsize, case.direction)
    cacheable = written if job.bench.session.l2 == "cold" else read + written
    bound = floor_ns(
        job.bench.ceilings,
        case.dtype,
        read + written - min(cacheable, job.bench.l2_bytes),
        op.flops(case.shape, case.direction),
    )
    if time_ns.median < 0.9 * bound:
        raise Finished(
            "wrong",
            f"broken measurement: {time_ns.median} ns is below 0.9x of the {bound:.0f} ns that the "
            "bytes and FLOPs need",
        )


def _first(result: Any) -> Tensor:
    """An implementation returns o, or a tuple that begins with it."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output
