"""The walk over chunks of tokens that linear attention and its gradients are made of.

    S_t = S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t

q, k [B, T, H, K]; v, o [B, T, H, V]; S [K, V], float32. For a chunk of tokens Q, K, V and the state
S before it:

    O = scale * (tril(Q K^T) V + Q S)          then          S <- S + K^T V

Back in time (`reverse`) the chunks come last to first and tril becomes triu. The gradients are
walks too, with the tensors in other roles; R_t = R_{t+1} + q_t do_t^T is the state of the way back:

    dq_t = scale * S_t   do_t    queries do, keys v,  values k     S transposed
    dk_t = scale * R_t   v_t     queries v,  keys do, values q     R transposed, back in time
    dv_t = scale * R_t^T k_t     queries k,  keys q,  values do    back in time

One walk has a program for each head and slice of V: few, where B * H is small. Then the sequence is
cut into segments, with a program each: `segment_states` first sums K^T V over every segment, adds
up what lies before each (or behind it), and the walks of all segments run at once. A two-sided
walk is that, with the sum over all segments for everyone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, Variant, cdiv, has_wgmma, processors
from chela_bench.kernels.linear_attention_config import (
    NEAR,
    RUNTIME,
    SEGMENT_ALIGN,
    WINDOW,
    keeps,
    sum_config,
    tile,
    walk_config,
)
from chela_bench.kernels.linear_attention_model import wgmma_config

_SCANNED = 1024  # elements of a state that one program adds up


Strides = tuple[int, ...]
WalkPlan = tuple[Variant, int, tuple[int | float, ...]]
"""The kernel, how many programs, and its scalars."""


class Walk(NamedTuple):
    """What all the walks of one call share."""

    scale: float
    causal: bool
    cu_seqlens: Tensor | None  # [N + 1] on the device
    N: int  # sequences
    segments: int  # walked side by side
    pieces: int  # of a segment, whose states are summed side by side
    precise: bool
    options: tuple[int, ...]  # what the caller asked for, by linear_attention_config.OPTIONS
    forward: WalkPlan | None = None  # of the walk that writes o, where it is known beforehand

    @property
    def packed(self) -> torch.dtype | None:
        """Of cu_seqlens, if sequences are packed."""
        return None if self.cu_seqlens is None else self.cu_seqlens.dtype

    @property
    def keeps(self) -> bool:
        """Whether the walks that write o and dv keep the state of every window."""
        return keeps(self.options)

    @property
    def align(self) -> int:
        """Tokens that the length of a segment is a multiple of."""
        return WINDOW if self.keeps else SEGMENT_ALIGN


class Gate(NamedTuple):
    """What the walk for Hopper puts on o, on its way out."""

    a: Tensor | None  # as o: o act(a) is written
    squares: Tensor  # [B, T, H * groups of columns], float32, to be written: sums of o^2
    activation: str | None


@triton.jit
def _bounds(
    cu_seqlens_ptr, n, segment, segments, pieces, T,
    IS_PACKED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Batch row, first token and end of a segment of sequence n."""
    if IS_PACKED:  # clamped, so that wrong bounds cannot reach outside the tensors
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n + 1).to(tl.int64), 0), T)
        b = n * 0
    else:
        begin, end, b = n * 0, n * 0 + T, n
    size = tl.cdiv(tl.cdiv(end - begin, segments * pieces), ALIGN) * ALIGN * pieces
    start = begin + segment * size
    return b, start, tl.minimum(start + size, end)


@triton.jit
def _rows(ptr, stride, t, offs_t, offs_c, mask_t, mask_c):
    """[BLOCK_T, BLOCK_C] of tokens t + offs_t."""
    rows = (t + offs_t) * stride
    return tl.load(
        ptr + rows[:, None] + offs_c[None, :], mask=mask_t[:, None] & mask_c[None, :], other=0.0
    )


@triton.jit
def _columns(ptr, stride, t, offs_t, offs_c, mask_t, mask_c):
    """The same, transposed: [BLOCK_C, BLOCK_T]."""
    rows = (t + offs_t) * stride
    return tl.load(
        ptr + rows[None, :] + offs_c[:, None], mask=mask_c[:, None] & mask_t[None, :], other=0.0
    )


@triton.jit
def _state_offsets(offs_k, offs_v, K: tl.constexpr, V: tl.constexpr, IS_TRANSPOSED: tl.constexpr):
    """Of S [BLOCK_K, BLOCK_V] in memory, where it is [K, V] or transposed."""
    if IS_TRANSPOSED:
        return offs_v[None, :] * K + offs_k[:, None]
    return offs_k[:, None] * V + offs_v[None, :]


