"""Long convolution in blocks of N = 64 * N2 tokens: spectra of all, their sums, and back.

    z_j = Re F^H sum_{a+b=j} X_a K_b                            long_conv_monarch.py derives it

Three kernels, each of them one way over memory: X_a of every block of every row, Z_j the sums, and
the real way back. Bytes per element of a 16-bit row, whatever the number of blocks m: x 2, X 4 + 4,
Z 4 + 4, z 2, so 20, and the kernel's spectrum, 4, once for all rows of a batch. A sum takes
(m + 1) / 2 complex products an element, by vector instructions: a program keeps up to 8
neighbouring j in registers, and hands K_b from one to the next.

For gradients the same sums run over blocks in mirrored order:

    dx_j = Re F^H sum_{a-b=j} Z_a conj(K_b)                              U_a = Z_{m-1-a}, conjugated
    G_c  = sum_{a-b=c} Z_a conj(X_b), over the batch                     dk_b from G_b + i G_{b+1}
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, cdiv
from chela_bench.kernels.long_conv_monarch import (
    N1,
    PROGRAMS,
    RUNTIME,
    WARPS,
    Rows,
    _back,
    _load_tables,
    _normal,
    _normal_complex,
    _order,
    _there,
    by_hand,
    constants,
    ordered,
    rows_each,
    spectrum_dtype,
    tables,
)

FREQUENCIES = 256  # of a block that a program sums
ONE_WAY = 3  # programs an SM holds of kernels that go one way
BY_HAND = "long_conv_hopper_blocks"
TOGETHER = 4  # blocks at most that it sums in shared memory


@triton.jit(do_not_specialize=RUNTIME)
def _block_spectra_kernel(
    x_ptr, gate_ptr, table_ptr, spectra_ptr, scale_ptr,  # pointers
    stride_xb: tl.int64, stride_xd: tl.int64, stride_gb: tl.int64, stride_gd: tl.int64,
    T: tl.int64, B: tl.int64, blocks: tl.int64, total: tl.int64, each: tl.int64,  # scalars
    N1: tl.constexpr, N2: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr,
    ORDERED: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """F of every block of gate * x, over its power of two; block (d * B + b) * blocks + a."""
    N: tl.constexpr = N1 * N2
    tables = _load_tables(table_ptr, N1, N2, SPLIT)
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    order = _order(N1, N2, ORDERED)
    start = tl.program_id(0).to(tl.int64) * each
    for index in range(start, tl.minimum(start + each, total)):
        a, row = index % blocks, index // blocks
        b, d = row % B, row // B
        mask = (a * N + offs) // UNIT < T
        x = tl.load(
            x_ptr + (b * stride_xb + d * stride_xd) * UNIT + a * N + offs, mask=mask, other=0.0
        )
        x = x.to(tl.float32)
        if HAS_GATE:
            at = gate_ptr + (b * stride_gb + d * stride_gd) * UNIT + a * N + offs
            x *= tl.load(at, mask=mask, other=0.0).to(tl.float32)
        x, scale = _normal(x)
        re, im = _there(x, tables, table_ptr, N1, N2, SPLIT)
        tl.store(scale_ptr + index, scale)
        out = spectra_ptr + index * 2 * N + order
        tl.store(out, re.to(spectra_ptr.dtype.element_ty))
        tl.store(out + N, im.to(spectra_ptr.dtype.element_ty))


@triton.jit
def _planes(spectra_ptr, scale_ptr, index, valid, offs, N: tl.constexpr, HAS_SCALE: tl.constexpr):
    """Re and Im of one block's frequencies, or zeros."""
    at = spectra_ptr + index * 2 * N + offs
    mask = (offs < N) & valid
    re = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    im = tl.load(at + N, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + index, mask=valid, other=0.0)
        re, im = re * scale, im * scale
    return re, im


@triton.jit
def _none():
    return ()


@triton.jit
def _zeros(TILE: tl.constexpr, F: tl.constexpr):
    zeros = _none()
    for _ in tl.static_range(2 * TILE):
        zeros += (tl.zeros([F], dtype=tl.float32),)
    return zeros


@triton.jit
def _add_products(z, u, w, SKIP: tl.constexpr, TILE: tl.constexpr, CONJUGATE: tl.constexpr):
    """z_j + u w_j of j >= SKIP; tuples of Re, Im, Re, Im, .."""
    added = _none()
    for j in tl.static_range(TILE):
        if j < SKIP:
            added += (z[2 * j], z[2 * j + 1])
        else:
            re, im, w_re, w_im = z[2 * j], z[2 * j + 1], w[2 * j], w[2 * j + 1]
            if CONJUGATE:
                added += (re + u[0] * w_re + u[1] * w_im, im + u[1] * w_re - u[0] * w_im)
            else:
                added += (re + u[0] * w_re - u[1] * w_im, im + u[1] * w_re + u[0] * w_im)
    return added


