"""Errors against the float64 oracle, and the budget they must stay within.

A norm over a whole tensor is blind to early tokens (small in o and dq) and late ones (small in dk
and dv), so tensors with a token axis are judged block by block: the largest, over blocks of 64
tokens and each row, of ||actual - exact|| / ||exact||.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from chela_bench.errors import ArgumentError

# How a tensor is judged:
#   tokens    [B, T, ..., F]  per block of tokens, each (b, ...), relative to that block
#   channels  [B, T, D]       per block of tokens, each (b, d), relative to the row's rms
#   rows      [B, D, T]       as channels, channel-major
#   taps      [D, T]          as channels, of one batch row: a long kernel's gradient
#   whole     any             one norm: tensors without a token axis (weights, short kernels)
ErrorKind = Literal["tokens", "channels", "rows", "taps", "whole"]

# Relative spacing of a dtype's numbers; a rounding costs at most half of it.
EPS = {"bf16": 2.0**-7, "fp16": 2.0**-10, "tf32": 2.0**-10, "fp32": 2.0**-23}

LEAST_TERMS = 64
BLOCK = 64  # tokens

_AT_ONCE = 1 << 26  # numbers compared at once: half a GiB each, however large the tensors are


def worst_block_error(
    actual: Tensor, exact: Tensor, *, block: int = BLOCK, row_rms: bool = False
) -> float:
    """Largest relative error over blocks of `block` tokens.

    actual, exact: [B, T, ..., F]; a block spans `block` tokens and the last axis, separately for
    each index of B and the axes between. With row_rms=True the tensors are [B, T, D], each (b, d)
    is a row of its own, and a block's error is taken against the rms of its whole row: an FFT's
    error is normwise. Where tokens are few, some of many rows cancel to nearly nothing: none counts
    as smaller than the mean of all rows in its block, and a last block of less than half the tokens
    joins the one before. NaN or infinity in `actual` gives infinity; an empty tensor gives 0.
    """
    if actual.shape != exact.shape or exact.dim() < 3:
        raise ArgumentError(
            f"two tensors of one shape [B, T, ..., F] wanted; got {list(actual.shape)} and "
            f"{list(exact.shape)}"
        )
    if exact.numel() == 0:
        return 0.0
    if row_rms:
        actual, exact = actual.unsqueeze(-1), exact.unsqueeze(-1)
    tokens = exact.shape[1]
    some = max(_AT_ONCE // (exact.numel() // tokens) // block, 1) * block
    pairs = list(zip(actual.split(some, dim=1), exact.split(some, dim=1), strict=True))
    difference = _sums_of_squares((one.to(torch.float64) - other for one, other in pairs), block)
    size = _sums_of_squares((other.to(torch.float64) for _, other in pairs), block)
    if row_rms:
        counts = size.new_full((size.shape[1],), block)
        counts[-1] = tokens - block * (len(counts) - 1)
        mean_square = size.sum(dim=1, keepdim=True) / tokens
        size = mean_square * counts.view(1, -1, *[1] * (size.dim() - 2))
    mean_row = size.mean(dim=[0, *range(2, size.dim())], keepdim=True)
    return _worst_ratio(difference, torch.maximum(size, mean_row))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| over the whole tensor; infinity if `actual` is not finite."""
    difference = (actual.to(torch.float64) - exact).square().sum()
    return _worst_ratio(difference, exact.to(torch.float64).square().sum())


def error_of(actual: Tensor, exact: Tensor, kind: ErrorKind) -> float:
    """The error of one output or gradient, judged as its kind asks (see ErrorKind)."""
    if actual.shape != exact.shape:
        raise ArgumentError(
            f"a result of shape {list(exact.shape)} wanted; got {list(actual.shape)}"
        )
    if kind == "tokens":
        return worst_block_error(actual, exact)
    if kind == "channels":
        return worst_block_error(actual, exact, row_rms=True)
    if kind == "rows":
        return worst_block_error(actual.mT, exact.mT, row_rms=True)
    if kind == "taps":
        return worst_block_error(actual.mT.unsqueeze(0), exact.mT.unsqueeze(0), row_rms=True)
    return relative_error(actual, exact)


def error_budget(dtype: str, *, roundings: int, tokens: int, operands: str | None = None) -> float:
    """What rounding may cost: `roundings` in a row, each half a spacing of the coarser of the
    input/output dtype and the matrix operands', plus float32 accumulation over `tokens` terms, and
    not fewer than the LEAST_TERMS of an inner product, as a random walk of spacing/2, taken 4 wide.

    The worst of thousands of blocks is judged, and the rms of n errors strays from its mean by
    4 / sqrt(2 n) of it: below a block of tokens, the budget grows by what that is more than there.
    """
    spacing = max(EPS[dtype], EPS[operands or dtype])
    terms = max(tokens, LEAST_TERMS)
    rounding = roundings * spacing / 2 + 4 * (EPS["fp32"] / 2) * math.sqrt(terms)
    return rounding * _strays(min(max(tokens, 1), BLOCK)) / _strays(BLOCK)


def _strays(n: int) -> float:
    return 1 + 4 / math.sqrt(2 * n)


def _sums_of_squares(parts: Iterable[Tensor], block: int) -> Tensor:
    """Of [B, T, ..., F], in parts of whole blocks but for the last -> [B, blocks, ...]."""
    sums = []
    for part in parts:
        per_token = part.square().sum(dim=-1)
        padding = -per_token.shape[1] % block
        if padding:
            nothing = per_token.new_zeros(per_token.shape[0], padding, *per_token.shape[2:])
            per_token = torch.cat([per_token, nothing], dim=1)
        sums.append(per_token.unflatten(1, (-1, block)).sum(dim=2))
    blocks = torch.cat(sums, dim=1)
    if padding > block // 2 and blocks.shape[1] > 1:
        blocks[:, -2] += blocks[:, -1]
        blocks = blocks[:, :-1]
    return blocks


def _worst_ratio(difference: Tensor, size: Tensor) -> float:
    ratio = torch.where(difference == 0, 0.0, difference / size)  # 0/0 is no error; x/0 is inf
    worst = float(ratio.detach().max().sqrt())
    return worst if math.isfinite(worst) else math.inf
