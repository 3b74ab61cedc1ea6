"""Direction decode: which steps are timed, that each call takes the same ones, and how they are
judged."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from chela_bench.bench import judge, measure, models, timing
from chela_bench.bench.bounds import bounds, shortest_ns
from chela_bench.bench.cases import Case, Limits
from chela_bench.bench.job import Finished, Job
from chela_bench.bench.load import load
from chela_bench.bench.ops import OPS
from chela_bench.bench.registry import get_op
from chela_bench.bench.tuning import Tunings
from chela_bench.errors import ArgumentError
from chela_bench.kernels.long_conv_stream import square_at
from chela_bench.records import Ceilings
from chela_bench.reference.softmax_attention import softmax_attention, softmax_attention_step
from chela_bench.reference.softmax_layer import SoftmaxLayer

SHAPE = {"B": 3, "T": 300, "D": 24}


# --- the window -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [256, 1000, 1024, 4096, 12000, 16384, 65536, 1 << 18])
def test_the_window_is_a_block_that_owes_its_share_of_squares(tokens):
    start, stop = models.decode_window(tokens)
    assert stop - start == 64 and start % 64 == 0 and start > 0 and stop < tokens

    def owed(position):
        square = square_at(position, 64, tokens, tokens)
        return 0 if square is None else len(square.inputs)

    blocks = range(64, tokens, 64)
    share = sum(map(owed, blocks)) / len(blocks)
    assert 0.7 * share <= owed(stop) <= 2.2 * share
    assert all(owed(position) == 0 for position in range(start + 1, stop))


def test_at_16k_tokens_the_share_is_exact_and_the_cache_nearly_full():
    start, stop = models.decode_window(16384)
    assert (start, stop) == (16064, 16128)
    owed = [square_at(p, 64, 16384, 16384) for p in range(64, 16384, 64)]
    assert sum(len(square.inputs) for square in owed) / 256 == len(
        square_at(stop, 64, 1 << 20, 1 << 20).inputs
    )


@pytest.mark.parametrize("tokens", range(2, 260))
def test_a_short_cache_has_a_prompt_and_steps_within_it(tokens):
    start, stop = models.decode_window(tokens)
    assert 1 <= start < stop <= tokens and stop - start <= 64


def test_what_a_step_finds_on_average():
    window = models.Window(10, 14)
    assert window.tokens == sum(range(11, 15)) / 4


# --- softmax attention, token by token ------------------------------------------------------------


def layer(**options):
    torch.manual_seed(0)
    return SoftmaxLayer(24, 3, **options).double()


@torch.no_grad()
@pytest.mark.parametrize("prompt", [0, 1, 17, 40])
def test_steps_after_a_prompt_are_the_whole_layer(prompt):
    m, x = layer(), torch.randn(2, 40, 24, dtype=torch.float64)
    exact = m(x)
    cache = m.cache(x[:, :prompt], 40)
    for t in range(prompt, 40):
        torch.testing.assert_close(m.step(x[:, t], cache), exact[:, t])
    assert cache.tokens == 40


def test_a_step_of_attention_is_the_last_row():
    q, k, v = (torch.randn(2, 9, 3, n, dtype=torch.float64) for n in (4, 4, 5))
    for scale in (None, 0.3):
        o = softmax_attention_step(q[:, -1], k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        torch.testing.assert_close(o, softmax_attention(q, k, v, scale=scale)[:, -1])


@torch.no_grad()
def test_a_cache_knows_its_end():
    m, x = layer(), torch.randn(2, 5, 24, dtype=torch.float64)
    cache = m.cache(x[:, :4], 5)
    m.step(x[:, 4], cache)
    with pytest.raises(ArgumentError, match="full with 5 tokens; make one with a larger"):
        m.step(x[:, 4], cache)
    with pytest.raises(ArgumentError, match="at most max_length = 4 tokens, got 5"):
        m.cache(x, 4)
    with pytest.raises(ArgumentError, match=r"wanted q \[B, H, K\], k \[B, H, L, K\]"):
        softmax_attention_step(x[:, :, :4], x[:, None], x[:, None])


# --- a call ---------------------------------------------------------------------------------------

DECODERS = [(op, impl) for op in OPS for impl in op.impls if impl.decoder is not None]
HERE = [(op, impl) for op, impl in DECODERS if "cpu" in impl.devices]


def test_who_decodes_has_a_decoder_and_the_op_a_step():
    decoding = [(op, impl) for op in OPS for impl in op.impls if "decode" in impl.directions]
    assert decoding == DECODERS
    assert {op.name for op in OPS if op.decodes} == {op.name for op, _ in DECODERS}
    assert {op.name for op, _ in DECODERS} == {"chela_layer", "softmax_layer"}
    for op in OPS:
        if op.decodes:
            assert sum(op.compulsory_bytes({**SHAPE, "K": 8, "V": 48}, 2, "decode")) > 0


def job_of(op, impl, dtype="fp32", T=300, **replaced):
    shape = {"B": 3, "T": T, "D": 24} | {dim: 8 for dim in ("K", "V") if dim in op.dims}
    case = Case(op=op.name, impl=impl.name, direction="decode", dtype=dtype, shape=shape)
    bench = SimpleNamespace(
        session=SimpleNamespace(inputs="randn", seed=0, limits=Limits(sample_s=0.05)),
        device=torch.device("cpu"),
        cuda=False,
        announce=lambda phase: None,
        spending=lambda activity: contextlib.nullcontext(),
        tunings=Tunings(),
        seconds_at={},
    )
    impl = replace(impl, **replaced)
    return Job(bench, case, op, impl, load(impl.target))


def softmax_job(decoder=None, **options):
    op = get_op("softmax_layer")
    replaced = {} if decoder is None else {"decoder": f"{__name__}:{decoder}"}
    return job_of(op, op.impl("reference"), **options, **replaced)


@pytest.mark.parametrize(("op", "impl"), HERE, ids=[f"{o.name}/{i.name}" for o, i in HERE])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_decoder_passes_before_and_after(op, impl, dtype):
    job, columns = job_of(op, impl, dtype), {}
    inputs = job.draw()
    judge.judge_first(job, inputs, columns)
    call = job.call(inputs)
    again = [torch.stack(call()) for _ in range(2)]
    assert torch.equal(*again)  # each call is the same steps
    judge.judge_again(job, inputs, call, columns)
    assert 0 < columns["error_rel"] <= columns["error_budget"]
    assert columns["errors"].keys() == {"o"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in Triton's interpreter")
@pytest.mark.parametrize(("impl", "direction"), [("chela", "decode"), ("chela_merged", "fwd")])
def test_the_kernels_layer_passes_as_the_bench_calls_it(impl, direction):
    op = get_op("chela_layer")
    job, columns = job_of(op, op.impl(impl), T=20), {}
    job.case = job.case.model_copy(update={"direction": direction})
    inputs = job.draw()
    judge.judge_first(job, inputs, columns)
    call = job.call(inputs)
    assert all(torch.equal(one, other) for one, other in zip(call(), call(), strict=True))
    judge.judge_again(job, inputs, call, columns)
    assert 0 < columns["error_rel"] <= columns["error_budget"]


def test_a_call_is_as_many_steps_as_the_window_has():
    job = softmax_job()
    call = job.call(job.draw())
    window = models.decode_window(300)
    assert call.count == len(call()) == window.stop - window.start
    assert call._begin.tokens == window.start  # untouched
    assert call._cache.tokens == window.stop
    assert call._cache.k.shape[2] == 300


def test_the_oracle_is_the_whole_layer_at_these_positions():
    job = softmax_job()
    inputs = job.draw().to(torch.float64)
    function = load(job.op.oracle)
    window = models.decode_window(300)
    whole = function(*inputs.arguments(inputs.tensors))[:, window.start : window.stop]
    [exact] = judge._oracle(job, inputs)
    torch.testing.assert_close(exact, whole)


def decoder_of(x, max_length, parameters, spoil):
    from chela_bench.bench.adapters import softmax_decoder

    step, cache = softmax_decoder(x, max_length, parameters)
    return lambda token, cache: spoil(step, token, cache), cache


def never_writes(x, max_length, parameters):
    """Its cache stays as the prompt left it."""

    def spoil(step, token, cache):
        y = step(token, cache)
        cache.tokens -= 1
        return y

    return decoder_of(x, max_length, parameters, spoil)


def reads_one_too_many(x, max_length, parameters):
    from chela_bench.bench.adapters import softmax_decoder

    def attention(q, k, v):
        return softmax_attention_step(q, *(torch.cat([u, u[:, :, :1]], 2) for u in (k, v)))

    return softmax_decoder(x, max_length, parameters, attention)


def off_in_its_last_step(x, max_length, parameters):
    def spoil(step, token, cache):
        y = step(token, cache)
        return y + 0.1 if cache.tokens == models.decode_window(max_length).stop else y

    return decoder_of(x, max_length, parameters, spoil)


def changes_its_parameters(x, max_length, parameters):
    def spoil(step, token, cache):
        parameters["w_o.bias"].add_(1)
        return step(token, cache)

    return decoder_of(x, max_length, parameters, spoil)


REMEMBERED = []


def remembers_the_first_cache(x, max_length, parameters):
    if not REMEMBERED:
        REMEMBERED.append(decoder_of(x, max_length, parameters, lambda step, *a: step(*a)))
    return REMEMBERED[0]


@pytest.mark.parametrize(
    ("decoder", "reason"),
    [
        (never_writes, "o is off by"),
        (reads_one_too_many, "o is off by"),
        (off_in_its_last_step, "o is off by"),
        (changes_its_parameters, "it changes its input w_o.bias"),
    ],
)
def test_a_decoder_that_is_wrong_is_caught(decoder, reason):
    job = softmax_job(decoder.__name__)
    with pytest.raises(Finished, match=reason) as finished:
        judge.judge_first(job, job.draw(), {})
    assert finished.value.outcome == "wrong"


def test_a_cache_of_old_numbers_is_caught_after_timing():
    REMEMBERED.clear()
    job = softmax_job("remembers_the_first_cache")
    inputs = job.draw()
    call = job.call(inputs)
    with pytest.raises(Finished, match="after timing, on fresh inputs, o is off by"):
        judge.judge_again(job, inputs, call, {})


def test_memory_that_was_never_written_is_not_read(monkeypatch):
    """The cache's room beyond its tokens may hold anything."""
    job = softmax_job("room_of_nan")
    judge.judge_first(job, job.draw(), {})