@triton.jit(do_not_specialize=RUNTIME)
def _linear_attention_walk_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, initial_ptr, final_ptr, kept_ptr, cu_seqlens_ptr,  # pointers
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qh: tl.int64,  # in units of UNIT elements
    stride_kb: tl.int64, stride_kt: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vh: tl.int64,
    stride_ob: tl.int64, stride_ot: tl.int64, stride_oh: tl.int64,
    scale, T: tl.int64, H, segments, pieces,  # runtime scalars
    K: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,  # dimensions
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,  # tile
    IS_CAUSAL: tl.constexpr, IS_REVERSED: tl.constexpr, IS_PACKED: tl.constexpr,
    USE_INITIAL_STATE: tl.constexpr, STORE_FINAL_STATE: tl.constexpr,
    STATE_IS_TRANSPOSED: tl.constexpr, KEEP: tl.constexpr, ALIGN: tl.constexpr,
    UPCAST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0).to(tl.int64)
    pid_v, pid_s, pid_nh = pid % NV, pid // NV % segments, pid // NV // segments
    n, h = pid_nh // H, pid_nh % H
    b, start, end = _bounds(cu_seqlens_ptr, n, pid_s, segments, pieces, T, IS_PACKED, ALIGN)
    q_ptr += (b * stride_qb + h * stride_qh) * UNIT
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT
    v_ptr += (b * stride_vb + h * stride_vh) * UNIT
    o_ptr += (b * stride_ob + h * stride_oh) * UNIT

    offs_t = tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = pid_v.to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_k, mask_v = offs_k < K, offs_v < V
    state_offs = _state_offsets(offs_k, offs_v, K, V, STATE_IS_TRANSPOSED)
    state_mask = mask_k[:, None] & mask_v[None, :]
    if USE_INITIAL_STATE:
        if IS_CAUSAL:
            initial_ptr += ((pid_nh * segments + pid_s) * pieces) * K * V
            if IS_REVERSED:
                initial_ptr += (pieces - 1) * K * V
        else:
            initial_ptr += pid_nh * K * V
        state = tl.load(initial_ptr + state_offs, mask=state_mask, other=0.0)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)

    chunks = tl.cdiv(tl.maximum(end - start, 0), BLOCK_T).to(tl.int32)
    for i in range(0, chunks):
        t = start + (chunks - 1 - i if IS_REVERSED else i) * BLOCK_T
        mask_t = t + offs_t < end
        if KEEP > 0:
            border = t + BLOCK_T if IS_REVERSED else t
            if (border % KEEP == 0) | ((i == 0) & IS_REVERSED):
                window = pid_nh * tl.cdiv(T, KEEP) + t // KEEP
                kept = state.to(kept_ptr.dtype.element_ty)
                tl.store(kept_ptr + window * K * V + state_offs, kept, mask=state_mask)
        q = _rows(q_ptr, stride_qt * UNIT, t, offs_t, offs_k, mask_t, mask_k)
        if UPCAST:
            q = q.to(tl.float32)
        if IS_CAUSAL:
            k_t = _columns(k_ptr, stride_kt * UNIT, t, offs_t, offs_k, mask_t, mask_k)
            v = _rows(v_ptr, stride_vt * UNIT, t, offs_t, offs_v, mask_t, mask_v)
            if UPCAST:
                k_t, v = k_t.to(tl.float32), v.to(tl.float32)
            scores = tl.dot(q, k_t, input_precision=PRECISION)  # [BLOCK_T, BLOCK_T]
            if IS_REVERSED:
                scores = tl.where(offs_t[:, None] <= offs_t[None, :], scores, 0.0)
            else:
                scores = tl.where(offs_t[:, None] >= offs_t[None, :], scores, 0.0)
            # Before Q S: in the other order ptxas 12.8, which Triton 3.6 to 3.7.1 bring along,
            # reads a 16-bit v at wrong addresses where it is not pipelined and BLOCK_V < 64 (H100,
            # 2026-11-24; ptxas 13.0 does not).
            if WIDEN:
                o = tl.dot(scores, v.to(tl.float32), input_precision=PRECISION)
                o = tl.dot(q.to(tl.float32), state, acc=o, input_precision=PRECISION)
            else:
                o = tl.dot(scores.to(v.dtype), v, input_precision=PRECISION)
                o = tl.dot(q, state.to(q.dtype), acc=o, input_precision=PRECISION)
            state = tl.dot(k_t, v, acc=state, input_precision=PRECISION)
        else:
            if WIDEN:
                o = tl.dot(q.to(tl.float32), state, input_precision=PRECISION)
            else:
                o = tl.dot(q, state.to(q.dtype), input_precision=PRECISION)
        tl.store(
            o_ptr + ((t + offs_t) * stride_ot * UNIT)[:, None] + offs_v[None, :],
            (o * scale).to(o_ptr.dtype.element_ty),
            mask=mask_t[:, None] & mask_v[None, :],
        )

    if STORE_FINAL_STATE:
        tl.store(final_ptr + pid_nh * K * V + state_offs, state, mask=state_mask)


