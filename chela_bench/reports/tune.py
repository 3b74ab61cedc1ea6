"""A tuning as tables and heat maps: configurations of one call, fastest first.

What lies within 1 % of the fastest is a tie. Static figures are those of the kernel that the
configuration changes and that takes most shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from chela_bench.records import TIE, ConfigValue, Point, Run, Static, shape_label
from chela_bench.reports.atlas import config_label
from chela_bench.reports.atlas_maps import other_axes, varied
from chela_bench.reports.columns import Column, indented, line, tables
from chela_bench.reports.groups import Group
from chela_bench.reports.heat import HeatMap, Panel, Place
from chela_bench.reports.sheets import Sheet
from chela_bench.reports.text import duration, length, machine, plain, tally, three_digits

_KB = 1024
CONTOURS = {  # most that a block can have
    "99 KB (sm_86, 89, 120)": 99.0 * _KB,
    "163 KB (sm_80)": 163.0 * _KB,
    "227 KB (sm_90, 100)": 227.0 * _KB,
}
_SHORT = {"num_warps": "warps", "num_stages": "stages"}
BLOCKS_NOTE = (
    "Configurations of one call, fastest first. x best: over the fastest one's time. KB of shared "
    "memory, registers, spilled bytes and blocks an SM are of the kernel that the settings change."
)


@dataclass(frozen=True)
class Call:
    """All configurations of one op, implementation, direction, dtype and shape."""

    points: tuple[Point, ...]

    @property
    def first(self) -> Point:
        return self.points[0]

    @property
    def title(self) -> str:
        p = self.first
        return plain(f"{p.op}/{p.impl}, {p.direction}, {p.dtype}, {shape_label(p.shape)}")

    @property
    def timed(self) -> list[Point]:
        """Fastest first."""
        ok = [point for point in self.points if point.seconds is not None]
        return sorted(ok, key=lambda point: (point.seconds or 0.0, point.key))

    @property
    def ties(self) -> list[Point]:
        """The fastest, and all within 1 % of it."""
        timed = self.timed
        if not timed:
            return []
        limit = TIE * (timed[0].seconds or 0.0)
        return [point for point in timed if (point.seconds or 0.0) <= limit]

    @property
    def varying(self) -> list[str]:
        """Settings that differ between configurations."""
        names = dict.fromkeys(name for point in self.points for name in point.config)
        return [n for n in names if len({p.config.get(n) for p in self.points}) > 1]

    @property
    def default(self) -> Point | None:
        """That sets none of them."""
        for point in self.points:
            if not set(point.config) & set(self.varying):
                return point
        return None

    @property
    def speedup(self) -> float | None:
        """Of the fastest over the defaults."""
        default = self.default
        if default is None or default.seconds is None or not self.timed:
            return None
        return default.seconds / (self.timed[0].seconds or math.inf)

    @property
    def error_range(self) -> tuple[float, float] | None:
        """Least and largest error of right configurations."""
        errors = [point.error_rel for point in self.timed if point.error_rel is not None]
        return (min(errors), max(errors)) if errors else None

    def correlations(self) -> dict[str, float]:
        """Spearman's rank correlation of static figures with time, of what has both."""
        found = {}
        for name, figure in FIGURES.items():
            pairs = [
                (value, point.seconds)
                for point in self.timed
                if point.seconds is not None and (value := figure(point.static)) is not None
            ]
            rank = rank_correlation(pairs)
            if rank is not None:
                found[name] = rank
        return found


def static_score(static: Static) -> float | None:
    """What one would guess a kernel's time from: warps that an SM holds hide latency, and every
    byte that spills costs as much as if it kept eight warps away per KB; less is better."""
    if static.ctas_per_sm is None or static.num_warps is None:
        return None
    spills = (static.spill_store_bytes or 0) + (static.spill_load_bytes or 0)
    return spills / 128 - static.ctas_per_sm * static.num_warps


