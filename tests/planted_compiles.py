"""Implementations of linear_attention whose kernels are planted to trouble a compiler. Loaded with
--impl; SIZE is the axis."""

import os
import sys
import time

import torch
import triton
import triton.language as tl


@triton.jit
def _product_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """c [BLOCK, BLOCK] += a b, pipelined: two tiles of float16 a stage in shared memory, and c in
    the registers of the warps that there are."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    at = rows[:, None] * BLOCK + columns[None, :]
    c = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for i in range(n):
        a = tl.load(x_ptr + i * BLOCK * BLOCK + at)
        b = tl.load(x_ptr + (n - i) * BLOCK * BLOCK + at)
        c = tl.dot(a, b, acc=c)
    tl.store(y_ptr + at, c)


@triton.constexpr_function
def _abort_beyond(size, limit):
    if size > limit:
        print("last words of the compiler", file=sys.stderr)
        getattr(os, "abort")()  # noqa: B009  by name: Triton hashes what it can see
    return 32


@triton.constexpr_function
def _sleep_beyond(size, limit):
    if size > limit:
        getattr(time, "sleep")(600)  # noqa: B009
    return 32


@triton.jit
def _crashing_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, _abort_beyond(SIZE, 4))
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _hanging_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, _sleep_beyond(SIZE, 4))
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _erring_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    tl.static_assert(SIZE <= 4, "SIZE is beyond what this kernel takes")
    offs = tl.arange(0, 32)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


def _launched(kernel, q, *scalars, dtype=torch.float32, **constants):
    x = torch.empty(1 << 20, device=q.device, dtype=dtype)
    y = torch.empty(1 << 20, device=q.device, dtype=torch.float32)
    kernel[(1,)](x, y, *scalars, **constants)
    return torch.empty_like(q)


def greedy(q, k, v, SIZE=2):
    """SIZE stages of 64 KB each."""
    return _launched(
        _product_kernel, q, 100, dtype=torch.float16, BLOCK=128, num_stages=SIZE, num_warps=8
    )


def spilling(q, k, v, SIZE=2):
    """c in the registers of two warps, 256 a thread, whatever SIZE."""
    return _launched(
        _product_kernel, q, 100, dtype=torch.float16, BLOCK=128, num_stages=1, num_warps=2
    )


def crashing(q, k, v, SIZE=2):
    return _launched(_crashing_kernel, q, SIZE=SIZE)


def hanging(q, k, v, SIZE=2):
    return _launched(_hanging_kernel, q, SIZE=SIZE)


def erring(q, k, v, SIZE=2):
    return _launched(_erring_kernel, q, SIZE=SIZE)


def launching_nothing(q, k, v, SIZE=2):
    return q + k


def refusing(q, k, v, SIZE=2):
    raise ValueError("it takes no such thing")
