"""A run as a Markdown page that renders on a code host and reads as plain text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence

from chela_bench.records import Point, Run
from chela_bench.reports.groups import OTHER_FUNCTIONS, Group, Series, groups
from chela_bench.reports.text import (
    device_name,
    length,
    method,
    plain,
    tally,
    three_digits,
)

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])")


def summary(run: Run, points: Sequence[Point]) -> str:
    """Machine, method and command, then one table a group, then what failed and why."""
    parts = [f"# {escaped(run.run_id)}", escaped(tally(run, points)), _facts(run, points)]
    parts += ["Command:", f"    {plain(shlex.join(run.argv))}"]
    for group in groups(points):
        parts += [f"## {escaped(group.title)}", *_note(group), _times(group)]
    failed = [(g, s, p) for g in groups(points) for s in g.series for p in s.failed]
    if failed:
        parts += ["## Failed points", _failed(failed)]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no table cell of its own."""
    safe = _SPECIAL.sub(lambda match: "\\" + match.group(), plain(text))
    return "".join(_ENTITIES.get(character, character) for character in safe)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    """A Markdown table of safe cells; the first `left` columns are text, the rest numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _facts(run: Run, points: Sequence[Point]) -> str:
    environment, ceilings = run.environment, run.ceilings
    tools = {"driver": environment.driver, "CUDA": environment.cuda, "Python": environment.python}
    versions = {**run.versions, **{name: v for name, v in tools.items() if v}}
    rates = [f"{dtype} {rate:.0f} TFLOP/s" for dtype, rate in ceilings.matmul_tflop_per_s.items()]
    dirty = " with uncommitted changes" if run.git_dirty else ""
    facts = {
        "Machine": device_name(run),
        "System": f"{environment.os}, {environment.cpu_threads} CPU threads",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Copy bandwidth": ceilings.copy_gb_per_s and f"{ceilings.copy_gb_per_s:.0f} GB/s",
        "Matmul rate": ", ".join(rates),
        "Power limit": environment.power_limit_mw and f"{environment.power_limit_mw / 1000:.0f} W",
        "Timing": method(points),
        "Inputs": f"{run.inputs}, seed {run.seed}",
        "Started": run.started_utc,
        "Finished": run.finished_utc or "not finished: interrupted, or still running",
        "Source": run.git_sha and f"{run.git_sha[:12]}{dirty}",
    }
    return table(
        ["", ""], [(name, escaped(str(fact))) for name, fact in facts.items() if fact], left=2
    )


def _note(group: Group) -> Iterator[str]:
    for op, other in OTHER_FUNCTIONS.items():
        if group.op == other:
            yield f"Another function than {escaped(op)}, for comparison."
    ok = [point for point in group.points if point.outcome == "ok"]
    if any(point.time_ns is None for point in ok):
        yield "(wall): from launch to synchronised end; too many launches for a kernel time."


def _times(group: Group) -> str:
    """Rows by length, then from the fastest implementation to the slowest; failures last."""
    rows = [
        (tokens, series, point)
        for tokens in group.lengths
        for series in group.series
        if (point := series.at(tokens)) is not None
    ]
    rows.sort(key=lambda row: (row[0], row[2].seconds is None, row[2].seconds or 0.0))
    header = [
        "T", "implementation", "time ms", "x floor", "tokens/s", "peak MiB", "HBM MiB", "host us",
        "error / budget",
    ]  # fmt: skip
    return table(header, [_row(group, *row) for row in rows], left=2)


def _row(group: Group, tokens: int, series: Series, point: Point) -> list[str]:
    name = escaped(series.label)
    if point.outcome != "ok" or point.seconds is None:
        return [length(tokens), name, point.outcome, *[""] * 6]
    time = three_digits(point.seconds * 1e3) + (" (wall)" if point.time_ns is None else "")
    if point is group.fastest(tokens):
        time = f"**{time}**"
    return [
        length(tokens),
        name,
        time,
        "" if point.x_floor is None else three_digits(point.x_floor),
        "" if point.tokens_per_s is None else _engineering(point.tokens_per_s),
        "" if point.peak_bytes is None else _mib(point.peak_bytes),
        _hbm(point),
        "" if point.host_ns is None else three_digits(point.host_ns / 1e3),
        _error(point),
    ]


def _hbm(point: Point) -> str:
    hbm = point.hbm
    if hbm.read_bytes is not None and hbm.write_bytes is not None:
        return f"{_mib(hbm.read_bytes + hbm.write_bytes)} ({hbm.source})"
    return "" if hbm.model_bytes is None else f"{_mib(hbm.model_bytes)} (model)"


def _mib(size_bytes: int) -> str:
    return three_digits(size_bytes / 2**20)


def _error(point: Point) -> str:
    if point.error_rel is None:
        return ""
    budget = "" if point.error_budget is None else f" / {point.error_budget:.1e}"
    return f"{point.error_rel:.1e}{budget}"


def _engineering(value: float) -> str:
    """`62.5M`, `1.20G`."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if float(three_digits(value / scale)) >= 1:
            return f"{three_digits(value / scale)}{unit}"
    return three_digits(value)


def _failed(failed: Sequence[tuple[Group, Series, Point]]) -> str:
    rows = [
        [
            escaped(group.title),
            escaped(series.label),
            length(point.shape["T"]),
            point.outcome,
            escaped(point.reason or ""),
        ]
        for group, series, point in failed
    ]
    return table(["sweep", "implementation", "T", "outcome", "reason"], rows, left=5)
