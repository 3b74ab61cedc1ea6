"""One picture of values against length: logarithmic axes, a legend, a strip for what has no value.

Made without pyplot and without touching matplotlib's global settings.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from chela_bench.reports.style import FAINT, INK, QUIET, SCREEN, Look, Style, settings
from chela_bench.reports.text import length, lengths

_ROW_IN, _HEAD_IN = 0.21, 1.35
_GAP_IN, _NOTE_CHARACTERS = 0.08, 62  # below a plot in a column
_MOST_WIDER = 3  # steps in width, however many lines lie on each other
_LEAST_SPAN = 6.25  # of the vertical axis, so that two of its ticks 1, 2, 5, 10 are in it


@dataclass(frozen=True)
class Line:
    """One series as drawn."""

    name: str
    style: Style
    values: tuple[tuple[int, float], ...]  # length, value above zero
    spread: tuple[tuple[int, float, float], ...] = ()  # length, first and third quartile
    dashed: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Miss:
    """A row of the strip: the lengths at which a series has no value to draw, and why."""

    name: str
    colour: str
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Mark:
    """A place between measured lengths, ringed and named."""

    tokens: float
    value: float
    name: str


@dataclass(frozen=True)
class Quantity:
    """What the vertical axis shows; ticks at powers of `base`, times `steps` on a short axis."""

    name: str
    unit: Callable[[float], str]
    base: int
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Picture:
    """All that a figure says."""

    title: str
    subtitle: str
    lengths: tuple[int, ...]
    quantity: Quantity
    lines: tuple[Line, ...]
    misses: tuple[Miss, ...]
    nothing: str  # said where there is no line
    notes: tuple[str, ...] = ()
    marks: tuple[Mark, ...] = ()
    floor: tuple[tuple[int, float], ...] = ()
    floor_name: str = ""
    limits: tuple[Line, ...] = ()  # what is above the highest is wrong


def draw(picture: Picture, look: Look = SCREEN) -> Figure:
    """The picture as a figure as wide as the look says; its height follows from the number of
    lines. What has no value stands in a strip below the plot, or in the legend if untitled."""
    lines = sorted(picture.lines, key=_end)
    named = sorted((*picture.limits, *lines), key=_end)
    misses = picture.misses if look.titled else ()
    notes = picture.notes if look.titled else (*picture.notes, *_missing(picture))
    strip_in = _ROW_IN * sum(rows_of(miss.name, look) for miss in misses)
    with matplotlib.rc_context(settings(look)):
        figure, plot_in = page([line.name for line in named], notes, look, strip_in)
        axes, strip = _axes(figure, plot_in, strip_in)
        _draw_lines(axes, lines, look)
        _draw_floor(axes, picture.floor, picture.floor_name, look)
        _draw_limits(axes, picture.limits, look)
        _draw_marks(axes, picture.marks, picture.lengths, look)
        _scale(axes, picture, look)
        if not lines:
            y, va = (0.05, "bottom") if picture.limits else (0.95, "top")
            axes.text(0.03, y, picture.nothing, transform=axes.transAxes, va=va, color=QUIET)
        if strip is not None:
            _draw_strip(strip, misses, look)
        (strip or axes).set_xlabel("tokens T  (k = 1024)")
        finish(axes, picture.title, picture.subtitle, named, notes, look)
    return figure


def _end(line: Line) -> float:
    """Sorts from the highest end to the lowest."""
    return -line.values[-1][1]


def page(
    names: Sequence[str], notes: Sequence[str], look: Look, strip_in: float = 0.0
) -> tuple[Figure, float]:
    """An empty figure, and the height in inches that its plot is given."""
    plot_in = look.plot_in
    if look.titled:
        rows = sum(rows_of(name, look) for name in (*names, *notes))
        plot_in = max(plot_in, 0.2 * rows + 0.2)
    height_in = plot_in + strip_in + (_HEAD_IN if look.titled else 0.0)
    dpi = 100 if look.titled else look.dpi  # letters are wider or less at another
    figure = Figure((look.width_in, height_in), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, plot_in


def finish(
    axes: Axes,
    title: str,
    subtitle: str,
    lines: Sequence[Line],
    notes: Sequence[str],
    look: Look,
) -> None:
    """Title and legend; then the layout is settled, and drawing again moves nothing."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_label(f"{title}; {subtitle}")
    above = None
    if look.titled:
        above = _titles(figure, axes, title, subtitle)
        if lines:
            _legend_beside(axes, lines, notes, look)
    else:
        _legend_below(figure, lines, notes, look)
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # not "none": then each file is drawn twice
    if above is not None:
        above.set_x(axes.get_position().x0)


