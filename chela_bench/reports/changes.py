"""A comparison as text for a terminal, Markdown for a pull request, and a figure of its ratios."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from chela_bench.reports.columns import line
from chela_bench.reports.markdown import escaped, table
from chela_bench.reports.sheets import Sheet
from chela_bench.reports.style import INK, QUIET, SCREEN, Look, settings
from chela_bench.reports.text import duration, plain, three_digits
from chela_bench.verdicts import Change, Comparison, Side, Verdict

ORDER: tuple[Verdict, ...] = ("slower", "unclear", "faster", "same")
_TERMINAL = {"slower": "red", "unclear": "yellow", "faster": "green", "same": ""}
_COLOURS = {"slower": "#D55E00", "unclear": "#E69F00", "faster": "#009E73", "same": QUIET}
_MARKERS = {"slower": ">", "unclear": "o", "faster": "<", "same": "s"}
_WIDE = 110  # from so many columns on, a benchmark takes one line
_MOST_ROWS, _MOST_IN_COLUMN = 60, 16  # of a figure
_COLUMN_CHARACTERS = 56  # of a line in a column


def reading_order(points: Sequence[Change]) -> list[Change]:
    """Slower first, then unclear, faster and same; within each the largest change first."""

    def size(change: Change) -> float:
        return 0.0 if change.ratio is None else abs(change.ratio - 1)

    return sorted(points, key=lambda c: (ORDER.index(c.verdict), -size(c), c.name))


def terminal(comparison: Comparison) -> RenderableType:
    """A line or two a benchmark, then what only one side has, notes and counts."""
    return _Terminal(comparison)


class _Terminal:
    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        comparison = self.comparison
        yield line(f"before: {_side(comparison.before)}", "dim")
        yield line(f"after:  {_side(comparison.after)}", "dim")
        yield Text()
        for change in reading_order(comparison.points):
            yield from change_lines(change, wide=options.max_width >= _WIDE)
        for names, what in ((comparison.missing, "before"), (comparison.added, "after")):
            for name in names:
                yield line(f"only {what}: {plain(name)}", "dim")
        for note in comparison.notes:
            yield line(plain(note), "dim")
        yield line(counts(comparison), "bold")


def change_lines(change: Change, *, wide: bool) -> Iterator[Text]:
    head = Text(overflow="fold")
    head.append(f"{change.verdict:<8}", _TERMINAL[change.verdict])
    head.append(f"{ratio(change):<24}{times(change):<22}")
    if wide:
        head.append(plain(change.name))
    head.rstrip()
    yield head
    if not wide:
        yield line(f"  {plain(change.name)}")
    if change.reason is not None:
        yield line(f"        {plain(change.reason)}", "dim")


def ratio(change: Change) -> str:
    """`1.034 [1.021, 1.047]`."""
    if change.ratio is None:
        return "-"
    interval = "" if change.low is None else f" [{change.low:.3f}, {change.high:.3f}]"
    return f"{change.ratio:.3f}{interval}"


def times(change: Change) -> str:
    """`133 us to 144 us`."""
    then, now = (
        "-" if time is None else duration(time) for time in (change.before_ns, change.after_ns)
    )
    return f"{then} to {now}"


def counts(comparison: Comparison) -> str:
    """`12 benchmarks: 1 slower, 11 same; 1 only before`."""
    found = Counter(change.verdict for change in comparison.points)
    each = ", ".join(f"{found[word]} {word}" for word in ORDER if found[word])
    noun = "benchmark" if len(comparison.points) == 1 else "benchmarks"
    text = f"{len(comparison.points)} {noun}" + (f": {each}" if each else "")
    for names, where in ((comparison.missing, "before"), (comparison.added, "after")):
        if names:
            text += f"; {len(names)} only {where}"
    return text


def markdown(comparison: Comparison) -> str:
    """For a pull request: counts, the changes, and everything else folded away."""
    relative = ", of multiples of the floor" if comparison.across_machines else ""
    parts = [
        f"### {escaped(counts(comparison))}",
        f"{escaped(comparison.before.label)} to {escaped(comparison.after.label)}, "
        f"{comparison.mode}{relative}, on {escaped(comparison.after.machine)}. Ratios are after "
        "over before, with 95 % intervals.",
    ]
    rows = reading_order(comparison.points)
    loud = [row for row in rows if row.verdict != "same"]
    quiet = [row for row in rows if row.verdict == "same"]
    if loud:
        parts.append(_table(loud))
    if quiet:
        parts += [
            f"<details><summary>{len(quiet)} the same</summary>",
            _table(quiet),
            "</details>",
        ]
    one_sided = [
        f"- only {where}: {escaped(name)}"
        for names, where in ((comparison.missing, "before"), (comparison.added, "after"))
        for name in names
    ]
    notes = [f"- {escaped(note)}" for note in comparison.notes]
    if one_sided or notes:
        parts.append("\n".join([*one_sided, *notes]))
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Change]) -> str:
    header = ["verdict", "benchmark", "reason", "before", "after", "ratio", "95 % interval"]
    cells = [
        [
            f"**{row.verdict}**" if row.verdict != "same" else row.verdict,
            escaped(row.name),
            escaped(row.reason or ""),
            "" if row.before_ns is None else duration(row.before_ns),
            "" if row.after_ns is None else duration(row.after_ns),
            "" if row.ratio is None else f"{row.ratio:.3f}",
            "" if row.low is None else f"{row.low:.3f} to {row.high:.3f}",
        ]
        for row in rows
    ]
    return table(header, cells, left=3)


def sheet(comparison: Comparison) -> Sheet:
    """Every benchmark that both sides have, in reading order; then what only one has."""
    rows = [
        (
            plain(row.name),
            row.verdict,
            plain(row.reason or ""),
            *(
                "" if time is None else three_digits(time / 1e6)
                for time in (row.before_ns, row.after_ns)
            ),
            *("" if each is None else f"{each:.3f}" for each in (row.ratio, row.low, row.high)),
        )
        for row in reading_order(comparison.points)
    ]
    for names, side in ((comparison.missing, "before"), (comparison.added, "after")):
        rows += [(plain(name), f"only {side}", *[""] * 6) for name in names]
    header = (
        "benchmark", "verdict", "reason", "before ms", "after ms", "ratio", "lowest", "highest"
    )  # fmt: skip
    return Sheet("Ratios", "", 3, header, tuple(rows)).without_empty()


def figure(comparison: Comparison, look: Look = SCREEN) -> Figure | None:
    """Ratios with their intervals, one line a benchmark; None if nothing was compared.

    Of more than 60, in a column 16, the largest changes are shown.
    """
    found = [row for row in reading_order(comparison.points) if row.ratio is not None]
    rows = found[: _MOST_ROWS if look.titled else _MOST_IN_COLUMN]
    if not rows:
        return None
    more = f"the largest {len(rows)} of {len(found)}" if len(rows) < len(found) else ""
    title = f"{_short(comparison.before)} to {_short(comparison.after)}"
    what = "multiple of the floor, " if comparison.across_machines else "time, "
    said = f"{what}after / before; 95 % interval; grey: noise"
    with matplotlib.rc_context(settings(look)):
        drawn = Figure(layout="constrained", dpi=100 if look.titled else look.dpi)
        FigureCanvasAgg(drawn)
        drawn.set_label(title)
        axes = drawn.add_subplot()
        if look.titled:
            drawn.set_size_inches(look.width_in, 1.5 + 0.26 * len(rows))
            places = [float(place) for place in range(len(rows))]
            names = [_end(plain(row.name), 80) for row in rows]
            axes.set_yticks(places, names, fontsize=7.5)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            title = ", ".join(filter(None, [title, more]))
            drawn.suptitle(textwrap.fill(title, 110), x=0.01, ha="left", fontsize=9.5)
        else:
            places = _name_above(axes, rows, look)
            said = textwrap.fill("; ".join(filter(None, [said, more])), _COLUMN_CHARACTERS)
        _draw_ratios(axes, rows, places, comparison.noise, look)
        axes.set_xlabel(said)
        shown = [word for word in ORDER if any(row.verdict == word for row in rows)]
        handles = [
            Line2D([], [], color=_COLOURS[word], marker=_MARKERS[word], label=word)
            for word in shown
        ]
        drawn.legend(handles=handles, loc="outside lower right", ncols=len(shown))
    return drawn


def _draw_ratios(
    axes: Axes, rows: Sequence[Change], places: Sequence[float], noise: float, look: Look
) -> None:
    for y, row in zip(places, rows, strict=True):
        colour = _COLOURS[row.verdict]
        if row.low is not None and row.high is not None:
            axes.hlines(y, row.low, row.high, color=colour, linewidth=2.2 * look.thickness)
        size = 5 if look.titled else 3.5
        axes.plot([row.ratio or 1.0], [y], _MARKERS[row.verdict], color=colour, markersize=size)
    axes.axvspan(1 / (1 + noise), 1 + noise, color="#f0f0f0", zorder=0)
    axes.axvline(1.0, color=INK, linewidth=0.8 * look.thickness, zorder=1)
    axes.grid(axis="y", visible=False)


def _name_above(axes: Axes, rows: Sequence[Change], look: Look) -> list[float]:
    """Names above their intervals, for which a place each is returned: a column has no room beside
    the plot. The figure's height follows from their lines."""
    line, places = 0.0, []
    for row in rows:
        name = textwrap.wrap(plain(row.name).replace("/", "/ "), _COLUMN_CHARACTERS)
        axes.text(
            0.0, line, "\n".join(name).replace("/ ", "/").replace("$", r"\$"), va="top",
            transform=axes.get_yaxis_transform(), in_layout=False, linespacing=1.1,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.0},
        )  # fmt: skip
        places.append(line + len(name) + 0.5)
        line += len(name) + 1.5
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(line, -0.5)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(look.width_in, 0.8 + (line + 0.5) * 1.3 * look.font_pt / 72)
    return places


def _short(side: Side) -> str:
    return _end(plain(side.label), 50)


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + text[1 - most :]


def _side(side: Side) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in side.versions.items())
    return plain(" | ".join(filter(None, [side.label, side.machine, versions])))
