"""The timing engine: one call, many samples, no launch cost inside.

CUDA, timer "event": evict L2 by reading twice its size, hold the stream with a spin kernel while
the host enqueues event, call, event; after enqueueing, the first event must still be pending, or
the hold was too short, the sample is thrown away and the hold made longer. What stands between the
events is then kernel time alone. Timer "profiler": the profiler's sum of kernel spans.
CPU: wall time of the call.

A call is a function without arguments, or Steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from chela_bench.bench import stats

Call = Callable[[], object]

MAX_LAUNCHES = 500  # above it a call does not fit the launch queue: kernel time is null
MIN_OK_SAMPLES = 3  # fewer are a timeout, not a time
PROFILED_CALLS = 10
_ROUNDS_TRIED = 3  # on an H100 a round in a hundred lacked some of its launches (2026-11-25)
_FIRST_HOLD_NS = 200_000
_LONGEST_HOLD_NS = 100_000_000


@dataclass
class Steps:
    """A call of `count` steps one after another, each of which changes what the next one finds.

    Every time of it is a step's, the mean over all of them: of unlike steps, what a step costs in
    the long run. `rewind` goes back to where the first one begins, and is in no time.
    """

    rewind: Call
    step: Callable[[], Any]
    count: int

    def __call__(self) -> list[Any]:
        self.rewind()
        return self.run()

    def run(self) -> list[Any]:
        return [self.step() for _ in range(self.count)]


def steps_of(call: Call) -> Steps:
    """The call itself, or as the only step that there is."""
    return call if isinstance(call, Steps) else Steps(_nothing, call, 1)


def _nothing() -> None: ...


class NoKernelTime(Exception):
    """The call cannot be timed alone on the device; the message says why."""


@dataclass(frozen=True)
class Budget:
    """Wall time to spend on samples: `samples_s`, and more only for the first MIN_OK_SAMPLES, as
    long as they take less than `at_most_s`."""

    samples_s: float
    at_most_s: float

    def spent(self, samples: int, elapsed_s: float) -> bool:
        limit_s = self.samples_s if samples >= MIN_OK_SAMPLES else self.at_most_s
        return samples > 0 and elapsed_s >= limit_s


class EventTimer:
    """Kernel time of single calls on the current CUDA stream, event to event."""

    def __init__(self, *, l2_bytes: int, cold: bool) -> None:
        self._evictor = L2Evictor(l2_bytes) if cold else None
        self._cycles_per_ns = _spin_cycles_per_ns()
        self._hold_ns = _FIRST_HOLD_NS

    def restart(self) -> None:
        """Another call begins: forget how long the last one had to be held."""
        self._hold_ns = _FIRST_HOLD_NS

    def sample(self, call: Call) -> float:
        """Nanoseconds of one call. Raises NoKernelTime if the host cannot run ahead.

        Steps are held one by one, since all of them need not fit the launch queue.
        """
        steps = steps_of(call)
        while True:
            steps.rewind()
            torch.cuda.synchronize()
            if self._evictor is not None:
                self._evictor()
            total_ns = 0.0
            for done in range(1, steps.count + 1):
                step_ns = self._held(steps.step)
                if step_ns is None:
                    break
                total_ns += step_ns
                if done == steps.count:
                    return total_ns / steps.count

    def _held(self, step: Call) -> float | None:
        """Nanoseconds of the step; None if it was not held, and then the next is held longer."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(self._hold_ns * self._cycles_per_ns))
        start.record()
        begin_ns = time.perf_counter_ns()
        step()
        host_ns = time.perf_counter_ns() - begin_ns
        end.record()
        held = not start.query()
        end.synchronize()
        if held:
            return float(start.elapsed_time(end)) * 1e6
        if self._hold_ns >= _LONGEST_HOLD_NS:
            raise NoKernelTime("the call synchronises or fills the launch queue")
        # At once to what the host took: every sample thrown away costs a whole call.
        self._hold_ns = min(2 * max(self._hold_ns, host_ns), _LONGEST_HOLD_NS)
        return None


