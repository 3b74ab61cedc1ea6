"""Triton's autotuners choose anew at every shape.

An autotuner remembers its choice by the arguments that its author named, often without B or T:
flash-linear-attention 0.6's kernels would run every length with what suited the first one, and
keep that on disk for later runs. Here each shape has choices of its own, in memory alone.

They would also compile one candidate after another: fla's forward and backward have some 130. Here
an autotuner's candidates compile side by side, then they are timed in turn.

Seen are autotuners that lie in a module's namespace, alone or under `triton.heuristics`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Of each candidate, in ms. Triton's own 25 and 100, times fla's 51 candidates, are 6.4 s a shape.
WARMUP_MS, REPEAT_MS = 5, 20

_Cache = dict[Any, Any]


class Tunings:
    """What every autotuner in the process has chosen, by shape."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[Any, _Cache]] = {}
        self._shape = ""

    @contextlib.contextmanager
    def at(self, shape: str) -> Iterator[None]:
        """Autotuners know what they chose at `shape` before, and nothing of other shapes."""
        outside = self._shape
        self._switch(shape)
        try:
            yield
        finally:
            self._switch(outside)

    def _switch(self, shape: str) -> None:
        leaving, entering = (self._kept.setdefault(name, {}) for name in (self._shape, shape))
        for tuner in autotuners():
            leaving[tuner] = tuner.cache
            tuner.cache = entering.get(tuner, {})
            tuner.cache_results = False  # on disk
            if getattr(tuner, "_do_bench", None) is None:
                tuner.do_bench = _bench
            if "prune_configs" not in vars(tuner):
                tuner.prune_configs = _compiling_ahead(tuner)
        self._shape = shape


def autotuners() -> list[Any]:
    """All triton.autotune objects in the namespaces of imported modules."""
    if "triton.runtime.autotuner" not in sys.modules:
        return []
    from triton.runtime.autotuner import Autotuner, Heuristics

    found: dict[int, Any] = {}
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            while issubclass(type(value), Heuristics):  # isinstance would ask lazy objects
                value = value.fn
            if issubclass(type(value), Autotuner):
                found[id(value)] = value
    return list(found.values())


def _compiling_ahead(tuner: Any) -> Callable[[dict[str, Any]], list[Any]]:
    """The tuner's `prune_configs`, its last step before it times the candidates that are left,
    which leaves them compiled. One that does not compile fails when timed, as it would have."""
    prune: Callable[[dict[str, Any]], list[Any]] = tuner.prune_configs

    def prune_and_compile(arguments: dict[str, Any]) -> list[Any]:
        from triton import AsyncCompileMode

        configs = prune(arguments)
        with (
            ThreadPoolExecutor(min(len(configs), os.cpu_count() or 1)) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
        ):
            for config in configs:
                chosen = {**arguments, **config.all_kwargs(), "warmup": True}
                tuner.fn.run(*tuner.nargs.values(), **chosen)
        return configs

    return prune_and_compile


def _bench(kernel_call: Callable[[], object], quantiles: Sequence[float]) -> Any:
    from triton.runtime import driver

    bench = driver.active.get_benchmarker()
    return bench(kernel_call, warmup=WARMUP_MS, rep=REPEAT_MS, quantiles=quantiles)
