"""reference/softmax_attention.py against torch, and its blocks against each other."""

import pytest
import torch
import torch.nn.functional as F

from chela_bench.errors import ArgumentError
from chela_bench.reference import softmax_attention as module
from chela_bench.reference.softmax_attention import softmax_attention

SHAPES = [(2, 0, 2, 4, 4), (1, 1, 1, 4, 4), (2, 63, 3, 8, 5), (1, 130, 2, 16, 16)]  # B, T, H, K, V
both_ways = pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])


def inputs(B, T, H, K, V, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T)
    shapes = (B, T, H, K), (B, T, H, K), (B, T, H, V)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.fixture(params=[module.SCORE_BYTES, 3000, 1], ids=["whole", "few-rows", "one-row"])
def score_bytes(request, monkeypatch):
    monkeypatch.setattr(module, "SCORE_BYTES", request.param)


@both_ways
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(shape, causal, score_bytes):
    q, k, v = (x.requires_grad_() for x in inputs(*shape))
    o = softmax_attention(q, k, v, scale=0.3, causal=causal)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    exact = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=0.3)
    exact = exact.transpose(1, 2)
    torch.testing.assert_close(o, exact, rtol=1e-12, atol=1e-12)
    do = torch.randn_like(o)
    gradients = torch.autograd.grad(o, (q, k, v), do)
    exact_gradients = torch.autograd.grad(exact, (q, k, v), do)
    torch.testing.assert_close(gradients, exact_gradients, rtol=1e-12, atol=1e-12)


@both_ways
def test_gradients(causal, score_bytes):
    q, k, v = (x.requires_grad_() for x in inputs(1, 6, 2, 3, 2))
    assert torch.autograd.gradcheck(lambda *qkv: softmax_attention(*qkv, causal=causal), (q, k, v))


def test_the_default_scale():
    q, k, v = inputs(1, 9, 1, 16, 4)
    assert torch.equal(softmax_attention(q, k, v), softmax_attention(q, k, v, scale=0.25))


def test_the_past_is_blind_to_the_future(score_bytes):
    q, k, v = inputs(1, 65, 2, 4, 4)
    o = softmax_attention(q, k, v)
    for x in (q, k, v):
        x[:, 40:] = torch.randn_like(x[:, 40:]) * 100
    changed = softmax_attention(q, k, v)
    torch.testing.assert_close(o[:, :40], changed[:, :40], rtol=1e-13, atol=1e-13)
    assert not torch.equal(o[:, 40], changed[:, 40])


def test_blocks_bound_the_memory(monkeypatch):
    """No tensor of the forward or backward is larger than a block of scores, or than q."""
    T = 600
    q, k, v = (x.requires_grad_() for x in inputs(1, T, 2, 4, 4))
    monkeypatch.setattr(module, "SCORE_BYTES", 2 * T * 8 * 10)  # ten rows of two heads
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        softmax_attention(q, k, v).sum().backward()
    assert largest == 2 * T * 10


def test_a_block_touches_no_later_key(monkeypatch):
    """A zero probability times NaN would show."""
    q, k, v = inputs(1, 65, 2, 4, 4)
    v[:, 40:] = float("nan")
    monkeypatch.setattr(module, "SCORE_BYTES", 1)
    assert softmax_attention(q, k, v)[:, :40].isfinite().all()


def test_the_dtype_rule():
    q, k, v = inputs(1, 9, 1, 4, 4, dtype=torch.float16)
    assert softmax_attention(q, k, v).dtype == torch.float32
    assert softmax_attention(q.double(), k, v).dtype == torch.float64


def test_rejects_what_does_not_fit():
    q, k, v = inputs(1, 9, 1, 4, 4)
    for bad in [(q, k[:, :3], v), (q, k, v[:, :3]), (q[0], k[0], v[0]), (q.int(), k, v)]:
        with pytest.raises(ArgumentError, match=r"wanted .* got .*;"):
            softmax_attention(*bad)
