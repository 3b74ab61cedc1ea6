"""Products of tokens with weights, cuBLAS's, whose gradients meet in one buffer.

    out = x W^T + b        dx += dout W        dW = dout^T x        db = sum_t dout_t
    out += m U^T           dm = dout U         dU = dout^T m

Several products of the same x each make a part of its gradient, which PyTorch adds up in passes of
their own: 6 bytes an element in 16 bits for each. Here a product hands on x to what follows, so
that the gradient of all that comes back to it, and its own part is added by the product that makes
it (beta = 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chela_bench.errors import ArgumentError
from chela_bench.kernels.dispatch import autocast, is_plain


class Projection(NamedTuple):
    """Of a token's x."""

    out: Tensor
    x: Tensor  # for whatever else is computed from it
    biases: tuple[Tensor | None, ...]  # of each map, if whoever takes `out` gives it a gradient


def projected(x: Tensor, *maps: nn.Linear) -> Projection:
    """The maps of x [..., D] side by side, out [..., sum of N], in autocast's dtype where that is
    on, and x in the same. A bias's gradient is left to whoever takes `out`, being the sum of out's.

    What is computed from x has a gradient that nobody else holds: so all maps of one x have to be
    projected where `can_project` allows it. Differentiable once.
    """
    x, *weights = autocast(x, *[linear.weight for linear in maps])
    biases = [linear.bias for linear in maps]
    given = [None if b is None else b.detach().to(weights[0].dtype) for b in biases]
    out, handed_on = _Projected.apply(x, _side_by_side(given, weights), *weights)
    trained = tuple([b if b is not None and b.requires_grad else None for b in biases])
    return Projection(out, handed_on if x.requires_grad else x, trained)


def called(x: Tensor, linear: nn.Linear) -> Projection:
    """linear(x) by PyTorch, which gives the bias its gradient."""
    return Projection(linear(x), x, (None,))


def add_product(out: Tensor, m: Tensor, linear: nn.Linear) -> Tensor:
    """out[..., :N] += m U^T in place, U [N, V] of a map without bias: out [..., N or more], which
    nobody else holds, m [..., V]. Differentiable once."""
    m, weight = autocast(m, linear.weight)
    added: Tensor = _Added.apply(out, m, weight)
    return added


def can_project(x: Tensor, *modules: nn.Module | None) -> bool:
    """Whether all, but for None, are nn.Linear itself, which nobody hooked to a call of, and
    gradients are on, and nobody watches (torch.compile, functorch)."""
    for linear in modules:
        if linear is None:
            continue
        own = linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks
        if type(linear) is not nn.Linear or any(own) or linear._backward_pre_hooks:
            return False
        if not is_plain(linear.weight):
            return False
    return torch.is_grad_enabled() and is_plain(x)


def _side_by_side(biases: Sequence[Tensor | None], weights: list[Tensor]) -> Tensor | None:
    """Zeros where there is none."""
    if all(b is None for b in biases):
        return None
    filled = [
        weight.new_zeros(len(weight)) if b is None else b
        for b, weight in zip(biases, weights, strict=True)
    ]
    return filled[0] if len(filled) == 1 else torch.cat(filled)


class _Projected(torch.autograd.Function):
    """x, b, several W -> x [W, ..]^T + b, x. b has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights)
        weight = _joined(weights)
        out = x.new_empty(*x.shape[:-1], len(weight))  # no view, so that it can be added to
        if bias is None:
            torch.mm(_rows(x), weight.T, out=_rows(out))
        else:
            torch.addmm(bias, _rows(x), weight.T, out=_rows(out))
        return out, x

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        check_first_derivative("a projection")
        x, *weights = ctx.saved_tensors
        nothing = (None,) * (1 + len(weights))
        if dout is None:
            return dx, *nothing
        rows, needed = _rows(dout), ctx.needs_input_grad[2:]
        gradients = nothing[1:]
        if any(needed):
            every = (rows.T @ _rows(x)).split([len(weight) for weight in weights])
            gradients = tuple([y if n else None for y, n in zip(every, needed, strict=True)])
        if not ctx.needs_input_grad[0]:
            return None, None, *gradients
        weight = _joined(weights)
        if dx is None:
            return (rows @ weight).view(x.shape), None, *gradients
        if not dx.is_contiguous():
            dx = dx.contiguous()
        _rows(dx).addmm_(rows, weight)  # nobody else has it: see `projected`
        return dx, None, *gradients


class _Added(torch.autograd.Function):
    """out, m, U -> out, in place."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, m: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(m, weight)
        ctx.mark_dirty(out)
        _rows(out)[:, : len(weight)].addmm_(_rows(m), weight.T)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        check_first_derivative("a projection")
        m, weight = ctx.saved_tensors
        rows = _rows(dout)[:, : len(weight)]
        _, needs_dm, needs_dweight = ctx.needs_input_grad
        dweight = rows.T @ _rows(m) if needs_dweight else None
        return dout, (rows @ weight).view(m.shape) if needs_dm else None, dweight


def _rows(x: Tensor) -> Tensor:
    """[.., N], which is a view of what is contiguous."""
    return x.reshape(-1, x.shape[-1])


def _joined(weights: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def check_first_derivative(of: str) -> None:
    """In a backward that has no gradient."""
    if torch.is_grad_enabled():
        raise ArgumentError(
            f"wanted first derivatives of {of}, got a second one: its backward has no gradient; "
            "use chela_bench.reference, or drop create_graph=True"
        )
