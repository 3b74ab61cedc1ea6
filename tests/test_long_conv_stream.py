"""LongConvDecoder against the whole convolution; its plan of tiles by counting."""

import math

import pytest
import torch

from chela_bench.bench.check import worst_block_error
from chela_bench.errors import ArgumentError
from chela_bench.kernels import long_conv_stream
from chela_bench.kernels.long_conv_stream import LongConvDecoder, span, square_at, tiles
from chela_bench.reference.short_long_conv import long_conv
from tests.attention import DEVICE, EPS

ERROR = 2e-6  # of float32 FFTs and sums, relative to the row's rms; 4e-7 was seen
SHAPES = [  # B, T, D, T_long, max_length, block
    (1, 1, 1, 1, 1, 64),
    (2, 63, 3, 63, 64, 64),
    (1, 64, 5, 100, 64, 64),
    (3, 65, 7, 65, 70, 64),
    (2, 100, 3, 100, 101, 16),
    (1, 100, 2, 40, 512, 16),  # squares are as large as the taps ask
    (1, 40, 2, 17, 40, 16),
    (1, 40, 2, 5, 40, 32),  # shorter than a block
    (1, 20, 2, 1, 64, 16),
    (1, 200, 3, 500, 300, 64),
]
shapes = pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: "B{}-T{}-D{}-L{}-N{}-block{}".format(*s)
)


def inputs(B, T, D, T_long, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T + D)
    x = torch.randn(B, T, D, generator=generator)
    kernel = torch.randn(D, T_long, generator=generator)
    return x.to(DEVICE, dtype), kernel.to(DEVICE)


def exact_of(x, kernel):
    return long_conv(x.double(), kernel.double())


def steps(decoder, x):
    z = torch.empty_like(x)
    for t in range(x.shape[1]):
        z[:, t] = decoder.step(x[:, t])
    return z


def error(z, exact):
    return worst_block_error(z, exact, row_rms=True)


def assert_near(x, y):
    """Values of up to about 30, of which batches of other sizes may be transformed otherwise."""
    torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


def rounding(dtype):
    """The interpreter truncates to bfloat16."""
    truncated = dtype == torch.bfloat16 and DEVICE == "cpu"
    return ERROR + (0 if dtype == torch.float32 else EPS[dtype] * (1 + truncated))


@shapes
def test_steps_are_the_whole_convolution(shape):
    B, T, D, T_long, N, block = shape
    x, kernel = inputs(B, T, D, T_long)
    decoder = LongConvDecoder(kernel, B, max_length=N, block=block)
    z = steps(decoder, x)
    assert z.dtype == x.dtype and decoder.position == T
    assert error(z, exact_of(x, kernel)) <= ERROR