def room_of_nan(x, max_length, parameters):
    from chela_bench.bench.adapters import softmax_decoder

    step, cache = softmax_decoder(x, max_length, parameters)
    cache.k[:, :, cache.tokens :] = cache.v[:, :, cache.tokens :] = torch.nan
    return step, cache


def test_a_point_has_the_time_of_a_step(monkeypatch):
    job, columns = softmax_job(), {}
    call = job.call(job.draw())
    monkeypatch.setattr(timing, "once_ns", lambda call: 1000)
    samples = measure._time(job, call, columns, {})
    assert set(samples) == {1000}
    assert job.known_seconds == {300: pytest.approx(64 * 1e-6)}  # of a call, all its steps


def test_a_step_grows_as_its_cache_does():
    op = get_op("softmax_layer")
    assert op.impl("sdpa_flash").growth == 2.0
    assert job_of(op, op.impl("sdpa_flash")).growth == 1.0


@pytest.mark.parametrize(
    ("direction", "tokens", "reason"),
    [
        ("decode", 1, "T < 2: no token comes after another"),
        ("decode", 2, None),
        ("fwdbwd", 2, "products has no fwdbwd; it has: decode"),
    ],
)
def test_what_cannot_be_a_step_is_said(direction, tokens, reason):
    impl = get_op("softmax_layer").impl("products")
    assert impl.unavailable("cpu", direction=direction, tokens=tokens) == reason


