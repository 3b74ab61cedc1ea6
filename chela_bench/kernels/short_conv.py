"""Short depthwise convolution, on the way from one layout to another.

    h_t = sum_{n<W} k_n x_{t-n+ahead}          y = act(h), SiLU or identity, for each b and d
    dh = dy * act'(h)    dx_t = sum_n k_n dh_{t+n-ahead}    dk_n = sum_{b,t} dh_t x_{t-n+ahead}

All tensors but k [D, W] are views [B, D, T] with any strides: token-major x [B, T, D] comes as
x.mT. Tiles are loaded along the contiguous axis of what they are read from, and stored along that
of what they are written to. Sums are in float32; a result rounds once.

Forward, grid (B * ceil(D / 64) * ceil(T / 32)): a thread owns 8 tokens in a row of each of its
channels and holds the window of x that they need, so a token is loaded 1 + (W - 1) / 8 times, not
W times, and from HBM once. The window lies in registers as columns: one tensor [channels, groups of
8 tokens] for each place in the group. Where D is contiguous a column is a load; where T is, whole
aligned vectors are loaded and taken apart. Taps move by PAD so that vectors begin at multiples of 8
whatever `ahead` is. Bytes an element in 16 bits: 2 (x) + 2 (y) = 4.

Backward, W <= 16, grid (B * segments * ceil(D / 64)): a thread walks along one channel's segment, 8
tokens a step, and keeps the last x, the last dh and its sums of dk, so h is made once and dh never
leaves the registers. dx follows dh by a few steps, and a segment reads that much of the next one.
Bytes: 2 (x) + 2 (dy) + 2 (dx) = 6, and 8 * W / segment for the sums, [parts, W, D], added up by
torch. With neither activation nor dk, dx is the forward kernel on dy, its taps turned around: 4.

Backward, W > 16: dh is written once, in float32 (2 + 2 + 4), dx is the forward kernel on it
(4 + 2), and dk walks 16 taps at a time (4 + 2 each). Without activation dh is dy, and all is less.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, cdiv, on_device_of
from chela_bench.kernels.views import BLOCK_D, STEP, _axis, _layouts, _mask, _pointers, _view

GROUPS = 4  # of STEP tokens in a tile of the forward kernel
FORWARD_WARPS = 4  # two neighbouring channels a thread
WALKED = 16  # taps; a walk keeps its sums and its window in registers
PROGRAMS = 2112  # of two warps, to fill 132 processors
SEGMENTS = (512, 256, 128, 64)  # tokens that a walk may own, multiples of STEP
RUNTIME = [  # never specialised: a new B, T or layout of rows compiles nothing
    "T", "segment", "segments", "lag",
    *(f"stride_{x}{axis}" for x in ("x", "y", "past", "dy", "dx") for axis in "bdt"),
]  # fmt: skip


@triton.jit
def _none():
    return ()


@triton.jit
def _load(view, past, t, i, T, PAST: tl.constexpr, INSIDE: tl.constexpr):
    """view[t + i] in float32, zero outside 0..T-1, but for the PAST tokens before 0. INSIDE: all
    are known to be in 0..T-1."""
    mask = view.mask if INSIDE else _mask(view, t + i, 0, T)
    x = tl.load(_pointers(view, t, i), mask=mask, other=0.0).to(tl.float32)
    if PAST > 0 and not INSIDE:
        mask = _mask(past, t + i, -PAST, 0)
        x += tl.load(_pointers(past, t + PAST, i), mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _columns(
    view, past, t, T,
    PAST: tl.constexpr, GROUPS: tl.constexpr, AXIS: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """view[t + 8 g + i] for each i < 8 [channels, g < GROUPS]; t is a multiple of 8."""
    if AXIS == 2:
        x = _load(view, past, t, tl.arange(0, GROUPS * STEP), T, PAST, INSIDE)
        x_0246, x_1357 = tl.split(x.reshape(x.shape[0], GROUPS, 4, 2))
        x_04, x_26 = tl.split(x_0246.reshape(x.shape[0], GROUPS, 2, 2))
        x_15, x_37 = tl.split(x_1357.reshape(x.shape[0], GROUPS, 2, 2))
        x_0, x_4 = tl.split(x_04)
        x_1, x_5 = tl.split(x_15)
        x_2, x_6 = tl.split(x_26)
        x_3, x_7 = tl.split(x_37)
        columns = (x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7)
    else:
        groups, columns = tl.arange(0, GROUPS) * STEP, _none()
        for i in tl.static_range(STEP):
            columns += (_load(view, past, t + i, groups, T, PAST, INSIDE),)
    return columns


@triton.jit
def _tile(columns):
    """The inverse of taking apart: [channels, 8 * groups]."""
    x_04, x_26 = tl.join(columns[0], columns[4]), tl.join(columns[2], columns[6])
    x_15, x_37 = tl.join(columns[1], columns[5]), tl.join(columns[3], columns[7])
    x = tl.join(tl.join(x_04, x_26), tl.join(x_15, x_37))
    return x.reshape(x.shape[0], x.shape[1] * STEP)


@triton.jit
def _store_columns(
    columns, view, t, first, T, GROUPS: tl.constexpr, AS_TILE: tl.constexpr
):  # fmt: skip
    """Writes what _columns reads, from token `first` on."""
    rounded = _none()
    for i in tl.static_range(STEP):
        rounded += (columns[i].to(view.rows.dtype.element_ty),)
    groups = tl.arange(0, GROUPS) * STEP
    if AS_TILE:
        i = tl.arange(0, GROUPS * STEP)
        tl.store(_pointers(view, t, i), _tile(rounded), mask=_mask(view, t + i, first, T))
    elif (t >= first) & (t + GROUPS * STEP <= T):
        for i in tl.static_range(STEP):
            tl.store(_pointers(view, t + i, groups), rounded[i], mask=view.mask)
    else:
        for i in tl.static_range(STEP):
            mask = _mask(view, t + i + groups, first, T)
            tl.store(_pointers(view, t + i, groups), rounded[i], mask=mask)


@triton.jit
def _sigmoid(h):
    return 1.0 / (1.0 + tl.exp(-h))


@triton.jit
def _silu_slope(h):
    s = _sigmoid(h)
    return s * (1.0 + h * (1.0 - s))


@triton.jit
def _add_taps(
    sums, window, taps_ptr, mask, D: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """sums_i + sum_n taps_n * window_{8+i-n}, over FIRST <= n < LAST <= 8."""
    for n in tl.static_range(FIRST, LAST):
        tap = tl.load(taps_ptr + n * D, mask=mask, other=0.0)
        added = _none()
        for i in tl.static_range(STEP):
            added += (sums[i] + tap * window[STEP + i - n],)
        sums = added
    return sums


@triton.jit
def _convolved(
    x, past, taps_ptr, t, T,
    D: tl.constexpr, W: tl.constexpr, AHEAD: tl.constexpr, PAST: tl.constexpr,
    GROUPS: tl.constexpr, AXIS: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Columns of h from token t on. Tap n meets x_{t + LEAD - (n + PAD)}; taps_ptr [channels, 1]
    points to tap 0."""
    LEAD: tl.constexpr = (AHEAD + STEP - 1) // STEP * STEP
    PAD: tl.constexpr = LEAD - AHEAD
    BLOCKS: tl.constexpr = (W + PAD + STEP - 1) // STEP  # of STEP taps
    t += LEAD
    sums = _none()
    for _ in tl.static_range(STEP):
        sums += (tl.zeros([x.rows.shape[0], GROUPS], dtype=tl.float32),)
    after = _columns(x, past, t, T, PAST, GROUPS, AXIS, INSIDE)
    before = _columns(x, past, t - STEP, T, PAST, GROUPS, AXIS, INSIDE)
    FIRST: tl.constexpr = W + PAD if W + PAD < STEP else STEP
    sums = _add_taps(sums, before + after, taps_ptr - PAD * D, x.mask, D, PAD, FIRST)
    for block in range(1, BLOCKS - 1):
        after = before
        before = _columns(x, past, t - (block + 1) * STEP, T, PAST, GROUPS, AXIS, INSIDE)
        block_ptr = taps_ptr + (block * STEP - PAD) * D
        sums = _add_taps(sums, before + after, block_ptr, x.mask, D, 0, STEP)
    if BLOCKS > 1:
        after = before
        before = _columns(x, past, t - BLOCKS * STEP, T, PAST, GROUPS, AXIS, INSIDE)
        block_ptr = taps_ptr + ((BLOCKS - 1) * STEP - PAD) * D
        LAST: tl.constexpr = W + PAD - (BLOCKS - 1) * STEP
        sums = _add_taps(sums, before + after, block_ptr, x.mask, D, 0, LAST)
    return sums


