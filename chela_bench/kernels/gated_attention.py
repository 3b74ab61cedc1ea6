"""Linear attention whose output is gated and measured on its way out, for inference on Hopper.

    m = o act(a)        squares = sum of o^2 over columns of one group of warps

The norm of o scales rows, and so commutes with whatever product of m comes next: it is left to
whoever has the product, from the squares (gates_ops.normed_output_gate). o itself is not written.
Bytes an element in 16 bits besides those of linear attention: 2 (a), where norm and gate take 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela_bench.kernels.dispatch import is_plain
from chela_bench.kernels.launching import cdiv, is_on_gpu
from chela_bench.kernels.linear_attention import walk_of
from chela_bench.kernels.linear_attention_config import MAX_K, tile
from chela_bench.kernels.linear_attention_ops import forward
from chela_bench.kernels.linear_attention_walk import Gate, Walk, walk_by_hand

LEAST = 4096  # tokens in all; of fewer the walk is too short to hide what it does besides
# Of a wide head with 128 keys: two programs on an SM hide each other's sigmoids. 90.5 us for 93.9
# with 128 columns, eight warps and three stages at 1,16384,128,2048; 337 for 343 at 65536, 27.5 for
# 30.2 at 4096 (one H100, Triton 3.6, 2026-11-26).
NARROW = (("BLOCK_V", 64), ("num_stages", 2), ("num_warps", 4))


def gating_walk(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Walk | None:
    """For `gated_attention` of these, or of a v that lies as this one does; None where the walk is
    not one for Hopper or too short, gradients are on, or someone watches."""
    if q.shape[0] * q.shape[1] < LEAST:
        return None
    if torch.is_grad_enabled() or not (causal and is_on_gpu(q) and is_plain(q, k, v)):
        return None
    wide = tile(q.shape[-1]) == 128 and v.shape[-1] > MAX_K
    call = walk_of(q, k, v, causal=True, trained=False, config=NARROW if wide else None)
    if call.forward is None or call.forward[0].launcher is not walk_by_hand():
        return None
    return call


def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, call: Walk, *, activation: str
) -> tuple[Tensor, Tensor]:
    """m [B, T, H V] and squares [B, T, P] float32, of which the sum over P is that of o^2.

    q, k [B, T, H, K]; v [B, T, H, V]; a [B, T, H V], or None for m = o; activation "sigmoid" or
    "silu". `call` is what `gating_walk` said.
    """
    assert call.forward is not None
    B, T, H, V = v.shape
    kernel = call.forward[0]
    parts = cdiv(V, kernel.constant("BLOCK_V")) * kernel.constant("GROUPS")
    squares = v.new_empty(B, T, H * parts, dtype=torch.float32)
    if a is not None:
        a = a.contiguous().unflatten(2, (H, V))
        a = a if a.data_ptr() % 16 == 0 else a.clone()  # it is copied 16 bytes at a time
    gate = Gate(a, squares, activation)
    m, _, _ = forward(q, k, v, None, call, output_final_state=False, keep_states=False, gate=gate)
    return m.flatten(2), squares
