"""The walk and the sweep of linear attention, scheduled by hand for Hopper's tensor cores (sm_90).

The same functions as in linear_attention_walk.py and linear_attention_sweep.py, for bfloat16, in
Gluon, Triton's language below Triton: what is copied when, and which product is waited for, is
written here and not found by the compiler. Triton's pipeline copies the next chunk at the end of a
chunk and waits for it at the top of the next, and waits for each product before it starts another.
Here, in a chunk,

    copies of a later chunk start first, into shared memory that the chunk before has left;
    products run one after another without a wait, while the warps round, mask and store what
    earlier products gave; only the update of the state crosses into the next chunk.

Four warps, a group, are what one `wgmma` takes. Two groups split the columns of all products; what
one computes and both multiply with, scores and states, meets in shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from chela_bench.kernels.linear_attention_config import RUNTIME

# Triton puts in the barriers that shared memory needs, but takes a product that was started for one
# that has read its operands. Before a copy that overwrites them, every warp must have waited.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6


@gluon.constexpr_function
def _product(columns, groups):
    """An accumulator; groups split its columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, groups], [16, columns // groups, 16])


@gluon.constexpr_function
def _copied(columns, groups):
    """16 bytes a thread, 128 of a row side by side, the rest of the row at fixed distances."""
    lanes = min(columns // 8, 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4 * groups, 1], [1, 0])


@gluon.constexpr_function
def _stored(columns, groups):
    """Of 64 rows: what a quad of lanes has of a product, 16 bytes a lane instead of four times 4.
    So no warp waits for another."""
    own = columns // groups
    across = [[0, step] for step in (8, 16) if step < own]
    down = [[step, 0] for step in (1, 2, 4, 8)]
    lanes, rest = across + down[: 5 - len(across)], down[5 - len(across) :]
    registers = [[0, 1], [0, 2], [0, 4], *[[0, x] for x in (32, 64, 128) if x < own], *rest]
    warps = [[16, 0], [32, 0], *[[0, own]] * (groups - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, columns])


@gluon.constexpr_function
def _shared(rows, columns):
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


@gluon.jit
def _segment(
    cu_seqlens_ptr, n, segment, segments, pieces, T,
    IS_PACKED: gl.constexpr, ALIGN: gl.constexpr,
):  # fmt: skip
    """Batch row, first token and number of tokens: as linear_attention_walk._bounds."""
    if IS_PACKED:
        begin = gl.minimum(gl.maximum(gl.load(cu_seqlens_ptr + n).to(gl.int64), 0), T)
        end = gl.minimum(gl.maximum(gl.load(cu_seqlens_ptr + n + 1).to(gl.int64), 0), T)
        b = n * 0
    else:
        begin, end, b = n * 0, n * 0 + T, n
    size = (end - begin + segments * pieces - 1) // (segments * pieces)
    size = (size + ALIGN - 1) // ALIGN * ALIGN * pieces
    start = begin + segment * size
    return b, start, gl.maximum(gl.minimum(size, end - start), 0).to(gl.int32)


@gluon.jit
def _offsets(stride, BLOCK_T: gl.constexpr, BLOCK_C: gl.constexpr, LAYOUT: gl.constexpr):
    """Of a tile in memory, `stride` in units of 16 elements. Offsets in bytes are below 2^30, and
    LLVM is told so: no register holds their upper halves."""
    offs_t = gl.arange(0, BLOCK_T, gl.SliceLayout(1, LAYOUT))
    offs_c = gl.arange(0, BLOCK_C, gl.SliceLayout(0, LAYOUT))
    stride = (stride.to(gl.int32) & ((1 << 18) - 1)) * 16
    return (offs_t[:, None] * stride + offs_c[None, :]).to(gl.uint32)


@gluon.jit
def _mask(offs, rows, columns, IS_WHOLE: gl.constexpr):
    """The tile's rows and columns that there are; all columns, if whole."""
    LAYOUT: gl.constexpr = offs.type.layout
    mask = (gl.arange(0, offs.shape[0], gl.SliceLayout(1, LAYOUT)) < rows)[:, None]
    if not IS_WHOLE:
        offs_c = gl.arange(0, offs.shape[1], gl.SliceLayout(0, LAYOUT))
        mask = mask & (offs_c < columns)[None, :]
    return mask


@gluon.jit
def _copy(smem, ptr, offs, rows, columns, IS_WHOLE: gl.constexpr):
    """Starts it; what there is not becomes zero."""
    mask = _mask(offs, rows, columns, IS_WHOLE)
    async_copy.async_copy_global_to_shared(smem, ptr + offs, mask)


@gluon.jit
def _rounded(tile, scale):
    return (tile * scale).to(gl.bfloat16)


@gluon.jit
def _store(ptr, tile, offs, rows, columns, IS_WHOLE: gl.constexpr):
    tile = gl.convert_layout(tile, offs.type.layout)
    mask = _mask(offs, rows, columns, IS_WHOLE)
    gl.store(ptr + offs, tile, mask=mask, eviction_policy="evict_first")


@gluon.jit
def _keep(
    ptr, smem, K: gl.constexpr, V: gl.constexpr, left_v, GROUPS: gl.constexpr,
    IS_WHOLE: gl.constexpr,
):  # fmt: skip
    """Writes a state [K, V] that lies in shared memory."""
    LAYOUT: gl.constexpr = _copied(smem.shape[1], GROUPS)
    offs_k = gl.arange(0, smem.shape[0], gl.SliceLayout(1, LAYOUT))
    offs_v = gl.arange(0, smem.shape[1], gl.SliceLayout(0, LAYOUT))
    offs = offs_k[:, None] * V + offs_v[None, :]
    if IS_WHOLE:
        gl.store(ptr + offs, smem.load(LAYOUT))
    else:
        mask = (offs_k < K)[:, None] & (offs_v < left_v)[None, :]
        gl.store(ptr + offs, smem.load(LAYOUT), mask=mask)


@gluon.jit
def _over_sigmoid(a):
    """1 / sigmoid(a) = 1 + exp(-a). Not pure: else it is put off until products are waited for."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1; add.f32 $0, $0, 0f3F800000;", "=f,f",
        [a.to(gl.float32) * -1.4426950408889634], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _inverse(x):
    """1 / x, to a spacing of float32, of x from 1 to infinity."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _opaque(x):
    """x, int32, of which LLVM knows nothing. What a loop computes from it is not kept in registers
    from chunk to chunk, where accumulators leave few: those would spill."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _times(t, stride):
    """In 64 bits, of two that fit 32."""
    return (t.to(gl.uint32).to(gl.uint64) * stride.to(gl.uint32).to(gl.uint64)).to(gl.int64)


@gluon.jit(do_not_specialize=RUNTIME)
def _linear_attention_wgmma_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, initial_ptr, final_ptr, kept_ptr, cu_seqlens_ptr,  # pointers
    a_ptr, squares_ptr,  # as o; [B, T, H, NV, GROUPS] float32
    stride_qb: gl.int64, stride_qt: gl.int64, stride_qh: gl.int64,  # in units of 16 elements
    stride_kb: gl.int64, stride_kt: gl.int64, stride_kh: gl.int64,
    stride_vb: gl.int64, stride_vt: gl.int64, stride_vh: gl.int64,
    stride_ob: gl.int64, stride_ot: gl.int64, stride_oh: gl.int64,  # of a too
    scale, T: gl.int64, H, segments, pieces,  # runtime scalars
    K: gl.constexpr, V: gl.constexpr,  # dimensions
    BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_V: gl.constexpr,  # tile
    GROUPS: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,  # copies of a tile
    IS_REVERSED: gl.constexpr, IS_PACKED: gl.constexpr,
    USE_INITIAL_STATE: gl.constexpr, STORE_FINAL_STATE: gl.constexpr,
    STATE_IS_TRANSPOSED: gl.constexpr, KEEP: gl.constexpr, ALIGN: gl.constexpr,
    SQUARE: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """linear_attention_walk._linear_attention_walk_kernel, causal. With one stage of q, where two
    do not fit, the next is copied only when this one's products are done. SQUARE: sums of o^2 over
    each group's columns are written too, and with a, o act(a) in the place of o."""
    UNIT: gl.constexpr = 16
    NV: gl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    WHOLE_K: gl.constexpr = K == BLOCK_K
    WHOLE_V: gl.constexpr = V % BLOCK_V == 0
    O: gl.constexpr = _product(BLOCK_V, GROUPS)  # noqa: E741
    SCORES: gl.constexpr = _product(BLOCK_T, GROUPS)
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, BLOCK_V, 16])
    pid = gl.program_id(0).to(gl.int64)
    pid_v, pid_s, pid_nh = pid % NV, pid // NV % segments, pid // NV // segments
    n, h = pid_nh // H, pid_nh % H
    b, start, left = _segment(cu_seqlens_ptr, n, pid_s, segments, pieces, T, IS_PACKED, ALIGN)
    chunks = (left + BLOCK_T - 1) // BLOCK_T

    first_v = pid_v.to(gl.int32) * BLOCK_V
    left_v = V - first_v
    q_ptr += (b * stride_qb + h * stride_qh + start * stride_qt) * UNIT
    k_ptr += (b * stride_kb + h * stride_kh + start * stride_kt) * UNIT
    v_ptr += (b * stride_vb + h * stride_vh + start * stride_vt) * UNIT + first_v
    o_ptr += (b * stride_ob + h * stride_oh + start * stride_ot) * UNIT + first_v
    if a_ptr is not None:
        a_ptr += (b * stride_ob + h * stride_oh + start * stride_ot) * UNIT + first_v
        a_offs = _offsets(stride_ot, BLOCK_T, BLOCK_V, _copied(BLOCK_V, GROUPS))
    q_offs = _offsets(stride_qt, BLOCK_T, BLOCK_K, _copied(BLOCK_K, GROUPS))
    k_offs = _offsets(stride_kt, BLOCK_T, BLOCK_K, _copied(BLOCK_K, GROUPS))
    v_offs = _offsets(stride_vt, BLOCK_T, BLOCK_V, _copied(BLOCK_V, GROUPS))
    o_offs = _offsets(stride_ot, BLOCK_T, BLOCK_V, _stored(BLOCK_V, GROUPS))

    keys: gl.constexpr = _shared(BLOCK_T, BLOCK_K)
    values: gl.constexpr = _shared(BLOCK_T, BLOCK_V)
    qs = gl.allocate_shared_memory(gl.bfloat16, [Q_STAGES, BLOCK_T, BLOCK_K], keys)
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_K], keys)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_V], values)
    s_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_K, BLOCK_V], _shared(BLOCK_K, BLOCK_V))
    if GROUPS > 1:
        p_smem = gl.allocate_shared_memory(
            gl.bfloat16, [BLOCK_T, BLOCK_T], _shared(BLOCK_T, BLOCK_T)
        )
    if a_ptr is not None:
        a_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_T, BLOCK_V], values)
        c = chunks - 1 if IS_REVERSED else chunks * 0
        a_t = c.to(gl.int64) * BLOCK_T * stride_ot * UNIT
        rows = gl.where(chunks > 0, left - c * BLOCK_T, 0)
        _copy(a_smem, a_ptr + a_t, a_offs, rows, left_v, WHOLE_V)
    for i in gl.static_range(STAGES - 1):
        c = chunks - 1 - i if IS_REVERSED else chunks * 0 + i
        t = c.to(gl.int64) * BLOCK_T
        rows = gl.where(i < chunks, left - c * BLOCK_T, 0)
        _copy(qs.index(i), q_ptr + t * stride_qt * UNIT, q_offs, rows, K, WHOLE_K)
        _copy(ks.index(i), k_ptr + t * stride_kt * UNIT, k_offs, rows, K, WHOLE_K)
        _copy(vs.index(i), v_ptr + t * stride_vt * UNIT, v_offs, rows, left_v, WHOLE_V)
        async_copy.commit_group()

    offs_k = gl.arange(0, BLOCK_K, gl.SliceLayout(1, STATE))
    offs_v = gl.arange(0, BLOCK_V, gl.SliceLayout(0, STATE)) + first_v
    if STATE_IS_TRANSPOSED:
        state_offs = offs_v[None, :] * K + offs_k[:, None]
    else:
        state_offs = offs_k[:, None] * V + offs_v[None, :]
    state_mask = (offs_k < K)[:, None] & (offs_v < V)[None, :]
    if USE_INITIAL_STATE:
        at = (pid_nh * segments + pid_s) * pieces + (pieces - 1 if IS_REVERSED else 0)
        state = gl.load(initial_ptr + at * K * V + state_offs, mask=state_mask, other=0.0)
    else:
        state = gl.zeros([BLOCK_K, BLOCK_V], gl.float32, STATE)

    queries = gl.arange(0, BLOCK_T, gl.SliceLayout(1, SCORES))[:, None]
    others = gl.arange(0, BLOCK_T, gl.SliceLayout(0, SCORES))[None, :]
    seen = queries <= others if IS_REVERSED else queries >= others
    no_scores = gl.zeros([BLOCK_T, BLOCK_T], gl.float32, SCORES)
    no_o = gl.zeros([BLOCK_T, BLOCK_V], gl.float32, O)
    next_state = warpgroup_mma_init(state)
    AHEAD: gl.constexpr = STAGES - 2 if a_ptr is None else min(STAGES - 2, 1)
    LATER: gl.constexpr = AHEAD if Q_STAGES > 1 else 0  # copies that need not be there yet
    for i in range(0, chunks):
        async_copy.wait_group(LATER)
        stage = i % STAGES
        q, k, v = qs.index(stage if Q_STAGES > 1 else 0), ks.index(stage), vs.index(stage)
        state = warpgroup_mma_wait(0, deps=[next_state])
        s_smem.store(state.to(gl.bfloat16))
        fence_async_shared()
        if KEEP > 0:  # no product is under way
            c = chunks - 1 - i if IS_REVERSED else i
            t = start + c * BLOCK_T
            border = t + BLOCK_T if IS_REVERSED else t
            if (border % KEEP == 0) | ((i == 0) & IS_REVERSED):
                window = pid_nh * ((T + KEEP - 1) // KEEP) + t // KEEP
                kept = kept_ptr + window * K * V + first_v
                _keep(kept, s_smem, K, V, left_v, GROUPS, WHOLE_K and WHOLE_V)
        scores = warpgroup_mma(q, k.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        o = warpgroup_mma(q, s_smem, no_o, use_acc=False, is_async=True)
        if a_ptr is not None:
            a = a_smem.load(O)

        _barrier()
        if a_ptr is not None:  # of the next chunk, and so before those of a later one
            c = chunks - 2 - i if IS_REVERSED else chunks * 0 + i + 1
            a_t = c.to(gl.int64) * BLOCK_T * stride_ot * UNIT
            stride_a = _opaque(stride_ot.to(gl.int32))
            a_offs = _offsets(stride_a, BLOCK_T, BLOCK_V, _copied(BLOCK_V, GROUPS))
            rows = gl.where(i + 1 < chunks, left - c * BLOCK_T, 0)
            _copy(a_smem, a_ptr + a_t, a_offs, rows, left_v, WHOLE_V)
            async_copy.commit_group()
            if GROUPS == 1:
                stride_k = _opaque(stride_kt.to(gl.int32))
                k_offs = _offsets(stride_k, BLOCK_T, BLOCK_K, _copied(BLOCK_K, GROUPS))
                stride_q = _opaque(stride_qt.to(gl.int32))
                q_offs = _offsets(stride_q, BLOCK_T, BLOCK_K, _copied(BLOCK_K, GROUPS))
        ahead = i + STAGES - 1
        c = chunks - 1 - ahead if IS_REVERSED else ahead
        t = c.to(gl.int64) * BLOCK_T
        rows = gl.where(ahead < chunks, left - c * BLOCK_T, 0)
        to = ahead % STAGES
        if Q_STAGES > 1:
            _copy(qs.index(to), q_ptr + t * stride_qt * UNIT, q_offs, rows, K, WHOLE_K)
        _copy(ks.index(to), k_ptr + t * stride_kt * UNIT, k_offs, rows, K, WHOLE_K)
        _copy(vs.index(to), v_ptr + t * stride_vt * UNIT, v_offs, rows, left_v, WHOLE_V)
        async_copy.commit_group()

        scores = warpgroup_mma_wait(1, deps=[scores])
        p = gl.where(seen, scores, 0.0).to(gl.bfloat16)
        if GROUPS == 1:
            p = gl.convert_layout(p, gl.DotOperandLayout(0, O, 2))
            o = warpgroup_mma(p, v, o, is_async=True)
        else:
            p_smem.store(p)
            fence_async_shared()
            o = warpgroup_mma(p_smem, v, o, is_async=True)
        next_state = warpgroup_mma(k.permute((1, 0)), v, state, is_async=True)
        if a_ptr is not None:
            gate = _inverse(_over_sigmoid(a))
            if ACTIVATION == "silu":
                gate *= a.to(gl.float32)
        o = warpgroup_mma_wait(1, deps=[o])
        if Q_STAGES == 1:
            _barrier()
            _copy(qs.index(0), q_ptr + t * stride_qt * UNIT, q_offs, rows, K, WHOLE_K)
            async_copy.commit_group()
        c = chunks - 1 - i if IS_REVERSED else i
        rows = left - c * BLOCK_T
        o *= scale
        if SQUARE:
            own: gl.constexpr = BLOCK_V // GROUPS  # of a group: none waits for the other's sum
            parts = gl.reshape(o, [BLOCK_T, GROUPS, own])
            squares = gl.sum(parts * parts, axis=2)
            SQUARES: gl.constexpr = squares.type.layout
            r = gl.arange(0, BLOCK_T, gl.SliceLayout(1, SQUARES))[:, None]
            group = gl.arange(0, GROUPS, gl.SliceLayout(0, SQUARES))[None, :]
            first = (((b * T + start + c * BLOCK_T) * H + h) * NV + pid_v) * GROUPS
            gl.store(squares_ptr + first + (r * (H * NV * GROUPS) + group), squares, mask=r < rows)
        if a_ptr is not None:
            o *= gate
        o = o.to(gl.bfloat16)
        if a_ptr is not None:
            stride_o = _opaque(stride_ot.to(gl.int32))
            o_offs = _offsets(stride_o, BLOCK_T, BLOCK_V, _stored(BLOCK_V, GROUPS))
        _store(o_ptr + c * BLOCK_T * (stride_ot * UNIT), o, o_offs, rows, left_v, WHOLE_V)
    async_copy.wait_group(0)
    state = warpgroup_mma_wait(0, deps=[next_state])
    if STORE_FINAL_STATE:
        gl.store(final_ptr + pid_nh * K * V + state_offs, state, mask=state_mask)


@gluon.jit(do_not_specialize=RUNTIME)
def _linear_attention_wgmma_sweep_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,  # pointers
    before_ptr, behind_ptr, first_ptr, cu_seqlens_ptr,
    stride_qb: gl.int64, stride_qt: gl.int64, stride_qh: gl.int64,  # in units of 16 elements
    stride_kb: gl.int64, stride_kt: gl.int64, stride_kh: gl.int64,
    stride_vb: gl.int64, stride_vt: gl.int64, stride_vh: gl.int64,
    stride_ob: gl.int64, stride_ot: gl.int64, stride_oh: gl.int64,  # of do; the others contiguous
    scale, T: gl.int64, H, segments, first_v,  # runtime scalars; first_v: the first block of V
    K: gl.constexpr, V: gl.constexpr,  # dimensions
    BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_V: gl.constexpr,  # tile
    GROUPS: gl.constexpr, STAGES: gl.constexpr, NV: gl.constexpr,  # NV: blocks of V in this grid
    IS_PACKED: gl.constexpr, USE_BEFORE: gl.constexpr, USE_BEHIND: gl.constexpr,
    SUM_BEHIND: gl.constexpr, STORE_FIRST: gl.constexpr, ALIGN: gl.constexpr,
    IS_ALIKE: gl.constexpr, IS_PAIRED: gl.constexpr,
):  # fmt: skip
    """linear_attention_sweep._linear_attention_sweep_kernel, causal. To spare registers, dq, dk and
    dv are computed one after another in the same ones. IS_ALIKE: strides of q, k, v and do are the
    same, and dq, dk and dv lie alike. IS_PAIRED: those of q and k are, and those of v and do."""
    UNIT: gl.constexpr = 16
    NK: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WHOLE_K: gl.constexpr = K % BLOCK_K == 0
    WHOLE_V: gl.constexpr = V % BLOCK_V == 0
    STATE: gl.constexpr = _product(BLOCK_V, GROUPS)
    SCORES: gl.constexpr = _product(BLOCK_T, GROUPS)
    ROWS: gl.constexpr = _product(BLOCK_V, GROUPS)
    gl.static_assert(BLOCK_K == BLOCK_V)
    pid = gl.program_id(0).to(gl.int64)
    pid_v, pid_k, pid = pid % NV, pid // NV % NK, pid // NV // NK
    pid_s, pid_nh = pid % segments, pid // segments
    n, h = pid_nh // H, pid_nh % H
    b, start, left = _segment(cu_seqlens_ptr, n, pid_s, segments, 1, T, IS_PACKED, ALIGN)
    chunks = (left + BLOCK_T - 1) // BLOCK_T
    all_rows = T * H if IS_PACKED else gl.num_programs(0) // (NV * NK * segments) * T

    first_k = pid_k.to(gl.int32) * BLOCK_K
    first_v = (first_v + pid_v.to(gl.int32)) * BLOCK_V
    left_k, left_v = K - first_k, V - first_v
    if IS_ALIKE:
        stride_kb, stride_kt, stride_kh = stride_qb, stride_qt, stride_qh
        stride_vb, stride_vt, stride_vh = stride_qb, stride_qt, stride_qh
        stride_ob, stride_ot, stride_oh = stride_qb, stride_qt, stride_qh
    elif IS_PAIRED:
        stride_kb, stride_kt, stride_kh = stride_qb, stride_qt, stride_qh
        stride_ob, stride_ot, stride_oh = stride_vb, stride_vt, stride_vh
    # Where each tensor's first tile is, in units.
    q_at = b * stride_qb + h * stride_qh + start * stride_qt + first_k // UNIT
    k_at = b * stride_kb + h * stride_kh + start * stride_kt + first_k // UNIT
    v_at = b * stride_vb + h * stride_vh + start * stride_vt + first_v // UNIT
    do_at = b * stride_ob + h * stride_oh + start * stride_ot + first_v // UNIT
    at = (b * T + start) * H + h
    dk_at = (pid_v * all_rows + at) * (K // UNIT) + first_k // UNIT
    dv_at = (pid_k * all_rows + at) * (V // UNIT) + first_v // UNIT
    q_offs = _offsets(stride_qt, BLOCK_T, BLOCK_K, _copied(BLOCK_K, GROUPS))
    k_offs = _offsets(stride_kt, BLOCK_T, BLOCK_K, _copied(BLOCK_K, GROUPS))
    v_offs = _offsets(stride_vt, BLOCK_T, BLOCK_V, _copied(BLOCK_V, GROUPS))
    do_offs = _offsets(stride_ot, BLOCK_T, BLOCK_V, _copied(BLOCK_V, GROUPS))
    dk_offs = _offsets(H * (K // UNIT), BLOCK_T, BLOCK_K, _stored(BLOCK_K, GROUPS))
    dv_offs = _offsets(H * (V // UNIT), BLOCK_T, BLOCK_V, _stored(BLOCK_V, GROUPS))

    keys: gl.constexpr = _shared(BLOCK_T, BLOCK_K)
    values: gl.constexpr = _shared(BLOCK_T, BLOCK_V)
    qs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_K], keys)
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_K], keys)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_V], values)
    dos = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_V], values)

    offs_k = gl.arange(0, BLOCK_K, gl.SliceLayout(1, STATE)) + first_k
    offs_v = gl.arange(0, BLOCK_V, gl.SliceLayout(0, STATE)) + first_v
    state_offs = pid * K * V + (offs_k[:, None] * V + offs_v[None, :])
    state_mask = (offs_k < K)[:, None] & (offs_v < V)[None, :]
    if USE_BEHIND:
        minus_behind = -gl.load(behind_ptr + state_offs, mask=state_mask, other=0.0)
    else:
        minus_behind = gl.zeros([BLOCK_K, BLOCK_V], gl.float32, STATE)
    if SUM_BEHIND:
        for i in gl.static_range(STAGES - 1):
            rows = left - i * BLOCK_T
            q_t, do_t = q_at + i * BLOCK_T * stride_qt, do_at + i * BLOCK_T * stride_ot
            _copy(qs.index(i), q_ptr + q_t * UNIT, q_offs, rows, left_k, WHOLE_K)
            _copy(dos.index(i), do_ptr + do_t * UNIT, do_offs, rows, left_v, WHOLE_V)
            async_copy.commit_group()
        summed = warpgroup_mma_init(-minus_behind)
        for i in range(0, chunks):
            async_copy.wait_group(STAGES - 2)
            behind = warpgroup_mma_wait(0, deps=[summed])
            q_t, do = qs.index(i % STAGES).permute((1, 0)), dos.index(i % STAGES)
            summed = warpgroup_mma(q_t, do, behind, is_async=True)
            _barrier()
            ahead = i + STAGES - 1
            rows = left - ahead * BLOCK_T
            q_t = q_at + ahead.to(gl.int64) * BLOCK_T * stride_qt
            do_t = do_at + ahead.to(gl.int64) * BLOCK_T * stride_ot
            _copy(qs.index(ahead % STAGES), q_ptr + q_t * UNIT, q_offs, rows, left_k, WHOLE_K)
            _copy(dos.index(ahead % STAGES), do_ptr + do_t * UNIT, do_offs, rows, left_v, WHOLE_V)
            async_copy.commit_group()
        async_copy.wait_group(0)
        minus_behind = -warpgroup_mma_wait(0, deps=[summed])
        _barrier()
    if STORE_FIRST:
        gl.store(first_ptr + state_offs, -minus_behind, mask=state_mask)
    if USE_BEFORE:
        before = gl.load(before_ptr + state_offs, mask=state_mask, other=0.0)
    else:
        before = gl.zeros([BLOCK_K, BLOCK_V], gl.float32, STATE)

    for i in gl.static_range(STAGES - 1):
        rows = left - i * BLOCK_T
        q_t, k_t = q_at + i * BLOCK_T * stride_qt, k_at + i * BLOCK_T * stride_kt
        v_t, do_t = v_at + i * BLOCK_T * stride_vt, do_at + i * BLOCK_T * stride_ot
        _copy(qs.index(i), q_ptr + q_t * UNIT, q_offs, rows, left_k, WHOLE_K)
        _copy(ks.index(i), k_ptr + k_t * UNIT, k_offs, rows, left_k, WHOLE_K)
        _copy(vs.index(i), v_ptr + v_t * UNIT, v_offs, rows, left_v, WHOLE_V)
        _copy(dos.index(i), do_ptr + do_t * UNIT, do_offs, rows, left_v, WHOLE_V)
        async_copy.commit_group()
    square: gl.constexpr = _shared(BLOCK_T, BLOCK_T)
    states: gl.constexpr = _shared(BLOCK_K, BLOCK_V)
    dov_smem = gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK_T, BLOCK_T], square)
    qk_smem = gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK_T, BLOCK_T], square)
    s_smem = gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK_K, BLOCK_V], states)
    r_smem = gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK_K, BLOCK_V], states)
    queries = gl.arange(0, BLOCK_T, gl.SliceLayout(1, SCORES))[:, None]
    others = gl.arange(0, BLOCK_T, gl.SliceLayout(0, SCORES))[None, :]
    seen = queries >= others
    no_scores = gl.zeros([BLOCK_T, BLOCK_T], gl.float32, SCORES)
    nothing = gl.zeros([BLOCK_T, BLOCK_V], gl.float32, ROWS)
    next_before = warpgroup_mma_init(before)
    for i in range(0, chunks):
        async_copy.wait_group(STAGES - 2)
        stage = i % STAGES
        q, k, v, do = qs.index(stage), ks.index(stage), vs.index(stage), dos.index(stage)
        before = warpgroup_mma_wait(0, deps=[next_before])
        do_v = warpgroup_mma(do, v.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        q_k = warpgroup_mma(q, k.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        minus_behind = warpgroup_mma(q.permute((1, 0)), do, minus_behind, is_async=True)

        _barrier()
        ahead = i + STAGES - 1
        t = _opaque(ahead * BLOCK_T)
        rows = left - ahead * BLOCK_T
        q_t = q_at + _times(t, stride_qt)
        if IS_ALIKE:
            k_t, v_t, do_t = q_t, q_t, q_t
        elif IS_PAIRED:
            k_t = q_t
            v_t = v_at + _times(t, stride_vt)
            do_t = v_t
        else:
            k_t = k_at + _times(t, stride_kt)
            v_t = v_at + _times(t, stride_vt)
            do_t = do_at + _times(t, stride_ot)
        to = ahead % STAGES
        _copy(qs.index(to), q_ptr + q_t * UNIT, q_offs, rows, left_k, WHOLE_K)
        _copy(ks.index(to), k_ptr + k_t * UNIT, k_offs, rows, left_k, WHOLE_K)
        _copy(vs.index(to), v_ptr + v_t * UNIT, v_offs, rows, left_v, WHOLE_V)
        _copy(dos.index(to), do_ptr + do_t * UNIT, do_offs, rows, left_v, WHOLE_V)
        async_copy.commit_group()

        zero = _opaque(i * 0)
        dov, qk = dov_smem.index(zero), qk_smem.index(zero)
        s, r = s_smem.index(zero), r_smem.index(zero)
        s.store(before.to(gl.bfloat16))
        do_v, q_k = warpgroup_mma_wait(1, deps=[do_v, q_k])
        dov.store(gl.where(seen, do_v, 0.0).to(gl.bfloat16))
        qk.store(gl.where(seen, q_k, 0.0).to(gl.bfloat16))
        minus_behind = warpgroup_mma_wait(0, deps=[minus_behind])
        r.store((-minus_behind).to(gl.bfloat16))
        fence_async_shared()

        t = _opaque(i * BLOCK_T)
        rows = left - i * BLOCK_T
        dk_t = dk_at + _times(t, H * (K // UNIT))
        dv_t = dk_t if IS_ALIKE else dv_at + _times(t, H * (V // UNIT))
        d = warpgroup_mma(dov, k, nothing, use_acc=False, is_async=True)
        d = warpgroup_mma(do, s.permute((1, 0)), d, is_async=True)
        d = warpgroup_mma_wait(0, deps=[d])
        dq = _rounded(d, scale)
        d = warpgroup_mma(dov.permute((1, 0)), q, d, use_acc=False, is_async=True)
        d = warpgroup_mma(v, r.permute((1, 0)), d, is_async=True)
        _store(dq_ptr + dk_t * UNIT, dq, dk_offs, rows, left_k, WHOLE_K)
        d = warpgroup_mma_wait(0, deps=[d])
        dk = _rounded(d, scale)
        d = warpgroup_mma(qk.permute((1, 0)), do, d, use_acc=False, is_async=True)
        d = warpgroup_mma(k, r, d, is_async=True)
        _store(dk_ptr + dk_t * UNIT, dk, dk_offs, rows, left_k, WHOLE_K)
        d = warpgroup_mma_wait(0, deps=[d])
        dv = _rounded(d, scale)
        next_before = warpgroup_mma(k.permute((1, 0)), v, before, is_async=True)
        _store(dv_ptr + dv_t * UNIT, dv, dv_offs, rows, left_v, WHOLE_V)
    async_copy.wait_group(0)
    warpgroup_mma_wait(0, deps=[next_before])