FIGURES: Mapping[str, Callable[[Static], float | None]] = {
    "score": static_score,
    "shared memory": lambda static: static.smem_bytes,
    "registers": lambda static: static.regs,
    "spills": lambda static: (
        None
        if static.spill_store_bytes is None
        else static.spill_store_bytes + (static.spill_load_bytes or 0)
    ),
    "warps an SM": lambda static: (
        None
        if static.ctas_per_sm is None or static.num_warps is None
        else static.ctas_per_sm * static.num_warps
    ),
}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's, ties sharing their mean rank; None of fewer than three, or where one of the two
    never differs."""
    if len(pairs) < 3:
        return None
    x, y = (_ranks([pair[i] for pair in pairs]) for i in range(2))
    mean = (len(pairs) - 1) / 2
    over = sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True))
    under = math.sqrt(sum((a - mean) ** 2 for a in x) * sum((b - mean) ** 2 for b in y))
    return round(over / under, 4) if under else None


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: i for i, value in reversed(list(enumerate(ordered)))}
    count = {value: ordered.count(value) for value in first}
    return [first[value] + (count[value] - 1) / 2 for value in values]


def calls(points: Sequence[Point]) -> list[Call]:
    found: dict[tuple[object, ...], list[Point]] = {}
    for p in points:
        key = (p.op, p.impl, p.direction, p.dtype, shape_label(p.shape))
        found.setdefault(key, []).append(p)
    return [
        Call(tuple(some)) for some in sorted(found.values(), key=lambda some: some[0].shape["T"])
    ]


def summaries(points: Sequence[Point]) -> list[dict[str, object]]:
    """Of each call, for scripts."""
    return [
        {
            "op": call.first.op,
            "impl": call.first.impl,
            "direction": call.first.direction,
            "dtype": call.first.dtype,
            "shape": call.first.shape,
            "configurations": len(call.points),
            "timed": len(call.timed),
            "best": call.timed[0].key if call.timed else None,
            "ties": [point.key for point in call.ties],
            "default": call.default.key if call.default is not None else None,
            "speedup": call.speedup,
            "error_range": call.error_range,
            "rank_correlation": call.correlations(),
        }
        for call in calls(points)
    ]


def tune_table(run: Run, points: Sequence[Point]) -> RenderableType:
    """A table for each call: configurations down, fastest first; what failed and why."""
    return _Tuning(run, tuple(points))


@dataclass(frozen=True)
class _Tuning:
    run: Run
    points: tuple[Point, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield line(" | ".join(machine(self.run, self.points)), "dim")
        if is_interpreted(self.run):
            yield line(INTERPRETED, "bold")
        for call in calls(self.points):
            yield Text()
            yield line(call.title, "bold")
            if call.timed:
                leading, columns = _columns(call)
                yield from tables(leading, columns, options.max_width, repeated=len(leading))
                yield line("= within 1 % of the fastest; d the defaults", "dim")
                yield from map(line, _remarks(call))
            yield from _failures(call)
        yield Text()
        yield line(tally(self.run, self.points), "bold")


INTERPRETED = "Triton's interpreter on a CPU: these times say nothing of a GPU"


def is_interpreted(run: Run) -> bool:
    return bool(run.settings.get("interpreted"))


def _columns(call: Call) -> tuple[list[Column], list[Column]]:
    timed, ties = call.timed, {point.key for point in call.ties}
    default = call.default
    fastest = timed[0].seconds or math.inf

    def mark(point: Point) -> str:
        is_default = default is not None and point.key == default.key
        return ("=" if point.key in ties else "") + ("d" if is_default else "")

    leading: list[Column] = [("", [Text(mark(p), "bold") for p in timed])]
    leading += [
        (_SHORT.get(name, name), [Text(plain(str(p.config.get(name, "-")))) for p in timed])
        for name in call.varying
    ]
    statics = [p.static for p in timed]
    columns: list[Column] = [
        ("time", [Text(duration((p.seconds or 0.0) * 1e9)) for p in timed]),
        ("x best", [Text(f"{(p.seconds or 0.0) / fastest:.3f}") for p in timed]),
        ("KB", [Text(_kb(s.smem_bytes)) for s in statics]),
        ("regs", [Text(_known(s.regs)) for s in statics]),
        ("spills", [Text(_known(FIGURES["spills"](s))) for s in statics]),
        ("x SM", [Text(_known(s.ctas_per_sm)) for s in statics]),
        ("error", [Text("-" if p.error_rel is None else f"{p.error_rel:.2e}") for p in timed]),
        ("compile", [Text(_compiling(s)) for s in statics]),
    ]
    return leading, columns


def _compiling(static: Static) -> str:
    return "-" if static.compile_ms is None else duration(static.compile_ms * 1e6)


def _kb(size: int | None) -> str:
    return "-" if size is None else f"{size / _KB:.0f}"


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _remarks(call: Call) -> Iterator[str]:
    ties = call.ties
    alike = f", and {len(ties) - 1} within 1 % of it" if len(ties) > 1 else ""
    best = config_label((n, ties[0].config[n]) for n in call.varying if n in ties[0].config)
    yield f"fastest: {plain(best)}{alike}"
    if call.speedup is not None:
        yield f"the defaults take {three_digits(call.speedup)} times as long as the fastest"
    errors = call.error_range
    if errors is not None:
        budget = call.first.error_budget or call.timed[0].error_budget
        allowed = "" if budget is None else f"; {budget:.2e} allowed"
        yield f"errors from {errors[0]:.2e} to {errors[1]:.2e}{allowed}"
    ranks = call.correlations()
    if ranks:
        each = ", ".join(f"{name} {rank:+.2f}" for name, rank in ranks.items())
        yield f"rank correlation with time: {each}"
    alone = [point for point in call.timed if point.rounds is None]
    if len(call.timed) > 1 and alone:
        yield f"{len(alone)} of {len(call.timed)} timed by themselves, not in turn"


def _failures(call: Call) -> Iterator[RenderableType]:
    reasons: dict[tuple[str, str], list[Point]] = {}
    for point in call.points:
        if point.outcome != "ok":
            reasons.setdefault((point.outcome, point.reason or ""), []).append(point)
    for (outcome, reason), some in reasons.items():
        varying = call.varying
        label = config_label((n, some[0].config[n]) for n in varying if n in some[0].config)
        more = f", and {len(some) - 1} more" if len(some) > 1 else ""
        yield line(f"{outcome}: {plain(label)}{more}")
        yield indented(plain(reason), "dim")


def tune_maps(run: Run, points: Sequence[Point]) -> dict[str, HeatMap]:
    """Time over two settings, a panel a length; a map for each op, implementation, direction and
    dtype, by a name that is safe for a file. None where fewer than two settings were varied."""
    kinds: dict[tuple[str, ...], list[Call]] = {}
    for call in calls(points):
        p = call.first
        sizes = {name: size for name, size in p.shape.items() if name != "T"}
        label = shape_label(sizes)
        kinds.setdefault((p.op, p.impl, p.direction, p.dtype, label), []).append(call)
    found = {}
    for (op, impl, direction, dtype, sizes_label), some in kinds.items():
        axes = varied([point.config for call in some for point in call.points])
        if axes is None:
            continue
        panels = tuple(_panel(call, axes) for call in some)
        others = other_axes([p.config for call in some for p in call.points], axes)
        kind = "wall time" if run.environment.device == "cpu" else "kernel time"
        notes = (f"best of all {others}",) if others else ()
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in impl)
        found[f"{op}-{name}-{direction}-{dtype}-{sizes_label}-tune"] = HeatMap(
            title=f"{plain(op)}/{plain(impl)}, {direction}: {kind} of a call",
            subtitle=" | ".join((sizes_label, dtype, *machine(run, points)))
            + (f" | {INTERPRETED}" if is_interpreted(run) else ""),
            x_name=axes[1], y_name=axes[0], panels=panels, label=_short_duration,
            logarithmic=True, contours=CONTOURS, notes=notes,
        )  # fmt: skip
    return found


def block_maps(run: Run, slug: str, group: Group) -> dict[str, tuple[str, HeatMap]]:
    """By a figure's name, the implementation and its map."""
    found: dict[str, tuple[str, HeatMap]] = {}
    for number, impl in enumerate(sorted({point.impl for point in group.points}), start=1):
        maps = tune_maps(run, [point for point in group.points if point.impl == impl])
        found |= {f"{slug}-blocks-{number}": (plain(impl), heat) for heat in maps.values()}
    return found


