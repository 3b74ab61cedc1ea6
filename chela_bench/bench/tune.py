"""One tuning: every configuration of an implementation compiled, checked, and timed in turn.

What cannot fit is known before it is tried (atlas.py); what is left is measured one by one, as a
sweep would; then the right configurations of each call are timed in turn (interleave.py). Every
configuration is a point of the run, whatever became of it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from chela_bench.bench import atlas, plan, store
from chela_bench.bench.cases import Case
from chela_bench.bench.config import Config
from chela_bench.bench.plan import Flags, Settings
from chela_bench.bench.registry import all_ops, get_op
from chela_bench.bench.runner import Runner, WorkerDied, WorkerHung, shuffled, utc_now
from chela_bench.bench.stats import summarise
from chela_bench.bench.sweep import Listener, disturbances, header, known_ceilings
from chela_bench.errors import EnvironmentProblem, UsageError
from chela_bench.profiles.occupancy import ARCHS, find_arch
from chela_bench.records import (
    AtlasRow,
    ConfigValue,
    Device,
    Environment,
    Outcome,
    Point,
    Run,
    Static,
)

FIRST_LOOK_S = 0.2  # of samples of one configuration, before all are timed in turn
IN_TURN_S = 0.4  # for each of them, of a call


class TuneSettings(Settings):
    """A sweep's over one implementation, and what it is compiled for beforehand."""

    command: Literal["tune"] = "tune"
    arch: str | None  # None: none that is known; nothing is pruned
    interpreted: bool = False  # Triton's interpreter on a CPU: right or wrong, no time that counts


@dataclass(frozen=True)
class Tuned:
    folder: Path
    run: Run
    points: list[Point]
    untried: list[Case]  # there was no time for them


def resolve(config: Config, flags: Flags, device: str, *, arch: str | None) -> TuneSettings:
    """Raises UsageError where there is nothing to tune, EnvironmentProblem where it cannot run."""
    op = get_op(flags.ops[0])
    if not flags.impls:
        tunable = [impl for impl in atlas.triton_impls(op) if impl.axes]
        if not tunable:
            able = [x.name for x in all_ops() if any(i.axes for i in atlas.triton_impls(x))]
            raise UsageError(f"{op.name} has no settings to tune; there are: {', '.join(able)}")
        flags = replace(flags, impls=[tunable[0].name])
    if not flags.axes:
        impl = next((i for i in op.impls if i.name == flags.impls[0]), None)
        names = ", ".join((*op.options, *((impl.axes or ()) if impl else ())))
        raise UsageError(
            f"tune wants settings to try: --axis NAME=VALUE,VALUE; {flags.impls[0]} has: "
            f"{names or 'any'}"
        )
    interpreted = device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    settings = plan.resolve(config, flags, [device])
    [(_, impls)] = settings.impls.items()
    if len(impls) > 1:
        raise UsageError(f"tune takes one implementation; got {', '.join(impls)}")
    chosen = plan.find_impl(settings, op, impls[0])
    if device == "cpu" and "cpu" not in chosen.devices and not interpreted:
        raise EnvironmentProblem(
            f"{chosen.name} needs a GPU; compile its block sizes without one: chela-bench atlas "
            f"{op.name}, or try them in Triton's interpreter, whose times mean nothing: "
            "TRITON_INTERPRET=1 chela-bench tune ... --device cpu --dtype fp32"
        )
    for direction in settings.directions:
        if direction not in chosen.directions:
            raise UsageError(
                f"{chosen.name} has no {direction}; it has: {', '.join(chosen.directions)}"
            )
    if arch is not None:
        find_arch(arch)
    limits = settings.limits.model_copy(
        update={"sample_s": min(FIRST_LOOK_S, settings.limits.sample_s)}
    )
    given = {**settings.model_dump(), "limits": limits.model_dump()}
    return TuneSettings.model_validate({**given, "arch": arch, "interpreted": interpreted})


def cases(settings: TuneSettings) -> list[Case]:
    """The defaults first, call by call, then what the axes make of it."""
    wanted = plan.cases(settings)
    [(op_name, [impl_name])] = settings.impls.items()
    op = get_op(op_name)
    impl = plan.find_impl(settings, op, impl_name)
    found: dict[str, Case] = {}
    for case in wanted:
        options = {name: case.config[name] for name in op.options if name in case.config}
        default = case.model_copy(update={"config": options})
        if impl.axes is not None:  # a user's function need not have any
            found.setdefault(default.key, default)
        found[case.key] = case
    return list(found.values())


