"""Products of tokens with weights, cuBLAS's, whose gradients meet in one buffer.

    out = x W^T + b        dx += dout W        dW = dout^T x        db = sum_t dout_t

Several products of the same x each make a part of its gradient, which PyTorch adds up in passes of
their own: 6 bytes an element in 16 bits for each. Here a product hands on x to what follows, so
that the gradient of all that comes back to it, and its own part is added by the product that makes
it (beta = 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chela_bench.errors import ArgumentError
from chela_bench.kernels.dispatch import autocast, is_plain


class Projection(NamedTuple):
    """Of a token's x."""

    out: Tensor
    x: Tensor  # for whatever else is computed from it
    bias: Tensor | None  # if whoever takes `out` has to give it a gradient, the sum of out's


def projected(linear: nn.Linear, x: Tensor) -> Projection:
    """linear(x), for kernels of this package to go on with: x [..., D], out [..., N], both in
    autocast's dtype where that is on. Without gradients, and where PyTorch watches (torch.compile,
    functorch), it is `called`. Differentiable once.

    What is computed from x has a gradient that nobody else holds. So all linear maps of one x have
    to be `are_plain`; others, of which this is not known, are called.
    """
    if not torch.is_grad_enabled() or not is_plain(x, linear.weight):
        return called(linear, x)
    bias: Tensor | None = linear.bias
    x, weight = autocast(x, linear.weight)
    rounded = None if bias is None else bias.detach().to(weight.dtype)
    out, handed_on = _Projected.apply(x, weight, rounded)
    is_trained = bias is not None and bias.requires_grad
    return Projection(out, handed_on if x.requires_grad else x, bias if is_trained else None)


def called(linear: nn.Linear, x: Tensor) -> Projection:
    """linear(x) by PyTorch, which gives the bias its gradient."""
    return Projection(linear(x), x, None)


def are_plain(*modules: nn.Module | None) -> bool:
    """Whether all, but for None, are nn.Linear itself, and nobody hooked to a call of theirs."""
    for linear in modules:
        if linear is None:
            continue
        own = linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks
        if type(linear) is not nn.Linear or any(own) or linear._backward_pre_hooks:
            return False
    return True


class _Projected(torch.autograd.Function):
    """x, W, b -> x W^T + b, x. b has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])  # no view, so that it can be added to
        rows, out_rows = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if bias is None:
            torch.mm(rows, weight.T, out=out_rows)
        else:
            torch.addmm(bias, rows, weight.T, out=out_rows)
        return out, x

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dx: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise ArgumentError(
                "wanted first derivatives of a projection, got a second one: its backward has no "
                "gradient; use chela_bench.reference, or drop create_graph=True"
            )
        if dout is None:
            return dx, None, None
        x, weight = ctx.saved_tensors
        rows = dout.reshape(-1, dout.shape[-1])
        dweight = rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        if dx is None:
            dx = rows @ weight
        elif dx.is_contiguous():  # written by who made it for this node, which alone has it
            dx.view(-1, dx.shape[-1]).addmm_(rows, weight)
        else:
            dx = torch.addmm(dx.reshape(-1, dx.shape[-1]), rows, weight)
        return dx.view(x.shape), dweight, None
