"""Ground truth for kernels/short_long_conv.py. Clear, differentiable, any device.

Depthwise and causal, tap 0 of every kernel meets the current token. u, z [B, D, T] here:

    (k * u)_t = sum_{n=0}^{min(t, W-1)} k_n u_{t-n}                     for each channel

    order="serial"     z = k_long * act(u + sum_i k_i * u)       act = SiLU or None
    order="parallel"   z = u + sum_i k_i * u + k_long * u        no activation

The term u alone is the unit tap of `identity=True`. Two-sided (causal=False): short kernels of odd
width W are centred, their tap (W-1)/2 meets the current token, and the long kernel has a second
half, whose tap 0 meets the *next* token:

    z_t = (k_long * u)_t + sum_{s>=1} k_future_{s-1} u_{t+s}

After training the short branches merge (arXiv 2406.08128, structural reparameterisation): see
`reparameterize`. All compute in float32, or float64 if any tensor is float64, and return that
dtype: the caller decides where to round.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.reference.linear_attention import compute_dtype

Order = Literal["serial", "parallel"]
Activation = Literal["silu"] | None
Layout = Literal["btd", "bdt"]
Method = Literal["fft", "direct"]


@dataclass(frozen=True)
class Spectrum:
    """The transform of a long kernel, zero-padded to `n`, for sequences of exactly T tokens."""

    values: Tensor  # [D, n // 2 + 1] complex64 or complex128
    n: int
    T: int


def short_long_conv(
    x: Tensor,
    short_kernels: Sequence[Tensor],
    long_kernel: Tensor,
    *,
    order: Order = "serial",
    activation: Activation = "silu",
    identity: bool = True,
    causal: bool = True,
    long_kernel_future: Tensor | None = None,
    gate: Tensor | None = None,
    layout: Layout = "btd",
    spectrum: Spectrum | None = None,
    method: Method = "fft",
) -> Tensor:
    """Short kernels and one long kernel, in series or in parallel, times `gate`.

    x, gate, z [B, T, D] (or [B, D, T] if layout="bdt"); short_kernels, each [D, W];
    long_kernel [D, T_long], whose taps beyond T - 1 are unused; long_kernel_future [D, T_f], given
    exactly if causal=False. `activation` belongs to order="serial", "parallel" does not read it.
    `spectrum` is kernel_spectrum(long_kernel, T), if known, and needs method="fft"; "direct" sums
    the taps. Without short kernels and identity, "parallel" is the long convolution alone.
    Raises ArgumentError for what does not fit.
    """
    _check_option("order", order, ("serial", "parallel"))
    _check_option("activation", activation, ("silu", None))
    _check_inputs(x, layout, short_kernels, causal=causal)
    if causal == (long_kernel_future is not None):
        raise ArgumentError(
            "long_kernel_future [D, T_f] is the half that causal=False needs and causal=True has "
            f"no place for; got causal={causal} and "
            f"{'none' if long_kernel_future is None else list(long_kernel_future.shape)}"
        )
    dtype = compute_dtype(x, *short_kernels, long_kernel)
    u = _to_bdt(x, layout).to(dtype)
    if order == "serial":
        h = _short(u, short_kernels, identity, causal)
        h = h if activation is None else F.silu(h)
        z = _long(h, long_kernel, spectrum, method)
    else:
        h = u
        z = _long(u, long_kernel, spectrum, method)
        if short_kernels or identity:
            z = z + _short(u, short_kernels, identity, causal)
    if long_kernel_future is not None:
        shifted = F.pad(long_kernel_future, (1, 0))  # its tap 0 meets the current token: zero
        z = z + _long(h.flip(-1), shifted, None, method, name="long_kernel_future").flip(-1)
    return _gated(_to_bdt(z, layout), gate)  # swapping the last two axes is its own inverse


def short_conv(
    x: Tensor,
    kernels: Sequence[Tensor],
    *,
    activation: Activation = "silu",
    identity: bool = True,
    layout: Layout = "btd",
    state: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """act(x + sum_i k_i * x): the first half of `short_long_conv` with order="serial".

    x, y [B, T, D] (or [B, D, T] if layout="bdt"); kernels, each [D, W]. `state` [B, D, W_max - 1]
    holds the inputs before x, oldest first, and is updated in place, without gradient, to those
    before the next call: zeros at a sequence's start; causal=False has none. Raises ArgumentError
    for what does not fit.
    """
    _check_option("activation", activation, ("silu", None))
    _check_inputs(x, layout, kernels, causal=causal)
    if state is not None and not causal:
        raise ArgumentError(
            "causal=False reads tokens to come, which a state of those before x cannot hold, got "
            "a state; leave it out and pass the whole sequence"
        )
    u = _to_bdt(x, layout).to(compute_dtype(x, *kernels))
    B, D, T = u.shape
    past = max([1, *[kernel.shape[1] for kernel in kernels]]) - 1
    if state is not None:
        if state.shape != (B, D, past):
            raise ArgumentError(
                f"wanted state [B, D, W_max - 1] = {[B, D, past]}, got {list(state.shape)}; "
                "start with zeros of that shape"
            )
        u = torch.cat([state.to(u.dtype), u], dim=-1)
        with torch.no_grad():
            state.copy_(u[..., T:])
    y = _short(u, kernels, identity, causal)[..., u.shape[-1] - T :]
    return _to_bdt(y if activation is None else F.silu(y), layout)


def long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    spectrum: Spectrum | None = None,
    layout: Layout = "btd",
    gate: Tensor | None = None,
    method: Method = "fft",
) -> Tensor:
    """gate * (kernel * x), causal: order="parallel" of `short_long_conv` with nothing short.

    x, gate, z [B, T, D] (or [B, D, T] if layout="bdt"); kernel [D, T_long]. By FFT the error is
    normwise: about eps times rms(z), whatever the size of z_t. Raises ArgumentError.
    """
    return short_long_conv(
        x,
        [],
        kernel,
        order="parallel",
        identity=False,
        gate=gate,
        layout=layout,
        spectrum=spectrum,
        method=method,
    )


def kernel_spectrum(kernel: Tensor, T: int) -> Spectrum:
    """The transform of kernel [D, T_long] as `long_conv` over T tokens wants it, in its dtype rule.

    Pass it as `spectrum` to every call with this kernel, this T and this dtype.
    """
    if kernel.ndim != 2 or T < 0:
        raise ArgumentError(
            f"wanted kernel [D, T_long] and T >= 0, got {list(kernel.shape)} and T = {T}; "
            "pass the sequence's own T"
        )
    taps = kernel[:, :T].to(compute_dtype(kernel))
    n = _fft_length(T + taps.shape[1] - 1)
    return Spectrum(torch.fft.rfft(taps, n=n), n, T)


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

    short_kernels, each [D, W]; long_kernel [D, T_long]. To be used with identity=False:

        short, long = reparameterize(short_kernels, long_kernel, order=order)
        z = short_long_conv(x, [] if short is None else [short], long, order=order, identity=False)
    """
    _check_option("order", order, ("serial", "parallel"))
    if long_kernel.ndim != 2:
        raise ArgumentError(f"wanted long_kernel [D, T_long], got {list(long_kernel.shape)}")
    D = long_kernel.shape[0]
    _check_kernels(short_kernels, D)
    dtype = compute_dtype(*short_kernels, long_kernel)
    long = long_kernel.to(dtype)
    branches = [kernel.to(dtype) for kernel in short_kernels]
    if identity:
        branches.append(long.new_ones(D, 1))
    if order == "parallel":
        return None, _sum_at_tap_0([long, *branches])
    _check_serial(branches)
    return _sum_at_tap_0(branches), long