def call_of(case: Case | Point) -> tuple[str, ...]:
    """What configurations are compared at."""
    sizes = tuple(f"{name}{size}" for name, size in case.shape.items())
    return case.op, case.impl, case.direction, case.dtype, *sizes


class Tuning:
    """Measures all cases that the folder does not hold yet, as far as the budget reaches.

    KeyboardInterrupt passes through with everything measured so far on disk.
    """

    def __init__(
        self,
        settings: TuneSettings,
        folder: Path,
        listener: Listener,
        *,
        budget_s: float | None = None,
        resumed: Run | None = None,
        retry: frozenset[Outcome] = frozenset(),
        compile_limit_s: float = atlas.LIMIT_S,
    ) -> None:
        self._settings, self._path, self._listener = settings, folder, listener
        self._resumed, self._retry = resumed, retry
        self._compile_limit_s = compile_limit_s
        self._deadline = None if budget_s is None else time.monotonic() + budget_s
        self._statics: dict[str, Static] = {}

    def run(self) -> Tuned:
        settings, path = self._settings, self._path
        wanted = cases(settings)
        [session] = settings.sessions()
        with store.RunFolder(path) as folder:
            ceilings = known_ceilings(self._resumed)
            with Runner(session, folder.log, ceilings=ceilings) as runner:
                self._runner, self._folder = runner, folder
                device = Device(environment=runner.environment, ceilings=runner.ceilings)
                args = (settings, len(wanted), path, [device], runner.versions, self._resumed)
                run = header(*args)
                if self._resumed is not None:
                    run = run.model_copy(update={"finished_utc": None})
                folder.write_run(run)
                done = {p.key for p in store.load_points(path) if p.outcome not in self._retry}
                left = [case for case in wanted if case.key not in done]
                self._listener.started(run, path, len(left), disturbances([runner]))
                runnable = self._pruned(wanted, left, runner.environment)
                untried = self._measure(runnable)
                self._in_turn(wanted, {case.key for case in runnable} - {c.key for c in untried})
            if not untried:
                run = run.model_copy(update={"finished_utc": utc_now()})
                folder.write_run(run)
        return Tuned(path, run, store.load_points(path), untried)

    @property
    def _left_s(self) -> float:
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    def _pruned(
        self, wanted: Sequence[Case], left: Sequence[Case], environment: Environment
    ) -> list[Case]:
        """Of those left the ones that compile and fit; the others become points."""
        arch = self._settings.arch or arch_of(environment)
        if arch is None or not left:
            if left:
                self._listener.said("nothing is pruned: the atlas knows no such architecture")
            return list(left)
        options = atlas.Options(
            limit_s=self._compile_limit_s,
            keep=not self._settings.interpreted,
            processors=environment.sm_count,
        )
        self._listener.said(f"compiling {len(wanted)} configurations for {arch}")
        found = atlas.compile_all(
            wanted, [arch], options,
            user_impls=self._settings.user_impls,
            progress=lambda name, done, total: self._listener.phase(f"compile {done}/{total}"),
        )  # fmt: skip
        refused = {call_of_config(r.asked, r.tokens, r.direction): r.reason for r in found.refused}
        runnable = []
        own = _distinguishing(wanted, found, arch)
        for case in left:
            static = self._statics[case.key] = static_of(own[case.key])
            wrong = next((row for row in found.rows_of(arch, case) if not row.fits), None)
            reason = refused.get(call_of_config(case.config, case.shape["T"], case.direction))
            if wrong is not None and wrong.outcome != "ok":
                text = f"{wrong.kernel} for {arch}: {wrong.reason}"
                self._record(self._failed(case, wrong.outcome, text, static))
            elif reason is not None:
                self._record(self._failed(case, "skipped", f"for {arch}: {reason}", static))
            else:
                runnable.append(case)
        return runnable

    def _measure(self, runnable: Sequence[Case]) -> list[Case]:
        """Each by itself, the defaults first; returns those that there was no time for."""
        order = list(shuffled(list(runnable), self._settings.seed))
        options = get_op(order[0].op).options if order else {}
        order.sort(key=lambda case: set(case.config) > set(options))  # stable
        for place, case in enumerate(order):
            if self._left_s < self._in_turn_s(place):
                return order[place:]
            self._listener.case(case)
            point, samples = self._runner.measure(case, self._listener.phase)
            static = self._statics.get(case.key, Static())
            self._record(point.model_copy(update={"static": static}), samples)
        return []

    def _in_turn_s(self, configurations: int) -> float:
        return max(2.0, IN_TURN_S * configurations)

    def _in_turn(self, wanted: Sequence[Case], new: set[str]) -> None:
        """Right configurations of each call, where one of them is new."""
        points = {point.key: point for point in store.load_points(self._path)}
        groups = [
            [case for case in group if _is_timed(points.get(case.key))]
            for _, group in itertools.groupby(sorted(wanted, key=call_of), key=call_of)
        ]
        waiting = [g for g in groups if len(g) > 1 and _is_due(g, points, new)]
        for place, group in enumerate(waiting):
            share = self._left_s / (len(waiting) - place)
            seconds = min(self._in_turn_s(len(group)), max(1.0, share))
            self._listener.case(group[0])
            try:
                found, rounds = self._runner.interleave(group, seconds, self._listener.phase)
            except (WorkerDied, WorkerHung) as error:
                self._listener.said(
                    f"not timed in turn, each by itself instead: {call_of(group[0])}: {error}"
                )
                continue
            for case in group:
                samples = found.get(case.key)
                if samples:
                    changes = {"time_ns": summarise(samples), "rounds": rounds}
                    point = points[case.key].model_copy(update=changes)
                    self._folder.append(point, samples)

    def _failed(self, case: Case, outcome: Outcome, reason: str, static: Static) -> Point:
        point = self._runner.failed(case, outcome, reason)
        return point.model_copy(update={"static": static})

    def _record(self, point: Point, samples: Sequence[float] = ()) -> None:
        self._folder.append(point, list(samples))
        self._listener.finished(point)


