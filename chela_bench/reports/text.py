"""Words and numbers as every report writes them: units, lengths, other people's text made safe."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from chela_bench.records import OUTCOMES, Point, Run

_MOST_OPS = 3  # named in a heading
_OPERANDS = {"fp32": "fp32 (as TF32)"}  # as profiles.ceilings multiplies them
_ANSI_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")


def plain(text: str) -> str:
    """Text on one line, without terminal sequences, control or invisible characters."""
    spaced = " ".join(_ANSI_SEQUENCE.sub("", text).split())
    return "".join(c for c in spaced if unicodedata.category(c)[0] != "C")


def three_digits(value: float) -> str:
    """Three significant digits and never fewer than the whole part: 0.0123, 1.05, 89.0, 1234."""
    if value == 0:
        return "0"
    decimals = 2 - int(f"{value:.2e}".split("e")[1])
    return f"{value:.{max(decimals, 0)}f}"


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """The value in the largest unit that leaves at least 1 of it, else in the smallest."""
    for scale, unit in units:
        number = three_digits(value / scale)
        if float(number) >= 1:
            return f"{number} {unit}"
    return f"{number} {unit}"


def duration(nanoseconds: float) -> str:
    """`89.0 us`, `1.05 ms`, `12.3 s`."""
    return _scaled(nanoseconds, [(1e9, "s"), (1e6, "ms"), (1e3, "us"), (1, "ns")])


def memory(size_bytes: float) -> str:
    """`512 MiB`, `1.25 GiB`."""
    units = [(2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")]
    return _scaled(size_bytes, units)


def length(tokens: float) -> str:
    """`1k` is 1024 and `1M` is 1024k, as `--lens` reads them; other lengths are written out."""
    for scale, unit in ((2**20, "M"), (2**10, "k")):
        if tokens and tokens % scale == 0:
            return f"{int(tokens) // scale}{unit}"
    return f"{tokens:g}" if tokens < 1e6 else f"{tokens:.0f}"


def lengths(some: Iterable[int], among: Sequence[int]) -> str:
    """`1k, 8k..64k`: neighbours in `among` are written as one stretch."""
    stretches: list[list[int]] = []
    for tokens in sorted(set(some)):
        if stretches and among.index(tokens) == among.index(stretches[-1][-1]) + 1:
            stretches[-1].append(tokens)
        else:
            stretches.append([tokens])
    return ", ".join(
        length(s[0]) if len(s) == 1 else f"{length(s[0])}..{length(s[-1])}" for s in stretches
    )


def device_name(run: Run) -> str:
    """The card, `2 x` the card, or on a CPU run the processor."""
    environment = run.environment
    if environment.device == "cpu":
        return plain(environment.cpu)
    cards = Counter([environment.name, *(d.environment.name for d in run.other_devices)])
    return " and ".join(
        plain(name) if count == 1 else f"{count} x {plain(name)}" for name, count in cards.items()
    )


def own_cost(run: Run, points: Iterable[Point]) -> str | None:
    """`18 % of 312 s; the rest: 56.0 s compiling, 20.1 s checking, 180 s timing`. Of a run that was
    resumed only the last session is known whole."""
    cost = run.cost
    if cost is None:
        return None
    timing_s = sum(point.spent.timing_s for point in points if point.spent is not None)
    resumed = timing_s > cost.timing_s + 0.01  # which is rounded
    parts = [
        f"{three_digits(seconds)} s {name}"
        for name, seconds in (
            ("compiling", cost.compiling_s),
            ("checking", cost.checking_s),
            ("timing", cost.timing_s),
            ("profiling", cost.profiling_s),
        )
        if seconds or name != "profiling"
    ]
    return (
        f"{100 * cost.own_share:.0f} % of {three_digits(cost.wall_s)} s"
        f"{' since it was last resumed' if resumed else ''}; "
        f"the rest: {', '.join(parts)}"
    )


def method(points: Iterable[Point]) -> str:
    """How time was taken: `event timer, cold L2`."""
    ways = {
        "wall clock"
        if point.device == "cpu"
        else f"{point.timer} timer" + (f", {point.l2} L2" if point.l2 else "")
        for point in points
    }
    return " and ".join(sorted(ways))


def listed(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def subject(run: Run, points: Iterable[Point]) -> str:
    """`gate, linear_attention, long_conv and 2 more on NVIDIA H100 80GB HBM3, 2026-11-26`."""
    ops = sorted({plain(point.op) for point in points}) or ["nothing"]
    if len(ops) > _MOST_OPS + 1:
        ops = [*ops[:_MOST_OPS], f"{len(ops) - _MOST_OPS} more"]
    where = "CPU" if run.environment.device == "cpu" else device_name(run)
    return f"{listed(ops)} on {where}, {plain(run.started_utc[:10])}"


def machine(run: Run, points: Iterable[Point]) -> list[str]:
    """What a time depends on: card, torch, triton, timer and L2, date."""
    versions = [
        f"{name} {plain(run.versions[name])}"
        for name in ("torch", "triton")
        if name in run.versions
    ]
    parts = [device_name(run), *versions, method(points), f"{plain(run.started_utc[:10])} UTC"]
    return [part for part in parts if part]


def clocks(run: Run, points: Iterable[Point]) -> str | None:
    """`SM 1665 to 1980 of 1980 MHz while timing, memory 2619 of 2619 MHz`."""
    read = [point.telemetry for point in points]
    limits = run.environment
    known = [
        ("SM", [t.sm_clock_min_mhz or t.sm_clock_mhz for t in read],
         [t.sm_clock_mhz for t in read], limits.max_sm_clock_mhz),
        ("memory", [t.mem_clock_mhz for t in read], [t.mem_clock_mhz for t in read],
         limits.max_mem_clock_mhz),
    ]  # fmt: skip
    parts = []
    for name, least, most, limit in known:
        if any(least) and any(most):
            low, high = min(filter(None, least)), max(filter(None, most))
            of = f" of {limit}" if limit else ""
            parts.append(f"{name} {low if low == high else f'{low} to {high}'}{of} MHz")
    return f"{', '.join(parts)} while timing" if parts else None


def throttling(points: Iterable[Point]) -> str | None:
    """`power_cap at 12 of 269 points`; None where no card tells."""
    told = [point.throttle for point in points if point.throttle is not None]
    found = Counter(reason for reasons in told for reason in set(reasons))
    each = ", ".join(f"{reason} at {count}" for reason, count in sorted(found.items()))
    return f"{each or 'none at any'} of {len(told)} points" if told else None


def facts(run: Run, points: Sequence[Point]) -> dict[str, str]:
    """Where the figures come from: machine, versions, ceilings, method, inputs, times, source."""
    environment, ceilings = run.environment, run.ceilings
    tools = {"python": environment.python, "driver": environment.driver, "CUDA": environment.cuda}
    versions = {**run.versions, **{name: v for name, v in tools.items() if v}}
    rates = [
        f"{_OPERANDS.get(dtype, dtype)} {rate:.0f} TFLOP/s"
        for dtype, rate in ceilings.matmul_tflop_per_s.items()
    ]
    dirty = " with uncommitted changes" if run.git_dirty else ""
    found = {
        "Machine": device_name(run),
        "System": f"{environment.os}, {environment.cpu_threads} CPU threads",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Copy bandwidth": ceilings.copy_gb_per_s and f"{ceilings.copy_gb_per_s:.0f} GB/s",
        "Matmul rate": ", ".join(rates),
        "Clocks": clocks(run, points),
        "Throttling": throttling(points),
        "Power limit": environment.power_limit_mw and f"{environment.power_limit_mw / 1000:.0f} W",
        "Timing": method(points),
        "Inputs": f"{run.inputs}, seed {run.seed}",
        "Started": run.started_utc,
        "Finished": run.finished_utc or "not finished: interrupted, or still running",
        "Bench's own cost": own_cost(run, points),
        "Source": run.git_sha and f"{run.git_sha[:12]}{dirty}",
        "Package": run.source_sha256 and f"sha256 {run.source_sha256[:12]}",
    }
    return {name: plain(str(fact)) for name, fact in found.items() if fact}


def tally(run: Run, points: Sequence[Point]) -> str:
    """`49 points: 40 ok, 4 oom, 5 skipped`, and how many were planned if some are missing."""
    if not points:
        return f"no points: nothing was measured ({run.planned_points} planned)"
    counts = Counter(point.outcome for point in points)
    each = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    noun = "point" if len(points) == 1 else "points"
    of = f" of {run.planned_points} planned" if run.planned_points > len(points) else ""
    return f"{len(points)} {noun}{of}: {each}"
