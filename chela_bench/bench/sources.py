"""What can be compared: run folders, pytest-benchmark's JSON, `atlas --json`, in one shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chela_bench.bench import paths, stats, store
from chela_bench.bench.cases import Case
from chela_bench.errors import RecordError
from chela_bench.records import ConfigValue, Count, Environment, Point, Run, config_label
from chela_bench.verdicts import Side

MACHINE_INFO = "chela_bench"  # our key in pytest-benchmark's machine_info
SOURCE = "chela_bench_source_sha256"  # and in its commit_info, which is of the tests' repository
_SHORTEST_NS, _LONGEST_NS = 1e-6, 2.0**63  # beyond them the ratio of two times is no number
Kind = Literal["run", "pytest", "static"]


@dataclass(frozen=True)
class Machine:
    """What must be equal for two times to be compared, and what a baseline is kept under."""

    device: str  # "cuda" or "cpu"; "static": nothing ran
    name: str
    uuid: str | None = None
    driver: str | None = None
    torch: str | None = None
    triton: str | None = None

    def __str__(self) -> str:
        return self.name if self.uuid is None else f"{self.name} ({self.uuid})"

    @property
    def identity(self) -> tuple[str, str, str | None]:
        return self.device, self.name, self.uuid

    @property
    def driver_major(self) -> str | None:
        return None if self.driver is None else self.driver.partition(".")[0]

    def versions(self) -> dict[str, str]:
        found = {"torch": self.torch, "triton": self.triton, "driver": self.driver}
        return {name: version for name, version in found.items() if version}


@dataclass(frozen=True)
class Code:
    """Which code measured, as far as a record says."""

    source_sha256: str | None = None  # of the package
    commit: str | None = None
    dirty: bool | None = None

    def __str__(self) -> str:
        parts = [
            self.commit and f"commit {self.commit[:7]}{'+' if self.dirty else ''}",
            self.source_sha256 and f"source {self.source_sha256[:7]}",
        ]
        return ", ".join(filter(None, parts)) or "unknown source"

    def is_known_as(self, other: Code) -> bool:
        """Whether both are surely the same: two changed trees of a commit need not be."""
        if self.source_sha256 and other.source_sha256:
            return self.source_sha256 == other.source_sha256
        clean = self.dirty is False and other.dirty is False
        return clean and self.commit is not None and self.commit == other.commit


class StaticRow(BaseModel):
    """What `atlas` says of one kernel, configuration and architecture; nothing ran."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    op: str
    impl: str | None = None
    kernel: str
    dtype: str | None = None
    config: dict[str, ConfigValue | float | None]
    constants: dict[str, ConfigValue | float | None] = Field(default_factory=dict)
    types: dict[str, str] = Field(default_factory=dict)
    arch: str
    triton: str
    outcome: str = "ok"
    fits: bool | None = None
    smem_bytes: Count | None = None
    regs: Count | None = None
    spill_store_bytes: Count | None = None
    spill_load_bytes: Count | None = None
    ctas_per_sm: Count | None = None
    tensor_core: bool | str | None = None
    reason: str | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether the compiler came to an end, be it that it does not fit."""
        return self.outcome in ("ok", "out_of_resources")

    @property
    def name(self) -> str:
        """Kernel, what it was compiled for, configuration and architecture. Constants that are not
        in the configuration stand in it by their sizes and a short hash, types in the hash."""
        parts = [self.op, self.impl, self.kernel, self.dtype, config_label(self.config)]
        others = {name: self.constants[name] for name in sorted(self.constants)
                  if name not in self.config}  # fmt: skip
        if others or self.types:
            sizes = {name: value for name, value in others.items() if len(name) == 1}
            told = json.dumps([others, self.types], sort_keys=True)
            digest = hashlib.sha256(told.encode()).hexdigest()[:6]
            label = "-".join(f"{name}{value}" for name, value in sizes.items())
            parts.append("#".join(filter(None, [label, digest])))
        return "/".join(part for part in (*parts, self.arch) if part)


@dataclass(frozen=True)
class Entry:
    """One benchmark: its point, unless it is another plugin's, and its time samples."""

    name: str
    point: Point | None
    samples_ns: list[float]
    device: str | None = None
    timer: str | None = None  # pytest-benchmark's, where it is another plugin's

    @property
    def outcome(self) -> str:
        return "ok" if self.point is None else self.point.outcome

    @property
    def clock(self) -> str:
        """How its time was taken: samples of another clock do not compare."""
        point = self.point
        if point is None:
            return f"pytest-benchmark's {self.timer or 'unknown timer'}"
        if point.time_ns is None:
            return "wall clock"
        return "CPU wall clock" if point.device == "cpu" else f"{point.timer}, {point.l2} L2"


