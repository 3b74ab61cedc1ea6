"""A walk over keys too wide for registers, chunk by chunk in parallel: dq and dk where V > 256.

    o_t = scale * (S_t^T q_t)          q, k [B, T, H, K], any K; v, o [B, T, H, V], V <= 256

A state [K, V] does not fit a program, so the states at the borders of short segments are kept in
memory (linear_attention_walk.segment_states), and a program computes BLOCK_T rows of o, K a slice
at a time:

    O = scale * (Q S + sum over earlier tiles of the segment of (Q K^T) V, the last one masked)

A segment of L tokens reads K * V numbers of states for its L * K of keys, and multiplies
L * L / 2 * (K + V) times: L of a few hundred keeps both small.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher
from chela_bench.kernels.linear_attention_config import tile, wide_config
from chela_bench.kernels.linear_attention_walk import (
    RUNTIME,
    SEGMENT_ALIGN,
    Walk,
    _bounds,
    _columns,
    _rows,
    _state_offsets,
    precision,
    rows_of,
)

SEGMENT = 256  # tokens between states kept
PARTS = 4  # programs that share a segment's rows


@triton.jit(do_not_specialize=RUNTIME)
def _linear_attention_wide_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, states_ptr, cu_seqlens_ptr,  # pointers
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qh: tl.int64,  # in units of UNIT elements
    stride_kb: tl.int64, stride_kt: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vh: tl.int64,
    stride_ob: tl.int64, stride_ot: tl.int64, stride_oh: tl.int64,
    scale, T: tl.int64, H, segments,  # runtime scalars
    K: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,  # dimensions
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,  # tile
    PARTS: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_REVERSED: tl.constexpr,
    IS_PACKED: tl.constexpr, STATE_IS_TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr,
    UPCAST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    part, pid_s, pid_nh = pid % PARTS, pid // PARTS % segments, pid // PARTS // segments
    n, h = pid_nh // H, pid_nh % H
    b, start, end = _bounds(cu_seqlens_ptr, n, pid_s, segments, T, IS_PACKED, ALIGN)
    q_ptr += (b * stride_qb + h * stride_qh) * UNIT
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT
    v_ptr += (b * stride_vb + h * stride_vh) * UNIT
    o_ptr += (b * stride_ob + h * stride_oh) * UNIT
    if IS_CAUSAL:
        states_ptr += (pid_nh * segments + pid_s) * K * V
    else:
        states_ptr += pid_nh * K * V

    offs_t = tl.arange(0, BLOCK_T)
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    chunks = tl.cdiv(tl.maximum(end - start, 0), BLOCK_T).to(tl.int32)
    for i in range(part.to(tl.int32), chunks, PARTS):
        t = start + i * BLOCK_T
        mask_t = t + offs_t < end
        o = tl.zeros([BLOCK_T, BLOCK_V], dtype=tl.float32)
        for first_k in range(0, K, BLOCK_K):
            offs_k = first_k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            q = _rows(q_ptr, stride_qt * UNIT, t, offs_t, offs_k, mask_t, mask_k)
            state = tl.load(
                states_ptr + _state_offsets(offs_k, offs_v, K, V, STATE_IS_TRANSPOSED),
                mask=mask_k[:, None] & mask_v[None, :],
                other=0.0,
            )
            if UPCAST or WIDEN:
                q = q.to(tl.float32)
            o = tl.dot(q, state.to(q.dtype), acc=o, input_precision=PRECISION)
        if IS_CAUSAL:
            for j in range(i if IS_REVERSED else 0, chunks if IS_REVERSED else i + 1):
                s = start + j * BLOCK_T
                mask_s = s + offs_t < end
                scores = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
                for first_k in range(0, K, BLOCK_K):
                    offs_k = first_k + tl.arange(0, BLOCK_K)
                    mask_k = offs_k < K
                    q = _rows(q_ptr, stride_qt * UNIT, t, offs_t, offs_k, mask_t, mask_k)
                    k_t = _columns(k_ptr, stride_kt * UNIT, s, offs_t, offs_k, mask_s, mask_k)
                    if UPCAST:
                        q, k_t = q.to(tl.float32), k_t.to(tl.float32)
                    scores = tl.dot(q, k_t, acc=scores, input_precision=PRECISION)
                if IS_REVERSED:
                    scores = tl.where((t + offs_t)[:, None] <= (s + offs_t)[None, :], scores, 0.0)
                else:
                    scores = tl.where((t + offs_t)[:, None] >= (s + offs_t)[None, :], scores, 0.0)
                v = _rows(v_ptr, stride_vt * UNIT, s, offs_t, offs_v, mask_s, mask_v)
                if UPCAST or WIDEN:
                    v = v.to(tl.float32)
                o = tl.dot(scores.to(v.dtype), v, acc=o, input_precision=PRECISION)
        tl.store(
            o_ptr + ((t + offs_t) * stride_ot * UNIT)[:, None] + offs_v[None, :],
            (o * scale).to(o_ptr.dtype.element_ty),
            mask=mask_t[:, None] & mask_v[None, :],
        )


_wide = Launcher(_linear_attention_wide_kernel)


def wide_walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    call: Walk,
    *,
    initial: Tensor | None = None,
    transposed: bool = False,
    reverse: bool = False,
) -> None:
    """Writes o. `initial` as in `walk`: a state for each segment, or two-sided one for all."""
    _, T, H, K = q.shape
    V = v.shape[-1]
    if initial is None:
        initial = q.new_zeros(call.N, H, K, V, dtype=torch.float32)
    unit, strides = rows_of(q, k, v, o)
    config = wide_config(q.dtype)
    constants = _wide.constants(
        K=K, V=V, UNIT=unit, BLOCK_T=config["BLOCK_T"], BLOCK_K=config["BLOCK_K"], BLOCK_V=tile(V),
        PARTS=PARTS, IS_CAUSAL=call.causal, IS_REVERSED=reverse,
        IS_PACKED=call.cu_seqlens is not None, STATE_IS_TRANSPOSED=transposed, ALIGN=SEGMENT_ALIGN,
        **precision(q.dtype, call.precise),
    )  # fmt: skip
    _wide(
        call.N * H * call.segments * PARTS,
        (q, k, v, o, initial, call.cu_seqlens),
        (*strides, call.scale, T, H, call.segments),
        constants, config["num_warps"], config["num_stages"],
    )  # fmt: skip


def wide_segments(tokens: int) -> int:
    """Segments of sequences of so many tokens on average: about a state every SEGMENT tokens."""
    return max(1, -(-tokens // SEGMENT))
