"""A compiled kernel is found again by what it was compiled for, and by nothing less."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher

from chela_bench.kernels import (
    linear_attention_recurrent,
    linear_attention_sweep,
    linear_attention_walk,
)
from chela_bench.kernels.launching import Launcher, form_of
from chela_bench.kernels.linear_attention_config import RUNTIME


class Kernel:
    """As triton.jit leaves one: indexed by a grid, called, and it returns what it compiled."""

    def __init__(self):
        self.arg_names = ["x_ptr", "y_ptr", "T", "BLOCK", "IS_CAUSAL"]
        self.params = [
            SimpleNamespace(name=name, is_constexpr=name.isupper() and name != "T",
                            do_not_specialize=name == "T")
            for name in self.arg_names
        ]  # fmt: skip
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, num_warps, num_stages):
            self.compiled.append((grid, arguments, num_warps, num_stages))
            return Compiled(self)

        return run


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel):
        self.kernel = kernel

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        assert (stream, function, metadata) == (17, "function", "metadata")
        assert launch_metadata is enter is leave is None
        self.kernel.launched.append(((x, y, z), arguments))


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(triton, "JITFunction", Kernel)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 17, raising=False)
    return Launcher(Kernel())


def test_constants_come_in_the_kernels_order(launch):
    assert launch.constants(IS_CAUSAL=True, BLOCK=64) == (64, True)
    with pytest.raises(AssertionError):
        launch.constants(BLOCK=64)


def test_the_second_launch_goes_straight_to_the_compiled_kernel(launch):
    x, y = torch.zeros(64), torch.zeros(64)
    launch(7, (x, None), (100,), (64, True), 4, 2)
    launch(9, (y, None), (200,), (64, True), 4, 2)
    assert launch.kernel.compiled == [((7,), (x, None, 100, 64, True), 4, 2)]
    [(grid, arguments)] = launch.kernel.launched
    assert grid == (9, 1, 1)
    assert arguments == (y.data_ptr(), 0, 200, 64, True)


def test_a_profilers_hooks_are_called(launch, monkeypatch):
    for _ in range(2):
        launch(1, (torch.zeros(4), None), (1,), (64, True), 4, 2)
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    launch(3, (torch.zeros(4), None), (1,), (64, True), 4, 2)
    assert len(launch.kernel.launched) == 1
    assert [grid for grid, *_ in launch.kernel.compiled] == [(1,), (3,)]  # by Triton itself


def test_whatever_it_was_compiled_for_tells_kernels_apart(launch):
    x = torch.zeros(64)
    different = [
        ((x, None), (64, True), 4, 2),
        ((x, x), (64, True), 4, 2),
        ((x.half(), None), (64, True), 4, 2),
        ((x[1:], None), (64, True), 4, 2),  # not aligned to 16 bytes
        ((x, None), (32, True), 4, 2),
        ((x, None), (64, True), 8, 2),
        ((x, None), (64, True), 4, 3),
    ]
    for _ in range(2):
        for tensors, constants, num_warps, num_stages in different:
            launch(1, tensors, (1,), constants, num_warps, num_stages)
    assert len(launch.kernel.compiled) == len(launch.kernel.launched) == len(different)


def test_a_form_launches_what_tritons_launcher_would(launch):
    """Each argument at its place, in the version that is installed."""
    seen = []
    compiled = launched_by_triton(lambda *arguments: seen.append(arguments))
    compiled.run(5, 1, 1, 17, "function", (4, 1, 0), None, None, None, 1024, 0, 2.0, True)
    form_of(compiled, torch.device("cuda", 0))(5, (1024, 0, 2.0, True))
    assert seen[0] == seen[1]


def test_scratch_memory_is_left_to_tritons_launcher(launch):
    compiled = launched_by_triton(None)
    compiled.run.profile_scratch_size = 8
    calls = []
    compiled.run.__class__ = type(
        "Launcher",
        (CudaLauncher,),
        {"__module__": CudaLauncher.__module__, "__call__": lambda _, *x: calls.append(x)},
    )
    form_of(compiled, torch.device("cuda", 0))(5, (1024, 2.0))
    assert calls == [(5, 1, 1, 17, "function", (4, 1, 0), None, None, None, 1024, 2.0)]


def launched_by_triton(launch):
    run = CudaLauncher.__new__(CudaLauncher)
    run.launch, run.num_ctas = launch, 1
    run.global_scratch_size = run.profile_scratch_size = 0
    run.global_scratch_align = run.profile_scratch_align = 1
    run.launch_cooperative_grid, run.launch_pdl = False, True
    run.arg_annotations, run.kernel_signature = ["annotations"], b"signature"
    return SimpleNamespace(run=run, function="function", packed_metadata=(4, 1, 0))


def test_an_interpreted_kernel_is_always_called():
    launch = Launcher(Kernel())
    for _ in range(2):
        launch(1, (torch.zeros(4),), (1,), (64, True), 4, 2)
    assert len(launch.kernel.compiled) == 2


LAUNCHERS = [
    linear_attention_walk._walk,
    linear_attention_walk.walk_by_hand(),
    linear_attention_walk._sum,
    linear_attention_walk._scan,
    linear_attention_sweep._sweep,
    linear_attention_sweep.sweep_by_hand(),
    linear_attention_sweep._add,
    linear_attention_recurrent._recurrent,
]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda x: x.kernel.fn.__name__)
def test_no_runtime_scalar_makes_another_kernel(launcher):
    """The launcher does not look at them: one that Triton specialised would be launched wrongly."""
    parameters = inspect.signature(launcher.kernel.fn).parameters.values()
    scalars = [
        parameter.name
        for parameter in parameters
        if not parameter.name.endswith("_ptr") and "constexpr" not in str(parameter.annotation)
    ]
    assert scalars and set(scalars) <= {*RUNTIME, "size"}


def test_a_scalar_that_triton_would_specialise_is_no_runtime_scalar(monkeypatch):
    """A kernel compiled for T = 4096 would be launched for T = 3001."""
    monkeypatch.setattr(triton, "JITFunction", Kernel)
    kernel = Kernel()
    kernel.params[2].do_not_specialize = False
    with pytest.raises(AssertionError, match="T"):
        Launcher(kernel)
