"""Long convolution of M = J * N tokens, N = 64 * N2, by one transform in three factors.

    z = Re F^H (F x * sqrt(M) F k)                               long_conv_monarch.py derives it

With n = n1 N + n2 and f = f1 + J f2 the frequencies f - 1/4 of a transform of M tokens split into

    y_{f1,n2} = sum_{n1} exp(-2 pi i n1 (f1 - 1/4) / J) x_{n1,n2}            over blocks, J x J
    [F x]_{f1,f2} = sum_{n2} exp(-2 pi i n2 (f2 + (f1 - 1/4) / J) / N) y_{f1,n2}

The first is one real product of matrices for any J: lengths need not be powers of two. The second
is the transform of a complex row in the four steps of long_conv_monarch.py, by tables that know f1:
a program owns one f1 and many rows. Four kernels, in bytes an element of 16-bit rows:

    norms         read x 2
    blocks there  read x 2, write y 4
    rows          read y 4, write y 4 in place; the kernel's spectrum, 4, once for a batch
    blocks back   read y 4, write z 2

so 22 + 4 / B, and 8 J + 1024 + 32 N2 operations. Backward: x and dz there 8 each, rows 12 and
8 / B, back 6 and for float32 dk 8 / B: 34 + 16 / B.

Precision: rows and kernels are divided by powers of two, to norms between 2^6 and 2^7; a norm of
2^118 or more makes NaN, one below 2^-112 counts as zero. Products of spectra then stay under 2^15,
by Cauchy and Schwarz, and what is a 2^20th of the rest does not vanish. In a batch's sum rows are
weighted by what they were divided by.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, cdiv, has_wgmma, processors
from chela_bench.kernels.long_conv_monarch import (
    GRADIENT_PROGRAMS,
    N1,
    RUNTIME,
    WARPS,
    Rows,
    _complex,
    _half_back,
    _half_there,
    _left,
    _load_tables,
    _order,
    _power_of_two,
    _right,
    by_hand,
    kernel_spectrum,
    long_conv_block,
    ordered,
    spectrum_dtype,
    steps,
    tables,
)
from chela_bench.kernels.long_conv_monarch import constants as row_constants

BY_HAND = "long_conv_hopper_rows"
NORM = 64.0  # a row's, to twice that
FIRST = 64  # frequencies f1 of which a table has Re side by side, and then Im
READ = 4096  # tokens that the kernel of norms reads at once
LONGEST = 2048  # blocks


@functools.lru_cache(maxsize=16)
def block_tables(J: int, device: torch.device) -> Tensor:
    """The first factor [n1, Re or Im of f1], padded with zeros to powers of two, in float16; then
    what that rounding left. Columns are 64 or fewer Re, as many Im, and again."""
    J2 = padded(J)
    n1 = steps(J, device)
    f1 = n1 - 0.25
    turn = -2 * math.pi * (n1[:, None] * f1 / J).remainder(1.0)
    exact = turn.new_zeros(J2, J2 // min(J2, FIRST), 2, min(J2, FIRST))
    for plane, part in enumerate((turn.cos(), turn.sin())):
        whole = turn.new_zeros(J2, J2)
        whole[:J, :J] = part * _scale(J)
        exact[:, :, plane] = whole.reshape(J2, -1, min(J2, FIRST))
    rounded = exact.to(torch.float16)
    return torch.stack([rounded, (exact - rounded).to(torch.float16)])


def _scale(J: int) -> float:
    """Near 1 / sqrt(J), but a power of two: then 1 and 1/2 stay what they are."""
    return float(2.0 ** -round(math.log2(J) / 2))


def padded(J: int) -> int:
    return max(16, int(triton.next_power_of_2(J)))


SMALL = tl.constexpr(2.0**-8)  # |x|, squared times UP, others times DOWN: none of them overflows
UP = tl.constexpr(2.0**54)
DOWN = tl.constexpr(2.0**-54)
LEAST = tl.constexpr(2.0**-112)  # of a norm; less counts as zero


@triton.jit
def _inverse(scale):
    """1 / scale, or 0 for 0."""
    return tl.where(scale == 0, 0.0, 1.0 / tl.where(scale == 0, 1.0, scale))


@triton.jit(do_not_specialize=RUNTIME)
def _norms_kernel(
    x_ptr, gate_ptr, scale_ptr,  # pointers
    stride_xb: tl.int64, stride_xd: tl.int64, stride_gb: tl.int64, stride_gd: tl.int64,
    T: tl.int64, B: tl.int64,  # runtime scalars; strides and T in units of UNIT
    UNIT: tl.constexpr, READ: tl.constexpr, NORM: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """What row d * B + b of gate * x is to be divided by: a power of two, and 0 for a row of 0."""
    row = tl.program_id(0).to(tl.int64)
    b, d = row % B, row // B
    offs = tl.arange(0, READ)
    small = tl.zeros([READ], dtype=tl.float32)
    large = tl.zeros([READ], dtype=tl.float32)
    for t in range(0, T * UNIT, READ):
        mask = (t + offs) // UNIT < T
        at = x_ptr + (b * stride_xb + d * stride_xd) * UNIT + t + offs
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if HAS_GATE:
            at = gate_ptr + (b * stride_gb + d * stride_gd) * UNIT + t + offs
            x *= tl.load(at, mask=mask, other=0.0).to(tl.float32)
        is_small = tl.abs(x) < SMALL
        up, down = tl.where(is_small, x, 0.0) * UP, tl.where(is_small, 0.0, x) * DOWN
        small += up * up
        large += down * down
    small_norm = tl.sqrt(tl.sum(small, axis=0)) * DOWN
    large_norm = tl.sqrt(tl.sum(large, axis=0)) * UP
    most = tl.maximum(large_norm, small_norm)
    rest = tl.minimum(large_norm, small_norm) * _inverse(most)
    norm = most * tl.sqrt(1.0 + rest * rest) + 0.0 * large_norm  # NaN, which no maximum is
    scale, _ = _power_of_two(tl.where(norm < LEAST, 0.0, norm))
    tl.store(scale_ptr + row, scale / NORM)


@triton.jit
def _largest_scale(scale_ptr, B, EACH: tl.constexpr):
    offs = tl.arange(0, EACH)
    largest = tl.zeros([EACH], dtype=tl.float32)
    for b in range(0, B, EACH):
        largest = tl.maximum(largest, tl.load(scale_ptr + b + offs, mask=b + offs < B, other=0.0))
    return tl.max(largest, axis=0)


@triton.jit(do_not_specialize=RUNTIME)
def _weights_kernel(
    x_scale_ptr, dz_scale_ptr, weight_ptr, scale_ptr,  # pointers
    B: tl.int64, shrink: tl.float32,  # runtime scalars
    EACH: tl.constexpr,
):  # fmt: skip
    """Of the rows d * B + b in a channel's sum: their scales' product over the largest, times
    shrink; and what the sum is to be multiplied by. A product may be below what float32 holds, so
    each scale is first divided by its own largest."""
    d = tl.program_id(0).to(tl.int64)
    x_largest = _largest_scale(x_scale_ptr + d * B, B, EACH)
    dz_largest = _largest_scale(dz_scale_ptr + d * B, B, EACH)
    x_inverse, dz_inverse = _inverse(x_largest), _inverse(dz_largest)
    offs = tl.arange(0, EACH)
    largest = tl.zeros([EACH], dtype=tl.float32)
    for b in range(0, B, EACH):
        at, mask = d * B + b + offs, b + offs < B
        x = tl.load(x_scale_ptr + at, mask=mask, other=0.0) * x_inverse
        largest = tl.maximum(
            largest, x * tl.load(dz_scale_ptr + at, mask=mask, other=0.0) * dz_inverse
        )
    most = tl.max(largest, axis=0)
    inverse = shrink * _inverse(tl.where(most < LEAST, 0.0, most))
    for b in range(0, B, EACH):
        at, mask = d * B + b + offs, b + offs < B
        x = tl.load(x_scale_ptr + at, mask=mask, other=0.0) * x_inverse
        x *= tl.load(dz_scale_ptr + at, mask=mask, other=0.0) * dz_inverse
        tl.store(weight_ptr + at, x * inverse, mask=mask)
    tl.store(scale_ptr + d, x_largest / shrink * (most * dz_largest))


@triton.jit(do_not_specialize=RUNTIME)
def _blocks_there_kernel(
    x_ptr, gate_ptr, scale_ptr, table_ptr, y_ptr,  # pointers
    stride_xb: tl.int64, stride_xd: tl.int64, stride_gb: tl.int64, stride_gd: tl.int64,
    T: tl.int64, B: tl.int64, J: tl.int64,  # runtime scalars; strides and T in units of UNIT
    N: tl.constexpr, J2: tl.constexpr, FIRST: tl.constexpr, UNIT: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_F: tl.constexpr,
    HAS_GATE: tl.constexpr,
):  # fmt: skip
    """y [B * D, J, 2, N] of gate * x: BLOCK_N tokens of BLOCK_F frequencies' Re or Im."""
    pid = tl.program_id(0).to(tl.int64)
    NF = ((J + FIRST - 1) // FIRST * (2 * FIRST) + BLOCK_F - 1) // BLOCK_F
    f = (pid % NF).to(tl.int32) * BLOCK_F + tl.arange(0, BLOCK_F)
    n2 = pid // NF % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = pid // NF // (N // BLOCK_N)
    b, d = row % B, row // B
    inverse = _inverse(tl.load(scale_ptr + row))
    y = tl.zeros([BLOCK_N, BLOCK_F], dtype=tl.float32)
    for first in range(0, J, BLOCK_J):
        n1 = first + tl.arange(0, BLOCK_J)
        offs = n1[:, None] * N + n2[None, :]
        mask = offs // UNIT < T
        at = x_ptr + (b * stride_xb + d * stride_xd) * UNIT + offs
        x = tl.trans(tl.load(at, mask=mask, other=0.0)).to(tl.float32)
        if HAS_GATE:
            gate_at = gate_ptr + (b * stride_gb + d * stride_gd) * UNIT + offs
            x *= tl.trans(tl.load(gate_at, mask=mask, other=0.0)).to(tl.float32)
        e_ptr = table_ptr + n1[:, None] * (2 * J2) + f[None, :]
        e = tl.load(e_ptr)
        rest = e
        if SPLIT:
            rest = tl.load(e_ptr + 2 * J2 * J2)
        y = _right(x * inverse, e, rest, y, SPLIT)
    f1, plane = f // (2 * FIRST) * FIRST + f % FIRST, f // FIRST % 2
    to = y_ptr + ((row * J + f1) * 2 + plane)[None, :] * N + n2[:, None]
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=f1[None, :] < J)


