"""An operator that torch.compile and others see, and that costs an eager call no dispatcher.

Called outside of tracing an operator launches its kernels without PyTorch's dispatcher, which costs
the host as much as the launch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels.dispatch import is_plain

_library = torch.library.Library("chela_bench", "FRAGMENT")


class Operator:
    """One operator and its gradient's, known to PyTorch, and a way to call it without PyTorch.

    forward and backward launch; outputs and gradients are what they return, without contents; save
    and differentiate are as torch.library.register_autograd wants them, and differentiate takes the
    backward to call last: None where PyTorch's own operators are enough. Differentiable once.
    """

    def __init__(
        self,
        name: str,
        forward: tuple[str, Callable[..., Any], Callable[..., Any]],
        backward: tuple[str, Callable[..., Any], Callable[..., Any]] | None,
        save: Callable[..., None],
        differentiate: Callable[..., tuple[Tensor | None, ...]],
    ) -> None:
        self.forward = forward[1]
        self.registered = register(f"{name}_forward", *forward)
        qualified = f"chela_bench::{name}"
        launched_backward: Callable[..., Any] | None = None
        registered_backward: Callable[..., Any] | None = None
        if backward is not None:
            launched_backward = backward[1]
            registered_backward = register(f"{name}_backward", *backward)
            torch.library.register_autograd(
                f"{qualified}_backward", partial(_differentiate_twice, name), lib=_library
            )

        def gradients(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
            plain = not torch.is_grad_enabled() and is_plain(*dys)
            return differentiate(ctx, *dys, launched_backward if plain else registered_backward)

        torch.library.register_autograd(
            f"{qualified}_forward", gradients, setup_context=save, lib=_library
        )

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                y = forward[1](*arguments)
                save(ctx, arguments, y)
                return y

            @staticmethod
            def backward(ctx: Any, *dys: Tensor) -> Any:
                return gradients(ctx, *dys)

        # Without the Python of Function.apply: is_plain looks for transforms.
        self.apply: Callable[..., Any] = super(torch.autograd.Function, Eager).apply

    def __call__(self, *arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if not is_plain(*tensors):
            return self.registered(*arguments)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return self.forward(*arguments)
        unwrap = torch._C._functorch.unwrap_if_dead
        return self.apply(*[unwrap(x) if isinstance(x, Tensor) else x for x in arguments])


def register(
    name: str, schema: str, function: Callable[..., Any], outputs: Callable[..., Any]
) -> Callable[..., Any]:
    """torch.ops.chela_bench.<name>, which runs `function`; `outputs`: the same without contents."""
    _library.define(f"{name}{schema}")
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"chela_bench::{name}", outputs, lib=_library)
    registered: Callable[..., Any] = getattr(torch.ops.chela_bench, name)
    return registered


def _differentiate_twice(name: str, ctx: Any, *gradients: Tensor | None) -> None:
    raise ArgumentError(
        f"wanted first derivatives of {name}, got a second one: its backward has no gradient; use "
        "chela_bench.reference, or drop create_graph=True"
    )
