"""The CHELA layer's pointwise products as functions of PyTorch: operators, autograd, checks.

    norm_gate      m = o / sqrt(mean(o^2) + eps) * act(a)               saves o and a
    output_gate    y = sigmoid(g) SiLU(h) + (1 - sigmoid(g)) x          saves h, g and x; or h
                   h and g apart, or as halves of [..., 2 N]
    silu           v = SiLU(p)                                          saves p

All tensors are [..., N] in float32, bfloat16 or float16, in any mixture; kernels compute in float32
and round once. No copy is made of what can be seen as rows [R, N] with N contiguous. Each is
differentiable once. Outputs are contiguous. chela_bench.reference.chela has the layer that they are
part of; its queries and keys are in queries_keys_ops.py.

A bias that a, p, h or g came with may be given beside it: the value has it in already, and the
gradient is the sum of the value's over all rows, which the backward makes on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels import gates
from chela_bench.kernels.operator import Operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GateActivation = Literal["sigmoid", "silu"]


def norm_gate(
    o: Tensor,
    a: Tensor | None,
    *,
    eps: float,
    activation: GateActivation | None = "sigmoid",
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
    shrink: Tensor | None = None,
    owns_gradient: bool = False,
) -> Tensor:
    """m = o / sqrt(mean(o^2) + eps) * act(a), the mean over the last axis: o, a, m [..., V].

    V <= 4096. activation None: act(a) = a. Without a, m is the normed o. No square overflows,
    whatever is finite in o; a row with NaN is NaN. m comes in `dtype`, or else in a's, or without a
    in o's. bias [V] is one that a has in already. `shrink` [T] float32, of o [..., T, V], is what
    each token's row comes multiplied by: its eps is shrink^2 eps, so that m is as if nothing had
    shrunk. It has no gradient. owns_gradient: whoever goes on from m says that nobody else holds
    m's gradient, so that o's may take its place in memory. Raises ArgumentError.
    """
    check_tensors({"o": o, "a": a})
    check_bias("a", a, bias)
    if shrink is not None and (shrink.shape, shrink.dtype) != (o.shape[-2:-1], torch.float32):
        raise ArgumentError(
            f"wanted shrink [T] = {list(o.shape[-2:-1])} in float32, a number for each row of o, "
            f"got {list(shrink.shape)} in {shrink.dtype}; leave it out if none is shrunk"
        )
    if activation not in ("sigmoid", "silu", None):
        raise ArgumentError(f"no activation {activation!r}; it is one of 'sigmoid', 'silu', None")
    if o.shape[-1] > gates.MAX_V:
        raise ArgumentError(
            f"wanted o [..., V] with V <= {gates.MAX_V}, got {list(o.shape)}; split V in heads"
        )
    if not eps >= 0:
        raise ArgumentError(f"wanted eps >= 0, got {eps}; 1e-5 is usual")
    dtype = dtype or (o if a is None else a).dtype
    if dtype not in DTYPES:
        raise ArgumentError(f"wanted dtype float32, bfloat16 or float16, got {dtype}; convert m")
    m: Tensor = _norm_gate(o, a, bias, shrink, eps, activation, dtype, owns_gradient)
    return m


def output_gate(
    h: Tensor,
    g: Tensor | None,
    x: Tensor,
    *,
    bias_h: Tensor | None = None,
    bias_g: Tensor | None = None,
) -> Tensor:
    """y = sigmoid(g) SiLU(h) + (1 - sigmoid(g)) x, or without g, SiLU(h) + x.

    h, g, x, y [..., D]; y in x's dtype. bias_h and bias_g [D] are what h and g have in already.
    Raises ArgumentError.
    """
    check_tensors({"h": h, "g": g, "x": x})
    check_bias("h", h, bias_h)
    check_bias("g", g, bias_g)
    y: Tensor = _output_gate(h, g, x, bias_h, bias_g)
    return y


def joint_output_gate(
    hg: Tensor, x: Tensor, *, bias_h: Tensor | None = None, bias_g: Tensor | None = None
) -> Tensor:
    """output_gate of the halves h and g of hg [..., 2 D], whose gradient is one tensor too.

    x, y [..., D]. Raises ArgumentError.
    """
    check_tensors({"hg": hg})
    if hg.shape[-1] % 2 != 0:
        raise ArgumentError(f"wanted hg [..., 2 D], got {list(hg.shape)}; it is h beside g")
    h, g = hg.chunk(2, dim=-1)
    check_tensors({"h": h, "g": g, "x": x})
    check_bias("h", h, bias_h)
    check_bias("g", g, bias_g)
    if x.shape[-1] == 0:  # where halves cannot be told from one of them
        return output_gate(h, g, x, bias_h=bias_h, bias_g=bias_g)
    y: Tensor = _output_gate(hg, None, x, bias_h, bias_g)
    return y


def normed_output_gate(
    h: Tensor,
    u: Tensor,
    squares: Tensor,
    g: Tensor | None,
    x: Tensor,
    *,
    width: int,
    eps: float,
) -> Tensor:
    """output_gate of h + r u, r = 1 / sqrt(sum(squares) / width + eps), for u whose rows were to be
    multiplied by r and are linear in what `width` numbers' squares are summed of.

    h, u, g, x, y [..., D]; squares [..., P] float32, contiguous. Without gradient, and not for
    tensors that someone watches. Raises ArgumentError.
    """
    check_tensors({"h": h, "u": u, "g": g, "x": x})
    y = empty(x)
    gates.output_gate_forward(h, g, x, y, u=u, squares=squares, width=width, eps=eps)
    return y


def silu(p: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """v = SiLU(p), [..., N] in p's dtype; bias [N] is one that p has in already. Raises
    ArgumentError."""
    check_tensors({"p": p})
    check_bias("p", p, bias)
    v: Tensor = _output_gate(p, None, None, bias, None)
    return v


def check_tensors(tensors: dict[str, Tensor | None]) -> None:
    """Dtypes, and that shapes and devices are the first's."""
    (name, first), *_ = tensors.items()
    assert first is not None
    for other, x in tensors.items():
        if x is None:
            continue
        if x.dtype not in DTYPES:
            raise ArgumentError(
                f"wanted {other} in float32, bfloat16 or float16, got {x.dtype}; convert it, or "
                "use chela_bench.reference.chela"
            )
        if x.ndim == 0 or x.shape != first.shape or x.device != first.device:
            raise ArgumentError(
                f"wanted {', '.join(tensors)} [..., N] of one shape on one device, got {name} "
                f"{list(first.shape)} on {first.device} and {other} {list(x.shape)} on {x.device}; "
                "expand or move them first"
            )
    if not gates._norm_gate_fwd.runs_on(first.device):
        raise ArgumentError(
            f"wanted {name} on a GPU, got {first.device}; move it, use chela_bench.reference.chela "
            "or start Python with TRITON_INTERPRET=1"
        )


