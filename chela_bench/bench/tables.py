"""What a tuning found, written where the kernels look: chela_bench/kernels/tuned.json.

An entry is a call that was measured, the fastest right configuration, and where and when that was.
A call whose defaults are within 1 % of the fastest has no entry: it loses the one that it had.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chela_bench.bench.store import write_atomically
from chela_bench.errors import EnvironmentProblem, RecordError, UsageError
from chela_bench.records import TIE, Point, Run

TABLE = Path(__file__).resolve().parents[1] / "kernels" / "tuned.json"
SCHEMA = 1

When = dict[str, Any]


def _attention(point: Point) -> When:
    shape = point.shape
    return {
        "dtype": point.dtype, "heads": shape["B"] * shape["H"], "tokens": shape["T"],
        "K": shape["K"], "V": shape["V"], "trained": point.direction != "fwd",
    }  # fmt: skip


def _convolution(point: Point) -> When:
    """Spectra are made before it is known how many rows they meet: T alone decides."""
    return {"dtype": point.dtype, "tokens": point.shape["T"]}


@dataclass(frozen=True)
class Kind:
    """A table: whose points it is made of, and by what a call is known."""

    impl: str
    directions: tuple[str, ...]
    settings: tuple[str, ...]  # others are no configuration of the kernels
    when: Callable[[Point], When]


KINDS = {
    "linear_attention": Kind(
        "triton_chunked",
        ("fwd", "fwdbwd"),
        ("schedule", "segments", "sweep", "wgmma", "keep",
         "BLOCK_T", "BLOCK_V", "num_warps", "num_stages"),
        _attention,
    ),
    "long_conv": Kind("triton", ("fwd", "fwdbwd"), ("method", "N2"), _convolution),
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    path: Path
    added: int
    removed: int
    kept_defaults: int  # calls whose defaults are as fast


def write_table(run: Run, points: Sequence[Point], path: Path | None = None) -> Written:
    """Raises UsageError for what has no table or was not measured on a GPU."""
    path = path or TABLE
    environment = run.environment
    op = points[0].op if points else ""
    if op not in KINDS or points[0].impl != KINDS[op].impl:
        known = ", ".join(f"{name}/{kind.impl}" for name, kind in KINDS.items())
        what = f"{op}/{points[0].impl}" if points else "an empty run"
        raise UsageError(f"--write-table: {what} has no table; there are tables of {known}")
    if environment.compute_capability is None or run.settings.get("interpreted"):
        raise UsageError("--write-table: times of a GPU wanted; these were taken on a CPU")
    kind = KINDS[op]
    entries = _read(path)
    card = (op, environment.compute_capability, environment.sm_count)
    added = removed = kept = 0
    for when, some in _calls(kind, points):
        best, gain = _best(some)
        before = len(entries)
        entries = [x for x in entries if _identity(x) != (*card, _sorted(when))]
        removed += before - len(entries)
        if best is None:
            continue
        if gain is not None and gain <= TIE:
            kept += 1
            continue
        entries.append(_entry(run, op, kind, when, best, gain))
        added += 1
    entries.sort(key=lambda x: json.dumps([x["op"], x["capability"], _sorted(x["when"])]))
    text = json.dumps({"schema": SCHEMA, "entries": entries}, indent=2) + "\n"
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror}") from error
    return Written(path, added, removed, kept)


def _calls(kind: Kind, points: Sequence[Point]) -> list[tuple[When, list[Point]]]:
    """Right and timed points by what a call is known by."""
    found: dict[str, tuple[When, list[Point]]] = {}
    for point in points:
        if point.outcome != "ok" or point.seconds is None or point.direction not in kind.directions:
            continue
        if not set(point.config) <= set(kind.settings):
            continue
        when = kind.when(point)
        found.setdefault(json.dumps(when, sort_keys=True), (when, []))[1].append(point)
    return list(found.values())


def _best(points: Sequence[Point]) -> tuple[Point | None, float | None]:
    """The configuration that is fastest over all calls here, by the mean of the logarithm of their
    times over each call's fastest, and by how much it beats the defaults."""
    times: dict[tuple[object, ...], dict[str, tuple[float, Point]]] = {}
    for point in points:
        call = (point.direction, *sorted(point.shape.items()))
        label = json.dumps(point.config, sort_keys=True)
        times.setdefault(call, {})[label] = (point.seconds or math.inf, point)
    everywhere = set.intersection(*(set(some) for some in times.values()))
    if not everywhere:
        return None, None

    def cost(label: str) -> float:
        fastest = [min(seconds for seconds, _ in some.values()) for some in times.values()]
        each = [some[label][0] for some in times.values()]
        return sum(math.log(a / b) for a, b in zip(each, fastest, strict=True)) / len(each)

    best = min(sorted(everywhere), key=cost)
    default = json.dumps({})
    gain = math.exp(cost(default) - cost(best)) if default in everywhere else None
    point = next(iter(times.values()))[best][1]
    return point, gain


def _entry(
    run: Run, op: str, kind: Kind, when: When, best: Point, gain: float | None
) -> dict[str, Any]:
    environment = run.environment
    versions = {x: run.versions[x] for x in ("torch", "triton") if x in run.versions}
    return {
        "op": op,
        "capability": environment.compute_capability,
        "processors": environment.sm_count,
        "when": when,
        "config": {n: best.config[n] for n in kind.settings if n in best.config},
        "measured": {
            "gpu": environment.name,
            **versions,
            "driver": environment.driver,
            "date": run.started_utc[:10],
            "run": run.run_id,
            "source_sha256": run.source_sha256,
            "shape": best.shape,
            "time_ns": None if best.time_ns is None else best.time_ns.median,
            "times_faster_than_defaults": None if gain is None else round(gain, 4),
        },
    }


def _identity(entry: dict[str, Any]) -> tuple[object, ...]:
    return entry["op"], entry["capability"], entry["processors"], _sorted(entry["when"])


def _sorted(when: When) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(when.items()))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        held = json.loads(path.read_text())
        entries: list[dict[str, Any]] = held["entries"]
        if held["schema"] != SCHEMA:
            raise ValueError(f"schema {held['schema']}")
        for entry in entries:
            _identity(entry)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path} is no table of configurations: {error!r}; remove it") from error
    return entries