class L2Evictor:
    """Reads twice the L2's size: lines read can be dropped, lines written would be written back."""

    def __init__(self, l2_bytes: int) -> None:
        self._buffer = torch.zeros(max(2 * l2_bytes, 4) // 4, dtype=torch.float32, device="cuda")
        self._out = torch.empty((), dtype=torch.float32, device="cuda")

    def __call__(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._out)


def event_samples(call: Call, timer: EventTimer, budget: Budget) -> list[float]:
    """Nanoseconds per call until the median is settled, or the budget is spent."""
    timer.restart()
    return _until_settled(lambda: [timer.sample(call)], budget)


def profiler_samples(
    call: Call, evictor: L2Evictor | None, budget: Budget, *, launches: int
) -> list[float]:
    """Sum of kernel spans of each of ten back-to-back calls a round (no host time, no gaps).

    `launches` are those of a call; Steps, whose rewinding launches too, are one call a round.
    """
    steps = steps_of(call)
    count = PROFILED_CALLS if steps.count == 1 else 1
    stride = launches + (count_launches(evictor) if evictor is not None else 0)

    def calls() -> None:
        for _ in range(count):
            if evictor is not None:
                evictor()
            steps.run()

    def one_round() -> list[float]:
        for _ in range(_ROUNDS_TRIED):
            steps.rewind()
            spans = _kernel_spans_ns(calls)
            if len(spans) == count * stride:
                ends = range(stride, len(spans) + 1, stride)
                return [sum(spans[end - launches : end]) / steps.count for end in ends]
        raise NoKernelTime("the number of launches varies from call to call")

    return _until_settled(one_round, budget)


def wall_samples(call: Call, budget: Budget) -> list[float]:
    """Wall time of single calls from launch to synchronised end."""
    return _until_settled(lambda: [float(once_ns(call))], budget)


def keep_busy(call: Call, call_ns: int, *, for_ns: int = 30_000_000) -> None:
    """Enqueues calls for about `for_ns` and returns while the device is at work on them."""
    call_ns *= steps_of(call).count
    for _ in range(max(1, min(for_ns // max(call_ns, 1), MAX_LAUNCHES // 4))):
        call()


def repeat(call: Call, call_ns: int, *, for_s: float, at_once_ns: int = 50_000_000) -> int:
    """Calls in a row for at least `for_s`, the device idle before and after; returns how many.

    They are launched in stretches of about `at_once_ns`, so that no queue grows without end.
    """
    at_once = max(1, min(at_once_ns // max(call_ns, 1), 10_000))
    done = 0
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while time.perf_counter() - begin < for_s:
        for _ in range(at_once):
            call()
        torch.cuda.synchronize()
        done += at_once
    return done


def host_ns(call: Call, *, calls: int = 20, rounds: int = 10, limit_s: float = 0.5) -> int:
    """Host time per call: `calls` in a row without synchronising, median over rounds (CUDA).

    Meant for a tiny shape, where the device keeps up and the launch queue never fills.
    """
    samples: list[float] = []
    steps = steps_of(call)
    calls = calls if steps.count == 1 else 1
    begin = time.perf_counter()
    while not samples or (len(samples) < rounds and time.perf_counter() - begin < limit_s):
        steps.rewind()
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(calls):
            steps.run()
        samples.append((time.perf_counter_ns() - start) / calls / steps.count)
    torch.cuda.synchronize()
    return max(1, round(stats.median(samples)))


def once_ns(call: Call) -> int:
    """Wall time of one call, device work included."""
    steps = steps_of(call)
    steps.rewind()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    begin = time.perf_counter_ns()
    steps.run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return round((time.perf_counter_ns() - begin) / steps.count)


def fastest_ns(call: Call, *, most: int = 3, limit_ns: int = 50_000_000) -> int:
    """Wall time of the fastest of a few calls: an estimate that one hiccup does not spoil."""
    samples, count = [once_ns(call)], steps_of(call).count
    while len(samples) < most and sum(samples) * count < limit_ns:
        samples.append(once_ns(call))
    return min(samples)


def seconds_of(call: Call) -> float:
    """Wall time of a whole call, of all Steps, by the fastest of a few."""
    return fastest_ns(call) * steps_of(call).count / 1e9


def count_launches(call: Call) -> int:
    """Device activities (kernels, copies, fills) of one call: the profiler may lose some, so the
    larger of two counts. Of Steps, all of theirs."""
    steps = steps_of(call)
    counts = []
    for _ in range(2):
        steps.rewind()
        counts.append(len(_kernel_spans_ns(steps.run)))
    return max(counts)


def _kernel_spans_ns(call: Call) -> list[float]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    events = [
        event
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.time_range.end - event.time_range.start) * 1e3 for event in events]


def _until_settled(take: Callable[[], list[float]], budget: Budget) -> list[float]:
    samples: list[float] = []
    begin = time.perf_counter()
    next_look = stats.MIN_SAMPLES
    while not budget.spent(len(samples), time.perf_counter() - begin):
        samples += take()
        if len(samples) >= next_look:
            if stats.settled(samples):
                break
            next_look = len(samples) + 1 + len(samples) // 10  # each look sorts all samples
    return samples


def _spin_cycles_per_ns() -> float:
    """Calibrates torch.cuda._sleep; a rough figure is enough, since every hold is checked."""
    torch.cuda._sleep(1000)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    torch.cuda._sleep(2_000_000)
    end.record()
    end.synchronize()
    return 2_000_000 / (float(start.elapsed_time(end)) * 1e6)