def _axes(figure: Figure, plot_in: float, strip_in: float) -> tuple[Axes, Axes | None]:
    if not strip_in:
        return figure.add_subplot(), None
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(plot_in, strip_in))
    axes.tick_params(axis="x", which="both", length=0, labelbottom=False)
    return axes, strip


def _titles(figure: Figure, axes: Axes, title: str, subtitle: str) -> Text:
    """The subtitle above the plot and the title above both, which is returned to be aligned."""
    below = _literal(textwrap.fill(subtitle, 120))
    axes.set_title(below, loc="left", fontsize=9.5, color=QUIET, pad=10)
    above = _literal(textwrap.fill(title, 80))
    return figure.suptitle(above, x=0, ha="left", fontsize=12.5, fontweight="bold")


def _draw_lines(axes: Axes, lines: Sequence[Line], look: Look) -> None:
    """From the slowest to the fastest; a line under an equal one is wider, and so still seen."""
    hidden = [sum(_hides(over, line) for over in lines[i + 1 :]) for i, line in enumerate(lines)]
    step = min(1.0, _MOST_WIDER / max([1, *hidden]))
    for line, count in zip(lines, hidden, strict=True):
        wider = count * step
        axes.plot(*zip(*line.values, strict=True), zorder=3, **line_looks(line, look, wider=wider))
        axes.errorbar(
            [tokens for tokens, _, _ in line.spread],
            [q1 for _, q1, _ in line.spread],
            yerr=np.array([(0.0, q3 - q1) for _, q1, q3 in line.spread]).reshape(-1, 2).T,
            fmt="none",
            ecolor=line.style.colour,
            elinewidth=look.thickness,
            capsize=2.5 * look.thickness,
            zorder=3,
        )


def line_looks(line: Line, look: Look, *, wider: float = 0) -> dict[str, Any]:
    """Keywords of a line and its markers, the same in the plot and in the legend."""
    colour, marker = line.style
    size = {"P": 8.0, "X": 8.0, "D": 5.5, "s": 5.5, "p": 7.0, "h": 7.0}.get(marker, 6.5)
    return {
        "color": colour,
        "linestyle": (0, (4, 2)) if line.dashed else "-",
        "linewidth": (1.8 + 1.8 * wider) * look.thickness,
        "marker": marker,
        "markersize": (size + 2.6 * wider) * look.thickness,
        "markerfacecolor": "white" if line.hollow else colour,
        "markeredgecolor": colour if line.hollow else "white",
        "markeredgewidth": (1.4 if line.hollow else 0.6 if not wider else 0.0) * look.thickness,
    }


def _hides(over: Line, under: Line) -> bool:
    """Whether two lines run within 1 % of each other, less than a line's width, for a stretch."""
    values = dict(over.values)
    close = [abs(values[t] / value - 1) < 0.01 for t, value in under.values if t in values]
    return sum(close) >= min(2, len(under.values))


def _draw_floor(axes: Axes, floor: Sequence[tuple[int, float]], name: str, look: Look) -> None:
    """The floor, and grey below it: nothing correct can be there."""
    if not floor:
        return
    x, y = _stretched(floor)
    axes.plot(x, y, color=INK, linewidth=1.2 * look.thickness, zorder=2)
    axes.fill_between(x, y, [min(y) / 1e3] * len(y), color="#f0f0f0", linewidth=0, zorder=0.5)
    name = textwrap.fill(name, look.axis_characters)
    axes.text(0.985, 0.025, name, transform=axes.transAxes, ha="right", va="bottom")


