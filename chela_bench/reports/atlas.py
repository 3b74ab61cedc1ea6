"""An atlas as tables for a terminal, and as a table of plain rows.

A cell is a kernel on an architecture: KB of shared memory, registers a thread, blocks an SM, and
what spills. Of several kernels that differ in flags alone the largest figures stand.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from chela_bench.records import AtlasRow, ConfigValue, Refused
from chela_bench.reports.columns import indented, line, table, tables
from chela_bench.reports.sheets import Sheet
from chela_bench.reports.text import plain

Config = tuple[tuple[str, ConfigValue], ...]
_SHORT = {"num_warps": "warps", "num_stages": "stages"}
CELLS_NOTE = (
    "KB of shared memory, registers a thread, x blocks an SM, +bytes that spill; "
    "-: not launched there"
)
_REASONS = 12  # shown at most; the rest are counted


def config_of(row: AtlasRow) -> Config:
    return tuple(row.config.items())


def config_label(config: Iterable[tuple[str, ConfigValue]]) -> str:
    """`BLOCK_T=64, BLOCK_V=128`; `defaults` where nothing is set."""
    return ", ".join(f"{name}={value}" for name, value in config) or "defaults"


def atlas_frame(rows: Sequence[AtlasRow]) -> pd.DataFrame:
    """A row a kernel; what is no single value is JSON."""
    plain_rows = []
    for row in rows:
        record = row.model_dump(mode="json")
        plain_rows.append(
            {
                name: json.dumps(value) if isinstance(value, dict | list) else value
                for name, value in record.items()
            }
        )
    return pd.DataFrame(plain_rows, columns=list(AtlasRow.model_fields))


def atlas_table(
    rows: Sequence[AtlasRow], refused: Sequence[Refused], archs: Sequence[str]
) -> RenderableType:
    """A table for each kernel: its configurations down, architectures across."""
    return _Atlas(tuple(rows), tuple(refused), tuple(archs))


@dataclass(frozen=True)
class _Atlas:
    rows: tuple[AtlasRow, ...]
    refused: tuple[Refused, ...]
    archs: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.rows:
            yield line(f"Triton {plain(self.rows[0].triton)}, {self.rows[0].dtype}", "dim")
        for (op, kernel), rows in _by_kernel(self.rows).items():
            language = ", in Gluon: one architecture alone" * (rows[0].language == "gluon")
            yield Text()
            yield line(f"{plain(op)}: {plain(kernel)}{language}", "bold")
            yield from _kernel_tables(rows, self.archs, options.max_width)
        yield Text()
        yield line(CELLS_NOTE, "dim")
        for text, is_reason in (*_problems(self.rows), *_refusals(self.refused)):
            yield indented(text, "dim") if is_reason else line(text)
        yield line(tally(self.rows), "bold")


def atlas_sheets(rows: Sequence[AtlasRow], archs: Sequence[str]) -> list[Sheet]:
    """The terminal's tables: one a kernel, its configurations down, architectures across."""
    found = []
    for (op, kernel), some in _by_kernel(rows).items():
        configs, by_place = _places(some)
        shown = [arch for arch in archs if any(row.arch == arch for row in some)]
        lines = tuple(
            (
                plain(config_label(config)),
                *(_cell(by_place.get((config, a), [])).plain for a in shown),
            )
            for config in configs
        )
        title = plain(f"{op}: {kernel}")
        found.append(Sheet(title, "", 1, ("configuration", *map(plain, shown)), lines))
    return found


def problem_lines(rows: Sequence[AtlasRow], refused: Sequence[Refused]) -> list[str]:
    """What does not run or is not launched, and why: each reason once."""
    return [text for text, _ in (*_problems(rows), *_refusals(refused))]


def _by_kernel(rows: Iterable[AtlasRow]) -> dict[tuple[str, str], list[AtlasRow]]:
    found: dict[tuple[str, str], list[AtlasRow]] = {}
    for row in rows:
        found.setdefault((row.op, row.kernel), []).append(row)
    return found


def _kernel_tables(
    rows: Sequence[AtlasRow], archs: Sequence[str], width: int
) -> Iterator[RenderableType]:
    configs, by_place = _places(rows)
    names = list(dict.fromkeys(name for config in configs for name, _ in config))
    leading = [
        (_SHORT.get(name, name), [Text(str(dict(c).get(name, "-"))) for c in configs])
        for name in names
    ]
    shown = [arch for arch in archs if any(row.arch == arch for row in rows)]
    columns = [(arch, [_cell(by_place.get((c, arch), [])) for c in configs]) for arch in shown]
    yield from tables(leading, columns, width, repeated=len(leading))


def _places(
    rows: Sequence[AtlasRow],
) -> tuple[list[Config], dict[tuple[Config, str], list[AtlasRow]]]:
    """Configurations in their order, and what stands at each and an architecture."""
    by_place: dict[tuple[Config, str], list[AtlasRow]] = {}
    for row in rows:
        by_place.setdefault((config_of(row), row.arch), []).append(row)
    return sorted({config_of(row) for row in rows}, key=_order), by_place


def _order(config: Config) -> tuple[tuple[str, bool, float, str], ...]:
    """Numbers by size, words by letter."""
    return tuple(
        (name, isinstance(x, str), 0.0 if isinstance(x, str) else float(x), str(x))
        for name, x in config
    )


