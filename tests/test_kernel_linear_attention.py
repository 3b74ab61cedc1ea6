"""kernels/linear_attention.py against the float64 reference: interpreted on the CPU, or on a GPU.

The budget of one block's relative error counts roundings, each of its largest size and none
cancelling another. EPS is half a dtype's spacing; tensor cores truncate TF32 operands, which costs
a whole one, 2^-10.

    float16    scores and output round; the state, as an operand, truncates to TF32
    bfloat16   operand (state and scores share the output between them) and output round
    float32    state and q truncate, or the scores' q and k, then the scores and v
    precise    the output rounds; products are float32's, as they are in the interpreter

Float32 sums add 1e-6; a tensor core's truncate, at worst by 2^-23 for every 8 tokens added to S.
"""

from contextlib import contextmanager

import pytest
import torch
import triton

from chela_bench.bench.check import worst_block_error
from chela_bench.errors import ArgumentError
from chela_bench.kernels import linear_attention as module
from chela_bench.kernels.linear_attention import (
    ALLOWED_CONFIG,
    default_config,
    hbm_bytes,
    linear_attention,
)
from chela_bench.reference.linear_attention import linear_attention as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TF32 = 2.0**-10
ON_GPU = {
    torch.float32: 4 * TF32,
    torch.float16: TF32 + 2 * EPS[torch.float16],
    torch.bfloat16: 2 * EPS[torch.bfloat16],
}
SHAPES = [  # B, T, H, K, V
    (1, 1, 1, 16, 16),
    (2, 5, 1, 3, 1),
    (1, 63, 3, 64, 32),
    (2, 65, 1, 60, 130),
    (1, 100, 2, 17, 40),
]
dtypes = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
both_ways = pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])


def label(shape):
    return "-".join(f"{name}{size}" for name, size in zip("BTHKV", shape, strict=True))


def budget(dtype, T, *, precise=False):
    if precise:
        return EPS[dtype] + sums(T)
    return (ON_GPU[dtype] if DEVICE == "cuda" else 2 * EPS[dtype]) + sums(T)


def sums(T):
    return 1e-6 + (T / 8 * 2.0**-23 if DEVICE == "cuda" else 0)


def inputs(B, T, H, K, V, dtype, *, N=None, mean=0.0):
    generator = torch.Generator().manual_seed(T + K)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    q, k, v = randn(B, T, H, K), randn(B, T, H, K) + mean, randn(B, T, H, V) + mean
    state = randn(B if N is None else N, H, K, V)
    return *(x.to(DEVICE, dtype) for x in (q, k, v)), state.to(DEVICE)


@contextmanager
def new_memory_is_nan():
    """torch.empty returns NaN inside: what the kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(q, k, v, *, config=None, precise=False, **options):
    """The kernel's output and state are within the budget of the float64 reference."""
    with new_memory_is_nan():
        o, final = linear_attention(q, k, v, config=config, precise=precise, **options)
    if options.get("initial_state") is not None:
        options["initial_state"] = options["initial_state"].double()
    exact, final_exact = reference(q.double(), k.double(), v.double(), **options)
    assert o.dtype == q.dtype and o.shape == v.shape
    T = q.shape[1]
    assert worst_block_error(o, exact) <= budget(q.dtype, T, precise=precise)
    if options.get("output_final_state"):  # fp32 inputs truncate to TF32, 16-bit ones are exact
        assert final.dtype == torch.float32 and final.shape == final_exact.shape
        truncated = DEVICE == "cuda" and q.dtype == torch.float32 and not precise
        assert (final - final_exact).norm() <= (2 * TF32 * truncated + sums(T)) * final_exact.norm()
    else:
        assert final is None


@dtypes
@both_ways
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("precise", [False, True], ids=["fast", "precise"])
def test_matches_reference(shape, dtype, causal, precise):
    q, k, v, state = inputs(*shape, dtype)
    check(q, k, v, causal=causal, precise=precise)
    check(
        q,
        k,
        v,
        scale=0.5,
        initial_state=state,
        output_final_state=True,
        causal=causal,
        precise=precise,
    )


CONFIGS = [
    {"BLOCK_T": 16},
    {"BLOCK_T": 128, "BLOCK_V": 16},
    {"BLOCK_V": 32, "num_warps": 2},
    {"BLOCK_T": 32, "BLOCK_V": 128, "num_warps": 8, "num_stages": 3},
]


@dtypes
@both_ways
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configs(config, dtype, causal):
    q, k, v, state = inputs(1, 70, 2, 20, 40, dtype)
    check(q, k, v, initial_state=state, output_final_state=True, causal=causal, config=config)


