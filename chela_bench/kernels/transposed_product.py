"""Products on the way from one layout to another: of a convolution's output and its gate.

    p = a * b     q = a * c          b, c and q may be missing

All are views [B, D, T] of any strides: token-major x [B, T, D] comes as x.mT. Tiles are loaded
along the contiguous axis of what they are read from, and stored along that of what they are written
to. Products are in float32 and round once. Grid (B * ceil(D / 64) * ceil(T / 64)). Bytes an
element: 2 for each 16-bit tensor read or written, 4 for float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, cdiv, on_device_of
from chela_bench.kernels.views import BLOCK_D, _layouts, _mask, _pointers, _view

RUNTIME = ["T", *(f"stride_{x}{axis}" for x in "abcpq" for axis in "bdt")]


@triton.jit(do_not_specialize=RUNTIME)
def _products_kernel(
    a_ptr, b_ptr, c_ptr, p_ptr, q_ptr,  # p = a * b, q = a * c; b, c and q may be missing
    stride_ab: tl.int64, stride_ad: tl.int64, stride_at: tl.int64,  # in units of A_UNIT
    stride_bb: tl.int64, stride_bd: tl.int64, stride_bt: tl.int64,
    stride_cb: tl.int64, stride_cd: tl.int64, stride_ct: tl.int64,
    stride_pb: tl.int64, stride_pd: tl.int64, stride_pt: tl.int64,
    stride_qb: tl.int64, stride_qd: tl.int64, stride_qt: tl.int64,
    T: tl.int64,  # in units of T_UNIT tokens
    D: tl.constexpr, A_AXIS: tl.constexpr, A_UNIT: tl.constexpr,
    B_AXIS: tl.constexpr, B_UNIT: tl.constexpr, C_AXIS: tl.constexpr, C_UNIT: tl.constexpr,
    P_AXIS: tl.constexpr, P_UNIT: tl.constexpr, Q_AXIS: tl.constexpr, Q_UNIT: tl.constexpr,
    T_UNIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    USE_B: tl.constexpr, USE_C: tl.constexpr,
):  # fmt: skip
    ND: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    T = T * T_UNIT
    NT = (T + BLOCK_T - 1) // BLOCK_T
    pid = tl.program_id(0).to(tl.int64)
    if A_AXIS == 2:
        pid_t, pid_d, b = pid % NT, pid // NT % ND, pid // NT // ND
    else:
        pid_d, pid_t, b = pid % ND, pid // ND % NT, pid // ND // NT
    d = pid_d.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    t, i = pid_t * BLOCK_T, tl.arange(0, BLOCK_T)
    view = _view(a_ptr, b, d, stride_ab, stride_ad, stride_at, D, A_AXIS, A_UNIT)
    mask = _mask(view, t + i, 0, T)
    a = tl.load(_pointers(view, t, i), mask=mask).to(tl.float32)
    p = a
    if USE_B:
        view = _view(b_ptr, b, d, stride_bb, stride_bd, stride_bt, D, B_AXIS, B_UNIT)
        p *= tl.load(_pointers(view, t, i), mask=mask).to(tl.float32)
    view = _view(p_ptr, b, d, stride_pb, stride_pd, stride_pt, D, P_AXIS, P_UNIT)
    tl.store(_pointers(view, t, i), p.to(p_ptr.dtype.element_ty), mask=mask)
    if USE_C:
        view = _view(c_ptr, b, d, stride_cb, stride_cd, stride_ct, D, C_AXIS, C_UNIT)
        a *= tl.load(_pointers(view, t, i), mask=mask).to(tl.float32)
        view = _view(q_ptr, b, d, stride_qb, stride_qd, stride_qt, D, Q_AXIS, Q_UNIT)
        tl.store(_pointers(view, t, i), a.to(q_ptr.dtype.element_ty), mask=mask)


_products = Launcher(_products_kernel)


def transpose_gate(z: Tensor, gate: Tensor | None, y: Tensor) -> None:
    """y = z * gate, or z. All [B, D, T], any strides and float dtypes."""
    _multiply(z, gate, None, y, None)


def transpose_gate_backward(
    z: Tensor | None,
    gate: Tensor | None,
    dy: Tensor,
    dz: Tensor,
    dgate: Tensor | None,
) -> None:
    """dz = dy * gate, or dy; dgate = dy * z, if given. All [B, D, T], any strides and dtypes."""
    _multiply(dy, gate, None if dgate is None else z, dz, dgate)


def _multiply(a: Tensor, b: Tensor | None, c: Tensor | None, p: Tensor, q: Tensor | None) -> None:
    """p = a * b, q = a * c."""
    B, D, T = a.shape
    if a.numel() == 0:
        return
    unit, axes, strides = _layouts(T, a, b, c, p, q)
    constants = _products.constants(
        D=D, A_AXIS=axes[0], A_UNIT=axes[1], B_AXIS=axes[2], B_UNIT=axes[3],
        C_AXIS=axes[4], C_UNIT=axes[5], P_AXIS=axes[6], P_UNIT=axes[7],
        Q_AXIS=axes[8], Q_UNIT=axes[9], T_UNIT=unit, BLOCK_D=BLOCK_D, BLOCK_T=64,
        USE_B=b is not None, USE_C=c is not None,
    )  # fmt: skip
    programs = B * cdiv(D, BLOCK_D) * cdiv(T, 64)
    with on_device_of(a):
        _products(programs, (a, b, c, p, q), (*strides, T // unit), constants, 4, 1)
