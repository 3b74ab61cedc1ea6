"""Triton kernels with a planted fault, to see that the checks catch it."""

import triton
import triton.language as tl


@triton.jit
def _writes_one_past(x_ptr):
    """x has 8 elements; the ninth is written too."""
    tl.store(x_ptr + tl.arange(0, 16), 0.0, mask=tl.arange(0, 16) < 9)
