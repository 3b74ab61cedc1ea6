"""Short-long convolution, forward and backward, in Triton.

    (k * u)_t = sum_{n=0}^{min(t, W-1)} k_n u_{t-n}                  for each channel

    order="serial"     z = gate * (k_long * act(u + sum_i k_i * u))           act = SiLU or None
    order="parallel"   z = gate * (u + sum_i k_i * u + k_long * u)

x, gate, z [B, T, D] (or [B, D, T], layout="bdt"); short kernels, each [D, W]; long ones [D, taps].
Two-sided, short kernels are centred, and a second long kernel meets the tokens to come: its sum is
the first one's adjoint, so both are the same operator.

Short branches and the unit tap are summed into one kernel, in parallel into the first taps of the
long kernel. What convolves T tokens is in a table (long_conv_plan.py). Direct sums take tensors as
they lie; transforms want time contiguous, and for token-major x the transpose is part of what runs
anyway. Passes over memory, in bytes an element of 16-bit:

                        token-major, transforms     channel-major      direct
    short, SiLU              4, transposes               4                4
    parallel                 4, transposes               -                -
    long                     4 (factors 22)          4 (factors 22)       4
    back to tokens           4, transposes               -                -
    gate, fixed              2                           2                2
    gate, trained            2                       6, a pass           6, a pass

Two-sided, the long row comes twice, and 6 for the sum. A kernel's spectrum takes 4 bytes a tap to
write and 4 to read, once for all rows of a batch. Saved for the backward, besides short kernels and
spectra: in series x and u [B, D, T], in parallel x alone, as the long convolution takes it; a gate;
and of a trained gate what it multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels.dispatch import autocast
from chela_bench.kernels.long_conv_monarch import ordered
from chela_bench.kernels.long_conv_plan import Method, Plan, plan_for
from chela_bench.kernels.merged_taps import AT_ONCE
from chela_bench.kernels.reparameterization import added
from chela_bench.kernels.reparameterization import reparameterize as reparameterize
from chela_bench.kernels.reparameterization import (
    reparameterize_two_sided as reparameterize_two_sided,
)
from chela_bench.kernels.short_long_conv_checks import (
    DTYPES,
    Activation,
    Layout,
    Order,
    check_centred,
    check_gate,
    check_inputs,
    check_long,
    check_option,
    check_options,
    check_pair,
    check_serial,
    check_state,
    check_tensors,
    check_two_sided,
    widest,
)
from chela_bench.kernels.short_long_conv_ops import (
    long,
    merged,
    products,
    short,
    spectrum_of,
    spectrum_shape,
)
from chela_bench.kernels.short_long_conv_traffic import short_long_conv_steps
from chela_bench.kernels.traffic import total
from chela_bench.kernels.tuned import tuned

Config = Mapping[str, int | str]


@dataclass(frozen=True)
class Spectrum:
    """A long kernel as one plan wants it, for exactly T tokens of one dtype."""

    values: Tensor  # [D, blocks, 2, 64, N2]; the taps [D, taps] where method is "direct"
    scale: Tensor | None  # [D] float32, what values are to be multiplied by
    T: int
    dtype: torch.dtype  # of the rows that it will meet
    method: Method
    N2: int


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
    spectrum_future: Spectrum | None = None,
    exact_head: int = 0,
    config: Config | None = None,
) -> Tensor:
    """Short kernels and one long kernel, in series or in parallel, times `gate`.

    x, gate, z [B, T, D] (or [B, D, T] if layout="bdt"), any strides; short_kernels, each [D, W];
    long_kernel [D, T_long], whose taps beyond T - 1 are unused; long_kernel_future [D, T_f], given
    exactly if causal=False. Each in float32, bfloat16 or float16 (under autocast, x and gate are
    converted to its dtype); z is in x's dtype, a gradient in its tensor's. Differentiable once in
    all of them. `activation` belongs to order="serial", "parallel" does not read it. Without short
    kernels and identity, "parallel" is the long convolution alone.

    `spectrum` is kernel_spectrum(long_kernel, T, dtype=x.dtype), if known; in parallel, short
    kernels then run on their own. After training, `reparameterize` merges kernels once for all.

    A transform's error is relative to rms(z) over the sequence, 8e-4 in bfloat16, 6e-4 in float16
    (7e-4 beyond 16384 tokens) and 4e-6 in float32 (1e-5 at a million) besides rounding z, however
    small z_t is; and the first tokens' z often is small. The first `exact_head` outputs are
    therefore summed anew, from the first tokens, each with an error relative to itself; causal
    only, and gradients stay as they are. What rounds: the short convolution's output, a trained or
    token-major gate's factor, and two-sided each half.

    config says what convolves T tokens, in part or whole: {"method": "direct" | "monarch" |
    "blocks" | "factors", "N2": 16 | 32 | 64}; else the table of long_conv_plan.py.

    Source: arXiv 2406.08128, section 3; the transforms are ours. Raises ArgumentError.
    """
    (x,), (gate,) = autocast(x), (None,) if gate is None else autocast(gate)
    _, D, T = check_inputs(x, layout, short_kernels)
    check_options(order, activation, exact_head, causal)
    check_two_sided(short_kernels, long_kernel_future, causal)
    check_long(long_kernel, D, "long_kernel")
    if long_kernel_future is not None:
        check_long(long_kernel_future, D, "long_kernel_future")
    if order == "serial":
        check_serial(short_kernels, identity)
    check_gate(gate, x)
    check_tensors(
        x=x,
        gate=gate,
        long_kernel=long_kernel,
        long_kernel_future=long_kernel_future,
        **{f"short_kernels[{i}]": kernel for i, kernel in enumerate(short_kernels)},
    )
    plan = _plan(x, D, T, spectrum, config)
    if spectrum_future is not None:
        check_pair(spectrum, long_kernel_future)
        _plan(x, D, T, spectrum_future, _config_of(plan.method, plan.N2))

    tokens = layout == "btd"
    inner = tokens and plan.method == "direct"  # whether the long convolution is token-major
    u = x.mT if tokens else x
    g = gate.mT if tokens and gate is not None else gate
    future = None if long_kernel_future is None else long_kernel_future[:, : max(T - 1, 0)]
    beside: Tensor | None = None
    has_short = identity or len(short_kernels) > 0
    if order == "serial":
        weight, ahead = _merged(short_kernels, identity, causal, D, x)
        u = short(u, weight, None, activation == "silu", ahead, tokens, inner)
    elif has_short:
        weight, ahead = _merged(short_kernels, identity, causal, D, x)
        if spectrum is not None:
            beside = short(u, weight, None, False, ahead, tokens, inner)
        else:
            long_kernel = added(long_kernel, weight[:, ahead:], T)
            if future is not None and ahead > 0:
                future = added(future, weight[:, :ahead].flip(1), max(T - 1, 0))
    if order == "parallel" and tokens != inner:
        u = products(u, None, tokens, inner)

    N2 = plan.N2
    values, scale = (
        spectrum_of(long_kernel, T, N2, plan.method, x.dtype)
        if spectrum is None
        else (spectrum.values, spectrum.scale)
    )
    fused = g
    if future is not None or beside is not None or tokens != inner or _is_trained(g):
        fused = None
    z = long(u, long_kernel, values, scale, fused, plan.method, False, inner, exact_head)
    if future is not None:
        shifted = future
        if spectrum_future is None or _is_trained(future):
            shifted = F.pad(future, (1, 0))  # its tap 0 meets the current token
        values, scale = (
            spectrum_of(shifted, T, N2, plan.method, x.dtype)
            if spectrum_future is None
            else (spectrum_future.values, spectrum_future.scale)
        )
        z = z + long(u, shifted, values, scale, None, plan.method, True, inner, 0)
    if beside is not None:
        z = z + beside
    if tokens != inner or (g is not None and fused is None):
        z = products(z, g, inner, tokens)
    found: Tensor = z.mT if tokens else z
    return found


def short_conv(
    x: Tensor,
    kernels: Sequence[Tensor],
    *,
    activation: Activation = "silu",
    identity: bool = True,
    causal: bool = True,
    layout: Layout = "btd",
    state: Tensor | None = None,
) -> Tensor:
    """act(x + sum_i k_i * x); causal=False centres the kernels, whose widths are odd then.

    x, y [B, T, D] (or [B, D, T] if layout="bdt"), any strides; kernels, each [D, W]; float32,
    bfloat16 or float16, y in x's. `state` [B, D, W_max - 1] holds the inputs before x, oldest
    first, and is updated in place, without gradient, to those before the next call: zeros at a
    sequence's start; causal only. 4 bytes an element in 16-bit. Raises ArgumentError.
    """
    (x,) = autocast(x)
    B, D, T = check_inputs(x, layout, kernels)
    check_centred(kernels, causal)
    check_option("activation", activation, ("silu", None))
    check_serial(kernels, identity)
    check_tensors(x=x, state=state, **{f"kernels[{i}]": kernel for i, kernel in enumerate(kernels)})
    if state is not None:
        check_state(state, (B, D, widest(kernels) - 1), causal)
    tokens = layout == "btd"
    u = x.mT if tokens else x
    weight, ahead = _merged(kernels, identity, causal, D, x)
    past = None
    if state is not None:  # a backward reads it after it was updated
        past = state.detach()
        past = past.clone() if _is_trained(x, *kernels) else past
    y = short(u, weight, past, activation == "silu", ahead, tokens, tokens)
    if state is not None:
        with torch.no_grad():
            known = torch.cat([state[..., T:], u[..., max(T - state.shape[2], 0) :]], dim=2)
            state.copy_(known)
    found: Tensor = y.mT if tokens else y
    return found


def long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    spectrum: Spectrum | None = None,
    layout: Layout = "btd",
    gate: Tensor | None = None,
    exact_head: int = 0,
    config: Config | None = None,
) -> Tensor:
    """gate * (kernel * x), causal: order="parallel" of `short_long_conv` with nothing short.

    x, gate, z [B, T, D] (or [B, D, T] if layout="bdt"); kernel [D, T_long]. The error is relative
    to rms(z), but for the first `exact_head` outputs: see there. Raises ArgumentError.
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
        exact_head=exact_head,
        config=config,
    )


