"""dq, dk and dv of linear attention in one sweep over the tokens.

    dq_t = scale * S_t do_t        dk_t = scale * R_t v_t        dv_t = scale * R_t^T k_t

S_t = S_{t-1} + k_t v_t^T is the state of the way there, R_t = R_{t+1} + q_t do_t^T that of the way
back (linear_attention_walk.py). Without decay, what lies behind is the whole less what lies before:
a program that starts with both knows R at every token of its segment, and reads q, k, v and do
once, where three walks read them three times. For a chunk of tokens, S before it and R behind it:

    dQ = scale * (tril(dO V^T) K + dO S^T)
    dK = scale * (triu(V dO^T) Q + V R^T)
    dV = scale * (triu(K Q^T) dO + K R)

Two-sided, S and R are those of the whole sequence, and the first terms fall away.

A program keeps a block of S and -R [BLOCK_K, BLOCK_V] of one head in float32 registers. Attention
is linear in blocks of K and of V too: dq and dk are sums over the blocks of V, dv over those of K.
Each block writes its part, and the parts are added up after. Grid (N * H * segments * NK * NV).

R comes summed over the segment; a single segment's programs sum it themselves, before the sweep.
Within a segment the subtraction costs digits: the error of R is that of the sum over the whole
segment. So segments stay short (SWEPT tokens), and S, whose k and v may all be positive, is the one
that is summed up.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, Variant, cdiv, has_wgmma
from chela_bench.kernels.linear_attention_config import (
    ADDED,
    NEAR,
    OPTIONS,
    RUNTIME,
    SEGMENT_ALIGN,
    sweep_config,
)
from chela_bench.kernels.linear_attention_model import wgmma_sweep_config
from chela_bench.kernels.linear_attention_walk import (
    Strides,
    Walk,
    _bounds,
    _columns,
    _rows,
    _rows_of,
    precision,
)


@triton.jit(do_not_specialize=RUNTIME)
def _linear_attention_sweep_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,  # pointers
    before_ptr, behind_ptr, first_ptr, cu_seqlens_ptr,
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qh: tl.int64,  # in units of UNIT elements
    stride_kb: tl.int64, stride_kt: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vh: tl.int64,
    stride_ob: tl.int64, stride_ot: tl.int64, stride_oh: tl.int64,  # of do; the others contiguous
    scale, T: tl.int64, H, segments, first_v,  # runtime scalars; first_v: the first block of V
    K: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,  # dimensions
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,  # tile
    NV: tl.constexpr, IS_CAUSAL: tl.constexpr,  # NV: blocks of V in this grid
    IS_PACKED: tl.constexpr, USE_BEFORE: tl.constexpr, USE_BEHIND: tl.constexpr,
    SUM_BEHIND: tl.constexpr, STORE_FIRST: tl.constexpr, ALIGN: tl.constexpr,
    UPCAST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0).to(tl.int64)
    pid_v, pid_k, pid = pid % NV, pid // NV % NK, pid // NV // NK
    pid_s, pid_nh = pid % segments, pid // segments
    n, h = pid_nh // H, pid_nh % H
    b, start, end = _bounds(cu_seqlens_ptr, n, pid_s, segments, 1, T, IS_PACKED, ALIGN)
    q_ptr += (b * stride_qb + h * stride_qh) * UNIT
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT
    v_ptr += (b * stride_vb + h * stride_vh) * UNIT
    do_ptr += (b * stride_ob + h * stride_oh) * UNIT
    rows = T * H if IS_PACKED else tl.num_programs(0) // (NV * NK * segments) * T  # B * T * H
    dq_ptr += (pid_v * rows + b * T * H + h) * K
    dk_ptr += (pid_v * rows + b * T * H + h) * K
    dv_ptr += (pid_k * rows + b * T * H + h) * V

    offs_t = tl.arange(0, BLOCK_T)
    offs_k = pid_k.to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = (first_v + pid_v.to(tl.int32)) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_k, mask_v = offs_k < K, offs_v < V
    state_offs = (pid if IS_CAUSAL else pid_nh) * K * V + offs_k[:, None] * V + offs_v[None, :]
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

        if IS_CAUSAL:
            scores = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [queries, keys]
            scores = tl.where(offs_t[:, None] >= offs_t[None, :], scores, 0.0).to(q.dtype)
            dq = tl.dot(scores, k, input_precision=PRECISION)
            dq = tl.dot(do, tl.trans(before.to(q.dtype)), acc=dq, input_precision=PRECISION)
        else:
            dq = tl.dot(do, tl.trans(before.to(q.dtype)), input_precision=PRECISION)
        _store_rows(dq_ptr, H * K, t, offs_t, offs_k, mask_t, mask_k, dq * scale)

        if IS_CAUSAL:
            minus_behind = tl.dot(tl.trans(q), do, acc=minus_behind, input_precision=PRECISION)
        r = (-minus_behind).to(q.dtype)
        if IS_CAUSAL:
            # Transposed scores as products of their own, not as tl.trans of accumulators.
            scores = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [keys, queries]
            scores = tl.where(upper, scores, 0.0).to(q.dtype)
            dk = tl.dot(scores, q, input_precision=PRECISION)
            dk = tl.dot(v, tl.trans(r), acc=dk, input_precision=PRECISION)
        else:
            dk = tl.dot(v, tl.trans(r), input_precision=PRECISION)
        _store_rows(dk_ptr, H * K, t, offs_t, offs_k, mask_t, mask_k, dk * scale)

        if IS_CAUSAL:
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [keys, queries]
            scores = tl.where(upper, scores, 0.0).to(q.dtype)
            dv = tl.dot(scores, do, input_precision=PRECISION)
            dv = tl.dot(k, r, acc=dv, input_precision=PRECISION)
            before = tl.dot(tl.trans(k), v, acc=before, input_precision=PRECISION)
        else:
            dv = tl.dot(k, r, input_precision=PRECISION)
        _store_rows(dv_ptr, H * V, t, offs_t, offs_v, mask_t, mask_v, dv * scale)


@triton.jit
def _store_rows(ptr, stride, t, offs_t, offs_c, mask_t, mask_c, rows):
    tl.store(
        ptr + ((t + offs_t) * stride)[:, None] + offs_c[None, :],
        rows.to(ptr.dtype.element_ty),
        mask=mask_t[:, None] & mask_c[None, :],
    )


@triton.jit(do_not_specialize=["size"])
def _linear_attention_add_kernel(
    parts_ptr, out_ptr,  # pointers
    size: tl.int64,  # runtime scalar: of a part, in units of UNIT elements
    COUNT: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, IS_BEGUN: tl.constexpr,
):  # fmt: skip
    """out becomes the sum of COUNT parts, and of what it is already, if begun."""
    size *= UNIT
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    if IS_BEGUN:
        total = tl.load(out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    else:
        total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(COUNT):
        total += tl.load(parts_ptr + i * size + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


_add = Launcher(_linear_attention_add_kernel)
_sweep = Launcher(_linear_attention_sweep_kernel)


@functools.cache
def sweep_by_hand() -> Launcher:
    """Of the sweep for Hopper: as linear_attention_walk.walk_by_hand."""
    from chela_bench.kernels.linear_attention_hopper import _linear_attention_wgmma_sweep_kernel

    return Launcher(_linear_attention_wgmma_sweep_kernel)


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

    q, k [B, T, H, K]; v, do [B, T, H, V]. States [N, H, segments, K, V] in float32: S before each
    segment (none: zero); R at the start of each of several segments, or behind a single one (none:
    zero), whose R at its first token goes into `first`, if given. Two-sided, whole S and R.
    """
    plan = _sweep_plan(
        q.shape, v.shape[-1], q.stride(), k.stride(), v.stride(), do.stride(), q.dtype, q.device,
        call.scale, call.N, call.segments, call.precise, call.causal, call.packed, call.options,
        before is not None, behind is not None, first is not None, ADDED,
    )  # fmt: skip
    dv_parts = dv if plan.parts_k == 1 else dv.new_empty(plan.parts_k, *dv.shape)
    states = (before, behind, first, call.cu_seqlens)
    if plan.parts_v == 1:
        [(_, variant, programs, scalars)] = plan.rounds
        variant(programs, (q, k, v, do, dq, dk, dv_parts, *states), scalars)
    else:
        for i, (count, variant, programs, scalars) in enumerate(plan.rounds):
            parts = [q.new_empty(count, *q.shape) for _ in range(2)]
            variant(programs, (q, k, v, do, *parts, dv_parts, *states), scalars)
            for part, out in zip(parts, (dq, dk), strict=True):
                _add_up(part, out, i > 0)
            del parts, part
    if plan.parts_k > 1:
        _add_up(dv_parts, dv, False)


