"""Short kernels and the unit tap added up in one launch, in the layout that convolutions read.

    taps[d, n] = sum_i k_i[d, n - before_i] + [n = ahead]          for n < W

k_i [D, W_i], W_i <= W, at most four of them; taps [D, W] float32, tap-major ([W, D] in memory), so
that one tap of neighbouring channels is one load. Causal, kernels begin together: before_i = ahead
= 0. Two-sided they are centred: before_i = (W - W_i) // 2, ahead = W // 2. Sums are in float32, in
the order of the kernels.

Grid (ceil(D / 32) * ceil(W / 8)). Bytes: the kernels once, 4 D W for the taps; so few that the
launch is what it costs. No size is known when it is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from chela_bench.kernels.launching import Launcher, cdiv, on_device_of

AT_ONCE = 4  # kernels
BLOCK_D, BLOCK_W = 32, 8
RUNTIME = [
    "D", "W", "ahead",
    *(f"{what}{i}" for what in ("stride_d", "stride_w", "width_", "before_") for i in range(4)),
]  # fmt: skip


@triton.jit
def _shifted(k_ptr, stride_d, stride_w, width, before, d, n, D):
    """k[d, n - before] in float32, zero where there is none: [BLOCK_W, BLOCK_D]."""
    n -= before
    mask = (d < D) & (n >= 0) & (n < width)
    return tl.load(k_ptr + d * stride_d + n * stride_w, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=RUNTIME)
def _merged_taps_kernel(
    taps_ptr, k0_ptr, k1_ptr, k2_ptr, k3_ptr,  # taps [W, D], contiguous
    D: tl.int64, W: tl.int64, ahead: tl.int64,
    stride_d0: tl.int64, stride_w0: tl.int64, width_0: tl.int64, before_0: tl.int64,
    stride_d1: tl.int64, stride_w1: tl.int64, width_1: tl.int64, before_1: tl.int64,
    stride_d2: tl.int64, stride_w2: tl.int64, width_2: tl.int64, before_2: tl.int64,
    stride_d3: tl.int64, stride_w3: tl.int64, width_3: tl.int64, before_3: tl.int64,
    KERNELS: tl.constexpr, IDENTITY: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,  # tile
):  # fmt: skip
    pid, ND = tl.program_id(0).to(tl.int64), (D + BLOCK_D - 1) // BLOCK_D
    d = (pid % ND * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    n = (pid // ND * BLOCK_W + tl.arange(0, BLOCK_W))[:, None]
    taps = _shifted(k0_ptr, stride_d0, stride_w0, width_0, before_0, d, n, D)
    if KERNELS > 1:
        taps += _shifted(k1_ptr, stride_d1, stride_w1, width_1, before_1, d, n, D)
    if KERNELS > 2:
        taps += _shifted(k2_ptr, stride_d2, stride_w2, width_2, before_2, d, n, D)
    if KERNELS > 3:
        taps += _shifted(k3_ptr, stride_d3, stride_w3, width_3, before_3, d, n, D)
    if IDENTITY:
        taps += tl.where(n == ahead, 1.0, 0.0)
    tl.store(taps_ptr + n * D + d, taps, mask=(d < D) & (n < W))


_merged_taps = Launcher(_merged_taps_kernel)


def offset(width: int, W: int, causal: bool) -> int:
    """Which of W merged taps a kernel's first is added to."""
    return 0 if causal else (W - width) // 2


def merge_taps(kernels: Sequence[Tensor], taps: Tensor, *, causal: bool, identity: bool) -> None:
    """taps = the sum. One to four kernels [D, W_i], any strides and float dtypes; taps [D, W]
    float32, of which .mT is contiguous."""
    D, W = taps.shape
    if D == 0:
        return
    scalars = [D, W, 0 if causal else W // 2]
    for kernel in kernels:
        width = kernel.shape[1]
        scalars += *kernel.stride(), width, offset(width, W, causal)
    missing = AT_ONCE - len(kernels)
    constants = _merged_taps.constants(
        KERNELS=len(kernels), IDENTITY=identity, BLOCK_D=BLOCK_D, BLOCK_W=BLOCK_W
    )
    with on_device_of(taps):
        _merged_taps(
            cdiv(D, BLOCK_D) * cdiv(W, BLOCK_W),
            (taps, *kernels, *[None] * missing),
            (*scalars, *[0] * (4 * missing)),
            constants, 4, 1,
        )  # fmt: skip
