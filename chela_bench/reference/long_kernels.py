"""Long kernels [D, taps] as parameters: every tap its own, or few that grow with log(taps).

    explicit     the taps themselves, an nn.Parameter [D, taps]                D * taps numbers
    multiscale   sub-kernels of l numbers, each twice as long as the last      D * l * S numbers

A two-sided convolution has two of either, the past and the future.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chela_bench.errors import ArgumentError
from chela_bench.reference.linear_attention import compute_dtype


class MultiscaleKernel(nn.Module):
    """k [D, taps] = w_0, 1/2 up(w_1), 1/4 up(w_2), 1/8 up(w_3), ... laid end to end, cut at `taps`.

    SGConv's form (arXiv 2210.09298), with a decay of 1/2 and linear interpolation: w_i [D, l]
    becomes up(w_i) of length l, l, 2 l, 4 l, ..., so that w_0 are the first l taps themselves.
    S = 1 + ceil(log2(taps / l)) of them reach `taps`: D * l * S parameters, l = min(size, taps).
    Its constant 1 / Z, Z the kernel's norm at the start, is multiplied into w: see
    `init_long_kernels`. Raises ArgumentError for taps or a size below 1.
    """

    def __init__(self, d_model: int, taps: int, *, size: int = 32) -> None:
        super().__init__()
        if taps < 1 or size < 1:
            raise ArgumentError(
                f"taps and size are numbers of taps, got taps = {taps} and size = {size}; "
                "pass 1 or more"
            )
        size = min(size, taps)
        scales = 1 + ((taps - 1) // size).bit_length()
        self.taps = taps
        self.sub_kernels = nn.Parameter(torch.empty(scales, d_model, size))

    def forward(self) -> Tensor:
        """k [D, taps] in float32, or float64 in a float64 module."""
        w = self.sub_kernels.to(compute_dtype(self.sub_kernels))  # [S, D, l]
        lengths = [w.shape[2] << max(0, i - 1) for i in range(len(w))]
        parts = [
            F.interpolate(w_i[None], size=length, mode="linear")[0] * 0.5**i
            for i, (w_i, length) in enumerate(zip(w, lengths, strict=True))
        ]
        return torch.cat(parts, dim=1)[:, : self.taps]


LongKernel = nn.Parameter | MultiscaleKernel
LongKernelForm = Literal["explicit", "multiscale"]


def new_long_kernel(form: LongKernelForm, d_model: int, taps: int) -> LongKernel:
    """The parameters of one kernel [D, taps], to be filled by `init_long_kernels`."""
    if form == "multiscale":
        return MultiscaleKernel(d_model, taps)
    return nn.Parameter(torch.empty(d_model, taps))


def taps_of(kernel: LongKernel) -> Tensor:
    """The kernel [D, taps], whatever its parameters."""
    return kernel() if isinstance(kernel, MultiscaleKernel) else kernel


@torch.no_grad()
def init_long_kernels(past: LongKernel, future: LongKernel | None) -> None:
    """Unit energy in each channel, half of it in the current token, so that early ones see theirs.

    The other half is noise, which past and future share. Explicit, it is white under exp(-n / tau):
    tau runs over the channels from 1 to taps / 4, evenly in log. Multiscale, it is white w_i, and
    the form itself lets it fall as 1 / n.
    """
    halves = [past] if future is None else [past, future]
    energy = 0.5 / len(halves)
    D, taps = taps_of(past).shape
    tau = torch.logspace(0, 1, D, base=max(1.0, taps / 4))[:, None]
    envelope = torch.exp(-torch.arange(taps) / tau)  # [D, taps]
    for half in halves:
        if isinstance(half, MultiscaleKernel):
            nn.init.normal_(half.sub_kernels)
            half.sub_kernels.mul_(energy**0.5 / half().norm(dim=1, keepdim=True))
        else:
            noise = torch.randn(half.shape) * envelope[:, : half.shape[1]]
            half.copy_(F.normalize(noise, dim=1) * energy**0.5)
    first = past.sub_kernels[0] if isinstance(past, MultiscaleKernel) else past  # [D, l or taps]
    first[:, 0] = 0.5**0.5
