"""Bytes through device memory, counted: a run's points once more, under Nsight Compute.

After the timing, one process runs all of them, so that torch is imported once; a case that ends it
is named and left out of the next. What the tool printed stays in the run folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chela_bench.bench import store
from chela_bench.bench.cases import Case, Session
from chela_bench.bench.matching import with_model
from chela_bench.bench.models import STEPS
from chela_bench.bench.runner import gpu_lock, main_of, worker_environment
from chela_bench.errors import EnvironmentProblem, RecordError
from chela_bench.profiles import ncu, ncu_csv
from chela_bench.profiles.ncu import Tool
from chela_bench.records import Ceilings, Environment, Kernel, Point

MOST_LAUNCHES = 4000  # of a call; each costs the tool milliseconds
SHORT_TOKENS = 512  # up to here a loop over tokens is run all the same
DETAILED_LAUNCHES = 200
DETAILED_BYTES = 4 << 30  # written back between passes; from there on it takes minutes
COLUMN = "hbm.read_bytes"  # whose null_reasons say why there is no figure
_START_S = 180.0
_APPLICATION = main_of("chela_bench.bench.profiled")

Say = Callable[[str], None]


@dataclass
class Counts:
    """What a round of runs found: kernels by case, and why others have none."""

    kernels: dict[int, list[Kernel]] = field(default_factory=dict)
    late_bytes: dict[int, int] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """How the profiler is run, the same for all rounds."""

    tool: Tool
    session: Session
    ceilings: Ceilings
    folder: Path
    say: Say


def usable_tool() -> Tool:
    """The machine's ncu, after it has counted a kernel. EnvironmentProblem with the remedy."""
    tool = ncu.find()
    problem = ncu.probe(tool.path)
    if problem is not None:
        raise EnvironmentProblem(f"{problem}; or take --hbm gpm or --hbm model")
    return tool


def add_bytes(
    way: Way,
    cases: Sequence[Case],
    environment: Environment,
    folder: store.RunFolder,
    *,
    detail: bool,
    report: Path | None = None,
    finished: Callable[[Point], None] = lambda point: None,
) -> None:
    """Counts every correct point that has no counted bytes yet, and appends it anew."""
    planned = {case.key: case for case in cases}
    points = [
        point
        for point in store.load_points(folder.path)
        if point.outcome == "ok" and point.hbm.read_bytes is None and point.key in planned
    ]
    chosen: list[Point] = []
    for point in points:
        reason = too_many_launches(point)
        if reason is None:
            chosen.append(point)
        else:
            folder.append(without_bytes(point, reason), [])
    if not chosen:
        return
    numbered = [(number, planned[point.key]) for number, point in enumerate(chosen)]
    way.say(f"{len(chosen)} points again under ncu {way.tool.version}")
    with gpu_lock(environment):
        bytes_ = count(way, numbered, _known(way, ncu.BYTES), "ncu", report)
        more = Counts()
        fine = [n for n, _ in numbered if n in bytes_.kernels and _takes_detail(chosen[n])]
        if detail and fine:
            again = [(n, case) for n, case in numbered if n in fine]
            more = count(way, again, _known(way, ncu.DETAIL), "ncu-detail", _beside(report))
    for number, point in enumerate(chosen):
        kernels = bytes_.kernels.get(number)
        if kernels is None:
            folder.append(without_bytes(point, bytes_.reasons[number]), [])
            continue
        kernels = ncu_csv.with_detail(kernels, more.kernels.get(number, []))
        point = with_bytes(point, kernels, bytes_.late_bytes.get(number, 0))
        folder.append(point, [])
        finished(point)


def bytes_now(way: Way, cases: Sequence[Case], environment: Environment) -> dict[str, int]:
    """What each case's call reads and writes, by the case's key; without what was not counted."""
    numbered = list(enumerate(cases))
    with gpu_lock(environment):
        counts = count(way, numbered, _known(way, ncu.BYTES), "ncu", None)
    found = {}
    for number, case in numbered:
        kernels = counts.kernels.get(number, [])
        moved = _sum(k.read_bytes for k in kernels), _sum(k.write_bytes for k in kernels)
        if kernels and None not in moved:
            found[case.key] = sum(filter(None, moved)) + counts.late_bytes.get(number, 0)
    return found


