"""Sums over rows, made side by side by programs that each walk over some of them.

    sums[s, n] = sum_w parts[w, s, n]

A program of a backward keeps sums of its rows in registers and writes them as a part; one launch
adds up the parts, in an order that only their number decides: the same inputs give the same bits.
Grid (S * ceil(N / columns)).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, cdiv, on_device_of, processors
from chela_bench.kernels.rows import _load, _mask

WALKED = 1024  # elements of a tile of 4 warps, where a thread keeps sums of each of its own
WALKS = 6  # programs on a processor
MOST = 5  # sums that one backward makes
SUMMED = {"BLOCK_R": 256, "BLOCK_N": 32}  # by 8 warps


@triton.jit
def _store_sum(ptr, total, n, mask):
    if ptr is not None:
        tl.store(ptr + n, total.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["walks"])
def _sum_parts_kernel(
    parts_ptr, s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr,  # [walks, S, N], then S times [N]
    walks: tl.int64, S: tl.constexpr, N: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    which = pid % S
    n = pid // S * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for first in range(0, walks, BLOCK_R):
        walk = first + tl.arange(0, BLOCK_R)
        mask = _mask(walk, n, walks, N)
        total += _load(parts_ptr + which * N, walk, n, S * N, mask)
    total = tl.sum(total, axis=0)
    _store_sum(s0_ptr, total, n, (n < N) & (which == 0))
    _store_sum(s1_ptr, total, n, (n < N) & (which == 1))
    _store_sum(s2_ptr, total, n, (n < N) & (which == 2))
    _store_sum(s3_ptr, total, n, (n < N) & (which == 3))
    _store_sum(s4_ptr, total, n, (n < N) & (which == 4))


_sum_parts = Launcher(_sum_parts_kernel)


def walks_of(R: int, rows: int, wide: int, device: torch.device, each: int = WALKS) -> int:
    """How many programs walk over R rows, `rows` a step, in each of `wide` groups of columns; in
    all `each` on a processor."""
    return min(cdiv(R, rows), cdiv(each * processors(device), wide))


def new_parts(x: Tensor, walks: int, sums: Sequence[Tensor]) -> Tensor | None:
    """[walks, S, N] in float32, unless there is nothing to sum."""
    if not sums:
        return None
    return x.new_empty(walks, len(sums), x.shape[-1], dtype=torch.float32)


def sum_parts(parts: Tensor | None, sums: Sequence[Tensor]) -> None:
    """Writes `sums`, each [N] and contiguous, from parts [walks, S, N]."""
    if parts is None:
        return
    walks, S, N = parts.shape
    constants = _sum_parts.constants(S=S, N=N, **SUMMED)
    pointers = (parts, *sums, *[None] * (MOST - S))
    with on_device_of(parts):
        _sum_parts(S * cdiv(N, SUMMED["BLOCK_N"]), pointers, (walks,), constants, 8, 1)
