"""dq and dk of linear attention from states that walks have kept: for a V of many blocks.

    dq_t = scale * S_t do_t        dk_t = scale * R_t v_t

A sweep (linear_attention_sweep.py) takes V in blocks, and each block writes a part of dq and dk.
Here a program sums over the whole of V, so there are no parts; where it starts from, the walks that
wrote o and dv (linear_attention_walk.py) have kept: S before each window of WINDOW tokens and R
behind it, in the dtype of q. Of a window's halves a and b,

    dQ_a = scale * (dO_a S^T + P_aa K_a)                    P_aa = tril(dO_a V_a^T)
    dQ_b = scale * (dO_b S^T + P_bb K_b + P_ba K_a)         P_bb = tril(dO_b V_b^T)
    dK_a = scale * (V_a R^T + P_aa^T Q_a + P_ba^T Q_b)      P_ba = dO_b V_a^T
    dK_b = scale * (V_b R^T + P_bb^T Q_b)

A first kernel gives dQ and the scores P, which are a hundredth of what it reads; a second dK. Grid
of each (2 * N * H * windows).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, Variant
from chela_bench.kernels.linear_attention_config import WINDOW, cdiv, has_wgmma, tile
from chela_bench.kernels.linear_attention_walk import (
    Strides,
    Walk,
    _columns,
    _rows,
    _rows_of,
    precision,
)

HALF = tl.constexpr(WINDOW // 2)  # tokens
_RUNTIME = ["T", "H", "scale", *(f"stride_{x}{axis}" for x in "xyz" for axis in "bth")]


@triton.jit(do_not_specialize=_RUNTIME)
def _linear_attention_kept_kernel(
    x_ptr, y_ptr, z_ptr, states_ptr, scores_ptr, out_ptr,  # dO, V, K, S, P, dQ; or V, -, Q, R, P, dK
    stride_xb: tl.int64, stride_xt: tl.int64, stride_xh: tl.int64,  # in units of UNIT elements
    stride_yb: tl.int64, stride_yt: tl.int64, stride_yh: tl.int64,
    stride_zb: tl.int64, stride_zt: tl.int64, stride_zh: tl.int64,
    scale, T: tl.int64, H,  # runtime scalars
    K: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,  # dimensions
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,  # tile
    IS_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    at, is_late = pid // 2, pid % 2 == 0
    windows = tl.cdiv(T, 2 * HALF)
    nh, start = at // windows, at % windows * (2 * HALF)
    n, h = nh // H, nh % H
    x_ptr += (n * stride_xb + h * stride_xh) * UNIT
    y_ptr += (n * stride_yb + h * stride_yh) * UNIT
    z_ptr += (n * stride_zb + h * stride_zh) * UNIT
    out_ptr += (n * T * H + h) * K
    states_ptr += at * K * V
    scores_ptr += at * (3 * HALF * HALF)  # P_aa, P_bb, P_ba
    if IS_KEY:
        _keys(
            x_ptr, stride_xt * UNIT, z_ptr, stride_zt * UNIT, states_ptr, scores_ptr, out_ptr,
            start, is_late, T, H, scale, K, V, BLOCK_K, BLOCK_V, PRECISION,
        )  # fmt: skip
    elif is_late:
        _queries(
            x_ptr, stride_xt * UNIT, y_ptr, stride_yt * UNIT, z_ptr, stride_zt * UNIT, states_ptr,
            scores_ptr, out_ptr, start, T, H, scale, K, V, BLOCK_K, BLOCK_V, True, PRECISION,
        )  # fmt: skip
    else:
        _queries(
            x_ptr, stride_xt * UNIT, y_ptr, stride_yt * UNIT, z_ptr, stride_zt * UNIT, states_ptr,
            scores_ptr, out_ptr, start, T, H, scale, K, V, BLOCK_K, BLOCK_V, False, PRECISION,
        )  # fmt: skip


@triton.jit
def _queries(
    do_ptr, do_stride, v_ptr, v_stride, k_ptr, k_stride, states_ptr, scores_ptr, dq_ptr,
    start, T, H, scale, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, IS_LATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one half, and its scores; the later half's with keys of the earlier one too."""
    offs_t, offs_k = tl.arange(0, HALF), tl.arange(0, BLOCK_K)
    own = start + HALF if IS_LATE else start
    mask_k, mask_own, mask_a = offs_k < K, own + offs_t < T, start + offs_t < T
    dq = tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
    p = tl.zeros([HALF, HALF], dtype=tl.float32)
    p_ba = tl.zeros([HALF, HALF], dtype=tl.float32)
    for first_v in range(0, V, BLOCK_V):
        offs_v = first_v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        do = _rows(do_ptr, do_stride, own, offs_t, offs_v, mask_own, mask_v)
        s = _state(states_ptr, offs_k, offs_v, mask_k, mask_v, V)
        v = _columns(v_ptr, v_stride, own, offs_t, offs_v, mask_own, mask_v)
        dq = tl.dot(do, s, acc=dq, input_precision=PRECISION)
        p = tl.dot(do, v, acc=p, input_precision=PRECISION)
        if IS_LATE:
            v_a = _columns(v_ptr, v_stride, start, offs_t, offs_v, mask_a, mask_v)
            p_ba = tl.dot(do, v_a, acc=p_ba, input_precision=PRECISION)
    square = offs_t[:, None] * HALF + offs_t[None, :]
    p = tl.where(offs_t[:, None] >= offs_t[None, :], p, 0.0).to(dq_ptr.dtype.element_ty)
    tl.store(scores_ptr + (HALF * HALF if IS_LATE else 0) + square, p)
    k = _rows(k_ptr, k_stride, own, offs_t, offs_k, mask_own, mask_k)
    dq = tl.dot(p, k, acc=dq, input_precision=PRECISION)
    if IS_LATE:
        p = p_ba.to(dq_ptr.dtype.element_ty)
        tl.store(scores_ptr + 2 * HALF * HALF + square, p)
        k = _rows(k_ptr, k_stride, start, offs_t, offs_k, mask_a, mask_k)
        dq = tl.dot(p, k, acc=dq, input_precision=PRECISION)
    _store(dq_ptr, dq * scale, own, offs_t, offs_k, mask_own, mask_k, H * K)


