"""When sampling stops, what is estimated before, and which times are too short to be true."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from chela_bench.bench import estimate, measure, timing
from chela_bench.bench.bounds import bounds, shortest_ns
from chela_bench.bench.cases import Case
from chela_bench.bench.job import Finished, Job
from chela_bench.bench.registry import get_op
from chela_bench.bench.timing import Budget
from chela_bench.bench.tuning import Tunings
from chela_bench.records import Ceilings


@pytest.mark.parametrize(
    ("samples", "elapsed_s", "spent"),
    [
        (0, 100.0, False),  # one is always taken
        (1, 2.9, False),
        (2, 2.9, False),  # the first three may take longer
        (2, 3.0, True),
        (3, 0.9, False),
        (3, 1.0, True),
    ],
)
def test_the_first_three_samples_have_more_time(samples, elapsed_s, spent):
    assert Budget(samples_s=1.0, at_most_s=3.0).spent(samples, elapsed_s) is spent


@pytest.fixture
def clock(monkeypatch):
    """A clock that only calls move: `run(durations)` is a call that takes them in turn."""
    now = 0

    def run(durations_ns):
        left = iter(durations_ns)

        def call():
            nonlocal now
            now += next(left)

        return call

    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: now)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now / 1e9)
    return run


def test_sampling_stops_when_the_median_is_settled(clock):
    assert timing.wall_samples(clock([8_000_000] * 99), Budget(9.0, 9.0)) == [8e6] * 10
    assert len(timing.wall_samples(clock([1_000_000] * 99), Budget(9.0, 9.0))) == 50  # 50 ms


def test_sampling_stops_when_the_time_is_spent(clock):
    assert len(timing.wall_samples(clock([10_000_000, 20_000_000] * 99), Budget(0.3, 0.9))) == 20
    assert len(timing.wall_samples(clock([400_000_000] * 9), Budget(0.3, 0.9))) == 3
    assert len(timing.wall_samples(clock([500_000_000] * 9), Budget(0.3, 0.9))) == 2


def test_the_fastest_of_three_calls_and_of_one_that_is_long(clock):
    assert timing.fastest_ns(clock([9_000, 4_000, 5_000, 1])) == 4_000
    assert timing.fastest_ns(clock([60_000_000, 1])) == 60_000_000


@pytest.mark.parametrize(("call_ns", "calls"), [(10_000_000, 3), (10**10, 1), (0, 125), (1, 125)])
def test_keeping_busy_never_fills_the_launch_queue(call_ns, calls):
    made = []
    timing.keep_busy(lambda: made.append(1), call_ns)
    assert len(made) == calls


def _job(known, *, tokens, growth=1.0, limit_s=1.0, seconds_at=None):
    """A job that knows some lengths; probing a length takes what `seconds_at` says."""
    session = SimpleNamespace(limits=SimpleNamespace(call_s=limit_s))

    @contextlib.contextmanager
    def at(tokens):
        call = seconds_at(tokens)
        call()
        yield call

    return SimpleNamespace(
        tokens=tokens,
        known_seconds=known,
        growth=growth,
        bench=SimpleNamespace(
            session=session,
            announce=lambda phase: None,
            spending=lambda activity: contextlib.nullcontext(),
        ),
        at=at,
    )


@pytest.mark.parametrize(
    ("known", "tokens", "growth", "seconds"),
    [
        ({}, 1024, 1.0, None),  # short ones simply run
        ({1024: 0.1}, 4096, 1.0, 0.4),
        ({1024: 0.1}, 4096, 2.0, 1.6),
        ({1024: 0.1, 2048: 0.3}, 4096, 1.0, 0.6),  # from the nearest
        ({1024: 0.1, 8192: 0.5}, 4096, 1.0, 0.5),  # a longer one that fits bounds it
        ({1024: 0.1, 8192: 5.0}, 4096, 1.0, 0.4),  # one that does not fit says nothing
        ({512: 0.1}, 1 << 13, 1.0, 1.6),
    ],
)
def test_a_length_is_estimated_from_those_that_ran(known, tokens, growth, seconds):
    job = _job(known, tokens=tokens, growth=growth)
    assert estimate._estimated_seconds(job, tokens) == (
        None if seconds is None else pytest.approx(seconds)
    )


def test_an_estimate_above_the_limit_is_refused(monkeypatch):
    estimate.refuse_if_too_long(_job({1024: 0.25}, tokens=4096))  # 1 s: not above it
    with pytest.raises(Finished, match=r"estimated 1\.04 s > limit 1 s"):
        estimate.refuse_if_too_long(_job({1024: 0.26}, tokens=4096))


def test_a_far_length_is_probed_in_steps_up_to_the_limit(clock):
    probed = []

    def seconds_at(tokens):
        probed.append(tokens)
        return clock([tokens * 100_000] * 9)  # 0.1 ms a token

    job = _job({}, tokens=1 << 20, seconds_at=seconds_at)
    assert estimate._estimated_seconds(job, 1 << 20) == pytest.approx(104.8, rel=1e-3)
    assert probed == [1024, 4096]  # 64k: 6.6 s by 4k, above the limit


def test_a_probe_that_runs_out_of_memory_ends_the_point_and_one_that_fails_says_nothing():
    def raising(error):
        def call(tokens):
            raise error

        return _job({}, tokens=4096, seconds_at=call)

    with pytest.raises(Finished, match="out of memory already at T = 1024") as finished:
        estimate.refuse_if_too_long(raising(MemoryError("no room")))
    assert finished.value.outcome == "oom"
    estimate.refuse_if_too_long(raising(ValueError("T must be 4096")))


CEILINGS = Ceilings(copy_gb_per_s=1000, matmul_tflop_per_s={"bf16": 1e9})  # 1 ns a kB
KB = 1 << 10


def _case(direction, T=4096):
    """bf16, K = V = 128, one head: q, k, v and o are 256 bytes a token, 1024 kB each."""
    shape = {"B": 1, "T": T, "H": 1, "K": 128, "V": 128}
    return Case(op="linear_attention", impl="x", direction=direction, dtype="bf16", shape=shape)


@pytest.mark.parametrize(
    ("direction", "cold", "l2_kb", "moved_kb"),
    [
        ("fwd", True, 0, 4 * 1024),  # q, k, v; o
        ("fwd", True, 256, 4 * 1024 - 256),  # of o, L2 holds some
        ("fwd", True, 9999, 3 * 1024),  # all of o, and no input
        ("fwd", False, 1536, 4 * 1024 - 1536),  # inputs as well
        ("fwd", False, 9999, 0),
        ("bwd", True, 9999, 4 * 1024),  # q, k, v, do
        ("fwdbwd", True, 0, 8 * 1024),  # q, k, v, do once; o, dq, dk, dv
        ("fwdbwd", True, 9999, 4 * 1024),
        ("fwdbwd", False, 9999, 0),
    ],
)
def test_shared_inputs_count_once_and_what_l2_may_hold_does_not(direction, cold, l2_kb, moved_kb):
    shortest = shortest_ns(CEILINGS, _case(direction), l2_kb * KB, cold=cold)
    flops_ns = 4 * 128 * 128 * 4096 / 1e9 / 1e3  # at 10^9 TFLOP/s: next to nothing
    assert shortest == pytest.approx(moved_kb * KB / 1000, abs=10 * flops_ns)


def test_flops_bound_what_bytes_do_not():
    ceilings = Ceilings(matmul_tflop_per_s={"bf16": 1.0})
    assert shortest_ns(ceilings, _case("fwd"), 1 << 40, cold=False) == pytest.approx(
        4 * 128 * 128 * 4096 / 1e3
    )
    assert shortest_ns(Ceilings(), _case("fwd"), 0, cold=True) == 0


def test_the_floor_is_whole_positive_and_absent_where_nothing_was_measured():
    assert bounds(CEILINGS, _case("fwd"))["floor_ns"] == round(4 * 1024 * KB / 1000)
    fast = Ceilings(copy_gb_per_s=1e6)  # 0.001 ns for one token
    assert bounds(fast, _case("fwd", T=1))["floor_ns"] == 1
    assert "floor_ns" not in bounds(Ceilings(), _case("fwd"))
    assert bounds(CEILINGS, _case("decode")) == {}


def test_a_short_probe_is_tuned_before_its_launches_are_counted(monkeypatch):
    """An autotuned kernel's first call at a length launches every candidate many times."""
    tuned, launched = set(), []

    def function(q, k, v):
        launched.append(1 if q.shape[1] in tuned else 600)
        tuned.add(q.shape[1])
        return v

    def count_launches(call):
        launched.clear()
        call()
        return sum(launched)

    monkeypatch.setattr(timing, "count_launches", count_launches)
    bench = SimpleNamespace(
        session=SimpleNamespace(inputs="randn", seed=0),
        device=torch.device("cpu"),
        announce=lambda phase: None,
        spending=lambda activity: contextlib.nullcontext(),
        tunings=Tunings(),
    )
    op = get_op("linear_attention")
    job = Job(bench, _case("fwd", T=1024), op, op.impl("chunked"), function)
    call = job.call(job.draw())
    call()
    assert measure.launches_of(job, call, measure.SLOW_NS + 1) == 1
    assert measure.SHORT_TOKENS in tuned


