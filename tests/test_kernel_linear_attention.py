"""kernels/linear_attention.py against the float64 reference: interpreted, or on a GPU."""

import pytest
import torch

from chela_bench.bench.check import worst_block_error
from chela_bench.errors import ArgumentError
from chela_bench.kernels import linear_attention as module
from chela_bench.kernels import linear_attention_config as config_module
from chela_bench.kernels import linear_attention_ops as ops
from chela_bench.kernels import linear_attention_sweep as sweeps
from chela_bench.kernels.linear_attention import (
    hbm_bytes,
    linear_attention,
    linear_attention_recurrent,
)
from chela_bench.kernels.linear_attention_config import (
    ALLOWED_CONFIG,
    OPTIONS,
    choose_segments,
    default_config,
)
from chela_bench.kernels.linear_attention_walk import Walk, rows_of
from chela_bench.reference.linear_attention import linear_attention as reference
from tests.attention import (
    DEVICE,
    SHAPES,
    both_ways,
    budget,
    check,
    dtypes,
    inputs,
    label,
    randn_like,
)


@dtypes
@both_ways
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_matches_reference(shape, dtype, causal):
    q, k, v, state = inputs(*shape, dtype)
    for precise in (False, True):
        check(q, k, v, causal=causal, precise=precise, gradients=False)
    options = {"initial_state": state, "output_final_state": True, "scale": 0.5}
    check(q, k, v, causal=causal, **options)
    check(q, k, v, causal=causal, precise=True, gradients=shape[1] <= 5, **options)


ways_back = pytest.mark.parametrize(
    "way", [{"sweep": 0}, {"sweep": 1}, {"keep": 1}], ids=["walks", "sweep", "kept"]
)


def test_rows_are_promised_to_be_aligned_only_if_they_always_are():
    """A row of 60 is, where there are 4 heads: a promise would make 3 heads another kernel."""
    aligned, odd = torch.empty(2, 5, 4, 64), torch.empty(2, 5, 4, 60)
    assert rows_of(aligned) == (16, (5 * 4 * 4, 4 * 4, 4), True)
    assert rows_of(odd) == (1, odd.stride()[:3], True) and odd.stride(1) % 16 == 0
    assert rows_of(aligned, odd)[0] == rows_of(aligned[..., 1:, :56])[0] == 1


@dtypes
@both_ways
@pytest.mark.parametrize("shape", [(2, 130, 1, 16, 40), (1, 100, 2, 17, 16)], ids=label)
def test_segments_side_by_side(shape, dtype, causal):
    """Also more segments than there are tokens for."""
    q, k, v, state = inputs(*shape, dtype)
    check(q, k, v, causal=causal, schedule="split")
    options = {"initial_state": state, "output_final_state": True, "config": {"segments": 3}}
    check(q, k, v, causal=causal, **options)


@dtypes
@both_ways
@pytest.mark.parametrize("sweep", [0, 1])
def test_pieces_of_segments_summed_side_by_side(monkeypatch, dtype, causal, sweep):
    options = (16, -1, -1, -1, sweep, -1, -1)
    monkeypatch.setattr(module, "_plan", lambda *_: (2, 3, options))
    monkeypatch.setattr(module, "_resolved", module._resolved.__wrapped__)
    q, k, v, state = inputs(1, 230, 1, 16, 16, dtype)  # six pieces of 64 tokens, two of them empty
    check(q, k, v, causal=causal, initial_state=state, output_final_state=True)


SWEEP = {"sweep": 1}


@dtypes
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("shape", [(2, 130, 1, 16, 40), (1, 70, 2, 17, 16)], ids=label)
def test_gradients_in_one_sweep(shape, dtype, segments):
    q, k, v, state = inputs(*shape, dtype)
    config = {**SWEEP, "segments": segments}
    check(q, k, v, config=config)
    options = {"initial_state": state, "output_final_state": True, "scale": 0.5}
    check(q, k, v, config=config, **options)