@triton.jit(do_not_specialize=RUNTIME)
def _short_conv_fwd_kernel(
    x_ptr, taps_ptr, y_ptr, past_ptr, dy_ptr,  # taps [W, D]
    stride_xb: tl.int64, stride_xd: tl.int64, stride_xt: tl.int64,  # in units of X_UNIT
    stride_yb: tl.int64, stride_yd: tl.int64, stride_yt: tl.int64,
    stride_pastb: tl.int64, stride_pastd: tl.int64, stride_pastt: tl.int64,
    stride_dyb: tl.int64, stride_dyd: tl.int64, stride_dyt: tl.int64,
    T: tl.int64,  # in units of T_UNIT tokens
    D: tl.constexpr, W: tl.constexpr, AHEAD: tl.constexpr,
    X_AXIS: tl.constexpr, X_UNIT: tl.constexpr, Y_AXIS: tl.constexpr, Y_UNIT: tl.constexpr,
    DY_AXIS: tl.constexpr, DY_UNIT: tl.constexpr, T_UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr, GROUPS: tl.constexpr,  # tile
    USE_PAST: tl.constexpr, ACTIVATION: tl.constexpr,  # "none", "silu", or "slope": dy * silu'(h)
):  # fmt: skip
    PAST: tl.constexpr = W - 1 if USE_PAST else 0
    ND: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    T = T * T_UNIT
    NT = (T + GROUPS * STEP - 1) // (GROUPS * STEP)
    pid = tl.program_id(0).to(tl.int64)
    if X_AXIS == 2:  # programs beside each other read what lies beside each other
        pid_t, pid_d, b = pid % NT, pid // NT % ND, pid // NT // ND
    else:
        pid_d, pid_t, b = pid % ND, pid // ND % NT, pid // ND // NT
    d = pid_d.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = _view(x_ptr, b, d, stride_xb, stride_xd, stride_xt, D, X_AXIS, X_UNIT)
    y = _view(y_ptr, b, d, stride_yb, stride_yd, stride_yt, D, Y_AXIS, Y_UNIT)
    past = x
    if USE_PAST:
        past = _view(past_ptr, b, d, stride_pastb, stride_pastd, stride_pastt, D, 0, 1)
    t = pid_t * (GROUPS * STEP)
    taps_ptr += d[:, None]
    if (t - W - STEP >= 0) & (t + AHEAD + (GROUPS + 1) * STEP <= T):  # most programs: no masks
        sums = _convolved(x, past, taps_ptr, t, T, D, W, AHEAD, PAST, GROUPS, X_AXIS, True)
    else:
        sums = _convolved(x, past, taps_ptr, t, T, D, W, AHEAD, PAST, GROUPS, X_AXIS, False)
    if ACTIVATION == "slope":
        i = tl.arange(0, GROUPS * STEP)
        dy = _view(dy_ptr, b, d, stride_dyb, stride_dyd, stride_dyt, D, DY_AXIS, DY_UNIT)
        dh = _load(dy, dy, t, i, T, 0, False) * _silu_slope(_tile(sums))
        dh = dh.to(y_ptr.dtype.element_ty)
        tl.store(_pointers(y, t, i), dh, mask=_mask(y, t + i, 0, T))
    else:
        values = _none()
        for i in tl.static_range(STEP):
            values += (sums[i] * _sigmoid(sums[i]) if ACTIVATION == "silu" else sums[i],)
        _store_columns(values, y, t, 0, T, GROUPS, X_AXIS == 2 or Y_AXIS == 2)