def count(
    way: Way,
    numbered: Sequence[tuple[int, Case]],
    metrics: Sequence[str],
    name: str,
    report: Path | None,
) -> Counts:
    """Kernels of every case, by as many runs as it takes to get past those that end one.

    EnvironmentProblem if the tool counts nothing at all.
    """
    counts, left, runs = Counts(), list(numbered), 0
    while left:
        runs += 1
        stem = name if runs == 1 else f"{name}-{runs}"
        kept = None if report is None else _numbered(report, runs)
        done, steps, capture = _run(way, left, metrics, stem, kept)
        settled = _settle(counts, done, steps, capture)
        if runs == 1 and isinstance(capture, ncu_csv.Capture) and capture.missing:
            way.say(f"this ncu has no {', '.join(capture.missing)}: left empty")
        if not settled:
            why = _why_nothing(done, capture)
            if not counts.kernels:
                raise EnvironmentProblem(why)
            counts.reasons |= {number: f"ncu: {why}" for number, _ in left}
            break
        left = [(number, case) for number, case in left if number not in settled]
    return counts


def _settle(
    counts: Counts,
    done: ncu.Collected,
    steps: Sequence[dict[str, Any]],
    capture: ncu_csv.Capture | str,
) -> set[int]:
    """Adds what one run found; returns the cases that need no other run.

    One that ended well and is not in the capture, since that is torn or missing, is run again.
    """
    found = capture.launched() if isinstance(capture, ncu_csv.Capture) else {}
    late = capture.late_bytes() if isinstance(capture, ncu_csv.Capture) else {}
    whole = isinstance(capture, ncu_csv.Capture) and not capture.torn
    ended = {step["ended"]: step for step in steps if "ended" in step}
    settled = set()
    for number, step in ended.items():
        problem = step["problem"]
        if problem is not None:
            counts.reasons[number] = f"ncu: under it, {problem}"
        elif found.get(number):
            launches = with_model(found[number], step.get("model", ()))
            counts.kernels[number] = ncu_csv.merged(launches)
            counts.late_bytes[number] = late.get(number, 0)
        elif whole:
            counts.reasons[number] = "ncu: it counted no kernel of this call"
        else:
            continue
        settled.add(number)
    for number in (step["begins"] for step in steps if "begins" in step):
        if number not in ended:
            ending = "did not end" if done.stalled else "ended the process"
            counts.reasons[number] = f"ncu: under it this call {ending}"
            settled.add(number)
    return settled


def with_bytes(point: Point, kernels: Sequence[Kernel], late_bytes: int) -> Point:
    """The point with what was counted; of steps, a step's share.

    ncu sees kernels alone: what the driver copies or fills by itself is named.
    """
    if point.direction == "decode":
        kernels, late_bytes = [_share(kernel) for kernel in kernels], round(late_bytes / STEPS)
    read = _sum(kernel.read_bytes for kernel in kernels)
    written = _sum(kernel.write_bytes for kernel in kernels)
    if read is None or written is None:
        return without_bytes(point, "ncu: it told no bytes of some kernel").model_copy(
            update={"kernels": list(kernels)}
        )
    measured = {
        "read_bytes": read,
        "write_bytes": written + late_bytes,
        "late_write_bytes": late_bytes,
        "source": "ncu",
    }
    nulls = {name: why for name, why in point.null_reasons.items() if name != COLUMN}
    unseen = (point.launches or 0) - sum(kernel.launches for kernel in kernels)
    if unseen > 0:
        nulls["kernels"] = f"{unseen} of {point.launches} launches are the driver's copies or fills"
    return point.model_copy(
        update={
            "hbm": point.hbm.model_copy(update=measured),
            "kernels": list(kernels),
            "null_reasons": nulls,
        }
    )


def without_bytes(point: Point, reason: str) -> Point:
    return point.model_copy(update={"null_reasons": {**point.null_reasons, COLUMN: reason}})


def too_many_launches(point: Point) -> str | None:
    """Why a call is not run under the tool, or None."""
    steps = STEPS if point.direction == "decode" else 1
    launches = None if point.launches is None else point.launches * steps
    short = steps == 1 and point.shape["T"] <= SHORT_TOKENS
    if short or (launches is not None and launches <= MOST_LAUNCHES):
        return None
    many = "uncounted" if launches is None else f"{launches}"
    return f"ncu: {many} launches; it takes {MOST_LAUNCHES}, or T up to {SHORT_TOKENS}"