@triton.jit
def _shifted(w, first, TILE: tl.constexpr):
    """first, w_0, .., w_{TILE-2}"""
    moved = _none()
    moved += (first[0], first[1])
    for j in tl.static_range(TILE - 1):
        moved += (w[2 * j], w[2 * j + 1])
    return moved


@triton.jit(do_not_specialize=RUNTIME)
def _sum_blocks_kernel(
    u_ptr, w_ptr, u_scale_ptr, w_scale_ptr, out_ptr, out_scale_ptr,  # pointers
    B: tl.int64, blocks: tl.int64, shrink: tl.float32,  # runtime scalars
    N: tl.constexpr, F: tl.constexpr, ALL_BLOCKS: tl.constexpr, TILE: tl.constexpr,
    MIRRORED: tl.constexpr, OVER_BATCH: tl.constexpr,
):  # fmt: skip
    """out_j = sum_{a<=j} u_a w_{j-a} for TILE neighbouring j and F frequencies.

    w of a channel, and out of a row, over the row's largest scale and 1 / shrink; or OVER_BATCH w
    of a row and out of a channel in float32. MIRRORED: u and out counted from the last block, and
    w conjugated. The w that a step of a needs are the last step's, moved by one, and a new one.
    """
    NF: tl.constexpr = (N + F - 1) // F
    ONE_TILE: tl.constexpr = ALL_BLOCKS == TILE
    pid = tl.program_id(0).to(tl.int64)
    tiles = (blocks + TILE - 1) // TILE
    offs = (pid % NF).to(tl.int32) * F + tl.arange(0, F)
    j = (pid // NF) % tiles * TILE
    owner = pid // NF // tiles  # a row d * B + b, or OVER_BATCH a channel
    scale, inverse = 1.0, 1.0
    batch = owner * 0 + 1
    if OVER_BATCH:
        batch = B
    else:
        every = tl.arange(0, ALL_BLOCKS)
        scales = tl.load(u_scale_ptr + owner * blocks + every, mask=every < blocks, other=0.0)
        scale = tl.max(scales, axis=0)
        inverse = tl.where(scale == 0, 0.0, shrink / scale)
    z = _zeros(TILE, F)
    for b in range(0, batch):
        if OVER_BATCH:
            u_first = (owner * B + b) * blocks
            w_first = u_first
        else:
            u_first = owner * blocks
            w_first = owner // B * blocks
        w = _none()
        for i in tl.static_range(TILE):
            w += _planes(w_ptr, w_scale_ptr, w_first + j + i, j + i < blocks, offs, N, OVER_BATCH)
        for first in range(0, j + 1, TILE):
            for step in tl.static_range(TILE):
                a = first + step
                source = a
                if MIRRORED:
                    source = blocks - 1 - a
                u_re, u_im = _planes(
                    u_ptr, u_scale_ptr, u_first + source, a < blocks, offs, N, True
                )
                u = (u_re * inverse, u_im * inverse)
                z = _add_products(z, u, w, step if ONE_TILE else 0, TILE, MIRRORED)
                at = j - 1 - a
                if ONE_TILE:
                    w = _shifted(w, (u_re, u_im), TILE)  # the first are not used again
                else:
                    new = _planes(w_ptr, w_scale_ptr, w_first + at, at >= 0, offs, N, OVER_BATCH)
                    w = _shifted(w, new, TILE)
    if not OVER_BATCH:
        tl.store(out_scale_ptr + owner, scale / shrink)  # the same from every program of the row
    for i in tl.static_range(TILE):
        at = j + i
        if MIRRORED:
            at = blocks - 1 - j - i
        out = out_ptr + (owner * blocks + at) * 2 * N + offs
        mask = (offs < N) & (j + i < blocks)
        tl.store(out, z[2 * i].to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + N, z[2 * i + 1].to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def _blocks_back_kernel(
    sums_ptr, sums_scale_ptr, kernel_scale_ptr, gate_ptr, table_ptr, z_ptr,  # pointers
    stride_gb: tl.int64, stride_gd: tl.int64, stride_zb: tl.int64, stride_zd: tl.int64,
    T: tl.int64, B: tl.int64, blocks: tl.int64, total: tl.int64, each: tl.int64,  # scalars
    N1: tl.constexpr, N2: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr,
    ORDERED: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """gate * Re F^H of every block of sums."""
    N: tl.constexpr = N1 * N2
    tables = _load_tables(table_ptr, N1, N2, SPLIT)
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    order = _order(N1, N2, ORDERED)
    start = tl.program_id(0).to(tl.int64) * each
    for index in range(start, tl.minimum(start + each, total)):
        a, row = index % blocks, index // blocks
        b, d = row % B, row // B
        re = tl.load(sums_ptr + index * 2 * N + order)
        im = tl.load(sums_ptr + index * 2 * N + N + order)
        z = _back(re, im, tables, table_ptr, N1, N2, SPLIT)
        z *= tl.load(sums_scale_ptr + row) * tl.load(kernel_scale_ptr + d)
        mask = (a * N + offs) // UNIT < T
        if HAS_GATE:
            at = gate_ptr + (b * stride_gb + d * stride_gd) * UNIT + a * N + offs
            z *= tl.load(at, mask=mask, other=0.0).to(tl.float32)
        at = z_ptr + (b * stride_zb + d * stride_zd) * UNIT + a * N + offs
        tl.store(at, z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def _taps_back_kernel(
    sums_ptr, table_ptr, dk_ptr,  # pointers
    taps: tl.int64, blocks: tl.int64, total: tl.int64, each: tl.int64,  # runtime scalars
    N1: tl.constexpr, N2: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr,
    ORDERED: tl.constexpr, ROOT_N: tl.constexpr,
):  # fmt: skip
    """dk_b = sqrt(N) Re F^H (G_b + i G_{b+1}) of one channel and block; dk [D, taps]."""
    N: tl.constexpr = N1 * N2
    tables = _load_tables(table_ptr, N1, N2, SPLIT)
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    order = _order(N1, N2, ORDERED)
    start = tl.program_id(0).to(tl.int64) * each
    for index in range(start, tl.minimum(start + each, total)):
        block, d = index % blocks, index // blocks
        at = sums_ptr + index * 2 * N + order
        re, im = tl.load(at), tl.load(at + N)
        if block + 1 < blocks:
            re -= tl.load(at + 3 * N)
            im += tl.load(at + 2 * N)
        re, im, scale = _normal_complex(re, im)
        dk = _back(re, im, tables, table_ptr, N1, N2, SPLIT) * (scale * ROOT_N)
        at = dk_ptr + d * taps * UNIT + block * N + offs
        tl.store(at, dk, mask=(block * N + offs) // UNIT < taps)


_spectra = Launcher(_block_spectra_kernel)
_sum = Launcher(_sum_blocks_kernel)
_rows_back = Launcher(_blocks_back_kernel)
_taps_back = Launcher(_taps_back_kernel)


class Spectra(NamedTuple):
    """Of all blocks of rows: [B * D, blocks, 2, 64, N2], row d * B + b, over a scale each."""

    values: Tensor
    scale: Tensor  # [B * D, blocks]


def block_spectra(x: Tensor, gate: Tensor | None, N2: int) -> Spectra:
    """Of gate * x, both [B, D, T], rows contiguous."""
    B, D, T = x.shape
    blocks = cdiv(T, N1 * N2)
    values = x.new_empty(B * D, blocks, 2, N1, N2, dtype=spectrum_dtype(x.dtype))
    scale = x.new_empty(B * D, blocks, dtype=torch.float32)
    rows = Rows(N2, x, gate)
    kernel = rows.kernel(_spectra, "_block_spectra_wgmma_kernel", BY_HAND)
    programs, each = rows_each(B * D * blocks, x.device, ONE_WAY)
    kernel(
        programs, (x, gate, rows.table, values, scale),
        (*rows.strides, rows.T, B, blocks, B * D * blocks, each),
        rows.constants(kernel, HAS_GATE=gate is not None), WARPS, 1,
    )  # fmt: skip
    return Spectra(values, scale)


def long_conv_blocks(
    x: Tensor,
    gate: Tensor | None,
    spectrum: Tensor,
    scale: Tensor,
    z: Tensor,
    *,
    adjoint: bool = False,
) -> None:
    """z = gate * (kernel * x), or of z and x the adjoint; [B, D, T], rows contiguous."""
    blocks, N2 = spectrum.shape[1], spectrum.shape[-1]
    if _together(x, spectrum):
        rows = Rows(N2, x, gate, z)
        kernel = by_hand("_long_conv_wgmma_blocks_kernel", BY_HAND)
        programs, each = rows_each(rows.B * rows.D, x.device, PROGRAMS[N2])
        flags = rows.constants(
            kernel, BLOCKS=blocks, SHRINK=1 / triton.next_power_of_2(blocks), ADJOINT=adjoint,
            HAS_GATE=gate is not None,
        )  # fmt: skip
        kernel(
            programs, (x, gate, spectrum, scale, rows.table, z),
            (*rows.strides, rows.T, rows.B, rows.B * rows.D, each), flags, WARPS, 1,
        )  # fmt: skip
        return
    spectra = block_spectra(x, gate if adjoint else None, N2)
    _back_from(spectra, spectrum, scale, None if adjoint else gate, z, adjoint=adjoint)


def gradients_blocks(
    x: Tensor,
    gate: Tensor | None,
    dz: Tensor,
    spectrum: Tensor,
    scale: Tensor,
    dx: Tensor | None,
    dk: Tensor,
) -> None:
    """dx, if wanted, and dk [D, taps] float32 from dz; [B, D, T], rows contiguous."""
    B, D, _ = x.shape
    N2 = spectrum.shape[-1]
    of_dz = block_spectra(dz, gate, N2)
    if dx is not None and _together(x, spectrum):
        long_conv_blocks(dz, gate, spectrum, scale, dx, adjoint=True)
    elif dx is not None:
        _back_from(of_dz, spectrum, scale, None, dx, adjoint=True)
    of_x = block_spectra(x, None, N2)
    blocks = of_x.scale.shape[1]
    sums = x.new_empty(D, blocks, 2, N1, N2, dtype=torch.float32)
    _sum(
        D * cdiv(blocks, _tile(blocks)) * cdiv(N1 * N2, FREQUENCIES),
        (of_dz.values, of_x.values, of_dz.scale, of_x.scale, sums, None), (B, blocks, 1.0),
        _sum_constants(N2, blocks, mirrored=True, over_batch=True), WARPS, 1,
    )  # fmt: skip
    by_order = ordered(x.dtype, x.device)
    kernel = by_hand("_taps_back_wgmma_kernel", BY_HAND) if by_order else _taps_back
    unit = 8 if dk.shape[1] % 8 == 0 else 1
    programs, each = rows_each(D * blocks, x.device, PROGRAMS[N2])
    kernel(
        programs, (sums, tables(N2, x.device, ordered=by_order), dk),
        (dk.shape[1] // unit, blocks, D * blocks, each),
        constants(kernel, N2, x.dtype, by_order, unit), WARPS, 1,
    )  # fmt: skip


def _back_from(
    spectra: Spectra,
    spectrum: Tensor,
    kernel_scale: Tensor,
    gate: Tensor | None,
    z: Tensor,
    *,
    adjoint: bool,
) -> None:
    B, N2 = z.shape[0], spectrum.shape[-1]
    rows, blocks = spectra.scale.shape
    sums, sums_scale = torch.empty_like(spectra.values), spectra.scale.new_empty(rows)
    _sum(
        rows * cdiv(blocks, _tile(blocks)) * cdiv(N1 * N2, FREQUENCIES),
        (spectra.values, spectrum, spectra.scale, None, sums, sums_scale),
        (B, blocks, 1 / triton.next_power_of_2(blocks)),
        _sum_constants(N2, blocks, mirrored=adjoint, over_batch=False), WARPS, 1,
    )  # fmt: skip
    out = Rows(N2, gate, z)
    kernel = out.kernel(_rows_back, "_blocks_back_wgmma_kernel", BY_HAND)
    programs, each = rows_each(rows * blocks, z.device, ONE_WAY)
    kernel(
        programs, (sums, sums_scale, kernel_scale, gate, out.table, z),
        (*out.strides, out.T, B, blocks, rows * blocks, each),
        out.constants(kernel, HAS_GATE=gate is not None), WARPS, 1,
    )  # fmt: skip


def _together(x: Tensor, spectrum: Tensor) -> bool:
    """Whether one kernel takes all blocks of a row."""
    return ordered(x.dtype, x.device) and spectrum.shape[1] <= TOGETHER


def _tile(blocks: int) -> int:
    """Blocks that a program sums at once."""
    return int(min(8, triton.next_power_of_2(blocks)))


@functools.lru_cache(maxsize=256)
def _sum_constants(N2: int, blocks: int, *, mirrored: bool, over_batch: bool) -> tuple[Any, ...]:
    return _sum.constants(
        N=N1 * N2, F=FREQUENCIES, ALL_BLOCKS=triton.next_power_of_2(blocks), TILE=_tile(blocks),
        MIRRORED=mirrored, OVER_BATCH=over_batch,
    )  # fmt: skip
