"""Prompts and steps of kernels/chela.py against the reference's forward in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from chela_bench.errors import ArgumentError
from chela_bench.kernels.chela import ChelaBlock, ChelaLayer
from chela_bench.kernels.chela_decode import StateCache
from chela_bench.reference import chela as reference
from chela_bench.reference.chela_decode import HistoryCache
from tests.attention import DEVICE
from tests.pairwise import pairwise
from tests.test_kernel_chela import BUDGET, FACTORS, assert_near, inputs, layers

N = 170  # max_length; blocks of the decoder are 64 tokens
STEPS = 3
CASES = pairwise(
    {
        **{name: values for name, values in FACTORS.items() if name not in ("causal", "masked")},
        "prompt": [0, 1, 62, 70],  # steps after 62 pass the block's end
    }
)
SMALL = {"d_key": 4, "d_value": 12}
both_orders = pytest.mark.parametrize("order", ["serial", "parallel"])


def drawn(T, dtype=torch.float32):
    return inputs(dtype=dtype, T=T)[0]


def steps(module, x, cache):
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        y[:, t] = module.step(x[:, t], cache)
    return y


def states(cache):
    decoder = cache.decoder
    return [decoder._state, decoder.kernel, cache.attention, cache.inputs]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_prompt_and_steps_are_the_whole(case):
    options = dict(case)
    dtype, prompt = options.pop("dtype"), options.pop("prompt")
    key = {"d_key": 4} if options["projection"] == "shared" else {}
    ours, exact = layers(dtype=dtype, d_value=12, max_length=N, **key, **options)
    x = drawn(prompt + STEPS, dtype)
    first, cache = ours.prefill(x[:, :prompt])
    assert isinstance(cache, StateCache) and cache.position == prompt
    y = torch.cat([first, steps(ours, x[:, prompt:], cache)], dim=1)
    assert y.dtype == dtype and not y.requires_grad
    assert cache.position == prompt + STEPS
    assert_near({"y": y}, {"y": exact(x.double()).detach()}, BUDGET[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("pieces", [[0, 1, 63, 70, 0, 36], [140, 29, 1]], ids=str)
@both_orders
def test_a_prompt_in_pieces_is_the_whole(order, pieces, dtype):
    ours, exact = layers(dtype=dtype, max_length=N, order=order, **SMALL)
    x = drawn(N, dtype)
    cache, outputs = None, []
    for piece in x.split(pieces, dim=1):
        y, cache = ours.prefill(piece, cache)
        assert y.shape == piece.shape
        outputs.append(y)
    y = torch.cat(outputs, dim=1)
    assert_near({"y": y}, {"y": exact(x.double()).detach()}, BUDGET[dtype])


def test_a_block_goes_on_as_its_layer():
    ours, exact = layers(
        made=ChelaBlock, like=reference.ChelaBlock, d_ff=20, norm_position="after", **SMALL
    )
    x = drawn(20)
    y, cache = ours.prefill(x[:, :17])
    assert cache.is_of(ours.layer)
    y = torch.cat([y, steps(ours, x[:, 17:], cache)], dim=1)
    assert_near({"y": y}, {"y": exact(x.double()).detach()}, BUDGET[torch.float32])


def test_where_the_reference_computes_it_decodes():
    layer = ChelaLayer(8, d_key=4, max_length=40, implementation="reference").double()
    x = drawn(20).double().cpu()
    y, cache = layer.prefill(x[:, :17])
    assert isinstance(cache, HistoryCache)
    y = torch.cat([y, steps(layer, x[:, 17:], cache)], dim=1)
    torch.testing.assert_close(y, layer(x).detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("short_sizes", [None, ()], ids=str)
@both_orders
def test_it_holds_as_many_bytes_as_stated(order, short_sizes):
    B, D, H, K, V = 2, 8, 2, 4, 12
    ours, _ = layers(max_length=N, order=order, num_heads=H, short_sizes=short_sizes, **SMALL)
    _, cache = ours.prefill(drawn(70))
    W = 5 if short_sizes is None else 1  # 2 round(log10(170)) + 1
    stated = 4 * B * D * N + 4 * D * N + 8 * D * (65 + 129) + 4 * B * K * V // H
    if order == "serial":
        stated += 4 * D * W + 4 * B * D * (W - 1)
    assert cache.nbytes == stated
    assert cache.attention.shape == (B, H, K // H, V // H)


@both_orders
def test_states_stay_where_they_are_and_start_anew(order):
    ours, _ = layers(max_length=N, order=order, **SMALL)
    x = drawn(72)
    y, cache = ours.prefill(x[:, :70])
    addresses = [state.data_ptr() for state in states(cache)]
    y = torch.cat([y, steps(ours, x[:, 70:], cache)], dim=1)
    cache.reset()
    assert cache.position == 0
    again, same = ours.prefill(x[:, :70], cache)
    again = torch.cat([again, steps(ours, x[:, 70:], cache)], dim=1)
    assert same is cache and [state.data_ptr() for state in states(cache)] == addresses
    assert torch.equal(again, y)  # bits
    cache.reset()
    fresh = ours.prefill(x[:, :0])[1]
    assert torch.equal(ours.step(x[:, 0], cache), ours.step(x[:, 0], fresh))


def test_a_copy_goes_on_by_itself():
    ours, _ = layers(**SMALL)
    x = drawn(20)
    _, cache = ours.prefill(x[:, :17])
    fork = copy.deepcopy(cache)
    y = steps(ours, x[:, 17:], cache)
    assert fork.position == 17
    assert torch.equal(steps(ours, x[:, 17:], fork), y)


def test_rows_of_a_batch_do_not_meet():
    ours, _ = layers(**SMALL)
    x = drawn(20)
    _, cache = ours.prefill(x[:, :17])
    _, alone = ours.prefill(x[1:, :17])
    y = steps(ours, x[:, 17:], cache)[1:]
    torch.testing.assert_close(steps(ours, x[1:, 17:], alone), y, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prompt", [1, 30, 70])
def test_float16_stays_finite_where_the_attention_would_not(prompt):
    ours, exact = layers(dtype=torch.float16, max_length=N, **SMALL)
    for module in (ours, exact):
        module.m_q.data.fill_(60.0)
        module.m_k.data.fill_(60.0)
    x = drawn(prompt + 74, torch.float16)
    y, cache = ours.prefill(x[:, :prompt])
    y = torch.cat([y, ours.prefill(x[:, prompt:-2], cache)[0]], dim=1)
    y = torch.cat([y, steps(ours, x[:, -2:], cache)], dim=1)
    assert y.isfinite().all() and cache.attention.isfinite().all()
    assert_near({"y": y}, {"y": exact(x.double()).detach()}, BUDGET[torch.float16])


def test_kernels_of_the_convolution_are_copies():
    """Other parameters are read anew."""
    ours, exact = layers(max_length=N, **SMALL)
    x = drawn(72)
    _, cache = ours.prefill(x[:, :0])
    for kernel in (*ours.short_kernels, ours.long_kernel):
        kernel.data.zero_()
    for module in (ours, exact):
        module.w_o.bias.data += 1
    y = torch.cat([ours.prefill(x[:, :70], cache)[0], steps(ours, x[:, 70:], cache)], dim=1)
    assert_near({"y": y}, {"y": exact(x.double()).detach()}, BUDGET[torch.float32])


def test_modes_of_inference_mix():
    ours, exact = layers(max_length=N, **SMALL)
    x = drawn(77)
    with torch.inference_mode():
        y, cache = ours.prefill(x[:, :70])
        y = torch.cat([y, steps(ours, x[:, 70:72], cache)], dim=1)
    y = torch.cat([y, ours.prefill(x[:, 72:75], cache)[0]], dim=1)
    with torch.no_grad():
        y = torch.cat([y, steps(ours, x[:, 75:].clone().requires_grad_(), cache)], dim=1)
    assert not y.requires_grad
    assert_near({"y": y}, {"y": exact(x.double()).detach()}, BUDGET[torch.float32])


@pytest.mark.parametrize("projection", ["shared", "none"])
@both_orders
def test_under_autocast(order, projection):
    key = {"d_key": 4} if projection == "shared" else {}
    ours, exact = layers(max_length=N, order=order, projection=projection, d_value=12, **key)
    x = drawn(72)
    with torch.autocast(DEVICE, dtype=torch.float16):
        y, cache = ours.prefill(x[:, :70])
        y = torch.cat([y, steps(ours, x[:, 70:], cache)], dim=1)
    assert_near({"y": y}, {"y": exact(x.double()).detach()}, BUDGET[torch.float16])


def test_what_does_not_fit_changes_nothing():
    ours, exact = layers(max_length=20, **SMALL)
    other, _ = layers(max_length=20, **SMALL)
    x = drawn(21)
    _, cache = ours.prefill(x[:, :17])
    before = [state.clone() for state in states(cache)]
    for match, bad in {
        r"wanted x \[B, T, D\] with D = 8, got \[2, 8\]": lambda: ours.prefill(x[:, 0], cache),
        r"wanted x \[B, D\] with D = 8, got \[2, 7\]": lambda: ours.step(x[:, 0, 1:], cache),
        "B = 2 sequences, as its cache, got 1": lambda: ours.step(x[:1, 0], cache),
        "got another layer's": lambda: other.step(x[:, 0], cache),
        "as the layer, got torch.float16": lambda: ours.step(x[:, 0].half(), cache),
        "as layer and cache, got meta": lambda: ours.step(x[:, 0].to("meta"), cache),
        "no gradient": lambda: ours.step(x[:, 0].clone().requires_grad_(), cache),
        "at most max_length = 20 tokens, got 4 after 17": lambda: ours.prefill(x[:, 17:], cache),
        "batch >= 1": lambda: ours.prefill(x[:0, :3]),
    }.items():
        with pytest.raises(ArgumentError, match=match):
            bad()
    assert cache.position == 17
    assert all(map(torch.equal, states(cache), before))
    y = steps(ours, x[:, 17:20], cache)
    assert_near({"y": y}, {"y": exact(x[:, :20].double()).detach()[:, 17:]}, BUDGET[torch.float32])
    with pytest.raises(ArgumentError, match="got 1 after 20"):
        ours.step(x[:, 20], cache)


def test_a_cache_left_half_updated_says_so(monkeypatch):
    ours, _ = layers(**SMALL)
    x = drawn(20)
    _, cache = ours.prefill(x[:, :17])
    with monkeypatch.context() as patch:
        patch.setattr(StateCache, "attend", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours.step(x[:, 17], cache)
    with pytest.raises(ArgumentError, match="left half updated; reset"):
        ours.step(x[:, 17], cache)
    cache.reset()
    y, _ = ours.prefill(x[:, :17], cache)
    assert torch.equal(y, ours.prefill(x[:, :17])[0])
