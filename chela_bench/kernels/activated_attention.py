"""Linear attention of values that are SiLU(p), for training: of p and v, p alone is kept.

    o = linear_attention(q, k, v)        v = SiLU(p)        dp = dv SiLU'(p)        db = sum dp

Backward, where dq and dk come from states that were kept, the walk for dv does not read v: the pass
that turns dv into dp makes v again on its way, for dq and dk. Bytes an element of v in 16 bits,
besides those of linear attention: forward 4; backward 8, elsewhere 10.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chela_bench.kernels.gates import output_gate_backward, output_gate_forward
from chela_bench.kernels.linear_attention import walk_of
from chela_bench.kernels.linear_attention_ops import forward, gradients_of_activated
from chela_bench.kernels.projections import check_first_derivative


def activated_attention(
    q: Tensor, k: Tensor, p: Tensor, *, causal: bool, bias: Tensor | None = None
) -> Tensor:
    """linear_attention(q, k, SiLU(p), causal=causal)[0], for tensors that nobody watches.

    q, k [B, T, H, K]; p, o [B, T, H, V], p contiguous; in one dtype. bias [H V] is one that p has
    in already (gates_ops.py). Differentiable once. Raises ArgumentError.
    """
    o: Tensor = _Activated.apply(q, k, p, bias, causal)
    return o


class _Activated(torch.autograd.Function):
    """q, k, p, bias, causal -> o."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, p: Tensor, bias: Tensor | None, causal: bool
    ) -> Tensor:
        v = torch.empty_like(p)
        call = walk_of(q, k, v, causal=causal, trained=True)
        output_gate_forward(p, None, None, v)
        o, _, states = forward(q, k, v, None, call, output_final_state=False, keep_states=True)
        ctx.save_for_backward(q, k, p, states)
        ctx.call, ctx.bias_dtype = call, None if bias is None else bias.dtype
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative("linear attention")
        q, k, p, states = ctx.saved_tensors
        v = torch.empty_like(p)
        db = None
        if ctx.needs_input_grad[3]:
            db = p.new_empty(p.shape[-2] * p.shape[-1], dtype=ctx.bias_dtype)
        is_made = False

        def make_values(dv: Tensor | None) -> None:
            nonlocal is_made
            rows = p.flatten(2)
            if dv is None:
                output_gate_forward(rows, None, None, v.flatten(2))
            else:
                dp, value = dv.flatten(2), None if is_made else v.flatten(2)
                output_gate_backward(rows, None, None, dp, dp, None, None, db, None, value)
            is_made = True

        dq, dk, dp = gradients_of_activated(q, k, v, states, do, ctx.call, make_values)
        needed = ctx.needs_input_grad
        return (
            dq if needed[0] else None, dk if needed[1] else None, dp if needed[2] else None, db,
            None,
        )  # fmt: skip
