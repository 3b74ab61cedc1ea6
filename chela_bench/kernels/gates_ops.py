"""The CHELA layer's pointwise products as functions of PyTorch: operators, autograd, checks.

    norm_gate      m = o / sqrt(mean(o^2) + eps) * act(a)               saves o and a
    queries_keys   q = a_q * s + m_q, k = a_k * s + m_k, s = SiLU(p)    saves p, a_q and a_k
    output_gate    y = sigmoid(g) SiLU(h) + (1 - sigmoid(g)) x          saves h, g and x; or h
    silu           v = SiLU(p)                                          saves p

All tensors are [..., N] in float32, bfloat16 or float16, in any mixture; kernels compute in float32
and round once. No copy is made of what can be seen as rows [R, N] with N contiguous. Each is
differentiable once. Outputs are contiguous. chela_bench.reference.chela has the layer that they are
part of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels import gates
from chela_bench.kernels import queries_keys as shared
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
) -> Tensor:
    """m = o / sqrt(mean(o^2) + eps) * act(a), the mean over the last axis: o, a, m [..., V].

    V <= 4096. activation None: act(a) = a. Without a, m is the normed o. No square overflows,
    whatever is finite in o; a row with NaN is NaN. m comes in `dtype`, or else in a's, or without a
    in o's. Raises ArgumentError.
    """
    _check_tensors({"o": o, "a": a})
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
    m: Tensor = _norm_gate(o, a, eps, activation, dtype)
    return m


def queries_keys(
    p: Tensor, a_q: Tensor, m_q: Tensor, a_k: Tensor, m_k: Tensor, *, activation: bool
) -> tuple[Tensor, Tensor]:
    """q = a_q * s + m_q and k = a_k * s + m_k, s = SiLU(p) if activation, else p.

    p [..., K]; a_q, m_q, a_k, m_k [K], of any float dtypes; q, k [..., K] in p's dtype. The same
    inputs give gradients of the same bits. Raises ArgumentError.
    """
    _check_tensors({"p": p})
    for name, x in (("a_q", a_q), ("m_q", m_q), ("a_k", a_k), ("m_k", m_k)):
        if x.shape != p.shape[-1:] or not x.is_floating_point() or x.device != p.device:
            raise ArgumentError(
                f"wanted {name} [{p.shape[-1]}] of floats on {p.device}, one for each column of p, "
                f"got {list(x.shape)} of {x.dtype} on {x.device}"
            )
    q, k = _queries_keys(p, a_q, m_q, a_k, m_k, activation)
    return q, k


def output_gate(h: Tensor, g: Tensor | None, x: Tensor) -> Tensor:
    """y = sigmoid(g) SiLU(h) + (1 - sigmoid(g)) x, or without g, SiLU(h) + x.

    h, g, x, y [..., D]; y in x's dtype. Raises ArgumentError.
    """
    _check_tensors({"h": h, "g": g, "x": x})
    y: Tensor = _output_gate(h, g, x)
    return y


def silu(p: Tensor) -> Tensor:
    """v = SiLU(p), [..., N] in p's dtype. Raises ArgumentError."""
    _check_tensors({"p": p})
    v: Tensor = _output_gate(p, None, None)
    return v


def _check_tensors(tensors: dict[str, Tensor | None]) -> None:
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


def _empty(x: Tensor, dtype: torch.dtype | None = None, *, wanted: bool = True) -> Tensor:
    """Contiguous, of the shape of x and its dtype, unless another is given."""
    return x.new_empty(x.shape if wanted else (0,), dtype=dtype)


# --- norm_gate ------------------------------------------------------------------------------------


def _norm_gate_forward(
    o: Tensor, a: Tensor | None, eps: float, activation: str | None, dtype: torch.dtype
) -> Tensor:
    m = _norm_gate_output(o, a, eps, activation, dtype)
    gates.norm_gate_forward(o, a, m, eps=eps, activation=activation)
    return m