@dataclass(frozen=True)
class Measured:
    """One side of a comparison."""

    label: str
    kind: Kind
    machines: tuple[Machine, ...]
    entries: dict[str, Entry] = field(default_factory=dict)
    static: dict[str, StaticRow] = field(default_factory=dict)
    models: dict[str, tuple[Case, int]] = field(default_factory=dict)  # modelled HBM bytes by key
    seed_and_inputs: tuple[int, str] | None = None
    settings: dict[str, Any] | None = None
    code: Code = Code()
    cut_off: str | None = None  # what a run that was interrupted or torn lacks

    @property
    def machine(self) -> Machine:
        return self.machines[0]

    @property
    def has_figures(self) -> bool:
        """Whether anything of it can be held against: a baseline of failures lets all pass."""
        return any(entry.outcome == "ok" for entry in self.entries.values()) or any(
            row.is_compiled for row in self.static.values()
        )

    def side(self) -> Side:
        names = ", ".join(dict.fromkeys(map(str, self.machines)))
        return Side(label=self.label, machine=names, versions=self.machine.versions())

    def by_key(self) -> Measured:
        """The same under points' keys, to be held against a run folder; the tests' own names are
        kept where a point was measured twice, or is none of ours."""
        keys = [entry.point.key if entry.point else name for name, entry in self.entries.items()]
        entries = {
            key if keys.count(key) == 1 else name: entry
            for key, (name, entry) in zip(keys, self.entries.items(), strict=True)
        }
        named = {name: replace(entry, name=name) for name, entry in entries.items()}
        return replace(self, entries=named)


def alike(before: Measured, after: Measured) -> tuple[Measured, Measured]:
    """Both under one kind of name: tests' where both are pytest's, else points' keys."""
    if before.kind == after.kind:
        return before, after
    return (
        before.by_key() if before.kind == "pytest" else before,
        after.by_key() if after.kind == "pytest" else after,
    )


def read(path: Path) -> Measured:
    """A run folder, or a JSON file of pytest-benchmark, `atlas`, `sweep`. Raises RecordError."""
    if paths.is_dir(path):
        run, points = store.load_run(path)
        found = of_run(str(path), run, points, store.load_samples(path))
        return replace(found, cut_off=store.cut_off(path, run, points))
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RecordError(f"no such file or run folder: {path}") from None
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise RecordError(f"{path} is not JSON, or only half of it") from None
    if isinstance(found, dict) and isinstance(found.get("benchmarks"), list):
        return of_pytest(str(path), found)
    rows = found.get("points") if isinstance(found, dict) else None
    if isinstance(rows, list) and rows and all(isinstance(r, dict) and "arch" in r for r in rows):
        return of_atlas(str(path), rows)
    raise RecordError(
        f"{path} is no run folder, no JSON of pytest-benchmark and none of `atlas --json`"
    )


def of_run(label: str, run: Run, points: list[Point], samples: Mapping[str, list[int]]) -> Measured:
    environments = [run.environment, *(device.environment for device in run.other_devices)]
    entries = {}
    for point in points:
        times = [float(ns) for ns in samples.get(point.key, [])]
        entries[point.key] = Entry(point.key, point, times, point.device)
        if point.outcome == "ok":
            _refuse_other_times(label, entries[point.key])
    return Measured(
        label,
        "run",
        tuple(machine_of(environment, run.versions) for environment in environments),
        entries,
        seed_and_inputs=(run.seed, run.inputs),
        settings=dict(run.settings),
        code=Code(run.source_sha256, run.git_sha, run.git_dirty),
    )


def machine_of(environment: Environment, versions: Mapping[str, str]) -> Machine:
    return Machine(
        environment.device,
        environment.name,
        environment.uuid,
        environment.driver,
        versions.get("torch"),
        versions.get("triton"),
    )


