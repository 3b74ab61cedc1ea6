"""Float64 oracles in memory that a device has: the references themselves, in parts, and each part
computed again on the way back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chela_bench.bench.adapters import called_with, chela_sizes
from chela_bench.reference import chela
from chela_bench.reference.linear_attention import linear_attention
from chela_bench.reference.short_long_conv import long_conv as reference_long_conv

_CHANNELS = 32  # of a convolution at once
_VALUES = 256  # of V, whose columns know nothing of each other, at once


def long_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """By slices of channels, both ways: all spectra at once need not fit. x [B, D, T]; kernel
    [D, T]."""
    z: Tensor = _Convolved.apply(x, kernel)  # type: ignore[no-untyped-call]
    return z


class _Convolved(torch.autograd.Function):
    """Results whole from the start: slices to be joined would take their memory twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        z = torch.empty_like(x)
        for u, taps, out in _by_channels(x, kernel, z):
            out.copy_(reference_long_conv(u, taps, layout="bdt"))
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, kernel = ctx.saved_tensors
        dx, dk = torch.empty_like(x), torch.empty_like(kernel)
        for u, taps, dz, *out in _by_channels(x, kernel, *gradients, dx, dk):
            leaves = [each.detach().requires_grad_() for each in (u, taps)]
            with torch.enable_grad():
                z = reference_long_conv(*leaves, layout="bdt")
            for whole, part in zip(out, torch.autograd.grad(z, leaves, dz), strict=True):
                whole.copy_(part)
        return dx, dk


def _by_channels(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """[B, D, T] and [D, T] alike."""
    return zip(*(each.split(_CHANNELS, dim=-2) for each in tensors), strict=True)


def chela_layer(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """At 256k tokens, D = 1024, with gradients: 49 GiB, where the reference takes 85."""
    return called_with(_chela_module(*chela_sizes(parameters)), x, parameters)


@functools.lru_cache(maxsize=8)
def _chela_module(width: int, key: int, value: int, max_length: int) -> ChelaLayer:
    with torch.device("meta"):
        return ChelaLayer(width, d_key=key, d_value=value, max_length=max_length)


class ChelaLayer(chela.ChelaLayer):
    """The reference, its convolution, attention and output each by itself."""

    def _convolve(self, normed: Tensor, mask: Tensor | None) -> Tensor:
        return _part(self, super()._convolve, normed, mask)

    def _attend(self, normed: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
        return _part(self, super()._attend, normed, z, mask)

    def _gate_output(self, h: Tensor, z: Tensor, x: Tensor) -> Tensor:
        return _part(self, super()._gate_output, h, z, x)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = functools.partial(linear_attention, causal=self.causal)
        slices = v.split(_VALUES, dim=-1)
        return torch.cat([_again(lambda *qkv: attention(*qkv)[0], q, k, u) for u in slices], dim=-1)


class _Part(nn.Module):
    """A method of a layer as a module, which functional_call can give parameters to."""

    def __init__(self, layer: nn.Module, method: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.method = layer, method

    def forward(self, *inputs: Any) -> Tensor:
        return self.method(*inputs)


def _part(layer: nn.Module, method: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """method(*inputs) with the parameters that the layer has now: on the way back it may have
    others."""
    held = {f"layer.{name}": parameter for name, parameter in layer.named_parameters()}
    part = _Part(layer, method)

    def run(*arguments: Any) -> Tensor:
        given, values = arguments[: len(inputs)], arguments[len(inputs) :]
        output: Tensor = torch.func.functional_call(
            part, dict(zip(held, values, strict=True)), given
        )
        return output

    return _again(run, *inputs, *held.values())


def _again(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False)
    return result
