"""The layer in float16 over 65536 tokens whose attention adds up all one way, past 65504.

    o_t = scale * q_t^T (k_1 v_1^T + ... + k_t v_t^T)       grows as t where tokens are alike
    o_t / sqrt(t)                                           as 256, which float16 holds
    m_t = norm_rms(o_t)                                     is of size 1 whatever o_t was shrunk by

The reference keeps o in float32 up to m. Triton's kernels shrink q by a power of two near 1 /
sqrt(t), for what they write is in float16.
"""

from __future__ import annotations

import pytest
import torch

from chela_bench.bench.check import error_of
from chela_bench.kernels.chela import ChelaLayer
from chela_bench.reference import chela as reference
from tests.attention import DEVICE
from tests.test_kernel_chela import BUDGET, results

T = 65536
LARGEST = torch.finfo(torch.float16).max
SIDES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])


class Recording(reference.ChelaLayer):
    """It keeps what its attention gave."""

    def _attention(self, q, k, v):
        self.o = super()._attention(q, k, v)
        return self.o


def coherent(made, D, **options):
    """A layer whose keys and queries are all near 3, and tokens alike."""
    torch.manual_seed(0)
    layer = made(D, max_length=T, **options).to(DEVICE)
    layer.m_q.data += 3
    layer.m_k.data += 3
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 1, T, D, generator=generator).half().to(DEVICE)
    return layer.half(), x, dy


def exactly(layer, made=reference.ChelaLayer, **options):
    exact = made(layer.d_model, max_length=T, **options).to(DEVICE)
    exact.load_state_dict(layer.state_dict())
    return exact.double()


@SIDES
def test_the_attention_grows_past_float16_and_shrunk_it_does_not(causal):
    options = {"d_key": 4, "causal": causal}
    layer, x, _ = coherent(ChelaLayer, 4, implementation="triton", **options)
    exact = exactly(layer, Recording, **options)
    with torch.no_grad():
        exact(x.double())
    assert exact.o.abs().max() > LARGEST
    shrink = layer._shrink(x, 0)
    assert (exact.o * shrink[:, None, None]).abs().max() < LARGEST / 16
    for tokens in (1, 2, 3, 4, 5, 8, 1000, T):  # a power of two, near 1 / sqrt
        seen = tokens if causal else T
        factor = shrink[tokens - 1].item()
        assert 0.7 < factor * seen**0.5 < 1.5 and factor.hex().startswith("0x1.0000000000000p")
    if causal:
        step = (
            layer._shrink(x[:, :1], T - 1),
            layer._shrink(x[:, :1], x.new_tensor([T - 1], dtype=torch.long)),
        )
        assert step[0] == step[1] == shrink[-1:]


@SIDES
@pytest.mark.parametrize(
    ("made", "D", "K"),
    [
        (reference.ChelaLayer, 4, 4),
        pytest.param(ChelaLayer, 64, 32, marks=pytest.mark.gpu),
        pytest.param(ChelaLayer, 256, 128, marks=pytest.mark.gpu),
    ],
    ids=["reference", "triton", "triton-wide"],
)
def test_output_and_gradients_stay_finite(made, D, K, causal):
    options = {"d_key": K, "causal": causal}
    chosen = {"implementation": "triton"} if made is ChelaLayer else {}
    layer, x, dy = coherent(made, D, **chosen, **options)
    found = results(layer, x, dy)
    assert all(g.isfinite().all() for g in found.values())
    with torch.no_grad():
        right = exactly(layer, **options)(x.double())
    assert error_of(found["y"], right, "tokens") <= BUDGET[torch.float16]
