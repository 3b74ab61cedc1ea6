"""Long convolution of one channel by a Fourier transform of real rows, as tensor-core products.

    z_t = sum_{n=0}^{min(t, N-1)} k_n x_{t-n}                         T <= N = 64 * N2

The right-angle form: with frequencies a quarter of a step low, theta_f = 2 pi (f - 1/4) / N, a
cyclic convolution of length N turns what runs over its end by i, so that for real x and k

    c = F^H (F x * sqrt(N) F k),    Re c = z,    Im c = what spills into the next N tokens

with F the orthonormal transform, F_fn = exp(-i theta_f n) / sqrt(N): real in, real out, and length
N where zero-padding takes 2 N. F in four steps (Bailey 1990), n = n1 * N2 + n2, f = f1 + 64 * f2:

    [F1 x]_{f1,n2} = sum_{n1} exp(-2 pi i n1 (f1 - 1/4) / 64) x_{n1,n2}              a real product
    times exp(-2 pi i n2 (f1 - 1/4) / N), then  [. F2]_{f1,f2}, F2 = exp(-2 pi i n2 f2 / N2)

8 * 64 + 16 * N2 operations an element there and back. Adjoints need no time reversed: A = Re F^H
diag(K) F has A^T = Re F^H diag(conj K) F. So with Z the spectrum of dz

    dx = Re F^H (Z conj(K))          dk = sqrt(N) Re F^H G,  G = Z conj(X), over the batch too

A longer sequence is cut in blocks: up to four may meet in one kernel (long_conv_hopper_blocks.py),
more by a transform over blocks (long_conv_factors.py).

16-bit rows are transformed in float16 with float32 sums; float32 rows and kernels in pairs of
float16 numbers (SPLIT), what rounding leaves of the first in the second, so three products for each
one. A row is first divided by the power of two under its largest |x|, a kernel by that under its
norm: then nothing passes 2^14, whatever the scale. An error is normwise, relative to rms(z); what
is not finite makes its own row (b, d) NaN. Spectra are planes [2, 64, N2] of Re and Im.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels.launching import Launcher, cdiv, has_wgmma, processors

N1 = 64
WARPS = 4
RUNTIME = [  # never specialised: a new B, D, T or layout of rows compiles nothing
    "T", "B", "D", "J", "rows", "rows_each", "total", "each", "taps", "shrink", "root",
    "stride_kd",
    *(f"stride_{x}{axis}" for x in "xgzd" for axis in "bd"),
]  # fmt: skip
BLOCKS_BY_HAND = "long_conv_hopper_blocks"
SPECTRA_BY_HAND = "long_conv_hopper_spectrum"
SPECTRUM_OF_ROWS = "_spectrum_of_rows_wgmma_kernel"  # of bfloat16, by taps of 16 bits
SPECTRUM = "_kernel_spectrum_wgmma_kernel"
BLOCKS = 4  # at most
# An SM, by N2: more than it holds would load tables in vain.
PROGRAMS = {16: 5, 32: 3, 64: 2}
GRADIENT_PROGRAMS = {16: 4, 32: 2, 64: 2}


@functools.lru_cache(maxsize=32)
def tables(N2: int, device: torch.device, *, ordered: bool = False, blocks: int = 1) -> Tensor:
    """For each f0 < blocks, F1 [f1, n1], F2 [n2, f2] and the twiddle [f1, n2] between them, each Re
    then Im, in float16; then what that rounding left of all of them. `ordered`: the twiddle in the
    order of spectra. Frequencies of table f0 are (f0 - 1/4) / blocks of a step high."""
    low = (steps(blocks, device)[:, None, None] - 0.25) / blocks
    f1 = steps(N1, device)[:, None] + low
    n1, n2 = steps(N1, device), steps(N2, device)
    second = (n2[:, None] * n2 / N2).expand(blocks, N2, N2)
    phases = [f1 * n1 / N1, second, f1 * n2 / (N1 * N2)]
    scales = [N1**-0.5, N2**-0.5, 1.0]
    planes = []
    for phase, scale in zip(phases, scales, strict=True):
        turn = -2 * math.pi * phase.remainder(1.0)
        planes += [turn.cos() * scale, turn.sin() * scale]
    if ordered:
        bits = (blocks, 4, 2, 8, N2 // 16, 2, 4, 2)  # as in _order
        planes[4:] = [x.reshape(bits).permute(0, 4, 1, 3, 6, 5, 2, 7) for x in planes[4:]]
    exact = torch.cat([plane.flatten(1) for plane in planes], dim=1)
    rounded = exact.to(torch.float16)
    return torch.cat([rounded, (exact - rounded).to(torch.float16)], dim=1)


def steps(count: int, device: torch.device) -> Tensor:
    """0, 1, .. in float64: what tables begin with. They are kept, so no CUDA graph may own them."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ArgumentError(
            "wanted the first call of a long convolution at this length before a CUDA graph is "
            "captured, got it within: it makes tables that are kept; call it once before"
        )
    return torch.arange(count, dtype=torch.float64, device=device)