@triton.jit(do_not_specialize=RUNTIME)
def _linear_attention_sum_kernel(
    k_ptr, v_ptr, sums_ptr, cu_seqlens_ptr,  # pointers
    stride_kb: tl.int64, stride_kt: tl.int64, stride_kh: tl.int64,  # in units of UNIT elements
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vh: tl.int64,
    T: tl.int64, H, segments, skip_from, skip_to,  # runtime scalars
    K: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,  # dimensions
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,  # tile
    IS_BACKWARD: tl.constexpr, IS_PACKED: tl.constexpr, ALIGN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[n, h, segment] = K^T V of the segment's tokens, but not from skip_from to skip_to."""
    NK: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    NV: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0).to(tl.int64)
    pid_v, pid_k, pid = pid % NV, pid // NV % NK, pid // NV // NK
    pid_s, pid_nh = pid % segments, pid // segments
    n, h = pid_nh // H, pid_nh % H
    if (pid_s >= skip_from) & (pid_s < skip_to):
        return
    b, start, end = _bounds(cu_seqlens_ptr, n, pid_s, segments, 1, T, IS_PACKED, ALIGN)
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT
    v_ptr += (b * stride_vb + h * stride_vh) * UNIT

    offs_t = tl.arange(0, BLOCK_T)
    offs_k = pid_k.to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = pid_v.to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_k, mask_v = offs_k < K, offs_v < V
    state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    chunks = tl.cdiv(tl.maximum(end - start, 0), BLOCK_T).to(tl.int32)
    for i in range(0, chunks):
        t = start + (chunks - 1 - i if IS_BACKWARD else i) * BLOCK_T
        mask_t = t + offs_t < end
        k_t = _columns(k_ptr, stride_kt * UNIT, t, offs_t, offs_k, mask_t, mask_k)
        v = _rows(v_ptr, stride_vt * UNIT, t, offs_t, offs_v, mask_t, mask_v)
        if UPCAST:
            k_t, v = k_t.to(tl.float32), v.to(tl.float32)
        state = tl.dot(k_t, v, acc=state, input_precision=PRECISION)
    tl.store(
        sums_ptr + pid * K * V + _state_offsets(offs_k, offs_v, K, V, False),
        state,
        mask=mask_k[:, None] & mask_v[None, :],
    )


@triton.jit(do_not_specialize=RUNTIME)
def _linear_attention_scan_kernel(
    sums_ptr, states_ptr, initial_ptr, final_ptr,  # pointers
    segments, summed,  # runtime scalars: how many, and of how many there are sums
    SIZE: tl.constexpr, BLOCK: tl.constexpr,  # elements of a state, and of them a program's
    STAGES: tl.constexpr, IS_REVERSED: tl.constexpr,
    STORE_PREFIX: tl.constexpr, IS_INCLUSIVE: tl.constexpr,
    USE_INITIAL_STATE: tl.constexpr, STORE_FINAL_STATE: tl.constexpr,
):  # fmt: skip
    """states[n, h, segment] becomes what lies before it: the initial state and the sums of earlier
    segments, and if inclusive of the segment itself."""
    NS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    nh, offs = pid // NS, (pid % NS) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    if USE_INITIAL_STATE:
        state = tl.load(initial_ptr + nh * SIZE + offs, mask=mask, other=0.0)
    else:
        state = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.range(0, segments, num_stages=STAGES):
        at = (nh * segments + (segments - 1 - i if IS_REVERSED else i)) * SIZE + offs
        added = tl.load(sums_ptr + at, mask=mask & (i < summed), other=0.0)
        if STORE_PREFIX and not IS_INCLUSIVE:
            tl.store(states_ptr + at, state, mask=mask)
        state += added
        if STORE_PREFIX and IS_INCLUSIVE:
            tl.store(states_ptr + at, state, mask=mask)
    if STORE_FINAL_STATE:
        tl.store(final_ptr + nh * SIZE + offs, state, mask=mask)


