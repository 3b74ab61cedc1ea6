"""Tensors [B, D, T] of any strides, as kernels that change layouts see them.

Whichever axis is contiguous is known when a kernel is compiled; the other strides come in units of
8 numbers where all allow it, so that a compiler sees whole vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

STEP = tl.constexpr(8)  # tokens that a thread owns in a row: 16 bytes in 16 bits
BLOCK_D = 64


class View(NamedTuple):
    """Some channels of one batch row, and all its tokens."""

    rows: Any  # [channels, 1], pointers to t = 0
    mask: Any  # [channels, 1], which of them there are
    stride_t: Any


@triton.jit
def _view(
    ptr, b, d, stride_b, stride_d, stride_t, D: tl.constexpr, AXIS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Strides are in units of UNIT elements, but that of AXIS (1: D, 2: T, 0: none) is 1."""
    ptr += b * stride_b * UNIT
    rows = ptr + (d if AXIS == 1 else d * stride_d * UNIT)[:, None]
    return View(rows, _mask_d(d, D), 1 if AXIS == 2 else stride_t * UNIT)


@triton.jit
def _mask_d(d, D: tl.constexpr):
    if D // d.shape[0] * d.shape[0] == D:
        mask = tl.full([d.shape[0], 1], True, dtype=tl.int1)
    else:
        mask = (d < D)[:, None]
    return mask


@triton.jit
def _pointers(view, t, i):
    """To tokens t + i, of which t moves every row alike."""
    return view.rows + (i * view.stride_t)[None, :] + t * view.stride_t


@triton.jit
def _mask(view, t, first, T):
    return view.mask & ((t >= first) & (t < T))[None, :]


def _axis(x: Tensor) -> int:
    """Which axis of [B, D, T] is contiguous, 0 if none."""
    _, D, T = x.shape
    _, stride_d, stride_t = x.stride()
    if stride_d == 1 and (D > 1 or T == 1):
        return 1
    return 2 if stride_t == 1 else 0


def _layouts(T: int, *tensors: Tensor | None) -> tuple[int, list[int], list[int]]:
    """A unit of T, then of each tensor the contiguous axis and the unit of its other strides, and
    its strides in that unit. A unit of 8 lets loads be whole vectors, 1 promises nothing."""
    step = STEP.value
    axes: list[int] = []
    strides: list[int] = []
    for x in tensors:
        if x is None:
            axes += 0, 1
            strides += 0, 0, 0
            continue
        axis = _axis(x)
        jumps = [0 if n == 1 else jump for n, jump in zip(x.shape, x.stride(), strict=True)]
        whole = all(jump % step == 0 for i, jump in enumerate(jumps) if i == 0 or i != axis)
        unit = step if whole else 1
        axes += axis, unit
        strides += [jump // unit for jump in jumps]
    return (step if 2 in axes[::2] and T % step == 0 else 1), axes, strides
