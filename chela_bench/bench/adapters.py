"""The project's own functions under the bench's calling convention.

An implementation is called as `function(*inputs, **options, **config)` and returns the output in
the inputs' dtype. References compute in float32 (float64 if given float64) and leave rounding to
their caller, which is here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from chela_bench.bench.models import softmax_heads
from chela_bench.reference import linear_attention as attention
from chela_bench.reference.chela import ChelaLayer
from chela_bench.reference.short_long_conv import Order, long_conv, short_long_conv
from chela_bench.reference.softmax_attention import (
    softmax_attention,
    softmax_attention_step,
)
from chela_bench.reference.softmax_layer import Attention, SoftmaxLayer

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


def triton_conv(
    x: Tensor,
    short_kernels: Sequence[Tensor],
    long_kernel: Tensor,
    *,
    order: Order,
    **config: int | str,
) -> Tensor:
    from chela_bench.kernels.short_long_conv import short_long_conv

    return short_long_conv(x, list(short_kernels), long_kernel, order=order, config=config or None)


def fft_long_conv(x: Tensor, kernel: Tensor) -> Tensor:
    return long_conv(x, kernel, layout="bdt").to(x.dtype)


def triton_long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    spectrum: Literal["kept", "made"] = "kept",
    **config: int | str,
) -> Tensor:
    """Without gradients the kernel's spectrum is made once, as a model that only infers would."""
    from chela_bench.kernels.short_long_conv import kernel_spectrum, long_conv

    options = config or None
    if torch.is_grad_enabled() or spectrum == "made":
        return long_conv(x, kernel, layout="bdt", config=options)
    made = kept(
        kernel,
        ("spectrum", x.shape[-1], x.dtype, *config.items()),
        lambda: kernel_spectrum(kernel, x.shape[-1], dtype=x.dtype, config=options),
    )
    return long_conv(x, kernel, layout="bdt", spectrum=made, config=options)


def triton_unmerged(
    x: Tensor, short_kernels: Sequence[Tensor], long_kernel: Tensor, *, order: Order
) -> Tensor:
    """Every branch by a kernel of its own, and their sum: before structural reparameterisation."""
    from chela_bench.kernels.short_long_conv import long_conv, short_conv

    branches = [
        short_conv(x, [kernel], activation=None, identity=False) for kernel in short_kernels
    ]
    u = x
    for branch in branches:
        u = u + branch
    if order == "serial":
        return long_conv(F.silu(u), long_kernel)
    return u + long_conv(x, long_kernel)


def triton_merged(
    x: Tensor, short_kernels: Sequence[Tensor], long_kernel: Tensor, *, order: Order
) -> Tensor:
    """The branches merged, and the kernel's spectrum made, before the first call."""
    from chela_bench.kernels.short_long_conv import kernel_spectrum, reparameterize
    from chela_bench.kernels.short_long_conv import short_long_conv as convolve

    def merge() -> Any:
        short, long = reparameterize(list(short_kernels), long_kernel, order=order)
        return short, long, kernel_spectrum(long, x.shape[1], dtype=x.dtype)

    what = ("merged", order, x.shape[1], x.dtype)
    short, long, spectrum = kept(long_kernel, what, merge, *short_kernels)
    shorts = [] if short is None else [short]
    return convolve(x, shorts, long, order=order, identity=False, spectrum=spectrum)


_KEPT: Any = WeakTensorKeyDictionary()


def kept(tensor: Tensor, what: object, make: Callable[[], Any], *others: Tensor) -> Any:
    """make(), of the last call with this tensor, unless it or one of the others is another now, or
    was changed since."""
    made = _KEPT.setdefault(tensor, {})
    versions = tensor._version, *((id(other), other._version) for other in others)
    if what not in made or made[what][0] != versions:
        with torch.no_grad():
            made[what] = versions, make()
    return made[what][1]


Kind = Literal["reference", "triton"]