class Device:
    """A stream that runs behind its host, with the clock of both: what EventTimer needs of CUDA."""

    def __init__(self, monkeypatch):
        self.now_ns = self.free_at_ns = 0
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at_ns = device.free_at_ns = max(device.now_ns, device.free_at_ns)

            def query(self):
                return device.now_ns >= self.at_ns

            def synchronize(self):
                device.now_ns = max(device.now_ns, self.at_ns)

            def elapsed_time(self, end):
                return (end.at_ns - self.at_ns) / 1e6

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", self.launch)
        monkeypatch.setattr(timing, "_spin_cycles_per_ns", lambda: 1.0)
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: self.now_ns)

    def launch(self, duration_ns):
        self.free_at_ns = max(self.now_ns, self.free_at_ns) + duration_ns

    def synchronize(self):
        self.now_ns = max(self.now_ns, self.free_at_ns)


def test_a_long_call_is_thrown_away_once_until_its_hold_is_long_enough(monkeypatch):
    device = Device(monkeypatch)
    calls = []

    def call():  # 20 ms of host time, over 700 of device time
        calls.append(None)
        for _ in range(40):
            device.now_ns += 500_000
            device.launch(17_500_000)

    timer = timing.EventTimer(l2_bytes=0, cold=False)
    assert timer.sample(call) == 40 * 17.5e6
    assert len(calls) == 2
    assert timer.sample(call) == 40 * 17.5e6
    assert len(calls) == 3