def block_sheet(group: Group) -> Sheet:
    """Every configuration where several were tried, fastest first within a call."""
    several = [call for call in calls(group.points) if len(call.points) > 1]
    settings = list(dict.fromkeys(name for call in several for name in call.varying))
    header = (
        "T", "implementation", *(plain(_SHORT.get(name, name)) for name in settings),
        "time ms", "x best", "KB", "registers", "spills", "blocks an SM", "outcome",
    )  # fmt: skip
    lines = []
    for call in several:
        failed = [point for point in call.points if point.outcome != "ok"]
        for point in [*call.timed, *failed]:
            best, static = call.timed[0].seconds if call.timed else None, point.static
            lines.append(
                (
                    length(point.shape["T"]),
                    plain(point.impl),
                    *(plain(str(point.config.get(name, ""))) for name in settings),
                    "" if point.seconds is None else three_digits(point.seconds * 1e3),
                    "" if point.seconds is None or not best else f"{point.seconds / best:.3f}",
                    *(
                        "" if point.seconds is None or value is None else f"{value:.0f}"
                        for value in (
                            None if static.smem_bytes is None else static.smem_bytes / _KB,
                            static.regs,
                            FIGURES["spills"](static),
                            static.ctas_per_sm,
                        )
                    ),
                    point.outcome,
                )
            )
    return Sheet("Block sizes", BLOCKS_NOTE, 2, header, tuple(lines)).without_empty()


def _panel(call: Call, axes: tuple[str, str]) -> Panel:
    values: dict[Place, float] = {}
    levels: dict[Place, float] = {}
    missing: dict[Place, str] = {}
    under: dict[Place, str] = {}
    ties = {point.key for point in call.ties}
    marked = set()
    for point in reversed(call.timed):  # the fastest is the last to be written
        place = _place(point.config, axes)
        if place is not None:
            values[place] = (point.seconds or 0.0) * 1e9
            if point.static.smem_bytes is not None:
                levels[place] = float(point.static.smem_bytes)
                under[place] = f"{_kb(point.static.smem_bytes)} KB"
            if point.key in ties:
                marked.add(place)
    for point in call.points:
        place = _place(point.config, axes)
        if place is not None and point.outcome != "ok":
            missing[place] = point.outcome.replace("_", " ")
    kept = {place: why for place, why in missing.items() if place not in values}
    name = f"T = {length(call.first.shape['T'])}"
    return Panel(name, values, kept, levels, under, frozenset(marked))


def _place(config: Mapping[str, ConfigValue], axes: tuple[str, str]) -> Place | None:
    if not all(name in config for name in axes):
        return None
    y, x = (config[name] for name in axes)
    return (str(x) if isinstance(x, bool) else x), (str(y) if isinstance(y, bool) else y)


def _short_duration(nanoseconds: float) -> str:
    return duration(nanoseconds).replace("us", "µs")
