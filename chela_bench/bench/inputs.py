"""Draws an op's inputs: the same numbers for every implementation of one shape.

Distribution "randn" is standard normal; "mean1" adds 1 to linear attention's k and v, as SiLU in
front of them makes them, and to the x of convolution and layer. Numbers are drawn in float32 on the
device, then rounded to the dtype; the oracle sees the rounded numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from chela_bench.bench.check import ErrorKind
from chela_bench.bench.models import short_sizes, softmax_heads
from chela_bench.records import shape_label
from chela_bench.reference.chela import ChelaLayer
from chela_bench.reference.softmax_layer import SoftmaxLayer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Inputs:
    """Named tensors, how each one's gradient is judged, and how they become arguments."""

    tensors: dict[str, Tensor]
    kinds: dict[str, ErrorKind]
    arguments: Callable[[dict[str, Tensor]], tuple[Any, ...]]

    def to(self, dtype: torch.dtype) -> Inputs:
        tensors = {name: tensor.detach().to(dtype) for name, tensor in self.tensors.items()}
        return Inputs(tensors, self.kinds, self.arguments)

    def requires_grad_(self, needed: bool) -> Inputs:
        for tensor in self.tensors.values():
            tensor.requires_grad_(needed)
        return self


@dataclass(frozen=True)
class Draw:
    """Where and how to draw: shape, dtype, device, seed, distribution."""

    shape: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device
    seed: int
    distribution: str

    def seed_of(self, name: str) -> int:
        text = f"{self.seed}/{self.distribution}/{shape_label(self.shape)}/{name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def normal(self, name: str, *size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(size, device=self.device, dtype=self.dtype)
        numbers = standard_normal(size, self.seed_of(name), self.device)
        return (numbers * scale + mean).to(self.dtype)

    @property
    def mean(self) -> float:
        return 1.0 if self.distribution == "mean1" else 0.0


def standard_normal(size: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """float32; the same numbers for a seed. Meta tensors have none."""
    if device.type == "meta":
        return torch.empty(*size, device=device, dtype=torch.float32)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*size, generator=generator, device=device, dtype=torch.float32)


def attention(draw: Draw) -> Inputs:
    """q, k [B, T, H, K]; v [B, T, H, V]."""
    batch, tokens, heads = (draw.shape[name] for name in "BTH")
    key, value = draw.shape["K"], draw.shape["V"]
    tensors = {
        "q": draw.normal("q", batch, tokens, heads, key),
        "k": draw.normal("k", batch, tokens, heads, key, mean=draw.mean),
        "v": draw.normal("v", batch, tokens, heads, value, mean=draw.mean),
    }
    kinds: dict[str, ErrorKind] = dict.fromkeys(tensors, "tokens")
    return Inputs(tensors, kinds, lambda t: (t["q"], t["k"], t["v"]))


def softmax_attention(draw: Draw) -> Inputs:
    """As `attention`, randn whatever the distribution.

    With a common mean in k, dq is the small rest of large terms that cancel: flash attention's
    backward, which takes do . o from the rounded o, is then off by 4e-2 in bf16 for any kernel.
    """
    return attention(replace(draw, distribution="randn"))


def short_long_conv(draw: Draw) -> Inputs:
    """x [B, T, D]; short kernels [D, W] of the two default widths; long kernel [D, T]."""
    batch, tokens, width = (draw.shape[name] for name in "BTD")
    tensors = {"x": draw.normal("x", batch, tokens, width, mean=draw.mean)}
    kinds: dict[str, ErrorKind] = {"x": "channels"}
    names = []
    for index, size in enumerate(short_sizes(tokens)):
        names.append(f"short_{index}")
        tensors[names[-1]] = draw.normal(names[-1], width, size, scale=size**-0.5)
        kinds[names[-1]] = "whole"
    tensors["long"] = draw.normal("long", width, tokens, scale=max(tokens, 1) ** -0.5)
    kinds["long"] = "taps"
    return Inputs(tensors, kinds, lambda t: (t["x"], [t[name] for name in names], t["long"]))


def long_conv(draw: Draw) -> Inputs:
    """x [B, D, T]; long kernel [D, T]."""
    batch, tokens, width = (draw.shape[name] for name in "BTD")
    tensors = {
        "x": draw.normal("x", batch, width, tokens, mean=draw.mean),
        "long": draw.normal("long", width, tokens, scale=max(tokens, 1) ** -0.5),
    }
    return Inputs(tensors, {"x": "rows", "long": "taps"}, lambda t: (t["x"], t["long"]))


def softmax_layer(draw: Draw) -> Inputs:
    """x [B, T, D]; the layer's parameters, initialised from the seed."""
    width = draw.shape["D"]
    return _layer(draw, lambda: SoftmaxLayer(width, softmax_heads(width)))


def chela_layer(draw: Draw) -> Inputs:
    """x [B, T, D]; the reference layer's parameters, initialised from the seed.

    LayerNorm takes x's mean away, and SiLU gives k and v theirs, whatever the distribution.
    """
    tokens, width, key, value = (draw.shape[name] for name in "TDKV")
    return _layer(draw, lambda: ChelaLayer(width, d_key=key, d_value=value, max_length=tokens))


def _layer(draw: Draw, build: Callable[[], nn.Module]) -> Inputs:
    batch, tokens, width = (draw.shape[name] for name in "BTD")
    seed = draw.seed_of("parameters")
    with (
        torch.random.fork_rng(devices=[draw.device] if draw.device.type == "cuda" else []),
        torch.device(draw.device),
    ):
        torch.manual_seed(seed)
        module = build()
    parameters = {
        name: parameter.detach().to(draw.dtype) for name, parameter in module.named_parameters()
    }
    tensors = {"x": draw.normal("x", batch, tokens, width, mean=draw.mean), **parameters}
    kinds: dict[str, ErrorKind] = {"x": "tokens", **dict.fromkeys(parameters, "whole")}
    return Inputs(tensors, kinds, lambda t: (t["x"], {name: t[name] for name in parameters}))
