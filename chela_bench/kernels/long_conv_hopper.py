"""Long convolution of 16-bit rows, scheduled by hand for Hopper's tensor cores (sm_90).

The same functions as in long_conv_monarch.py, in Gluon, Triton's language
below Triton. What one product gives the next one takes from registers; only the first product of
each way takes what it multiplies from shared memory, since it sums over the tile's rows. F1, F2 and
the twiddle stay in shared memory for all rows of a program. A row of 4096 is then about 1300
instructions a warp and 48 products, two or three programs an SM.

Spectra, twiddles and whatever else is only ever multiplied element by element lie in memory in the
order of a product's registers (ORDERED): 8 numbers that one lane has, 16 bytes, then those of the
next lane. long_conv_monarch._order is the same in Triton.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from chela_bench.kernels.linear_attention_hopper import _barrier, _product, _stored
from chela_bench.kernels.long_conv_monarch import RUNTIME

_FLAT = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))
_FLAT_2 = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.constexpr_function
def _operand(columns):
    return gl.DotOperandLayout(0, _product(columns, 1), 2)


@gluon.constexpr_function
def _shared(rows, columns):
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.float16)


@gluon.jit
def _tile(flat, N2: gl.constexpr):
    """[64, N2] in a product's layout from numbers in its registers' order; moves nothing."""
    flat = flat.reshape([N2 // 16, 4, 8, 4, 2, 2, 2])  # columns / 16; warp, row, pair; 8, 8 rows, 1
    tile = flat.permute((1, 5, 2, 0, 4, 3, 6)).reshape([64, N2])
    return gl.convert_layout(tile, _product(N2, 1), assert_trivial=True)


@gluon.jit
def _registers(tile, N2: gl.constexpr):
    """The other way."""
    tile = tile.reshape([4, 2, 8, N2 // 16, 2, 4, 2]).permute((3, 0, 2, 5, 4, 1, 6))
    return gl.convert_layout(tile.reshape([64 * N2]), _FLAT, assert_trivial=True)


@gluon.jit
def _table(ptr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Into shared memory, for products."""
    offs = gl.arange(0, ROWS * COLUMNS, _FLAT)
    table = gl.load(ptr + offs).reshape([ROWS, COLUMNS])
    smem = gl.allocate_shared_memory(gl.float16, [ROWS, COLUMNS], _shared(ROWS, COLUMNS))
    smem.store(gl.convert_layout(table, _FLAT_2))
    return smem


@gluon.jit
def _tables(table_ptr, N2: gl.constexpr):
    """F1, F2 and the twiddle, each Re and Im."""
    f1_re, f1_im = _table(table_ptr, 64, 64), _table(table_ptr + 64 * 64, 64, 64)
    table_ptr += 2 * 64 * 64
    f2_re, f2_im = _table(table_ptr, N2, N2), _table(table_ptr + N2 * N2, N2, N2)
    table_ptr += 2 * N2 * N2
    offs = gl.arange(0, 64 * N2, _FLAT)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tw_re = gl.allocate_shared_memory(gl.float16, [64 * N2], plain)
    tw_im = gl.allocate_shared_memory(gl.float16, [64 * N2], plain)
    tw_re.store(gl.load(table_ptr + offs))
    tw_im.store(gl.load(table_ptr + 64 * N2 + offs))
    return f1_re, f1_im, f2_re, f2_im, tw_re, tw_im


@gluon.jit
def _numbers(smem, N2: gl.constexpr):
    return _tile(smem.load(_FLAT), N2)


@gluon.jit
def _complex(a_re, a_im, b_re, b_im, CONJUGATE: gl.constexpr):
    """a * b, or a * conj(b)."""
    if CONJUGATE:
        return a_re * b_re + a_im * b_im, a_im * b_re - a_re * b_im
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


# (a_re + i a_im)(b_re + i b_im) of two numbers at once: a in pairs of float32, b and the product in
# pairs of float16. LLVM takes pairs of halves apart and puts them together again around each step.
_TIMES = gl.constexpr("""{
    .reg .b32 re, im, t, u;
    cvt.rn.f16x2.f32 re, $3, $2;
    cvt.rn.f16x2.f32 im, $5, $4;
    mul.rn.f16x2 t, im, $7;
    neg.f16x2 t, t;
    mul.rn.f16x2 u, im, $6;
    fma.rn.f16x2 $0, re, $6, t;
    fma.rn.f16x2 $1, re, $7, u;
}""")
_TIMES_CONJUGATE = gl.constexpr("""{
    .reg .b32 re, im, t, u;
    cvt.rn.f16x2.f32 re, $3, $2;
    cvt.rn.f16x2.f32 im, $5, $4;
    mul.rn.f16x2 t, im, $7;
    mul.rn.f16x2 u, re, $7;
    neg.f16x2 u, u;
    fma.rn.f16x2 $0, re, $6, t;
    fma.rn.f16x2 $1, im, $6, u;
}""")


