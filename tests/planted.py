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


@triton.jit
def _races(x_ptr):
    """Every thread writes its number to one place in shared memory, which the sum has asked for."""
    offs = tl.arange(0, 1024)
    x = tl.load(x_ptr + offs) + offs
    tl.inline_asm_elementwise(
        "{ .reg .b32 at; mov.b32 at, global_smem; st.shared.b32 [at], $1; mov.b32 $0, $1; }",
        "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(x_ptr, tl.sum(x))
