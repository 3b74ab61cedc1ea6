"""How far two runs of the same code differ on one device: measured, kept, and allowed for.

DIR/noise/<device>.json    times, and bytes where they were counted, of every run
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from chela_bench.bench import paths, plan, profiling, stats, store
from chela_bench.bench.again import Heard
from chela_bench.bench.baseline import NOISE, SCHEMA_VERSION, Kept, facts, read_kept, slug
from chela_bench.bench.comparing import Noise, assumed_noise
from chela_bench.bench.plan import Settings
from chela_bench.bench.runner import Runner, shuffled, utc_now
from chela_bench.bench.sources import Machine, machine_of
from chela_bench.errors import BaselineProblem, EnvironmentProblem, UsageError
from chela_bench.records import Ceilings, Count, Nanoseconds, Point

Share = Annotated[float, Field(ge=0, lt=1)]


class NoiseRecord(Kept):
    """DIR/noise/<device>.json: times, and bytes, of the same code in processes of their own."""

    way_out = "measure it again: chela-bench noise"

    schema_version: int = SCHEMA_VERSION
    """Version of this schema; others are refused."""
    measured_utc: str
    """ISO 8601, of the points measured last: those not measured again are kept from before."""
    machine: dict[str, str]
    """As a baseline's."""
    typical: Share
    """Relative change that 95 of 100 pairs of runs stay within; for points not in by_key."""
    by_key: dict[str, Share]
    """Largest relative change between two runs, by point key."""
    samples_ns: dict[str, list[list[Nanoseconds]]] = Field(default_factory=dict)
    """Time samples of each run, by point key, in the order taken."""
    hbm_by_key: dict[str, Share] = Field(default_factory=dict)
    """The same as by_key of the bytes through HBM, where they were counted."""
    hbm_bytes: dict[str, list[Count]] = Field(default_factory=dict)
    """Bytes counted in each run, by point key."""


@dataclass(frozen=True)
class NoiseRuns:
    """What `measure_noise` found."""

    machine: Machine
    record: NoiseRecord
    unsteady: list[str]
    """Whose times or bytes doubled by themselves, in words; not in the record."""
    doubled: frozenset[str]
    """Keys of the unsteady ones."""
    failed: list[Point]
    """Those that had no time."""


def measure_noise(settings: Settings, runs: int, *, heard: Heard) -> NoiseRuns:
    """The same code, in `runs` processes one after another, and with `--hbm ncu` each time in one
    more under the profiler."""
    cases = plan.runnable(settings)
    if not cases:
        raise UsageError("nothing of what is selected can run here")
    tool = profiling.usable_tool() if settings.hbm == "ncu" else None
    session = settings.sessions(ncu=tool is not None)[0]
    bytes_: dict[str, list[int]] = {}
    samples: dict[str, list[list[int]]] = {}
    failed: dict[str, Point] = {}
    ceilings: dict[str, Ceilings] = {}
    machine: Machine | None = None
    with tempfile.TemporaryDirectory(prefix="chela-bench-") as folder:
        for number in range(runs):
            with Runner(session, Path(folder) / "worker.log", ceilings=ceilings) as runner:
                ceilings = {runner.device: runner.ceilings}
                machine = machine_of(runner.environment, runner.versions)
                for case in shuffled(cases, settings.seed + number):
                    heard(f"run {number + 1} of {runs}: {case.key}")
                    point, times = runner.measure(case)
                    if point.outcome != "ok":
                        failed[case.key] = point
                    else:
                        samples.setdefault(case.key, []).append([round(ns) for ns in times])
            if tool is not None:
                heard(f"run {number + 1} of {runs}: under ncu {tool.version}")
                way = profiling.Way(tool, session, runner.ceilings, Path(folder), heard)
                good = [case for case in cases if case.key not in failed]
                for key, moved in profiling.bytes_now(way, good, runner.environment).items():
                    bytes_.setdefault(key, []).append(moved)
    assert machine is not None
    whole = {key: taken for key, taken in samples.items() if len(taken) == runs}
    if not whole:
        first = next(iter(failed.values()))
        raise EnvironmentProblem(
            f"nothing was measured {runs} times; {first.key}: {first.outcome}: {first.reason}"
        )
    counted = {key: moved for key, moved in bytes_.items() if key in whole and len(moved) == runs}
    return noise_runs(machine, whole, counted, list(failed.values()))


