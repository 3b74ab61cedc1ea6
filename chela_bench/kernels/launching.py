"""Launches Triton kernels at a fraction of what `kernel[grid](...)` costs the host.

Triton looks at every argument at every launch to find the compiled kernel that suits it. Kernels
here specialise on nothing but what the caller says and on which pointers are aligned to 16 bytes,
so that is enough to find it again; after that only the driver's own launch is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

_TRITON = ".".join(triton.__version__.split(".")[:2])

MODELLED = {2: torch.bfloat16, 4: torch.float32}  # dtypes that byte models count, by their bytes
Form = Callable[[int, tuple[object, ...]], None]


class Launcher:
    """Of one kernel whose arguments are pointers, then runtime scalars of one type each
    (`do_not_specialize`), then constexprs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.interpreted = not isinstance(kernel, triton.JITFunction)
        for parameter in () if self.interpreted else kernel.params:
            fixed = parameter.is_constexpr or parameter.do_not_specialize
            assert fixed or parameter.name.endswith("_ptr"), parameter.name
        self._variants: dict[tuple[Any, ...], Variant] = {}
        self._orders: dict[tuple[str, ...], list[str]] = {}

    def runs_on(self, device: torch.device) -> bool:
        """On a GPU, or where kernels are interpreted; on meta tensors while they stand for one."""
        return device.type == "cuda" or self.interpreted or _stand_in(device) is not None

    def constants(self, **values: object) -> tuple[object, ...]:
        """Values of the constexprs, in the kernel's order."""
        given = tuple(values)
        names = self._orders.get(given)
        if names is None:
            names = [name for name in self.kernel.arg_names if name in values]
            assert self.kernel.arg_names[-len(values) :] == names
            self._orders[given] = names
        return tuple([values[name] for name in names])

    def variant(
        self,
        constants: tuple[object, ...],
        num_warps: int,
        num_stages: int,
        device: torch.device,
        dtypes: tuple[torch.dtype | None, ...],
    ) -> Variant:
        """What to launch again and again with other tensors, on this device and of these dtypes (or
        of what tells them), and with other scalars."""
        key = (constants, num_warps, num_stages, device, dtypes)
        found = self._variants.get(key)
        if found is None:
            found = self._variants[key] = Variant(self, *key[:-1])
        return found

    def __call__(
        self,
        programs: int,
        tensors: Sequence[Tensor | None],
        scalars: tuple[int | float, ...],
        constants: tuple[object, ...],
        num_warps: int,
        num_stages: int,
    ) -> None:
        """Runs `programs` of it on the current device and stream."""
        first = tensors[0]
        assert first is not None
        dtypes = tuple([None if x is None else x.dtype for x in tensors])
        variant = self.variant(constants, num_warps, num_stages, first.device, dtypes)
        variant(programs, tensors, scalars)


class Variant:
    """A kernel with its constexprs, on one device, and for tensors of certain dtypes or none: the
    forms of it that are compiled differ in which pointers are aligned."""

    def __init__(
        self,
        launcher: Launcher,
        constants: tuple[object, ...],
        num_warps: int,
        num_stages: int,
        device: torch.device,
    ) -> None:
        self.launcher, self.constants, self.device = launcher, constants, device
        self.num_warps, self.num_stages = num_warps, num_stages
        self._forms: dict[tuple[bool, ...], Form] = {}

    def constant(self, name: str) -> Any:
        """The value of one constexpr."""
        names = self.launcher.kernel.arg_names[-len(self.constants) :]
        return self.constants[names.index(name)]

    def __call__(
        self, programs: int, tensors: Sequence[Tensor | None], scalars: tuple[int | float, ...]
    ) -> None:
        """Runs `programs` of it on the current device and stream."""
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        aligned = tuple([pointer % 16 == 0 for pointer in pointers])
        form = self._forms.get(aligned)
        if form is not None and not hooked():
            form(programs, (*pointers, *scalars, *self.constants))
            return
        compiled = self.launcher.kernel[(programs,)](
            *tensors, *scalars, *self.constants,
            num_warps=self.num_warps, num_stages=self.num_stages,
        )  # fmt: skip
        if not self.launcher.interpreted and compiled is not None:  # None: recorded, not run
            self._forms[aligned] = form_of(compiled, self.device)