@shapes
def test_a_prompt_and_then_steps(shape):
    B, T, D, T_long, N, block = shape
    x, kernel = inputs(B, T, D, T_long)
    decoder = LongConvDecoder(kernel, B, max_length=N, block=block)
    prompt = T - min(T // 2, 10)
    z = torch.cat([decoder.prefill(x[:, :prompt]), steps(decoder, x[:, prompt:])], dim=1)
    assert error(z, exact_of(x, kernel)) <= ERROR


@pytest.mark.parametrize(
    ("T_long", "pieces"),
    [
        (5000, [5000]),
        (5000, [16, 4976, 8]),
        (5000, [1, 0, 14, 1, 3, 957, 4024]),
        (100, [1280, 1284, 2436]),
    ],
    ids=str,
)
def test_a_prompt_in_pieces(T_long, pieces):
    x, kernel = inputs(2, 5000, 3, T_long)
    decoder = LongConvDecoder(kernel, 2, max_length=5000, block=16)
    z = torch.cat([decoder.prefill(piece) for piece in x.split(pieces, dim=1)], dim=1)
    assert decoder.position == 5000
    assert error(z, exact_of(x, kernel)) <= ERROR


def test_steps_through_a_large_square():
    x, kernel = inputs(2, 4200, 3, 4200)
    decoder = LongConvDecoder(kernel, 2, max_length=4200, block=16)
    parts = x.split([4094, 4, 94, 8], dim=1)  # it is due in the second
    takes = [LongConvDecoder.prefill, steps, LongConvDecoder.prefill, steps]
    z = torch.cat([take(decoder, part) for take, part in zip(takes, parts, strict=True)], dim=1)
    assert error(z, exact_of(x, kernel)) <= ERROR


def test_parts_of_a_batch_are_the_whole(monkeypatch):
    x, kernel = inputs(3, 80, 3, 80)
    whole, parts = (LongConvDecoder(kernel, 3, max_length=80, block=16) for _ in range(2))
    z = [whole.prefill(x[:, :64]), steps(whole, x[:, 64:])]
    monkeypatch.setattr(long_conv_stream, "TOGETHER", 2 * 3 * 64)  # 2 and 1 in most, 1 in some
    assert_near(parts.prefill(x[:, :64]), z[0])
    assert_near(steps(parts, x[:, 64:]), z[1])


def test_steps_and_prompts_leave_the_same_state():
    x, kernel = inputs(1, 70, 2, 128)
    one, other = (LongConvDecoder(kernel, 1, max_length=128, block=16) for _ in range(2))
    for start, end in [(0, 20), (20, 21), (21, 64), (64, 70)]:
        steps(one, x[:, start:end])
        other.prefill(x[:, start:end])
        assert one.position == other.position == end
        assert torch.equal(one._state[..., :end], x[:, :end].mT)
        assert_near(one._state, other._state)


def test_tokens_without_their_outputs_leave_the_same_state():
    x, kernel = inputs(2, 200, 3, 200)
    one, other = (LongConvDecoder(kernel, 2, max_length=200, block=16) for _ in range(2))
    for start, end in [(0, 0), (0, 112), (112, 113), (113, 170)]:
        one.prefill(x[:, start:end])
        assert other.append(x[:, start:end].mT.contiguous().mT) is None
        assert one.position == other.position == end
        assert_near(one._state, other._state)
    assert error(steps(other, x[:, 170:]), exact_of(x, kernel)[:, 170:]) <= ERROR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_round_once(dtype):
    x, kernel = inputs(2, 80, 5, 80, dtype)
    kernel = kernel.to(dtype)
    decoder = LongConvDecoder(kernel, 2, max_length=80, block=16)
    z = torch.cat([decoder.prefill(x[:, :52]), steps(decoder, x[:, 52:])], dim=1)
    assert z.dtype == dtype
    assert error(z, exact_of(x, kernel)) <= rounding(dtype)
    decoder.reset()  # the state is float32: a call may have another dtype
    assert decoder.step(x[:, 0].float()).dtype == torch.float32


def test_the_first_block_is_summed_not_transformed():
    """Exact where its terms are: a FFT would spread the error of the largest."""
    kernel = torch.zeros(1, 32, device=DEVICE)
    kernel[0, 0], kernel[0, 31] = 1.0, 1e8
    x = torch.arange(1.0, 17.0, device=DEVICE)[None, :, None]
    for first in (steps, LongConvDecoder.prefill):
        decoder = LongConvDecoder(kernel, 1, max_length=32, block=16)
        assert torch.equal(first(decoder, x), x)


def test_the_first_tap_adds_no_error_to_later_outputs():
    x, kernel = inputs(1, 32, 3, 32)
    x[:, 16:] = 0  # so the last outputs are the first square's
    decoder = LongConvDecoder(kernel, 1, max_length=32, block=16)
    z = steps(decoder, x)
    kernel[:, 0] = 1e6
    decoder = LongConvDecoder(kernel, 1, max_length=32, block=16)
    assert torch.equal(steps(decoder, x)[:, 16:], z[:, 16:])


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_nan_stays_in_its_row_and_after_its_token(bad):
    x, kernel = inputs(3, 40, 3, 40)
    good, spoilt = (LongConvDecoder(kernel, 3, max_length=40, block=16) for _ in range(2))
    z = steps(good, x)
    y = x.clone()
    y[1, 20, 2] = bad
    w = steps(spoilt, y)
    assert not w[1, 20:, 2].isfinite().any()
    assert torch.equal(w[1, :20], z[1, :20])
    w[1, 20:, 2] = z[1, 20:, 2]
    assert torch.equal(w, z)
    spoilt.reset()
    assert torch.equal(steps(spoilt, x), z)


def test_nan_in_a_prompt_stays_in_its_row():
    x, kernel = inputs(2, 200, 3, 200)
    good, spoilt = (LongConvDecoder(kernel, 2, max_length=200, block=16) for _ in range(2))
    y = x.clone()
    y[0, 140, 1] = math.nan  # in the span of 128 .. 191
    z, w = good.prefill(x), spoilt.prefill(y)
    assert w[0, 140:, 1].isnan().all()
    assert torch.equal(w[0, :128, 1], z[0, :128, 1])
    w[0, :, 1] = z[0, :, 1]
    assert torch.equal(w, z)


def test_rows_of_a_batch_do_not_meet():
    x, kernel = inputs(3, 50, 3, 50)
    together = LongConvDecoder(kernel, 3, max_length=50, block=16)
    alone = LongConvDecoder(kernel, 1, max_length=50, block=16)
    assert_near(steps(together, x)[2:], steps(alone, x[2:]))


def test_any_strides():
    x, kernel = inputs(2, 50, 6, 50)
    z = exact_of(x, kernel)
    decoder = LongConvDecoder(kernel.T.contiguous().T, 2, max_length=50, block=16)
    y = x.mT.contiguous().mT  # channels are strided
    w = torch.cat([decoder.prefill(y[:, :40]), steps(decoder, y[:, 40:])], dim=1)
    assert error(w, z) <= ERROR
    decoder = LongConvDecoder(kernel[::2], 2, max_length=50, block=16)
    assert error(decoder.prefill(x[..., ::2]), z[..., ::2]) <= ERROR


def test_the_state_stays_where_it_is_and_is_as_large_as_stated():
    B, D, N, block, L = 2, 3, 200, 16, 70
    x, kernel = inputs(B, N, D, L)
    decoder = LongConvDecoder(kernel, B, max_length=N, block=block)
    squares = [16, 32, 64, 128]  # 128 is the first of 69 or more
    stated = 4 * B * D * N + 4 * D * L + 8 * D * sum(size + 1 for size in squares)
    address = decoder._state.data_ptr()
    before = kernel.clone()
    kernel.zero_()  # it has a copy
    z = torch.cat([steps(decoder, x[:, :20]), decoder.prefill(x[:, 20:])], dim=1)
    assert error(z, exact_of(x, before)) <= ERROR
    assert decoder.state_bytes == stated
    assert decoder._state.data_ptr() == address


def test_modes_of_inference_mix():
    x, kernel = inputs(1, 40, 3, 40)
    with torch.inference_mode():
        decoder = LongConvDecoder(kernel * 1, 1, max_length=40, block=16)
        first = decoder.prefill(x[:, :20])
    weight = x.clone().requires_grad_()
    with torch.no_grad():
        second = torch.cat(
            [decoder.prefill(weight[:, 20:39]), decoder.step(weight[:, 39])[None]], 1
        )
    assert not second.requires_grad
    z = exact_of(x, kernel)
    assert error(torch.cat([first, second], dim=1), z) <= ERROR


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 128, 300])
@pytest.mark.parametrize("taps", [None, 1, 2, 16, 17, 18, 50, 300])
def test_tiles_cover_each_pair_once(T, block, taps):
    reach = T if taps is None else taps
    count = torch.zeros(T, T, dtype=torch.int64)  # output, input
    there, ready = 0, 0
    for tile in tiles(T, block, taps):
        outputs, sources = tile.outputs, tile.inputs
        count[outputs.start : outputs.stop, sources.start : sources.stop] += 1
        if tile.fft_length == 0:  # one token comes, and everything of its output is there
            there += 1
            assert sources.stop == there
            ready = outputs[-1]
            assert count[ready, max(0, ready + 1 - reach) : ready + 1].eq(1).all()
        else:
            assert sources.stop == there and outputs.start > ready  # no input or sum is early
            assert tile.fft_length >= len(sources) + len(outputs)
        distances = [outputs.start - sources[-1], outputs[-1] - sources.start]
        assert tile.taps == range(max(0, distances[0]), distances[1] + 1)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    within = (distance >= 0) & (distance < reach)
    assert count[within].eq(1).all()
    assert count[distance < 0].eq(0).all() and count.le(1).all()