def noise_runs(
    machine: Machine,
    samples: Mapping[str, list[list[int]]],
    moved: Mapping[str, list[int]] | None = None,
    failed: Sequence[Point] = (),
) -> NoiseRuns:
    """Of times, and bytes, of points in every run. Nothing can be held against what doubles."""
    unsteady: list[str] = []
    doubled: set[str] = set()

    def steady(what: str, changes: Mapping[str, list[float]]) -> dict[str, float]:
        largest = {key: round(max(pairs), 6) for key, pairs in changes.items()}
        for key, size in largest.items():
            if size >= 1:
                unsteady.append(f"the {what} of {key} differ by {size * 100:.0f} %")
                doubled.add(key)
        return {key: size for key, size in largest.items() if size < 1}

    times = {key: _time_changes(runs) for key, runs in samples.items()}
    by_key = steady("times", times)
    counts = {key: counts for key, counts in (moved or {}).items() if key in by_key}
    hbm_by_key = steady("bytes", {key: _changes(counted) for key, counted in counts.items()})
    if not by_key:
        raise EnvironmentProblem(too_unsteady(unsteady))
    steady_ns = {key: samples[key] for key in by_key}
    record = NoiseRecord(
        measured_utc=utc_now(),
        machine=facts(machine),
        typical=_typical(steady_ns),
        by_key=by_key,
        samples_ns=steady_ns,
        hbm_by_key=hbm_by_key,
        hbm_bytes={key: counts[key] for key in hbm_by_key},
    )
    return NoiseRuns(machine, record, unsteady, frozenset(doubled), list(failed))


def too_unsteady(unsteady: Sequence[str]) -> str:
    """What is wrong with them, and what to do."""
    return (
        f"{'; '.join(unsteady)} between runs of the same code, too much to keep: measure again on "
        "a quieter machine, or leave it out"
    )


def _typical(samples_ns: Mapping[str, Sequence[Sequence[float]]]) -> float:
    """Relative change that 95 of 100 pairs of runs stay within."""
    pairs = [change for runs in samples_ns.values() for change in _time_changes(runs)]
    return round(float(np.quantile(pairs, 0.95)), 6)


def _time_changes(runs: Sequence[Sequence[float]]) -> list[float]:
    """Of the runs' medians."""
    return _changes([stats.median(run) for run in runs])


def _changes(values: Sequence[float]) -> list[float]:
    """Between any two, relative to the smaller one."""
    pairs = [(a, b) for i, a in enumerate(values) for b in values[i + 1 :]]
    return [max(pair) / min(pair) - 1 for pair in pairs]


def with_older(folder: Path, found: NoiseRuns) -> NoiseRecord:
    """The record, and what the file has from before, of points whose times, or bytes, were not
    measured now. As it is where the file is damaged, or of another machine or versions."""
    record, doubled = found.record, found.doubled
    old = _sound_noise(_noise_path(folder, found.machine))
    if old is None or old.machine != record.machine:
        return record
    times = old.by_key.keys() - record.by_key.keys() - doubled
    by_key = {key: size for key, size in old.by_key.items() if key in times} | record.by_key
    bytes_ = (old.hbm_by_key.keys() & by_key.keys()) - record.hbm_by_key.keys() - doubled
    samples = {key: runs for key, runs in old.samples_ns.items() if key in times}
    moved = {key: counted for key, counted in old.hbm_bytes.items() if key in bytes_}
    hbm_by_key = {key: size for key, size in old.hbm_by_key.items() if key in bytes_}
    samples |= record.samples_ns
    return record.model_copy(
        update={
            "typical": _typical(samples) if times else record.typical,
            "by_key": by_key,
            "samples_ns": samples,
            "hbm_by_key": hbm_by_key | record.hbm_by_key,
            "hbm_bytes": moved | record.hbm_bytes,
        }
    )


def _sound_noise(path: Path) -> NoiseRecord | None:
    """The file's record; None where there is none, or one that is damaged."""
    try:
        old = read_kept(path, NoiseRecord)
    except BaselineProblem:
        return None
    if not all(run for runs in old.samples_ns.values() for run in runs):
        return None
    steady = all(x < 1 for runs in old.samples_ns.values() for x in _time_changes(runs))
    return old if steady else None


def write_noise(folder: Path, machine: Machine, record: NoiseRecord) -> Path:
    path = _noise_path(folder, machine)
    try:
        paths.make_folder(path.parent)
        store.write_atomically(path, record.model_dump_json().encode() + b"\n")
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror}") from error
    return path


def noise_of(folder: Path | None, machine: Machine, *, live: bool = False) -> Noise:
    """What `noise` measured on this very device, else what is assumed. Of rounds side by side no
    more than is assumed of them: `noise` measures whole runs."""
    path = None if folder is None else _noise_path(folder, machine)
    if path is None or not paths.exists(path, BaselineProblem):
        return assumed_noise(machine, live=live)
    record = read_kept(path, NoiseRecord)
    source = f"measured {record.measured_utc[:10]}: {path}"
    assumed = assumed_noise(machine, live=live)
    here = facts(machine)
    other = [f"{name} {value}" for name, value in record.machine.items() if value != here.get(name)]
    if other:
        return replace(assumed, source=f"{assumed.source}; {path} is of {', '.join(other)}")
    if live:
        return assumed if assumed.typical <= record.typical else Noise(record.typical, source)
    return Noise(record.typical, source, record.by_key, record.hbm_by_key)


def _noise_path(folder: Path, machine: Machine) -> Path:
    return folder / NOISE / f"{slug(machine.uuid or machine.name)}.json"
