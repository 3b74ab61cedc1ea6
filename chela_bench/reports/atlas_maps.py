"""Heat maps of an atlas: shared memory, blocks an SM and spills over two settings, a panel each
architecture.

A cell is a call with these settings; of its kernels those count that the settings change. Where
there are further settings, the best of them stands in the cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from chela_bench.records import AtlasRow, ConfigValue
from chela_bench.reports.heat import HeatMap, Panel, Place
from chela_bench.reports.text import plain

FIRST_AXES = ("BLOCK_T", "BLOCK_V")  # drawn against each other wherever both vary
_Config = tuple[tuple[str, ConfigValue], ...]


def atlas_maps(rows: Sequence[AtlasRow], archs: Sequence[str]) -> dict[str, HeatMap]:
    """By a name that is safe for a file; none where fewer than two settings were varied."""
    found = {}
    for op, impl in dict.fromkeys((row.op, row.impl) for row in rows):
        some = [row for row in rows if (row.op, row.impl) == (op, impl)]
        axes = varied([asked for row in some for asked in row.asked])
        if axes is None:
            continue
        others = other_axes([asked for row in some for asked in row.asked], axes)
        for kind, title, value, best, label in _QUANTITIES:
            panels = tuple(
                _panel([row for row in some if row.arch == arch], arch, axes, value, best)
                for arch in archs
                if any(row.arch == arch for row in some)
            )
            subtitle = (
                f"the kernels of {plain(op)}/{plain(impl)} that these settings change, "
                f"{some[0].dtype}, Triton {plain(some[0].triton)}"
            )
            name = f"{op}-{impl}-{some[0].dtype}-atlas-{kind}"
            found[name] = HeatMap(
                title, subtitle, axes[1], axes[0], panels, label,
                notes=(f"best of all {others}",) if others else (),
            )  # fmt: skip
    return found


def varied(asked: Sequence[dict[str, ConfigValue]]) -> tuple[str, str] | None:
    """The two settings to draw against each other: y, then x."""
    values: dict[str, set[ConfigValue]] = {}
    for config in asked:
        for name, value in config.items():
            values.setdefault(name, set()).add(value)
    several = [name for name, found in values.items() if len(found) > 1]
    if set(FIRST_AXES) <= set(several):
        return FIRST_AXES
    numeric = [n for n in several if all(type(x) is int for x in values[n])]
    return next(iter(combinations([*numeric, *(n for n in several if n not in numeric)], 2)), None)


def other_axes(configs: Sequence[dict[str, ConfigValue]], axes: tuple[str, str]) -> str:
    """Settings that differ beside the two that are drawn."""
    names = dict.fromkeys(name for config in configs for name in config)
    several = [n for n in names if len({c[n] for c in configs if n in c}) > 1]
    return ", ".join(name for name in several if name not in axes)


def _panel(
    rows: Sequence[AtlasRow],
    arch: str,
    axes: tuple[str, str],
    value: Callable[[Sequence[AtlasRow]], float | None],
    best: Callable[[float, float], float],
) -> Panel:
    values: dict[Place, float] = {}
    missing: dict[Place, str] = {}
    for config, used in calls(rows):
        settings = dict(config)
        if not all(name in settings for name in axes):
            continue
        place = _word(settings[axes[1]]), _word(settings[axes[0]])
        wrong = next((row for row in used if not row.fits), None)
        if wrong is not None:
            missing[place] = short_reason(wrong)
            continue
        found = value(used)
        if found is not None:
            values[place] = best(values[place], found) if place in values else found
        else:
            missing[place] = "not modelled"
    kept = {place: why for place, why in missing.items() if place not in values}
    return Panel(arch, values, kept)


def calls(rows: Sequence[AtlasRow]) -> Iterator[tuple[_Config, list[AtlasRow]]]:
    """Each configuration with the kernels that set it apart from others; all of its kernels where
    none does."""
    configs = dict.fromkeys(tuple(asked.items()) for row in rows for asked in row.asked)
    for config in configs:
        used = [row for row in rows if dict(config) in row.asked]
        own = [row for row in used if len(row.asked) < len(configs)]
        yield config, own or used


def short_reason(row: AtlasRow) -> str:
    """For a cell."""
    if row.outcome != "out_of_resources":
        return row.outcome.replace("_", " ")
    if row.limiter == "shared memory" and row.smem_bytes:
        return f"{row.smem_bytes / 1024:.0f} KB: too much"
    if row.limiter == "tensor memory":
        return f"{row.tmem_columns} columns"
    return f"{row.limiter}"


def _word(value: ConfigValue) -> int | str:
    return str(value) if isinstance(value, bool) else value


def _smem(rows: Sequence[AtlasRow]) -> float | None:
    return max((row.smem_bytes or 0) / 1024 for row in rows)


def _blocks(rows: Sequence[AtlasRow]) -> float | None:
    known = [row.ctas_per_sm for row in rows if row.ctas_per_sm is not None]
    return min(known) if len(known) == len(rows) else None


def _spills(rows: Sequence[AtlasRow]) -> float | None:
    return max(row.spill_bytes for row in rows)


def _whole(value: float) -> str:
    return f"{value:.0f}"


_QUANTITIES = (
    ("smem", "Shared memory of a block, KB", _smem, min, _whole),
    ("blocks", "Blocks that an SM holds at once", _blocks, max, _whole),
    ("spills", "Spills, bytes a thread stored and loaded", _spills, min, _whole),
)