def _norm_gate_output(
    o: Tensor, a: Tensor | None, eps: float, activation: str | None, dtype: torch.dtype
) -> Tensor:
    return _empty(o, dtype)


def _norm_gate_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    o, a, *options, _ = inputs
    ctx.save_for_backward(o, a)
    ctx.options = options  # eps, activation


def _norm_gate_differentiate(
    ctx: Any, dm: Tensor, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    needs_do, needs_da = ctx.needs_input_grad[:2]
    do, da = backward(*ctx.saved_tensors, dm, *ctx.options, needs_do, needs_da)
    return do if needs_do else None, da if needs_da else None, None, None, None


def _norm_gate_backward(
    o: Tensor,
    a: Tensor | None,
    dm: Tensor,
    eps: float,
    activation: str | None,
    needs_do: bool,
    needs_da: bool,
) -> tuple[Tensor, Tensor]:
    do, da = _norm_gate_gradients(o, a, dm, eps, activation, needs_do, needs_da)
    gates.norm_gate_backward(
        o, a, dm, do if needs_do else None, da if needs_da else None, eps=eps, activation=activation
    )
    return do, da


def _norm_gate_gradients(
    o: Tensor,
    a: Tensor | None,
    dm: Tensor,
    eps: float,
    activation: str | None,
    needs_do: bool,
    needs_da: bool,
) -> tuple[Tensor, Tensor]:
    return _empty(o, wanted=needs_do), _empty(o if a is None else a, wanted=needs_da)


_norm_gate = Operator(
    "norm_gate",
    (
        "(Tensor o, Tensor? a, float eps, str? activation, ScalarType dtype) -> Tensor",
        _norm_gate_forward,
        _norm_gate_output,
    ),
    (
        "(Tensor o, Tensor? a, Tensor dm, float eps, str? activation, bool needs_do, "
        "bool needs_da) -> (Tensor do, Tensor da)",
        _norm_gate_backward,
        _norm_gate_gradients,
    ),
    _norm_gate_save,
    _norm_gate_differentiate,
)


# --- queries_keys ---------------------------------------------------------------------------------


def _queries_keys_forward(
    p: Tensor, a_q: Tensor, m_q: Tensor, a_k: Tensor, m_k: Tensor, activation: bool
) -> tuple[Tensor, Tensor]:
    q, k = _queries_keys_outputs(p, a_q, m_q, a_k, m_k, activation)
    shared.queries_keys_forward(p, (a_q, m_q, a_k, m_k), q, k, activation=activation)
    return q, k


def _queries_keys_outputs(
    p: Tensor, a_q: Tensor, m_q: Tensor, a_k: Tensor, m_k: Tensor, activation: bool
) -> tuple[Tensor, Tensor]:
    return _empty(p), _empty(p)


def _queries_keys_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    p, a_q, m_q, a_k, m_k, activation = inputs
    ctx.save_for_backward(p, a_q, a_k)
    ctx.options = activation, m_q.dtype, m_k.dtype


def _queries_keys_differentiate(
    ctx: Any, dq: Tensor, dk: Tensor, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:5]
    found = backward(*ctx.saved_tensors, dq, dk, *ctx.options, needed[0], any(needed[1:]))
    return *[x if needs else None for x, needs in zip(found, needed, strict=True)], None


def _queries_keys_backward(
    p: Tensor,
    a_q: Tensor,
    a_k: Tensor,
    dq: Tensor,
    dk: Tensor,
    activation: bool,
    m_q_dtype: torch.dtype,
    m_k_dtype: torch.dtype,
    needs_dp: bool,
    needs_sums: bool,
) -> tuple[Tensor, ...]:
    dp, *sums = found = _queries_keys_gradients(
        p, a_q, a_k, dq, dk, activation, m_q_dtype, m_k_dtype, needs_dp, needs_sums
    )
    shared.queries_keys_backward(
        p, a_q, a_k, dq, dk,
        dp if needs_dp else None, sums if needs_sums else (), activation=activation,
    )  # fmt: skip
    return found


def _queries_keys_gradients(
    p: Tensor,
    a_q: Tensor,
    a_k: Tensor,
    dq: Tensor,
    dk: Tensor,
    activation: bool,
    m_q_dtype: torch.dtype,
    m_k_dtype: torch.dtype,
    needs_dp: bool,
    needs_sums: bool,
) -> tuple[Tensor, ...]:
    dtypes = a_q.dtype, m_q_dtype, a_k.dtype, m_k_dtype
    sums = [_empty(a_q, dtype, wanted=needs_sums) for dtype in dtypes]
    return _empty(p, wanted=needs_dp), *sums


_queries_keys = Operator(
    "queries_keys",
    (
        "(Tensor p, Tensor a_q, Tensor m_q, Tensor a_k, Tensor m_k, bool activation) "
        "-> (Tensor q, Tensor k)",
        _queries_keys_forward,
        _queries_keys_outputs,
    ),
    (
        "(Tensor p, Tensor a_q, Tensor a_k, Tensor dq, Tensor dk, bool activation, "
        "ScalarType m_q_dtype, ScalarType m_k_dtype, bool needs_dp, bool needs_sums) "
        "-> (Tensor dp, Tensor da_q, Tensor dm_q, Tensor da_k, Tensor dm_k)",
        _queries_keys_backward,
        _queries_keys_gradients,
    ),
    _queries_keys_save,
    _queries_keys_differentiate,
)


# --- output_gate, and silu ------------------------------------------------------------------------


def _output_gate_forward(h: Tensor, g: Tensor | None, x: Tensor | None) -> Tensor:
    y = _output_gate_output(h, g, x)
    gates.output_gate_forward(h, g, x, y)
    return y


def _output_gate_output(h: Tensor, g: Tensor | None, x: Tensor | None) -> Tensor:
    return _empty(h if x is None else x)


def _output_gate_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, g, x = inputs
    ctx.save_for_backward(h, g, None if g is None else x)


def _output_gate_differentiate(
    ctx: Any, dy: Tensor, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    needs_dh, needs_dg, needs_dx = ctx.needs_input_grad
    h, g, x = ctx.saved_tensors
    if g is None:
        dh = backward(h, None, None, dy, True, False, False)[0] if needs_dh else None
        return dh, None, dy if needs_dx else None
    dh, dg, dx = backward(h, g, x, dy, needs_dh, needs_dg, needs_dx)
    return dh if needs_dh else None, dg if needs_dg else None, dx if needs_dx else None


def _output_gate_backward(
    h: Tensor,
    g: Tensor | None,
    x: Tensor | None,
    dy: Tensor,
    needs_dh: bool,
    needs_dg: bool,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dh, dg, dx = found = _output_gate_gradients(h, g, x, dy, needs_dh, needs_dg, needs_dx)
    gates.output_gate_backward(
        h, g, x, dy, dh if needs_dh else None, dg if needs_dg else None, dx if needs_dx else None
    )
    return found


def _output_gate_gradients(
    h: Tensor,
    g: Tensor | None,
    x: Tensor | None,
    dy: Tensor,
    needs_dh: bool,
    needs_dg: bool,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dg = _empty(h if g is None else g, wanted=needs_dg)
    return _empty(h, wanted=needs_dh), dg, _empty(dy, wanted=needs_dx)


_output_gate = Operator(
    "output_gate",
    (
        "(Tensor h, Tensor? g, Tensor? x) -> Tensor",
        _output_gate_forward,
        _output_gate_output,
    ),
    (
        "(Tensor h, Tensor? g, Tensor? x, Tensor dy, bool needs_dh, bool needs_dg, bool needs_dx) "
        "-> (Tensor dh, Tensor dg, Tensor dx)",
        _output_gate_backward,
        _output_gate_gradients,
    ),
    _output_gate_save,
    _output_gate_differentiate,
)
