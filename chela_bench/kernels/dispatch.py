"""What PyTorch does around an operator, for calls that go past its dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor


def is_plain(*tensors: Tensor) -> bool:
    """Nobody watches whom a call past the dispatcher would miss: no tracing, mode or subclass."""
    for x in tensors:
        if type(x) not in _PLAIN:
            return False
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch.autocast would have them, where it is on; all on the device of the first."""
    kind = "cuda" if tensors[0].is_cuda else tensors[0].device.type
    if kind == "meta":  # which torch.autocast does not know
        return tensors
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in tensors)
