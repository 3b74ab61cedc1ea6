"""Layer norm and RMS norm of rows, with a residual's gradient added on the way back.

    y = n * w + b        n = (x - mean(x)) * r        r = 1 / sqrt(mean((x - mean(x))^2) + eps)
    dx = r * (w dy - mean(w dy) - n mean(w dy n)) + dx'        dw = sum_r dy n        db = sum_r dy

RMS norm has no mean and no b: y = x * r * w. dx' is the gradient that reaches x around the norm.
x, y [..., D], D <= 4096: a program has whole rows in registers. Forward, grid (ceil(R / rows));
backward, programs walk over some rows each and sum dw and db (row_sums.py). Saved: x, w, and r and
the mean in float32. Bytes an element in 16 bits: 4 forward, 8 backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from chela_bench.kernels.dispatch import is_plain
from chela_bench.kernels.launching import Launcher, cdiv, on_device_of
from chela_bench.kernels.operator import Operator
from chela_bench.kernels.projections import check_first_derivative
from chela_bench.kernels.row_sums import WALKED, new_parts, sum_parts, walks_of
from chela_bench.kernels.rows import _load, _mask, _store, rows_of, tile

MAX_D = 4096
RUNTIME = ["R", "walks", "eps", "stride_x", "stride_dy", "stride_added"]


@triton.jit
def _parameter(ptr, n, N: tl.constexpr):
    return tl.load(ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=RUNTIME)
def _normalize_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, r_ptr,  # [R, D], [D], [R]; RMS norm without b and mean
    stride_x: tl.int64, R: tl.int64, eps,  # stride in units of UNIT
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.arange(0, BLOCK_N)
    mask = _mask(r, n, R, D)
    x = _load(x_ptr, r, n, stride_x * UNIT, mask)
    if mean_ptr is not None:
        mean = tl.sum(x, axis=1) / D
        x = tl.where(mask, x - mean[:, None], 0.0)
        tl.store(mean_ptr + r, mean, mask=r < R)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(r_ptr + r, inverse, mask=r < R)
    y = x * inverse[:, None] * _parameter(w_ptr, n, D)
    if b_ptr is not None:
        y += _parameter(b_ptr, n, D)
    _store(y_ptr, r, n, D, mask, y)


@triton.jit(do_not_specialize=RUNTIME)
def _normalize_bwd_kernel(
    x_ptr, dy_ptr, added_ptr, w_ptr, mean_ptr, r_ptr,  # [R, D], [D], [R]; some may be missing:
    dx_ptr, parts_ptr,  # [R, D] and [walks, S, D], sums of dy n and, if S = 2, of dy
    stride_x: tl.int64, stride_dy: tl.int64, stride_added: tl.int64,  # in units of UNIT
    R: tl.int64, walks: tl.int64,
    D: tl.constexpr, S: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    walk = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    w = _parameter(w_ptr, n, D)
    dw = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    db = dw
    for first in range(walk * BLOCK_R, R, walks * BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        mask = _mask(r, n, R, D)
        normed = _load(x_ptr, r, n, stride_x * UNIT, mask)
        dy = _load(dy_ptr, r, n, stride_dy * UNIT, mask)
        inverse = tl.load(r_ptr + r, mask=r < R, other=0.0)[:, None]
        if mean_ptr is not None:
            normed -= tl.load(mean_ptr + r, mask=r < R, other=0.0)[:, None]
        normed *= inverse
        dw += dy * normed
        db += dy
        if dx_ptr is not None:
            dy *= w
            dx = dy - normed * (tl.sum(dy * normed, axis=1, keep_dims=True) / D)
            if mean_ptr is not None:
                dx -= tl.sum(dy, axis=1, keep_dims=True) / D
            dx *= inverse
            if added_ptr is not None:
                dx += _load(added_ptr, r, n, stride_added * UNIT, mask)
            _store(dx_ptr, r, n, D, mask, dx)
    if parts_ptr is not None:
        parts_ptr += walk * S * D + n
        tl.store(parts_ptr, tl.sum(dw, axis=0), mask=n < D)
        if S == 2:
            tl.store(parts_ptr + D, tl.sum(db, axis=0), mask=n < D)


_normalize_fwd, _normalize_bwd = Launcher(_normalize_fwd_kernel), Launcher(_normalize_bwd_kernel)


def normalize(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x), in x's dtype, and x for what goes around it.

    x [..., D] in float32, bfloat16 or float16; what is computed is in float32. Whoever needs x
    besides takes the second: what reaches that is added to x's gradient by the norm's own backward,
    which saves a pass. Where PyTorch watches (torch.compile, functorch) it adds that up itself. For
    D > 4096, PyTorch's own norm. Differentiable once.
    """
    weight, bias = norm.weight, norm.bias if isinstance(norm, nn.LayerNorm) else None
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    if x.shape[-1] > MAX_D:
        return _by_pytorch(norm, x, eps), x
    if not is_plain(x, weight):
        y, _, _ = _normalize.registered(x, weight, bias, eps)
        return y, x
    y, around = _Normalized.apply(x, weight, bias, eps)
    return y, around if x.requires_grad else x


def _by_pytorch(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor, eps: float) -> Tensor:
    weight, width = norm.weight.to(x.dtype), x.shape[-1:]
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, width, weight, norm.bias.to(x.dtype), eps)
    return F.rms_norm(x, width, weight, eps)


