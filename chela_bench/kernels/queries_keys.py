"""Queries and keys of the CHELA layer from their shared projection, in a pass over memory.

    q = a_q * s + m_q     k = a_k * s + m_k     s = SiLU(p), or p
    dp = (a_q dq + a_k dk) s'(p)     da_q = sum_r dq s     dm_q = sum_r dq     likewise a_k and m_k
    db = sum_r dp, of the bias that p came with

p, q, k [..., K], R rows; parameters [K]. Forward, a program owns a tile: grid (ceil(R / rows) *
ceil(K / columns)). Backward, each program walks over some tiles of its columns and keeps sums in
registers (row_sums.py): grid (walks * ceil(K / columns)). Bytes an element in 16 bits: forward 6,
backward 8, and 20 K a walk for its sums, written and read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, cdiv, on_device_of
from chela_bench.kernels.row_sums import WALKED, new_parts, sum_parts, walks_of
from chela_bench.kernels.rows import _activated, _load, _mask, _store, rows_of, tile

TILE = 2048  # elements of 4 warps: two vectors of 16 bytes a thread, in 16 bits
WALKS = 2  # programs on a processor: K is narrow, and five sums cost each of them
RUNTIME = ["R", "walks", "stride_p", "stride_dq", "stride_dk"]


@triton.jit
def _parameter(ptr, n, N: tl.constexpr):
    return tl.load(ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=RUNTIME)
def _queries_keys_fwd_kernel(
    p_ptr, a_q_ptr, m_q_ptr, a_k_ptr, m_k_ptr, q_ptr, k_ptr,  # [R, K], parameters [K]
    stride_p: tl.int64, R: tl.int64,  # stride in units of UNIT
    K: tl.constexpr, ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    NB: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0).to(tl.int64)
    r = pid // NB * BLOCK_R + tl.arange(0, BLOCK_R)
    n = (pid % NB).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = _mask(r, n, R, K)
    s, _ = _activated(_load(p_ptr, r, n, stride_p * UNIT, mask), ACTIVATION)
    q = _parameter(a_q_ptr, n, K) * s + _parameter(m_q_ptr, n, K)
    k = _parameter(a_k_ptr, n, K) * s + _parameter(m_k_ptr, n, K)
    _store(q_ptr, r, n, K, mask, q)
    _store(k_ptr, r, n, K, mask, k)


@triton.jit(do_not_specialize=RUNTIME)
def _queries_keys_bwd_kernel(
    p_ptr, dq_ptr, dk_ptr, a_q_ptr, a_k_ptr, dp_ptr,  # [R, K], parameters [K]; dp may be missing
    parts_ptr,  # [walks, S, K], sums of dq s, dq, dk s, dk, and dp if S = 5; may be missing
    stride_p: tl.int64, stride_dq: tl.int64, stride_dk: tl.int64,  # in units of UNIT
    R: tl.int64, walks: tl.int64,
    K: tl.constexpr, ACTIVATION: tl.constexpr, S: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    NB: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0).to(tl.int64)
    walk = pid // NB
    n = (pid % NB).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_q, a_k = _parameter(a_q_ptr, n, K), _parameter(a_k_ptr, n, K)
    da_q = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    dm_q, da_k, dm_k, db = da_q, da_q, da_q, da_q
    for first in range(walk * BLOCK_R, R, walks * BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        mask = _mask(r, n, R, K)
        s, slope = _activated(_load(p_ptr, r, n, stride_p * UNIT, mask), ACTIVATION)
        dq = _load(dq_ptr, r, n, stride_dq * UNIT, mask)
        dk = _load(dk_ptr, r, n, stride_dk * UNIT, mask)
        dp = (a_q * dq + a_k * dk) * slope
        if dp_ptr is not None:
            _store(dp_ptr, r, n, K, mask, dp)
        da_q += dq * s
        dm_q += dq
        da_k += dk * s
        dm_k += dk
        db += dp
    if parts_ptr is not None:
        parts_ptr += walk * S * K + n
        tl.store(parts_ptr, tl.sum(da_q, axis=0), mask=n < K)
        tl.store(parts_ptr + K, tl.sum(dm_q, axis=0), mask=n < K)
        tl.store(parts_ptr + 2 * K, tl.sum(da_k, axis=0), mask=n < K)
        tl.store(parts_ptr + 3 * K, tl.sum(dm_k, axis=0), mask=n < K)
        if S == 5:
            tl.store(parts_ptr + 4 * K, tl.sum(db, axis=0), mask=n < K)


_queries_keys_fwd = Launcher(_queries_keys_fwd_kernel)
_queries_keys_bwd = Launcher(_queries_keys_bwd_kernel)


def queries_keys_forward(
    p: Tensor, parameters: Sequence[Tensor], q: Tensor, k: Tensor, *, activation: bool
) -> None:
    """Writes q and k. All [..., K], q and k contiguous; parameters a_q, m_q, a_k, m_k [K]."""
    if p.numel() == 0:
        return
    tensors, strides, unit, R, K = rows_of(p)
    blocks = tile(K, TILE)
    constants = _queries_keys_fwd.constants(
        K=K, ACTIVATION=_activation(activation), UNIT=unit, **blocks
    )
    programs = cdiv(R, blocks["BLOCK_R"]) * cdiv(K, blocks["BLOCK_N"])
    pointers = (*tensors, *[x.contiguous() for x in parameters], q, k)
    with on_device_of(p):
        _queries_keys_fwd(programs, pointers, (*strides, R), constants, 4, 1)


def queries_keys_backward(
    p: Tensor,
    a_q: Tensor,
    a_k: Tensor,
    dq: Tensor,
    dk: Tensor,
    dp: Tensor | None,
    sums: Sequence[Tensor],
    *,
    activation: bool,
) -> None:
    """Writes dp, if given, and into `sums`, unless there are none, the gradients of a_q, m_q, a_k
    and m_k, and as a fifth that of p's bias. All [..., K], dp contiguous; a_q, a_k and sums [K],
    sums contiguous."""
    if p.numel() == 0:
        for x in sums:
            x.zero_()
        return
    tensors, strides, unit, R, K = rows_of(p, dq, dk)
    blocks = tile(K, WALKED)
    wide = cdiv(K, blocks["BLOCK_N"])
    walks = walks_of(R, blocks["BLOCK_R"], wide, p.device, WALKS)
    parts = new_parts(p, walks, sums)
    constants = _queries_keys_bwd.constants(
        K=K, ACTIVATION=_activation(activation), S=len(sums), UNIT=unit, **blocks
    )
    pointers = (*tensors, a_q.contiguous(), a_k.contiguous(), dp, parts)
    with on_device_of(p):
        _queries_keys_bwd(walks * wide, pointers, (*strides, R, walks), constants, 4, 1)
        sum_parts(parts, sums)


def _activation(activation: bool) -> str | None:
    return "silu" if activation else None