def of_pytest(label: str, found: Mapping[str, Any]) -> Measured:
    """pytest-benchmark's JSON, of our tests and of any others."""
    info = found.get("machine_info")
    ours = info.get(MACHINE_INFO) if isinstance(info, dict) else None
    entries: dict[str, Entry] = {}
    for number, one in enumerate(found["benchmarks"], start=1):
        where = f"{label}, benchmark {number}"
        try:
            name, data = str(one["fullname"]), one["stats"].get("data")
            extra = {**(one.get("extra_info") or {})}
            samples = None if data is None else [float(seconds) * 1e9 for seconds in data]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise RecordError(f"{where}: not as pytest-benchmark writes it") from None
        if samples is None:
            raise RecordError(
                f"{where} ({name}) holds no samples; write it with --benchmark-json, or with "
                "--benchmark-save-data"
            )
        if name in entries:
            raise RecordError(f"{where}: {name} stands there twice")
        point = None
        if {"op", "impl", "outcome"} <= set(extra):
            try:
                point = Point.model_validate(extra)
            except ValidationError as error:
                raise RecordError(f"{where} ({name}): {store.first_problem(error)}") from None
        if point is not None:
            entries[name] = Entry(name, point, samples, point.device)
        else:
            options = one.get("options")
            timer = options.get("timer") if isinstance(options, dict) else None
            entries[name] = Entry(name, None, samples, timer=timer and str(timer))
        _refuse_other_times(label, entries[name])
    machine = _machine_of_pytest(info, ours)
    code = _code_of_pytest(found.get("commit_info"))
    return Measured(label, "pytest", (machine,), entries, code=code)


def _machine_of_pytest(info: Any, ours: Any) -> Machine:
    if isinstance(ours, dict):
        fields = ("device", "name", "uuid", "driver", "torch", "triton")
        known = {name: str(ours[name]) for name in fields if ours.get(name) is not None}
        if {"device", "name"} <= set(known):
            return Machine(**known)
    info = info if isinstance(info, dict) else {}
    cpu = info.get("cpu")
    brand = cpu.get("brand_raw") if isinstance(cpu, dict) else None
    parts = [info.get("node"), brand or info.get("processor")]
    return Machine("cpu", " ".join(str(part) for part in parts if part) or "unknown")


def _code_of_pytest(info: Any) -> Code:
    info = info if isinstance(info, dict) else {}
    source, commit, dirty = info.get(SOURCE), info.get("id"), info.get("dirty")
    return Code(
        source if isinstance(source, str) else None,
        commit if isinstance(commit, str) else None,
        dirty if isinstance(dirty, bool) else None,
    )


def of_atlas(label: str, rows: list[dict[str, Any]]) -> Measured:
    static: dict[str, StaticRow] = {}
    for number, found in enumerate(rows, start=1):
        try:
            row = StaticRow.model_validate(found)
        except ValidationError as error:
            raise RecordError(f"{label}, row {number}: {store.first_problem(error)}") from None
        if static.get(row.name, row) != row:
            raise RecordError(f"{label}, row {number}: {row.name} stands there twice, unlike")
        static[row.name] = row
    versions = sorted({row.triton for row in static.values()})
    if len(versions) > 1:
        raise RecordError(f"{label} mixes rows of Triton {' and '.join(versions)}")
    machine = Machine("static", "static", triton=versions[0])
    return Measured(label, "static", (machine,), static=static)


def _refuse_other_times(label: str, entry: Entry) -> None:
    """Samples that are no times, or not those that the point's own time comes from."""
    where = f"{label}: {entry.name}"
    for ns in entry.samples_ns:
        if not _SHORTEST_NS <= ns < _LONGEST_NS:
            raise RecordError(f"{where} holds a time of {ns:g} ns; measure it again")
    point = entry.point
    shown = None if point is None else point.seconds
    if shown is None or not entry.samples_ns:
        return
    median = stats.median(entry.samples_ns)
    if abs(median - shown * 1e9) > 1.5 + 1e-6 * median:
        raise RecordError(
            f"{where} says {shown * 1e9:.0f} ns, but its samples' median is {median:.0f} ns: one "
            "of them was changed by hand"
        )