Outputs = tuple[Tensor, Tensor, Tensor]


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Outputs:
    """y, the mean and r; of RMS norm, whose bias is None, the mean is empty."""
    y, mean, inverse = found = _normed_outputs(x, weight, bias, eps)
    _forward(x, weight, bias, y, None if bias is None else mean, inverse, eps)
    return found


def _normed_outputs(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Outputs:
    rows, dtype = x.shape[:-1], torch.float32
    mean = x.new_empty((0,) if bias is None else rows, dtype=dtype)
    return x.new_empty(x.shape), mean, x.new_empty(rows, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, weight, bias, _ = inputs
    _, mean, inverse = output
    ctx.save_for_backward(x, weight, mean, inverse)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(mean, inverse)


def _differentiate(
    ctx: Any, dy: Tensor, dmean: None, dinverse: None, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    return *_gradients_of(ctx, dy, None, backward), None


def _gradients_of(
    ctx: Any, dy: Tensor, around: Tensor | None, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    """Of x, the weight and the bias."""
    x, weight, mean, inverse = ctx.saved_tensors
    needs_dx, *needed = ctx.needs_input_grad[:3]
    around = around if needs_dx else None
    dtype = ctx.bias_dtype
    dx, dw, db = backward(x, weight, mean, inverse, dy, around, dtype, needs_dx, any(needed))
    gives_db = needed[1] and dtype is not None
    return dx if needs_dx else None, dw if needed[0] else None, db if gives_db else None


def _back(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    dy: Tensor,
    around: Tensor | None,
    bias_dtype: torch.dtype | None,
    needs_dx: bool,
    needs_sums: bool,
) -> Outputs:
    dx, dw, db = found = _back_outputs(
        x, weight, mean, inverse, dy, around, bias_dtype, needs_dx, needs_sums
    )
    sums = [y for y, is_there in ((dw, True), (db, bias_dtype is not None)) if is_there]
    means = None if bias_dtype is None else mean
    to = dx if needs_dx else None
    _backward(x, dy, around, weight, means, inverse, to, sums if needs_sums else [])
    return found


def _back_outputs(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    dy: Tensor,
    around: Tensor | None,
    bias_dtype: torch.dtype | None,
    needs_dx: bool,
    needs_sums: bool,
) -> Outputs:
    dx = x.new_empty(x.shape if needs_dx else (0,))
    dw = weight.new_empty(weight.shape if needs_sums else (0,))
    wants_db = needs_sums and bias_dtype is not None
    return dx, dw, weight.new_empty(weight.shape if wants_db else (0,), dtype=bias_dtype)


_normalize = Operator(
    "normalize",
    (
        "(Tensor x, Tensor weight, Tensor? bias, float eps) "
        "-> (Tensor y, Tensor mean, Tensor inverse)",
        _normed,
        _normed_outputs,
    ),
    (
        "(Tensor x, Tensor weight, Tensor mean, Tensor inverse, Tensor dy, Tensor? around, "
        "ScalarType? bias_dtype, bool needs_dx, bool needs_sums) "
        "-> (Tensor dx, Tensor dw, Tensor db)",
        _back,
        _back_outputs,
    ),
    _save,
    _differentiate,
)


class _Normalized(torch.autograd.Function):
    """x, w, b, eps -> y, x: the operator with what goes around it, which one cannot hand on."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, mean, inverse = _normed(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, around: Tensor | None) -> tuple[Tensor | None, ...]:
        check_first_derivative("a norm")
        if dy is None:
            return around, None, None, None
        return *_gradients_of(ctx, dy, around, _back), None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor | None,
    inverse: Tensor,
    eps: float,
) -> None:
    if x.numel() == 0:
        return
    tensors, strides, unit, R, D = rows_of(x)
    blocks = tile(D, WALKED, columns=MAX_D)
    constants = _normalize_fwd.constants(D=D, UNIT=unit, **blocks)
    pointers = (*tensors, weight, bias, y, mean, inverse)
    with on_device_of(x):
        programs = cdiv(R, blocks["BLOCK_R"])
        _normalize_fwd(programs, pointers, (*strides, R, eps), constants, _warps(D), 1)


def _backward(
    x: Tensor,
    dy: Tensor,
    added: Tensor | None,
    weight: Tensor,
    mean: Tensor | None,
    inverse: Tensor,
    dx: Tensor | None,
    sums: Sequence[Tensor],
) -> None:
    """Writes dx, if given, and `sums`, the weight's gradient and the bias's, if there are any."""
    if x.numel() == 0:
        for y in sums:
            y.zero_()
        return
    (x_rows, dy_rows, added_rows), strides, unit, R, D = rows_of(x, dy, added)
    blocks = tile(D, WALKED, columns=MAX_D)
    walks = walks_of(R, blocks["BLOCK_R"], 1, x.device)
    parts = new_parts(x, walks, sums)
    constants = _normalize_bwd.constants(D=D, S=len(sums), UNIT=unit, **blocks)
    pointers = (x_rows, dy_rows, added_rows, weight, mean, inverse, dx, parts)
    with on_device_of(x):
        _normalize_bwd(walks, pointers, (*strides, R, walks), constants, _warps(D), 1)
        sum_parts(parts, sums)


def _warps(D: int) -> int:
    return 4 if D <= 2048 else 8