def default_short_sizes(max_length: int) -> tuple[int, int]:
    """Widths 3 and 2 * round(log10(max_length)) + 1, both odd. The rounding is our reading."""
    if max_length < 1:
        raise ArgumentError(f"max_length is a number of tokens, got {max_length}; pass 1 or more")
    return 3, 2 * round(math.log10(max_length)) + 1


def _short(u: Tensor, kernels: Sequence[Tensor], identity: bool, causal: bool) -> Tensor:
    branches = [
        _direct(u, kernel, ahead=0 if causal else kernel.shape[1] // 2) for kernel in kernels
    ]
    if identity:
        branches.append(u)
    _check_serial(branches)
    return torch.stack(branches).sum(dim=0)


def _direct(u: Tensor, kernel: Tensor, *, ahead: int = 0) -> Tensor:
    """The sum of the taps; tap `ahead` meets the current token."""
    D, W = kernel.shape
    if u.numel() == 0:
        return u + kernel.to(u.dtype).sum()  # empty, and a gradient of zeros
    weight = kernel.to(u.dtype).flip(-1)[:, None]  # conv1d correlates
    return F.conv1d(F.pad(u, (W - 1 - ahead, ahead)), weight, groups=D)


def _long(
    u: Tensor,
    kernel: Tensor,
    spectrum: Spectrum | None,
    method: Method,
    name: str = "long_kernel",
) -> Tensor:
    _check_option("method", method, ("fft", "direct"))
    D, T = u.shape[1:]
    if kernel.ndim != 2 or kernel.shape[0] != D or kernel.shape[1] < 1:
        raise ArgumentError(
            f"wanted {name} [D, taps] with D = {D} and at least one tap, got {list(kernel.shape)}; "
            "a kernel has one row per channel of x"
        )
    if method == "direct":
        if spectrum is not None:
            raise ArgumentError('method="direct" takes no spectrum; leave it out or use "fft"')
        return _direct(u, kernel[:, : max(T, 1)])
    if spectrum is None:
        spectrum = kernel_spectrum(kernel.to(u.dtype), T)
    complex_dtype = torch.complex128 if u.dtype == torch.float64 else torch.complex64
    shape = (D, spectrum.n // 2 + 1)
    if (spectrum.T, spectrum.values.shape, spectrum.values.dtype) != (T, shape, complex_dtype):
        raise ArgumentError(
            f"wanted a spectrum for T = {T}, {list(shape)} in {complex_dtype}, got T = "
            f"{spectrum.T}, {list(spectrum.values.shape)} in {spectrum.values.dtype}; "
            "make it with kernel_spectrum(kernel, T) of this kernel, T and dtype"
        )
    if u.numel() == 0:
        return u + kernel.to(u.dtype).sum()  # empty, and a gradient of zeros
    z: Tensor = torch.fft.irfft(torch.fft.rfft(u, n=spectrum.n) * spectrum.values, n=spectrum.n)
    return z[..., :T]


def _fft_length(n: int) -> int:
    """The least 2^a * (1, 3, 5, 9 or 15) that is n or more: fast, and less padding than 2^a."""
    return min(odd << (max(1, -(-n // odd)) - 1).bit_length() for odd in (1, 3, 5, 9, 15))


def _sum_at_tap_0(kernels: Sequence[Tensor]) -> Tensor:
    width = max(kernel.shape[1] for kernel in kernels)
    padded = [F.pad(kernel, (0, width - kernel.shape[1])) for kernel in kernels]
    return torch.stack(padded).sum(dim=0)


def _to_bdt(x: Tensor, layout: Layout) -> Tensor:
    return x.mT if layout == "btd" else x


def _gated(z: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return z
    if gate.shape != z.shape:
        raise ArgumentError(
            f"wanted gate {list(z.shape)}, as x, got {list(gate.shape)}; expand it first"
        )
    return z * gate


def _check_option(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ArgumentError(f"no {name} {value!r}; it is one of {', '.join(map(repr, known))}")


def _check_inputs(
    x: Tensor, layout: Layout, kernels: Sequence[Tensor], *, causal: bool = True
) -> None:
    _check_option("layout", layout, ("btd", "bdt"))
    if x.ndim != 3:
        raise ArgumentError(f'wanted x [B, T, D], or [B, D, T] as "bdt", got {list(x.shape)}')
    _check_kernels(kernels, x.shape[2 if layout == "btd" else 1])
    even = [kernel.shape[1] for kernel in kernels if kernel.shape[1] % 2 == 0]
    if even and not causal:
        raise ArgumentError(
            f"causal=False centres short kernels, so widths are odd, got {even}; pad with a zero"
        )


def _check_kernels(kernels: Sequence[Tensor], D: int) -> None:
    for i, kernel in enumerate(kernels):
        if kernel.ndim != 2 or kernel.shape[0] != D or kernel.shape[1] < 1:
            raise ArgumentError(
                f"wanted short kernels [D, W] with D = {D} and W >= 1, got {list(kernel.shape)} "
                f"at {i}; a kernel has one row per channel of x"
            )


def _check_serial(branches: Sequence[Tensor]) -> None:
    if not branches:
        raise ArgumentError(
            "no short kernel and identity=False: nothing reaches the long kernel; pass a kernel, "
            'identity=True, or call long_conv (order="parallel" may be empty)'
        )
