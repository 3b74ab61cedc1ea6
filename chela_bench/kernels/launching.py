"""Launches Triton kernels at a fraction of what `kernel[grid](...)` costs the host.

Triton looks at every argument at every launch to find the compiled kernel that suits it. Kernels
here specialise on nothing but what the caller says and on which pointers are aligned to 16 bytes,
so that is enough to find it again; after that only the driver's own launch is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor


class Launcher:
    """Of one kernel whose arguments are pointers, then runtime scalars of one type each
    (`do_not_specialize`, or annotated), then constexprs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    @property
    def interpreted(self) -> bool:
        return not isinstance(self.kernel, triton.JITFunction)

    def constants(self, **values: object) -> tuple[object, ...]:
        """Values of the constexprs, in the kernel's order."""
        names = [name for name in self.kernel.arg_names if name in values]
        assert self.kernel.arg_names[-len(values) :] == names
        return tuple([values[name] for name in names])

    def __call__(
        self,
        programs: int,
        tensors: Sequence[Tensor | None],
        scalars: Sequence[int | float],
        constants: tuple[object, ...],
        num_warps: int,
        num_stages: int,
    ) -> None:
        """Runs `programs` of it on the current device and stream."""
        kinds = [None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors]
        first = tensors[0]
        assert first is not None
        key = (constants, num_warps, num_stages, first.device.index, *kinds)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[programs, 1, 1](*tensors, *scalars, *constants)
            return
        compiled = self.kernel[(programs,)](
            *tensors, *scalars, *constants, num_warps=num_warps, num_stages=num_stages
        )
        if not self.interpreted:
            self._compiled[key] = compiled


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which the tensor's GPU is the current one."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _ALREADY
    return torch.cuda.device(tensor.device)


_ALREADY: AbstractContextManager[object] = nullcontext()
