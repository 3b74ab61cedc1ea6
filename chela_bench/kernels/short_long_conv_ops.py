"""Short-long convolution for PyTorch: operators that torch.compile and others see, and autograd.

All tensors but kernels are views [B, D, T]. Four operators are put together by short_long_conv.py,
of which `merged` is linear and the others are differentiable once:

    merged     k = sum_i k_i                saves nothing
    short      y = act(k * x)               saves x, and the past if there is one
    long       z = gate * (k * x)           saves x, the kernel's spectrum and the gate, which here
                                            is not trained; `adjoint`, z = sum_n k_n x_{t+n}
    products   y = z * gate, or y = z       saves the gate, and z where the gate is trained

Each writes its output token-major ([B, T, D] in memory) or channel-major, as it is told: so a
transpose costs nothing where the short convolution or a gate's product runs anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chela_bench.kernels.dispatch import is_plain
from chela_bench.kernels.launching import cdiv, on_device_of
from chela_bench.kernels.long_conv_direct import direct_forward, direct_taps_gradient
from chela_bench.kernels.long_conv_factors import (
    factor_spectrum,
    gradients_factors,
    long_conv_factors,
    taps_gradient_blocks,
)
from chela_bench.kernels.long_conv_monarch import (
    N1,
    gradients_block,
    long_conv_block,
    spectrum_dtype,
)
from chela_bench.kernels.long_conv_monarch import kernel_spectrum as block_spectrum
from chela_bench.kernels.merged_taps import merge_taps, offset
from chela_bench.kernels.operator import Operator, register
from chela_bench.kernels.short_conv import short_backward, short_forward
from chela_bench.kernels.transposed_product import transpose_gate, transpose_gate_backward


def _new(
    x: Tensor, size: torch.Size | tuple[int, ...], tokens: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """[B, D, T], token-major or channel-major."""
    B, D, T = size
    return x.new_empty(B, T, D, dtype=dtype).mT if tokens else x.new_empty(B, D, T, dtype=dtype)


def _new_if(
    wanted: bool,
    x: Tensor,
    size: torch.Size | tuple[int, ...],
    tokens: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return _new(x, size, tokens, dtype) if wanted else x.new_empty(0, dtype=dtype)


# --- merged ---------------------------------------------------------------------------------------


def _merged(
    k0: Tensor,
    k1: Tensor | None,
    k2: Tensor | None,
    k3: Tensor | None,
    W: int,
    causal: bool,
    identity: bool,
) -> Tensor:
    taps = _merged_output(k0, k1, k2, k3, W, causal, identity)
    kernels = [kernel for kernel in (k0, k1, k2, k3) if kernel is not None]
    merge_taps(kernels, taps, causal=causal, identity=identity)
    return taps


def _merged_output(
    k0: Tensor,
    k1: Tensor | None,
    k2: Tensor | None,
    k3: Tensor | None,
    W: int,
    causal: bool,
    identity: bool,
) -> Tensor:
    return k0.new_empty(W, k0.shape[0], dtype=torch.float32).mT


def _merged_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *kernels, W, causal, _ = inputs
    ctx.trained = [
        (i, offset(kernel.shape[1], W, causal), kernel.shape[1], kernel.dtype)
        for i, kernel in enumerate(kernels)
        if ctx.needs_input_grad[i]
    ]


def _merged_differentiate(ctx: Any, dtaps: Tensor, backward: None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * 7
    for i, first, width, dtype in ctx.trained:  # copies: two .grad must not share memory
        part = dtaps[:, first : first + width]
        gradients[i] = part.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return tuple(gradients)


merged = Operator(
    "merged_taps",
    (
        "(Tensor k0, Tensor? k1, Tensor? k2, Tensor? k3, SymInt W, bool causal, bool identity) "
        "-> Tensor",
        _merged,
        _merged_output,
    ),
    None,
    _merged_save,
    _merged_differentiate,
)


# --- short ----------------------------------------------------------------------------------------


def _short(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None,
    activation: bool,
    ahead: int,
    from_tokens: bool,
    to_tokens: bool,
) -> Tensor:
    y = _new(x, x.shape, to_tokens)
    short_forward(x, weight, y, activation=activation, ahead=ahead, past=past)
    return y


def _short_output(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None,
    activation: bool,
    ahead: int,
    from_tokens: bool,
    to_tokens: bool,
) -> Tensor:
    return _new(x, x.shape, to_tokens)


def _short_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, past, *options, _ = inputs
    ctx.save_for_backward(x, weight, past)
    ctx.options = options  # activation, ahead, from_tokens


def _short_differentiate(
    ctx: Any, dy: Tensor, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    needs_dx, needs_dweight = ctx.needs_input_grad[:2]
    dx, dweight = backward(*ctx.saved_tensors, dy, *ctx.options, needs_dx, needs_dweight)
    gradients = dx if needs_dx else None, dweight if needs_dweight else None
    return *gradients, *(None,) * 5


def _short_backward(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None,
    dy: Tensor,
    activation: bool,
    ahead: int,
    from_tokens: bool,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dx, dweight = _short_gradients(
        x, weight, past, dy, activation, ahead, from_tokens, needs_dx, needs_dweight
    )
    if x.numel() == 0:
        return dx, dweight.zero_()
    to: Tensor | None = dx if needs_dx else None
    before = 0
    if past is not None and past.shape[2] > 0:  # as one sequence, whose first outputs none reads
        before = past.shape[2]
        x = torch.cat([past.to(torch.float32), x.to(torch.float32)], dim=2)
        dy = F.pad(dy.to(torch.float32), (before, 0))
        to = torch.empty_like(x) if needs_dx else None
    found = short_backward(
        x, weight, dy, to, activation=activation, ahead=ahead, need_dweight=needs_dweight
    )
    if before > 0 and to is not None:
        dx.copy_(to[..., before:])
    return dx, dweight if found is None else found


def _short_gradients(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None,
    dy: Tensor,
    activation: bool,
    ahead: int,
    from_tokens: bool,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape[::-1] if needs_dweight else (0, 0)).mT
    return _new_if(needs_dx, x, x.shape, from_tokens), dweight


short = Operator(
    "short_conv",
    (
        "(Tensor x, Tensor weight, Tensor? past, bool activation, SymInt ahead, bool from_tokens, "
        "bool to_tokens) -> Tensor",
        _short,
        _short_output,
    ),
    (
        "(Tensor x, Tensor weight, Tensor? past, Tensor dy, bool activation, SymInt ahead, "
        "bool from_tokens, bool needs_dx, bool needs_dweight) -> (Tensor dx, Tensor dweight)",
        _short_backward,
        _short_gradients,
    ),
    _short_save,
    _short_differentiate,
)


# --- long -----------------------------------------------------------------------------------------


def spectrum_of(
    kernel: Tensor, T: int, N2: int, method: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Of kernel [D, taps], for T tokens of this dtype: [D, blocks, 2, 64, N2], and its scale [D].

    For direct sums: the taps themselves in float32, and no scale.
    """
    kernel = kernel.detach()
    if method == "direct":
        return kernel[:, : max(T, 1)].to(torch.float32), None
    arguments = kernel, T, N2, method, dtype
    if is_plain(kernel):
        return _spectrum(*arguments)
    found: tuple[Tensor, Tensor] = torch.ops.chela_bench.long_conv_spectrum(*arguments)
    return found


