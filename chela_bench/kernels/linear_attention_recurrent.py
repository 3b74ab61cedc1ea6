"""Linear attention token by token: a whole sequence in one kernel, and one step of decoding.

    S_t = S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t

q, k [B, T, H, K]; v, o [B, T, H, V]; S [K, V] in float32. Grid (N * H * cdiv(V, BLOCK_V)): a
program owns BLOCK_V columns of one head's state. A step reads and writes the state once, in place:
8 * K * V bytes a head, and that is its time.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, cdiv
from chela_bench.kernels.linear_attention_config import RUNTIME, SEGMENT_ALIGN, tile
from chela_bench.kernels.linear_attention_walk import Walk, _bounds, rows_of

BLOCK_V = 32


@triton.jit(do_not_specialize=RUNTIME)
def _linear_attention_recurrent_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, initial_ptr, final_ptr, cu_seqlens_ptr,  # pointers
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qh: tl.int64,  # in units of UNIT elements
    stride_kb: tl.int64, stride_kt: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vh: tl.int64,
    stride_ob: tl.int64, stride_ot: tl.int64, stride_oh: tl.int64,
    scale, T: tl.int64, H,  # runtime scalars
    K: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,  # dimensions
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,  # tile
    IS_CAUSAL: tl.constexpr, IS_PACKED: tl.constexpr,
    USE_INITIAL_STATE: tl.constexpr, STORE_FINAL_STATE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0).to(tl.int64)
    pid_v, pid_nh = pid % NV, pid // NV
    n, h = pid_nh // H, pid_nh % H
    b, start, end = _bounds(cu_seqlens_ptr, n, n * 0, 1, 1, T, IS_PACKED, ALIGN)
    q_ptr += (b * stride_qb + h * stride_qh) * UNIT
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT
    v_ptr += (b * stride_vb + h * stride_vh) * UNIT
    o_ptr += (b * stride_ob + h * stride_oh) * UNIT

    offs_k = tl.arange(0, BLOCK_K)
    offs_v = pid_v.to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_k, mask_v = offs_k < K, offs_v < V
    state_offs = pid_nh * K * V + offs_k[:, None] * V + offs_v[None, :]
    state_mask = mask_k[:, None] & mask_v[None, :]
    if USE_INITIAL_STATE:
        state = tl.load(initial_ptr + state_offs, mask=state_mask, other=0.0)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    for i in range(0, tl.maximum(end - start, 0).to(tl.int32)):
        t = start + i
        k = tl.load(k_ptr + t * stride_kt * UNIT + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + t * stride_vt * UNIT + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        state += k[:, None] * v[None, :]
        if IS_CAUSAL:
            q = tl.load(q_ptr + t * stride_qt * UNIT + offs_k, mask=mask_k, other=0.0)
            o = tl.sum(q.to(tl.float32)[:, None] * state, axis=0) * scale  # [BLOCK_V]
            tl.store(
                o_ptr + t * stride_ot * UNIT + offs_v, o.to(o_ptr.dtype.element_ty), mask=mask_v
            )
    if not IS_CAUSAL:
        for i in range(0, tl.maximum(end - start, 0).to(tl.int32)):
            t = start + i
            q = tl.load(q_ptr + t * stride_qt * UNIT + offs_k, mask=mask_k, other=0.0)
            o = tl.sum(q.to(tl.float32)[:, None] * state, axis=0) * scale
            tl.store(
                o_ptr + t * stride_ot * UNIT + offs_v, o.to(o_ptr.dtype.element_ty), mask=mask_v
            )
    if STORE_FINAL_STATE:
        tl.store(final_ptr + state_offs, state, mask=state_mask)


_recurrent = Launcher(_linear_attention_recurrent_kernel)


def recurrent_walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    call: Walk,
    *,
    initial: Tensor | None,
    final: Tensor | None,
) -> None:
    """Writes o, and the last state into `final`. Rows contiguous, states [N, H, K, V]."""
    _, T, H, K = q.shape
    V = v.shape[-1]
    unit, strides, _ = rows_of(q, k, v, o)
    constants = _recurrent_constants(
        K, V, unit, call.causal, call.cu_seqlens is not None, initial is not None, final is not None
    )
    _recurrent(
        call.N * H * cdiv(V, BLOCK_V),
        (q, k, v, o, initial, final, call.cu_seqlens),
        (*strides, call.scale, T, H),
        constants, 4 if K > 64 else 2, 3,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _recurrent_constants(
    K: int, V: int, unit: int, causal: bool, packed: bool, has_initial: bool, has_final: bool
) -> tuple[object, ...]:
    return _recurrent.constants(
        K=K, V=V, UNIT=unit, BLOCK_K=tile(K), BLOCK_V=BLOCK_V, IS_CAUSAL=causal, IS_PACKED=packed,
        USE_INITIAL_STATE=has_initial, STORE_FINAL_STATE=has_final, ALIGN=SEGMENT_ALIGN,
    )  # fmt: skip


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float) -> Tensor:
    """One token: q, k [B, H, K]; v, o [B, H, V]; state [B, H, K, V] updated in place."""
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    return step_of_rows(q, k, v, state, scale).squeeze(1)


def step_of_rows(q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float) -> Tensor:
    """The same of sequences of one token: q, k [B, 1, H, K]; v, o [B, 1, H, V]. Nothing is checked:
    rows contiguous, on the current device."""
    o = v.new_empty(v.shape)
    if o.numel():
        call = Walk(scale, True, None, q.shape[0], 1, 1, False, ())
        recurrent_walk(q, k, v, o, call, initial=state, final=state)
    return o
