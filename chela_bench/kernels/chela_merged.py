"""The convolution of the CHELA layer for inference: branches merged, spectra known.

    serial      short kernels and the unit tap are one short kernel
    parallel    they are the first taps of the long kernel, or the long pair

Two-sided too. A spectrum is of one T and one dtype of rows, and takes as much memory as T taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chela_bench.kernels.reparameterization import reparameterize, reparameterize_two_sided
from chela_bench.kernels.short_long_conv import Spectrum, kernel_spectrum
from chela_bench.kernels.short_long_conv_checks import Order

KEPT = 2  # pairs of T and dtype of which spectra are kept, those that were asked for last


class MergedKernels:
    """Kernels [D, W] and [D, T_long], float32, without gradient, and what they were made of."""

    def __init__(
        self,
        short_kernels: Sequence[Tensor],
        long_kernel: Tensor,
        long_kernel_future: Tensor | None,
        *,
        order: Order,
        parameters: Sequence[Tensor],
    ) -> None:
        self.causal = long_kernel_future is None
        shorts, long = [kernel.detach() for kernel in short_kernels], long_kernel.detach()
        self.future: Tensor | None = None
        if long_kernel_future is None:
            short, self.long = reparameterize(shorts, long, order=order)
        else:
            future = long_kernel_future.detach()
            short, self.long, self.future = reparameterize_two_sided(
                shorts, long, future, order=order
            )
        self.shorts = [] if short is None else [short]
        self._made_of = _marks(parameters)
        self._spectra: dict[tuple[int, torch.dtype], tuple[Spectrum, Spectrum | None]] = {}

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters, unchanged since, as far as PyTorch counts changes."""
        return self._made_of == _marks(parameters)

    def spectra(self, T: int, dtype: torch.dtype) -> dict[str, Any]:
        """`spectrum` and `spectrum_future` of short_long_conv, for T tokens of this dtype."""
        key = T, dtype
        if torch.compiler.is_compiling():  # a graph that kept one would be compiled anew for it
            known = self._spectra.get(key)
            spectrum, future = self._transformed(T, dtype) if known is None else known
            return {"spectrum": spectrum, "spectrum_future": future}
        pair = self._spectra.pop(key, None)
        if pair is None:
            # Outside inference mode, what it makes can be used inside and outside of it.
            with torch.inference_mode(False), torch.no_grad():
                pair = self._transformed(T, dtype)
            while len(self._spectra) >= KEPT:
                del self._spectra[next(iter(self._spectra))]
        self._spectra[key] = pair
        return {"spectrum": pair[0], "spectrum_future": pair[1]}

    def _transformed(self, T: int, dtype: torch.dtype) -> tuple[Spectrum, Spectrum | None]:
        spectrum = kernel_spectrum(self.long, T, dtype=dtype)
        if self.future is None:
            return spectrum, None
        shifted = F.pad(self.future[:, : max(T - 1, 0)], (1, 0))  # tap 0 meets the current token
        return spectrum, kernel_spectrum(shifted, T, dtype=dtype)


def _marks(parameters: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """What changes when they are replaced, or changed in place."""
    return [(id(x), x.data_ptr(), 0 if x.is_inference() else x._version) for x in parameters]