def _spectrum(
    kernel: Tensor, T: int, N2: int, method: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if kernel.shape[0] == 0 or T == 0:
        return _spectrum_outputs(kernel, T, N2, method, dtype)
    rows = kernel if kernel.stride(1) == 1 else kernel.contiguous()
    with on_device_of(kernel):
        if method == "factors":
            return factor_spectrum(rows, T, N2, dtype)
        return block_spectrum(rows, T, N2, dtype, cdiv(T, N1 * N2))


def _spectrum_outputs(
    kernel: Tensor, T: int, N2: int, method: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    D = kernel.shape[0]
    shape = spectrum_shape(D, T, N2)
    values = kernel.new_empty(shape, dtype=spectrum_dtype(dtype))
    return values, kernel.new_empty(D, dtype=torch.float32)


def spectrum_shape(D: int, T: int, N2: int) -> tuple[int, ...]:
    return D, cdiv(T, N1 * N2), 2, N1, N2


register(
    "long_conv_spectrum",
    "(Tensor kernel, SymInt T, int N2, str method, ScalarType dtype) "
    "-> (Tensor spectrum, Tensor scale)",
    _spectrum,
    _spectrum_outputs,
)


def _long(
    x: Tensor,
    kernel: Tensor,
    spectrum: Tensor,
    scale: Tensor | None,
    gate: Tensor | None,
    method: str,
    adjoint: bool,
    tokens: bool,
    exact_head: int,
) -> Tensor:
    z = _new(x, x.shape, tokens and scale is None)
    if x.numel() == 0:
        return z
    _convolve(x, spectrum, scale, gate, z, method, adjoint)
    if exact_head > 0 and method != "direct":
        first = slice(0, exact_head)
        taps = kernel[:, first].to(torch.float32)
        head = None if gate is None else gate[..., first]
        direct_forward(x[..., first], taps, z[..., first], gate=head)
    return z


def _convolve(
    x: Tensor,
    spectrum: Tensor,
    scale: Tensor | None,
    gate: Tensor | None,
    z: Tensor,
    method: str,
    adjoint: bool,
) -> None:
    """z = gate * A x, or z = A^T (gate * x)."""
    if scale is None:
        direct_forward(x, spectrum, z, gate=gate, reverse=adjoint)
        return
    x, gate = _rows(x), None if gate is None else _rows(gate)
    convolve = long_conv_factors if method == "factors" else long_conv_block
    with on_device_of(x):
        convolve(x, gate, spectrum, scale, z, adjoint=adjoint)


def _rows(x: Tensor) -> Tensor:
    """Channel-major, as transforms want them."""
    if x.stride(2) == 1 or x.shape[2] == 1:
        return x
    rows = x.new_empty(x.shape)
    transpose_gate(x, None, rows)
    return rows


def _long_output(
    x: Tensor,
    kernel: Tensor,
    spectrum: Tensor,
    scale: Tensor | None,
    gate: Tensor | None,
    method: str,
    adjoint: bool,
    tokens: bool,
    exact_head: int,
) -> Tensor:
    return _new(x, x.shape, tokens and scale is None)


def _long_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, kernel, spectrum, scale, gate, *options, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, spectrum, scale, gate)
    ctx.options = *options, kernel.shape[1], kernel.dtype  # method, adjoint, tokens


def _long_differentiate(
    ctx: Any, dz: Tensor, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    needs_dx, needs_dk = ctx.needs_input_grad[:2]
    dx, dk = backward(*ctx.saved_tensors, dz, *ctx.options, needs_dx)
    return dx if needs_dx else None, dk if needs_dk else None, *(None,) * 7


def _long_backward(
    x: Tensor | None,
    spectrum: Tensor,
    scale: Tensor | None,
    gate: Tensor | None,
    dz: Tensor,
    method: str,
    adjoint: bool,
    tokens: bool,
    taps: int,
    dtype: torch.dtype,
    needs_dx: bool,
) -> tuple[Tensor, Tensor]:
    """dk only if x is given."""
    dx, dk = _long_gradients(
        x, spectrum, scale, gate, dz, method, adjoint, tokens, taps, dtype, needs_dx
    )
    if dz.numel() == 0:
        return dx, dk.zero_()
    to = dx if needs_dx else None
    together = x is not None and not adjoint and method in ("monarch", "factors")
    if to is not None and not together:
        _convolve(dz, spectrum, scale, gate, to, method, not adjoint)
        to = None
    if x is None:
        return dx, dk
    known = min(taps, dz.shape[2])
    given = (dz, x) if adjoint else (x, dz)  # <A^T x, dz> = <A dz, x>
    if scale is None:
        found = direct_taps_gradient(*given, gate=gate, taps=known)
    else:
        x, dz = map(_rows, given)
        gate = None if gate is None else _rows(gate)
        found = dk if known == taps else dk.new_empty(x.shape[1], known)
        with on_device_of(x):
            if method == "blocks":
                taps_gradient_blocks(x, gate, dz, found, spectrum.shape[-1])
            else:
                gradients = gradients_block if method == "monarch" else gradients_factors
                gradients(x, gate, dz, spectrum, scale, to, found)
    if known == taps:
        return dx, found.to(dtype)
    dk[:, :known] = found
    dk[:, known:] = 0
    return dx, dk


def _long_gradients(
    x: Tensor | None,
    spectrum: Tensor,
    scale: Tensor | None,
    gate: Tensor | None,
    dz: Tensor,
    method: str,
    adjoint: bool,
    tokens: bool,
    taps: int,
    dtype: torch.dtype,
    needs_dx: bool,
) -> tuple[Tensor, Tensor]:
    dk = dz.new_empty((0,) if x is None else (dz.shape[1], taps), dtype=dtype)
    return _new_if(needs_dx, dz, dz.shape, tokens and scale is None), dk


long = Operator(
    "long_conv",
    (
        "(Tensor x, Tensor kernel, Tensor spectrum, Tensor? scale, Tensor? gate, str method, "
        "bool adjoint, bool tokens, SymInt exact_head) -> Tensor",
        _long,
        _long_output,
    ),
    (
        "(Tensor? x, Tensor spectrum, Tensor? scale, Tensor? gate, Tensor dz, str method, "
        "bool adjoint, bool tokens, SymInt taps, ScalarType dtype, bool needs_dx) "
        "-> (Tensor dx, Tensor dk)",
        _long_backward,
        _long_gradients,
    ),
    _long_save,
    _long_differentiate,
)


# --- products -------------------------------------------------------------------------------------


def _products(z: Tensor, gate: Tensor | None, from_tokens: bool, to_tokens: bool) -> Tensor:
    y = _new(z, z.shape, to_tokens)
    transpose_gate(z, gate, y)
    return y


def _products_output(z: Tensor, gate: Tensor | None, from_tokens: bool, to_tokens: bool) -> Tensor:
    return _new(z, z.shape, to_tokens)


def _products_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, gate, from_tokens, to_tokens = inputs
    ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, gate)
    ctx.options = from_tokens, to_tokens


def _products_differentiate(
    ctx: Any, dy: Tensor, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    needs_dz, needs_dgate = ctx.needs_input_grad[:2]
    dz, dgate = backward(*ctx.saved_tensors, dy, *ctx.options)
    return dz if needs_dz else None, dgate if needs_dgate else None, None, None


def _products_backward(
    z: Tensor | None, gate: Tensor | None, dy: Tensor, from_tokens: bool, to_tokens: bool
) -> tuple[Tensor, Tensor]:
    """dgate only if z is given."""
    dz, dgate = _products_gradients(z, gate, dy, from_tokens, to_tokens)
    transpose_gate_backward(z, gate, dy, dz, None if z is None else dgate)
    return dz, dgate


def _products_gradients(
    z: Tensor | None, gate: Tensor | None, dy: Tensor, from_tokens: bool, to_tokens: bool
) -> tuple[Tensor, Tensor]:
    dtype = dy.dtype if gate is None else gate.dtype
    return _new(dy, dy.shape, from_tokens), _new_if(z is not None, dy, dy.shape, to_tokens, dtype)


products = Operator(
    "transposed_product",
    (
        "(Tensor z, Tensor? gate, bool from_tokens, bool to_tokens) -> Tensor",
        _products,
        _products_output,
    ),
    (
        "(Tensor? z, Tensor? gate, Tensor dy, bool from_tokens, bool to_tokens) "
        "-> (Tensor dz, Tensor dgate)",
        _products_backward,
        _products_gradients,
    ),
    _products_save,
    _products_differentiate,
)
