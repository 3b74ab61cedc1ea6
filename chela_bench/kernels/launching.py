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
        self._variants: dict[tuple[Any, ...], Variant] = {}

    @property
    def interpreted(self) -> bool:
        return not isinstance(self.kernel, triton.JITFunction)

    def constants(self, **values: object) -> tuple[object, ...]:
        """Values of the constexprs, in the kernel's order."""
        names = [name for name in self.kernel.arg_names if name in values]
        assert self.kernel.arg_names[-len(values) :] == names
        return tuple([values[name] for name in names])

    def variant(self, constants: tuple[object, ...], num_warps: int, num_stages: int) -> Variant:
        """What to launch again and again with other tensors and scalars."""
        key = (constants, num_warps, num_stages)
        found = self._variants.get(key)
        if found is None:
            found = self._variants[key] = Variant(self, *key)
        return found

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
        self.variant(constants, num_warps, num_stages)(programs, tensors, scalars)


class Variant:
    """A kernel with its constexprs, of which there may be several compiled forms."""

    def __init__(
        self,
        launcher: Launcher,
        constants: tuple[object, ...],
        num_warps: int,
        num_stages: int,
    ) -> None:
        self.launcher, self.constants = launcher, constants
        self.num_warps, self.num_stages = num_warps, num_stages
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, programs: int, tensors: Sequence[Tensor | None], scalars: Sequence[int | float]
    ) -> None:
        """Runs `programs` of it on the current device and stream."""
        first = tensors[0]
        assert first is not None
        device = first.device.index
        kinds = [None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors]
        compiled = self._compiled.get((device, *kinds))
        if compiled is not None:
            launch(compiled, programs, device, (*tensors, *scalars, *self.constants))
            return
        compiled = self.launcher.kernel[(programs,)](
            *tensors, *scalars, *self.constants,
            num_warps=self.num_warps, num_stages=self.num_stages,
        )  # fmt: skip
        if not self.launcher.interpreted:
            self._compiled[device, *kinds] = compiled


def launch(compiled: Any, programs: int, device: int, arguments: tuple[object, ...]) -> None:
    """`compiled[programs, 1, 1](*arguments)`, without the metadata that only hooks look at."""
    runtime = triton.knobs.runtime
    if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
        compiled[programs, 1, 1](*arguments)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(
        programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *arguments,
    )  # fmt: skip


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which the tensor's GPU is the current one."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _ALREADY
    return torch.cuda.device(tensor.device)


_ALREADY: AbstractContextManager[object] = nullcontext()
