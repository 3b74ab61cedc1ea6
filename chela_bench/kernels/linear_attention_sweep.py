"""dq, dk and dv of linear attention in one sweep over the tokens, for K and V that fit registers.

    dq_t = scale * S_t do_t        dk_t = scale * R_t v_t        dv_t = scale * R_t^T k_t

S_t = S_{t-1} + k_t v_t^T is the state of the way there, R_t = R_{t+1} + q_t do_t^T that of the way
back (linear_attention_walk.py). Without decay, what lies behind is the whole less what lies before:
a program that starts with both knows R at every token of its segment, and reads q, k, v and do
once, where three walks read them three times. For a chunk of tokens, S before it and R behind it:

    dQ = scale * (tril(dO V^T) K + dO S^T)
    dK = scale * (triu(V dO^T) Q + V R^T)
    dV = scale * (triu(K Q^T) dO + K R)

Grid (N * H * segments): a program keeps S and -R [K, V] of one head in float32 registers. R comes
summed over the segment; a single segment's program sums it itself, before the sweep. Within a
segment the subtraction costs digits: the error of R is that of the sum over the whole segment. So
segments stay short (SWEPT tokens), and S, whose k and v may all be positive, is the one that is
summed up.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher
from chela_bench.kernels.linear_attention_config import sweep_config, tile
from chela_bench.kernels.linear_attention_walk import (
    RUNTIME,
    SEGMENT_ALIGN,
    Walk,
    _bounds,
    _columns,
    _rows,
    precision,
    rows_of,
)

MAX_SWEPT = 128  # K and V
SWEPT = 16384  # tokens in a segment at most


@triton.jit(do_not_specialize=RUNTIME)
def _linear_attention_sweep_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,  # pointers
    before_ptr, behind_ptr, first_ptr, cu_seqlens_ptr,
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qh: tl.int64,  # in units of UNIT elements
    stride_kb: tl.int64, stride_kt: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vh: tl.int64,
    stride_ob: tl.int64, stride_ot: tl.int64, stride_oh: tl.int64,  # of do; the others contiguous
    scale, T: tl.int64, H, segments,  # runtime scalars
    K: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,  # dimensions
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,  # tile
    IS_PACKED: tl.constexpr, USE_BEFORE: tl.constexpr, USE_BEHIND: tl.constexpr,
    SUM_BEHIND: tl.constexpr, STORE_FIRST: tl.constexpr, ALIGN: tl.constexpr,
    UPCAST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    pid_s, pid_nh = pid % segments, pid // segments
    n, h = pid_nh // H, pid_nh % H
    b, start, end = _bounds(cu_seqlens_ptr, n, pid_s, segments, T, IS_PACKED, ALIGN)
    q_ptr += (b * stride_qb + h * stride_qh) * UNIT
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT
    v_ptr += (b * stride_vb + h * stride_vh) * UNIT
    do_ptr += (b * stride_ob + h * stride_oh) * UNIT
    dq_ptr += (b * T * H + h) * K
    dk_ptr += (b * T * H + h) * K
    dv_ptr += (b * T * H + h) * V

    offs_t = tl.arange(0, BLOCK_T)
    offs_k, offs_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    mask_k, mask_v = offs_k < K, offs_v < V
    state_offs = pid * K * V + offs_k[:, None] * V + offs_v[None, :]
    state_mask = mask_k[:, None] & mask_v[None, :]
    if USE_BEFORE:
        before = tl.load(before_ptr + state_offs, mask=state_mask, other=0.0)
    else:
        before = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    if USE_BEHIND:
        minus_behind = -tl.load(behind_ptr + state_offs, mask=state_mask, other=0.0)
    else:
        minus_behind = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    chunks = tl.cdiv(tl.maximum(end - start, 0), BLOCK_T).to(tl.int32)
    if SUM_BEHIND:
        behind = -minus_behind
        for i in range(0, chunks):
            t = start + i * BLOCK_T
            mask_t = t + offs_t < end
            q_t = _columns(q_ptr, stride_qt * UNIT, t, offs_t, offs_k, mask_t, mask_k)
            do = _rows(do_ptr, stride_ot * UNIT, t, offs_t, offs_v, mask_t, mask_v)
            if UPCAST:
                q_t, do = q_t.to(tl.float32), do.to(tl.float32)
            behind = tl.dot(q_t, do, acc=behind, input_precision=PRECISION)
        minus_behind = -behind
    if STORE_FIRST:
        tl.store(first_ptr + state_offs, -minus_behind, mask=state_mask)

    upper = offs_t[:, None] <= offs_t[None, :]
    for i in range(0, chunks):
        t = start + i * BLOCK_T
        mask_t = t + offs_t < end
        q = _rows(q_ptr, stride_qt * UNIT, t, offs_t, offs_k, mask_t, mask_k)
        k = _rows(k_ptr, stride_kt * UNIT, t, offs_t, offs_k, mask_t, mask_k)
        v = _rows(v_ptr, stride_vt * UNIT, t, offs_t, offs_v, mask_t, mask_v)
        do = _rows(do_ptr, stride_ot * UNIT, t, offs_t, offs_v, mask_t, mask_v)
        if UPCAST or WIDEN:
            q, k, v, do = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32), do.to(tl.float32)

        scores = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [queries, keys]
        scores = tl.where(offs_t[:, None] >= offs_t[None, :], scores, 0.0).to(q.dtype)
        dq = tl.dot(scores, k, input_precision=PRECISION)
        dq = tl.dot(do, tl.trans(before.to(q.dtype)), acc=dq, input_precision=PRECISION)
        _store_rows(dq_ptr, H * K, t, offs_t, offs_k, mask_t, mask_k, dq * scale)

        minus_behind = tl.dot(tl.trans(q), do, acc=minus_behind, input_precision=PRECISION)
        r = (-minus_behind).to(q.dtype)
        # The transposes of the scores as products of their own, not as tl.trans of accumulators.
        scores = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [keys, queries]
        scores = tl.where(upper, scores, 0.0).to(q.dtype)
        dk = tl.dot(scores, q, input_precision=PRECISION)
        dk = tl.dot(v, tl.trans(r), acc=dk, input_precision=PRECISION)
        _store_rows(dk_ptr, H * K, t, offs_t, offs_k, mask_t, mask_k, dk * scale)

        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [keys, queries]
        scores = tl.where(upper, scores, 0.0).to(q.dtype)
        dv = tl.dot(scores, do, input_precision=PRECISION)
        dv = tl.dot(k, r, acc=dv, input_precision=PRECISION)
        _store_rows(dv_ptr, H * V, t, offs_t, offs_v, mask_t, mask_v, dv * scale)

        before = tl.dot(tl.trans(k), v, acc=before, input_precision=PRECISION)


@triton.jit
def _store_rows(ptr, stride, t, offs_t, offs_c, mask_t, mask_c, rows):
    tl.store(
        ptr + ((t + offs_t) * stride)[:, None] + offs_c[None, :],
        rows.to(ptr.dtype.element_ty),
        mask=mask_t[:, None] & mask_c[None, :],
    )


_sweep = Launcher(_linear_attention_sweep_kernel)


def sweep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    call: Walk,
    *,
    before: Tensor | None,
    behind: Tensor | None,
    first: Tensor | None,
) -> None:
    """Writes dq, dk, dv, which are contiguous; rows of the others are.

    q, k [B, T, H, K]; v, do [B, T, H, V]; K, V <= MAX_SWEPT. States [N, H, segments, K, V] in
    float32: S before each segment (none: zero); R at the start of each of several segments, or
    behind a single one (none: zero), whose R at its first token goes into `first`, if given.
    """
    _, T, H, K = q.shape
    V = v.shape[-1]
    unit, strides = rows_of(q, k, v, do)
    constants, num_warps, num_stages = _sweep_plan(
        K, V, unit, q.dtype, call.precise, call.cu_seqlens is not None,
        before is not None, behind is not None, call.segments == 1, first is not None,
    )  # fmt: skip
    _sweep(
        call.N * H * call.segments,
        (q, k, v, do, dq, dk, dv, before, behind, first, call.cu_seqlens),
        (*strides, call.scale, T, H, call.segments),
        constants, num_warps, num_stages,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _sweep_plan(
    K: int,
    V: int,
    unit: int,
    dtype: torch.dtype,
    precise: bool,
    packed: bool,
    has_before: bool,
    has_behind: bool,
    sums: bool,
    has_first: bool,
) -> tuple[tuple[object, ...], int, int]:
    """The sweep's constants, num_warps and num_stages."""
    config = sweep_config(K, V)
    constants = _sweep.constants(
        K=K, V=V, UNIT=unit, BLOCK_T=config["BLOCK_T"], BLOCK_K=tile(K), BLOCK_V=tile(V),
        IS_PACKED=packed, USE_BEFORE=has_before, USE_BEHIND=has_behind, SUM_BEHIND=sums,
        STORE_FIRST=has_first, ALIGN=SEGMENT_ALIGN, **precision(dtype, precise),
    )  # fmt: skip
    return constants, config["num_warps"], config["num_stages"]