_walk = Launcher(_linear_attention_walk_kernel)
_sum = Launcher(_linear_attention_sum_kernel)
_scan = Launcher(_linear_attention_scan_kernel)


@functools.cache
def walk_by_hand() -> Launcher:
    """Of the walk for Hopper, imported where it is to run: Gluon may change, and nothing else is to
    depend on it."""
    from chela_bench.kernels.linear_attention_hopper import _linear_attention_wgmma_kernel

    return Launcher(_linear_attention_wgmma_kernel)


def walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    call: Walk,
    *,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    kept: Tensor | None = None,
    transposed: bool = False,
    reverse: bool = False,
    plan: WalkPlan | None = None,
    gate: Gate | None = None,
) -> None:
    """Writes o, and the last state into `final`.

    q, k [B, T, H, K]; v, o [B, T, H, V]; rows contiguous. `initial` is a state for each piece of
    each segment, [N, H, segments * pieces, K, V], or two-sided one for all, [N, H, K, V]; with
    `transposed` states are [..., V, K]. There is a `final` [N, H, K, V] of a causal walk in one
    segment only. `kept` [N, H, windows, K, V] in the dtype of q, of a walk that is not transposed
    nor packed, gets the state before each window of WINDOW tokens (with `reverse`, behind it).
    `plan` is what `walk_plan` would find. A `gate` is for walks by hand alone.
    """
    variant, programs, scalars = plan or walk_plan(
        q.shape, v.shape[-1], q.stride(), k.stride(), v.stride(), o.stride(), q.dtype, q.device,
        call.scale, call.N, call.segments, call.pieces, call.options, call.precise, call.causal,
        reverse, call.packed, initial is not None, final is not None, transposed, kept is not None,
        gate is not None, None if gate is None or gate.a is None else gate.activation,
    )  # fmt: skip
    pointers: tuple[Tensor | None, ...] = (q, k, v, o, initial, final, kept, call.cu_seqlens)
    if variant.launcher is not _walk:
        pointers += (None, None) if gate is None else (gate.a, gate.squares)
    variant(programs, pointers, scalars)


@functools.lru_cache(maxsize=4096)
def walk_plan(
    shape: torch.Size,
    V: int,
    q_strides: Strides,
    k_strides: Strides,
    v_strides: Strides,
    o_strides: Strides,
    dtype: torch.dtype,
    device: torch.device,
    scale: float,
    N: int,
    segments: int,
    pieces: int,
    options: tuple[int, ...],
    precise: bool,
    causal: bool,
    reverse: bool,
    packed: torch.dtype | None,
    has_initial: bool,
    has_final: bool,
    transposed: bool,
    has_kept: bool,
    has_gate: bool = False,
    activation: str | None = None,
) -> WalkPlan:
    """Every T has its own plan, not its own kernel. activation: of the gate's a, if it has one."""
    _, T, H, K = shape
    unit, strides, near = _rows_of((q_strides, K), (k_strides, K), (v_strides, V), (o_strides, V))
    shared: dict[str, object] = {
        "K": K, "V": V, "IS_REVERSED": reverse, "IS_PACKED": packed is not None,
        "ALIGN": WINDOW if keeps(options) else SEGMENT_ALIGN, "KEEP": WINDOW if has_kept else 0,
        "USE_INITIAL_STATE": has_initial, "STORE_FINAL_STATE": has_final,
        "STATE_IS_TRANSPOSED": transposed,
    }  # fmt: skip
    config = None
    if has_wgmma(device) and unit == 16 and near and causal and not precise:
        config = wgmma_config(options, K, V, dtype, N * H * segments, processors(device))
    if config is not None:
        stages = config["num_stages"]
        launcher = walk_by_hand()
        constants = launcher.constants(
            BLOCK_T=config["BLOCK_T"], BLOCK_K=max(64, tile(K)), BLOCK_V=config["BLOCK_V"],
            STAGES=stages, GROUPS=config["num_warps"] // 4,
            Q_STAGES=1 if K > 128 and config["BLOCK_V"] > 64 else stages, **shared,
            SQUARE=has_gate, ACTIVATION=activation,
        )  # fmt: skip
    else:
        assert not has_gate
        config = walk_config(options, K, V, dtype)
        constants = _walk.constants(
            UNIT=unit, BLOCK_T=config["BLOCK_T"], BLOCK_K=tile(K), BLOCK_V=config["BLOCK_V"],
            IS_CAUSAL=causal, **precision(dtype, precise), **shared,
        )  # fmt: skip
        launcher = _walk
    on = (device, (dtype, packed))
    variant = launcher.variant(constants, config["num_warps"], config["num_stages"], *on)
    programs = N * H * segments * cdiv(V, config["BLOCK_V"])
    return variant, programs, (*strides, scale, T, H, segments, pieces)


