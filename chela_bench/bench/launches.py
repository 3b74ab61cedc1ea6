"""What a host function would launch on a GPU that is not there, found by running it.

The call is the one that the bench times, on meta tensors: the host function chooses its kernels,
block sizes, constants and options as it would on the card, and Triton's own launcher works out
types, constants and alignment; only its last step, compiling and launching, is caught. So nothing
here can disagree with what is launched. One process stands in for one GPU.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from chela_bench.bench.cases import Case, Session
from chela_bench.bench.job import Bench, Job
from chela_bench.bench.load import load
from chela_bench.bench.ops import Impl
from chela_bench.bench.registry import get_op
from chela_bench.kernels.launching import StandIn, stand_in
from chela_bench.profiles.nvml import Sampler
from chela_bench.records import Ceilings


@dataclass(frozen=True)
class Launch:
    """What Triton would compile: the very arguments of its own compiler."""

    source: Any  # triton.compiler.ASTSource, or Gluon's
    target: GPUTarget
    options: dict[str, Any]

    @property
    def kernel(self) -> str:
        """The function's name, without what all of ours share."""
        return str(self.source.name).removeprefix("_").removesuffix("_kernel")

    @property
    def key(self) -> str:
        """Of all that the compiler is given."""
        options = sorted((name, str(value)) for name, value in self.options.items())
        given = f"{self.source.hash()} {self.target} {options}"
        return hashlib.sha256(given.encode()).hexdigest()

    @property
    def is_gluon(self) -> bool:
        return bool(self.source.fn.is_gluon())

    @property
    def constants(self) -> dict[str, Any]:
        """Values of the constexprs by name; pointers that are None among them."""
        names = self.source.fn.arg_names
        return {names[path[0]]: value for path, value in self.source.constants.items()}

    @property
    def types(self) -> dict[str, str]:
        """Of the other arguments by name: `*bf16`, and `*bf16:16` if it is a multiple of 16."""
        names, attributes = self.source.fn.arg_names, self.source.attrs
        multiples = {names[path[0]] for path, said in attributes.items()
                     if ["tt.divisibility", 16] in said}  # fmt: skip
        return {
            name: f"{kind}:16" if name in multiples else str(kind)
            for name, kind in self.source.signature.items()
            if kind != "constexpr"
        }


class _NoDriver:
    """What Triton's launcher asks a driver, answered for the GPU that is stood in for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(int(self._target.arch), 10)


class Recorder:
    """This process's launches on one GPU that is not there."""

    def __init__(self, target: GPUTarget, processors: int) -> None:
        cuda = target.backend == "cuda"
        stand_in(StandIn(int(target.arch) if cuda else 0, processors))
        driver.set_active(_NoDriver(target))
        self._bench = _bench()
        self._target = target
        self._caught: list[Launch] = []
        JITFunction._do_compile = self._catch()

    def launches(self, case: Case, impl: Impl | None = None) -> list[Launch]:
        """What the case launches, each kernel and specialisation once. `impl`: a user's.

        Raises whatever the host function does.
        """
        op = get_op(case.op)
        impl = impl or op.impl(case.impl)
        job = Job(self._bench, case, op, impl, load(impl.target))
        self._caught = []
        inputs = job.draw()
        job.call(inputs)()
        return self._caught

    def _catch(self) -> Any:
        def catch(
            kernel: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any,
            attrs: Any, *_: Any,
        ) -> None:  # fmt: skip
            """In place of compiling. None: nothing is launched."""
            source = kernel.ASTSource(kernel, signature, constexprs, attrs)
            self._caught.append(Launch(source, self._target, dict(options.__dict__)))

        return catch


def _bench() -> Bench:
    """As the bench's worker has it, on meta tensors."""
    session = Session.model_validate(
        {"device": "meta", "timer": "event", "l2": "cold", "seed": 0, "inputs": "randn",
         "limits": {}}
    )  # fmt: skip
    return Bench(
        session=session, device=torch.device("meta"), device_name="meta", l2_bytes=0,
        ceilings=Ceilings(), sampler=lambda: Sampler(""), announce=lambda _: None,
    )  # fmt: skip