@triton.jit
def _load_tables(table_ptr, N1: tl.constexpr, N2: tl.constexpr, SPLIT: tl.constexpr):
    """F1 and F2, and where SPLIT what rounding left of them."""
    i, j = tl.arange(0, N1), tl.arange(0, N2)
    first = i[:, None] * N1 + i[None, :]
    second = 2 * N1 * N1 + j[:, None] * N2 + j[None, :]
    f1_re, f1_im = tl.load(table_ptr + first), tl.load(table_ptr + N1 * N1 + first)
    f2_re, f2_im = tl.load(table_ptr + second), tl.load(table_ptr + N2 * N2 + second)
    if SPLIT:
        table_ptr += 2 * (N1 * N1 + N2 * N2 + N1 * N2)
    rest_1_re, rest_1_im = tl.load(table_ptr + first), tl.load(table_ptr + N1 * N1 + first)
    rest_2_re, rest_2_im = tl.load(table_ptr + second), tl.load(table_ptr + N2 * N2 + second)
    return f1_re, f1_im, f2_re, f2_im, rest_1_re, rest_1_im, rest_2_re, rest_2_im


@triton.jit
def _twiddle(table_ptr, N1: tl.constexpr, N2: tl.constexpr, SPLIT: tl.constexpr):
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    at = table_ptr + 2 * (N1 * N1 + N2 * N2) + offs
    re, im = tl.load(at).to(tl.float32), tl.load(at + N1 * N2).to(tl.float32)
    if SPLIT:
        at += 2 * (N1 * N1 + N2 * N2 + N1 * N2)
        re, im = re + tl.load(at), im + tl.load(at + N1 * N2)
    return re, im


@triton.jit
def _left(a, rest, x, z, SPLIT: tl.constexpr):
    """z + a x, x rounded to float16; or with what rounding left of both."""
    x_16 = x.to(tl.float16)
    z = tl.dot(a, x_16, z)
    if SPLIT:
        z = tl.dot(rest, x_16, z)
        z = tl.dot(a, (x - x_16).to(tl.float16), z)
    return z


@triton.jit
def _right(x, a, rest, z, SPLIT: tl.constexpr):
    """z + x a, as _left."""
    x_16 = x.to(tl.float16)
    z = tl.dot(x_16, a, z)
    if SPLIT:
        z = tl.dot(x_16, rest, z)
        z = tl.dot((x - x_16).to(tl.float16), a, z)
    return z


@triton.jit
def _there(x, tables, table_ptr, N1: tl.constexpr, N2: tl.constexpr, SPLIT: tl.constexpr):
    """F x of x [64, N2]: Re, Im [64, N2]; all in float32."""
    f1_re, f1_im, _, _, rest_1_re, rest_1_im, _, _ = tables
    zero = tl.zeros([N1, N2], dtype=tl.float32)
    re = _left(f1_re, rest_1_re, x, zero, SPLIT)
    im = _left(f1_im, rest_1_im, x, zero, SPLIT)
    return _half_there(re, im, tables, table_ptr, N1, N2, SPLIT)


@triton.jit
def _half_there(re, im, tables, table_ptr, N1: tl.constexpr, N2: tl.constexpr, SPLIT: tl.constexpr):
    """What F1 was multiplied by, on the way there."""
    _, _, f2_re, f2_im, _, _, rest_2_re, rest_2_im = tables
    zero = tl.zeros([N1, N2], dtype=tl.float32)
    tw_re, tw_im = _twiddle(table_ptr, N1, N2, SPLIT)
    a, b = _complex(re, im, tw_re, tw_im, False)
    re = _right(a, f2_re, rest_2_re, zero, SPLIT)
    im = _right(a, f2_im, rest_2_im, zero, SPLIT)
    re = _right(-b, f2_im, rest_2_im, re, SPLIT)
    im = _right(b, f2_re, rest_2_re, im, SPLIT)
    return re, im


