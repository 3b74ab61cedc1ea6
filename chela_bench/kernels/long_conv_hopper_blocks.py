"""Long convolution of two to four blocks of N tokens in one kernel, by hand for Hopper (sm_90).

Each block has a spectrum X_a by the transform of long_conv_monarch.py, the kernel's blocks S_b.
What block a + b spills goes into the next, so with K_b = S_b - i S_{b-1} each block of output is
one real way back:

    z_j = Re F^H sum_{a+b=j} X_a K_b          adjoint: sum_{a-b=j} Z_a conj(K_b)

The X_a lie in shared memory, 16 KB a block, and the sums take their places before the way back;
what moves is x and z, and the kernel's spectrum. Four blocks and the tables are 112 KB, so two
programs an SM.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from chela_bench.kernels.linear_attention_hopper import _barrier
from chela_bench.kernels.long_conv_hopper import (
    _FLAT,
    _FLAT_2,
    _back,
    _complex,
    _gate_tile,
    _load,
    _next,
    _none,
    _put,
    _registers,
    _room_for_largest,
    _share_largest,
    _shared,
    _shared_scale,
    _tables,
    _there_of,
    _tile,
)
from chela_bench.kernels.long_conv_monarch import RUNTIME


@gluon.jit
def _store_by(room, ptr, z, left, N2: gl.constexpr, UNIT: gl.constexpr):
    """By way of shared memory [64, N2] that nothing else needs, where no more is left."""
    room.store(z.to(ptr.dtype.element_ty).to(gl.float16, bitcast=True))
    z = room.load(_FLAT_2).reshape([64 * N2]).to(ptr.dtype.element_ty, bitcast=True)
    z = gl.convert_layout(z, _FLAT)
    offs = gl.arange(0, 64 * N2, _FLAT)
    gl.store(ptr + offs, z, mask=offs // UNIT < left)


@gluon.jit
def _chunks(room, plane, N2: gl.constexpr):
    """Of a plane of `room`, numbers in the order of registers, 8 of each thread at a time."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return room.index(plane)._reinterpret(gl.float16, [N2 // 16, 1024], plain)


@gluon.jit
def _loaded_tile(room, plane, N2: gl.constexpr):
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return _tile(room.index(plane)._reinterpret(gl.float16, [64 * N2], plain).load(_FLAT), N2)


@gluon.jit
def _kernel_chunk(spectrum_ptr, chunk, N: gl.constexpr, BLOCKS: gl.constexpr):
    """8 numbers of each thread, of every block of the kernel: Re, Im, Re, Im, .."""
    offs = chunk * 1024 + gl.arange(0, 1024, _FLAT)
    k = _none()
    for block in gl.static_range(BLOCKS):
        at = spectrum_ptr + block * 2 * N + offs
        k += (gl.load(at), gl.load(at + N))
    return k


@gluon.jit
def _term(x, k, a: gl.constexpr, block: gl.constexpr, CONJUGATE: gl.constexpr):
    """x_a times k_block, or its conjugate, of tuples as from _kernel_chunk."""
    k_re, k_im = k[2 * block].to(gl.float32), k[2 * block + 1].to(gl.float32)
    return _complex(x[2 * a], x[2 * a + 1], k_re, k_im, CONJUGATE)


@gluon.jit
def _sum_chunk(
    room, spectrum_ptr, c, N2: gl.constexpr, BLOCKS: gl.constexpr, ADJOINT: gl.constexpr
):  # fmt: skip
    """Z_j of all blocks in place of X_a, of 8 frequencies of each thread."""
    k = _kernel_chunk(spectrum_ptr, c, 64 * N2, BLOCKS)
    x = _none()
    for plane in gl.static_range(2 * BLOCKS):
        x += (_chunks(room, plane, N2).index(c).load(_FLAT).to(gl.float32),)
    for j in gl.static_range(BLOCKS):
        re = gl.zeros([1024], gl.float32, _FLAT)
        im = gl.zeros([1024], gl.float32, _FLAT)
        for block in gl.static_range(BLOCKS - j if ADJOINT else j + 1):
            y_re, y_im = _term(x, k, j + block if ADJOINT else j - block, block, ADJOINT)
            re += y_re
            im += y_im
        _chunks(room, 2 * j, N2).index(c).store(re.to(gl.float16))
        _chunks(room, 2 * j + 1, N2).index(c).store(im.to(gl.float16))


