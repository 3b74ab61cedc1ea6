"""dq and dk of linear attention from states that walks have kept: for a V of many blocks.

    dq_t = scale * S_t do_t        dk_t = scale * R_t v_t

A sweep (linear_attention_sweep.py) takes V in blocks, and each block writes a part of dq and dk.
Here a program sums over the whole of V, so there are no parts; where it starts from, the walks that
wrote o and dv (linear_attention_walk.py) have kept: S before each window of WINDOW tokens and R
behind it, in the dtype of q. Of a window's halves a and b,

    dQ_a = scale * (dO_a S^T + tril(dO_a V_a^T) K_a)
    dQ_b = scale * (dO_b S^T + tril(dO_b V_b^T) K_b + dO_b V_a^T K_a)
    dK_a = scale * (V_a R^T + triu(V_a dO_a^T) Q_a + V_a dO_b^T Q_b)
    dK_b = scale * (V_b R^T + triu(V_b dO_b^T) Q_b)

A program each; those with three terms are heavy. Grid (4 * windows of all sequences): a window's
four run side by side and share in L2 what they read.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, cdiv, has_wgmma
from chela_bench.kernels.linear_attention_config import (
    RUNTIME,
    WINDOW,
    tile,
)
from chela_bench.kernels.linear_attention_walk import (
    Strides,
    Walk,
    WalkPlan,
    _columns,
    _rows,
    _rows_of,
    precision,
)


@triton.jit(do_not_specialize=RUNTIME)
def _linear_attention_kept_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, before_ptr, behind_ptr,  # pointers
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qh: tl.int64,  # in units of UNIT elements
    stride_kb: tl.int64, stride_kt: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vh: tl.int64,
    stride_ob: tl.int64, stride_ot: tl.int64, stride_oh: tl.int64,  # of do; the others contiguous
    scale, T: tl.int64, H,  # runtime scalars
    K: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,  # dimensions
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,  # tile; half a window
    PRECISION: tl.constexpr,
):  # fmt: skip
    windows = tl.cdiv(T, 2 * BLOCK_T)
    pid = tl.program_id(0).to(tl.int64)
    at, part = pid // 4, pid % 4
    nh, window = at // windows, at % windows
    n, h = nh // H, nh % H
    q_ptr += (n * stride_qb + h * stride_qh) * UNIT
    k_ptr += (n * stride_kb + h * stride_kh) * UNIT
    v_ptr += (n * stride_vb + h * stride_vh) * UNIT
    do_ptr += (n * stride_ob + h * stride_oh) * UNIT
    dq_ptr += (n * T * H + h) * K
    dk_ptr += (n * T * H + h) * K
    before_ptr += at * K * V
    behind_ptr += at * K * V
    a = window * (2 * BLOCK_T)
    b = a + BLOCK_T
    if part == 0:
        _half(
            do_ptr, stride_ot * UNIT, v_ptr, stride_vt * UNIT, k_ptr, stride_kt * UNIT, before_ptr,
            dq_ptr, b, a, T, H, scale, K, V, BLOCK_T, BLOCK_K, BLOCK_V, True, False, PRECISION,
        )  # fmt: skip
    elif part == 1:
        _half(
            v_ptr, stride_vt * UNIT, do_ptr, stride_ot * UNIT, q_ptr, stride_qt * UNIT, behind_ptr,
            dk_ptr, a, b, T, H, scale, K, V, BLOCK_T, BLOCK_K, BLOCK_V, True, True, PRECISION,
        )  # fmt: skip
    elif part == 2:
        _half(
            do_ptr, stride_ot * UNIT, v_ptr, stride_vt * UNIT, k_ptr, stride_kt * UNIT, before_ptr,
            dq_ptr, a, a, T, H, scale, K, V, BLOCK_T, BLOCK_K, BLOCK_V, False, False, PRECISION,
        )  # fmt: skip
    else:
        _half(
            v_ptr, stride_vt * UNIT, do_ptr, stride_ot * UNIT, q_ptr, stride_qt * UNIT, behind_ptr,
            dk_ptr, b, b, T, H, scale, K, V, BLOCK_T, BLOCK_K, BLOCK_V, False, True, PRECISION,
        )  # fmt: skip


@triton.jit
def _half(
    x_ptr, x_stride, y_ptr, y_stride, z_ptr, z_stride, state_ptr, out_ptr,
    own, other, T, H, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, IS_HEAVY: tl.constexpr, IS_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = scale * (X state^T + masked(X Y^T) Z + X Y_other^T Z_other) of the half at `own`; the
    last term if heavy."""
    offs_t = tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k, mask_own, mask_other = offs_k < K, own + offs_t < T, other + offs_t < T
    out = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    scores = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
    others = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
    for first_v in range(0, V, BLOCK_V):
        offs_v = first_v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        x = _rows(x_ptr, x_stride, own, offs_t, offs_v, mask_own, mask_v)
        state = tl.load(
            state_ptr + offs_k[None, :] * V + offs_v[:, None],
            mask=mask_k[None, :] & mask_v[:, None], other=0.0,
        )  # fmt: skip
        y = _columns(y_ptr, y_stride, own, offs_t, offs_v, mask_own, mask_v)
        out = tl.dot(x, state, acc=out, input_precision=PRECISION)
        scores = tl.dot(x, y, acc=scores, input_precision=PRECISION)
        if IS_HEAVY:
            y = _columns(y_ptr, y_stride, other, offs_t, offs_v, mask_other, mask_v)
            others = tl.dot(x, y, acc=others, input_precision=PRECISION)
    if IS_KEY:
        scores = tl.where(offs_t[:, None] <= offs_t[None, :], scores, 0.0)
    else:
        scores = tl.where(offs_t[:, None] >= offs_t[None, :], scores, 0.0)
    z = _rows(z_ptr, z_stride, own, offs_t, offs_k, mask_own, mask_k)
    out = tl.dot(scores.to(z.dtype), z, acc=out, input_precision=PRECISION)
    if IS_HEAVY:
        z = _rows(z_ptr, z_stride, other, offs_t, offs_k, mask_other, mask_k)
        out = tl.dot(others.to(z.dtype), z, acc=out, input_precision=PRECISION)
    tl.store(
        out_ptr + ((own + offs_t) * (H * K))[:, None] + offs_k[None, :],
        (out * scale).to(out_ptr.dtype.element_ty),
        mask=mask_own[:, None] & mask_k[None, :],
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
    variant, programs, scalars = kept_plan(
        q.shape, v.shape[-1], q.stride(), k.stride(), v.stride(), do.stride(), q.dtype, q.device,
        call.scale,
    )  # fmt: skip
    if programs > 0:
        variant(programs, (q, k, v, do, dq, dk, before, behind), scalars)


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
) -> WalkPlan:
    """Every T has its own plan, not its own kernel."""
    B, T, H, K = shape
    unit, strides, _ = _rows_of((q_strides, K), (k_strides, K), (v_strides, V), (do_strides, V))
    wide = dtype == torch.float32
    constants = _kept.constants(
        K=K, V=V, UNIT=unit, BLOCK_T=WINDOW // 2, BLOCK_K=tile(K), BLOCK_V=32 if wide else 64,
        PRECISION=precision(dtype, False)["PRECISION"],
    )  # fmt: skip
    stages = 3 if has_wgmma(device) and not wide else 2
    variant = _kept.variant(constants, 8, stages, device, (dtype,))
    return variant, 4 * B * H * cdiv(T, WINDOW), (*strides, scale, T, H)
