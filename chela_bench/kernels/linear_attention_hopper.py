"""Draft."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy, fence_async_shared, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait,
)
from chela_bench.kernels.linear_attention_config import RUNTIME


@gluon.constexpr_function
def _mma(columns, groups=1):
    """An accumulator; groups of four warps split the columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, groups], [16, columns // groups, 16])


@gluon.constexpr_function
def _copy(columns, groups=1):
    """Sixteen bytes a thread, 128 to a row; what is left of a row at fixed distances."""
    lanes = min(columns // 8, 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4 * groups, 1], [1, 0])


@gluon.constexpr_function
def _store(columns, groups=1):
    """As a warp has them from a tensor core, 16 rows each: two threads a row, or four."""
    lanes = 2 * groups
    return gl.BlockedLayout([lanes // 2, 8], [32 // lanes, lanes], [4, groups], [1, 0])


@gluon.constexpr_function
def _shared(rows, columns):
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


@gluon.jit
def _piece(tokens, pieces, ALIGN: gl.constexpr):
    return ((tokens + pieces - 1) // pieces + ALIGN - 1) // ALIGN * ALIGN


@gluon.jit
def _opaque(x):
    """x, int64, of which LLVM knows nothing: it would keep an address for every load in registers."""
    return gl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [x], dtype=gl.int64, is_pure=False, pack=1)


@gluon.jit
def _offsets(stride, offs_c, LAYOUT: gl.constexpr, BLOCK_T: gl.constexpr):
    offs_t = gl.arange(0, BLOCK_T, gl.SliceLayout(1, LAYOUT))
    return (offs_t[:, None] * stride.to(gl.int32) + offs_c[None, :]).to(gl.uint32)


@gluon.jit
def _fetch(smem, ptr, offsets, left, columns, LAYOUT: gl.constexpr, BLOCK_T: gl.constexpr, C: gl.constexpr, IS_WHOLE: gl.constexpr):
    offs_t = gl.arange(0, BLOCK_T, gl.SliceLayout(1, LAYOUT))
    mask = (offs_t < left)[:, None]
    if not IS_WHOLE:
        mask = mask & (gl.arange(0, C, gl.SliceLayout(0, LAYOUT)) < columns)[None, :]
    async_copy.async_copy_global_to_shared(smem, ptr + offsets, mask)


@gluon.jit(do_not_specialize=RUNTIME)
def _linear_attention_wgmma_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, initial_ptr, final_ptr, cu_seqlens_ptr,  # pointers
    stride_qb: gl.int64, stride_qt: gl.int64, stride_qh: gl.int64,  # in units of 16 elements
    stride_kb: gl.int64, stride_kt: gl.int64, stride_kh: gl.int64,
    stride_vb: gl.int64, stride_vt: gl.int64, stride_vh: gl.int64,
    stride_ob: gl.int64, stride_ot: gl.int64, stride_oh: gl.int64,
    scale, T: gl.int64, H, segments, pieces,  # runtime scalars
    K: gl.constexpr, V: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_V: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, IS_REVERSED: gl.constexpr, IS_PACKED: gl.constexpr,
    USE_INITIAL_STATE: gl.constexpr, STORE_FINAL_STATE: gl.constexpr,
    STATE_IS_TRANSPOSED: gl.constexpr, ALIGN: gl.constexpr,
):
    UNIT: gl.constexpr = 16
    NV: gl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    WHOLE_K: gl.constexpr = K == BLOCK_K
    WHOLE_V: gl.constexpr = V % BLOCK_V == 0
    O: gl.constexpr = _mma(BLOCK_V, GROUPS)
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, BLOCK_V, 16])
    SCORES: gl.constexpr = _mma(BLOCK_T, GROUPS)
    WIDE: gl.constexpr = _copy(BLOCK_K, GROUPS)
    NARROW: gl.constexpr = _copy(BLOCK_V, GROUPS)
    OUT: gl.constexpr = _store(BLOCK_V, GROUPS)
    pid = gl.program_id(0).to(gl.int64)
    pid_v, pid_s, pid_nh = pid % NV, pid // NV % segments, pid // NV // segments
    n, h = pid_nh // H, pid_nh % H
    if IS_PACKED:
        begin = gl.minimum(gl.maximum(gl.load(cu_seqlens_ptr + n).to(gl.int64), 0), T)
        end = gl.minimum(gl.maximum(gl.load(cu_seqlens_ptr + n + 1).to(gl.int64), 0), T)
        b = n * 0
    else:
        begin, end, b = n * 0, n * 0 + T, n
    size = pieces * _piece(end - begin, segments * pieces, ALIGN)
    start = begin + pid_s * size
    end = gl.minimum(start + size, end)
    left = gl.maximum(end - start, 0).to(gl.int32)
    chunks = (left + BLOCK_T - 1) // BLOCK_T

    first_v = pid_v.to(gl.int32) * BLOCK_V
    stride_q, stride_k, stride_v, stride_o = stride_qt * UNIT, stride_kt * UNIT, stride_vt * UNIT, stride_ot * UNIT
    q_ptr += (b * stride_qb + h * stride_qh) * UNIT + start * stride_q
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT + start * stride_k
    v_ptr += (b * stride_vb + h * stride_vh) * UNIT + start * stride_v + first_v
    o_ptr += (b * stride_ob + h * stride_oh) * UNIT + start * stride_o + first_v
    offs_wide = gl.arange(0, BLOCK_K, gl.SliceLayout(0, WIDE))
    q_offs = _offsets(stride_q, offs_wide, WIDE, BLOCK_T)
    k_offs = _offsets(stride_k, offs_wide, WIDE, BLOCK_T)
    v_offs = _offsets(stride_v, gl.arange(0, BLOCK_V, gl.SliceLayout(0, NARROW)), NARROW, BLOCK_T)
    o_offs_v = gl.arange(0, BLOCK_V, gl.SliceLayout(0, OUT))
    o_offs = _offsets(stride_o, o_offs_v, OUT, BLOCK_T)
    o_offs_t = gl.arange(0, BLOCK_T, gl.SliceLayout(1, OUT))
    V_LEFT = V - first_v

    q_smem = gl.allocate_shared_memory(gl.bfloat16, [Q_STAGES, BLOCK_T, BLOCK_K], _shared(BLOCK_T, BLOCK_K))
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_K], _shared(BLOCK_T, BLOCK_K))
    v_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_V], _shared(BLOCK_T, BLOCK_V))
    s_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_K, BLOCK_V], _shared(BLOCK_K, BLOCK_V))
    if GROUPS > 1:  # a group has but some columns of the scores: they meet in shared memory
        p_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_T, BLOCK_T], _shared(BLOCK_T, BLOCK_T))

    for i in gl.static_range(STAGES - 1):
        if i < chunks:
            c = chunks - 1 - i if IS_REVERSED else i
            t = c.to(gl.int64) * BLOCK_T
            rest = left - c * BLOCK_T
            _fetch(q_smem.index(i), q_ptr + t * stride_q, q_offs, rest, K, WIDE, BLOCK_T, BLOCK_K, WHOLE_K)
            _fetch(k_smem.index(i), k_ptr + t * stride_k, k_offs, rest, K, WIDE, BLOCK_T, BLOCK_K, WHOLE_K)
            _fetch(v_smem.index(i), v_ptr + t * stride_v, v_offs, rest, V_LEFT, NARROW, BLOCK_T, BLOCK_V, WHOLE_V)
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
    next_state = warpgroup_mma_init(state)

    rows = gl.arange(0, BLOCK_T, gl.SliceLayout(1, SCORES))
    columns = gl.arange(0, BLOCK_T, gl.SliceLayout(0, SCORES))
    if IS_REVERSED:
        seen = rows[:, None] <= columns[None, :]
    else:
        seen = rows[:, None] >= columns[None, :]
    for i in range(0, chunks):
        async_copy.wait_group(STAGES - 2 if Q_STAGES > 1 else 0)
        stage = i % STAGES
        q, k, v = q_smem.index(stage if Q_STAGES > 1 else 0), k_smem.index(stage), v_smem.index(stage)
        state = warpgroup_mma_wait(0, deps=[next_state])
        s_smem.store(state.to(gl.bfloat16))
        fence_async_shared()
        scores = warpgroup_mma(q, k.permute((1, 0)), gl.zeros([BLOCK_T, BLOCK_T], gl.float32, SCORES), use_acc=False, is_async=True)
        o = warpgroup_mma(q, s_smem, gl.zeros([BLOCK_T, BLOCK_V], gl.float32, O), use_acc=False, is_async=True)

        ahead = i + STAGES - 1
        c = chunks - 1 - ahead if IS_REVERSED else ahead
        t = c.to(gl.int64) * BLOCK_T
        rest = gl.where(ahead < chunks, left - c * BLOCK_T, 0)
        to = ahead % STAGES
        if Q_STAGES > 1:
            _fetch(q_smem.index(to), q_ptr + t * stride_q, q_offs, rest, K, WIDE, BLOCK_T, BLOCK_K, WHOLE_K)
        _fetch(k_smem.index(to), k_ptr + t * stride_k, k_offs, rest, K, WIDE, BLOCK_T, BLOCK_K, WHOLE_K)
        _fetch(v_smem.index(to), v_ptr + t * stride_v, v_offs, rest, V_LEFT, NARROW, BLOCK_T, BLOCK_V, WHOLE_V)
        async_copy.commit_group()

        scores = warpgroup_mma_wait(1, deps=[scores])
        p = gl.where(seen, scores, 0.0).to(gl.bfloat16)
        if GROUPS == 1:
            o = warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, O, 2)), v, o, is_async=True)
        else:
            p_smem.store(p)
            fence_async_shared()
            o = warpgroup_mma(p_smem, v, o, is_async=True)
        next_state = warpgroup_mma(k.permute((1, 0)), v, state, is_async=True)
        o = warpgroup_mma_wait(1, deps=[o])
        if Q_STAGES == 1:
            _fetch(q_smem.index(0), q_ptr + t * stride_q, q_offs, rest, K, WIDE, BLOCK_T, BLOCK_K, WHOLE_K)
            async_copy.commit_group()
        out = gl.convert_layout((o * scale).to(gl.bfloat16), OUT)
        c = chunks - 1 - i if IS_REVERSED else i
        rest = left - c * BLOCK_T
        mask = (o_offs_t < rest)[:, None]
        if not WHOLE_V:
            mask = mask & (o_offs_v < V_LEFT)[None, :]
        gl.store(o_ptr + c.to(gl.int64) * BLOCK_T * stride_o + o_offs, out, mask=mask, eviction_policy="evict_first")
    state = warpgroup_mma_wait(0, deps=[next_state])
    if STORE_FINAL_STATE:
        gl.store(final_ptr + pid_nh * K * V + state_offs, state, mask=state_mask)


