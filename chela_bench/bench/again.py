"""Measured now, for the gate: a baseline's points, and unclear ones once more."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from chela_bench.bench import plan, stats, store
from chela_bench.bench.cases import Case, Limits, Session
from chela_bench.bench.plan import Settings
from chela_bench.bench.registry import all_ops
from chela_bench.bench.runner import Runner, WorkerProcess
from chela_bench.bench.sources import Code, Entry, Machine, Measured, machine_of
from chela_bench.bench.sweep import git_state
from chela_bench.errors import EnvironmentProblem, UsageError
from chela_bench.profiles.machine import source_sha256
from chela_bench.records import Environment, Point

LONGER = 4  # times the time for samples, of a round that is to settle a verdict
Heard = Callable[[str], None]


class _Named(BaseModel):
    """Settings that name what may be gone by now."""

    impls: dict[str, list[str]] = Field(default_factory=dict)
    user_impls: dict[str, str] = Field(default_factory=dict)
    shapes: dict[str, Any] = Field(default_factory=dict)


def here(device: str) -> Machine:
    """This machine, as a worker on the device sees it."""
    session = Session(
        device=device, timer="event", l2="cold", seed=0, inputs="randn", limits=Limits()
    )
    with tempfile.TemporaryDirectory(prefix="chela-bench-") as folder:
        worker = WorkerProcess(session, Path(folder) / "worker.log")
        try:
            hello = worker.ask({"session": session.model_dump(mode="json")}, "hello", 180.0)
        finally:
            worker.kill()
    return machine_of(Environment.model_validate(hello["environment"]), hello["versions"])


def code_here() -> Code:
    """What a worker of this process measures."""
    return Code(source_sha256(), *git_state())


def settings_of(baseline: Measured, device: str) -> tuple[Settings, set[str]]:
    """The baseline's own plan on this device, without what is no longer there; and its cases'
    keys. What is left out is missing afterwards, which the gate says by name."""
    given = dict(baseline.settings or {})
    if not given:
        raise UsageError(
            f"{baseline.label} does not say how it was measured; give what was measured now, as in "
            "chela-bench gate NOW.json --baseline ..."
        )
    command = given.get("command", "sweep")
    if command != "sweep":
        raise UsageError(
            f"{baseline.label} is a run of {command}, which times in turns: run chela-bench "
            f"{command} again and give its run folder: chela-bench gate runs/RUN --baseline ..."
        )
    ops = {op.name: op for op in all_ops()}
    try:
        named = _Named.model_validate(given)
        impls = {
            name: [impl for impl in wanted if impl in named.user_impls
                   or any(impl == known.name for known in ops[name].impls)]
            for name, wanted in named.impls.items() if name in ops
        }  # fmt: skip
        given["impls"] = {name: kept for name, kept in impls.items() if kept}
        given["shapes"] = {k: v for k, v in named.shapes.items() if k in given["impls"]}
        given["devices"] = [device]
        if not given["impls"]:
            raise UsageError(f"nothing of {baseline.label} is left to measure: its ops are gone")
        settings = Settings.model_validate(given)
    except ValidationError as error:
        raise UsageError(f"{baseline.label}: {store.first_problem(error, 'settings')}") from None
    return settings, {case.key for case in plan.cases(settings)}


def again(
    measured: Measured,
    names: Sequence[str],
    session: Session,
    *,
    heard: Heard,
) -> Measured:
    """The named benchmarks once more, in a process of its own and for longer; the samples of all
    rounds count together. Raises EnvironmentProblem where they would not be of the same machine,
    code and versions."""
    if measured.machine.device != session.device.partition(":")[0]:
        raise EnvironmentProblem(
            f"{measured.label} is of {measured.machine}; here is no such device"
        )
    code = code_here()
    if not measured.code.is_known_as(code):
        raise EnvironmentProblem(f"the candidate is of {measured.code}; this tree is of {code}")
    entries = dict(measured.entries)
    longer = _longer(session)
    with tempfile.TemporaryDirectory(prefix="chela-bench-") as folder:
        with Runner(longer, Path(folder) / "worker.log", ceilings={}) as runner:
            now = machine_of(runner.environment, runner.versions)
            if now.identity != measured.machine.identity:
                raise EnvironmentProblem(
                    f"unclear points can be measured again on {measured.machine}; this is {now}"
                )
            if now.versions() != measured.machine.versions():
                then, today = (
                    ", ".join(f"{name} {v}" for name, v in machine.versions().items())
                    for machine in (measured.machine, now)
                )
                raise EnvironmentProblem(f"the candidate is of {then}; here are {today}")
            for name in names:
                before = entries[name]
                if before.point is None:
                    continue
                heard(f"again: {name}")
                point, samples = runner.measure(case_of(before.point))
                entries[name] = _together(before, point, samples)
    return dataclasses.replace(measured, entries=entries)


def case_of(point: Point) -> Case:
    return Case(
        op=point.op,
        impl=point.impl,
        direction=point.direction,
        dtype=point.dtype,
        shape=point.shape,
        config=point.config,
    )


def session_of(measured: Measured, device: str, limits: Limits) -> Session:
    """How its points were measured, to measure them again."""
    if measured.settings:
        return settings_of(measured, device)[0].sessions()[0]
    point = next((entry.point for entry in measured.entries.values() if entry.point), None)
    if point is None:
        raise UsageError(
            f"{measured.label} holds no points of ours; measure it again and give the new JSON"
        )
    return Session(
        device=device,
        timer=point.timer,
        l2=point.l2 or "cold",
        seed=0,
        inputs="randn",
        limits=limits,
    )


def _together(before: Entry, point: Point, samples: Sequence[float]) -> Entry:
    if point.outcome in ("skipped", "timeout"):
        return before  # the machine was busy this time: that settles nothing
    if point.outcome != "ok" or before.point is None:
        return Entry(before.name, point, list(samples), point.device)
    earlier = before.samples_ns if before.device == point.device else []  # not another card's
    pooled = [*earlier, *samples]
    if point.time_ns is not None:
        point = point.model_copy(update={"time_ns": stats.summarise(pooled)})
    else:
        point = point.model_copy(update={"wall_ns": round(stats.median(pooled))})
    old = before.point
    kept = {  # what only another command fills in
        name: getattr(old, name) for name in ("hbm", "static") if getattr(old, name) is not None
    }
    return Entry(before.name, point.model_copy(update=kept), pooled, point.device)


def _longer(session: Session) -> Session:
    limits = session.limits
    sample_s = limits.sample_s * LONGER
    phase_s = max(limits.phase_s, 4 * limits.call_s + sample_s)
    longer = limits.model_copy(update={"sample_s": sample_s, "phase_s": phase_s})
    return session.model_copy(update={"limits": longer})