@dtypes
def test_a_sweep_of_packed_and_strided_inputs(dtype):
    lengths = [0, 1, 70, 59]
    qkv, _, _, state = inputs(1, sum(lengths), 2, 48, 16, dtype, N=len(lengths))
    state = state[:, :, :16].contiguous()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    options = {"initial_state": state, "output_final_state": True, "cu_seqlens": cu_seqlens}
    check(*qkv.split(16, dim=-1), config={**SWEEP, "segments": 2}, **options)


def test_a_sweep_cuts_long_sequences_for_itself(monkeypatch):
    """The subtraction that gives R loses digits with the length of a segment."""
    monkeypatch.setattr(config_module, "SWEPT", 64)
    monkeypatch.setattr(ops, "SWEPT", 64)
    q, k, v, state = inputs(1, 130, 1, 16, 16, torch.float32)
    options = {"initial_state": state, "output_final_state": True}
    check(q, k, v, config=SWEEP, **options)
    check(q, k, v, config={**SWEEP, "segments": 2}, **options)  # the forward's states do not fit
    packed, half = torch.tensor([0, 130]), q.bfloat16()
    assert ops._swept(half, 16, Walk(1.0, True, None, 1, 1, 1, False, (-1,) * len(OPTIONS)))
    assert not ops._swept(half, 16, Walk(1.0, True, packed, 1, 1, 1, False, (-1,) * len(OPTIONS)))
    assert not ops._swept(q, 16, Walk(1.0, True, None, 1, 1, 1, False, (-1,) * len(OPTIONS)))


@dtypes
@both_ways
def test_values_wider_than_keys_may_be(dtype, causal):
    """dq and dk sum over blocks of V, dv over those of K."""
    q, k, v, state = inputs(1, 70, 1, 70 if dtype == torch.float32 else 16, 272, dtype)
    check(q, k, v, causal=causal, initial_state=state, output_final_state=True)
    check(q[:, :20], k[:, :20], v[:, :20], causal=causal, schedule="split")