def test_a_call_that_synchronises_is_given_up_soon(monkeypatch):
    device = Device(monkeypatch)
    calls = []

    def call():
        calls.append(None)
        device.launch(50_000_000)
        device.synchronize()

    with pytest.raises(timing.NoKernelTime, match="synchronises"):
        timing.EventTimer(l2_bytes=0, cold=False).sample(call)
    assert len(calls) == 2


@pytest.mark.parametrize(("lossy_rounds", "measured"), [(0, True), (2, True), (3, False)])
def test_a_round_in_which_the_profiler_loses_launches_is_tried_again(
    monkeypatch, lossy_rounds, measured
):
    rounds = iter([[1.0] * 19] * lossy_rounds + [[1.0, 2.0] * 10] * 99)
    monkeypatch.setattr(timing, "_kernel_spans_ns", lambda calls: next(rounds))
    with contextlib.nullcontext() if measured else pytest.raises(timing.NoKernelTime):
        samples = timing.profiler_samples(lambda: None, None, Budget(0.0, 0.0), launches=2)
        assert samples == [3.0] * 10


def test_a_launch_that_the_profiler_loses_once_is_counted(monkeypatch):
    counts = iter([[1.0, 2.0], [1.0, 2.0, 3.0]])
    monkeypatch.setattr(timing, "_kernel_spans_ns", lambda call: next(counts))
    assert timing.count_launches(lambda: None) == 3
