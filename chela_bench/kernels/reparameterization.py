"""Structural reparameterisation: trained branches of a short-long convolution become fewer kernels.

    serial      k = [n = 0] + sum_i k_i                     one short kernel; the long one as it is
    parallel    k_long + [n = 0] + sum_i k_i                one long kernel, none short

The same function, since convolutions add up (arXiv 2406.08128). Two-sided, short kernels are
centred: what meets tokens to come is the future kernel's. Once for all, on any device, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels.short_long_conv_checks import (
    Order,
    check_centred,
    check_kernels,
    check_long,
    check_option,
    check_serial,
    widest,
)


def reparameterize(
    short_kernels: Sequence[Tensor],
    long_kernel: Tensor,
    *,
    order: Order,
    identity: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Fold the trained branches of a causal short_long_conv: the same function, fewer kernels.

    order="serial": one short kernel [D, W_max], the sum of the branches, narrow ones padded with
    zeros at their end, and of the unit tap at tap 0; long_kernel as it is.
    order="parallel": no short kernel; their taps and the unit tap are added to the first taps of
    long_kernel, which grows to W_max if it is shorter.

    short_kernels, each [D, W]; long_kernel [D, T_long]; on any device. Results are in float32, the
    short kernel tap-major, [W, D] in memory, which saves a copy later. To be used with
    identity=False:

        short, long = reparameterize(short_kernels, long_kernel, order=order)
        z = short_long_conv(x, [] if short is None else [short], long, order=order, identity=False)
    """
    check_option("order", order, ("serial", "parallel"))
    if long_kernel.ndim != 2:
        raise ArgumentError(f"wanted long_kernel [D, T_long], got {list(long_kernel.shape)}")
    D = long_kernel.shape[0]
    check_kernels(short_kernels, D)
    if order == "serial":
        check_serial(short_kernels, identity)
    unit = [long_kernel.new_ones(D, 1)] if identity else []
    branches = [kernel.to(torch.float32) for kernel in (*short_kernels, *unit)]
    total = reduce(added, branches).mT.contiguous().mT if branches else None
    kernel = long_kernel.to(torch.float32)
    if order == "serial" or total is None:
        return total, kernel
    return None, added(kernel, total)


def reparameterize_two_sided(
    short_kernels: Sequence[Tensor],
    long_kernel: Tensor,
    long_kernel_future: Tensor,
    *,
    order: Order,
    identity: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """As `reparameterize`, for causal=False: short kernels, of odd widths, are centred.

    order="serial": one short kernel [D, W_max], narrow ones padded on both sides, the unit tap in
    the middle; the long pair as it is. order="parallel": no short kernel; taps of the current token
    and of those before it are added to long_kernel's first, taps of tokens to come to those of
    long_kernel_future.
    """
    check_option("order", order, ("serial", "parallel"))
    D = long_kernel.shape[0]
    check_kernels(short_kernels, D)
    check_centred(short_kernels, False)
    for kernel, name in ((long_kernel, "long_kernel"), (long_kernel_future, "long_kernel_future")):
        check_long(kernel, D, name)
    if order == "serial":
        check_serial(short_kernels, identity)
    past, future = long_kernel.to(torch.float32), long_kernel_future.to(torch.float32)
    unit = [long_kernel.new_ones(D, 1)] if identity else []
    branches = [kernel.to(torch.float32) for kernel in (*short_kernels, *unit)]
    if not branches:
        return None, past, future
    ahead = widest(short_kernels) // 2
    total = sum(
        (F.pad(kernel, [ahead - kernel.shape[1] // 2] * 2) for kernel in branches),
        start=past.new_zeros(D, 2 * ahead + 1),
    )
    if order == "serial":
        return total.mT.contiguous().mT, past, future
    return None, added(past, total[:, ahead:]), added(future, total[:, :ahead].flip(1))


def added(kernel: Tensor, first: Tensor, taps: int | None = None) -> Tensor:
    """At most `taps` taps of the sum of kernel and `first`, the narrow one padded at its end; one
    of them is in float32, and so is the sum."""
    long, short = kernel[:, :taps], first[:, :taps]
    if long.shape[1] < short.shape[1]:
        long, short = short, long
    W = short.shape[1]
    return torch.cat([long[:, :W] + short, long[:, W:]], dim=1)
