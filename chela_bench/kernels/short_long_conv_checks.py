"""What short-long convolutions take, and the errors of what they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels.long_conv_monarch import _long_conv

Order = Literal["serial", "parallel"]
Activation = Literal["silu"] | None
Layout = Literal["btd", "bdt"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def widest(kernels: Sequence[Tensor]) -> int:
    return max([1, *[kernel.shape[1] for kernel in kernels]])


def check_option(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ArgumentError(f"no {name} {value!r}; it is one of {', '.join(map(repr, known))}")


def check_options(order: str, activation: str | None, exact_head: int, causal: bool) -> None:
    check_option("order", order, ("serial", "parallel"))
    check_option("activation", activation, ("silu", None))
    if exact_head < 0:
        raise ArgumentError(
            f"exact_head is a number of tokens, got {exact_head}; pass 0 for none of them"
        )
    if exact_head > 0 and not causal:
        raise ArgumentError(
            f"wanted causal=True for exact_head = {exact_head}: two-sided, the first outputs read "
            "the whole sequence; leave it out"
        )


def check_inputs(x: Tensor, layout: str, kernels: Sequence[Tensor]) -> tuple[int, int, int]:
    """B, D, T."""
    check_option("layout", layout, ("btd", "bdt"))
    if x.ndim != 3:
        raise ArgumentError(f'wanted x [B, T, D], or [B, D, T] as "bdt", got {list(x.shape)}')
    B, T, D = x.shape
    if layout == "bdt":
        T, D = D, T
    check_kernels(kernels, D)
    return B, D, T


def check_kernels(kernels: Sequence[Tensor], D: int) -> None:
    for i, kernel in enumerate(kernels):
        if kernel.ndim != 2 or kernel.shape[0] != D or kernel.shape[1] < 1:
            raise ArgumentError(
                f"wanted short kernels [D, W] with D = {D} and W >= 1, got {list(kernel.shape)} "
                f"at {i}; a kernel has one row per channel of x"
            )


def check_centred(kernels: Sequence[Tensor], causal: bool) -> None:
    even = [kernel.shape[1] for kernel in kernels if kernel.shape[1] % 2 == 0]
    if even and not causal:
        raise ArgumentError(
            f"causal=False centres short kernels, so widths are odd, got {even}; pad with a zero"
        )


def check_two_sided(kernels: Sequence[Tensor], future: Tensor | None, causal: bool) -> None:
    check_centred(kernels, causal)
    if causal == (future is not None):
        raise ArgumentError(
            "long_kernel_future [D, T_f] is the half that causal=False needs and causal=True has "
            f"no place for; got causal={causal} and "
            f"{'none' if future is None else list(future.shape)}"
        )


def check_pair(spectrum: object | None, future: Tensor | None) -> None:
    if spectrum is None or future is None:
        raise ArgumentError(
            "spectrum_future is the second half of a two-sided kernel's spectrum: wanted it beside "
            f"spectrum and long_kernel_future, got {'no' if spectrum is None else 'a'} spectrum "
            f"and {'no' if future is None else 'a'} long_kernel_future; pass all three, or leave "
            "it out"
        )


def check_long(kernel: Tensor, D: int, name: str) -> None:
    if kernel.ndim != 2 or kernel.shape[0] != D or kernel.shape[1] < 1:
        raise ArgumentError(
            f"wanted {name} [D, taps] with D = {D} and at least one tap, got {list(kernel.shape)}; "
            "a kernel has one row per channel of x"
        )


def check_serial(kernels: Sequence[Tensor], identity: bool) -> None:
    if not kernels and not identity:
        raise ArgumentError(
            "no short kernel and identity=False: nothing reaches the long kernel; pass a kernel, "
            'identity=True, or call long_conv (order="parallel" may be empty)'
        )


def check_gate(gate: Tensor | None, x: Tensor) -> None:
    if gate is not None and gate.shape != x.shape:
        raise ArgumentError(
            f"wanted gate {list(x.shape)}, as x, got {list(gate.shape)}; expand it first"
        )


def check_state(state: Tensor, wanted: tuple[int, int, int], causal: bool) -> None:
    if not causal:
        raise ArgumentError(
            "wanted causal=True for a state, which holds the past, got causal=False; leave it out"
        )
    if state.shape != wanted:
        raise ArgumentError(
            f"wanted state [B, D, W_max - 1] = {list(wanted)}, got {list(state.shape)}; "
            "start with zeros of that shape"
        )


def check_tensors(**tensors: Tensor | None) -> None:
    """Dtypes and devices."""
    given = {name: x for name, x in tensors.items() if x is not None}
    for name, x in given.items():
        if x.dtype not in DTYPES:
            raise ArgumentError(
                f"wanted {name} in float32, bfloat16 or float16, got {x.dtype}; convert it, or use "
                "chela_bench.reference.short_long_conv"
            )
    devices = {name: x.device for name, x in given.items()}
    first = next(iter(devices.values()))
    if any(device != first for device in devices.values()):
        raise ArgumentError(
            "wanted tensors on one device, got "
            f"{', '.join(f'{name} on {device}' for name, device in devices.items())}; move them"
        )
    if not _long_conv.runs_on(first):
        raise ArgumentError(
            f"wanted tensors on a GPU, got {first}; move them, use "
            "chela_bench.reference.short_long_conv, or start Python with TRITON_INTERPRET=1"
        )
