"""Tensors [..., N] of contiguous rows, as pointwise kernels see them: R rows, and tiles of those.

Inputs may have any stride between rows, which comes in units of up to 8 numbers where all inputs
allow it, so that a compiler sees whole vectors; outputs are contiguous. N is known when a kernel is
compiled, R is not. What is computed is in float32, and rounds where it is stored.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 512  # in a tile, at most, where no program needs whole rows


@triton.jit
def _rows(ptr, r, n, stride):
    """Pointers [rows, columns]."""
    return ptr + r[:, None] * stride + n[None, :]


@triton.jit
def _mask(r, n, R, N: tl.constexpr):
    """[rows, columns], or [rows, 1] where columns are all there."""
    mask = (r < R)[:, None]
    if N // n.shape[0] * n.shape[0] != N:
        mask = mask & (n < N)[None, :]
    return mask


@triton.jit
def _load(ptr, r, n, stride, mask):
    return tl.load(_rows(ptr, r, n, stride), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, r, n, N: tl.constexpr, mask, values):
    tl.store(_rows(ptr, r, n, N), values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and 1 - sigmoid(x), neither of them a difference of near numbers."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x)."""
    sigmoid, rest = _sigmoids(x)
    if ACTIVATION == "silu":
        value, slope = x * sigmoid, sigmoid * (1.0 + x * rest)
    elif ACTIVATION == "sigmoid":
        value, slope = sigmoid, sigmoid * rest
    else:
        value, slope = x, tl.full(x.shape, 1.0, dtype=tl.float32)
    return value, slope


class Rows(NamedTuple):
    """Inputs as [R, N], or None, and the strides of their rows in units of UNIT."""

    tensors: tuple[Tensor | None, ...]
    strides: tuple[int, ...]
    UNIT: int
    R: int
    N: int


def rows_of(first: Tensor, *others: Tensor | None) -> Rows:
    """Of tensors of one shape [..., N], not empty. What has no rows one stride apart is copied."""
    N = first.shape[-1]
    rows = [_rows_of(x, N) for x in (first, *others)]
    unit = math.gcd(8, *[stride for _, stride in rows])
    strides = tuple([stride // unit for _, stride in rows])
    return Rows(tuple([x for x, _ in rows]), strides, unit, first.numel() // N, N)


def _rows_of(x: Tensor | None, N: int) -> tuple[Tensor | None, int]:
    if x is None or x.is_contiguous():
        return x, 0 if x is None else N
    rows = x.reshape(-1, N)
    if N > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


@cache  # Triton's next_power_of_2 takes the host a microsecond and more
def tile(N: int, elements: int, *, columns: int = COLUMNS) -> dict[str, int]:
    """Rows and columns of a tile, powers of two."""
    block: int = min(triton.next_power_of_2(N), columns)
    return {"BLOCK_R": max(1, elements // block), "BLOCK_N": block}