@triton.jit
def _half_back(re, im, tables, table_ptr, N1: tl.constexpr, N2: tl.constexpr, SPLIT: tl.constexpr):
    """What F1^H is yet to be multiplied by, on the way back."""
    _, _, f2_re, f2_im, _, _, rest_2_re, rest_2_im = tables
    zero = tl.zeros([N1, N2], dtype=tl.float32)
    a = _right(re, f2_re, rest_2_re, zero, SPLIT)
    b = _right(im, f2_re, rest_2_re, zero, SPLIT)
    a = _right(im, f2_im, rest_2_im, a, SPLIT)
    b = _right(-re, f2_im, rest_2_im, b, SPLIT)
    tw_re, tw_im = _twiddle(table_ptr, N1, N2, SPLIT)
    return _complex(a, b, tw_re, tw_im, True)


@triton.jit
def _back(re, im, tables, table_ptr, N1: tl.constexpr, N2: tl.constexpr, SPLIT: tl.constexpr):
    """Re F^H (re + i im) [64, N2]; all in float32."""
    f1_re, f1_im, _, _, rest_1_re, rest_1_im, _, _ = tables
    re, im = _half_back(re, im, tables, table_ptr, N1, N2, SPLIT)
    z = tl.zeros([N1, N2], dtype=tl.float32)
    z = _left(tl.trans(f1_re), tl.trans(rest_1_re), re, z, SPLIT)
    return _left(tl.trans(f1_im), tl.trans(rest_1_im), im, z, SPLIT)


