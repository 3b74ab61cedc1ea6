"""Pointwise products of the CHELA layer, a pass over memory each: norm and gate, and output gate.

    norm and gate   m = n * act(a)    n = o * r    r = 1 / sqrt(mean(o^2) + eps)
                    do = r * (dm act(a) - n mean(dm act(a) n))      da = dm n act'(a)
                    without a, m = n; rows of o that come shrunk by s have s^2 eps for eps
    output gate     y = sigmoid(g) SiLU(h) + (1 - sigmoid(g)) x     without g, y = SiLU(h) + x;
                                                                    without x too, y = SiLU(h);
                    with u and the parts of r's sum of squares, h + r u for h

All are [..., N]. A program of norm and gate owns whole rows, N <= 4096, and makes n again in the
backward: grid (ceil(R / rows)). The output gate's owns a tile: grid (ceil(R / rows) * ceil(N /
columns)). Backward, programs walk over some rows each, and sum da, dh and dg over them on the way:
the gradients of the biases that a, h and g came with (row_sums.py). Bytes an element in 16 bits,
forward and backward: norm and gate 6 and 10, without a 4 and 6; output gate 8 and 14, without g 6
and 6; SiLU 4 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, cdiv, on_device_of
from chela_bench.kernels.row_sums import WALKED, new_parts, sum_parts, walks_of
from chela_bench.kernels.rows import _activated, _load, _mask, _sigmoids, _store, rows_of, tile

MAX_V = 4096  # a row of norm and gate lies in the registers of one program
TILE = 2048  # elements of 4 warps: two vectors of 16 bytes a thread, in 16 bits
RUNTIME = [
    "R", "T", "walks", "root_eps", "eps", "per_mean",
    *(f"stride_{x}" for x in ("o", "a", "dm", "h", "g", "x", "u", "dy")),
]  # fmt: skip


@triton.jit
def _shrunk(root_eps, shrink_ptr, r, R, T):
    """sqrt(eps) as rows have it, whose r % T-th shrinks; without shrink_ptr a number."""
    if shrink_ptr is not None:
        root_eps *= tl.load(shrink_ptr + r % T, mask=r < R, other=1.0)[:, None]
    return root_eps


@triton.jit
def _normed(o, root_eps, N: tl.constexpr):
    """n and r [rows, 1]. Rows shrink by the power of two at the largest of |o| and sqrt(eps) before
    they are squared, so that no square overflows, nor all vanish."""
    largest = tl.maximum(tl.max(tl.abs(o), axis=1, keep_dims=True), root_eps)
    exponent = largest.to(tl.int32, bitcast=True) >> 23  # of NaN and infinity, 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    shrink = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    o, root_eps = o * shrink, root_eps * shrink
    inverse = tl.rsqrt(tl.sum(o * o, axis=1, keep_dims=True) / N + root_eps * root_eps)
    return o * inverse, inverse * shrink


@triton.jit(do_not_specialize=RUNTIME)
def _norm_gate_fwd_kernel(
    o_ptr, a_ptr, shrink_ptr, m_ptr,  # [R, V], shrink [T]; a and shrink may be missing
    stride_o: tl.int64, stride_a: tl.int64,  # in units of UNIT
    R: tl.int64, T: tl.int64, root_eps,
    V: tl.constexpr, ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    v = tl.arange(0, BLOCK_N)
    mask = _mask(r, v, R, V)
    root_eps = _shrunk(root_eps, shrink_ptr, r, R, T)
    m, _ = _normed(_load(o_ptr, r, v, stride_o * UNIT, mask), root_eps, V)
    if a_ptr is not None:
        gate, _ = _activated(_load(a_ptr, r, v, stride_a * UNIT, mask), ACTIVATION)
        m *= gate
    _store(m_ptr, r, v, V, mask, m)


@triton.jit(do_not_specialize=RUNTIME)
def _norm_gate_bwd_kernel(
    o_ptr, a_ptr, dm_ptr, shrink_ptr,  # [R, V], shrink [T]; a and shrink may be missing
    do_ptr, da_ptr,  # [R, V], may be missing
    parts_ptr,  # [walks, V], sums of da; may be missing
    stride_o: tl.int64, stride_a: tl.int64, stride_dm: tl.int64,  # in units of UNIT
    R: tl.int64, T: tl.int64, walks: tl.int64, root_eps,
    V: tl.constexpr, ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    walk = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_N)
    db = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for first in range(walk * BLOCK_R, R, walks * BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        mask = _mask(r, v, R, V)
        eps = _shrunk(root_eps, shrink_ptr, r, R, T)
        normed, inverse = _normed(_load(o_ptr, r, v, stride_o * UNIT, mask), eps, V)
        dn = _load(dm_ptr, r, v, stride_dm * UNIT, mask)
        if a_ptr is not None:
            gate, slope = _activated(_load(a_ptr, r, v, stride_a * UNIT, mask), ACTIVATION)
            da = dn * normed * slope
            if da_ptr is not None:
                _store(da_ptr, r, v, V, mask, da)
            db += tl.where(mask, da, 0.0)  # of rows beyond R NaN, where eps = 0
            dn *= gate
        if do_ptr is not None:
            along = tl.sum(dn * normed, axis=1, keep_dims=True) / V
            _store(do_ptr, r, v, V, mask, inverse * (dn - normed * along))
    if parts_ptr is not None:
        tl.store(parts_ptr + walk * V + v, tl.sum(db, axis=0), mask=v < V)


@triton.jit(do_not_specialize=RUNTIME)
def _output_gate_fwd_kernel(
    h_ptr, g_ptr, x_ptr, u_ptr, squares_ptr, y_ptr,  # [R, N], squares [R, P]; g, g and x, or u
    # and squares may be missing
    stride_h: tl.int64, stride_g: tl.int64, stride_x: tl.int64, stride_u: tl.int64,  # units of UNIT
    R: tl.int64, eps, per_mean,
    N: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    NB: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0).to(tl.int64)
    r = pid // NB * BLOCK_R + tl.arange(0, BLOCK_R)
    n = (pid % NB).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = _mask(r, n, R, N)
    h = _load(h_ptr, r, n, stride_h * UNIT, mask)
    if u_ptr is not None:
        p = tl.arange(0, BLOCK_P)
        squares = _load(squares_ptr, r, p, P, _mask(r, p, R, P))
        inverse = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) * per_mean + eps)
        h += inverse * _load(u_ptr, r, n, stride_u * UNIT, mask)
    y, _ = _activated(h, "silu")
    if x_ptr is not None:
        x = _load(x_ptr, r, n, stride_x * UNIT, mask)
        if g_ptr is not None:
            gate, rest = _sigmoids(_load(g_ptr, r, n, stride_g * UNIT, mask))
            y, x = gate * y, rest * x
        y += x
    _store(y_ptr, r, n, N, mask, y)


@triton.jit(do_not_specialize=RUNTIME)
def _output_gate_bwd_kernel(
    h_ptr, g_ptr, x_ptr, dy_ptr, dh_ptr, dg_ptr, dx_ptr,  # [R, N]; without g neither x, dg nor dx
    value_ptr,  # [R, N], SiLU(h); may be missing
    parts_ptr,  # [walks, S, N], sums of dh, of dg, or of both; may be missing. Rows of dh and dg
    # are WIDTH apart
    stride_h: tl.int64, stride_g: tl.int64, stride_x: tl.int64,  # in units of UNIT
    stride_dy: tl.int64, R: tl.int64, walks: tl.int64,
    N: tl.constexpr, WIDTH: tl.constexpr, SUM_H: tl.constexpr, SUM_G: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    NB: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0).to(tl.int64)
    walk = pid // NB
    n = (pid % NB).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    db_h = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    db_g = db_h
    for first in range(walk * BLOCK_R, R, walks * BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        mask = _mask(r, n, R, N)
        dh = _load(dy_ptr, r, n, stride_dy * UNIT, mask)
        value, slope = _activated(_load(h_ptr, r, n, stride_h * UNIT, mask), "silu")
        if value_ptr is not None:
            _store(value_ptr, r, n, N, mask, value)
        if g_ptr is not None:
            gate, rest = _sigmoids(_load(g_ptr, r, n, stride_g * UNIT, mask))
            if dx_ptr is not None:
                _store(dx_ptr, r, n, N, mask, dh * rest)
            dh *= gate
            if dg_ptr is not None or SUM_G:
                dg = dh * rest * (value - _load(x_ptr, r, n, stride_x * UNIT, mask))
                if dg_ptr is not None:
                    _store(dg_ptr, r, n, WIDTH, mask, dg)
                db_g += dg
        dh *= slope
        if dh_ptr is not None:
            _store(dh_ptr, r, n, WIDTH, mask, dh)
        db_h += dh
    if parts_ptr is not None:
        parts_ptr += walk * (SUM_H + SUM_G) * N + n
        if SUM_H:
            tl.store(parts_ptr, tl.sum(db_h, axis=0), mask=n < N)
        if SUM_G:
            tl.store(parts_ptr + SUM_H * N, tl.sum(db_g, axis=0), mask=n < N)


_norm_gate_fwd, _norm_gate_bwd = Launcher(_norm_gate_fwd_kernel), Launcher(_norm_gate_bwd_kernel)
_output_gate_fwd = Launcher(_output_gate_fwd_kernel)
_output_gate_bwd = Launcher(_output_gate_bwd_kernel)


def norm_gate_forward(
    o: Tensor,
    a: Tensor | None,
    shrink: Tensor | None,
    m: Tensor,
    *,
    eps: float,
    activation: str | None,
) -> None:
    """Writes m. All [..., T, V], shrink [T] float32; m and shrink contiguous."""
    if o.numel() > 0:
        _norm_gate(_norm_gate_fwd, o, (a,), shrink, (m,), eps, activation)


def norm_gate_backward(
    o: Tensor,
    a: Tensor | None,
    dm: Tensor,
    shrink: Tensor | None,
    do: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    *,
    eps: float,
    activation: str | None,
) -> None:
    """Writes do, da and the sum of da over rows, if given. All [..., T, V], db [V], shrink [T]
    float32; all but o, a and dm contiguous."""
    sums = () if db is None else (db,)
    if o.numel() > 0:
        _norm_gate(_norm_gate_bwd, o, (a, dm), shrink, (do, da), eps, activation, sums)
    elif db is not None:
        db.zero_()


def _norm_gate(
    launcher: Launcher,
    o: Tensor,
    others: tuple[Tensor | None, ...],
    shrink: Tensor | None,
    outputs: tuple[Tensor | None, ...],
    eps: float,
    activation: str | None,
    sums: Sequence[Tensor] | None = None,
) -> None:
    """`sums`, if any: of a backward, whose programs walk."""
    tensors, strides, unit, R, V = rows_of(o, *others)
    blocks = tile(V, TILE, columns=MAX_V)
    constants = launcher.constants(V=V, ACTIVATION=activation, UNIT=unit, **blocks)
    columns, period = blocks["BLOCK_N"], 1 if shrink is None else len(shrink)
    pointers = (*tensors, shrink, *outputs)
    with on_device_of(o):
        if sums is None:
            scalars = (*strides, R, period, math.sqrt(eps))
            programs = cdiv(R, blocks["BLOCK_R"])
            launcher(programs, pointers, scalars, constants, warps(columns), 1)
            return
        walks = walks_of(R, blocks["BLOCK_R"], 1, o.device)
        parts = new_parts(o, walks, sums)
        scalars = (*strides, R, period, walks, math.sqrt(eps))
        launcher(walks, (*pointers, parts), scalars, constants, warps(columns), 1)
        sum_parts(parts, sums)


def warps(columns: int) -> int:
    """Of a program of norm and gate."""
    return 4 if columns <= TILE else 8


def output_gate_forward(
    h: Tensor,
    g: Tensor | None,
    x: Tensor | None,
    y: Tensor,
    *,
    u: Tensor | None = None,
    squares: Tensor | None = None,
    width: int = 1,
    eps: float = 0.0,
) -> None:
    """Writes y. All [..., N]; y contiguous. With u and squares [..., P], contiguous, h is h + r u,
    where r normalises rows of `width` numbers whose squares sum up to the sum of squares."""
    if h.numel() == 0:
        return
    tensors, strides, unit, R, N = rows_of(h, g, x, u)
    P = 1 if squares is None else squares.shape[-1]
    blocks = tile(N, TILE)
    constants = _output_gate_fwd.constants(
        N=N, P=P, UNIT=unit, **blocks, BLOCK_P=triton.next_power_of_2(P)
    )
    programs = cdiv(R, blocks["BLOCK_R"]) * cdiv(N, blocks["BLOCK_N"])
    scalars = (*strides, R, float(eps), 1.0 / width)
    with on_device_of(h):
        _output_gate_fwd(programs, (*tensors, squares, y), scalars, constants, 4, 1)


def output_gate_backward(
    h: Tensor,
    g: Tensor | None,
    x: Tensor | None,
    dy: Tensor,
    dh: Tensor | None,
    dg: Tensor | None,
    dx: Tensor | None,
    db_h: Tensor | None,
    db_g: Tensor | None,
    value: Tensor | None = None,
) -> None:
    """Writes dh, dg, dx, the sums of dh and dg over rows, and SiLU(h) as `value`, if given. All
    [..., N], sums [N]; what is written contiguous, but for dh and dg as halves of [..., 2 N]. dh
    may be dy. Without g, x is not read and dx is dy: neither is given."""
    sums = [x for x in (db_h, db_g) if x is not None]
    if h.numel() == 0:
        for db in sums:
            db.zero_()
        return
    tensors, strides, unit, R, N = rows_of(h, g, x, dy)
    blocks = tile(N, WALKED)
    halves = dh is not None and not dh.is_contiguous()
    constants = _output_gate_bwd.constants(
        N=N, WIDTH=2 * N if halves else N,
        SUM_H=db_h is not None, SUM_G=db_g is not None, UNIT=unit, **blocks,
    )  # fmt: skip
    wide = cdiv(N, blocks["BLOCK_N"])
    walks = walks_of(R, blocks["BLOCK_R"], wide, h.device)
    parts = new_parts(h, walks, sums)
    with on_device_of(h):
        pointers = (*tensors, dh, dg, dx, value, parts)
        _output_gate_bwd(walks * wide, pointers, (*strides, R, walks), constants, 4, 1)
        sum_parts(parts, sums)