@pytest.mark.parametrize("block", [16, 32])
def test_spans_keep_the_squares_of_steps(block):
    """Every square that a span skips ends within it, and none reaches over its start."""
    N = 700
    for start in range(0, N, 7):
        for tokens in range(1, N - start, 13):
            size = span(start, tokens, block)
            assert 1 <= size <= tokens
            end = start + size
            for position in range(start + 1, end):
                square = square_at(position, block, N, N)
                if square is not None:
                    assert start <= square.inputs.start and square.outputs.stop <= end


def work(plan):
    """Multiply-adds of strips and, of both transforms a square, n log2 n each."""
    return sum(
        2 * tile.fft_length * math.log2(tile.fft_length) if tile.fft_length else len(tile.inputs)
        for tile in plan
    )


def test_work_grows_like_t_log2_t():
    sizes = [2**k for k in range(9, 15)]
    for T in sizes:  # mean strip; 2 log2(2 U) for U = 16, 32, ..., T / 2
        assert work(tiles(T, 16)) / T == 8.5 + sum(2 * k for k in range(5, T.bit_length()))
        assert work(tiles(T, 16)) / T < 8.5 + math.log2(T) ** 2 + math.log2(T)
    limited = [work(tiles(T, 16, 100)) / T for T in sizes]
    assert limited[-1] == pytest.approx(limited[0], rel=0.3)  # no more for a longer sequence