def check_bias(name: str, x: Tensor | None, bias: Tensor | None) -> None:
    if bias is None:
        return
    fits = x is not None and bias.shape == x.shape[-1:] and bias.device == x.device
    if not fits or not bias.is_floating_point():
        wanted = f"no bias without {name}" if x is None else f"a bias [{x.shape[-1]}] of floats"
        raise ArgumentError(
            f"wanted {wanted}{'' if x is None else f' on {x.device}, as {name} has it in'}, got "
            f"{list(bias.shape)} of {bias.dtype} on {bias.device}; pass the projection's own"
        )


def empty(x: Tensor, dtype: torch.dtype | None = None, *, wanted: bool = True) -> Tensor:
    """Contiguous, of the shape of x and its dtype, unless another is given."""
    return x.new_empty(x.shape if wanted else (0,), dtype=dtype)


def empty_bias(x: Tensor, dtype: torch.dtype, *, wanted: bool) -> Tensor:
    return x.new_empty(x.shape[-1:] if wanted else (0,), dtype=dtype)


def dtype_of(bias: Tensor | None) -> torch.dtype:
    return torch.float32 if bias is None else bias.dtype


def only(gradients: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple([x if needs else None for x, needs in zip(gradients, needed, strict=True)])


# --- norm_gate ------------------------------------------------------------------------------------


def _norm_gate_forward(
    o: Tensor,
    a: Tensor | None,
    bias: Tensor | None,
    shrink: Tensor | None,
    eps: float,
    activation: str | None,
    dtype: torch.dtype,
    owns_gradient: bool,
) -> Tensor:
    m = _norm_gate_output(o, a, bias, shrink, eps, activation, dtype, owns_gradient)
    gates.norm_gate_forward(o, a, shrink, m, eps=eps, activation=activation)
    return m


def _norm_gate_output(
    o: Tensor,
    a: Tensor | None,
    bias: Tensor | None,
    shrink: Tensor | None,
    eps: float,
    activation: str | None,
    dtype: torch.dtype,
    owns_gradient: bool,
) -> Tensor:
    return empty(o, dtype)


def _norm_gate_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    o, a, bias, shrink, *options, _, ctx.owns_gradient = inputs
    ctx.save_for_backward(o, a, shrink)
    ctx.options = options  # eps, activation
    ctx.bias_dtype = dtype_of(bias)


def _norm_gate_differentiate(
    ctx: Any, dm: Tensor, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    o, a, shrink = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    alike = dm.is_contiguous() and dm.dtype == o.dtype
    if ctx.owns_gradient and alike and backward is _norm_gate_backward:  # not the operator
        backward = partial(backward, room=dm)
    found = backward(o, a, dm, shrink, *ctx.options, ctx.bias_dtype, *needed)
    return *only(found, needed), *(None,) * 5


def _norm_gate_backward(
    o: Tensor,
    a: Tensor | None,
    dm: Tensor,
    shrink: Tensor | None,
    eps: float,
    activation: str | None,
    bias_dtype: torch.dtype,
    needs_do: bool,
    needs_da: bool,
    needs_db: bool,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """room: for do, which may be dm."""
    new_do = needs_do and room is None
    do, da, db = _norm_gate_gradients(
        o, a, dm, shrink, eps, activation, bias_dtype, new_do, needs_da, needs_db
    )
    if room is not None:
        do = room
    gates.norm_gate_backward(
        o, a, dm, shrink,
        do if needs_do else None, da if needs_da else None, db if needs_db else None,
        eps=eps, activation=activation,
    )  # fmt: skip
    return do, da, db


def _norm_gate_gradients(
    o: Tensor,
    a: Tensor | None,
    dm: Tensor,
    shrink: Tensor | None,
    eps: float,
    activation: str | None,
    bias_dtype: torch.dtype,
    needs_do: bool,
    needs_da: bool,
    needs_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    da = empty(o if a is None else a, wanted=needs_da)
    return empty(o, wanted=needs_do), da, empty_bias(o, bias_dtype, wanted=needs_db)


_norm_gate = Operator(
    "norm_gate",
    (
        "(Tensor o, Tensor? a, Tensor? bias, Tensor? shrink, float eps, str? activation, "
        "ScalarType dtype, bool owns_gradient) -> Tensor",
        _norm_gate_forward,
        _norm_gate_output,
    ),
    (
        "(Tensor o, Tensor? a, Tensor dm, Tensor? shrink, float eps, str? activation, "
        "ScalarType bias_dtype, bool needs_do, bool needs_da, bool needs_db) "
        "-> (Tensor do, Tensor da, Tensor db)",
        _norm_gate_backward,
        _norm_gate_gradients,
    ),
    _norm_gate_save,
    _norm_gate_differentiate,
)


# --- output_gate, and silu ------------------------------------------------------------------------


def _output_gate_forward(
    h: Tensor,
    g: Tensor | None,
    x: Tensor | None,
    bias_h: Tensor | None,
    bias_g: Tensor | None,
) -> Tensor:
    y = _output_gate_output(h, g, x, bias_h, bias_g)
    gates.output_gate_forward(*_apart(h, g, x), x, y)
    return y


def _apart(h: Tensor, g: Tensor | None, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """h and g, which both may have come as h."""
    if _is_joint(h, x):
        h, g = h.chunk(2, dim=-1)
    return h, g


def _is_joint(h: Tensor, x: Tensor | None) -> bool:
    return x is not None and h.shape[-1] > x.shape[-1]


def _output_gate_output(
    h: Tensor,
    g: Tensor | None,
    x: Tensor | None,
    bias_h: Tensor | None,
    bias_g: Tensor | None,
) -> Tensor:
    return empty(h if x is None else x)


def _output_gate_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, g, x, bias_h, bias_g = inputs
    ctx.has_gate = g is not None or _is_joint(h, x)
    ctx.save_for_backward(h, g, x if ctx.has_gate else None)
    ctx.bias_dtypes = dtype_of(bias_h), dtype_of(bias_g)


def _output_gate_differentiate(
    ctx: Any, dy: Tensor, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    h, g, x = ctx.saved_tensors
    wanted = needed if ctx.has_gate else (needed[0], False, False, needed[3], False)
    if not any(wanted):
        return None, None, dy if needed[2] else None, None, None
    found = only(backward(h, g, x, dy, *ctx.bias_dtypes, *wanted), wanted)
    if not ctx.has_gate:  # dx is dy
        return *found[:2], dy if needed[2] else None, *found[3:]
    return found


def _output_gate_backward(
    h: Tensor,
    g: Tensor | None,
    x: Tensor | None,
    dy: Tensor,
    bias_h_dtype: torch.dtype,
    bias_g_dtype: torch.dtype,
    *needs: bool,
) -> tuple[Tensor, ...]:
    found = _output_gate_gradients(h, g, x, dy, bias_h_dtype, bias_g_dtype, *needs)
    dh, dg, *others = only(found, needs)
    if dh is not None:
        dh, dg = _apart(dh, dg, x)
    gates.output_gate_backward(*_apart(h, g, x), x, dy, dh, dg, *others)
    return found


def _output_gate_gradients(
    h: Tensor,
    g: Tensor | None,
    x: Tensor | None,
    dy: Tensor,
    bias_h_dtype: torch.dtype,
    bias_g_dtype: torch.dtype,
    needs_dh: bool,
    needs_dg: bool,
    needs_dx: bool,
    needs_db_h: bool,
    needs_db_g: bool,
) -> tuple[Tensor, ...]:
    return (
        empty(h, wanted=needs_dh),
        empty(h if g is None else g, wanted=needs_dg),
        empty(dy, wanted=needs_dx),
        empty_bias(dy, bias_h_dtype, wanted=needs_db_h),
        empty_bias(dy, bias_g_dtype, wanted=needs_db_g),
    )


_output_gate = Operator(
    "output_gate",
    (
        "(Tensor h, Tensor? g, Tensor? x, Tensor? bias_h, Tensor? bias_g) -> Tensor",
        _output_gate_forward,
        _output_gate_output,
    ),
    (
        "(Tensor h, Tensor? g, Tensor? x, Tensor dy, ScalarType bias_h_dtype, "
        "ScalarType bias_g_dtype, bool needs_dh, bool needs_dg, bool needs_dx, bool needs_db_h, "
        "bool needs_db_g) -> (Tensor dh, Tensor dg, Tensor dx, Tensor db_h, Tensor db_g)",
        _output_gate_backward,
        _output_gate_gradients,
    ),
    _output_gate_save,
    _output_gate_differentiate,
)
