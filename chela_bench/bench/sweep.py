"""One sweep: a run folder, a runner, cases in shuffled order, points appended as they end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from chela_bench.bench import plan, store
from chela_bench.bench.cases import Case
from chela_bench.bench.plan import Settings
from chela_bench.bench.runner import Runner, shuffled, utc_now
from chela_bench.errors import RecordError
from chela_bench.profiles import machine, nvml
from chela_bench.records import Ceilings, Outcome, Point, Run

# What must be equal for a run to go on where it stopped: the rest of Environment may drift.
_SAME_MACHINE = ("device", "name", "uuid", "driver", "cuda", "cpu", "python")


class Listener(Protocol):
    """Hears how the sweep goes; the command line draws it."""

    def started(self, run: Run, folder: Path, left: int, warnings: list[str]) -> None: ...
    def case(self, case: Case) -> None: ...
    def phase(self, phase: str) -> None: ...
    def finished(self, point: Point) -> None: ...


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
) -> Result:
    """Measures all cases of `settings` that the folder does not hold yet.

    KeyboardInterrupt passes through with everything measured so far on disk. Raises RecordError if
    `resumed` was measured on another machine, with other versions or settings.
    """
    cases = plan.cases(settings)
    with store.RunFolder(folder_path) as folder:
        try:
            ceilings = None if resumed is None else resumed.ceilings
            with Runner(settings.session(), folder.log, ceilings=ceilings) as runner:
                run = _header(settings, cases, folder_path, runner, resumed)
                done = {
                    point.key
                    for point in store.load_points(folder_path)
                    if point.outcome not in retry
                }
                left = [case for case in cases if case.key not in done]
                if resumed is not None and left:
                    run = run.model_copy(update={"finished_utc": None})
                folder.write_run(run)
                listener.started(run, folder_path, len(left), _warnings(runner))
                _measure_all(settings, left, runner, folder, listener)
        except BaseException:
            if not (folder_path / store.RUN).exists():  # it never came to hold a run
                folder.discard()
            raise
        if run.finished_utc is None:
            run = run.model_copy(update={"finished_utc": utc_now()})
            folder.write_run(run)
    return Result(folder_path, run, store.load_points(folder_path))


def _measure_all(
    settings: Settings,
    cases: list[Case],
    runner: Runner,
    folder: store.RunFolder,
    listener: Listener,
) -> None:
    for case in shuffled(cases, settings.seed):
        listener.case(case)
        reason = plan.unavailable(settings, case)
        if reason is not None:
            point, samples = runner.failed(case, "skipped", reason), list[float]()
        else:
            point, samples = runner.measure(case, listener.phase)
        folder.append(point, samples)
        listener.finished(point)


def _header(
    settings: Settings, cases: list[Case], folder: Path, runner: Runner, resumed: Run | None
) -> Run:
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
        planned_points=len(cases),
        versions=runner.versions,
        environment=runner.environment,
        ceilings=runner.ceilings or Ceilings(),
    )
    if resumed is None:
        return run
    for name in _SAME_MACHINE:
        _refuse_difference(
            folder, name, getattr(resumed.environment, name), getattr(run.environment, name)
        )
    _refuse_differences(folder, "versions.", resumed.versions, run.versions)
    _refuse_difference(folder, "source_sha256", resumed.source_sha256, run.source_sha256)
    return resumed


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


def _warnings(runner: Runner) -> list[str]:
    uuid = runner.environment.uuid
    if uuid is None:
        return []
    own = {runner.worker_pid} if runner.worker_pid is not None else set[int]()
    others = nvml.other_processes(uuid, own)
    if not others:
        return []
    return [f"other processes on the card disturb the times: {', '.join(others)}"]


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
