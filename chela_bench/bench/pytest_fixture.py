"""`chela_benchmark(op, impl, **shape)`: our engine measures, pytest-benchmark reports.

The engine's samples reach pytest-benchmark through its own `pedantic`, whose timer plays them back:
its statistics, table, `--benchmark-json`, storage and `--benchmark-compare` are of our samples, in
seconds. The point's other columns stand in `extra_info` under their own names.
"""

from __future__ import annotations

import functools
import operator
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, TypeGuard

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from chela_bench.bench import store
from chela_bench.bench.cases import Case, Limits, Session
from chela_bench.bench.config import Config, Size, find_config, load_config
from chela_bench.bench.registry import get_op
from chela_bench.bench.runner import Runner
from chela_bench.bench.sources import MACHINE_INFO, SOURCE, Machine, machine_of
from chela_bench.errors import ChelaBenchError, UsageError
from chela_bench.profiles.machine import choose_device, source_sha256
from chela_bench.records import ConfigValue, Direction, DType, Point, shape_label

Measure = Callable[..., Point]
_BENCHMARK = pytest.StashKey[Any]()  # of a test: its `benchmark`, which we report to
_FEWEST_S = 0.001  # of samples, where pytest-benchmark is disabled: the check is what counts


class _Given(BaseModel):
    """What a test asks for, before its op is asked."""

    model_config = ConfigDict(frozen=True)

    op: str
    impl: str
    direction: Direction
    dtype: DType
    config: dict[str, ConfigValue]
    shape: dict[str, Size]


class Plugin:
    """One worker for all tests, started by the first that measures."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._runners: dict[bool, Runner] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="chela-bench-"))
        self._machine: Machine | None = None

    @pytest.fixture
    def chela_benchmark(self, request: pytest.FixtureRequest, benchmark: Any) -> Measure:
        """Measures an implementation of an op and reports it as this test's benchmark.

        chela_benchmark(op, impl, *, direction="fwd", dtype=None, config=None, **shape) -> Point

        `shape` gives every dimension of the op. dtype: bf16 on a GPU and fp32 elsewhere unless
        given. The test fails if the result is not right or there is no time, and is skipped where
        the implementation cannot run. Of a test that does not pass there is nothing in the JSON.
        """
        request.node.stash[_BENCHMARK] = benchmark
        return functools.partial(self._measured, benchmark)

    def _measured(self, benchmark: Any, *names: str, **given: Any) -> Point:
        try:
            return self._measure(benchmark, *names, **given)
        except ChelaBenchError as error:
            reason = str(error)
        _without_time(benchmark)
        pytest.fail(reason, pytrace=False)

    def _measure(
        self,
        benchmark: Any,
        op: str,
        impl: str,
        *,
        direction: Direction = "fwd",
        dtype: DType | None = None,
        config: Mapping[str, ConfigValue] | None = None,
        **shape: int,
    ) -> Point:
        device = choose_device(self._config.getoption("chela_device", "auto"))
        kind = device.partition(":")[0]
        usual = _usual_dtype(kind) if dtype is None else dtype
        case = _case(op, impl, direction, usual, {} if config is None else config, shape)
        reason = (
            get_op(op)
            .impl(impl)
            .unavailable(kind, dtype=case.dtype, direction=direction, tokens=case.shape["T"])
        )
        if reason is not None:
            pytest.skip(f"{case.key}: {reason}")
        runner = self._runner(device, enabled=bool(benchmark.enabled))
        point, samples_ns = runner.measure(case)
        benchmark.extra_info.update(point.model_dump(mode="json"))
        benchmark.group = benchmark.group or "/".join(
            [op, direction, case.dtype, shape_label(case.shape)]
        )
        if point.outcome == "skipped":
            pytest.skip(f"{case.key}: {point.reason}")
        if point.outcome != "ok":
            _without_time(benchmark)
            pytest.fail(f"{case.key}: {point.outcome}: {point.reason}", pytrace=False)
        _report(benchmark, samples_ns, point)
        return point

    def _runner(self, device: str, *, enabled: bool) -> Runner:
        if enabled in self._runners:
            return self._runners[enabled]
        self._stop()  # one at a time holds the device
        given = self._config.getoption("chela_config", None)
        config = load_config(find_config(None if given is None else Path(given)))
        session = Session(
            device=device,
            timer=config.sweep.timer,
            l2=config.sweep.l2,
            seed=config.sweep.seed,
            inputs=config.sweep.inputs,
            limits=_limits(config, device, enabled=enabled),
        )
        runner = Runner(session, self._folder / "worker.log", ceilings={})
        runner.__enter__()
        self._runners = {enabled: runner}
        return runner

    def _stop(self) -> None:
        for runner in self._runners.values():
            runner.__exit__()
        self._machine = self.machine or self._machine
        self._runners = {}

    @property
    def machine(self) -> Machine | None:
        """As the worker saw it; None until a test has measured."""
        for runner in self._runners.values():
            return machine_of(runner.environment, runner.versions)
        return self._machine

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-benchmark's own
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Whatever a test measured before it failed is not in the JSON: the gate finds it missing.
        That one which failed earlier did not use its benchmark needs no warning."""
        report = yield
        if not report.passed and _BENCHMARK in item.stash:
            benchmark = item.stash[_BENCHMARK]
            benchmark.has_error = benchmark.skipped = True
        return report

    @pytest.hookimpl
    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        if self.machine is not None:
            machine_info[MACHINE_INFO] = described(self.machine)

    @pytest.hookimpl
    def pytest_benchmark_update_commit_info(self, commit_info: dict[str, Any]) -> None:
        if self.machine is not None:
            commit_info[SOURCE] = source_sha256()

    @pytest.hookimpl(tryfirst=True)  # before pytest-benchmark's own, which compares both whole
    def pytest_benchmark_compare_machine_info(
        self, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
    ) -> None:
        """Refuses a stored benchmark of ours that another device measured."""
        then = compared_benchmark.get("machine_info", {}).get(MACHINE_INFO)
        if not isinstance(then, dict):
            return
        now = described(self._here())
        machine_info[MACHINE_INFO] = now
        for what in ("device", "name", "uuid"):
            if then.get(what) != now.get(what):
                raise pytest.UsageError(
                    f"--benchmark-compare: the stored benchmark is of {_said(then)}; this is "
                    f"{_said(now)}. Times of two machines do not compare"
                )

    def _here(self) -> Machine:
        from chela_bench.bench.again import here

        if self._machine is None:
            try:
                self._machine = here(choose_device(self._config.getoption("chela_device", "auto")))
            except ChelaBenchError as error:
                raise pytest.UsageError(f"chela-bench: {error}") from error
        return self._machine

    def pytest_unconfigure(self) -> None:
        import shutil

        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def described(machine: Machine) -> dict[str, str]:
    """As pytest-benchmark's machine_info carries it."""
    from chela_bench.bench.baseline import facts

    return facts(machine)