def form_of(compiled: Any, device: torch.device) -> Form:
    """`compiled[programs, 1, 1](*arguments)` on the device's current stream, pointers as numbers,
    without the metadata that only hooks look at. Where Triton's launcher is one whose order of
    arguments is known, and the kernel needs no scratch memory, without its own Python too."""
    stream, index = torch._C._cuda_getCurrentRawStream, device.index
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    fixed: tuple[Any, ...] = (function, packed, None, None, None)
    launch, together = run, False
    known = type(run).__module__ == "triton.backends.nvidia.driver" and _TRITON in ("3.6", "3.7")
    if known and run.global_scratch_size == run.profile_scratch_size == 0:
        launch, fixed = run.launch, (function, run.launch_cooperative_grid, run.launch_pdl)
        if _TRITON == "3.6":  # scratch memory, metadata, launch metadata, hooks
            fixed += (None, None, packed, None, None, None)
        else:  # metadata, launch metadata, hooks, scratch memory
            fixed += (packed, *[None] * 5, run.arg_annotations, run.kernel_signature)
            together = True
    if together:
        return lambda programs, arguments: launch(programs, 1, 1, stream(index), *fixed, arguments)
    return lambda programs, arguments: launch(programs, 1, 1, stream(index), *fixed, *arguments)


def hooked() -> bool:
    """Whether a profiler wants to know of every launch."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which the tensor's GPU is the current one."""
    # Without the check of torch.cuda.current_device that CUDA has begun: it has, there is a tensor.
    if not tensor.is_cuda or tensor.get_device() == torch._C._cuda_getDevice():
        return _ALREADY
    return torch.cuda.device(tensor.device)


class StandIn(NamedTuple):
    """A GPU that is not there. Meta tensors stand for its memory, so that a host function goes
    through all that it would do on it, up to the launch, which somebody has to catch."""

    capability: int  # 90 on an H100; of another maker's, 0
    processors: int


_standing_in: StandIn | None = None


def stand_in(gpu: StandIn) -> None:
    """From here on, for the rest of the process: what was found out about meta tensors is kept by
    who asked, and would be wrong for another GPU."""
    global _standing_in
    assert _standing_in is None, "a process stands in for one GPU"
    _standing_in = gpu


def _stand_in(device: torch.device) -> StandIn | None:
    return _standing_in if device.type == "meta" else None


def is_on_gpu(x: Tensor) -> bool:
    """On one that is there, or that meta tensors stand for."""
    return x.is_cuda or _stand_in(x.device) is not None


def processors(device: torch.device) -> int:
    """SMs of a GPU; a few where kernels are interpreted."""
    if (gpu := _stand_in(device)) is not None:
        return gpu.processors
    if device.type != "cuda":
        return 4
    count: Any = torch.cuda.get_device_properties(device).multi_processor_count
    return int(count)


def has_wgmma(device: torch.device) -> bool:
    """Hopper alone: neither older GPUs nor newer ones have these tensor core instructions."""
    if (gpu := _stand_in(device)) is not None:
        return gpu.capability == 90
    if device.type != "cuda":
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.major == 9)


def capability(device: torch.device) -> str | None:
    """`9.0` of an H100; None of what is no NVIDIA GPU."""
    if (gpu := _stand_in(device)) is not None:
        return f"{gpu.capability // 10}.{gpu.capability % 10}" if gpu.capability else None
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    return f"{properties.major}.{properties.minor}"


def modelled_device() -> torch.device:
    """Whose kernels byte models count: a GPU's, those of one that is stood in for, or a CPU's."""
    if _standing_in is not None:
        return torch.device("meta")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cdiv(size: int, block: int) -> int:
    return -(-size // block)


_ALREADY: AbstractContextManager[object] = nullcontext()
