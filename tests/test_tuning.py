"""Autotuners choose anew at every shape, whatever their authors left out of their keys."""

from __future__ import annotations

import sys
import types

import pytest
import triton
import triton.language as tl
from triton.runtime._async_compile import active_mode

from chela_bench.bench import tuning

CONFIGS = [triton.Config({"BLOCK": size}) for size in (16, 32)]


@pytest.fixture
def kernels(monkeypatch):
    """A module with an autotuner, one under heuristics, and things that are none."""

    def kernel(x_ptr, T, BLOCK: tl.constexpr):
        pass

    module = types.ModuleType("a_peer_of_ours")
    module.alone = triton.autotune(configs=CONFIGS, key=["BLOCK"])(triton.jit(kernel))
    inner = triton.autotune(configs=CONFIGS, key=["BLOCK"], cache_results=True)(triton.jit(kernel))
    module.under = triton.heuristics({"EVEN": lambda args: True})(inner)
    module.again, module.nothing = module.alone, None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.alone, inner


def test_autotuners_are_found_once_alone_and_under_heuristics(kernels):
    ours = [tuner for tuner in tuning.autotuners() if tuner in kernels]
    assert len(ours) == 2


def test_every_shape_has_choices_of_its_own_and_finds_them_again(kernels):
    alone, inner = kernels
    tunings = tuning.Tunings()
    alone.cache["key"] = "chosen before"
    with tunings.at("T1024"):
        assert alone.cache == {} == inner.cache
        alone.cache["key"] = "for 1024"
        with tunings.at("T64"):  # a probe at another length
            assert alone.cache == {}
            alone.cache["key"] = "for 64"
        assert alone.cache == {"key": "for 1024"}
    assert alone.cache == {"key": "chosen before"}
    with tunings.at("T2048"):
        assert alone.cache == {}
    with tunings.at("T64"):
        assert alone.cache == {"key": "for 64"}


def test_one_imported_in_the_middle_belongs_to_the_shape_it_ran_at(kernels):
    alone, _ = kernels
    module = sys.modules.pop("a_peer_of_ours")
    tunings = tuning.Tunings()
    with tunings.at("T1024"):
        sys.modules["a_peer_of_ours"] = module
        alone.cache["key"] = "for 1024"
    assert alone.cache == {}
    with tunings.at("T1024"):
        assert alone.cache == {"key": "for 1024"}


def test_nothing_is_kept_on_disk(kernels):
    with tuning.Tunings().at("T1024"):
        assert not any(tuner.cache_results for tuner in kernels)


def test_an_error_inside_restores_what_was_chosen_outside(kernels):
    alone, _ = kernels
    alone.cache["key"] = "outside"
    with pytest.raises(ValueError, match="inside"), tuning.Tunings().at("T1024"):
        raise ValueError("inside")
    assert alone.cache == {"key": "outside"}


def test_candidates_compile_side_by_side_before_the_first_is_timed(kernels, monkeypatch):
    alone, _ = kernels
    events = []

    class Kernel:
        def run(self, x, T, *, BLOCK, warmup, **options):
            mode = active_mode.get()
            events.append(("compile" if warmup else "run", BLOCK, mode is not None))
            if mode is not None and BLOCK == 16:
                mode.submit(BLOCK, lambda: 1 // 0, None)  # it will not be timed either

    def bench(kernel_call, quantiles):
        kernel_call()
        return [1.0, 1.0, 1.0]

    monkeypatch.setattr(tuning, "_bench", bench)
    alone.fn = Kernel()
    with tuning.Tunings().at("T1024"):
        for _ in range(2):
            alone.run(None, 1024, grid=(1,), warmup=False)
    assert events == [
        ("compile", 16, True), ("compile", 32, True),
        ("run", 16, False), ("run", 32, False),  # timed
        ("run", 16, False), ("run", 16, False),  # called
    ]  # fmt: skip