def _cell(rows: Sequence[AtlasRow]) -> Text:
    if not rows:
        return Text("-", "dim")
    failed = [row for row in rows if row.outcome not in ("ok", "out_of_resources")]
    if failed:
        return Text(failed[0].outcome, "red")
    smem = max(row.smem_bytes or 0 for row in rows) / 1024
    regs = max(row.regs or 0 for row in rows)
    spills = max(row.spill_bytes for row in rows)
    blocks = [row.ctas_per_sm for row in rows if row.ctas_per_sm is not None]
    misfits = [row for row in rows if not row.fits]
    text = f"{smem:.0f}K {regs}"
    if misfits:
        return Text(f"{text} too much", "red")
    text += f" x{min(blocks)}" if blocks else ""
    return Text(f"{text} +{spills}", "yellow") if spills else Text(text)


def _problems(rows: Sequence[AtlasRow]) -> Iterator[tuple[str, bool]]:
    """What does not run, and why: each reason once, and whether it is the reason."""
    wrong = [row for row in rows if not row.fits]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in wrong:
        where = f"{row.kernel} {config_label(config_of(row))} on {row.arch}"
        reasons.setdefault((row.outcome, row.reason or ""), []).append(where)
    for (outcome, reason), places in itertools.islice(reasons.items(), _REASONS):
        more = f", and {len(places) - 1} more" if len(places) > 1 else ""
        yield plain(f"{outcome}: {places[0]}{more}"), False
        yield plain(reason), True
    if len(reasons) > _REASONS:
        yield f"and {len(reasons) - _REASONS} more reasons: see --json", False


def _refusals(refused: Sequence[Refused]) -> Iterator[tuple[str, bool]]:
    reasons: dict[str, list[str]] = {}
    for each in refused:
        where = f"{each.op}/{each.impl} {config_label(each.asked.items())} on {each.arch}"
        reasons.setdefault(each.reason, []).append(where)
    for reason, places in itertools.islice(reasons.items(), _REASONS):
        more = f", and {len(places) - 1} more calls" if len(places) > 1 else ""
        yield plain(f"not launched: {places[0]}{more}"), False
        yield plain(reason), True


def tally(rows: Sequence[AtlasRow]) -> str:
    """`28 kernels compiled: 26 fit, 1 out_of_resources, 1 crash`."""
    outcomes = [row.outcome for row in rows]
    failed = [name for name in dict.fromkeys(outcomes) if name != "ok"]
    parts = [f"{outcomes.count('ok')} fit", *(f"{outcomes.count(n)} {n}" for n in failed)]
    spilling = sum(row.fits and row.spill_bytes > 0 for row in rows)
    spills = f"; {spilling} spill" if spilling else ""
    kernels = "kernel" if len(rows) == 1 else "kernels"
    return f"{len(rows)} {kernels} compiled: {', '.join(parts)}{spills}"


def runs_on(rows: Sequence[AtlasRow], arch: str) -> list[dict[str, object]]:
    """The configurations of calls whose every kernel fits there, by op, with the most shared memory
    that one takes and the fewest blocks an SM holds of one."""
    return [
        {
            "op": op,
            "impl": impl,
            "config": dict(config),
            "smem_bytes": max(row.smem_bytes or 0 for row in used),
            "ctas_per_sm": min((row.ctas_per_sm or 0 for row in used), default=None),
            "spill_bytes": max(row.spill_bytes for row in used),
        }
        for (op, impl, config), used in _calls(rows, arch).items()
        if all(row.fits for row in used)
    ]


def not_known_on(rows: Sequence[AtlasRow], arch: str) -> list[dict[str, object]]:
    """The configurations of calls of which no kernel is known not to fit there, and a compiler
    crashed or took too long for one."""
    return [
        {"op": op, "impl": impl, "config": dict(config)}
        for (op, impl, config), used in _calls(rows, arch).items()
        if not all(row.known for row in used) and all(row.fits for row in used if row.known)
    ]


def _calls(rows: Sequence[AtlasRow], arch: str) -> dict[tuple[str, str, Config], list[AtlasRow]]:
    """The kernels that each call launches there."""
    calls: dict[tuple[str, str, Config], list[AtlasRow]] = {}
    for row in rows:
        if row.arch == arch:
            for asked in row.asked:
                calls.setdefault((row.op, row.impl, tuple(asked.items())), []).append(row)
    return calls


def runs_on_table(rows: Sequence[AtlasRow], arch: str) -> RenderableType:
    """`runs_on` and `not_known_on`, for a terminal."""
    return _RunsOn(tuple(rows), arch)


@dataclass(frozen=True)
class _RunsOn:
    rows: tuple[AtlasRow, ...]
    arch: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = runs_on(self.rows, self.arch)
        asked = len(_calls(self.rows, self.arch))
        open_ = not_known_on(self.rows, self.arch)
        rest = f"; {len(open_)} not known" if open_ else ""
        yield Text()
        yield line(f"runs on {self.arch}: {len(found)} of {asked} configurations{rest}", "bold")
        if found:
            cells: dict[str, list[Text]] = {"configuration": [], "KB": [], "x": [], "spills": []}
            for each in found:
                cells["configuration"].append(Text(_call_label(each)))
                smem = each["smem_bytes"]
                assert isinstance(smem, int)
                cells["KB"].append(Text(f"{smem / 1024:.0f}"))
                cells["x"].append(Text(str(each["ctas_per_sm"])))
                cells["spills"].append(Text(str(each["spill_bytes"])))
            yield table(list(cells.items()), options.max_width)
        for each in open_:
            yield line(f"not known: {_call_label(each)}")


def _call_label(call: Mapping[str, object]) -> str:
    config = call["config"]
    assert isinstance(config, dict)
    return plain(f"{call['op']}/{call['impl']} {config_label(config.items())}")