@triton.jit
def _order(N1: tl.constexpr, N2: tl.constexpr, ORDERED: tl.constexpr):
    """Where a spectrum's [f1, f2] is: row by row, or as long_conv_hopper.py's registers want it, by
    bits (columns / 16; warp, row, pair of columns; 8 columns, 8 rows, 1 column)."""
    i, j = tl.arange(0, N1)[:, None], tl.arange(0, N2)[None, :]
    if ORDERED:
        lane = (i % 8) * 4 + j % 8 // 2
        own = j // 8 % 2 * 4 + i // 8 % 2 * 2 + j % 2
        return ((j // 16 * 4 + i // 16) * 32 + lane) * 8 + own
    return i * N2 + j


@triton.jit
def _power_of_two(largest):
    """The power of two under it, and one over that; both lead to NaN if it is not finite."""
    bits = largest.to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _normal(x):
    """x over the power of two under its largest magnitude, and that power."""
    scale, inverse = _power_of_two(tl.max(tl.max(tl.abs(x), axis=1), axis=0))
    return x * inverse, scale


@triton.jit
def _normal_complex(re, im):
    """As _normal, of both by one power."""
    largest = tl.maximum(tl.abs(re), tl.abs(im))
    scale, inverse = _power_of_two(tl.max(tl.max(largest, axis=1), axis=0))
    return re * inverse, im * inverse, scale


@triton.jit
def _complex(a_re, a_im, b_re, b_im, CONJUGATE: tl.constexpr):
    """a * b, or a * conj(b)."""
    if CONJUGATE:
        return a_re * b_re + a_im * b_im, a_im * b_re - a_re * b_im
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit(do_not_specialize=RUNTIME)
def _long_conv_kernel(
    x_ptr, gate_ptr, spectrum_ptr, scale_ptr, table_ptr, z_ptr,  # pointers
    stride_xb: tl.int64, stride_xd: tl.int64, stride_gb: tl.int64, stride_gd: tl.int64,
    stride_zb: tl.int64, stride_zd: tl.int64, T: tl.int64, B: tl.int64, rows: tl.int64,
    rows_each: tl.int64,  # runtime scalars
    N1: tl.constexpr, N2: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr,
    ORDERED: tl.constexpr, ADJOINT: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """One block a row, row d * B + b: z = gate * A x, or ADJOINT z = A^T (gate * x)."""
    N: tl.constexpr = N1 * N2
    tables = _load_tables(table_ptr, N1, N2, SPLIT)
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    order = _order(N1, N2, ORDERED)
    mask = offs // UNIT < T
    start = tl.program_id(0).to(tl.int64) * rows_each
    for row in range(start, tl.minimum(start + rows_each, rows)):
        b, d = row % B, row // B
        at = x_ptr + (b * stride_xb + d * stride_xd) * UNIT + offs
        x = tl.load(at, mask=mask, other=0.0)
        x = x.to(tl.float32)
        if HAS_GATE:
            gate = tl.load(
                gate_ptr + (b * stride_gb + d * stride_gd) * UNIT + offs, mask=mask, other=0.0
            )
            gate = gate.to(tl.float32)
            if ADJOINT:
                x *= gate
        x, scale = _normal(x)
        re, im = _there(x, tables, table_ptr, N1, N2, SPLIT)
        k_re = tl.load(spectrum_ptr + d * 2 * N + order).to(tl.float32)
        k_im = tl.load(spectrum_ptr + d * 2 * N + N + order).to(tl.float32)
        re, im = _complex(re, im, k_re, k_im, ADJOINT)
        z = _back(re, im, tables, table_ptr, N1, N2, SPLIT)
        z *= scale * tl.load(scale_ptr + d)
        if HAS_GATE and not ADJOINT:
            z *= gate
        tl.store(
            z_ptr + (b * stride_zb + d * stride_zd) * UNIT + offs,
            z.to(z_ptr.dtype.element_ty),
            mask=mask,
        )


@triton.jit(do_not_specialize=RUNTIME)
def _long_conv_gradients_kernel(
    x_ptr, gate_ptr, dz_ptr, spectrum_ptr, scale_ptr, table_ptr, dx_ptr, dk_ptr,  # pointers
    stride_xb: tl.int64, stride_xd: tl.int64, stride_gb: tl.int64, stride_gd: tl.int64,
    stride_zb: tl.int64, stride_zd: tl.int64, stride_db: tl.int64, stride_dd: tl.int64,
    T: tl.int64, B: tl.int64, D: tl.int64, taps: tl.int64, each: tl.int64,  # runtime scalars
    N1: tl.constexpr, N2: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr,
    ORDERED: tl.constexpr, ROOT_N: tl.constexpr, HAS_GATE: tl.constexpr, NEEDS_DX: tl.constexpr,
):  # fmt: skip
    """One block a row, `each` channels a program: dx = A^T (gate * dz), dk [D, taps] in float32."""
    N: tl.constexpr = N1 * N2
    tables = _load_tables(table_ptr, N1, N2, SPLIT)
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    order = _order(N1, N2, ORDERED)
    mask = offs // UNIT < T
    first = tl.program_id(0).to(tl.int64) * each
    for d in range(first, tl.minimum(first + each, D)):
        g_re = tl.zeros([N1, N2], dtype=tl.float32)
        g_im = tl.zeros([N1, N2], dtype=tl.float32)
        for b in range(0, B):
            at = x_ptr + (b * stride_xb + d * stride_xd) * UNIT + offs
            x = tl.load(at, mask=mask, other=0.0)
            x, x_scale = _normal(x.to(tl.float32))
            x_re, x_im = _there(x, tables, table_ptr, N1, N2, SPLIT)
            at = dz_ptr + (b * stride_zb + d * stride_zd) * UNIT + offs
            dz = tl.load(at, mask=mask, other=0.0)
            dz = dz.to(tl.float32)
            if HAS_GATE:
                gate = tl.load(
                    gate_ptr + (b * stride_gb + d * stride_gd) * UNIT + offs, mask=mask, other=0.0
                )
                dz *= gate.to(tl.float32)
            dz, z_scale = _normal(dz)
            x_re, x_im = x_re * (x_scale * z_scale), x_im * (x_scale * z_scale)
            re, im = _there(dz, tables, table_ptr, N1, N2, SPLIT)
            y_re, y_im = _complex(re, im, x_re, x_im, True)
            g_re += y_re
            g_im += y_im
            if NEEDS_DX:
                k_re = tl.load(spectrum_ptr + d * 2 * N + order).to(tl.float32)
                k_im = tl.load(spectrum_ptr + d * 2 * N + N + order).to(tl.float32)
                re, im = _complex(re, im, k_re, k_im, True)
                dx = _back(re, im, tables, table_ptr, N1, N2, SPLIT)
                dx *= z_scale * tl.load(scale_ptr + d)
                tl.store(
                    dx_ptr + (b * stride_db + d * stride_dd) * UNIT + offs,
                    dx.to(dx_ptr.dtype.element_ty), mask=mask,
                )  # fmt: skip
        g_re, g_im, scale = _normal_complex(g_re, g_im)
        dk = _back(g_re, g_im, tables, table_ptr, N1, N2, SPLIT) * (scale * ROOT_N)
        tl.store(dk_ptr + d * taps * UNIT + offs, dk, mask=offs // UNIT < taps)


@triton.jit(do_not_specialize=RUNTIME)
def _kernel_spectrum_kernel(
    k_ptr, table_ptr, spectrum_ptr, scale_ptr,  # pointers
    stride_kd: tl.int64, taps: tl.int64, total: tl.int64, each: tl.int64,
    # runtime scalars; stride_kd and taps in units of UNIT
    N1: tl.constexpr, N2: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr,
    ORDERED: tl.constexpr, ROOT_N: tl.constexpr,
):  # fmt: skip
    """sqrt(N) F k of each channel, over the power of two under its norm."""
    N: tl.constexpr = N1 * N2
    tables = _load_tables(table_ptr, N1, N2, SPLIT)
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    order = _order(N1, N2, ORDERED)
    first = tl.program_id(0).to(tl.int64) * each
    for d in range(first, tl.minimum(first + each, total)):
        k = tl.load(k_ptr + d * stride_kd * UNIT + offs, mask=offs // UNIT < taps, other=0.0)
        k, scale = _normal(k.to(tl.float32))  # of taps near 1: squares of those of 1e-20 are none
        norm, under = _power_of_two(tl.sqrt(tl.sum(tl.sum(k * k, axis=1), axis=0)))
        k *= tl.where(norm == 0, 1.0, under)
        tl.store(scale_ptr + d, scale * norm)
        re, im = _there(k, tables, table_ptr, N1, N2, SPLIT)
        out = spectrum_ptr + d * 2 * N + order
        tl.store(out, (re * ROOT_N).to(spectrum_ptr.dtype.element_ty))
        tl.store(out + N, (im * ROOT_N).to(spectrum_ptr.dtype.element_ty))


_long_conv = Launcher(_long_conv_kernel)
_gradients = Launcher(_long_conv_gradients_kernel)
_spectrum = Launcher(_kernel_spectrum_kernel)


def ordered(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of this dtype go to the kernels of long_conv_hopper.py."""
    return dtype != torch.float32 and has_wgmma(device)


@functools.cache
def by_hand(name: str, module: str = "long_conv_hopper") -> Launcher:
    """Imported where it is to run: Gluon may change, and nothing else is to depend on it."""
    return Launcher(getattr(importlib.import_module(f"chela_bench.kernels.{module}"), name))


def spectrum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the spectra of rows of this dtype."""
    return torch.float32 if dtype == torch.float32 else torch.float16


class Rows:
    """How rows [B, D, T] are told to a kernel: in units of 8 numbers where all are aligned."""

    def __init__(self, N2: int, *rows: Tensor | None, taps: int = 0) -> None:
        given = [x for x in rows if x is not None]
        self.dtype, self.device = given[0].dtype, given[0].device
        self.ordered = ordered(self.dtype, self.device)
        self.table = tables(N2, self.device, ordered=self.ordered)
        B, D, T = given[0].shape
        strides = [(0, 0) if x is None else x.stride()[:2] for x in rows]
        numbers = [T, *(n for pair in strides for n in pair)]
        self.unit = 8 if all(n % 8 == 0 for n in [*numbers, taps]) else 1
        self.T, *self.strides = [n // self.unit for n in numbers]
        self.B, self.D, self.N2 = B, D, N2

    def kernel(self, launcher: Launcher, *name: str) -> Launcher:
        return by_hand(*name) if self.ordered else launcher

    def constants(self, launcher: Launcher, **flags: float) -> tuple[Any, ...]:
        return constants(launcher, self.N2, self.dtype, self.ordered, self.unit, **flags)


@functools.lru_cache(maxsize=1024)
def constants(
    launcher: Launcher, N2: int, dtype: torch.dtype, ordered: bool, unit: int = 1, **flags: float
) -> tuple[Any, ...]:
    """Of a kernel that transforms rows of this dtype."""
    every: dict[str, object] = {
        "N1": N1, "N2": N2, "UNIT": unit, "SPLIT": dtype == torch.float32, "ORDERED": ordered,
        "ROOT_N": math.sqrt(N1 * N2), "PACKED": dtype == torch.bfloat16,
    }  # fmt: skip
    names = launcher.kernel.arg_names
    return launcher.constants(**{n: x for n, x in every.items() if n in names}, **flags)


def rows_each(rows: int, device: torch.device, per_processor: int) -> tuple[int, int]:
    """Programs, and the rows that each one transforms with tables it loads once."""
    each = cdiv(rows, per_processor * processors(device))
    return cdiv(rows, each), each


def kernel_spectrum(
    kernel: Tensor, T: int, N2: int, dtype: torch.dtype, blocks: int = 1
) -> tuple[Tensor, Tensor]:
    """Spectra [D, blocks, 2, 64, N2] of kernel [D, taps], rows contiguous, for T tokens of rows of
    this dtype, and what they are to be multiplied by [D], float32. More than one block: as
    long_conv_hopper_blocks.py wants them."""
    D = kernel.shape[0]
    spectra = kernel.new_empty(D, blocks, 2, N1, N2, dtype=spectrum_dtype(dtype))
    scale = kernel.new_empty(D, dtype=torch.float32)
    by_order = ordered(dtype, kernel.device)
    precision = dtype if by_order and dtype == torch.bfloat16 else torch.float32
    launcher = _spectrum
    if by_order:
        rows = precision == torch.bfloat16 and kernel.dtype in (torch.bfloat16, torch.float16)
        launcher = by_hand(SPECTRUM_OF_ROWS if rows else SPECTRUM, SPECTRA_BY_HAND)
    table = tables(N2, kernel.device, ordered=by_order)
    stride, taps = kernel.stride(0), min(kernel.shape[1], T)
    unit = 8 if stride % 8 == taps % 8 == 0 else 1
    programs, each = rows_each(D, kernel.device, PROGRAMS[N2])
    one = {"BLOCKS": blocks} if by_order else {}
    flags = constants(launcher, N2, precision, by_order, unit, **one)
    launcher(
        programs, (kernel, table, spectra, scale), (stride // unit, taps // unit, D, each), flags,
        WARPS, 1,
    )  # fmt: skip
    return spectra, scale


def long_conv_block(
    x: Tensor,
    gate: Tensor | None,
    spectrum: Tensor,
    scale: Tensor,
    z: Tensor,
    *,
    adjoint: bool = False,
) -> None:
    """z = gate * (kernel * x), or of z and x the adjoint; [B, D, T], rows contiguous, of one block;
    16-bit rows on Hopper of up to four."""
    blocks, N2 = spectrum.shape[1], spectrum.shape[-1]
    rows = Rows(N2, x, gate, z)
    several = {"BLOCKS": blocks, "SHRINK": 1 / triton.next_power_of_2(blocks)}
    if blocks == 1:
        kernel, several = rows.kernel(_long_conv, "_long_conv_wgmma_kernel"), {}
    else:
        kernel = by_hand("_long_conv_wgmma_blocks_kernel", BLOCKS_BY_HAND)
    programs, each = rows_each(rows.B * rows.D, x.device, PROGRAMS[N2])
    kernel(
        programs, (x, gate, spectrum, scale, rows.table, z),
        (*rows.strides, rows.T, rows.B, rows.B * rows.D, each),
        rows.constants(kernel, ADJOINT=adjoint, HAS_GATE=gate is not None, **several), WARPS, 1,
    )  # fmt: skip


def gradients_block(
    x: Tensor,
    gate: Tensor | None,
    dz: Tensor,
    spectrum: Tensor,
    scale: Tensor,
    dx: Tensor | None,
    dk: Tensor,
) -> None:
    """dx, if wanted, and dk [D, taps] from dz; [B, D, T], rows contiguous, one block."""
    rows = Rows(spectrum.shape[-1], x, gate, dz, dx, taps=dk.shape[1])
    kernel = rows.kernel(_gradients, "_long_conv_wgmma_gradients_kernel")
    one = {"IS_ONE": rows.B == 1} if rows.ordered else {}
    programs, each = rows_each(rows.D, x.device, GRADIENT_PROGRAMS[rows.N2])
    kernel(
        programs, (x, gate, dz, spectrum, scale, rows.table, dx, dk),
        (*rows.strides, rows.T, rows.B, rows.D, dk.shape[1] // rows.unit, each),
        rows.constants(kernel, HAS_GATE=gate is not None, NEEDS_DX=dx is not None, **one), WARPS, 1,
    )  # fmt: skip