def test_so_many_blocks_are_added_up_in_rounds(monkeypatch):
    monkeypatch.setattr(sweeps, "ADDED", 2)
    q, k, v, state = inputs(1, 40, 1, 16, 300, torch.float32)
    check(q, k, v, initial_state=state, output_final_state=True)


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
@pytest.mark.parametrize(("integer", "segments"), [(torch.int32, 1), (torch.int64, 2)])
def test_packed_sequences(dtype, causal, integer, segments):
    lengths = [0, 1, 70, 0, 59, 0]
    q, k, v, state = inputs(1, sum(lengths), 1, 20, 24, dtype, N=len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(integer)
    config = {"segments": segments}
    check(q, k, v, cu_seqlens=cu_seqlens, causal=causal, config=config, gradients=False)
    options = {"initial_state": state, "output_final_state": True, "config": config}
    check(q, k, v, cu_seqlens=cu_seqlens.to(DEVICE), causal=causal, **options)


@both_ways
def test_packed_sequences_of_wide_values(causal):
    lengths = [0, 1, 40, 0]
    q, k, v, state = inputs(1, sum(lengths), 1, 16, 260, torch.float32, N=len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    options = {"initial_state": state, "output_final_state": True}
    check(q, k, v, cu_seqlens=cu_seqlens, causal=causal, **options)


@dtypes
def test_strided_inputs(dtype):
    """Slices of wider tensors, heads before tokens, and a last axis that is not contiguous."""
    B, T, H, K = 2, 35, 3, 16
    qkv, _, _, _ = inputs(B, T, H, 3 * K, 1, dtype)
    check(*qkv.split(K, dim=-1))
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv.split(K, dim=-1)]
    check(*heads_first)
    check(*(x.transpose(1, 3).contiguous().transpose(1, 3) for x in qkv.split(K, dim=-1)))
    check(*(x[:1].expand(B, -1, -1, -1) for x in qkv.split(K, dim=-1)), gradients=False)


def test_what_hopper_copies_by_16_bytes_starts_at_a_multiple_of_them(monkeypatch):
    monkeypatch.setattr(ops, "has_wgmma", lambda _: True)
    whole = torch.arange(64.0).bfloat16().expand(1, 3, 2, -1)
    off = torch.cat([whole, whole], dim=-1)[..., 1:65]
    full = off.float()[..., 1:]
    moved, same, others = ops.rows_contiguous(off, whole, full)
    assert same is whole and others is full
    assert moved.data_ptr() % 16 == 0 and moved.is_contiguous() and torch.equal(moved, off)


@dtypes
@pytest.mark.parametrize("way", [{}, {"sweep": 1}, {"keep": 1}], ids=["auto", "sweep", "kept"])
def test_tensors_may_start_anywhere(dtype, way):
    """Not only at a multiple of 16 bytes: views, and what lies behind an odd number of them."""

    def off(x):
        room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        return room[1:].view(x.shape).copy_(x)

    q, k, v, state = inputs(1, 90, 2, 64, 64, dtype)
    q, k, v, state = (off(x) for x in (q, k, v, state))
    assert q.data_ptr() % 16 != 0
    check(q, k, v, config=way, initial_state=state, output_final_state=True)
    wide = torch.nn.functional.pad(torch.cat([q, k, v], dim=-1), (1, 15))
    check(*wide[..., 1:193].split(64, dim=-1), config=way)


def test_a_gradient_that_is_one_number_everywhere():
    """sum().backward() passes an expanded scalar."""
    q, k, v, _ = inputs(1, 20, 2, 16, 16, torch.float32)
    v.requires_grad_()
    linear_attention(q, k, v)[0].sum().backward()
    [exact] = torch.autograd.grad(reference(q.double(), k.double(), v.double())[0].sum(), v)
    assert worst_block_error(v.grad, exact.double()) <= budget(torch.float32, 20)


@dtypes
@pytest.mark.parametrize("scale", [0.0, -2.0])
@ways_back
def test_any_scale(dtype, scale, way):
    q, k, v, state = inputs(1, 40, 1, 16, 64, dtype)
    q, k, v, state = (x.requires_grad_() for x in (q, k, v, state))
    o, final = linear_attention(
        q, k, v, scale=scale, initial_state=state, output_final_state=True, config=way
    )
    do, d_final = randn_like(o, 1), randn_like(final, 2)
    found = torch.autograd.grad([o, final], [q, k, v, state], [do, d_final])
    exact_in = [x.detach().double().requires_grad_() for x in (q, k, v, state)]
    outputs = reference(
        *exact_in[:3], scale=scale, initial_state=exact_in[3], output_final_state=True
    )
    wanted = torch.autograd.grad(outputs, exact_in, [do.double(), d_final.double()])
    for gradient, exact in zip(found, wanted, strict=True):
        assert (gradient - exact).norm() <= 2 * budget(dtype, 40) * exact.norm()


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
@pytest.mark.parametrize("segments", [1, 2])
def test_the_past_is_blind_to_the_future(dtype, t, segments):
    q, k, v, _ = inputs(1, 70, 2, 16, 16, dtype)
    o, _ = linear_attention(q, k, v, config={"segments": segments})
    for x in (q, k, v):
        x[:, t:] = 1 - x[:, t:]
    changed, _ = linear_attention(q, k, v, config={"segments": segments})
    assert torch.equal(o[:, :t], changed[:, :t])
    assert not torch.equal(o[:, t], changed[:, t])


@dtypes
@pytest.mark.parametrize("segments", [1, 3])
@ways_back
def test_same_inputs_same_bits_whatever_the_neighbours(dtype, segments, way):
    q, k, v, state = inputs(2, 130, 1, 16, 64, dtype)

    def results(*tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        o, final = linear_attention(
            *leaves[:3], initial_state=leaves[3], output_final_state=True,
            config={"segments": segments, **way},
        )  # fmt: skip
        do = [randn_like(x[:1], 5).expand_as(x) for x in (o, final)]
        return o, final, *torch.autograd.grad([o, final], leaves, do)

    first, again = results(q, k, v, state), results(q, k, v, state)
    others = results(*(torch.cat([x[:1], x[1:] * 3 - 1]) for x in (q, k, v, state)))
    for a, b, c in zip(first, again, others, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[0], c[0]) and not torch.equal(a[1], c[1])


@dtypes
def test_a_large_state_does_not_overflow(dtype):
    """Entries of S pass float16's 65504; o, scaled, does not."""
    q, k, v, state = inputs(1, 70, 2, 16, 16, dtype)
    check(q, k, v, initial_state=state * 1e6, scale=1e-4)


def test_large_scores_do_not_overflow():
    """Nor do scores, or their gradient's as a loss scale makes them."""
    q, k, v, _ = inputs(1, 70, 1, 16, 16, torch.float16)
    q, k = q * 300, k * 300
    check(q, k, v, scale=1e-4, gradients=False)
    v = (v * 300).requires_grad_()
    q.requires_grad_()
    o, _ = linear_attention(q, k, v, scale=1e-6)
    do = randn_like(o, 3) * 300
    dq, dv = torch.autograd.grad(o, [q, v], do)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(reference(*exact, scale=1e-6)[0], exact, do.double())
    assert worst_block_error(dq, wanted[0]) <= budget(torch.float16, 70)
    assert worst_block_error(dv, wanted[2]) <= budget(torch.float16, 70)


@pytest.mark.parametrize("shape", [(0, 5, 1, 16, 16), (2, 0, 1, 16, 16), (2, 5, 0, 16, 16),
                                   (2, 5, 1, 16, 0)], ids=label)  # fmt: skip
@both_ways
def test_nothing_in_nothing_out(shape, causal):
    q, k, v, state = (x.requires_grad_() for x in inputs(*shape, torch.float32))
    for config in ({}, {"segments": 2}):
        options = {"config": config, "causal": causal, "output_final_state": True}
        o, final = linear_attention(q, k, v, initial_state=state, **options)
        assert o.shape == v.shape
        assert final.shape == state.shape and (shape[1] > 0 or torch.equal(final, state))
        gradients = torch.autograd.grad([o, final], [q, k, v, state], [o, final])
        assert [x.shape for x in gradients] == [x.shape for x in (q, k, v, state)]
        assert shape[1] > 0 or torch.equal(gradients[3], final)
        o, final = linear_attention(q, k, v, **options)
        assert not final.any()
    with torch.no_grad():
        o, final = linear_attention_recurrent(q, k, v, initial_state=state, output_final_state=True)
        assert o.shape == v.shape and (shape[1] > 0 or torch.equal(final, state))


def test_inner_products_agree():
    """With zero states o is linear in q, in k and in v: <q, dq> = <k, dk> = <v, dv> = <o, do>."""
    for sweep, segments in [(0, 1), (0, 2), (1, 1), (1, 2)]:
        q, k, v, _ = (x.requires_grad_() for x in inputs(1, 130, 2, 16, 40, torch.float32))
        o, _ = linear_attention(q, k, v, config={"sweep": sweep, "segments": segments})
        do = randn_like(o, 4)
        gradients = torch.autograd.grad(o, [q, k, v], do)
        whole = (o.double() * do).sum()
        size = o.double().norm() * do.double().norm()
        for x, gradient in zip((q, k, v), gradients, strict=True):
            difference = (x.double() * gradient).sum() - whole
            assert difference.abs() <= budget(torch.float32, 130) * size


@pytest.mark.gpu
def test_rejects_tensors_on_two_devices():
    q, k, v, _ = inputs(1, 4, 1, 16, 16, torch.float32)
    with pytest.raises(ArgumentError, match="one device"):
        linear_attention(q, k.cpu(), v)


def test_rejects_tensors_that_triton_cannot_reach(monkeypatch):
    q, k, v, _ = (x.cpu() for x in inputs(1, 4, 1, 16, 16, torch.float32))
    monkeypatch.setattr(module._walk, "interpreted", False)
    module._resolved.cache_clear()
    with pytest.raises(ArgumentError, match=r"on a GPU, got cpu; .*TRITON_INTERPRET=1"):
        linear_attention(q, k, v)


def test_rejects_what_does_not_fit():
    q, k, v, state = inputs(2, 4, 1, 16, 16, torch.float32)
    wide = q.new_zeros(2, 4, 1, 257)
    for match, bad in {
        "no schedule 'fast'; there are: auto, fused, split": lambda: linear_attention(
            q, k, v, schedule="fast"
        ),
        r"wanted q, k \[B, T, H, K\]": lambda: linear_attention(q, k[:, :3], v),
        r"and v \[B, T, H, V\]": lambda: linear_attention(q, k, v[:, :, 0]),
        "K <= 256 and V <= 4096, got K = 257": lambda: linear_attention(wide, wide, v),
        "got K = 16, V = 4097": lambda: linear_attention(q, k, q.new_zeros(2, 4, 1, 4097)),
        "convert them to one": lambda: linear_attention(q, k.half(), v),
        "in one of float32": lambda: linear_attention(q.double(), k.double(), v.double()),
        "wanted initial_state": lambda: linear_attention(q, k, v, initial_state=state[:1]),
        "in float32": lambda: linear_attention(q, k, v, initial_state=state.half()),
        "no config BLOCK_T=48; allowed: BLOCK_T": lambda: linear_attention(
            q, k, v, config={"BLOCK_T": 48}
        ),
        r"no config BLOCK_T=\[64\]; allowed": lambda: linear_attention(
            q, k, v, config={"BLOCK_T": [64]}
        ),
        "no config BLOCK_K=16; .*num_warps": lambda: linear_attention(
            q, k, v, config={"BLOCK_K": 16}
        ),
        "wanted V <= 256 for sweep=0, .* got V = 300; leave sweep out": lambda: linear_attention(
            q, k, q.new_zeros(2, 4, 1, 300), config={"sweep": 0}
        ),
        "no config segments=0; .*segments 1 to 1024": lambda: linear_attention(
            q, k, v, config={"segments": 0}
        ),
        "wanted B = 1": lambda: linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 4])),
        "the recurrent form has no gradient": lambda: linear_attention_recurrent(
            q, k, v, initial_state=state.clone().requires_grad_()
        ),
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
    floor = 8 * 128 * 16384 * 16
    assert hbm_bytes(shape, {"segments": 1}) == hbm_bytes(shape, {"schedule": "fused"}) == floor
    uneven = {"B": 2, "T": 3, "H": 5, "K": 7, "V": 11}
    q, k, v = torch.empty(2, 3, 5, 7), torch.empty(2, 3, 5, 7), torch.empty(2, 3, 5, 11)
    floor = sum(x.nbytes for x in (q, k, v, v))
    assert hbm_bytes(uneven, {}, itemsize=4) == floor