class Plan(NamedTuple):
    """Of a sweep: parts of dq and dk, parts of dv, and rounds of it, each so many parts of dq and
    dk: a kernel, how many programs, and its scalars."""

    parts_v: int
    parts_k: int
    rounds: tuple[tuple[int, Variant, int, tuple[int | float, ...]], ...]


@functools.lru_cache(maxsize=4096)
def _sweep_plan(
    shape: torch.Size,
    V: int,
    q_strides: Strides,
    k_strides: Strides,
    v_strides: Strides,
    do_strides: Strides,
    dtype: torch.dtype,
    device: torch.device,
    scale: float,
    N: int,
    segments: int,
    precise: bool,
    causal: bool,
    packed: torch.dtype | None,
    options: tuple[int, ...],
    has_before: bool,
    has_behind: bool,
    has_first: bool,
    added: int,
) -> Plan:
    """Every T has its own plan, not its own kernel."""
    _, T, H, K = shape
    unit, strides, near = _rows_of((q_strides, K), (k_strides, K), (v_strides, V), (do_strides, V))
    roomy = has_wgmma(device)
    by_hand = (
        roomy
        and dtype == torch.bfloat16
        and not precise
        and causal
        and unit == 16
        and near
        and H * max(K, V) < NEAR
        and options[OPTIONS.index("wgmma")] != 0
    )
    config = wgmma_sweep_config(K, V) if by_hand else sweep_config(K, V, dtype, precise, roomy)
    parts_v, parts_k = cdiv(V, config["BLOCK_V"]), cdiv(K, config["BLOCK_K"])
    shared: dict[str, object] = {
        "K": K, "V": V, "BLOCK_T": config["BLOCK_T"], "BLOCK_K": config["BLOCK_K"],
        "BLOCK_V": config["BLOCK_V"], "IS_PACKED": packed is not None, "ALIGN": SEGMENT_ALIGN,
        "USE_BEFORE": has_before, "USE_BEHIND": has_behind,
        "SUM_BEHIND": segments == 1 and causal, "STORE_FIRST": has_first and causal,
    }  # fmt: skip
    if by_hand:
        launcher = sweep_by_hand()
        shared |= {
            "GROUPS": config["num_warps"] // 4, "STAGES": config["num_stages"],
            "IS_ALIKE": strides[0:3] * 4 == strides and K == V and parts_v == 1,
            "IS_PAIRED": strides[0:3] == strides[3:6] and strides[6:9] == strides[9:12],
        }  # fmt: skip
    else:
        launcher = _sweep
        shared |= {"UNIT": unit, "IS_CAUSAL": causal, **precision(dtype, precise)}
    rounds, on = [], (device, (dtype, packed))
    for first_v in range(0, parts_v, added):
        count = min(added, parts_v - first_v)
        constants = launcher.constants(NV=count, **shared)
        rounds.append((
            count,
            launcher.variant(constants, config["num_warps"], config["num_stages"], *on),
            N * H * segments * count * parts_k,
            (*strides, scale, T, H, segments, first_v),
        ))  # fmt: skip
    return Plan(parts_v, parts_k, tuple(rounds))


def _add_up(parts: Tensor, out: Tensor, is_begun: bool) -> None:
    """out = the sum of `parts` [count, ...], and of out, if begun."""
    block, size = 2048, out.numel()
    unit = 16 if size % 16 == 0 else 1
    constants = _add.constants(COUNT=parts.shape[0], UNIT=unit, BLOCK=block, IS_BEGUN=is_begun)
    _add(cdiv(size, block), (parts, out), (size // unit,), constants, 8, 1)


def blocks(K: int, V: int, dtype: torch.dtype, precise: bool, device: torch.device) -> int:
    """Blocks of a head's state that are swept side by side."""
    config = sweep_config(K, V, dtype, precise, has_wgmma(device))
    return cdiv(K, config["BLOCK_K"]) * min(cdiv(V, config["BLOCK_V"]), ADDED)
