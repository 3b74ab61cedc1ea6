"""Float64 oracles in memory that a device has: the references themselves, in parts, and each part
computed again on the way back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chela_bench.bench.adapters import called_with, chela_sizes
from chela_bench.reference import chela
from chela_bench.reference.linear_attention import linear_attention
from chela_bench.reference.short_long_conv import long_conv as reference_long_conv

_CHANNELS = 64  # of a convolution at once
_VALUES = 256  # of V, whose columns know nothing of each other, at once


def long_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """By slices of channels: all spectra at once need not fit."""
    convolve = functools.partial(reference_long_conv, layout="bdt")
    slices = zip(x.split(_CHANNELS, dim=1), kernel.split(_CHANNELS), strict=True)
    return torch.cat([_again(convolve, *each) for each in slices], dim=1)


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