# --- bytes ----------------------------------------------------------------------------------------

PAPER = {"B": 64, "T": 16384, "D": 1024, "K": 128, "V": 2048}


def test_a_softmax_step_reads_its_cache_and_the_parameters():
    read, written = models.softmax_layer_bytes(PAPER, 2, "decode")
    cache = 2 * 64 * (models.decode_window(16384).tokens - 1) * 1024 * 2
    token = 64 * 1024 * 2
    assert read == cache + 2 * models.softmax_layer_parameters(PAPER) + token
    assert written == 3 * token
    assert models.softmax_step_hbm_bytes(PAPER, 2) == read + written
    assert cache == pytest.approx(4.3e9, rel=0.03)


def test_a_chela_step_moves_states_that_do_not_grow_but_for_squares():
    longer = {**PAPER, "T": 65536}

    def own(shape):
        return models.chela_step_hbm_bytes(shape, 2) - sum(
            models.chela_layer_bytes(shape, 2, "decode")
        )

    growth = own(longer) - own(PAPER)
    assert growth == 2 * 1024 * (64 * 36 * 4 + 8) / 2  # two sizes of square more
    states = 2 * 64 * 128 * 2048 * 4
    small = models.chela_step_hbm_bytes(PAPER, 2) - states
    assert states == pytest.approx(134e6, rel=0.01) and 0 < small < states / 2
    short = sum(models.chela_layer_bytes(PAPER, 2, "decode"))
    assert (
        short < models.chela_step_hbm_bytes(PAPER, 2) < models.softmax_step_hbm_bytes(PAPER, 2) / 20
    )


