"""Causal depthwise convolution of short sequences on tensor cores, without a transform.

    z[b, d, t] = gate[b, d, t] * sum_{n=0}^{min(t, N-1)} k[d, n] x[b, d, t-n]

x, gate, z [B, D, T], views of any strides; taps k [D, N] float32, N >= 1. Time is cut in blocks of
b = 32: X[a, i] = x[a b + i], and Z likewise. With Toeplitz blocks K_c[i, r] = k[c b + r - i],

    Z[j, :] = sum_c X[j - c, :] K_c = sum_c (S_c X) K_c        S_c[j, a] = 1 if j - a = c, else 0

so X stays in registers and tensor cores shift it as they multiply it: S_c X is exact, a product
with zeros and ones. 16 blocks of one sequence, or of several short ones, are the 16 rows of a
tensor core's tile; channels are the batch of a batched product, 16 of them so that tokens' rows are
read in whole sectors. `_shifted_taps_kernel` writes k once for every alignment, so that K_c is
vectors of memory: K_c[i, :] begins at k[c b - i], which is aligned in the copy shifted by i.

Operands of 16-bit tensors are float16: each row (b, d) of x and each channel of k is scaled by the
power of two that brings its largest number to 2^14, so that numbers down to 2^-28 of that keep all
their bits. float32 is three products of TF32. Sums are float32. NaN or infinity in x makes its own
row NaN from the block of 512 tokens on in which it is, in k its own channel.

A token costs 2 (16 + b) ceil(T / b) FLOPs in each channel (T <= 512; for more, up to twice that),
and moves x, z and gate once: 4 bytes, 6 with a gate, in 16-bit. Each 512 tokens of output read all
before them again. Shifted taps are 16 bytes each. The gradient of k costs 2 b FLOPs, and reads
x and dz, for each 32 taps and the tokens that they reach: from L2 as far as they fit in it.
Products of 16-bit numbers are exact as they are, so only a gate's need scales.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, cdiv, on_device_of

BLOCK = 32  # tokens of a block, b above
CHUNK = 512  # tokens of a sequence that a program holds
TILE_M = 16  # blocks in a tensor core's tile
PROGRAMS = 264  # two for each of an H100's processors
ANY, CHANNELS, TOKENS = 0, 1, 2  # the axis of stride 1

_STRIDES = [f"stride_{x}{axis}" for x in ("x", "dz", "g", "z", "k") for axis in "bdtn"]
RUNTIME = [*_STRIDES, "B", "D", "T", "N", "P", "C_MAX", "CHUNKS", "ROWS"]


@triton.jit
def _offsets(b, d, t, stride_b, stride_d, stride_t, AXIS: tl.constexpr, UNIT: tl.constexpr):
    """Strides are in units of UNIT elements, which tells the compiler what they are multiples of;
    that of AXIS is 1."""
    offs = b * (stride_b * UNIT)
    if AXIS == 1:
        offs += d
    else:
        offs += d * (stride_d * UNIT)
    if AXIS == 2:
        return offs + t
    return offs + t * (stride_t * UNIT)


@triton.jit
def _magnitude(x):
    """Of float32: bits that compare as |x| does, infinity and then NaN above all numbers."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _exponent(bits, TARGET: tl.constexpr):
    """e with 2^e <= |x| < 2^(e+1), as far as 2^(TARGET - e) is a normal number."""
    return tl.minimum(tl.maximum((bits >> 23) - 127, TARGET - 127), 127)


