"""A layer of causal softmax attention in plain PyTorch: what the CHELA layer is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from chela_bench.errors import ArgumentError
from chela_bench.reference.linear_attention import compute_dtype
from chela_bench.reference.softmax_attention import softmax_attention, softmax_attention_step

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class KvCache:
    """Keys and values of the `tokens` tokens so far, with room for N."""

    k: Tensor  # [B, H, N, K]
    v: Tensor  # [B, H, N, K]
    tokens: int


class SoftmaxLayer(nn.Module):
    """x [B, T, D] -> y [B, T, D]: attention with its norm before it and a residual.

        q, k, v = layer_norm(x) W_qkv + b_qkv                   [B, T, 3, H, D / H]
        y = x + softmax_attention(q, k, v) W_o + b_o            causal, scale (D / H)^-1/2

    `attention` takes q, k, v [B, T, H, K] and returns o [B, T, H, K]; unless given it is the
    reference, in float32 (float64 in a float64 module), rounded to x's dtype. No positions are
    encoded: this is for time and memory. Raises ArgumentError if num_heads does not divide D.

    Token by token: `cache` of a prompt, then `step`, whose `step_attention` takes q [B, H, K] and
    k, v [B, H, L, K], the cache up to the token itself, and returns o [B, H, K].
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        attention: Attention = softmax_attention,
        step_attention: Attention = softmax_attention_step,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if d_model % num_heads != 0:
            raise ArgumentError(
                f"wanted num_heads that divides d_model = {d_model}, got {num_heads}; "
                "each head takes d_model / num_heads of the width"
            )
        self.num_heads = num_heads
        self.attention, self.step_attention = attention, step_attention
        self.norm = nn.LayerNorm(d_model, eps=eps)
        self.w_qkv = nn.Linear(d_model, 3 * d_model)
        self.w_o = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._queries_keys_values(x)
        return self._output(x, self.attention(q, k, v))

    def cache(self, x: Tensor, max_length: int) -> KvCache:
        """Keys and values of a prompt x [B, T, D], with room for max_length tokens in all.

        Raises ArgumentError if the prompt is longer.
        """
        B, T, D = x.shape
        if max_length < T:
            raise ArgumentError(
                f"wanted at most max_length = {max_length} tokens, got {T}; make room for more"
            )
        _, k, v = self._queries_keys_values(x)
        size = (B, self.num_heads, max_length, D // self.num_heads)
        made = KvCache(k.new_zeros(size), v.new_zeros(size), T)
        made.k[:, :, :T], made.v[:, :, :T] = k.transpose(1, 2), v.transpose(1, 2)
        return made

    def step(self, x: Tensor, cache: KvCache) -> Tensor:
        """y [B, D] of the next token x [B, D], which goes into the cache.

        Raises ArgumentError if the cache is full.
        """
        seen = cache.tokens + 1
        if seen > cache.k.shape[2]:
            raise ArgumentError(
                f"the cache is full with {cache.tokens} tokens; make one with a larger max_length"
            )
        q, cache.k[:, :, seen - 1], cache.v[:, :, seen - 1] = self._queries_keys_values(x)
        cache.tokens = seen
        o = self.step_attention(q, cache.k[:, :, :seen], cache.v[:, :, :seen])
        return self._output(x, o)

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] -> q, k, v [..., H, D / H]."""
        dtype = compute_dtype(x)
        weight, bias = self.norm.weight.to(dtype), self.norm.bias.to(dtype)
        normed = F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, self.norm.eps).to(x.dtype)
        q, k, v = self.w_qkv(normed).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return q, k, v

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        y: Tensor = x + self.w_o(o.to(x.dtype).reshape(x.shape))
        return y