def call_of_config(
    config: Mapping[str, ConfigValue], tokens: int, direction: str
) -> tuple[object, ...]:
    return tokens, direction, *sorted(config.items())


def _is_timed(point: Point | None) -> bool:
    return point is not None and point.outcome == "ok" and point.time_ns is not None


def _is_due(group: Sequence[Case], points: Mapping[str, Point], new: set[str]) -> bool:
    return any(case.key in new or points[case.key].rounds is None for case in group)


def arch_of(environment: Environment) -> str | None:
    """That the atlas knows the card as."""
    if environment.compute_capability is None:
        return None
    name = "sm_" + environment.compute_capability.replace(".", "")
    return name if name in ARCHS else None


def _distinguishing(
    wanted: Sequence[Case], found: atlas.Found, arch: str
) -> dict[str, list[AtlasRow]]:
    """By case, the kernels that not every configuration of its call launches alike; all of its
    kernels where there are none."""
    rows: dict[str, list[AtlasRow]] = {case.key: found.rows_of(arch, case) for case in wanted}
    own: dict[str, list[AtlasRow]] = {}
    for _, group in itertools.groupby(sorted(wanted, key=call_of), key=call_of):
        keys = [case.key for case in group]
        shared = set.intersection(*(set(map(id, rows[key])) for key in keys))
        for key in keys:
            own[key] = [row for row in rows[key] if id(row) not in shared] or rows[key]
    return own


def static_of(rows: Sequence[AtlasRow]) -> Static:
    """Of the kernel with the most shared memory; spills of the one with the most."""
    known = [row for row in rows if row.smem_bytes is not None]
    if not known:
        return Static()
    largest = max(known, key=lambda row: (row.smem_bytes or 0, row.regs or 0))
    spilling = max(known, key=lambda row: row.spill_bytes)
    warps = largest.config.get("num_warps")
    return Static(
        kernel=largest.kernel,
        smem_bytes=largest.smem_bytes,
        regs=largest.regs,
        spill_store_bytes=spilling.spill_store_bytes,
        spill_load_bytes=spilling.spill_load_bytes,
        ctas_per_sm=largest.ctas_per_sm,
        num_warps=warps if isinstance(warps, int) else None,
        compile_ms=sum(row.compile_ms or 0 for row in known),
    )
