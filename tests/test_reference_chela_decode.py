"""Prompts and steps of reference/chela.py against its own forward, in float64."""

import copy

import pytest
import torch

from chela_bench.errors import ArgumentError
from chela_bench.reference.chela import ChelaBlock, ChelaLayer
from tests.pairwise import pairwise
from tests.test_chela import KINDS, SWITCHES, layer, shaken, x_like

T = 23
CASES = pairwise({**SWITCHES, "causal": [True], "prompt": [0, 1, 14, T - 1, T]})


def steps(module, x, cache):
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        y[:, t] = module.step(x[:, t], cache)
    return y


def assert_same(found, right):
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_prompt_and_steps_are_the_whole(case):
    switches = dict(case)
    prompt = switches.pop("prompt")
    m = shaken(layer(**switches))
    x = x_like(m, T=T)
    y, cache = m.prefill(x[:, :prompt])
    assert cache.position == prompt and not y.requires_grad
    assert_same(torch.cat([y, steps(m, x[:, prompt:], cache)], dim=1), m(x).detach())
    assert cache.position == T


@pytest.mark.parametrize("norm_position", ["before", "after"])
def test_a_block_goes_on_as_its_layer(norm_position):
    m = shaken(layer(kind=ChelaBlock, norm_position=norm_position))
    x = x_like(m, T=T)
    y, cache = m.prefill(x[:, :10])
    assert cache.is_of(m.layer)
    y = torch.cat([y, m.prefill(x[:, 10:15], cache)[0], steps(m, x[:, 15:], cache)], dim=1)
    assert_same(y, m(x).detach())


@KINDS
def test_a_prompt_in_pieces_is_the_whole(kind):
    m = shaken(layer(kind=kind))
    x = x_like(m, T=T)
    cache, pieces = None, []
    for piece in x.split([0, 1, 15, 0, 7], dim=1):
        y, cache = m.prefill(piece, cache)
        assert y.shape == piece.shape
        pieces.append(y)
    assert_same(torch.cat(pieces, dim=1), m(x).detach())


def test_the_cache_is_all_tokens_so_far():
    m = layer()
    x = x_like(m)
    given = x.clone()
    _, cache = m.prefill(given[:, :17])
    m.step(given[:, 17], cache)
    given.zero_()  # it has a copy
    assert torch.equal(cache.tokens, x[:, :18])
    assert cache.nbytes == 2 * 18 * 6 * 8
    fork = copy.deepcopy(cache)
    y = m.step(x[:, 18], cache)
    assert fork.position == 18 and torch.equal(m.step(x[:, 18], fork), y)
    cache.reset()
    assert cache.position == cache.nbytes == 0
    assert_same(m.prefill(x[:, :5], cache)[0], m(x[:, :5]).detach())


def test_what_does_not_fit_changes_nothing():
    m, other = layer(max_length=20), layer(max_length=20)
    x = x_like(m, T=21)
    _, cache = m.prefill(x[:, :17])
    for match, bad in {
        r"wanted x \[B, T, D\] with D = 6, got \[2, 6\]": lambda: m.prefill(x[:, 0], cache),
        r"wanted x \[B, D\] with D = 6, got \[2, 1, 6\]": lambda: m.step(x[:, :1], cache),
        r"with D = 6, got \[2, 5\]": lambda: m.step(x[:, 0, 1:], cache),
        "B = 2 sequences, as its cache, got 1": lambda: m.step(x[:1, 0], cache),
        "got another layer's": lambda: other.step(x[:, 0], cache),
        "another layer's; keep": lambda: other.prefill(x[:, :1], cache),
        "in torch.float64, as the layer, got torch.float32": lambda: m.step(x[:, 0].float(), cache),
        "as layer and cache, got meta": lambda: m.step(x[:, 0].to("meta"), cache),
        "no gradient": lambda: m.step(x[:, 0].clone().requires_grad_(), cache),
        "at most max_length = 20 tokens, got 4 after 17": lambda: m.prefill(x[:, 17:], cache),
        "got 21 after 0": lambda: m.prefill(x),
    }.items():
        with pytest.raises(ArgumentError, match=match):
            bad()
    assert cache.position == 17
    with torch.no_grad():
        y = [m.step(x[:, t].clone().requires_grad_(), cache) for t in (17, 18, 19)]
    assert_same(torch.stack(y, dim=1), m(x[:, :20]).detach()[:, 17:])
    with pytest.raises(ArgumentError, match="got 1 after 20"):
        m.step(x[:, 20], cache)


@KINDS
def test_a_two_sided_layer_cannot(kind):
    m = layer(kind=kind, causal=False)
    with pytest.raises(ArgumentError, match="wanted causal=True for prefill and step"):
        m.prefill(x_like(m))


def test_a_layer_of_its_own_when_copied():
    m = layer()
    _, cache = m.prefill(x_like(m))
    with pytest.raises(ArgumentError, match="another layer's"):
        copy.deepcopy(m).step(x_like(m)[:, 0], cache)
    assert isinstance(m, ChelaLayer) and cache.is_of(m)