def test_the_floor_of_a_step():
    ceilings = Ceilings(copy_gb_per_s=1000, matmul_tflop_per_s={"bf16": 1e9})
    case = Case(op="softmax_layer", impl="x", direction="decode", dtype="bf16",
                shape={"B": 64, "T": 16384, "D": 1024})  # fmt: skip
    moved = models.softmax_step_hbm_bytes(PAPER, 2)
    columns = bounds(ceilings, case)
    assert columns["floor_ns"] == round(moved / 1000) and columns["compulsory_bytes"] == moved
    assert columns["flops"] == models.softmax_layer_flops(PAPER, "decode")
    for cold in (True, False):  # the step before may have left what it read
        assert shortest_ns(ceilings, case, 10**9, cold=cold) == pytest.approx((moved - 1e9) / 1000)


# --- time -----------------------------------------------------------------------------------------


def counted(count=4):
    log = []
    steps = timing.Steps(lambda: log.append("rewind"), lambda: log.append("step"), count)
    return steps, log


@pytest.fixture
def ticking(monkeypatch):
    """A clock that steps move by 8 us each, and rewinding by a second."""
    now = [0]

    def tick(duration):
        now[0] += duration

    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0] / 1e9)
    return timing.Steps(lambda: tick(10**9), lambda: tick(8000), 4)


def test_the_time_of_steps_is_one_steps_without_the_way_back(ticking):
    assert timing.once_ns(ticking) == 8000
    assert timing.fastest_ns(ticking) == 8000
    assert timing.seconds_of(ticking) == pytest.approx(32e-6)


def test_host_time_of_steps(ticking, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert timing.host_ns(ticking, limit_s=9.0) == 8000


def test_unlike_steps_cost_their_mean(monkeypatch):
    now, costs = [0], iter([])

    def rewind():
        nonlocal costs
        costs = iter([1000, 1000, 1000, 9000])

    def step():
        now[0] += next(costs)

    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: now[0])
    assert timing.once_ns(timing.Steps(rewind, step, 4)) == 3000


def test_launches_of_steps_are_counted_from_the_same_place(monkeypatch):
    steps, log = counted()

    def spans(call):
        before = len(log)
        call()
        return [1.0] * (len(log) - before)

    monkeypatch.setattr(timing, "_kernel_spans_ns", spans)
    assert timing.count_launches(steps) == 4
    assert log == ["rewind", *["step"] * 4] * 2


def test_a_profiled_round_of_steps_is_one_call_after_one_eviction(monkeypatch):
    steps, log = counted()

    def spans(call):
        before = len(log)
        call()
        assert "rewind" not in log[before:]
        return [100.0 if entry == "evict" else 3.0 for entry in log[before:]]

    monkeypatch.setattr(timing, "_kernel_spans_ns", spans)
    budget = timing.Budget(0.0, 0.0)
    samples = timing.profiler_samples(steps, lambda: log.append("evict"), budget, launches=4)
    assert samples == [3.0]
    assert log[-6:] == ["rewind", "evict", *["step"] * 4]


def test_a_device_keeps_busy_with_whole_calls():
    steps, log = counted()
    timing.keep_busy(steps, 1_000_000)  # 4 ms a call
    assert log.count("rewind") == 7 and log.count("step") == 28


def test_steps_are_held_one_by_one_and_all_again_after_one_that_was_not(monkeypatch):
    from tests.test_timing import Device

    device, log = Device(monkeypatch), []

    def step():
        late = log.count("rewind") == 1 and log.count("step") == 2
        log.append("step")
        device.now_ns += 900_000 if late else 10_000  # of host time: longer than the first hold
        device.launch(50_000)

    steps = timing.Steps(lambda: log.append("rewind"), step, 4)
    timer = timing.EventTimer(l2_bytes=0, cold=False)
    assert timer.sample(steps) == 50_000
    assert log == ["rewind", *["step"] * 3, "rewind", *["step"] * 4]
