"""reference/softmax_layer.py against torch's own attention layer."""

import pytest
import torch
import torch.nn.functional as F

from chela_bench.errors import ArgumentError
from chela_bench.reference.softmax_layer import SoftmaxLayer


def layer(**options):
    torch.manual_seed(0)
    return SoftmaxLayer(12, 3, **options).double()


def test_is_torchs_attention_layer():
    ours, theirs = layer(), torch.nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.w_qkv.weight, ours.w_qkv.bias
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.w_o.weight, ours.w_o.bias
    torch.nn.init.normal_(ours.norm.weight)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    u = F.layer_norm(x, (12,), ours.norm.weight, ours.norm.bias)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    exact, _ = theirs(u, u, u, attn_mask=mask, is_causal=True, need_weights=False)
    torch.testing.assert_close(ours(x), x + exact)


def test_another_attention_takes_its_place():
    calls = []

    def first(q, k, v):
        calls.append([*q.shape])
        return v

    m = layer(attention=first)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    v = m.w_qkv(F.layer_norm(x, (12,), m.norm.weight, m.norm.bias))[..., 24:]
    torch.testing.assert_close(m(x), x + m.w_o(v))
    assert calls == [[2, 9, 3, 4]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_the_dtype_and_is_near_float64(dtype):
    exact, x = layer(), torch.randn(2, 30, 12, dtype=dtype)
    y = layer().to(dtype)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=0, atol=0.05)


def test_rejects_heads_that_do_not_divide():
    with pytest.raises(ArgumentError, match="num_heads that divides d_model = 12, got 5"):
        SoftmaxLayer(12, 5)
