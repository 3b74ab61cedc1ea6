"""Queries and keys of the CHELA layer as a function of PyTorch: operator, autograd, checks.

    q = a_q * s + m_q, k = a_k * s + m_k, s = SiLU(p) or p        saves p, a_q and a_k

Kernels are in queries_keys.py. As gates_ops.py's: [..., K] in float32, bfloat16 or float16, in any
mixture, differentiable once, outputs contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels import queries_keys as shared
from chela_bench.kernels.gates_ops import (
    check_bias,
    check_tensors,
    dtype_of,
    empty,
    empty_bias,
    only,
)
from chela_bench.kernels.operator import Operator


def queries_keys(
    p: Tensor,
    a_q: Tensor,
    m_q: Tensor,
    a_k: Tensor,
    m_k: Tensor,
    *,
    activation: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q = a_q * s + m_q and k = a_k * s + m_k, s = SiLU(p) if activation, else p.

    p [..., K]; a_q, m_q, a_k, m_k [K], of any float dtypes; q, k [..., K] in p's dtype. bias [K] is
    one that p has in already. The same inputs give gradients of the same bits. Raises
    ArgumentError.
    """
    check_tensors({"p": p})
    check_bias("p", p, bias)
    for name, x in (("a_q", a_q), ("m_q", m_q), ("a_k", a_k), ("m_k", m_k)):
        if x.shape != p.shape[-1:] or not x.is_floating_point() or x.device != p.device:
            raise ArgumentError(
                f"wanted {name} [{p.shape[-1]}] of floats on {p.device}, one for each column of p, "
                f"got {list(x.shape)} of {x.dtype} on {x.device}"
            )
    q, k = _queries_keys(p, a_q, m_q, a_k, m_k, bias, activation)
    return q, k


def _queries_keys_forward(
    p: Tensor,
    a_q: Tensor,
    m_q: Tensor,
    a_k: Tensor,
    m_k: Tensor,
    bias: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor]:
    q, k = _queries_keys_outputs(p, a_q, m_q, a_k, m_k, bias, activation)
    shared.queries_keys_forward(p, (a_q, m_q, a_k, m_k), q, k, activation=activation)
    return q, k


def _queries_keys_outputs(
    p: Tensor,
    a_q: Tensor,
    m_q: Tensor,
    a_k: Tensor,
    m_k: Tensor,
    bias: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor]:
    return empty(p), empty(p)


def _queries_keys_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    p, a_q, m_q, a_k, m_k, bias, activation = inputs
    ctx.save_for_backward(p, a_q, a_k)
    ctx.options = activation, m_q.dtype, m_k.dtype, dtype_of(bias)


def _queries_keys_differentiate(
    ctx: Any, dq: Tensor, dk: Tensor, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:6]
    wanted = needed[0], any(needed[1:]), needed[5]
    found = backward(*ctx.saved_tensors, dq, dk, *ctx.options, *wanted)
    return *only(found, needed), None


def _queries_keys_backward(
    p: Tensor,
    a_q: Tensor,
    a_k: Tensor,
    dq: Tensor,
    dk: Tensor,
    activation: bool,
    m_q_dtype: torch.dtype,
    m_k_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    needs_dp: bool,
    needs_sums: bool,
    needs_db: bool,
) -> tuple[Tensor, ...]:
    dp, *sums = found = _queries_keys_gradients(
        p, a_q, a_k, dq, dk, activation, m_q_dtype, m_k_dtype, bias_dtype,
        needs_dp, needs_sums, needs_db,
    )  # fmt: skip
    shared.queries_keys_backward(
        p, a_q, a_k, dq, dk, dp if needs_dp else None,
        sums[: 4 + needs_db] if needs_sums else (), activation=activation,
    )  # fmt: skip
    return found


def _queries_keys_gradients(
    p: Tensor,
    a_q: Tensor,
    a_k: Tensor,
    dq: Tensor,
    dk: Tensor,
    activation: bool,
    m_q_dtype: torch.dtype,
    m_k_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    needs_dp: bool,
    needs_sums: bool,
    needs_db: bool,
) -> tuple[Tensor, ...]:
    """needs_sums: of the parameters; needs_db, which goes with it, of the bias too."""
    dtypes = a_q.dtype, m_q_dtype, a_k.dtype, m_k_dtype
    sums = [empty_bias(p, dtype, wanted=needs_sums) for dtype in dtypes]
    db = empty_bias(p, bias_dtype, wanted=needs_db)
    return empty(p, wanted=needs_dp), *sums, db


_queries_keys = Operator(
    "queries_keys",
    (
        "(Tensor p, Tensor a_q, Tensor m_q, Tensor a_k, Tensor m_k, Tensor? bias, bool activation) "
        "-> (Tensor q, Tensor k)",
        _queries_keys_forward,
        _queries_keys_outputs,
    ),
    (
        "(Tensor p, Tensor a_q, Tensor a_k, Tensor dq, Tensor dk, bool activation, "
        "ScalarType m_q_dtype, ScalarType m_k_dtype, ScalarType bias_dtype, bool needs_dp, "
        "bool needs_sums, bool needs_db) "
        "-> (Tensor dp, Tensor da_q, Tensor dm_q, Tensor da_k, Tensor dm_k, Tensor db)",
        _queries_keys_backward,
        _queries_keys_gradients,
    ),
    _queries_keys_save,
    _queries_keys_differentiate,
)