@gluon.jit
def _times(a_re, a_im, b_re, b_im, CONJUGATE: gl.constexpr, PACKED: gl.constexpr):
    """a * b, or a * conj(b), of float32 a and float16 b, in float16. PACKED: two at a time in
    float16, by half of the instructions and with three roundings for one."""
    if PACKED:
        asm: gl.constexpr = _TIMES_CONJUGATE if CONJUGATE else _TIMES
        return gl.inline_asm_elementwise(
            asm, "=r,=r,r,r,r,r,r,r", [a_re, a_im, b_re, b_im],
            dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    b_re, b_im = b_re.to(gl.float32), b_im.to(gl.float32)
    re, im = _complex(a_re, a_im, b_re, b_im, CONJUGATE)
    return re.to(gl.float16), im.to(gl.float16)


@gluon.jit
def _there(x, tables, room, N2: gl.constexpr, PACKED: gl.constexpr):
    """F x of a float16 row x, flat: Re, Im. `room` [64, N2] is written, and free again after the
    next barrier."""
    room.store(x.reshape([64, N2]))
    fence_async_shared()
    return _there_of(room, tables, N2, PACKED)


@gluon.jit
def _there_of(x, tables, N2: gl.constexpr, PACKED: gl.constexpr):
    """The same of a row in shared memory."""
    zero = gl.zeros([64, N2], gl.float32, _product(N2, 1))
    re = warpgroup_mma(tables[0], x, zero, use_acc=False, is_async=True)
    im = warpgroup_mma(tables[1], x, zero, use_acc=False, is_async=True)
    re, im = warpgroup_mma_wait(0, deps=[re, im])
    return _half_there(re, im, tables, N2, PACKED)


@gluon.jit
def _half_there(re, im, tables, N2: gl.constexpr, PACKED: gl.constexpr):
    """What F1 was multiplied by, on the way there."""
    _, _, f2_re, f2_im, tw_re, tw_im = tables
    zero = gl.zeros([64, N2], gl.float32, _product(N2, 1))
    re, im = _times(re, im, _numbers(tw_re, N2), _numbers(tw_im, N2), False, PACKED)
    a, b = gl.convert_layout(re, _operand(N2)), gl.convert_layout(im, _operand(N2))
    re = warpgroup_mma(a, f2_re, zero, use_acc=False, is_async=True)
    im = warpgroup_mma(a, f2_im, zero, use_acc=False, is_async=True)
    im = warpgroup_mma(b, f2_re, im, is_async=True)
    re = warpgroup_mma(-b, f2_im, re, is_async=True)
    return warpgroup_mma_wait(0, deps=[re, im])


@gluon.jit
def _back(
    re, im, tables, room_re, room_im, N2: gl.constexpr, PACKED: gl.constexpr
):  # fmt: skip
    """Re F^H (re + i im), both float16. Rooms [64, N2] as in _there."""
    re, im = _half_back(re, im, tables, N2, PACKED)
    return _products_back(re, im, tables, room_re, room_im, N2)


@gluon.jit
def _half_back(re, im, tables, N2: gl.constexpr, PACKED: gl.constexpr):
    """What F1^H is yet to be multiplied by."""
    _, _, f2_re, f2_im, tw_re, tw_im = tables
    zero = gl.zeros([64, N2], gl.float32, _product(N2, 1))
    a, b = gl.convert_layout(re, _operand(N2)), gl.convert_layout(im, _operand(N2))
    re = warpgroup_mma(a, f2_re, zero, use_acc=False, is_async=True)
    im = warpgroup_mma(b, f2_re, zero, use_acc=False, is_async=True)
    re = warpgroup_mma(b, f2_im, re, is_async=True)
    im = warpgroup_mma(-a, f2_im, im, is_async=True)
    re, im = warpgroup_mma_wait(0, deps=[re, im])
    return _times(re, im, _numbers(tw_re, N2), _numbers(tw_im, N2), True, PACKED)


@gluon.jit
def _products_back(re, im, tables, room_re, room_im, N2: gl.constexpr):
    """Re F1^H (re + i im)"""
    room_re.store(re)
    room_im.store(im)
    fence_async_shared()
    z = _start_back(tables, room_re, room_im, N2)
    return warpgroup_mma_wait(0, deps=[z])


@gluon.jit
def _start_back(tables, room_re, room_im, N2: gl.constexpr):
    """The same of rooms, not waited for."""
    f1_re, f1_im = tables[0], tables[1]
    zero = gl.zeros([64, N2], gl.float32, _product(N2, 1))
    z = warpgroup_mma(f1_re.permute((1, 0)), room_re, zero, use_acc=False, is_async=True)
    return warpgroup_mma(f1_im.permute((1, 0)), room_im, z, is_async=True)


@gluon.jit
def _power_of_two(largest):
    """long_conv_monarch._power_of_two"""
    bits = largest.to(gl.int32, bitcast=True) & 0x7F800000
    return bits.to(gl.float32, bitcast=True), (0x7F000000 - bits).to(gl.float32, bitcast=True)


# Two 16-bit numbers as one, twice; whoever reads takes every other one.
_PAIR = gl.constexpr("mov.b32 $0, $2; mov.b32 $1, $2;")
_LARGER = gl.constexpr("max.u16x2 $0, $1, $2;")
_LARGEST = gl.constexpr("""{
    .reg .b32 t;
    prmt.b32 t, $1, $1, 0x1032;
    max.u16x2 t, t, $1;
    redux.sync.max.u32 $0, t, 0xffffffff;
}""")
_LARGEST_32 = gl.constexpr("redux.sync.max.u32 $0, $1, 0xffffffff;")


@gluon.jit
def _first(a, b):
    return a


@gluon.jit
def _larger(a, b):
    return gl.inline_asm_elementwise(
        _LARGER, "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def _own_largest(x, N2: gl.constexpr):
    """The bits of each thread's largest |x|. As numbers they are in the order of the magnitudes, 16
    bits two at a time; NaN is the largest."""
    N: gl.constexpr = 64 * N2
    if x.dtype == gl.float32:
        bits = x.to(gl.int32, bitcast=True) & 0x7FFFFFFF
        own = gl.max(gl.max(bits.reshape([N // 1024, 128, 8]), axis=2), axis=0)
    else:
        pairs = gl.inline_asm_elementwise(
            _PAIR, "=r,=r,r", [x.to(gl.int16, bitcast=True)], dtype=gl.int32, is_pure=True, pack=2
        )  # fmt: skip
        pairs = gl.reduce(pairs.reshape([N // 2, 2]), 1, _first) & 0x7FFF7FFF
        own = gl.reduce(pairs.reshape([N // 1024, 128, 4]), 2, _larger)
        own = gl.reduce(own, 0, _larger)
    return own


@gluon.jit
def _share_own(own, most, dtype: gl.constexpr):
    """Each warp's largest of these, for all to read after a barrier; `most` [4, 32]."""
    asm: gl.constexpr = _LARGEST_32 if dtype == gl.float32 else _LARGEST
    own = gl.inline_asm_elementwise(asm, "=r,r", [own], dtype=gl.int32, is_pure=True, pack=1)
    most.store(own.reshape([4, 32]))


@gluon.jit
def _share_largest(x, most, N2: gl.constexpr):
    _share_own(_own_largest(x, N2), most, x.dtype)


@gluon.jit
def _shared_scale(most, dtype: gl.constexpr):
    """The power of two under the largest |x| of what was shared, and its inverse."""
    every: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [1, 4], [1, 0])
    bits = gl.max(gl.max(most.slice(0, 1, 1).load(every), axis=1), axis=0)
    if dtype == gl.float32:
        largest = bits.to(gl.float32, bitcast=True)
    else:
        largest = (bits & 0xFFFF).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    return _power_of_two(largest)


# Both of two bfloat16 numbers times one power of two, in float16.
_SCALED = gl.constexpr("""{
    .reg .b32 low, high;
    shl.b32 low, $1, 16;
    and.b32 high, $1, 0xffff0000;
    mul.f32 low, low, $2;
    mul.f32 high, high, $2;
    cvt.rn.f16x2.f32 $0, high, low;
}""")


@gluon.jit
def _scaled(x, by):
    """x * by in float16."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            _SCALED, "=r,r,r,r", [x, by], dtype=gl.float16, is_pure=True, pack=2
        )  # fmt: skip
    return (x.to(gl.float32) * by).to(gl.float16)


@gluon.jit
def _put(x, by, room, N2: gl.constexpr):
    """x * by, flat, to where products of what follows the next barrier find it."""
    room.store(_scaled(x, by).reshape([64, N2]))
    fence_async_shared()


@gluon.jit
def _gated(x, gate, HAS_GATE: gl.constexpr):
    return x.to(gl.float32) * gate.to(gl.float32) if HAS_GATE else x


@gluon.jit
def _load(ptr, left, N2: gl.constexpr, UNIT: gl.constexpr):
    """A block of a row, of which `left` units of UNIT tokens are there; flat."""
    offs = gl.arange(0, 64 * N2, _FLAT)
    return gl.load(ptr + offs, mask=offs // UNIT < left, other=0.0)


@gluon.jit
def _store(ptr, z, left, N2: gl.constexpr, UNIT: gl.constexpr):
    LAYOUT: gl.constexpr = _stored(N2, 1)
    z = gl.convert_layout(z.to(ptr.dtype.element_ty), LAYOUT)
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, N2, gl.SliceLayout(0, LAYOUT))
    offs = rows[:, None] * N2 + columns[None, :]
    gl.store(ptr + offs, z, mask=offs // UNIT < left)


@gluon.jit
def _gate_tile(ptr, left, N2: gl.constexpr, UNIT: gl.constexpr):
    LAYOUT: gl.constexpr = _stored(N2, 1)
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, N2, gl.SliceLayout(0, LAYOUT))
    offs = rows[:, None] * N2 + columns[None, :]
    gate = gl.load(ptr + offs, mask=offs // UNIT < left, other=0.0)
    return gl.convert_layout(gate, _product(N2, 1)).to(gl.float32)


@gluon.jit
def _room(N2: gl.constexpr):
    return gl.allocate_shared_memory(gl.float16, [64, N2], _shared(64, N2))


@gluon.jit
def _room_for_largest():
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return gl.allocate_shared_memory(gl.int32, [4, 32], plain)


@gluon.jit
def _flat_planes(ptr, N: gl.constexpr):
    """Re and Im as they lie in memory, loaded early and used late."""
    offs = gl.arange(0, N, _FLAT)
    return gl.load(ptr + offs), gl.load(ptr + N + offs)


@gluon.jit
def _next(b, d, B):
    """The row after d * B + b."""
    last = b + 1 == B
    return gl.where(last, 0, b + 1), gl.where(last, d + 1, d)


@gluon.jit(do_not_specialize=RUNTIME)
def _long_conv_wgmma_kernel(
    x_ptr, gate_ptr, spectrum_ptr, scale_ptr, table_ptr, z_ptr,  # pointers
    stride_xb: gl.int64, stride_xd: gl.int64, stride_gb: gl.int64, stride_gd: gl.int64,
    stride_zb: gl.int64, stride_zd: gl.int64, T: gl.int64, B: gl.int64, rows: gl.int64,
    rows_each: gl.int64,  # runtime scalars; strides and T in units of UNIT
    N1: gl.constexpr, N2: gl.constexpr, UNIT: gl.constexpr, SPLIT: gl.constexpr,
    ORDERED: gl.constexpr, ADJOINT: gl.constexpr, HAS_GATE: gl.constexpr,
):  # fmt: skip
    """long_conv_monarch._long_conv_kernel"""
    gl.static_assert(ORDERED and not SPLIT and N1 == 64)
    N: gl.constexpr = N1 * N2
    PACKED: gl.constexpr = x_ptr.dtype.element_ty == gl.bfloat16
    GATE_BEFORE: gl.constexpr = HAS_GATE and ADJOINT
    tables = _tables(table_ptr, N2)
    room_x, room_re, room_im = _room(N2), _room(N2), _room(N2)
    most = _room_for_largest()
    left = T.to(gl.int32)
    row = gl.program_id(0).to(gl.int64) * rows_each
    end = gl.minimum(row + rows_each, rows)
    b, d = row % B, row // B
    x = _load(x_ptr + (b * stride_xb + d * stride_xd) * UNIT, left, N2, UNIT)
    gate = x
    if GATE_BEFORE:
        gate = _load(gate_ptr + (b * stride_gb + d * stride_gd) * UNIT, left, N2, UNIT)
    x = _gated(x, gate, GATE_BEFORE)
    _share_largest(x, most, N2)
    scale, inverse = _shared_scale(most, x.dtype)
    _put(x, inverse, room_x, N2)
    for i in range(0, (end - row).to(gl.int32)):
        scale *= gl.load(scale_ptr + d)
        k_re, k_im = _flat_planes(spectrum_ptr + d * 2 * N, N)
        re, im = _there_of(room_x, tables, N2, PACKED)
        next_b, next_d = _next(b, d, B)
        there = gl.where(row + i + 1 < end, left, 0)
        x = _load(x_ptr + (next_b * stride_xb + next_d * stride_xd) * UNIT, there, N2, UNIT)
        if GATE_BEFORE:
            at = gate_ptr + (next_b * stride_gb + next_d * stride_gd) * UNIT
            gate = _load(at, there, N2, UNIT)
        re, im = _times(re, im, _tile(k_re, N2), _tile(k_im, N2), ADJOINT, PACKED)
        re, im = _half_back(re, im, tables, N2, PACKED)
        room_re.store(re)
        room_im.store(im)
        x = _gated(x, gate, GATE_BEFORE)
        _share_largest(x, most, N2)
        fence_async_shared()
        z = _start_back(tables, room_re, room_im, N2)
        next_scale, inverse = _shared_scale(most, x.dtype)
        _put(x, inverse, room_x, N2)
        z = warpgroup_mma_wait(0, deps=[z]) * scale
        if HAS_GATE and not ADJOINT:
            z *= _gate_tile(gate_ptr + (b * stride_gb + d * stride_gd) * UNIT, left, N2, UNIT)
        _store(z_ptr + (b * stride_zb + d * stride_zd) * UNIT, z, left, N2, UNIT)
        scale = next_scale
        b, d = next_b, next_d


@gluon.jit
def _none():
    return ()


@gluon.jit
def _store_taps(
    ptr, re, im, left, tables, room_re, room_im, most, N2: gl.constexpr, UNIT: gl.constexpr,
    ROOT_N: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """sqrt(N) Re F^H (re + i im), float32, `left` of it."""
    _share_largest(_registers(gl.maximum(gl.abs(re), gl.abs(im)), N2), most, N2)
    scale, inverse = _shared_scale(most, gl.float32)
    re, im = (re * inverse).to(gl.float16), (im * inverse).to(gl.float16)
    dk = _back(re, im, tables, room_re, room_im, N2, PACKED) * (scale * ROOT_N)
    _store(ptr, dk, left.to(gl.int32), N2, UNIT)


@gluon.jit(do_not_specialize=RUNTIME)
def _long_conv_wgmma_gradients_kernel(
    x_ptr, gate_ptr, dz_ptr, spectrum_ptr, scale_ptr, table_ptr, dx_ptr, dk_ptr,  # pointers
    stride_xb: gl.int64, stride_xd: gl.int64, stride_gb: gl.int64, stride_gd: gl.int64,
    stride_zb: gl.int64, stride_zd: gl.int64, stride_db: gl.int64, stride_dd: gl.int64,
    T: gl.int64, B: gl.int64, D: gl.int64, taps: gl.int64, each: gl.int64,
    # runtime scalars; strides and T in units of UNIT
    N1: gl.constexpr, N2: gl.constexpr, UNIT: gl.constexpr, SPLIT: gl.constexpr,
    ORDERED: gl.constexpr, ROOT_N: gl.constexpr, HAS_GATE: gl.constexpr, NEEDS_DX: gl.constexpr,
    IS_ONE: gl.constexpr,
):  # fmt: skip
    """long_conv_monarch._long_conv_gradients_kernel; IS_ONE if B is 1, so nothing to sum."""
    gl.static_assert(ORDERED and not SPLIT and N1 == 64)
    N: gl.constexpr = N1 * N2
    PACKED: gl.constexpr = x_ptr.dtype.element_ty == gl.bfloat16
    tables = _tables(table_ptr, N2)
    room_x, room_z, room = _room(N2), _room(N2), _room(N2)
    most_x, most_z = _room_for_largest(), _room_for_largest()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SUM: gl.constexpr = gl.float16 if IS_ONE else gl.float32
    g_re_smem = gl.allocate_shared_memory(SUM, [N], plain)
    g_im_smem = gl.allocate_shared_memory(SUM, [N], plain)
    left = T.to(gl.int32)
    first = gl.program_id(0).to(gl.int64) * each
    last = gl.minimum(first + each, D)
    b, d = first * 0, first
    x = _load(x_ptr + d * stride_xd * UNIT, left, N2, UNIT)
    dz = _load(dz_ptr + d * stride_zd * UNIT, left, N2, UNIT)
    gate = dz
    if HAS_GATE:
        gate = _load(gate_ptr + d * stride_gd * UNIT, left, N2, UNIT)
    gated = _gated(dz, gate, HAS_GATE)
    _share_largest(x, most_x, N2)
    _share_largest(gated, most_z, N2)
    x_scale, x_inverse = _shared_scale(most_x, x.dtype)
    z_scale, z_inverse = _shared_scale(most_z, gated.dtype)
    _put(x, x_inverse, room_x, N2)
    _put(gated, z_inverse, room_z, N2)
    for _ in range(0, ((last - first) * B).to(gl.int32)):
        re, im = _there_of(room_x, tables, N2, PACKED)
        x_re, x_im = re.to(gl.float16), im.to(gl.float16)
        re, im = _there_of(room_z, tables, N2, PACKED)
        next_b, next_d = _next(b, d, B)
        there = gl.where(next_d < last, left, 0)
        x = _load(x_ptr + (next_b * stride_xb + next_d * stride_xd) * UNIT, there, N2, UNIT)
        dz = _load(dz_ptr + (next_b * stride_zb + next_d * stride_zd) * UNIT, there, N2, UNIT)
        if HAS_GATE:
            at = gate_ptr + (next_b * stride_gb + next_d * stride_gd) * UNIT
            gate = _load(at, there, N2, UNIT)
        y_re, y_im = _complex(re, im, x_re.to(gl.float32), x_im.to(gl.float32), True)
        scale = x_scale * z_scale
        if not IS_ONE:
            y_re, y_im = y_re * scale, y_im * scale
        y_re, y_im = _registers(y_re, N2), _registers(y_im, N2)
        if b > 0:
            y_re += g_re_smem.load(_FLAT)
            y_im += g_im_smem.load(_FLAT)
        g_re_smem.store(y_re.to(SUM))
        g_im_smem.store(y_im.to(SUM))
        if NEEDS_DX:
            k_re, k_im = _flat_planes(spectrum_ptr + d * 2 * N, N)
            re, im = _times(re, im, _tile(k_re, N2), _tile(k_im, N2), True, PACKED)
            re, im = _half_back(re, im, tables, N2, PACKED)
        gated = _gated(dz, gate, HAS_GATE)
        _share_largest(x, most_x, N2)
        _share_largest(gated, most_z, N2)
        _barrier()
        if NEEDS_DX:
            room.store(re)
            room_z.store(im)
            fence_async_shared()
            dx = _start_back(tables, room, room_z, N2)
        next_x_scale, x_inverse = _shared_scale(most_x, x.dtype)
        next_z_scale, z_inverse = _shared_scale(most_z, gated.dtype)
        _put(x, x_inverse, room_x, N2)
        if NEEDS_DX:
            dx = warpgroup_mma_wait(0, deps=[dx]) * (z_scale * gl.load(scale_ptr + d))
            _store(dx_ptr + (b * stride_db + d * stride_dd) * UNIT, dx, left, N2, UNIT)
        if next_b == 0:
            g_re, g_im = _numbers(g_re_smem, N2), _numbers(g_im_smem, N2)
            dk_row_ptr = dk_ptr + d * taps * UNIT
            _barrier()
            if IS_ONE:
                dk = _back(g_re, g_im, tables, room, room_z, N2, PACKED) * (scale * ROOT_N)
                _store(dk_row_ptr, dk, taps.to(gl.int32), N2, UNIT)
            else:
                _store_taps(
                    dk_row_ptr,
                    g_re,
                    g_im,
                    taps,
                    tables,
                    room,
                    room_z,
                    most_x,
                    N2,
                    UNIT,
                    ROOT_N,
                    PACKED,
                )
        _barrier()
        _put(gated, z_inverse, room_z, N2)
        x_scale, z_scale = next_x_scale, next_z_scale
        b, d = next_b, next_d
