"""Spectra of long kernels, by hand for Hopper (sm_90): long_conv_monarch._kernel_spectrum_kernel.

Of more blocks than one they are what long_conv_hopper_blocks.py derives, K_b = S_b - i S_{b-1}.
Taps of 16 bits in single float16 numbers: a row is read once, into registers while the row before
is transformed, and lies in shared memory, a block after a block of zeros. A block and the one
before are then one complex row, K_b = -i F(k_{b-1} + i k_b), and nothing is kept from block to
block. Taps of float32, and pairs of float16 numbers (SPLIT), which float16 rows need: registers
hold no row, so it is read three times.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from chela_bench.kernels.linear_attention_hopper import _barrier, _product
from chela_bench.kernels.long_conv_hopper import (
    _FLAT,
    _complex,
    _larger,
    _load,
    _none,
    _numbers,
    _operand,
    _own_largest,
    _power_of_two,
    _registers,
    _room,
    _room_for_largest,
    _scaled,
    _share_own,
    _shared,
    _shared_scale,
    _tables,
    _there,
    _there_of,
)
from chela_bench.kernels.long_conv_hopper_rows import _negative_f1, _row_there
from chela_bench.kernels.long_conv_monarch import RUNTIME


@gluon.jit
def _norm(squares):
    """The power of two under the root of their sum, and one over that, or 1 if all are zero."""
    norm, under = _power_of_two(gl.sqrt(gl.sum(squares, axis=0)))
    return norm, gl.where(norm == 0, 1.0, under)


@gluon.jit
def _load_block(ptr, taps, block, N2: gl.constexpr, UNIT: gl.constexpr):
    """Of a row; taps in units."""
    left = (taps - block * (64 * N2 // UNIT)).to(gl.int32)
    return _load(ptr + block * (64 * N2), left, N2, UNIT)


@gluon.jit
def _load_row(ptr, taps, N2: gl.constexpr, UNIT: gl.constexpr, BLOCKS: gl.constexpr):
    row = _none()
    for block in gl.static_range(BLOCKS):
        row += (_load_block(ptr, taps, block, N2, UNIT),)
    return row


@gluon.jit(do_not_specialize=RUNTIME)
def _spectrum_of_rows_wgmma_kernel(
    taps_ptr, table_ptr, spectrum_ptr, scale_ptr,  # pointers
    stride_kd: gl.int64, taps: gl.int64, total: gl.int64, each: gl.int64,
    # runtime scalars; stride_kd and taps in units of UNIT
    N1: gl.constexpr, N2: gl.constexpr, UNIT: gl.constexpr, SPLIT: gl.constexpr,
    ORDERED: gl.constexpr, BLOCKS: gl.constexpr, ROOT_N: gl.constexpr,
):  # fmt: skip
    """Of taps of 16 bits, for bfloat16 rows."""
    gl.static_assert(ORDERED and not SPLIT and N1 == 64)
    N: gl.constexpr = N1 * N2
    d = gl.program_id(0).to(gl.int64) * each
    end = gl.minimum(d + each, total)
    row = _load_row(taps_ptr + d * stride_kd * UNIT, taps, N2, UNIT, BLOCKS)
    tables = _tables(table_ptr, N2)
    SEVERAL: gl.constexpr = BLOCKS > 1
    room = gl.allocate_shared_memory(gl.float16, [BLOCKS + SEVERAL, 64, N2], _shared(64, N2))
    minus = tables[1]
    if SEVERAL:
        minus = _negative_f1(table_ptr)
        room.index(0).store(gl.zeros([N], gl.float16, _FLAT).reshape([64, N2]))
    most = _room_for_largest()
    offs = gl.arange(0, N, _FLAT)
    for _ in range(0, (end - d).to(gl.int32)):
        own = _own_largest(row[0], N2)
        for block in gl.static_range(1, BLOCKS):
            own = _larger(own, _own_largest(row[block], N2))
        _share_own(own, most, row[0].dtype)
        scale, inverse = _shared_scale(most, row[0].dtype)
        squares = gl.zeros([N], gl.float32, _FLAT)
        for block in gl.static_range(BLOCKS):
            k = row[block].to(gl.float32) * inverse
            squares += k * k
        norm, under = _norm(squares)
        gl.store(scale_ptr + d, scale * norm)
        for block in gl.static_range(BLOCKS):
            to = room.index(block + SEVERAL)
            to.store(_scaled(row[block], inverse * under).reshape([64, N2]))
        fence_async_shared()
        there = gl.where(d + 1 < end, taps, 0)
        row = _load_row(taps_ptr + (d + 1) * stride_kd * UNIT, there, N2, UNIT, BLOCKS)
        out = spectrum_ptr + d * (BLOCKS * 2 * N)
        for block in range(0, BLOCKS):
            if SEVERAL:
                im, re = _row_there(
                    room.index(block), room.index(block + 1), tables, minus, N2, True
                )
                im = -im
            else:
                re, im = _there_of(room.index(0), tables, N2, True)
            at = out + block * (2 * N) + offs
            gl.store(at, _registers((re * ROOT_N).to(gl.float16), N2))
            gl.store(at + N, _registers((im * ROOT_N).to(gl.float16), N2))
        d += 1


@gluon.jit
def _rest(x):
    """What rounding leaves of x, in float16; and x rounded."""
    rounded = x.to(gl.float16)
    return (x - rounded.to(gl.float32)).to(gl.float16), rounded


@gluon.jit
def _there_split(x, tables, rests, room, rest_room, N2: gl.constexpr):
    """_there of a float32 row, in pairs of float16 numbers."""
    f1_re, f1_im, f2_re, f2_im, tw_re, tw_im = tables
    r1_re, r1_im, r2_re, r2_im, rw_re, rw_im = rests
    zero = gl.zeros([64, N2], gl.float32, _product(N2, 1))
    rest, x = _rest(x)
    room.store(x.reshape([64, N2]))
    rest_room.store(rest.reshape([64, N2]))
    fence_async_shared()
    x, rest = room, rest_room
    re = warpgroup_mma(f1_re, x, zero, use_acc=False, is_async=True)
    im = warpgroup_mma(f1_im, x, zero, use_acc=False, is_async=True)
    re = warpgroup_mma(r1_re, x, re, is_async=True)
    im = warpgroup_mma(r1_im, x, im, is_async=True)
    re = warpgroup_mma(f1_re, rest, re, is_async=True)
    im = warpgroup_mma(f1_im, rest, im, is_async=True)
    re, im = warpgroup_mma_wait(0, deps=[re, im])
    t_re = _numbers(tw_re, N2).to(gl.float32) + _numbers(rw_re, N2)
    t_im = _numbers(tw_im, N2).to(gl.float32) + _numbers(rw_im, N2)
    re, im = _complex(re, im, t_re, t_im, False)
    a_rest, a = _rest(re)
    b_rest, b = _rest(im)
    a, b = gl.convert_layout(a, _operand(N2)), gl.convert_layout(b, _operand(N2))
    a_rest = gl.convert_layout(a_rest, _operand(N2))
    b_rest = gl.convert_layout(b_rest, _operand(N2))
    re = warpgroup_mma(a, f2_re, zero, use_acc=False, is_async=True)
    im = warpgroup_mma(a, f2_im, zero, use_acc=False, is_async=True)
    re = warpgroup_mma(a, r2_re, re, is_async=True)
    im = warpgroup_mma(a, r2_im, im, is_async=True)
    re = warpgroup_mma(a_rest, f2_re, re, is_async=True)
    im = warpgroup_mma(a_rest, f2_im, im, is_async=True)
    im = warpgroup_mma(b, f2_re, im, is_async=True)
    im = warpgroup_mma(b, r2_re, im, is_async=True)
    im = warpgroup_mma(b_rest, f2_re, im, is_async=True)
    b, b_rest = -b, -b_rest
    re = warpgroup_mma(b, f2_im, re, is_async=True)
    re = warpgroup_mma(b, r2_im, re, is_async=True)
    re = warpgroup_mma(b_rest, f2_im, re, is_async=True)
    return warpgroup_mma_wait(0, deps=[re, im])


@gluon.jit
def _spectrum_of(
    k, tables, rests, room, rest_room, N2: gl.constexpr, SPLIT: gl.constexpr,
    ROOT_N: gl.constexpr,
):  # fmt: skip
    if SPLIT:
        re, im = _there_split(k, tables, rests, room, rest_room, N2)
    else:
        re, im = _there(k.to(gl.float16), tables, room, N2, False)
    return re * ROOT_N, im * ROOT_N


@gluon.jit(do_not_specialize=RUNTIME)
def _kernel_spectrum_wgmma_kernel(
    k_ptr, table_ptr, spectrum_ptr, scale_ptr,  # pointers
    stride_kd: gl.int64, taps: gl.int64, total: gl.int64, each: gl.int64,
    # runtime scalars; stride_kd and taps in units of UNIT
    N1: gl.constexpr, N2: gl.constexpr, UNIT: gl.constexpr, SPLIT: gl.constexpr,
    ORDERED: gl.constexpr, BLOCKS: gl.constexpr, ROOT_N: gl.constexpr,
):  # fmt: skip
    """Of any taps, in pairs of float16 numbers if SPLIT: what single ones lose is less than
    bfloat16 rows do, but not than float16 rows."""
    gl.static_assert(ORDERED and N1 == 64)
    N: gl.constexpr = N1 * N2
    PRODUCT: gl.constexpr = _product(N2, 1)
    tables = _tables(table_ptr, N2)
    rests = tables
    if SPLIT:
        rests = _tables(table_ptr + 2 * (64 * 64 + N2 * N2 + 64 * N2), N2)
    room, rest_room = _room(N2), _room(N2)
    offs = gl.arange(0, N, _FLAT)
    first = gl.program_id(0).to(gl.int64) * each
    for i in range(0, (gl.minimum(first + each, total) - first).to(gl.int32)):
        d = first + i
        row_ptr = k_ptr + d * stride_kd * UNIT
        out = spectrum_ptr + d * (BLOCKS * 2 * N) + offs
        if BLOCKS == 1:
            k = _load_block(row_ptr, taps, 0, N2, UNIT).to(gl.float32)
            scale, inverse = _power_of_two(gl.max(gl.abs(k), axis=0))
            k *= inverse
            norm, under = _norm(k * k)
            gl.store(scale_ptr + d, scale * norm)
            re, im = _spectrum_of(k * under, tables, rests, room, rest_room, N2, SPLIT, ROOT_N)
            gl.store(out, _registers(re.to(gl.float16), N2))
            gl.store(out + N, _registers(im.to(gl.float16), N2))
        else:
            largest = gl.zeros([N], gl.float32, _FLAT)
            for block in range(0, BLOCKS):
                k = _load_block(row_ptr, taps, block, N2, UNIT).to(gl.float32)
                largest = gl.maximum(largest, gl.abs(k))
            scale, inverse = _power_of_two(gl.max(largest, axis=0))
            squares = gl.zeros([N], gl.float32, _FLAT)
            for block in range(0, BLOCKS):
                k = _load_block(row_ptr, taps, block, N2, UNIT).to(gl.float32) * inverse
                squares += k * k
            norm, under = _norm(squares)
            gl.store(scale_ptr + d, scale * norm)
            before_re = gl.zeros([64, N2], gl.float32, PRODUCT)
            before_im = gl.zeros([64, N2], gl.float32, PRODUCT)
            for block in range(0, BLOCKS):
                k = _load_block(row_ptr, taps, block, N2, UNIT).to(gl.float32) * (inverse * under)
                _barrier()
                re, im = _spectrum_of(k, tables, rests, room, rest_room, N2, SPLIT, ROOT_N)
                gl.store(out, _registers((re + before_im).to(gl.float16), N2))
                gl.store(out + N, _registers((im - before_re).to(gl.float16), N2))
                before_re, before_im = re, im
                out += 2 * N