def test_hbm_bytes_of_segments():
    """k and v once more but for one segment in eight; states written and read twice each."""
    shape = {"B": 1, "T": 16384, "H": 16, "K": 128, "V": 128}
    rows, states = 256 * 16384 * 16, 16 * 8 * 128 * 128 * 4
    moved = rows * 4 + rows * 2 * 7 // 8 + states * 4
    assert hbm_bytes(shape, {"segments": 8}) == moved


@pytest.mark.parametrize(
    ("schedule", "sequences", "tokens", "segments"),
    [
        ("auto", 1, 16384, 8),  # 32 programs on 132 SMs: two on each, in one wave
        ("auto", 1, 2048, 4),  # of no less than 512 tokens
        ("auto", 1, 1023, 1),
        ("auto", 4, 16384, 1),  # 128 programs are enough
        ("fused", 1, 16384, 1),
        ("split", 4, 16384, 2),
        ("split", 1, 100, 2),
        ("split", 0, 100, 2),
    ],
)
def test_few_programs_are_split(schedule, sequences, tokens, segments):
    chosen = choose_segments(
        schedule, sequences=sequences, heads=16, tokens=tokens, slices=2, processors=132
    )
    assert chosen == segments


@dtypes
@pytest.mark.parametrize("K", [16, 64, 128, 256])
@pytest.mark.parametrize("V", [1, 64, 2048])
def test_default_configs_are_allowed(K, V, dtype):
    for key, value in default_config(K, V, dtype).items():
        assert value in ALLOWED_CONFIG[key]
