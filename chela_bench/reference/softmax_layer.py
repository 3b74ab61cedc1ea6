"""A layer of causal softmax attention in plain PyTorch: what the CHELA layer is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from chela_bench.errors import ArgumentError
from chela_bench.reference.linear_attention import compute_dtype
from chela_bench.reference.softmax_attention import softmax_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class SoftmaxLayer(nn.Module):
    """x [B, T, D] -> y [B, T, D]: attention with its norm before it and a residual.

        q, k, v = layer_norm(x) W_qkv + b_qkv                   [B, T, 3, H, D / H]
        y = x + softmax_attention(q, k, v) W_o + b_o            causal, scale (D / H)^-1/2

    `attention` takes q, k, v [B, T, H, K] and returns o [B, T, H, K]; unless given it is the
    reference, in float32 (float64 in a float64 module), rounded to x's dtype. No positions are
    encoded: this is for time and memory. Raises ArgumentError if num_heads does not divide D.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        attention: Attention = softmax_attention,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if d_model % num_heads != 0:
            raise ArgumentError(
                f"wanted num_heads that divides d_model = {d_model}, got {num_heads}; "
                "each head takes d_model / num_heads of the width"
            )
        self.num_heads, self.attention = num_heads, attention
        self.norm = nn.LayerNorm(d_model, eps=eps)
        self.w_qkv = nn.Linear(d_model, 3 * d_model)
        self.w_o = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        dtype = compute_dtype(x)
        weight, bias = self.norm.weight.to(dtype), self.norm.bias.to(dtype)
        normed = F.layer_norm(x.to(dtype), (D,), weight, bias, self.norm.eps).to(x.dtype)
        q, k, v = self.w_qkv(normed).view(B, T, 3, self.num_heads, -1).unbind(2)
        o = self.attention(q, k, v).to(x.dtype)
        y: Tensor = x + self.w_o(o.reshape(B, T, D))
        return y