def segment_states(
    k: Tensor,
    v: Tensor,
    states: Tensor,
    call: Walk,
    *,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    reverse: bool = False,
    inclusive: bool = False,
    every_piece: bool = False,
) -> None:
    """Writes the state before each piece of each segment (behind it, with `reverse`) into `states`
    [N, H, segments * pieces, K, V], and that after all of them into `final` [N, H, K, V], all
    float32. Two-sided, `states` [N, H, K, V] is the state after all of them too. `inclusive` adds
    each piece to its own state. Without `every_piece`, only states of whole segments hold.
    """
    _, T, H, K = k.shape
    V, segments = v.shape[-1], call.segments * call.pieces
    sums = states if call.causal else states.new_empty(call.N, H, segments, K, V)
    whole = final if call.causal else states
    skipped = 1 if every_piece else call.pieces  # nobody reads what the last ones add
    if inclusive or whole is not None:
        skipped = 0
    first = 0 if reverse else segments - skipped
    config = sum_config(K, V, k.dtype, has_wgmma(k.device))
    unit, strides, _ = rows_of(k, v)
    precisely = precision(k.dtype, call.precise)
    del precisely["WIDEN"]
    constants = _sum.constants(
        K=K, V=V, UNIT=unit, BLOCK_T=config["BLOCK_T"], BLOCK_K=config["BLOCK_K"],
        BLOCK_V=config["BLOCK_V"], IS_BACKWARD=inclusive or not reverse,
        IS_PACKED=call.cu_seqlens is not None, ALIGN=call.align, **precisely,
    )  # fmt: skip
    _sum(
        call.N * H * segments * cdiv(K, config["BLOCK_K"]) * cdiv(V, config["BLOCK_V"]),
        (k, v, sums, call.cu_seqlens),
        (*strides, T, H, segments, first, first + skipped),
        constants, config["num_warps"], config["num_stages"],
    )  # fmt: skip
    constants = _scan.constants(
        SIZE=K * V, BLOCK=_SCANNED, STAGES=4, IS_REVERSED=reverse,
        STORE_PREFIX=call.causal, IS_INCLUSIVE=inclusive,
        USE_INITIAL_STATE=initial is not None, STORE_FINAL_STATE=whole is not None,
    )  # fmt: skip
    programs = call.N * H * cdiv(K * V, _SCANNED)
    _scan(programs, (sums, states, initial, whole), (segments, segments - skipped), constants, 4, 3)
    if final is not None and not call.causal:
        final.copy_(states)


def precision(dtype: torch.dtype, precise: bool) -> dict[str, object]:
    """How operands multiply: UPCAST all, or (WIDEN) what is computed here, to float32.

    bfloat16 rounds computed operands, S and the scores, to bfloat16. In float16 they would
    overflow, so they meet the others as TF32, which keeps float16's ten bits.
    """
    return {
        "UPCAST": precise,
        "WIDEN": dtype == torch.float16,
        "PRECISION": "tf32x3" if precise else "tf32",
    }


def rows_of(*tensors: Tensor) -> tuple[int, tuple[int, ...], bool]:
    """The elements that all strides and rows are multiples of (16 lets loads be whole vectors, 1
    promises nothing), the strides of batch, token and head in that unit, and whether 256 tokens
    lie near enough for offsets of 32 bits."""
    return _rows_of(*[(x.stride(), x.shape[-1]) for x in tensors])


@functools.lru_cache(maxsize=4096)
def _rows_of(*layouts: tuple[tuple[int, ...], int]) -> tuple[int, tuple[int, ...], bool]:
    strides = [stride for layout, _ in layouts for stride in layout[:3]]
    near = all(layout[1] < NEAR for layout, _ in layouts)
    whole = all(s % 16 == 0 for s in strides) and all(row % 16 == 0 for _, row in layouts)
    return (16, tuple(s // 16 for s in strides), near) if whole else (1, tuple(strides), near)