@dtypes
@both_ways
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_packed_sequences(dtype, causal, integer):
    lengths = [0, 1, 70, 0, 59, 0]
    q, k, v, state = inputs(1, sum(lengths), 2, 20, 24, dtype, N=len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(integer)
    check(q, k, v, cu_seqlens=cu_seqlens, causal=causal)
    check(
        q,
        k,
        v,
        cu_seqlens=cu_seqlens.to(DEVICE),
        initial_state=state,
        output_final_state=True,
        causal=causal,
    )


@dtypes
def test_strided_inputs(dtype):
    """Slices of wider tensors, heads before tokens, and a last axis that is not contiguous."""
    B, T, H, K = 2, 35, 3, 16
    qkv, _, _, _ = inputs(B, T, H, 3 * K, 1, dtype)
    check(*qkv.split(K, dim=-1))
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv.split(K, dim=-1)]
    check(*heads_first)
    check(*(x.transpose(1, 3).contiguous().transpose(1, 3) for x in qkv.split(K, dim=-1)))
    check(*(x[:1].expand(B, -1, -1, -1) for x in qkv.split(K, dim=-1)))


@dtypes
def test_pieces_with_state_handed_over_equal_one_call(dtype):
    q, k, v, state = inputs(1, 100, 2, 16, 20, dtype)
    exact, final = reference(
        q.double(), k.double(), v.double(), initial_state=state.double(), output_final_state=True
    )
    pieces = []
    for start, end in [(0, 1), (1, 64), (64, 64), (64, 100)]:
        piece = (x[:, start:end] for x in (q, k, v))
        o, state = linear_attention(*piece, initial_state=state, output_final_state=True)
        pieces.append(o)
    assert worst_block_error(torch.cat(pieces, dim=1), exact) <= budget(dtype, 100)
    assert (state - final).norm() <= budget(dtype, 100) * final.norm()


@dtypes
@pytest.mark.parametrize("t", [1, 40, 64])
def test_the_past_is_blind_to_the_future(dtype, t):
    q, k, v, _ = inputs(1, 70, 2, 16, 16, dtype)
    o, _ = linear_attention(q, k, v)
    for x in (q, k, v):
        x[:, t:] = 1 - x[:, t:]
    changed, _ = linear_attention(q, k, v)
    assert torch.equal(o[:, :t], changed[:, :t])
    assert not torch.equal(o[:, t], changed[:, t])


@dtypes
def test_a_large_state_does_not_overflow(dtype):
    """Entries of S pass float16's 65504; o, scaled, does not."""
    q, k, v, state = inputs(1, 70, 2, 16, 16, dtype)
    check(q, k, v, initial_state=state * 1e6, scale=1e-4)


@pytest.mark.parametrize("shape", [(0, 5, 1, 16, 16), (2, 0, 1, 16, 16), (2, 5, 0, 16, 16),
                                   (2, 5, 1, 16, 0)], ids=label)  # fmt: skip
def test_nothing_in_nothing_out(shape):
    q, k, v, state = inputs(*shape, torch.float32)
    o, final = linear_attention(q, k, v, initial_state=state, output_final_state=True)
    assert o.shape == v.shape
    assert final.shape == state.shape and (shape[1] > 0 or torch.equal(final, state))
    o, final = linear_attention(q, k, v, output_final_state=True)
    assert not final.any() and linear_attention(q, k, v)[1] is None