def reference_layer(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """The reference ChelaLayer as a function of its parameters, so that any dtype may be given."""
    return called_with(_chela_module("reference", *chela_sizes(parameters)), x, parameters)


def fused_layer(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    return called_with(_chela_module("triton", *chela_sizes(parameters)), x, parameters)


def merged_layer(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """The branches merged, and what is made of them, before the first call."""

    def merge() -> Any:
        layer = _chela_holding("triton", parameters)
        layer.reparameterize()
        return layer

    layer = kept(parameters["long_kernel"], "merged layer", merge, *parameters.values())
    output: Tensor = layer(x)
    return output


def reference_softmax_layer(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    return softmax_layer(x, parameters, softmax_attention)


def softmax_layer(x: Tensor, parameters: dict[str, Tensor], attention: Attention) -> Tensor:
    """The layer with heads of 128 or fewer numbers."""
    return called_with(_softmax_module(x.shape[-1], attention), x, parameters)


Step = Callable[[Tensor, Any], Tensor]  # x [B, D], cache -> y [B, D]
Decoder = tuple[Step, Any]  # and the cache, with the prompt in it


def softmax_decoder(
    x: Tensor,
    max_length: int,
    parameters: dict[str, Tensor],
    step_attention: Attention = softmax_attention_step,
) -> Decoder:
    with torch.device("meta"):
        heads = softmax_heads(x.shape[-1])
        layer = SoftmaxLayer(x.shape[-1], heads, step_attention=step_attention)
    _hold(layer, parameters)
    return layer.step, layer.cache(x, max_length)


def reference_chela_decoder(x: Tensor, max_length: int, parameters: dict[str, Tensor]) -> Decoder:
    return _chela_decoder("reference", x, max_length, parameters)


def chela_decoder(x: Tensor, max_length: int, parameters: dict[str, Tensor]) -> Decoder:
    return _chela_decoder("triton", x, max_length, parameters)


def _chela_decoder(
    kind: Kind, x: Tensor, max_length: int, parameters: dict[str, Tensor]
) -> Decoder:
    layer = _chela_holding(kind, parameters)
    assert layer.max_length == max_length
    _, cache = layer.prefill(x)
    return layer.step, cache


def called_with(module: nn.Module, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """module(x) with these parameters for its own, gradients to them."""
    output: Tensor = torch.func.functional_call(module, parameters, (x,))
    return output


def _chela_holding(kind: Kind, parameters: dict[str, Tensor]) -> Any:
    """A layer whose parameters are these: the very memory, not copies."""
    layer = _new_chela(kind, *chela_sizes(parameters))
    _hold(layer, parameters)
    return layer


def _hold(module: nn.Module, parameters: dict[str, Tensor]) -> None:
    module.load_state_dict(parameters, assign=True)
    module.eval().requires_grad_(False)


def chela_sizes(parameters: dict[str, Tensor]) -> tuple[int, int, int, int]:
    """D, K, V and max_length."""
    width, taps = parameters["long_kernel"].shape
    return width, parameters["a_q"].shape[0], parameters["w_v.weight"].shape[0], taps


def _new_chela(kind: Kind, width: int, key: int, value: int, max_length: int) -> ChelaLayer:
    sizes: dict[str, Any] = {"d_key": key, "d_value": value, "max_length": max_length}
    with torch.device("meta"):
        if kind == "reference":
            return ChelaLayer(width, **sizes)
        from chela_bench.kernels.chela import ChelaLayer as Fused

        return Fused(width, **sizes, implementation="triton")


# Building a module costs milliseconds of host time; one without numbers of its own serves all.
_chela_module = functools.lru_cache(maxsize=8)(_new_chela)


@functools.lru_cache(maxsize=8)
def _softmax_module(width: int, attention: Attention) -> SoftmaxLayer:
    with torch.device("meta"):
        return SoftmaxLayer(width, softmax_heads(width), attention=attention)