@triton.jit(do_not_specialize=RUNTIME)
def _short_conv_bwd_kernel(
    x_ptr, taps_ptr, dy_ptr, dx_ptr, parts_ptr,  # taps [W, D], parts [B * segments, W, D]
    stride_xb: tl.int64, stride_xd: tl.int64, stride_xt: tl.int64,  # in units of X_UNIT
    stride_dyb: tl.int64, stride_dyd: tl.int64, stride_dyt: tl.int64,
    stride_dxb: tl.int64, stride_dxd: tl.int64, stride_dxt: tl.int64,
    T: tl.int64, segment: tl.int64, segments: tl.int64, lag: tl.int64,  # T, S, lag: T_UNIT, STEP
    D: tl.constexpr, W: tl.constexpr, AHEAD: tl.constexpr,
    X_AXIS: tl.constexpr, X_UNIT: tl.constexpr, DY_AXIS: tl.constexpr, DY_UNIT: tl.constexpr,
    DX_AXIS: tl.constexpr, DX_UNIT: tl.constexpr, T_UNIT: tl.constexpr, BLOCK_D: tl.constexpr,
    ACTIVATION: tl.constexpr, STORE_DX: tl.constexpr, STORE_SUMS: tl.constexpr,
):  # fmt: skip
    LEAD: tl.constexpr = (AHEAD + STEP - 1) // STEP * STEP
    PAD: tl.constexpr = LEAD - AHEAD
    KEPT: tl.constexpr = W + PAD - 1  # tokens of x before this step's
    LATE: tl.constexpr = (KEPT + STEP - 1) // STEP if STORE_DX else 0  # steps from dh to dx
    ND: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    T = T * T_UNIT
    pid = tl.program_id(0).to(tl.int64)
    if X_AXIS == 2:
        s, pid_d, b = pid % segments, pid // segments % ND, pid // segments // ND
    else:
        pid_d, s, b = pid % ND, pid // ND % segments, pid // ND // segments
    d = pid_d.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = _view(x_ptr, b, d, stride_xb, stride_xd, stride_xt, D, X_AXIS, X_UNIT)
    dy = _view(dy_ptr, b, d, stride_dyb, stride_dyd, stride_dyt, D, DY_AXIS, DY_UNIT)
    start = s * segment * STEP
    if STORE_DX:
        dx = _view(dx_ptr, b, d, stride_dxb, stride_dxd, stride_dxt, D, DX_AXIS, DX_UNIT)
        start -= LEAD  # dh_t goes to dx_{t + LEAD} and before
    shift = LEAD - lag * STEP  # tap n meets x_{t + shift - (n + PAD)}
    owned = tl.minimum(segment, (T - start + STEP - 1) // STEP).to(tl.int32)

    taps, sums, window, dhs = _none(), _none(), _none(), _none()
    for n in tl.static_range(W):
        if ACTIVATION or STORE_DX:
            taps += (tl.load(taps_ptr + n * D + d[:, None], mask=x.mask, other=0.0),)
        if STORE_SUMS:
            sums += (tl.zeros([BLOCK_D, 1], dtype=tl.float32),)
    for i in tl.static_range(KEPT):
        window += (_load(x, x, start + shift + (i - KEPT), tl.arange(0, 1), T, 0, False),)
    for _ in tl.static_range(LATE * STEP):
        dhs += (tl.zeros([BLOCK_D, 1], dtype=tl.float32),)

    for step in range(0, owned + LATE):
        t = start + step * STEP
        if (t >= 0) & (t + shift >= 0) & (t + shift + STEP <= T) & (t + STEP <= T):
            xs = _columns(x, x, t + shift, T, 0, 1, X_AXIS, True)
            dh = _columns(dy, dy, t, T, 0, 1, DY_AXIS, True)
        else:
            xs = _columns(x, x, t + shift, T, 0, 1, X_AXIS, False)
            dh = _columns(dy, dy, t, T, 0, 1, DY_AXIS, False)
        xs = window + xs
        if ACTIVATION:  # dy is zero outside 0..T-1; where dh is NaN there, it meets only NaN
            sloped = _none()
            for i in tl.static_range(STEP):
                h = tl.zeros([BLOCK_D, 1], dtype=tl.float32)
                for n in tl.static_range(W):
                    h += taps[n] * xs[KEPT + i - n - PAD]
                sloped += (dh[i] * _silu_slope(h),)
            dh = sloped
        if STORE_SUMS:  # noqa: SIM102  step is no constexpr
            if step < owned:
                added = _none()
                for n in tl.static_range(W):
                    dk = sums[n]
                    for i in tl.static_range(STEP):
                        dk += dh[i] * xs[KEPT + i - n - PAD]
                    added += (dk,)
                sums = added
        if STORE_DX:
            dh = dhs + dh
            values = _none()
            for i in tl.static_range(STEP):
                total = tl.zeros([BLOCK_D, 1], dtype=tl.float32)
                for n in tl.static_range(W):
                    total += taps[n] * dh[i + n + PAD]
                values += (total,)
            t += LEAD - LATE * STEP
            _store_columns(values, dx, t, start + LEAD, T, 1, DX_AXIS == 2)
            dhs = dh[STEP:]
        window = xs[STEP:]

    if STORE_SUMS:
        parts_ptr += (b * segments + s) * W * D
        for n in tl.static_range(W):
            tl.store(parts_ptr + n * D + d[:, None], sums[n], mask=x.mask)


_forward = Launcher(_short_conv_fwd_kernel)
_backward = Launcher(_short_conv_bwd_kernel)


def short_forward(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    activation: bool,
    ahead: int = 0,
    past: Tensor | None = None,
) -> None:
    """y = act(h). x, y [B, D, T], any strides and float dtypes; weight [D, W] float32.

    `past` [B, D, W - 1] holds what came before x, oldest first, where ahead = 0; else zeros did.
    No copy of `weight` is made if weight.mT is contiguous.
    """
    _convolve(x, weight, y, "silu" if activation else "none", ahead, past=past)


def short_backward(
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    dx: Tensor | None,
    *,
    activation: bool,
    ahead: int = 0,
    need_dweight: bool = True,
) -> Tensor | None:
    """Writes dx, if given, and returns the gradient of weight, if needed: [D, W] float32, of which
    .mT is contiguous. x, dy, dx [B, D, T], any strides and float dtypes; weight [D, W] float32."""
    W = weight.shape[1]
    if x.numel() == 0:
        return weight.new_zeros(weight.shape) if need_dweight else None
    if dx is None and not need_dweight:
        return None
    if W <= WALKED and (activation or need_dweight):
        return _walk(x, _taps(weight), dy, dx, W, activation, ahead, need_dweight)
    if activation:
        dh = torch.empty_like(x.mT if _axis(x) == 1 else x, dtype=torch.float32,
                              memory_format=torch.contiguous_format)  # fmt: skip
        dh = dh.mT if _axis(x) == 1 else dh
        _convolve(x, weight, dh, "slope", ahead, dy=dy)
    else:
        dh = dy
    if dx is not None:
        _convolve(dh, weight.mT.flip(0).mT, dx, "none", W - 1 - ahead)
    if not need_dweight:
        return None
    sums = [
        _walk(x, None, dh, None, min(WALKED, W - first), False, ahead, True, first=first)
        for first in range(0, W, WALKED)
    ]
    return torch.cat([part.mT for part in sums if part is not None]).mT


def _convolve(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    activation: str,
    ahead: int,
    *,
    past: Tensor | None = None,
    dy: Tensor | None = None,
) -> None:
    B, D, T = x.shape
    W = weight.shape[1]
    if x.numel() == 0:
        return
    past = past if W > 1 else None
    unit, axes, strides = _layouts(T, x, y, dy)
    past_strides = (0, 0, 0) if past is None else past.stride()
    constants = _forward.constants(
        D=D, W=W, AHEAD=ahead, X_AXIS=axes[0], X_UNIT=axes[1], Y_AXIS=axes[2], Y_UNIT=axes[3],
        DY_AXIS=axes[4], DY_UNIT=axes[5], T_UNIT=unit, BLOCK_D=BLOCK_D, GROUPS=GROUPS,
        USE_PAST=past is not None, ACTIVATION=activation,
    )  # fmt: skip
    programs = B * cdiv(D, BLOCK_D) * cdiv(T, GROUPS * STEP.value)
    with on_device_of(x):
        _forward(
            programs,
            (x, _taps(weight), y, past, dy),
            (*strides[:6], *past_strides, *strides[6:], T // unit),
            constants, FORWARD_WARPS, 1,
        )  # fmt: skip


def _walk(
    x: Tensor,
    taps: Tensor | None,
    dy: Tensor,
    dx: Tensor | None,
    W: int,
    activation: bool,
    ahead: int,
    need_dweight: bool,
    first: int = 0,
) -> Tensor | None:
    """dx, if given, and the gradient of W taps from `first` on, a multiple of STEP: without
    activation and dx these need not be the first, nor known."""
    B, D, T = x.shape
    step, blocks = STEP.value, cdiv(D, BLOCK_D)
    tokens = T if dx is None else T + cdiv(ahead, step) * step
    enough = (S for S in SEGMENTS if B * blocks * cdiv(tokens, S) >= PROGRAMS)
    segment = next(enough, SEGMENTS[-1])
    segments = cdiv(tokens, segment)
    parts = x.new_empty(B * segments, W, D, dtype=torch.float32) if need_dweight else None
    unit, axes, strides = _layouts(T, x, dy, dx)
    constants = _backward.constants(
        D=D, W=W, AHEAD=ahead, X_AXIS=axes[0], X_UNIT=axes[1], DY_AXIS=axes[2], DY_UNIT=axes[3],
        DX_AXIS=axes[4], DX_UNIT=axes[5], T_UNIT=unit, BLOCK_D=BLOCK_D,
        ACTIVATION=activation, STORE_DX=dx is not None, STORE_SUMS=need_dweight,
    )  # fmt: skip
    with on_device_of(x):
        _backward(
            B * segments * blocks,
            (x, taps, dy, dx, parts),
            (*strides, T // unit, segment // step, segments, first // step),
            constants, 2, 1,
        )  # fmt: skip
    return None if parts is None else parts.sum(dim=0).mT


def _taps(weight: Tensor) -> Tensor:
    """[W, D]: one tap of neighbouring channels is one load."""
    return weight.mT.contiguous()