@triton.jit
def _keys(
    v_ptr, v_stride, q_ptr, q_stride, states_ptr, scores_ptr, dk_ptr,
    start, is_late, T, H, scale, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK of one half. From the last columns, which L2 may still hold, to the first."""
    offs_t, offs_k = tl.arange(0, HALF), tl.arange(0, BLOCK_K)
    late = start + HALF
    own = tl.where(is_late, late, start)
    mask_k, mask_own = offs_k < K, own + offs_t < T
    dk = tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
    for i in range(0, V, BLOCK_V):
        offs_v = (V - 1) // BLOCK_V * BLOCK_V - i + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        v = _rows(v_ptr, v_stride, own, offs_t, offs_v, mask_own, mask_v)
        r = _state(states_ptr, offs_k, offs_v, mask_k, mask_v, V)
        dk = tl.dot(v, r, acc=dk, input_precision=PRECISION)
    square = offs_t[:, None] + offs_t[None, :] * HALF  # transposed
    p = tl.load(scores_ptr + tl.where(is_late, HALF * HALF, 0) + square)
    q = _rows(q_ptr, q_stride, own, offs_t, offs_k, mask_own, mask_k)
    dk = tl.dot(p, q, acc=dk, input_precision=PRECISION)
    if not is_late:
        p = tl.load(scores_ptr + 2 * HALF * HALF + square)
        q = _rows(q_ptr, q_stride, late, offs_t, offs_k, late + offs_t < T, mask_k)
        dk = tl.dot(p, q, acc=dk, input_precision=PRECISION)
    _store(dk_ptr, dk * scale, own, offs_t, offs_k, mask_own, mask_k, H * K)


@triton.jit
def _state(ptr, offs_k, offs_v, mask_k, mask_v, V: tl.constexpr):
    """[BLOCK_V, BLOCK_K] of a state [K, V]."""
    offs = offs_k[None, :] * V + offs_v[:, None]
    return tl.load(ptr + offs, mask=mask_k[None, :] & mask_v[:, None], other=0.0)


@triton.jit
def _store(ptr, rows, t, offs_t, offs_k, mask_t, mask_k, stride):
    tl.store(
        ptr + ((t + offs_t) * stride)[:, None] + offs_k[None, :],
        rows.to(ptr.dtype.element_ty),
        mask=mask_t[:, None] & mask_k[None, :],
    )


_kept = Launcher(_linear_attention_kept_kernel)


def gradients_of_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dq: Tensor,
    dk: Tensor,
    call: Walk,
    before: Tensor,
    behind: Tensor,
) -> None:
    """Writes dq and dk, which are contiguous; rows of q, k [B, T, H, K] and v, do [B, T, H, V] are.
    `before` and `behind` [B, H, windows, K, V] in their dtype are what walks have kept."""
    plan = kept_plan(
        q.shape, v.shape[-1], q.stride(), k.stride(), v.stride(), do.stride(), q.dtype, q.device,
        call.scale,
    )  # fmt: skip
    if plan.programs > 0:
        scores = q.new_empty(*before.shape[:3], 3, WINDOW // 2, WINDOW // 2)
        tensors = (do, v, k, before, scores, dq), (v, v, q, behind, scores, dk)
        for variant, given, scalars in zip(plan.variants, tensors, plan.scalars, strict=True):
            variant(plan.programs, given, scalars)


class Plan(NamedTuple):
    """Of both kernels."""

    variants: tuple[Variant, ...]
    programs: int
    scalars: tuple[tuple[int | float, ...], ...]


@functools.lru_cache(maxsize=4096)
def kept_plan(
    shape: torch.Size,
    V: int,
    q_strides: Strides,
    k_strides: Strides,
    v_strides: Strides,
    do_strides: Strides,
    dtype: torch.dtype,
    device: torch.device,
    scale: float,
) -> Plan:
    """Every T has its own plan, not its own kernels."""
    B, T, H, K = shape
    unit, strides, _ = _rows_of((q_strides, K), (k_strides, K), (v_strides, V), (do_strides, V))
    of_q, of_k, of_v, of_do = strides[:3], strides[3:6], strides[6:9], strides[9:]
    wide = dtype == torch.float32
    roomy = has_wgmma(device) and not wide
    variants = []
    for is_key, stages in ((False, 3 if roomy else 2), (True, 5 if roomy else 3)):
        constants = _kept.constants(
            K=K, V=V, UNIT=unit, BLOCK_K=tile(K), BLOCK_V=32 if wide else 64, IS_KEY=is_key,
            PRECISION=precision(dtype, False)["PRECISION"],
        )  # fmt: skip
        variants.append(_kept.variant(constants, 8, stages, device, (dtype,)))
    sizes = (scale, T, H)
    scalars = (*of_do, *of_v, *of_k, *sizes), (*of_v, *of_v, *of_q, *sizes)
    return Plan(tuple(variants), 2 * B * H * cdiv(T, WINDOW), scalars)
