"""One sweep: a run folder, workers, cases in shuffled order, points appended as they end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from pydantic import ValidationError

from chela_bench.bench import plan, profiling, store
from chela_bench.bench.cases import Case, Session
from chela_bench.bench.crew import Began, Crew, Entered
from chela_bench.bench.load import refuse_changed_files
from chela_bench.bench.plan import Settings
from chela_bench.bench.runner import Runner, shuffled, utc_now
from chela_bench.errors import EnvironmentProblem, RecordError, UsageError
from chela_bench.profiles import machine, nvml
from chela_bench.profiles.ncu import Tool
from chela_bench.records import Ceilings, Cost, Device, Outcome, Point, Run, Spent

_S = TypeVar("_S", bound=Settings)

# What must be equal for a run to go on where it stopped: the rest of Environment may drift.
_SAME_MACHINE = ("device", "name", "uuid", "driver", "cuda", "cpu", "python")


class Listener(Protocol):
    """Hears how a sweep or a tuning goes; the command line draws it."""

    def started(self, run: Run, folder: Path, left: int, warnings: list[str]) -> None: ...
    def case(self, case: Case) -> None: ...
    def phase(self, phase: str) -> None: ...
    def finished(self, point: Point) -> None: ...
    def said(self, line: str) -> None: ...


@dataclass(frozen=True)
class Result:
    folder: Path
    run: Run
    points: list[Point]


def new_folder(out: Path) -> Path:
    """A fresh name in `out`: UTC time to the second and six random hexadecimal digits."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return out / f"{stamp}-{uuid4().hex[:6]}"


def sweep(
    settings: Settings,
    folder_path: Path,
    listener: Listener,
    *,
    resumed: Run | None = None,
    retry: frozenset[Outcome] = frozenset(),
    ncu_report: Path | None = None,
) -> Result:
    """Measures all cases of `settings` that the folder does not hold yet; then, if asked for,
    counts their bytes under Nsight Compute, whose full report goes to `ncu_report`.

    KeyboardInterrupt passes through with everything measured so far on disk. Raises RecordError if
    `resumed` was measured on another machine, with other versions or settings.
    """
    begin = time.monotonic()
    cases = plan.cases(settings)
    tool, no_tool = _profiler(settings)
    sessions = settings.sessions(ncu=tool is not None)
    profiling_s = 0.0
    with store.RunFolder(folder_path) as folder:
        with Crew(sessions, folder.log, ceilings=known_ceilings(resumed)) as crew:
            _refuse_mixed_models(settings, crew.devices)
            versions = crew.runners[0].versions
            run = header(settings, len(cases), folder_path, crew.devices, versions, resumed)
            done = {p.key for p in store.load_points(folder_path) if p.outcome not in retry}
            left = [case for case in cases if case.key not in done]
            if resumed is not None and left:
                run = run.model_copy(update={"finished_utc": None, "cost": None})
            folder.write_run(run)
            listener.started(run, folder_path, len(left), disturbances(crew.runners))
            spent = _measure_all(settings, left, crew, folder, listener)
        if tool is not None:
            profiling_begin = time.monotonic()
            _profile(tool, sessions[0], cases, run, folder, listener, settings, ncu_report)
            profiling_s = time.monotonic() - profiling_begin
        elif no_tool is not None:
            _say_why(no_tool, folder)
        if run.finished_utc is None:
            wall_s = (time.monotonic() - begin - profiling_s) * len(settings.devices)
            cost = _cost(wall_s + profiling_s, spent, profiling_s)
            run = run.model_copy(update={"finished_utc": utc_now(), "cost": cost})
            folder.write_run(run)
    return Result(folder_path, run, store.load_points(folder_path))


def _measure_all(
    settings: Settings,
    cases: list[Case],
    crew: Crew,
    folder: store.RunFolder,
    listener: Listener,
) -> list[Spent]:
    """Appends every case's point; returns what each spent on other things than the bench."""
    spent = []
    tried = []
    for case in shuffled(cases, settings.seed):
        reason = plan.unavailable(settings, case)
        if reason is None:
            tried.append(case)
            continue
        listener.case(case)
        point = crew.runners[0].failed(case, "skipped", reason)
        folder.append(point, [])
        listener.finished(point)
    for event in crew.measure(tried):
        if isinstance(event, Began):
            listener.case(event.case)
        elif isinstance(event, Entered):
            listener.phase(event.phase)
        else:
            folder.append(event.point, event.samples_ns)
            listener.finished(event.point)
            if event.point.spent is not None:
                spent.append(event.point.spent)
    return spent


def _profiler(settings: Settings) -> tuple[Tool | None, str | None]:
    """The tool that will count bytes, tried; with --hbm auto also why there is none. With --hbm ncu
    EnvironmentProblem, before anything is measured."""
    if settings.hbm not in ("ncu", "auto") or settings.device_kind == "cpu":
        return None, None
    try:
        return profiling.usable_tool(), None
    except EnvironmentProblem as problem:
        if settings.hbm == "ncu":
            raise
        return None, str(problem)


