"""Triton kernels with a planted fault or habit, to see that it is caught."""

import triton
import triton.language as tl


@triton.jit
def _writes_one_past(x_ptr):
    """x has 8 elements; the ninth is written too."""
    tl.store(x_ptr + tl.arange(0, 16), 0.0, mask=tl.arange(0, 16) < 9)


@triton.autotune(configs=[triton.Config({"BLOCK": size}) for size in (256, 1024)], key=[])
@triton.jit
def doubles_in_place(x_ptr, T, BLOCK: tl.constexpr):
    """Its key leaves out T."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < T), mask=offs < T)