@gluon.jit(do_not_specialize=RUNTIME)
def _long_conv_wgmma_blocks_kernel(
    x_ptr, gate_ptr, spectrum_ptr, scale_ptr, table_ptr, z_ptr,  # pointers
    stride_xb: gl.int64, stride_xd: gl.int64, stride_gb: gl.int64, stride_gd: gl.int64,
    stride_zb: gl.int64, stride_zd: gl.int64, T: gl.int64, B: gl.int64, rows: gl.int64,
    rows_each: gl.int64,  # runtime scalars; strides and T in units of UNIT
    N1: gl.constexpr, N2: gl.constexpr, UNIT: gl.constexpr, SPLIT: gl.constexpr,
    ORDERED: gl.constexpr, BLOCKS: gl.constexpr, SHRINK: gl.constexpr, ADJOINT: gl.constexpr,
    HAS_GATE: gl.constexpr,
):  # fmt: skip
    """Rows d * B + b: z = gate * A x, or ADJOINT z = A^T (gate * x)."""
    gl.static_assert(ORDERED and not SPLIT and N1 == 64)
    N: gl.constexpr = N1 * N2
    PACKED: gl.constexpr = x_ptr.dtype.element_ty == gl.bfloat16
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tables = _tables(table_ptr, N2)
    room = gl.allocate_shared_memory(gl.float16, [2 * BLOCKS, 64, N2], _shared(64, N2))
    most = _room_for_largest()
    row = gl.program_id(0).to(gl.int64) * rows_each
    end = gl.minimum(row + rows_each, rows)
    b, d = row % B, row // B
    for _ in range(0, (end - row).to(gl.int32)):
        kernel_scale = gl.load(scale_ptr + d)
        row_ptr = x_ptr + (b * stride_xb + d * stride_xd) * UNIT
        gate_row_ptr = gate_ptr
        if HAS_GATE:
            gate_row_ptr += (b * stride_gb + d * stride_gd) * UNIT
        xs = _none()
        for a in gl.static_range(BLOCKS):
            left = (T - a * (N // UNIT)).to(gl.int32)
            x = _load(row_ptr + a * N, left, N2, UNIT)
            if HAS_GATE and ADJOINT:
                gate = _load(gate_row_ptr + a * N, left, N2, UNIT)
                x = x.to(gl.float32) * gate.to(gl.float32)
            xs += (x,)
        largest = gl.abs(xs[0].to(gl.float32))
        for a in gl.static_range(1, BLOCKS):
            largest = gl.maximum(largest, gl.abs(xs[a].to(gl.float32)))
        _share_largest(largest, most, N2)
        scale, inverse = _shared_scale(most, gl.float32)
        for a in gl.static_range(BLOCKS):
            _put(xs[a], inverse, room.index(2 * a), N2)
        for i in range(0, BLOCKS):
            re, im = _there_of(room.index(2 * i), tables, N2, PACKED)
            _barrier()
            out_re = room.index(2 * i)._reinterpret(gl.float16, [N], plain)
            out_im = room.index(2 * i + 1)._reinterpret(gl.float16, [N], plain)
            out_re.store(_registers((re * SHRINK).to(gl.float16), N2))
            out_im.store(_registers((im * SHRINK).to(gl.float16), N2))
        for c in range(0, N2 // 16):
            _sum_chunk(room, spectrum_ptr + d * (BLOCKS * 2 * N), c, N2, BLOCKS, ADJOINT)
        for j in range(0, BLOCKS):
            re, im = _loaded_tile(room, 2 * j, N2), _loaded_tile(room, 2 * j + 1, N2)
            _barrier()
            z = _back(re, im, tables, room.index(2 * j), room.index(2 * j + 1), N2, PACKED)
            z *= scale * kernel_scale / SHRINK
            left = (T - j * (N // UNIT)).to(gl.int32)
            if HAS_GATE and not ADJOINT:
                z *= _gate_tile(gate_row_ptr + j * N, left, N2, UNIT)
            _barrier()
            out = z_ptr + (b * stride_zb + d * stride_zd) * UNIT + j * N
            _store_by(room.index(2 * j), out, z, left, N2, UNIT)
        _barrier()
        b, d = _next(b, d, B)
