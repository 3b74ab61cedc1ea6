"""Complex rows of long_conv_factors.py, scheduled by hand for Hopper's tensor cores (sm_90).

The same functions in Gluon, by the transforms of long_conv_hopper.py. A program owns one f1, whose
tables stay in shared memory for all of its rows: with -Im F1 beside F1, since a complex row takes
four products with it and those of one sign only.
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
from chela_bench.kernels.long_conv_hopper import (
    _FLAT,
    _FLAT_2,
    _complex,
    _flat_planes,
    _half_back,
    _half_there,
    _load,
    _next,
    _none,
    _numbers,
    _registers,
    _room,
    _room_for_largest,
    _share_largest,
    _shared,
    _shared_scale,
    _tables,
    _tile,
    _times,
)
from chela_bench.kernels.long_conv_monarch import RUNTIME


@gluon.jit
def _negative_f1(table_ptr):
    """-Im F1"""
    offs = gl.arange(0, 64 * 64, _FLAT)
    table = -gl.load(table_ptr + 64 * 64 + offs).reshape([64, 64])
    smem = gl.allocate_shared_memory(gl.float16, [64, 64], _shared(64, 64))
    smem.store(gl.convert_layout(table, _FLAT_2))
    return smem


@gluon.jit
def _put_planes(re, im, room_re, room_im, N2: gl.constexpr):
    """A row as it was loaded, to where products of what follows the next barrier find it."""
    room_re.store(re.reshape([64, N2]))
    room_im.store(im.reshape([64, N2]))
    fence_async_shared()


@gluon.jit
def _row_there(room_re, room_im, tables, minus, N2: gl.constexpr, PACKED: gl.constexpr):
    """F of the row in both rooms."""
    zero = gl.zeros([64, N2], gl.float32, _product(N2, 1))
    re = warpgroup_mma(tables[0], room_re, zero, use_acc=False, is_async=True)
    im = warpgroup_mma(tables[1], room_re, zero, use_acc=False, is_async=True)
    re = warpgroup_mma(minus, room_im, re, is_async=True)
    im = warpgroup_mma(tables[0], room_im, im, is_async=True)
    re, im = warpgroup_mma_wait(0, deps=[re, im])
    return _half_there(re, im, tables, N2, PACKED)


@gluon.jit
def _start_row_back(room_re, room_im, tables, minus, N2: gl.constexpr):
    """F1^H of what _half_back left in both rooms, not waited for."""
    zero = gl.zeros([64, N2], gl.float32, _product(N2, 1))
    f1_re = tables[0].permute((1, 0))
    re = warpgroup_mma(f1_re, room_re, zero, use_acc=False, is_async=True)
    im = warpgroup_mma(f1_re, room_im, zero, use_acc=False, is_async=True)
    re = warpgroup_mma(tables[1].permute((1, 0)), room_im, re, is_async=True)
    im = warpgroup_mma(minus.permute((1, 0)), room_re, im, is_async=True)
    return re, im


@gluon.jit
def _store_row(ptr, re, im, N2: gl.constexpr):
    LAYOUT: gl.constexpr = _stored(N2, 1)
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, N2, gl.SliceLayout(0, LAYOUT))
    offs = rows[:, None] * N2 + columns[None, :]
    gl.store(ptr + offs, gl.convert_layout(re.to(gl.float16), LAYOUT))
    gl.store(ptr + 64 * N2 + offs, gl.convert_layout(im.to(gl.float16), LAYOUT))


@gluon.jit(do_not_specialize=RUNTIME)
def _spectrum_rows_wgmma_kernel(
    y_ptr, table_ptr, spectrum_ptr,  # pointers
    J: gl.int64, rows: gl.int64, each: gl.int64,  # runtime scalars
    N1: gl.constexpr, N2: gl.constexpr, SPLIT: gl.constexpr, ORDERED: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """long_conv_factors._spectrum_rows_kernel"""
    gl.static_assert(ORDERED and not SPLIT and N1 == 64)
    N: gl.constexpr = N1 * N2
    f1, row = gl.program_id(0) % J, gl.program_id(0) // J * each
    table_ptr += f1 * (4 * (N1 * N1 + N2 * N2 + N))
    tables, minus = _tables(table_ptr, N2), _negative_f1(table_ptr)
    room_re, room_im = _room(N2), _room(N2)
    offs = gl.arange(0, N, _FLAT)
    end = gl.minimum(row + each, rows)
    y_re, y_im = _flat_planes(y_ptr + (row * J + f1) * (2 * N), N)
    for _ in range(0, (end - row).to(gl.int32)):
        _barrier()
        _put_planes(y_re, y_im, room_re, room_im, N2)
        following = gl.minimum(row + 1, end - 1)
        y_re, y_im = _flat_planes(y_ptr + (following * J + f1) * (2 * N), N)
        re, im = _row_there(room_re, room_im, tables, minus, N2, PACKED)
        out = spectrum_ptr + (row * J + f1) * (2 * N) + offs
        gl.store(out, _registers(re.to(gl.float16), N2))
        gl.store(out + N, _registers(im.to(gl.float16), N2))
        row += 1


@gluon.jit(do_not_specialize=RUNTIME)
def _convolve_rows_wgmma_kernel(
    y_ptr, spectrum_ptr, table_ptr,  # pointers
    B: gl.int64, J: gl.int64, rows: gl.int64, each: gl.int64,  # runtime scalars
    N1: gl.constexpr, N2: gl.constexpr, SPLIT: gl.constexpr, ORDERED: gl.constexpr,
    ADJOINT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """long_conv_factors._convolve_rows_kernel"""
    gl.static_assert(ORDERED and not SPLIT and N1 == 64)
    N: gl.constexpr = N1 * N2
    f1, row = gl.program_id(0) % J, gl.program_id(0) // J * each
    table_ptr += f1 * (4 * (N1 * N1 + N2 * N2 + N))
    tables, minus = _tables(table_ptr, N2), _negative_f1(table_ptr)
    x_re, x_im, room_re, room_im = _room(N2), _room(N2), _room(N2), _room(N2)
    end = gl.minimum(row + each, rows)
    b, d = row % B, row // B
    y_re, y_im = _flat_planes(y_ptr + (row * J + f1) * (2 * N), N)
    _put_planes(y_re, y_im, x_re, x_im, N2)
    for _ in range(0, (end - row).to(gl.int32)):
        k_re, k_im = _flat_planes(spectrum_ptr + (d * J + f1) * (2 * N), N)
        re, im = _row_there(x_re, x_im, tables, minus, N2, PACKED)
        following = gl.minimum(row + 1, end - 1)
        y_re, y_im = _flat_planes(y_ptr + (following * J + f1) * (2 * N), N)
        re, im = _times(re, im, _tile(k_re, N2), _tile(k_im, N2), ADJOINT, PACKED)
        re, im = _half_back(re, im, tables, N2, PACKED)
        _barrier()
        room_re.store(re)
        room_im.store(im)
        _put_planes(y_re, y_im, x_re, x_im, N2)
        re, im = _start_row_back(room_re, room_im, tables, minus, N2)
        re, im = warpgroup_mma_wait(0, deps=[re, im])
        _store_row(y_ptr + (row * J + f1) * (2 * N), re, im, N2)
        b, d = _next(b, d, B)
        row += 1


@gluon.jit(do_not_specialize=RUNTIME)
def _gradient_rows_wgmma_kernel(
    x_ptr, dz_ptr, spectrum_ptr, weight_ptr, table_ptr, sum_ptr,  # pointers
    B: gl.int64, J: gl.int64, D: gl.int64, each: gl.int64,  # runtime scalars
    N1: gl.constexpr, N2: gl.constexpr, SPLIT: gl.constexpr, ORDERED: gl.constexpr,
    NEEDS_DX: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """long_conv_factors._gradient_rows_kernel"""
    gl.static_assert(ORDERED and not SPLIT and N1 == 64)
    N: gl.constexpr = N1 * N2
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    f1, first = gl.program_id(0) % J, gl.program_id(0) // J * each
    table_ptr += f1 * (4 * (N1 * N1 + N2 * N2 + N))
    tables, minus = _tables(table_ptr, N2), _negative_f1(table_ptr)
    room_re, room_im = _room(N2), _room(N2)
    g_re_smem = gl.allocate_shared_memory(gl.float32, [N], plain)
    g_im_smem = gl.allocate_shared_memory(gl.float32, [N], plain)
    last = gl.minimum(first + each, D)
    b, d, row = first * 0, first, first * B
    x_re, x_im = _flat_planes(x_ptr + (row * J + f1) * (2 * N), N)
    for _ in range(0, ((last - first) * B).to(gl.int32)):
        at = (row * J + f1) * (2 * N)
        dz_re, dz_im = _flat_planes(dz_ptr + at, N)
        weight = gl.load(weight_ptr + row)
        _barrier()
        _put_planes(x_re, x_im, room_re, room_im, N2)
        re, im = _row_there(room_re, room_im, tables, minus, N2, PACKED)
        xs_re, xs_im = re.to(gl.float16), im.to(gl.float16)
        _barrier()
        _put_planes(dz_re, dz_im, room_re, room_im, N2)
        re, im = _row_there(room_re, room_im, tables, minus, N2, PACKED)
        y_re, y_im = _complex(re, im, xs_re.to(gl.float32), xs_im.to(gl.float32), True)
        y_re, y_im = _registers(y_re * weight, N2), _registers(y_im * weight, N2)
        if b > 0:
            y_re += g_re_smem.load(_FLAT)
            y_im += g_im_smem.load(_FLAT)
        g_re_smem.store(y_re)
        g_im_smem.store(y_im)
        row += 1
        following = gl.minimum(row, last * B - 1)
        x_re, x_im = _flat_planes(x_ptr + (following * J + f1) * (2 * N), N)
        if NEEDS_DX:
            k_re, k_im = _flat_planes(spectrum_ptr + (d * J + f1) * (2 * N), N)
            re, im = _times(re, im, _tile(k_re, N2), _tile(k_im, N2), True, PACKED)
            re, im = _half_back(re, im, tables, N2, PACKED)
            _barrier()
            room_re.store(re)
            room_im.store(im)
            fence_async_shared()
            re, im = _start_row_back(room_re, room_im, tables, minus, N2)
            re, im = warpgroup_mma_wait(0, deps=[re, im])
            _store_row(dz_ptr + at, re, im, N2)
        if b + 1 == B:
            re, im = _numbers(g_re_smem, N2), _numbers(g_im_smem, N2)
            re, im = _half_back(re.to(gl.float16), im.to(gl.float16), tables, N2, PACKED)
            _barrier()
            room_re.store(re)
            room_im.store(im)
            fence_async_shared()
            re, im = _start_row_back(room_re, room_im, tables, minus, N2)
            re, im = warpgroup_mma_wait(0, deps=[re, im])
            _store_row(sum_ptr + (d * J + f1) * (2 * N), re, im, N2)
        b, d = _next(b, d, B)


@gluon.jit
def _factor(first_ptr, f1, BLOCKS: gl.constexpr):
    """Re, Im of the first factor's numbers for one f1 and each n1 < BLOCKS, of a table of 16."""
    e = _none()
    for n1 in gl.static_range(BLOCKS):
        at = first_ptr + n1 * 32 + f1
        re, im = gl.load(at).to(gl.float32), gl.load(at + 16).to(gl.float32)
        e += (re + gl.load(at + 512).to(gl.float32), im + gl.load(at + 512 + 16).to(gl.float32))
    return e