def test_steps_and_prompts_compute_what_is_planned(monkeypatch):
    lengths = []
    inverse = torch.fft.irfft

    def counting(values, n):
        lengths.append(n)
        return inverse(values, n=n)

    monkeypatch.setattr(torch.fft, "irfft", counting)
    x, kernel = inputs(1, 88, 2, 88)
    decoder = LongConvDecoder(kernel, 1, max_length=88, block=16)
    steps(decoder, x)
    assert lengths == [tile.fft_length for tile in tiles(88, 16) if tile.fft_length]
    lengths.clear()
    decoder.reset()
    decoder.prefill(x)  # 64 tokens and their square; a block, summed, and its square; 8
    assert lengths == [128, 128, 32]


def test_what_does_not_fit_changes_nothing():
    x, kernel = inputs(2, 20, 3, 20)
    decoder = LongConvDecoder(kernel, 2, max_length=18, block=16)
    decoder.prefill(x[:, :17])
    state = decoder._state.clone()
    for match, bad in {
        r"wanted x \[B, D\] = \[2, 3\], got \[2, 4\]": lambda: decoder.step(x.new_ones(2, 4)),
        r"got \[1, 3\]": lambda: decoder.step(x[:1, 0]),
        r"got \[2, 20, 3\]": lambda: decoder.step(x),
        r"wanted x \[B, T, D\] = \[2, 1, 3\], got \[2, 3\]": lambda: decoder.prefill(x[:, 0]),
        r"\[2, 1, 3\], got \[3, 1, 3\]": lambda: decoder.prefill(x.new_ones(3, 1, 3)),
        "got torch.float64": lambda: decoder.step(x[:, 0].double()),
        "as the kernel, got meta": lambda: decoder.step(x[:, 0].to("meta")),
        "no gradient": lambda: decoder.step(x[:, 0].clone().requires_grad_()),
        "at most max_length = 18 tokens, got 2 more after 17": lambda: decoder.prefill(x[:, 18:]),
        "tokens, got 3 more after 17": lambda: decoder.append(x[:, 17:]),
    }.items():
        with pytest.raises(ArgumentError, match=match):
            bad()
    assert decoder.position == 17 and torch.equal(decoder._state, state)
    decoder.step(x[:, 17])
    with pytest.raises(ArgumentError, match="got 1 more after 18"):
        decoder.step(x[:, 18])
    assert decoder.prefill(x[:, :0]).shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("match", "kernel", "batch", "options"),
    [
        (r"wanted kernel \[D, T_long\].*got \[3\]", torch.ones(3), 1, {}),
        (r"got \[3, 0\]", torch.ones(3, 0), 1, {}),
        ("got torch.int64", torch.ones(3, 2, dtype=torch.int64), 1, {}),
        ("batch >= 1.*got 0 and 8", torch.ones(3, 2), 0, {}),
        ("max_length >= 1, got 1 and 0", torch.ones(3, 2), 1, {"max_length": 0}),
        ("no block 48; it is one of 16, 32", torch.ones(3, 2), 1, {"block": 48}),
    ],
)
def test_rejects_decoders_that_cannot_be(match, kernel, batch, options):
    with pytest.raises(ArgumentError, match=match):
        LongConvDecoder(kernel.to(DEVICE), batch, **{"max_length": 8, **options})


def test_without_a_gpu_or_the_interpreter_it_says_so(monkeypatch):
    monkeypatch.setattr(long_conv_stream._strip, "interpreted", False)
    with pytest.raises(ArgumentError, match="decoding needs a GPU: wanted kernel on one, got cpu"):
        LongConvDecoder(torch.ones(2, 2), 1, max_length=4)