@triton.jit
def _power_of_two(e):
    return ((tl.minimum(tl.maximum(e, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _times_power_of_two(x, e):
    """In two steps, since 2^e alone may be no number where the product is one."""
    half = e >> 1
    return x * _power_of_two(half) * _power_of_two(e - half)


@triton.jit(do_not_specialize=RUNTIME)
def _shifted_taps_kernel(
    k_ptr, shifted_ptr, exponent_ptr,  # pointers
    stride_kd: tl.int64, stride_kn: tl.int64, N, P,  # runtime scalars
    COPIES: tl.constexpr, TARGET: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """shifted[d, s, p] = k[d, p - BLOCK - s] * 2^(TARGET - e_d); zero where there is no tap.

    Grid (D). k [D, N or more]; shifted [D, COPIES, 8 P]; exponent e [D]."""
    d = tl.program_id(0).to(tl.int64)
    k_ptr += d * stride_kd
    shifted_ptr += d * COPIES * P * 8
    offs_p = tl.arange(0, BLOCK_P)
    offs_s = tl.arange(0, COPIES)
    most = tl.zeros([BLOCK_P], dtype=tl.int32)
    for start in range(0, N, BLOCK_P):
        n = start + offs_p
        k = tl.load(k_ptr + n * stride_kn, mask=n < N, other=0.0).to(tl.float32)
        most = tl.maximum(most, _magnitude(k))
    e = _exponent(tl.max(most, axis=0), TARGET)
    tl.store(exponent_ptr + d, e)
    scale = _power_of_two(TARGET - e)
    for start in range(0, P * 8, BLOCK_P):
        p = start + offs_p
        n = p[None, :] - BLOCK - offs_s[:, None]  # [COPIES, BLOCK_P]
        k = tl.load(k_ptr + n * stride_kn, mask=(n >= 0) & (n < N), other=0.0).to(tl.float32)
        shifted = (k * scale).to(shifted_ptr.dtype.element_ty)
        tl.store(
            shifted_ptr + offs_s[:, None] * (P * 8) + p[None, :], shifted, mask=p[None, :] < P * 8
        )


@triton.jit
def _toeplitz_product(
    acc, x, distance, tile_ptr, before, c,
    C: tl.constexpr, G: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    IS_REVERSED: tl.constexpr,
):  # fmt: skip
    """acc [C, G * 16, BLOCK] += (S_c x) K_{before + c}, or with K transposed, and x and distance
    [G * C, 16, BLOCK or 16]."""
    toeplitz = tl.load(tile_ptr + (before + c) * BLOCK)  # [C, i, r]
    if IS_REVERSED:
        toeplitz = tl.permute(toeplitz, (0, 2, 1))
    if BLOCKS > 1:
        shift = (distance == c).to(x.dtype)
        x = tl.dot(shift, x, out_dtype=x.dtype, input_precision="tf32x3")
    x = tl.permute(tl.reshape(x, (G, C, 16, BLOCK)), (1, 0, 2, 3))
    x = tl.reshape(x, (C, G * 16, BLOCK))
    return tl.dot(x, toeplitz, acc, input_precision="tf32x3")


@triton.jit
def _toeplitz_products(
    x, tile_ptr, before, c_first, c_last,
    C: tl.constexpr, G: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    IS_REVERSED: tl.constexpr,
):  # fmt: skip
    """The sum over c_first <= c <= c_last, at least one, of (S_c x) K_{before + c}."""
    offs_m = tl.arange(0, 16)
    distance = offs_m[:, None] - offs_m[None, :]
    unit = tl.broadcast_to((distance == 0).to(x.dtype)[None], (G * C, 16, 16))
    if IS_REVERSED:
        distance = -distance
    together = (offs_m // BLOCKS)[:, None] == (offs_m // BLOCKS)[None, :]  # of one sequence
    distance = tl.broadcast_to(tl.where(together, distance, 16).to(x.dtype)[None], (G * C, 16, 16))
    if BLOCKS > 1:  # as a product it lies in the registers where products want S_c
        distance = tl.dot(distance, unit, input_precision="tf32x3").to(tl.int32)
    acc = tl.zeros([C, G * 16, BLOCK], dtype=tl.float32)
    # The first product is outside the loop, so that x is in registers inside: the compiler moves
    # what is used only in a loop into it.
    acc = _toeplitz_product(
        acc, x, distance, tile_ptr, before, c_first, C, G, BLOCKS, BLOCK, IS_REVERSED
    )
    for c in range(c_first + 1, c_last + 1):
        acc = _toeplitz_product(
            acc, x, distance, tile_ptr, before, c, C, G, BLOCKS, BLOCK, IS_REVERSED
        )
    return acc


@triton.jit(do_not_specialize=RUNTIME)
def _direct_kernel(
    x_ptr, shifted_ptr, exponent_ptr, gate_ptr, z_ptr,  # pointers
    stride_xb: tl.int64, stride_xd: tl.int64, stride_xt: tl.int64,  # each in its own unit
    stride_gb: tl.int64, stride_gd: tl.int64, stride_gt: tl.int64,
    stride_zb: tl.int64, stride_zd: tl.int64, stride_zt: tl.int64,
    B, D, T, P, C_MAX, CHUNKS,  # runtime scalars, D and T in units
    C: tl.constexpr, G: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,  # tile
    COPIES: tl.constexpr, TARGET: tl.constexpr,
    AXIS_X: tl.constexpr, AXIS_G: tl.constexpr, AXIS_Z: tl.constexpr,
    UNIT_X: tl.constexpr, UNIT_G: tl.constexpr, UNIT_Z: tl.constexpr,
    UNIT_D: tl.constexpr, UNIT_T: tl.constexpr,
    HAS_GATE: tl.constexpr, IS_REVERSED: tl.constexpr, IS_LONG: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(D, C) * CHUNKS * cdiv(B, rows)): a program owns C channels of G * 16 blocks, which
    are BLOCKS blocks of each of `rows` = G * 16 / BLOCKS sequences."""
    D, T = D * UNIT_D, T * UNIT_T
    ND = (D + C - 1) // C
    pid = tl.program_id(0)
    pid_d, chunk, pid_b = pid % ND, (pid // ND) % CHUNKS, pid // ND // CHUNKS

    # A sequence's 16 rows of a tile are a [g, channel, block, token] of the batched product.
    offs_q = tl.arange(0, G * C)[:, None, None]
    offs_m = tl.arange(0, 16)[None, :, None]
    offs_i = tl.arange(0, BLOCK)[None, None, :]
    d = pid_d * C + offs_q % C  # [G * C, 1, 1]
    b = (pid_b * G + offs_q // C) * (16 // BLOCKS) + offs_m // BLOCKS  # [G * C, 16, 1]
    t = (offs_m % BLOCKS) * BLOCK + offs_i  # [1, 16, BLOCK], within the chunk
    mask = (b < B) & (d < D)
    b = b.to(tl.int64)

    offs_c = pid_d * C + tl.arange(0, C)
    channel = tl.minimum(offs_c, D - 1).to(tl.int64)[:, None, None]
    i, r = tl.arange(0, BLOCK)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    tile_ptr = (
        shifted_ptr + (channel * COPIES + i % COPIES) * (P * 8)
        + (BLOCK - i // COPIES * COPIES) + r
    )  # [C, BLOCK, BLOCK]  # fmt: skip
    k_exponent = tl.load(exponent_ptr + tl.minimum(d, D - 1))  # [G * C, 1, 1]

    z = tl.zeros([G * C, 16, BLOCK], dtype=tl.float32)
    first, last = chunk, chunk
    if IS_LONG:
        reach = (C_MAX + BLOCKS - 1) // BLOCKS  # chunks that taps reach over
        if IS_REVERSED:
            last = tl.minimum(chunk + reach, CHUNKS - 1)
        else:
            first = tl.maximum(chunk - reach, 0)
    for source in range(first, last + 1):
        s = source * (BLOCKS * BLOCK) + t
        inside = mask & (s < T)
        x = tl.load(
            x_ptr + _offsets(b, d, s, stride_xb, stride_xd, stride_xt, AXIS_X, UNIT_X),
            mask=inside, other=0.0,
        ).to(tl.float32)  # fmt: skip
        if HAS_GATE and IS_REVERSED:
            x *= tl.load(
                gate_ptr + _offsets(b, d, s, stride_gb, stride_gd, stride_gt, AXIS_G, UNIT_G),
                mask=inside, other=0.0,
            ).to(tl.float32)  # fmt: skip
        bits = tl.reshape(_magnitude(x), (G * C, 16 // BLOCKS, BLOCKS * BLOCK))
        most = tl.max(bits, axis=2, keep_dims=True)  # [G * C, sequences, 1]
        most = tl.reshape(
            tl.broadcast_to(most, (G * C, 16 // BLOCKS, BLOCKS)), (G * C, 16)
        )[:, :, None]  # fmt: skip
        e = _exponent(most, TARGET)
        x = tl.where(_magnitude(x) < 0x7F800000, x * _power_of_two(TARGET - e), 0.0)
        x = x.to(shifted_ptr.dtype.element_ty)
        before = tl.abs(chunk - source) * BLOCKS
        acc = _toeplitz_products(
            x, tile_ptr, before,
            tl.maximum(1 - BLOCKS, -before), tl.minimum(BLOCKS - 1, C_MAX - before),
            C, G, BLOCKS, BLOCK, IS_REVERSED,
        )  # fmt: skip
        acc = tl.permute(tl.reshape(acc, (C, G, 16, BLOCK)), (1, 0, 2, 3))
        acc = tl.reshape(acc, (G * C, 16, BLOCK))
        acc = _times_power_of_two(acc, e + k_exponent - 2 * TARGET)
        z += tl.where(most < 0x7F800000, acc, float("nan"))

    s = chunk * (BLOCKS * BLOCK) + t
    inside = mask & (s < T)
    if HAS_GATE and not IS_REVERSED:
        z *= tl.load(
            gate_ptr + _offsets(b, d, s, stride_gb, stride_gd, stride_gt, AXIS_G, UNIT_G),
            mask=inside, other=0.0,
        ).to(tl.float32)  # fmt: skip
    tl.store(
        z_ptr + _offsets(b, d, s, stride_zb, stride_zd, stride_zt, AXIS_Z, UNIT_Z),
        z.to(z_ptr.dtype.element_ty), mask=inside,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def _taps_gradient_kernel(
    x_ptr, dz_ptr, gate_ptr, parts_ptr,  # pointers
    stride_xb: tl.int64, stride_xd: tl.int64, stride_xt: tl.int64,  # each in its own unit
    stride_dzb: tl.int64, stride_dzd: tl.int64, stride_dzt: tl.int64,
    stride_gb: tl.int64, stride_gd: tl.int64, stride_gt: tl.int64,
    B, D, T, C_MAX, ROWS,  # runtime scalars, D and T in units
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,  # tile
    IS_SPLIT: tl.constexpr, IS_EXACT: tl.constexpr, UPCAST: tl.constexpr, TARGET: tl.constexpr,
    AXIS_X: tl.constexpr, AXIS_DZ: tl.constexpr, AXIS_G: tl.constexpr,
    UNIT_X: tl.constexpr, UNIT_DZ: tl.constexpr, UNIT_G: tl.constexpr,
    UNIT_D: tl.constexpr, UNIT_T: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """The gradient of K_c, sum_{b, j} X[j - c, i] dZ[j, r], and of the taps on its diagonals.

    Grid (cdiv(D, C) * (C_MAX + 1) * cdiv(B, ROWS)): a program owns C channels and one c, and adds
    up ROWS sequences. parts [cdiv(B, ROWS), 2, D, C_MAX + 1, BLOCK]: half 0 is the gradient of
    taps c b + m, half 1 of taps c b - b + m. IS_EXACT: operands are 16-bit numbers as they lie in
    memory. Else the sum is in units of 2^e, which is the largest product of a tile's largest
    numbers so far, as a softmax's running maximum is."""
    D, T = D * UNIT_D, T * UNIT_T
    OPERAND: tl.constexpr = tl.float32 if IS_SPLIT else tl.float16
    ND = (D + C - 1) // C
    pid = tl.program_id(0)
    pid_d, c, pid_b = pid % ND, (pid // ND) % (C_MAX + 1), pid // ND // (C_MAX + 1)
    offs_c = pid_d * C + tl.arange(0, C)
    d = offs_c[:, None, None]
    offs_i = tl.arange(0, BLOCK)
    first_row = pid_b * ROWS
    pairs = (T + BLOCK - 1) // BLOCK - c  # of blocks, c apart, in one sequence
    total = tl.minimum(ROWS, B - first_row) * pairs

    acc = tl.zeros([C, BLOCK, BLOCK], dtype=tl.float32)
    e = tl.full([C], -512, dtype=tl.int32)
    for start in range(0, total, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)[None, :, None]
        b = (first_row + m // pairs).to(tl.int64)
        t = m % pairs * BLOCK + offs_i[None, None, :]  # [1, BLOCK_M, BLOCK]
        s = t + c * BLOCK
        mask = (m < total) & (d < D)
        x = tl.load(
            x_ptr + _offsets(b, d, t, stride_xb, stride_xd, stride_xt, AXIS_X, UNIT_X),
            mask=mask & (t < T), other=0.0,
        )  # fmt: skip
        dz = tl.load(
            dz_ptr + _offsets(b, d, s, stride_dzb, stride_dzd, stride_dzt, AXIS_DZ, UNIT_DZ),
            mask=mask & (s < T), other=0.0,
        )  # fmt: skip
        if not IS_EXACT or UPCAST:
            x, dz = x.to(tl.float32), dz.to(tl.float32)
        if HAS_GATE:
            dz *= tl.load(
                gate_ptr + _offsets(b, d, s, stride_gb, stride_gd, stride_gt, AXIS_G, UNIT_G),
                mask=mask & (s < T), other=0.0,
            ).to(tl.float32)  # fmt: skip
        if not IS_EXACT:
            x_most = tl.max(tl.reshape(_magnitude(x), (C, BLOCK_M * BLOCK)), axis=1)  # [C]
            dz_most = tl.max(tl.reshape(_magnitude(dz), (C, BLOCK_M * BLOCK)), axis=1)
            x_e, dz_e = _exponent(x_most, TARGET), _exponent(dz_most, TARGET)
            larger = tl.maximum(e, x_e + dz_e)
            rescale = _power_of_two(e - larger)
            rescale = tl.where(tl.maximum(x_most, dz_most) < 0x7F800000, rescale, float("nan"))
            acc *= rescale[:, None, None]
            e = larger
            x = (x * _power_of_two(TARGET - x_e)[:, None, None]).to(OPERAND)
            dz = (dz * _power_of_two(TARGET + x_e - e)[:, None, None]).to(OPERAND)
        acc = tl.dot(tl.permute(x, (0, 2, 1)), dz, acc, input_precision="tf32x3")
    if not IS_EXACT:
        acc = _times_power_of_two(acc, (e - 2 * TARGET)[:, None, None])

    # Row i of acc, turned by i: column m then holds r - i = m, or m - b where it has wrapped.
    turned = offs_i[:, None] + offs_i[None, :]
    acc = tl.gather(acc, tl.broadcast_to((turned % BLOCK)[None], (C, BLOCK, BLOCK)), axis=2)
    wrapped = (turned >= BLOCK)[None]
    here = tl.sum(tl.where(wrapped, 0.0, acc), axis=1)  # [C, BLOCK]
    before = tl.sum(tl.where(wrapped, acc, 0.0), axis=1)
    half = (C_MAX + 1).to(tl.int64) * BLOCK * D
    offs = pid_b * half * 2 + (offs_c[:, None].to(tl.int64) * (C_MAX + 1) + c) * BLOCK
    offs += offs_i[None, :]
    tl.store(parts_ptr + offs, here, mask=offs_c[:, None] < D)
    tl.store(parts_ptr + half + offs, before, mask=offs_c[:, None] < D)


_shifted_taps = Launcher(_shifted_taps_kernel)
_direct = Launcher(_direct_kernel)
_taps_gradient = Launcher(_taps_gradient_kernel)


def direct_forward(
    x: Tensor, taps: Tensor, z: Tensor, *, gate: Tensor | None = None, reverse: bool = False
) -> None:
    """Writes z[t] = gate[t] * sum_n taps[n] x[t-n].

    x, gate, z [B, D, T]; taps [D, N]. With reverse=True the adjoint, which takes dz to dx:
    z[t] = sum_n taps[n] (gate * x)[t+n].
    """
    B, D, T = x.shape
    if x.numel() == 0:
        return
    N = min(taps.shape[1], T)
    blocks = cdiv(T, BLOCK)
    c_max = min(blocks - 1, (N + BLOCK - 2) // BLOCK)
    shape = _shape(x.dtype)
    length = BLOCK * (c_max + 2) // 8
    with on_device_of(x):
        shifted = x.new_empty((D, shape.copies, length * 8), dtype=shape.operand)
        exponent = x.new_empty((D,), dtype=torch.int32)
        _shifted_taps(
            D, (taps, shifted, exponent), (*taps.stride(), N, length), shape.taps_constants, 4, 3
        )
        layouts = [_layout(x), _layout(gate), _layout(z)]
        in_chunk = min(CHUNK // BLOCK, 1 << (blocks - 1).bit_length())
        chunks = cdiv(blocks, in_chunk)
        rows = TILE_M // in_chunk
        # Twice the rows for each K_c that is read, where registers are enough.
        groups = 2 if shape.operand == torch.float16 and rows < B and chunks == 1 else 1
        unit_d, unit_t = _unit(D), _unit(T)
        constants = _direct_constants(
            shape, groups, in_chunk, tuple([(axis, unit) for axis, unit, _ in layouts]),
            unit_d, unit_t, gate is not None, reverse, chunks > 1,
        )  # fmt: skip
        strides = [stride for _, _, strides in layouts for stride in strides]
        _direct(
            cdiv(D, shape.channels) * chunks * cdiv(B, groups * rows),
            (x, shifted, exponent, gate, z),
            (*strides, B, D // unit_d, T // unit_t, length, c_max, chunks),
            constants, 8 * groups, 3 if shape.operand == torch.float16 else 2,
        )  # fmt: skip


def direct_taps_gradient(x: Tensor, dz: Tensor, *, gate: Tensor | None = None, taps: int) -> Tensor:
    """dk[d, n] = sum_{b, t} (gate * dz)[b, d, t] x[b, d, t-n], for n < taps: [D, taps] float32.

    x, dz, gate [B, D, T]. The order of the sum depends on nothing but the sizes.
    """
    B, D, T = x.shape
    dk = x.new_zeros((D, taps), dtype=torch.float32)
    N = min(taps, T)
    if x.numel() == 0 or N == 0:
        return dk
    c_max = min(cdiv(T, BLOCK) - 1, (N + BLOCK - 2) // BLOCK)
    shape = _shape(x.dtype)
    with on_device_of(x):
        columns = cdiv(D, shape.channels) * (c_max + 1)
        rows = cdiv(B, max(1, min(B, PROGRAMS // columns)))
        parts = x.new_empty((cdiv(B, rows), 2, D, (c_max + 1) * BLOCK), dtype=torch.float32)
        layouts = [_layout(x), _layout(dz), _layout(gate)]
        unit_d, unit_t = _unit(D), _unit(T)
        exact = x.dtype == dz.dtype != torch.float32 and gate is None
        constants = _gradient_constants(
            shape, tuple([(axis, unit) for axis, unit, _ in layouts]), unit_d, unit_t,
            gate is not None, exact, _taps_gradient.interpreted,
        )  # fmt: skip
        strides = [stride for _, _, strides in layouts for stride in strides]
        _taps_gradient(
            columns * parts.shape[0], (x, dz, gate, parts),
            (*strides, B, D // unit_d, T // unit_t, c_max, rows), constants, 8, 2,
        )  # fmt: skip
        here, before = parts.sum(dim=0)
        here[:, :-BLOCK] += before[:, BLOCK:]
        width = min(N, here.shape[1])
        dk[:, :width] = here[:, :width]
    return dk


class Shape:
    """What a dtype decides: the tile's channels, operands, and copies of taps (16 bytes' worth)."""

    def __init__(self, dtype: torch.dtype) -> None:
        wide = dtype == torch.float32
        self.operand = torch.float32 if wide else torch.float16
        self.channels = 8 if wide else 16
        self.copies = 16 // self.operand.itemsize
        self.target = 1 if wide else 14  # exponent of a row's largest number
        self.taps_constants = _shifted_taps.constants(
            COPIES=self.copies, TARGET=self.target, BLOCK=BLOCK, BLOCK_P=256
        )


@functools.cache
def _shape(dtype: torch.dtype) -> Shape:
    return Shape(dtype)


@functools.lru_cache(maxsize=1024)
def _direct_constants(
    shape: Shape, groups: int, blocks: int, layouts: tuple[tuple[int, int], ...],
    unit_d: int, unit_t: int, has_gate: bool, reverse: bool, long: bool,
) -> tuple[object, ...]:  # fmt: skip
    (axis_x, unit_x), (axis_g, unit_g), (axis_z, unit_z) = layouts
    return _direct.constants(
        C=shape.channels, G=groups, BLOCKS=blocks, BLOCK=BLOCK, COPIES=shape.copies,
        TARGET=shape.target, AXIS_X=axis_x, AXIS_G=axis_g, AXIS_Z=axis_z,
        UNIT_X=unit_x, UNIT_G=unit_g, UNIT_Z=unit_z, UNIT_D=unit_d, UNIT_T=unit_t,
        HAS_GATE=has_gate, IS_REVERSED=reverse, IS_LONG=long,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _gradient_constants(
    shape: Shape, layouts: tuple[tuple[int, int], ...], unit_d: int, unit_t: int, has_gate: bool,
    exact: bool, upcast: bool,
) -> tuple[object, ...]:  # fmt: skip
    (axis_x, unit_x), (axis_dz, unit_dz), (axis_g, unit_g) = layouts
    return _taps_gradient.constants(
        C=shape.channels, BLOCK_M=16, BLOCK=BLOCK, IS_SPLIT=shape.operand == torch.float32,
        IS_EXACT=exact, UPCAST=upcast, TARGET=shape.target,
        AXIS_X=axis_x, AXIS_DZ=axis_dz, AXIS_G=axis_g,
        UNIT_X=unit_x, UNIT_DZ=unit_dz, UNIT_G=unit_g, UNIT_D=unit_d, UNIT_T=unit_t,
        HAS_GATE=has_gate,
    )  # fmt: skip


def _layout(x: Tensor | None) -> tuple[int, int, tuple[int, ...]]:
    """The axis of stride 1, the unit of all other strides, and strides in that unit."""
    return (ANY, 1, (0, 0, 0)) if x is None else _layout_of(tuple(x.shape), x.stride())


@functools.lru_cache(maxsize=4096)
def _layout_of(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[int, int, tuple[int, ...]]:
    strides = tuple([0 if size == 1 else s for size, s in zip(shape, strides, strict=True)])
    axis = CHANNELS if strides[1] == 1 else TOKENS if strides[2] == 1 else ANY
    others = [s for i, s in enumerate(strides) if i != axis or axis == ANY]
    unit = 8 if all(s % 8 == 0 for s in others) else 1
    return axis, unit, tuple([s // unit for s in strides])


def _unit(size: int) -> int:
    return 8 if size % 8 == 0 else 1