SQUARES = [(1, 300, 2, d, d) for d in (16, 64, 128, 256)]
ODD = [(2, 1, 3, 60, 130), (1, 257, 1, 100, 33), (1, 190, 2, 200, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("BLOCK_V", [32, 64, 128])
@pytest.mark.parametrize("BLOCK_T", [16, 32, 64, 128])
@dtypes
@pytest.mark.parametrize("shape", SQUARES + ODD, ids=label)
def test_every_config(shape, dtype, BLOCK_T, BLOCK_V):
    """Not the winner alone: Triton has miscompiled single configs of such kernels."""
    q, k, v, state = inputs(*shape, dtype)
    options = {"initial_state": state, "output_final_state": True}
    try:
        check(q, k, v, config={"BLOCK_T": BLOCK_T, "BLOCK_V": BLOCK_V}, **options)
    except triton.runtime.errors.OutOfResources as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("num_warps", [4, 8])
@pytest.mark.parametrize("BLOCK_V", [16, 32])
@pytest.mark.parametrize("BLOCK_T", [64, 128])
@pytest.mark.parametrize("V", [33, 64])
@dtypes
def test_narrow_slices_that_are_not_pipelined(dtype, V, BLOCK_T, BLOCK_V, num_warps):
    """Read wrong addresses with ptxas 12.8 when S was read before the scores met v."""
    q, k, v, state = inputs(1, 257, 2, 60, V, dtype)
    config = {"BLOCK_T": BLOCK_T, "BLOCK_V": BLOCK_V, "num_warps": num_warps, "num_stages": 1}
    check(q, k, v, initial_state=state, output_final_state=True, config=config)


@pytest.mark.gpu
@both_ways
@dtypes
@pytest.mark.parametrize("d", [64, 128, 256])
def test_many_coherent_tokens(d, dtype, causal):
    """k and v with mean 1, as SiLU makes them: S grows with t, and float32 sums must not drift."""
    q, k, v, _ = inputs(1, 16384, 2, d, d, dtype, mean=1.0)
    check(q, k, v, scale=d**-0.5 / 64, output_final_state=True, causal=causal)


@pytest.mark.gpu
def test_rejects_tensors_on_two_devices():
    q, k, v, _ = inputs(1, 4, 1, 16, 16, torch.float32)
    with pytest.raises(ArgumentError, match="one device"):
        linear_attention(q, k.cpu(), v)


def test_rejects_tensors_that_triton_cannot_reach(monkeypatch):
    q, k, v, _ = (x.cpu() for x in inputs(1, 4, 1, 16, 16, torch.float32))
    compiled = triton.JITFunction.__new__(triton.JITFunction)
    monkeypatch.setattr(module, "_linear_attention_fwd_kernel", compiled)
    with pytest.raises(ArgumentError, match=r"on a GPU, got cpu; .*TRITON_INTERPRET=1"):
        linear_attention(q, k, v)


def test_rejects_what_needs_a_gradient():
    q, k, v, state = inputs(1, 4, 1, 16, 16, torch.float32)
    for x in (q, v, state):
        x.requires_grad_()
        with pytest.raises(ArgumentError, match=r"forward only so far; use torch\.no_grad"):
            linear_attention(q, k, v, initial_state=state)
        with torch.no_grad():
            linear_attention(q, k, v, initial_state=state)
        x.requires_grad_(False)


def test_rejects_what_does_not_fit():
    q, k, v, state = inputs(2, 4, 1, 16, 16, torch.float32)
    wide = q.new_zeros(2, 4, 1, 257)
    for match, bad in {
        "only 'fused' exists": lambda: linear_attention(q, k, v, schedule="split"),
        r"wanted q, k \[B, T, H, K\]": lambda: linear_attention(q, k[:, :3], v),
        r"and v \[B, T, H, V\]": lambda: linear_attention(q, k, v[:, :, 0]),
        "K <= 256, got K = 257": lambda: linear_attention(wide, wide, v),
        "convert them to one": lambda: linear_attention(q, k.half(), v),
        "in one of float32": lambda: linear_attention(q.double(), k.double(), v.double()),
        "wanted initial_state": lambda: linear_attention(q, k, v, initial_state=state[:1]),
        "in float32": lambda: linear_attention(q, k, v, initial_state=state.half()),
        "no config BLOCK_T=48; allowed: BLOCK_T": lambda: linear_attention(
            q, k, v, config={"BLOCK_T": 48}
        ),
        "no config BLOCK_K=16; .*num_warps": lambda: linear_attention(
            q, k, v, config={"BLOCK_K": 16}
        ),
        "wanted B = 1": lambda: linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 4])),
    }.items():
        with pytest.raises(ArgumentError, match=match):
            bad()


@pytest.mark.parametrize("bad", [[1, 4], [0, 3], [0, 3, 2, 4], [0], [0.0, 4.0], [[0, 4]]], ids=str)
def test_rejects_bad_cu_seqlens(bad):
    q, k, v, _ = inputs(1, 4, 1, 16, 16, torch.float32)
    with pytest.raises(ArgumentError, match=r"wanted cu_seqlens .* got .*; pass"):
        linear_attention(q, k, v, cu_seqlens=torch.tensor(bad))


def test_wrong_bounds_on_the_device_stay_within_the_tensors():
    """What a GPU does not read back is clamped: no sequence reaches beyond T."""
    storage, k, v, _ = inputs(1, 40, 1, 16, 16, torch.float32)
    q = storage[:, :30]
    bounds = torch.tensor([-5, 20, 99])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_check_cu_seqlens", lambda *_: bounds.to(DEVICE))
        o, _ = linear_attention(q, k[:, :30], v[:, :30], cu_seqlens=bounds)
    clamped = torch.tensor([0, 20, 30])
    exact, _ = linear_attention(q, k[:, :30], v[:, :30], cu_seqlens=clamped)
    assert torch.equal(o, exact)


def test_hbm_bytes_are_the_floor():
    """Every input read once, every output written once: 8 d bytes a token and head in 16 bits."""
    shape = {"B": 1, "T": 16384, "H": 16, "K": 128, "V": 128}
    assert hbm_bytes(shape, default_config(128, 128, torch.bfloat16)) == 8 * 128 * 16384 * 16
    uneven = {"B": 2, "T": 3, "H": 5, "K": 7, "V": 11}
    q, k, v = torch.empty(2, 3, 5, 7), torch.empty(2, 3, 5, 7), torch.empty(2, 3, 5, 11)
    floor = sum(x.nbytes for x in (q, k, v, v))
    assert hbm_bytes(uneven, {}, itemsize=4) == floor


@dtypes
@pytest.mark.parametrize("K", [16, 64, 128, 256])
@pytest.mark.parametrize("V", [1, 64, 2048])
def test_default_configs_are_allowed(K, V, dtype):
    for key, value in default_config(K, V, dtype).items():
        assert value in ALLOWED_CONFIG[key]