def _draw_limits(axes: Axes, limits: Sequence[Line], look: Look) -> None:
    """Limits, and grey above the highest: nothing correct can be there."""
    for line in limits:
        axes.plot(*_stretched(line.values), zorder=2, **line_looks(line, look))
    if limits:
        x, y = _stretched(max(limits, key=_highest).values)
        axes.fill_between(x, y, [max(y) * 1e3] * len(y), color="#f0f0f0", linewidth=0, zorder=0.5)


def _highest(line: Line) -> float:
    return max(value for _, value in line.values)


def _stretched(values: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Lengths and values; one alone on both sides of its length, to be seen as a line."""
    if len(values) == 1:
        [(tokens, value)] = values
        return [tokens / 1.5, tokens * 1.5], [value, value]
    return [float(tokens) for tokens, _ in values], [value for _, value in values]


def _draw_marks(axes: Axes, marks: Sequence[Mark], tokens: Sequence[int], look: Look) -> None:
    """A ring, and its name above, unless it would stand on another's; at the left edge below."""
    named: list[float] = []
    width = max(1.5, (max(tokens) / min(tokens)) ** look.mark_share) if marks else 1.0
    for mark in sorted(marks, key=lambda mark: mark.tokens):
        axes.plot(
            [mark.tokens], [mark.value], marker="o", markersize=13 * look.thickness,
            markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.1 * look.thickness,
            linestyle="", zorder=4,
        )  # fmt: skip
        if not named or mark.tokens > width * named[-1]:
            named.append(mark.tokens)
            edge = mark.tokens < width * min(tokens)
            axes.annotate(
                mark.name, (mark.tokens, mark.value), (6, -6) if edge else (-5, 8),
                textcoords="offset points", ha="left" if edge else "right",
                va="top" if edge else "bottom", zorder=4,
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5},
            )  # fmt: skip