def _profile(
    tool: Tool,
    session: Session,
    cases: list[Case],
    run: Run,
    folder: store.RunFolder,
    listener: Listener,
    settings: Settings,
    report: Path | None,
) -> None:
    way = profiling.Way(tool, session, run.ceilings, folder.path, listener.said)
    try:
        profiling.add_bytes(
            way, cases, run.environment, folder, detail=settings.detail, report=report
        )
    except EnvironmentProblem as problem:
        if settings.hbm == "ncu":
            raise EnvironmentProblem(
                f"{problem}; the times are kept, go on with --resume {folder.path}"
            ) from problem
        listener.said(f"warning: {problem}")
        _say_why(str(problem), folder)


def _say_why(reason: str, folder: store.RunFolder) -> None:
    """Every correct point without counted bytes says why."""
    for point in store.load_points(folder.path):
        if point.outcome == "ok" and point.hbm.read_bytes is None:
            folder.append(profiling.without_bytes(point, reason), [])


def _cost(wall_s: float, spent: list[Spent], profiling_s: float) -> Cost:
    return Cost(
        wall_s=round(wall_s, 3),
        compiling_s=round(sum(each.compiling_s for each in spent), 3),
        checking_s=round(sum(each.checking_s for each in spent), 3),
        timing_s=round(sum(each.timing_s for each in spent), 3),
        profiling_s=round(profiling_s, 3),
    )


def known_ceilings(resumed: Run | None) -> dict[str, Ceilings]:
    """Ceilings that are known, by device as points name it."""
    if resumed is None:
        return {}
    first = Device(environment=resumed.environment, ceilings=resumed.ceilings)
    return {
        device.environment.uuid or "cpu": device.ceilings
        for device in (first, *resumed.other_devices)
    }


def _refuse_mixed_models(settings: Settings, devices: list[Device]) -> None:
    models = {device.environment.name: name
              for name, device in zip(settings.devices, devices, strict=True)}  # fmt: skip
    if len(models) > 1 and not settings.mix_gpus:
        named = ", ".join(f"{name} is {model}" for model, name in models.items())
        raise UsageError(
            f"GPUs of one model wanted, since times of others do not compare; {named}; "
            "choose with --gpus, or allow it with --mix-gpus"
        )


def header(
    settings: Settings,
    planned: int,
    folder: Path,
    devices: Sequence[Device],
    versions: dict[str, str],
    resumed: Run | None,
) -> Run:
    """A new run's, or the resumed one's, if it may go on here. Raises RecordError."""
    first, *others = devices
    sha, dirty = git_state()
    run = Run(
        run_id=folder.name,
        started_utc=utc_now(),
        argv=["chela-bench", *(_printable(word) for word in sys.argv[1:])],
        source_sha256=machine.source_sha256(),
        git_sha=sha,
        git_dirty=dirty,
        seed=settings.seed,
        inputs=settings.inputs,
        settings=settings.model_dump(mode="json"),
        planned_points=planned,
        versions=versions,
        environment=first.environment,
        ceilings=first.ceilings,
        other_devices=others,
    )
    if resumed is None:
        return run
    for name in _SAME_MACHINE:
        then, now = (
            [getattr(e, name) for e in (r.environment, *(d.environment for d in r.other_devices))]
            for r in (resumed, run)
        )
        for before, after in zip(then, now, strict=True):  # settings say how many
            _refuse_difference(folder, name, before, after)
    _refuse_differences(folder, "versions.", resumed.versions, run.versions)
    _refuse_difference(folder, "source_sha256", resumed.source_sha256, run.source_sha256)
    return resumed


def own_settings(folder: Path, run: Run, kind: type[_S]) -> _S:
    """The run's, to go on with. Raises RecordError, also where a user's file is another now."""
    try:
        settings = kind.model_validate(run.settings)
    except ValidationError as error:
        problem = store.first_problem(error, "settings")
        raise RecordError(f"{folder} cannot be resumed: {problem}") from None
    refuse_changed_files(settings.user_impls, settings.user_files_sha256)
    return settings


def refuse_other_settings(folder: Path, then: Mapping[str, Any], now: Settings) -> None:
    """Raises RecordError naming the first setting that differs from the run's."""
    _refuse_differences(folder, "", then, now.model_dump(mode="json"))


def _refuse_differences(
    folder: Path, prefix: str, then: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    for name in [*then, *(name for name in now if name not in then)]:
        _refuse_difference(folder, prefix + name, then.get(name), now.get(name))


def _refuse_difference(folder: Path, name: str, then: object, now: object) -> None:
    if then != now:
        raise RecordError(
            f"{folder} cannot be resumed: {name} was {then!r} and is now {now!r}; "
            "start a new run, or let `--resume` alone take the run's own settings"
        )


def disturbances(runners: Sequence[Runner]) -> list[str]:
    """Other processes on the cards."""
    found = []
    for runner in runners:
        own = {runner.worker_pid} if runner.worker_pid is not None else set[int]()
        uuid = runner.environment.uuid
        others = [] if uuid is None else nvml.other_processes(uuid, own)
        if others:
            card = f"{runner.environment.name} ({uuid})"
            found.append(f"other processes on {card} disturb the times: {', '.join(others)}")
    return found


def _printable(word: str) -> str:
    return word.encode("utf-8", "replace").decode()


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the package's own checkout and whether it is changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None
    try:
        sha, status = (
            subprocess.run(
                ["git", "-C", str(root), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
                env={
                    k: v for k, v in os.environ.items() if not k.startswith("GIT_")
                },  # as in hooks
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return sha, bool(status)
