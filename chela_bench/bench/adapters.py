"""The project's own functions under the bench's calling convention.

An implementation is called as `function(*inputs, **options, **config)` and returns the output in
the inputs' dtype. References compute in float32 (float64 if given float64) and leave rounding to
their caller, which is here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chela_bench.reference import linear_attention as attention
from chela_bench.reference.chela import ChelaLayer
from chela_bench.reference.short_long_conv import Order, short_long_conv

if TYPE_CHECKING:
    from chela_bench.kernels.linear_attention_config import Schedule


def naive_cumsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.naive_cumsum(q, k, v)[0].to(q.dtype)


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.quadratic(q, k, v)[0].to(q.dtype)


def recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.recurrent(q, k, v)[0].to(q.dtype)


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.chunked(q, k, v)[0].to(q.dtype)


def triton_chunked(
    q: Tensor, k: Tensor, v: Tensor, *, schedule: Schedule = "auto", **config: int
) -> Tensor:
    from chela_bench.kernels.linear_attention import linear_attention

    return linear_attention(q, k, v, schedule=schedule, config=config)[0]


def triton_recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from chela_bench.kernels.linear_attention import linear_attention_recurrent

    return linear_attention_recurrent(q, k, v)[0]


def direct_conv(
    x: Tensor, short_kernels: Sequence[Tensor], long_kernel: Tensor, *, order: Order
) -> Tensor:
    z = short_long_conv(x, list(short_kernels), long_kernel, order=order, method="direct")
    return z.to(x.dtype)


def fft_conv(
    x: Tensor, short_kernels: Sequence[Tensor], long_kernel: Tensor, *, order: Order
) -> Tensor:
    z = short_long_conv(x, list(short_kernels), long_kernel, order=order, method="fft")
    return z.to(x.dtype)


def reference_layer(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """The reference ChelaLayer as a function of its parameters, so that any dtype may be given."""
    taps = parameters["long_kernel"].shape[-1]
    key, value = parameters["a_q"].shape[0], parameters["w_v.weight"].shape[0]
    module = layer_module(x.shape[-1], key, value, taps, "meta")
    output: Tensor = torch.func.functional_call(module, parameters, (x,))
    return output


@functools.lru_cache(maxsize=8)  # building a module costs milliseconds of host time
def layer_module(width: int, key: int, value: int, tokens: int, device: str) -> ChelaLayer:
    with torch.device(device):
        return ChelaLayer(width, d_key=key, d_value=value, max_length=tokens)