@triton.jit(do_not_specialize=RUNTIME)
def _blocks_back_kernel(
    y_ptr, scale_ptr, channel_scale_ptr, gate_ptr, table_ptr, z_ptr,  # pointers
    stride_gb: tl.int64, stride_gd: tl.int64, stride_zb: tl.int64, stride_zd: tl.int64,
    T: tl.int64, B: tl.int64, J: tl.int64, root: tl.float32,
    # runtime scalars; strides and T in units of UNIT
    N: tl.constexpr, J2: tl.constexpr, FIRST: tl.constexpr, UNIT: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_F: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_CHANNEL: tl.constexpr, EACH_F1: tl.constexpr,
):  # fmt: skip
    """z [B, D, T], gate * root * Re of the way back from y: BLOCK_N tokens of BLOCK_J blocks.
    EACH_F1: scale [B * D, J], not one a row; in float16, without SPLIT."""
    pid = tl.program_id(0).to(tl.int64)
    NJ = (J + BLOCK_J - 1) // BLOCK_J
    row = pid // (N // BLOCK_N) // NJ
    b, d = row % B, row // B
    n1 = pid // (N // BLOCK_N) % NJ * BLOCK_J + tl.arange(0, BLOCK_J)
    n2 = pid % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale, inverse = 1.0, 1.0
    if EACH_F1:
        every = tl.arange(0, J2)
        scale = tl.max(tl.load(scale_ptr + row * J + every, mask=every < J, other=0.0), axis=0)
        inverse = _inverse(scale)
    else:
        scale = tl.load(scale_ptr + row)
    z = tl.zeros([BLOCK_N, BLOCK_J], dtype=tl.float32)
    for first in range(0, (J + FIRST - 1) // FIRST * (2 * FIRST), BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        f1, plane = f // (2 * FIRST) * FIRST + f % FIRST, f // FIRST % 2
        at = y_ptr + ((row * J + f1) * 2 + plane)[:, None] * N + n2[None, :]
        y = tl.load(at, mask=f1[:, None] < J, other=0.0)
        e_ptr = table_ptr + n1[:, None] * (2 * J2) + f[None, :]
        e = tl.trans(tl.load(e_ptr))
        rest = e
        if SPLIT:
            rest = tl.trans(tl.load(e_ptr + 2 * J2 * J2))
        if EACH_F1:  # e is the smaller one
            by = tl.load(scale_ptr + row * J + f1, mask=f1 < J, other=0.0)
            e = (e * (by * inverse)[:, None]).to(tl.float16)
        z = _right(tl.trans(y), e, rest, z, SPLIT)
    scale *= root
    if HAS_CHANNEL:
        scale *= tl.load(channel_scale_ptr + d)
    z *= scale
    offs = n1[None, :] * N + n2[:, None]
    mask = offs // UNIT < T
    if HAS_GATE:
        at = gate_ptr + (b * stride_gb + d * stride_gd) * UNIT + offs
        z *= tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = z_ptr + (b * stride_zb + d * stride_zd) * UNIT + offs
    tl.store(at, z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_there(y_ptr, tables, table_ptr, N1: tl.constexpr, N2: tl.constexpr, SPLIT: tl.constexpr):
    """F of a complex row [2, 64, N2]."""
    f1_re, f1_im, _, _, rest_1_re, rest_1_im, _, _ = tables
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    y_re = tl.load(y_ptr + offs).to(tl.float32)
    y_im = tl.load(y_ptr + N1 * N2 + offs).to(tl.float32)
    zero = tl.zeros([N1, N2], dtype=tl.float32)
    re = _left(f1_re, rest_1_re, y_re, zero, SPLIT)
    im = _left(f1_im, rest_1_im, y_re, zero, SPLIT)
    re = _left(f1_im, rest_1_im, -y_im, re, SPLIT)
    im = _left(f1_re, rest_1_re, y_im, im, SPLIT)
    return _half_there(re, im, tables, table_ptr, N1, N2, SPLIT)


@triton.jit
def _row_back(
    y_ptr, re, im, tables, table_ptr, N1: tl.constexpr, N2: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Writes F^H (re + i im)."""
    f1_re, f1_im, _, _, rest_1_re, rest_1_im, _, _ = tables
    re, im = _half_back(re, im, tables, table_ptr, N1, N2, SPLIT)
    zero = tl.zeros([N1, N2], dtype=tl.float32)
    y_re = _left(tl.trans(f1_re), tl.trans(rest_1_re), re, zero, SPLIT)
    y_im = _left(tl.trans(f1_re), tl.trans(rest_1_re), im, zero, SPLIT)
    y_re = _left(tl.trans(f1_im), tl.trans(rest_1_im), im, y_re, SPLIT)
    y_im = _left(tl.trans(f1_im), tl.trans(rest_1_im), -re, y_im, SPLIT)
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tl.store(y_ptr + offs, y_re.to(y_ptr.dtype.element_ty))
    tl.store(y_ptr + N1 * N2 + offs, y_im.to(y_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=RUNTIME)
def _spectrum_rows_kernel(
    y_ptr, table_ptr, spectrum_ptr,  # pointers
    J: tl.int64, rows: tl.int64, each: tl.int64,  # runtime scalars
    N1: tl.constexpr, N2: tl.constexpr, SPLIT: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Of `each` rows and one f1; y and spectrum [rows, J, 2, 64, N2]."""
    N: tl.constexpr = N1 * N2
    pid = tl.program_id(0).to(tl.int64)
    f1, start = pid % J, pid // J * each
    table_ptr += f1 * 4 * (N1 * N1 + N2 * N2 + N)
    tables = _load_tables(table_ptr, N1, N2, SPLIT)
    order = _order(N1, N2, ORDERED)
    for row in range(start, tl.minimum(start + each, rows)):
        at = (row * J + f1) * 2 * N
        re, im = _row_there(y_ptr + at, tables, table_ptr, N1, N2, SPLIT)
        tl.store(spectrum_ptr + at + order, re.to(spectrum_ptr.dtype.element_ty))
        tl.store(spectrum_ptr + at + N + order, im.to(spectrum_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=RUNTIME)
def _convolve_rows_kernel(
    y_ptr, spectrum_ptr, table_ptr,  # pointers
    B: tl.int64, J: tl.int64, rows: tl.int64, each: tl.int64,  # runtime scalars
    N1: tl.constexpr, N2: tl.constexpr, SPLIT: tl.constexpr, ORDERED: tl.constexpr,
    ADJOINT: tl.constexpr,
):  # fmt: skip
    """Rows y to the spectrum, times the kernel's or ADJOINT its conjugate, and back in place."""
    N: tl.constexpr = N1 * N2
    pid = tl.program_id(0).to(tl.int64)
    f1, start = pid % J, pid // J * each
    table_ptr += f1 * 4 * (N1 * N1 + N2 * N2 + N)
    tables = _load_tables(table_ptr, N1, N2, SPLIT)
    order = _order(N1, N2, ORDERED)
    for row in range(start, tl.minimum(start + each, rows)):
        row_ptr = y_ptr + (row * J + f1) * 2 * N
        re, im = _row_there(row_ptr, tables, table_ptr, N1, N2, SPLIT)
        at = spectrum_ptr + (row // B * J + f1) * 2 * N + order
        k_re, k_im = tl.load(at).to(tl.float32), tl.load(at + N).to(tl.float32)
        re, im = _complex(re, im, k_re, k_im, ADJOINT)
        _row_back(row_ptr, re, im, tables, table_ptr, N1, N2, SPLIT)


@triton.jit(do_not_specialize=RUNTIME)
def _gradient_rows_kernel(
    x_ptr, dz_ptr, spectrum_ptr, weight_ptr, table_ptr, sum_ptr,  # pointers
    B: tl.int64, J: tl.int64, D: tl.int64, each: tl.int64,  # runtime scalars
    N1: tl.constexpr, N2: tl.constexpr, SPLIT: tl.constexpr, ORDERED: tl.constexpr,
    NEEDS_DX: tl.constexpr,
):  # fmt: skip
    """`each` channels and one f1: sum [D, J, 2, N], back from sum_b weight_b Z_b conj(X_b); and in
    place of dz, back from Z conj(K)."""
    N: tl.constexpr = N1 * N2
    pid = tl.program_id(0).to(tl.int64)
    f1, start = pid % J, pid // J * each
    table_ptr += f1 * 4 * (N1 * N1 + N2 * N2 + N)
    tables = _load_tables(table_ptr, N1, N2, SPLIT)
    order = _order(N1, N2, ORDERED)
    for d in range(start, tl.minimum(start + each, D)):
        g_re = tl.zeros([N1, N2], dtype=tl.float32)
        g_im = tl.zeros([N1, N2], dtype=tl.float32)
        for b in range(0, B):
            at = ((d * B + b) * J + f1) * 2 * N
            x_re, x_im = _row_there(x_ptr + at, tables, table_ptr, N1, N2, SPLIT)
            re, im = _row_there(dz_ptr + at, tables, table_ptr, N1, N2, SPLIT)
            y_re, y_im = _complex(re, im, x_re, x_im, True)
            weight = tl.load(weight_ptr + d * B + b)
            g_re += y_re * weight
            g_im += y_im * weight
            if NEEDS_DX:
                k_ptr = spectrum_ptr + (d * J + f1) * 2 * N + order
                k_re, k_im = tl.load(k_ptr).to(tl.float32), tl.load(k_ptr + N).to(tl.float32)
                re, im = _complex(re, im, k_re, k_im, True)
                _row_back(dz_ptr + at, re, im, tables, table_ptr, N1, N2, SPLIT)
        _row_back(
            sum_ptr + (d * J + f1) * 2 * N, g_re, g_im, tables, table_ptr, N1, N2, SPLIT
        )  # fmt: skip


_norms = Launcher(_norms_kernel)
_weights = Launcher(_weights_kernel)
_blocks_there = Launcher(_blocks_there_kernel)
_blocks_back = Launcher(_blocks_back_kernel)
_spectrum_rows = Launcher(_spectrum_rows_kernel)
_convolve_rows = Launcher(_convolve_rows_kernel)
_gradient_rows = Launcher(_gradient_rows_kernel)


class Transform:
    """Of rows [B, D, T], each contiguous, in J blocks of 64 * N2 tokens. `exact`: operands in pairs
    of float16 numbers, and y in float32."""

    def __init__(
        self, J: int, N2: int, dtype: torch.dtype, device: torch.device, exact: bool
    ) -> None:
        self.J, self.N2, self.device, self.exact = J, N2, device, exact
        self.ordered = ordered(dtype, device)
        self.dtype = torch.float32 if exact else dtype
        self.first = block_tables(J, device)
        # sqrt(M), and for three transforms what their tables are not orthonormal by
        self.root = math.sqrt(J * N1 * N2) / (_scale(J) * math.sqrt(J)) ** 3
        self.table = tables(N2, device, ordered=self.ordered and not exact, blocks=J)
        self.large = has_wgmma(device) and not exact  # tiles
        self.stages = 3 if J > 16 else 1  # one step has none to overlap with

    def tile(self, columns: int) -> tuple[int, int, int]:
        """Tokens, what is summed over at once, and results of a token, of `columns`."""
        if self.J <= 8:  # small sums: many tokens, for enough work a program
            return 256 if self.exact else 512, 32, columns
        return (128, 64, min(columns, 256)) if self.large else (64, 32, min(columns, 64))

    def there(self, x: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y [B * D, J, 2, 64, N2] of gate * x, and what it is to be multiplied by [B * D]."""
        B, D, _ = x.shape
        rows = Rows(self.N2, x, gate)
        scale = x.new_empty(B * D, dtype=torch.float32)
        has_gate = gate is not None
        flags = _norms.constants(UNIT=rows.unit, READ=READ, NORM=NORM, HAS_GATE=has_gate)
        _norms(B * D, (x, gate, scale), (*rows.strides, rows.T, B), flags, WARPS, 1)
        shape = B * D, self.J, 2, N1, self.N2
        y = x.new_empty(shape, dtype=torch.float32 if self.exact else torch.float16)
        N, J2 = N1 * self.N2, padded(self.J)
        BLOCK_N, BLOCK_J, BLOCK_F = self.tile(2 * J2)
        flags = _blocks_there.constants(
            N=N, J2=J2, FIRST=min(J2, FIRST), UNIT=rows.unit, SPLIT=self.exact, BLOCK_N=BLOCK_N,
            BLOCK_J=min(J2, BLOCK_J), BLOCK_F=BLOCK_F, HAS_GATE=has_gate,
        )  # fmt: skip
        columns = cdiv(self.J, min(J2, FIRST)) * 2 * min(J2, FIRST)
        _blocks_there(
            B * D * (N // BLOCK_N) * cdiv(columns, BLOCK_F), (x, gate, scale, self.first, y),
            (*rows.strides, rows.T, B, self.J), flags, 8 if BLOCK_F >= 128 else 4, self.stages,
        )  # fmt: skip
        return y, scale

    def back(
        self,
        y: Tensor,
        scale: Tensor,
        channel_scale: Tensor | None,
        gate: Tensor | None,
        z: Tensor,
    ) -> None:
        """z [B, D, T] from y, over scales [B * D] or [B * D, J] and a channel's [D]; and a gate."""
        B, D, _ = z.shape
        rows = Rows(self.N2, gate, z)
        N, J2 = N1 * self.N2, padded(self.J)
        BLOCK_N, BLOCK_F, BLOCK_J = self.tile(J2)
        flags = _blocks_back.constants(
            N=N, J2=J2, FIRST=min(J2, FIRST), UNIT=rows.unit, SPLIT=self.exact, BLOCK_N=BLOCK_N,
            BLOCK_J=BLOCK_J, BLOCK_F=min(2 * J2, BLOCK_F),
            HAS_GATE=gate is not None, HAS_CHANNEL=channel_scale is not None,
            EACH_F1=scale.ndim == 2,
        )  # fmt: skip
        _blocks_back(
            B * D * (N // BLOCK_N) * cdiv(self.J, BLOCK_J),
            (y, scale, channel_scale, gate, self.first, z),
            (*rows.strides, rows.T, B, self.J, self.root), flags, 8 if BLOCK_J >= 128 else 4,
            self.stages,
        )  # fmt: skip

    def rows(
        self,
        launcher: Launcher,
        name: str,
        count: int,
        tensors: tuple[Tensor | None, ...],
        scalars: tuple[int, ...],
        **flags: bool,
    ) -> None:
        """A kernel, or the one of this name on Hopper, on `count` rows or channels and each f1."""
        if self.ordered and not self.exact:
            launcher = by_hand(name, BY_HAND)
        each = cdiv(count, max(1, GRADIENT_PROGRAMS[self.N2] * processors(self.device) // self.J))
        values = row_constants(launcher, self.N2, self.dtype, self.ordered, **flags)
        launcher(self.J * cdiv(count, each), tensors, (*scalars, count, each), values, WARPS, 1)


@functools.lru_cache(maxsize=16)
def _transform(
    T: int, N2: int, dtype: torch.dtype, device: torch.device, exact: bool = False
) -> Transform:
    exact = exact or dtype == torch.float32
    return Transform(cdiv(T, N1 * N2), N2, dtype, device, exact)


def factor_spectrum(kernel: Tensor, T: int, N2: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Spectrum [D, J, 2, 64, N2] of kernel [D, taps], rows contiguous, for T tokens of rows of this
    dtype, and what it is to be multiplied by [D], float32."""
    fast = dtype == torch.bfloat16 and ordered(dtype, kernel.device)
    transform = _transform(T, N2, dtype, kernel.device, exact=not fast)
    y, scale = transform.there(kernel[None, :, :T])
    spectrum = torch.empty_like(y, dtype=spectrum_dtype(dtype))
    transform.rows(
        _spectrum_rows, "_spectrum_rows_wgmma_kernel", len(y), (y, transform.table, spectrum),
        (transform.J,),
    )  # fmt: skip
    return spectrum, scale


def long_conv_factors(
    x: Tensor,
    gate: Tensor | None,
    spectrum: Tensor,
    scale: Tensor,
    z: Tensor,
    *,
    adjoint: bool = False,
) -> None:
    """z = gate * (kernel * x), or of z and x the adjoint; [B, D, T], rows contiguous."""
    B, _, T = x.shape
    transform = _transform(T, spectrum.shape[-1], x.dtype, x.device)
    y, y_scale = transform.there(x, gate if adjoint else None)
    transform.rows(
        _convolve_rows, "_convolve_rows_wgmma_kernel", len(y), (y, spectrum, transform.table),
        (B, transform.J), ADJOINT=adjoint,
    )  # fmt: skip
    transform.back(y, y_scale, scale, None if adjoint else gate, z)


def gradients_factors(
    x: Tensor,
    gate: Tensor | None,
    dz: Tensor,
    spectrum: Tensor,
    scale: Tensor,
    dx: Tensor | None,
    dk: Tensor,
) -> None:
    """dx, if wanted, and dk [D, taps] from dz; [B, D, T], rows contiguous."""
    B, D, T = x.shape
    transform = _transform(T, spectrum.shape[-1], x.dtype, x.device)
    of_x, x_scale = transform.there(x)
    of_dz, dz_scale = transform.there(dz, gate)
    weight, sum_scale = torch.empty_like(x_scale), x_scale.new_empty(D)
    shrink = 1 / triton.next_power_of_2(B)
    _weights(D, (x_scale, dz_scale, weight, sum_scale), (B, shrink), _EACH, 1, 1)
    total = of_x if B == 1 else of_x.new_empty(D, *of_x.shape[1:])  # a row is read before
    transform.rows(
        _gradient_rows, "_gradient_rows_wgmma_kernel", D,
        (of_x, of_dz, spectrum, weight, transform.table, total), (B, transform.J),
        NEEDS_DX=dx is not None,
    )  # fmt: skip
    del of_x
    transform.back(total, sum_scale, None, None, dk[None])
    del total
    if dx is not None:
        transform.back(of_dz, dz_scale, scale, None, dx)


def taps_gradient_blocks(x: Tensor, gate: Tensor | None, dz: Tensor, dk: Tensor, N2: int) -> None:
    """dk [D, taps] from dz; [B, D, T], rows contiguous: 16-bit rows of two to four blocks,
    on Hopper. Of a batch of one, dk is to x what dx is to k: a convolution with x for a kernel."""
    B, D, T = x.shape
    if B == 1 and dk.dtype == dz.dtype:
        spectrum, scale = kernel_spectrum(x[0], T, N2, x.dtype, cdiv(T, N1 * N2))
        found = dk[None] if dk.shape[1] == T else dz.new_empty(dz.shape)
        long_conv_block(dz, gate, spectrum, scale, found, adjoint=True)
        if dk.shape[1] < T:
            dk.copy_(found[0, :, : dk.shape[1]])
        return
    transform = _transform(T, N2, x.dtype, x.device)
    rows = Rows(N2, x, gate, dz)
    J = transform.J
    total = x.new_empty(D, J, 2, N1, N2, dtype=torch.float16)
    scale = x.new_empty(D, J, dtype=torch.float32)
    kernel = by_hand("_sum_of_blocks_wgmma_kernel", BY_HAND)
    each = cdiv(D, GRADIENT_PROGRAMS[N2] * processors(x.device) // J)
    kernel(
        J * cdiv(D, each), (x, gate, dz, transform.first, transform.table, total, scale),
        (*rows.strides, rows.T, B, D, each),
        rows.constants(kernel, BLOCKS=J, HAS_GATE=gate is not None), WARPS, 1,
    )  # fmt: skip
    transform.back(total, scale, None, None, dk[None])


_EACH = _weights.constants(EACH=64)