@gluon.jit
def _put(ptr, rows, offsets, left, columns, scale, OUT: gl.constexpr, BLOCK_T: gl.constexpr, C: gl.constexpr, IS_WHOLE: gl.constexpr):
    out = gl.convert_layout((rows * scale).to(gl.bfloat16), OUT)
    mask = (gl.arange(0, BLOCK_T, gl.SliceLayout(1, OUT)) < left)[:, None]
    if not IS_WHOLE:
        mask = mask & (gl.arange(0, C, gl.SliceLayout(0, OUT)) < columns)[None, :]
    gl.store(ptr + offsets, out, mask=mask)


@gluon.jit(do_not_specialize=RUNTIME)
def _linear_attention_wgmma_sweep_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,  # pointers
    before_ptr, behind_ptr, first_ptr, cu_seqlens_ptr,
    stride_qb: gl.int64, stride_qt: gl.int64, stride_qh: gl.int64,  # in units of 16 elements
    stride_kb: gl.int64, stride_kt: gl.int64, stride_kh: gl.int64,
    stride_vb: gl.int64, stride_vt: gl.int64, stride_vh: gl.int64,
    stride_ob: gl.int64, stride_ot: gl.int64, stride_oh: gl.int64,  # of do; the others contiguous
    scale, T: gl.int64, H, segments, first_v,  # runtime scalars; first_v: the first block of V
    K: gl.constexpr, V: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_V: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, NV: gl.constexpr, IS_PACKED: gl.constexpr, USE_BEFORE: gl.constexpr,
    USE_BEHIND: gl.constexpr, SUM_BEHIND: gl.constexpr, STORE_FIRST: gl.constexpr,
    ALIGN: gl.constexpr, IS_ALIKE: gl.constexpr,
):
    UNIT: gl.constexpr = 16
    NK: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WHOLE_K: gl.constexpr = K % BLOCK_K == 0
    WHOLE_V: gl.constexpr = V % BLOCK_V == 0
    STATE: gl.constexpr = _mma(BLOCK_V, GROUPS)
    SCORES: gl.constexpr = _mma(BLOCK_T, GROUPS)
    KEYS: gl.constexpr = _mma(BLOCK_K, GROUPS)
    VALUES: gl.constexpr = _mma(BLOCK_V, GROUPS)
    COPY_K: gl.constexpr = _copy(BLOCK_K, GROUPS)
    COPY_V: gl.constexpr = _copy(BLOCK_V, GROUPS)
    OUT_K: gl.constexpr = _store(BLOCK_K, GROUPS)
    OUT_V: gl.constexpr = _store(BLOCK_V, GROUPS)
    pid = gl.program_id(0).to(gl.int64)
    pid_v, pid_k, pid = pid % NV, pid // NV % NK, pid // NV // NK
    pid_s, pid_nh = pid % segments, pid // segments
    n, h = pid_nh // H, pid_nh % H
    if IS_PACKED:
        begin = gl.minimum(gl.maximum(gl.load(cu_seqlens_ptr + n).to(gl.int64), 0), T)
        end = gl.minimum(gl.maximum(gl.load(cu_seqlens_ptr + n + 1).to(gl.int64), 0), T)
        b = n * 0
        all_rows = T * H
    else:
        begin, end, b = n * 0, n * 0 + T, n
        all_rows = gl.num_programs(0) // (NV * NK * segments) * T
    size = _piece(end - begin, segments, ALIGN)
    start = begin + pid_s * size
    end = gl.minimum(start + size, end)
    left = gl.maximum(end - start, 0).to(gl.int32)
    chunks = (left + BLOCK_T - 1) // BLOCK_T

    first_k = pid_k.to(gl.int32) * BLOCK_K
    first_v = (first_v + pid_v.to(gl.int32)) * BLOCK_V
    if IS_ALIKE:
        stride_kb = stride_qb
        stride_vb = stride_qb
        stride_ob = stride_qb
        stride_kt = stride_qt
        stride_vt = stride_qt
        stride_ot = stride_qt
        stride_kh = stride_qh
        stride_vh = stride_qh
        stride_oh = stride_qh
    # Where each tensor's tile begins, in units, as strides are.
    q_at = b * stride_qb + h * stride_qh + start * stride_qt + first_k // UNIT
    k_at = b * stride_kb + h * stride_kh + start * stride_kt + first_k // UNIT
    v_at = b * stride_vb + h * stride_vh + start * stride_vt + first_v // UNIT
    do_at = b * stride_ob + h * stride_oh + start * stride_ot + first_v // UNIT
    at = (b * T + start) * H + h
    dk_at = (pid_v * all_rows + at) * (K // UNIT) + first_k // UNIT
    dv_at = (pid_k * all_rows + at) * (V // UNIT) + first_v // UNIT
    left_k, left_v = K - first_k, V - first_v

    columns_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, COPY_K))
    columns_v = gl.arange(0, BLOCK_V, gl.SliceLayout(0, COPY_V))
    q_offs = _offsets(stride_qt * UNIT, columns_k, COPY_K, BLOCK_T)
    k_offs = _offsets(stride_kt * UNIT, columns_k, COPY_K, BLOCK_T)
    v_offs = _offsets(stride_vt * UNIT, columns_v, COPY_V, BLOCK_T)
    do_offs = _offsets(stride_ot * UNIT, columns_v, COPY_V, BLOCK_T)
    out_k = _offsets(H * K, gl.arange(0, BLOCK_K, gl.SliceLayout(0, OUT_K)), OUT_K, BLOCK_T)
    out_v = _offsets(H * V, gl.arange(0, BLOCK_V, gl.SliceLayout(0, OUT_V)), OUT_V, BLOCK_T)

    KEY_TILE: gl.constexpr = _shared(BLOCK_T, BLOCK_K)
    VALUE_TILE: gl.constexpr = _shared(BLOCK_T, BLOCK_V)
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_K], KEY_TILE)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_K], KEY_TILE)
    v_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_V], VALUE_TILE)
    do_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_V], VALUE_TILE)

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
            rest = left - i * BLOCK_T
            _fetch(q_smem.index(i), q_ptr + (q_at + i * BLOCK_T * stride_qt) * UNIT, q_offs, rest, left_k, COPY_K, BLOCK_T, BLOCK_K, WHOLE_K)
            _fetch(do_smem.index(i), do_ptr + (do_at + i * BLOCK_T * stride_ot) * UNIT, do_offs, rest, left_v, COPY_V, BLOCK_T, BLOCK_V, WHOLE_V)
            async_copy.commit_group()
        summed = warpgroup_mma_init(-minus_behind)
        for i in range(0, chunks):
            async_copy.wait_group(STAGES - 2)
            summed = warpgroup_mma_wait(0, deps=[summed])
            stage = i % STAGES
            summed = warpgroup_mma(q_smem.index(stage).permute((1, 0)), do_smem.index(stage), summed, is_async=True)
            ahead = i + STAGES - 1
            t = ahead.to(gl.int64) * BLOCK_T
            rest = left - ahead * BLOCK_T
            to = ahead % STAGES
            _fetch(q_smem.index(to), q_ptr + (q_at + t * stride_qt) * UNIT, q_offs, rest, left_k, COPY_K, BLOCK_T, BLOCK_K, WHOLE_K)
            _fetch(do_smem.index(to), do_ptr + (do_at + t * stride_ot) * UNIT, do_offs, rest, left_v, COPY_V, BLOCK_T, BLOCK_V, WHOLE_V)
            async_copy.commit_group()
        async_copy.wait_group(0)
        minus_behind = -warpgroup_mma_wait(0, deps=[summed])
    if STORE_FIRST:
        gl.store(first_ptr + state_offs, -minus_behind, mask=state_mask)
    if USE_BEFORE:
        before = gl.load(before_ptr + state_offs, mask=state_mask, other=0.0)
    else:
        before = gl.zeros([BLOCK_K, BLOCK_V], gl.float32, STATE)

    for i in gl.static_range(STAGES - 1):
        rest = left - i * BLOCK_T
        _fetch(q_smem.index(i), q_ptr + (q_at + i * BLOCK_T * stride_qt) * UNIT, q_offs, rest, left_k, COPY_K, BLOCK_T, BLOCK_K, WHOLE_K)
        _fetch(k_smem.index(i), k_ptr + (k_at + i * BLOCK_T * stride_kt) * UNIT, k_offs, rest, left_k, COPY_K, BLOCK_T, BLOCK_K, WHOLE_K)
        _fetch(v_smem.index(i), v_ptr + (v_at + i * BLOCK_T * stride_vt) * UNIT, v_offs, rest, left_v, COPY_V, BLOCK_T, BLOCK_V, WHOLE_V)
        _fetch(do_smem.index(i), do_ptr + (do_at + i * BLOCK_T * stride_ot) * UNIT, do_offs, rest, left_v, COPY_V, BLOCK_T, BLOCK_V, WHOLE_V)
        async_copy.commit_group()
    p1_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_T, BLOCK_T], _shared(BLOCK_T, BLOCK_T))
    p2_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_T, BLOCK_T], _shared(BLOCK_T, BLOCK_T))
    s_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_K, BLOCK_V], _shared(BLOCK_K, BLOCK_V))
    r_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_K, BLOCK_V], _shared(BLOCK_K, BLOCK_V))
    queries = gl.arange(0, BLOCK_T, gl.SliceLayout(1, SCORES))
    keys = gl.arange(0, BLOCK_T, gl.SliceLayout(0, SCORES))
    seen = queries[:, None] >= keys[None, :]
    nothing = gl.zeros([BLOCK_T, BLOCK_T], gl.float32, SCORES)
    no_keys = gl.zeros([BLOCK_T, BLOCK_K], gl.float32, KEYS)
    no_values = gl.zeros([BLOCK_T, BLOCK_V], gl.float32, VALUES)
    next_before = warpgroup_mma_init(before)
    for i in range(0, chunks):
        async_copy.wait_group(STAGES - 2)
        before = warpgroup_mma_wait(0, deps=[next_before])
        stage = i % STAGES
        q, k, v, do = q_smem.index(stage), k_smem.index(stage), v_smem.index(stage), do_smem.index(stage)
        scores_1 = warpgroup_mma(do, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores_2 = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        minus_behind = warpgroup_mma(q.permute((1, 0)), do, minus_behind, is_async=True)
        ahead = i + STAGES - 1
        t = ahead.to(gl.int64) * BLOCK_T
        rest = left - ahead * BLOCK_T
        to = ahead % STAGES
        q_t = _opaque(q_at + t * stride_qt)
        if IS_ALIKE:
            k_t = q_t
            v_t = q_t
            do_t = q_t
        else:
            k_t = _opaque(k_at + t * stride_kt)
            v_t = _opaque(v_at + t * stride_vt)
            do_t = _opaque(do_at + t * stride_ot)
        _fetch(q_smem.index(to), q_ptr + q_t * UNIT, q_offs, rest, left_k, COPY_K, BLOCK_T, BLOCK_K, WHOLE_K)
        _fetch(k_smem.index(to), k_ptr + k_t * UNIT, k_offs, rest, left_k, COPY_K, BLOCK_T, BLOCK_K, WHOLE_K)
        _fetch(v_smem.index(to), v_ptr + v_t * UNIT, v_offs, rest, left_v, COPY_V, BLOCK_T, BLOCK_V, WHOLE_V)
        _fetch(do_smem.index(to), do_ptr + do_t * UNIT, do_offs, rest, left_v, COPY_V, BLOCK_T, BLOCK_V, WHOLE_V)
        async_copy.commit_group()
        s_smem.store(before.to(gl.bfloat16))
        scores_1, scores_2 = warpgroup_mma_wait(1, deps=[scores_1, scores_2])
        p1_smem.store(gl.where(seen, scores_1, 0.0).to(gl.bfloat16))
        p2_smem.store(gl.where(seen, scores_2, 0.0).to(gl.bfloat16))
        minus_behind = warpgroup_mma_wait(0, deps=[minus_behind])
        r_smem.store((-minus_behind).to(gl.bfloat16))
        fence_async_shared()

        dq = warpgroup_mma(p1_smem, k, no_keys, use_acc=False, is_async=True)
        dq = warpgroup_mma(do, s_smem.permute((1, 0)), dq, is_async=True)
        dk = warpgroup_mma(p1_smem.permute((1, 0)), q, no_keys, use_acc=False, is_async=True)
        dk = warpgroup_mma(v, r_smem.permute((1, 0)), dk, is_async=True)
        t = i.to(gl.int64) * BLOCK_T * H
        dk_t = _opaque(dk_at + t * (K // UNIT))
        if IS_ALIKE:
            dv_t = dk_t
        else:
            dv_t = _opaque(dv_at + t * (V // UNIT))
        rest = left - i * BLOCK_T
        dq = warpgroup_mma_wait(2, deps=[dq])
        _put(dq_ptr + dk_t * UNIT, dq, out_k, rest, left_k, scale, OUT_K, BLOCK_T, BLOCK_K, WHOLE_K)
        dv = warpgroup_mma(p2_smem.permute((1, 0)), do, no_values, use_acc=False, is_async=True)
        dv = warpgroup_mma(k, r_smem, dv, is_async=True)
        dk = warpgroup_mma_wait(2, deps=[dk])
        _put(dk_ptr + dk_t * UNIT, dk, out_k, rest, left_k, scale, OUT_K, BLOCK_T, BLOCK_K, WHOLE_K)
        next_before = warpgroup_mma(k.permute((1, 0)), v, before, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv])
        _put(dv_ptr + dv_t * UNIT, dv, out_v, rest, left_v, scale, OUT_V, BLOCK_T, BLOCK_V, WHOLE_V)
    async_copy.wait_group(0)
    warpgroup_mma_wait(0, deps=[next_before])