def kernel_spectrum(
    kernel: Tensor,
    T: int,
    *,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> Spectrum:
    """The transform of kernel [D, T_long] as `long_conv` over T tokens wants it.

    dtype: of the rows that it will meet, the kernel's unless given. Pass it as `spectrum` to every
    call with this kernel, this T and this dtype; gradients go to the kernel. 4 bytes a tap, in
    float32 8. Raises ArgumentError.
    """
    if kernel.ndim != 2 or kernel.shape[1] < 1 or T < 0:
        raise ArgumentError(
            "wanted kernel [D, T_long] with at least one tap and T >= 0, got "
            f"{list(kernel.shape)} and T = {T}; pass the sequence's own T"
        )
    check_tensors(kernel=kernel)
    dtype = kernel.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ArgumentError(
            f"wanted dtype float32, bfloat16 or float16, got {dtype}; pass that of the rows x"
        )
    plan = _plan_for(T, dtype, kernel.device, config)
    values, scale = spectrum_of(kernel, T, plan.N2, plan.method, dtype)
    return Spectrum(values, scale, T, dtype, plan.method, plan.N2)


def hbm_bytes(shape: Mapping[str, int], config: Config | None = None, *, itemsize: int = 2) -> int:
    """Bytes that a forward's launches move, none of which finds in L2 what another left there."""
    return total(short_long_conv_steps(shape, config, itemsize=itemsize))


def _merged(
    kernels: Sequence[Tensor], identity: bool, causal: bool, D: int, like: Tensor
) -> tuple[Tensor, int]:
    """The sum of short kernels and the unit tap [D, W], float32, tap-major, and how many taps are
    ahead of the one that meets the current token."""
    W = widest(kernels)
    ahead = 0 if causal else W // 2
    if not kernels:
        return like.new_ones(D, 1, dtype=torch.float32), 0
    first = kernels[0]
    is_merged = len(kernels) == 1 and not identity and first.dtype == torch.float32
    if is_merged and first.mT.is_contiguous():
        return first, ahead
    branches: list[Tensor | None] = [*kernels]
    while len(branches) > AT_ONCE:  # what is merged is a kernel again
        branches[:AT_ONCE] = [merged(*branches[:AT_ONCE], W, causal, False)]
    branches += [None] * (AT_ONCE - len(branches))
    return merged(*branches, W, causal, identity), ahead


def _plan_for(T: int, dtype: torch.dtype, device: torch.device, config: Config | None) -> Plan:
    """As the config says, or else as was measured for this T, or else as the table does."""
    if not config and not torch.compiler.is_compiling():  # which knows no T
        config = tuned("long_conv", device, dtype, tokens=T) or config
    return plan_for(T, config, by_hand=ordered(dtype, device))


def _plan(x: Tensor, D: int, T: int, spectrum: Spectrum | None, config: Config | None) -> Plan:
    by_hand = ordered(x.dtype, x.device)
    plan = _plan_for(T, x.dtype, x.device, config)
    if spectrum is None:
        return plan
    made = spectrum.T, spectrum.dtype, spectrum.values.shape[0], spectrum.values.device
    same = (spectrum.method, spectrum.N2) == plan[:2] or config is None
    if made != (T, x.dtype, D, x.device) or not same:
        raise ArgumentError(
            f"wanted a spectrum for T = {T} and D = {D} in {x.dtype} on {x.device}, "
            f"{plan.method} with N2 = {plan.N2}, got T = {spectrum.T} and D = "
            f"{spectrum.values.shape[0]} in {spectrum.dtype} on {spectrum.values.device}, "
            f"{spectrum.method} with N2 = {spectrum.N2}; make it with kernel_spectrum(kernel, T, "
            "dtype=x.dtype) of this kernel, T, dtype and config"
        )
    plan = plan_for(T, _config_of(spectrum.method, spectrum.N2), by_hand=by_hand)
    shape = spectrum_shape(D, T, plan.N2) if plan.N2 else None
    values, scale = spectrum.values, spectrum.scale
    if shape is None or scale is None:
        fits = shape is None and scale is None and values.ndim == 2
    else:
        fits = values.shape == shape and values.is_contiguous()
        fits = fits and scale.shape == (D,) and scale.is_contiguous()
    if not fits:
        raise ArgumentError(
            f"wanted a spectrum with values {'[D, taps]' if shape is None else list(shape)} and "
            f"{'no scale' if shape is None else f'a scale {[D]}, contiguous'}, got "
            f"{list(values.shape)} and {'none' if scale is None else list(scale.shape)}; make it "
            "with kernel_spectrum(kernel, T)"
        )
    return plan


def _config_of(method: Method, N2: int) -> Config:
    return {"method": method, "N2": N2} if N2 else {"method": method}


def _is_trained(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