def _scale(axes: Axes, picture: Picture, look: Look) -> None:
    tokens, quantity = picture.lengths, picture.quantity
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=quantity.base)
    axes.set_ylabel(textwrap.fill(quantity.name, look.axis_characters))
    axes.xaxis.set_major_locator(FixedLocator(_ticks(tokens, look.most_ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    if tokens:
        reach = max((tokens[-1] / tokens[0]) ** 0.04, 1.08 if len(tokens) > 1 else 1.5)
        axes.set_xlim(tokens[0] / reach, tokens[-1] * reach)
    values = [value for line in picture.lines for _, value in line.values]
    values += [quartile for line in picture.lines for _, *pair in line.spread for quartile in pair]
    values += [value for _, value in picture.floor]
    values += [value for line in picture.limits for _, value in line.values]
    if not values:
        axes.set_yticks([])
        return
    low, high = min(values), max(values)
    room = max((high / low) ** 0.05, 1.15, math.sqrt(_LEAST_SPAN * low / high))
    axes.set_ylim(
        low / (room**2.5 if picture.floor else room), high * (room**2 if picture.limits else room)
    )
    short = high / low < quantity.base**2.5
    axes.yaxis.set_major_locator(LogLocator(quantity.base, subs=quantity.steps if short else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(quantity.unit(value))))


def _short(quantity: str) -> str:
    """`1 ms` for `1.00 ms`, `1x` for `1.00x`: tick values are round."""
    number = quantity.rstrip("abcdefghijklmnopqrstuvwxyzBGIKMT ")
    return f"{float(number):g}{quantity[len(number) :].replace('us', 'µs')}"


def _ticks(tokens: Sequence[int], most: int) -> list[int]:
    """The lengths themselves if few and apart, else powers of two between them."""
    apart = all(after / before >= 1.4 for before, after in pairwise(tokens))
    if not tokens or (len(tokens) <= most and apart):
        return list(tokens)
    powers = [2**i for i in range(64) if tokens[0] <= 2**i <= tokens[-1]]
    step = -(-len(powers) // most) or 1
    return powers[::step] if len(powers) > 1 else [tokens[0], tokens[-1]]


def _legend_beside(axes: Axes, lines: Sequence[Line], notes: Sequence[str], look: Look) -> None:
    """Right of the plot, in the order in which the lines end; notes below, in grey."""
    handles, names = _entries(lines, look, look.name_characters)
    handles += [Line2D([], [], linestyle="") for _ in notes]
    names += [_wrapped(note, look.name_characters) for note in notes]
    legend = axes.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        borderpad=0.0,
        handlelength=2.6,
    )
    for text in legend.get_texts()[len(lines) :]:
        text.set_color(QUIET)


def _legend_below(figure: Figure, lines: Sequence[Line], notes: Sequence[str], look: Look) -> None:
    """Under the plot, in two columns if that is flatter; the figure grows by legend and notes."""
    said = textwrap.fill("; ".join(notes), _NOTE_CHARACTERS)
    text = figure.text(0.01, 0.01, _literal(said), color=QUIET, va="bottom")
    notes_in = text.get_window_extent().height / figure.dpi + _GAP_IN if notes else 0.0
    names_in, legend = 0.0, None
    if lines:
        made = [_columns(figure, lines, columns, look) for columns in (1, 2)]
        sizes = [each.get_window_extent() for each in made]
        two = sizes[1].width < 0.99 * figure.bbox.width and sizes[1].height < sizes[0].height
        made[0 if two else 1].remove()
        chosen = 1 if two else 0
        legend, names_in = made[chosen], sizes[chosen].height / figure.dpi + _GAP_IN
    whole_in = look.plot_in + notes_in + names_in
    figure.set_size_inches(look.width_in, whole_in)
    if legend is not None:
        legend.set_bbox_to_anchor((0.01, notes_in / whole_in), transform=figure.transFigure)
    below = (notes_in + names_in) / whole_in
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0.0, below, 1.0, 1.0 - below))


def _columns(figure: Figure, lines: Sequence[Line], columns: int, look: Look) -> Legend:
    return figure.legend(
        *_entries(lines, look, look.name_characters // columns),
        loc="lower left",
        ncols=columns,
        borderaxespad=0.0,
        borderpad=0.0,
        handlelength=2.4,
        labelspacing=0.25,
        columnspacing=0.8,
    )


def _entries(lines: Sequence[Line], look: Look, characters: int) -> tuple[list[Line2D], list[str]]:
    return (
        [Line2D([], [], **line_looks(line, look)) for line in lines],
        [_wrapped(line.name, characters) for line in lines],
    )


def _missing(picture: Picture) -> list[str]:
    """`naive_cumsum: oom at 64k`."""
    return [f"{miss.name} at {lengths(miss.lengths, picture.lengths)}" for miss in picture.misses]


def _draw_strip(strip: Axes, misses: Sequence[Miss], look: Look) -> None:
    heights = [rows_of(miss.name, look) for miss in misses]
    middles = [sum(heights[:i]) + height / 2 for i, height in enumerate(heights)]
    for miss, y in zip(misses, middles, strict=True):
        strip.axhline(y, color=FAINT, linewidth=0.8, zorder=1)
        x = miss.lengths
        strip.plot(x, [y] * len(x), linestyle="", marker="x", color=miss.colour, zorder=3)
    strip.set_ylim(sum(heights), 0)
    strip.grid(visible=False, axis="y")
    strip.yaxis.tick_right()
    strip.set_yticks(middles, [_wrapped(miss.name, look.name_characters) for miss in misses])
    strip.tick_params(axis="y", length=0, labelsize=9.5)
    strip.spines["left"].set_visible(False)
    strip.set_ylabel("not drawn", rotation=0, ha="right", va="center", color=QUIET)
    strip.yaxis.set_label_position("left")


def rows_of(name: str, look: Look) -> int:
    """Lines that a name takes in the legend."""
    return _wrapped(name, look.name_characters).count("\n") + 1


def _wrapped(name: str, characters: int) -> str:
    """In lines of so many characters, which may end after a slash."""
    parted = textwrap.fill(name.replace("/", "/ "), characters, break_on_hyphens=False)
    return _literal(parted.replace("/ ", "/"))


def _literal(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")
