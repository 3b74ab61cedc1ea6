"""Tokens drawn from a language model of CHELA blocks."""

from __future__ import annotations

import math

import pytest
import torch

from chela_bench.errors import ArgumentError
from chela_bench.kernels import chela
from tests.attention import DEVICE
from tests.chela_models import (
    model,
    tokens,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DECODERS = [
    {"implementation": "reference"},
    {"implementation": "triton", "order": "parallel", "num_heads": 2},
    {"implementation": "triton", "norm_position": "after"},
]


def sharp(**options):
    """A model whose likeliest tokens are far apart, and another one after each."""
    m = model(pad_token_id=10, tie_embeddings=False, **options).float().to(DEVICE)
    m.lm_head.weight.data *= 5
    return m.eval()


@pytest.mark.parametrize("options", DECODERS, ids=str)
@pytest.mark.parametrize("T", [1, 33])
def test_greedy_generation_is_the_argmax_of_whole_forwards(options, T):
    m, ids = sharp(**options), tokens(3, T, below=10).to(DEVICE)
    found = m.generate(ids, 5, temperature=0)
    assert found.shape == (3, T + 5) and found.dtype == ids.dtype
    for _ in range(5):
        logits = m(ids).logits[:, -1, :10]
        most = logits.topk(2).values
        assert (most[:, 0] - most[:, 1]).min() > 1e-3  # rounding decides nothing
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(found, ids)
    assert len(found[:, T:].unique()) > 2


@pytest.mark.gpu
def test_generation_by_a_graph_is_the_same():
    m, ids = sharp(max_length=200), tokens(T=50, below=10).to(DEVICE)
    assert torch.equal(
        m.generate(ids, 100, temperature=0, graph=True), m.generate(ids, 100, temperature=0)
    )
    assert m.generate(ids, 1, graph=True).shape == (3, 51)


def test_generation_by_a_graph_wants_a_gpu():
    m, ids = model(), tokens(T=5)
    with pytest.raises(ArgumentError, match="wanted x on a GPU for a CUDA graph, got cpu"):
        m.generate(ids, 2, graph=True)
    assert m.generate(ids, 1, graph=True).shape == (3, 6)  # the prompt's own, no step


def test_generation_draws_from_the_chances():
    """4000 sequences: a frequency's standard deviation is at most 0.008."""
    m = model(pad_token_id=10).eval()
    ids = tokens(1, 2, below=10)
    logits = m(ids).logits[0, -1, :10]
    many = ids.expand(4000, 2)
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 3), (1.0, 99)):
        kept = logits.topk(min(top_k or 10, 10)).indices
        wanted = torch.zeros(11, dtype=torch.double)
        wanted[kept] = (logits[kept] / temperature).softmax(-1).detach()
        drawn = m.generate(
            many, 1, temperature=temperature, top_k=top_k,
            generator=torch.Generator().manual_seed(0),
        )[:, -1]  # fmt: skip
        counts = torch.bincount(drawn, minlength=11) / 4000
        assert (counts - wanted).abs().max() < 0.03
        assert not counts[wanted == 0].any()


def test_a_temperature_near_zero_takes_the_likeliest():
    m, ids = sharp(), tokens(3, 5, below=10).to(DEVICE)
    greedy = m.generate(ids, 5, temperature=0)
    assert torch.equal(m.generate(ids, 5, temperature=1e-300), greedy)
    assert torch.equal(m.generate(ids, 5, top_k=1), greedy)


def test_generation_repeats_with_its_generator():
    m, ids = model().eval(), tokens(3, 5)
    first, second, third = (
        m.generate(ids, 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    m.generate(ids, 2, generator=torch.Generator())
    assert torch.equal(state, torch.get_rng_state())
    m.generate(ids, 2)
    assert not torch.equal(state, torch.get_rng_state())


def test_generation_leaves_the_model_as_it_was():
    m, ids = model(dropout=0.5), tokens(2, 5)
    m.blocks[0].eval()
    before = [module.training for module in m.modules()]
    assert torch.equal(m.generate(ids, 4, temperature=0), m.generate(ids, 4, temperature=0))
    assert [module.training for module in m.modules()] == before
    assert m(ids, labels=ids).loss.requires_grad


@pytest.mark.parametrize("shape", [(2, 5), (0, 5)])
def test_generation_of_nothing(shape):
    ids = tokens(*shape).int()
    found = model().generate(ids, 0)
    assert torch.equal(found, ids) and found.dtype == torch.int32
    assert model().generate(tokens(0, 5), 3).shape == (0, 8)


def test_generation_reaches_max_length_and_no_further(monkeypatch):
    m, ids = model(), tokens(2, 30)
    assert m.generate(ids, 10).shape == (2, 40)
    monkeypatch.setattr(chela.ChelaBlock, "prefill", None)  # nothing is computed first
    with pytest.raises(
        ArgumentError, match=r"wanted 0 to 10 new tokens after a prompt of 30, .* 40, got 11"
    ):
        m.generate(ids, 11)


@pytest.mark.parametrize(
    ("ids", "options", "match"),
    [
        (tokens(2, 0), {}, "wanted prompts .* without padding, got no tokens"),
        (tokens(2, 4) * 0 + 10, {}, "got pad_token_id 10 in them; generate for prompts of one"),
        (tokens(2, 4)[0], {}, "wanted input_ids"),
        (tokens(2, 4, 9), {"max_new_tokens": -1}, "got -1; shorten"),
        (tokens(2, 4, 9), {"temperature": -0.1}, "wanted a finite temperature .* got -0.1"),
        (tokens(2, 4, 9), {"temperature": math.nan}, "got nan; 0 is the likeliest"),
        (tokens(2, 4, 9), {"top_k": 0}, "wanted top_k of 1 or more, got 0; None is all of them"),
    ],
    ids=str,
)
def test_generation_refuses(ids, options, match):
    with pytest.raises(ArgumentError, match=match):
        model(pad_token_id=10).generate(ids, **{"max_new_tokens": 3, **options})


def test_generation_under_autocast():
    m, ids = sharp(), tokens(3, 5, below=10).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = m.generate(ids, 5)
    assert found.shape == (3, 10)