def _run(
    way: Way,
    numbered: Sequence[tuple[int, Case]],
    metrics: Sequence[str],
    stem: str,
    report: Path | None,
) -> tuple[ncu.Collected, list[dict[str, Any]], ncu_csv.Capture | str]:
    """One process under the tool: how it ended, its steps, and the capture or why there is none."""
    plan, progress, log = (way.folder / f"{stem}.{end}" for end in ("plan", "progress", "csv"))
    content = {
        "session": way.session.model_dump(mode="json"),
        "ceilings": way.ceilings.model_dump(mode="json"),
        "cases": [(number, case.model_dump(mode="json")) for number, case in numbered],
    }
    try:
        plan.write_text(json.dumps(content))
        progress.write_text("")
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {plan}: {error.strerror}") from error
    words = str(plan), str(progress), str(os.getpid())
    application = [sys.executable, "-P", "-c", _APPLICATION, *words]
    limits = way.session.limits
    try:
        done = ncu.collect(
            ncu.build_command(way.tool.path, metrics, application, log=log, report=report),
            log=log,
            words=way.folder / store.LOG,
            environment=worker_environment(),
            moving=lambda: progress.stat().st_size,
            limit_s=_START_S + limits.build_s + limits.phase_s,
            application_pid=lambda: _pid(progress),
        )
        steps = _steps(progress)
    finally:
        plan.unlink(missing_ok=True)
        progress.unlink(missing_ok=True)
    try:
        return done, steps, ncu_csv.parse(done.output, metrics)
    except RecordError as error:
        return done, steps, str(error)


def _why_nothing(done: ncu.Collected, capture: ncu_csv.Capture | str) -> str:
    if problem := ncu.complaint(done.output):
        return str(problem)
    if done.stalled:
        return (
            "ncu or what it watches stood still and was ended; the run's worker.log has its words"
        )
    why = capture if isinstance(capture, str) else "it never came to the first point"
    return f"ncu ended with exit code {done.code} and left nothing usable: {why}"


def _known(way: Way, metrics: Sequence[str]) -> list[str]:
    """The metrics that this ncu knows; it is asked, and what it lacks is named."""
    unknown = ncu.unknown_metrics(way.tool.path, metrics)
    needed = [name for name in unknown if name in (ncu.READ, ncu.WRITTEN)]
    if needed:
        raise EnvironmentProblem(
            f"ncu {way.tool.version} knows no {', '.join(needed)} of this card (ncu "
            "--query-metrics): take another ncu, or --hbm gpm or --hbm model"
        )
    if unknown:
        way.say(f"ncu {way.tool.version} knows no {', '.join(unknown)}: left empty")
    return [*(name for name in metrics if name not in unknown), *ncu.LAUNCH]


def _takes_detail(point: Point) -> bool:
    few = point.launches is not None and point.launches <= DETAILED_LAUNCHES
    return few and (point.peak_bytes or 0) <= DETAILED_BYTES and point.direction != "decode"


def _share(kernel: Kernel) -> Kernel:
    """Of a step: what all steps of a call summed up to, over their number."""
    fields = ("time_ns", "read_bytes", "write_bytes", "l2_bytes")
    values = {name: getattr(kernel, name) for name in fields}
    shared = {name: None if v is None else round(v / STEPS) for name, v in values.items()}
    return kernel.model_copy(update={**shared, "launches": max(1, round(kernel.launches / STEPS))})


def _sum(values: Any) -> int | None:
    known = list(values)
    return None if not known or None in known else sum(known)


def _steps(progress: Path) -> list[dict[str, Any]]:
    """Whole lines; one that a kill tore is none."""
    lines = progress.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def _pid(progress: Path) -> int | None:
    return next((int(step["pid"]) for step in _steps(progress) if "pid" in step), None)


def _beside(report: Path | None) -> Path | None:
    return None if report is None else report.with_stem(f"{report.stem}-detail")


def _numbered(report: Path, runs: int) -> Path:
    return report if runs == 1 else report.with_stem(f"{report.stem}-{runs}")