@gluon.jit
def _load_blocks(
    ptr, gate_ptr, T, N2: gl.constexpr, UNIT: gl.constexpr, BLOCKS: gl.constexpr,
    HAS_GATE: gl.constexpr,
):  # fmt: skip
    xs = _none()
    for a in gl.static_range(BLOCKS):
        left = (T - a * (64 * N2 // UNIT)).to(gl.int32)
        x = _load(ptr + a * 64 * N2, left, N2, UNIT)
        if HAS_GATE:
            x = x.to(gl.float32) * _load(gate_ptr + a * 64 * N2, left, N2, UNIT).to(gl.float32)
        xs += (x,)
    return xs


@gluon.jit
def _share_largest_of(xs, most, N2: gl.constexpr, BLOCKS: gl.constexpr):
    largest = gl.abs(xs[0].to(gl.float32))
    for a in gl.static_range(1, BLOCKS):
        largest = gl.maximum(largest, gl.abs(xs[a].to(gl.float32)))
    _share_largest(largest, most, N2)


@gluon.jit
def _put_factor(xs, by, e, room_re, room_im, N2: gl.constexpr, BLOCKS: gl.constexpr):
    """One f1 of the first factor on blocks, times `by`, as _put_planes."""
    re = xs[0].to(gl.float32) * (e[0] * by)
    im = xs[0].to(gl.float32) * (e[1] * by)
    for a in gl.static_range(1, BLOCKS):
        re += xs[a].to(gl.float32) * (e[2 * a] * by)
        im += xs[a].to(gl.float32) * (e[2 * a + 1] * by)
    _put_planes(re.to(gl.float16), im.to(gl.float16), room_re, room_im, N2)


@gluon.jit(do_not_specialize=RUNTIME)
def _sum_of_blocks_wgmma_kernel(
    x_ptr, gate_ptr, dz_ptr, first_ptr, table_ptr, sum_ptr, scale_ptr,  # pointers
    stride_xb: gl.int64, stride_xd: gl.int64, stride_gb: gl.int64, stride_gd: gl.int64,
    stride_zb: gl.int64, stride_zd: gl.int64, T: gl.int64, B: gl.int64, D: gl.int64,
    each: gl.int64,  # runtime scalars; strides and T in units of UNIT
    N1: gl.constexpr, N2: gl.constexpr, UNIT: gl.constexpr, SPLIT: gl.constexpr,
    ORDERED: gl.constexpr, BLOCKS: gl.constexpr, HAS_GATE: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """sum of long_conv_factors._gradient_rows_kernel from rows themselves, of a few blocks, by
    `each` channels and one f1, over a scale [D, J]: a row's blocks are as many bytes as its y."""
    gl.static_assert(ORDERED and not SPLIT and N1 == 64)
    N: gl.constexpr = N1 * N2
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    f1, first = gl.program_id(0) % BLOCKS, gl.program_id(0) // BLOCKS * each
    e = _factor(first_ptr, f1, BLOCKS)
    table_ptr += f1 * (4 * (N1 * N1 + N2 * N2 + N))
    tables, minus = _tables(table_ptr, N2), _negative_f1(table_ptr)
    room_re, room_im, most = _room(N2), _room(N2), _room_for_largest()
    g_re_smem = gl.allocate_shared_memory(gl.float32, [N], plain)
    g_im_smem = gl.allocate_shared_memory(gl.float32, [N], plain)
    last = gl.minimum(first + each, D)
    b, d = first * 0, first
    for _ in range(0, ((last - first) * B).to(gl.int32)):
        gate_row_ptr = gate_ptr
        if HAS_GATE:
            gate_row_ptr += (b * stride_gb + d * stride_gd) * UNIT
        row_ptr = x_ptr + (b * stride_xb + d * stride_xd) * UNIT
        xs = _load_blocks(row_ptr, gate_row_ptr, T, N2, UNIT, BLOCKS, False)
        _share_largest_of(xs, most, N2, BLOCKS)
        x_scale, inverse = _shared_scale(most, gl.float32)
        _barrier()
        _put_factor(xs, inverse, e, room_re, room_im, N2, BLOCKS)
        row_ptr = dz_ptr + (b * stride_zb + d * stride_zd) * UNIT
        if BLOCKS == 2:  # of more there is no room in registers
            xs = _load_blocks(row_ptr, gate_row_ptr, T, N2, UNIT, BLOCKS, HAS_GATE)
        re, im = _row_there(room_re, room_im, tables, minus, N2, PACKED)
        x_re, x_im = re.to(gl.float16), im.to(gl.float16)
        if BLOCKS != 2:
            xs = _load_blocks(row_ptr, gate_row_ptr, T, N2, UNIT, BLOCKS, HAS_GATE)
        _share_largest_of(xs, most, N2, BLOCKS)
        dz_scale, inverse = _shared_scale(most, gl.float32)
        _barrier()
        _put_factor(xs, inverse, e, room_re, room_im, N2, BLOCKS)
        re, im = _row_there(room_re, room_im, tables, minus, N2, PACKED)
        scale = x_scale * dz_scale
        re, im = _complex(re, im, x_re.to(gl.float32), x_im.to(gl.float32), True)
        g_re, g_im = _registers(re * scale, N2), _registers(im * scale, N2)
        if b > 0:
            g_re += g_re_smem.load(_FLAT)
            g_im += g_im_smem.load(_FLAT)
        if b + 1 < B:
            g_re_smem.store(g_re)
            g_im_smem.store(g_im)
        else:
            _share_largest(gl.maximum(gl.abs(g_re), gl.abs(g_im)), most, N2)
            scale, by = _shared_scale(most, gl.float32)
            gl.store(scale_ptr + d * BLOCKS + f1, scale)
            re, im = _tile((g_re * by).to(gl.float16), N2), _tile((g_im * by).to(gl.float16), N2)
            re, im = _half_back(re, im, tables, N2, PACKED)
            _barrier()
            room_re.store(re)
            room_im.store(im)
            fence_async_shared()
            re, im = _start_row_back(room_re, room_im, tables, minus, N2)
            re, im = warpgroup_mma_wait(0, deps=[re, im])
            _store_row(sum_ptr + (d * BLOCKS + f1) * (2 * N), re, im, N2)
        b, d = _next(b, d, B)