def _said(machine: Mapping[str, str]) -> str:
    uuid = machine.get("uuid")
    return f"{machine.get('name')}" + (f" ({uuid})" if uuid else "")


def _without_time(benchmark: Any) -> None:
    """Used, and neither in the table nor in the JSON, where the gate finds it missing."""
    benchmark.has_error = benchmark.disabled = True
    benchmark.pedantic(lambda: None)


def _report(benchmark: Any, samples_ns: Sequence[float], point: Point) -> None:
    """Hands the samples over: `pedantic` asks its timer before and after each round."""
    if benchmark.enabled:
        benchmark._timer = _played_back(samples_ns, point)
    benchmark.pedantic(lambda: None, rounds=len(samples_ns), iterations=1)


def _played_back(samples_ns: Sequence[float], point: Point) -> Callable[[], float]:
    times: Iterator[float] = iter([t for ns in samples_ns for t in (0.0, ns / 1e9)])

    def timer() -> float:
        return next(times)

    timer.__name__ = "wall" if point.time_ns is None or point.device == "cpu" else point.timer
    timer.__qualname__ = timer.__name__
    timer.__module__ = "chela_bench"
    return timer


def _counts(size: object) -> TypeGuard[SupportsIndex]:
    """An integer of any kind, such as numpy's."""
    return hasattr(size, "__index__") and not isinstance(size, bool)


def _case(
    op: str,
    impl: str,
    direction: Direction,
    dtype: DType,
    config: Mapping[str, ConfigValue],
    shape: Mapping[str, int],
) -> Case:
    sizes = {dim: operator.index(size) if _counts(size) else size for dim, size in shape.items()}
    given = {"op": op, "impl": impl, "direction": direction, "dtype": dtype, "config": config,
             "shape": sizes}  # fmt: skip
    try:
        shape = _Given.model_validate(given).shape
    except ValidationError as error:
        problem, came = store.first_problem(error), error.errors()[0]["input"]
        raise UsageError(f"chela_benchmark: {problem}; got {came!r}") from None
    known = get_op(op)
    if ".py:" in impl:
        raise UsageError(
            f"the fixture measures implementations that have a name, got {impl!r}: give it one by "
            "an entry point in the group chela_bench.impls, or sweep it with --impl"
        )
    known.impl(impl)
    missing = [dim for dim in known.dims if dim not in shape]
    unknown = [dim for dim in shape if dim not in known.dims]
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
        raise UsageError(f"the shape of {op} {problem}; it takes {', '.join(known.dims)}")
    options = {name: values[0] for name, values in known.options.items()}
    return Case(
        op=op,
        impl=impl,
        direction=direction,
        dtype=dtype,
        shape={dim: shape[dim] for dim in known.dims},
        config={**options, **config},
    )


def _usual_dtype(kind: str) -> DType:
    return "bf16" if kind == "cuda" else "fp32"


def _limits(config: Config, device: str, *, enabled: bool) -> Limits:
    limits = config.limits
    if device == "cpu" and "cpu" in config.presets:
        limits = config.limits_with(config.presets["cpu"])
    return limits if enabled else limits.model_copy(update={"sample_s": _FEWEST_S})
