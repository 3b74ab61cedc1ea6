"""Heat maps over two settings, a panel each: values in cells, what has none hatched, limits as
lines between cells."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from chela_bench.reports.style import HEAT, INK, QUIET, settings

Place = tuple[int | str, int | str]  # x, y
_CELL_IN, _SIDE_IN, _HEAD_IN, _FOOT_IN = 0.72, 0.75, 0.95, 0.55
_WIDTH_IN, _LEAST_IN = 10.5, 4.5


@dataclass(frozen=True)
class Panel:
    """One map. `missing`: what stands in a cell without a value; `levels`: of what the lines run
    around, by cell."""

    name: str
    values: Mapping[Place, float]
    missing: Mapping[Place, str] = field(default_factory=dict)
    levels: Mapping[Place, float] = field(default_factory=dict)
    under: Mapping[Place, str] = field(default_factory=dict)  # smaller, below the value
    marked: frozenset[Place] = frozenset()  # framed: the best


@dataclass(frozen=True)
class HeatMap:
    title: str
    subtitle: str
    x_name: str
    y_name: str
    panels: tuple[Panel, ...]
    label: Callable[[float], str]  # of a value
    logarithmic: bool = False
    contours: Mapping[str, float] = field(default_factory=dict)  # name -> level
    notes: tuple[str, ...] = ()

    @property
    def x_values(self) -> list[int | str]:
        return _values(self.panels, 0)

    @property
    def y_values(self) -> list[int | str]:
        return _values(self.panels, 1)


def _values(panels: Sequence[Panel], axis: int) -> list[int | str]:
    places = {place[axis] for panel in panels for place in (*panel.values, *panel.missing)}
    return sorted(places, key=lambda value: (isinstance(value, str), value))


def draw_heat_map(heat: HeatMap) -> Figure:
    """Panels in rows as wide as a page, on one scale of colours."""
    columns, rows = len(heat.x_values), len(heat.y_values)
    panel_in = columns * _CELL_IN + _SIDE_IN
    across = max(1, min(len(heat.panels), int(_WIDTH_IN // panel_in)))
    down = math.ceil(len(heat.panels) / across)
    width = max(_LEAST_IN, across * panel_in + 0.3)
    subtitle = textwrap.fill(heat.subtitle, max(40, int(width * 13)))
    title = textwrap.fill(heat.title, max(30, int(width * 9)))
    notes = textwrap.fill("; ".join(_notes(heat)), max(40, int(width * 13)))
    lines = subtitle.count("\n") + title.count("\n") + notes.count("\n")
    room = "\n" * (subtitle.count("\n") + 1)  # below the title, for what is smaller
    height = down * (rows * _CELL_IN * 0.62 + 0.85) + _HEAD_IN + _FOOT_IN + 0.17 * lines
    with matplotlib.rc_context({**settings(), "axes.grid": False}):
        figure = Figure((width, height), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            title.replace("$", r"\$") + room, x=0.01, ha="left", fontsize=12.5, fontweight="bold"
        )
        figure.text(
            0.01, 1 - (0.36 + 0.19 * title.count("\n")) / height, subtitle.replace("$", r"\$"),
            ha="left", va="top", fontsize=9.5, color=QUIET,
        )  # fmt: skip
        if notes:
            figure.supxlabel(notes, x=0.01, ha="left", fontsize=9, color=QUIET)
        grid = figure.subplots(down, across, squeeze=False)
        norm = _norm(heat)
        for i, axes in enumerate(grid.flat):
            if i < len(heat.panels):
                _draw_panel(axes, heat, heat.panels[i], norm)
            else:
                axes.set_axis_off()
    return figure


def _notes(heat: HeatMap) -> list[str]:
    notes = list(heat.notes)
    if any(panel.missing for panel in heat.panels):
        notes.append("hatched: no value, for the reason in the cell")
    if any(panel.marked for panel in heat.panels):
        notes.append("framed: best, and all within 1 % of it")
    crossed = [
        name
        for name, level in heat.contours.items()
        if any(_contour(heat, panel, level) for panel in heat.panels)
    ]
    if crossed:
        notes.append(f"lines: where shared memory passes {', '.join(crossed)}")
    return notes


def _norm(heat: HeatMap) -> Normalize:
    values = [value for panel in heat.panels for value in panel.values.values()]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if heat.logarithmic and low > 0:
        return LogNorm(low, max(high, low * 1.01))
    return Normalize(low, high if high > low else low + 1)


def _draw_panel(axes: Axes, heat: HeatMap, panel: Panel, norm: Normalize) -> None:
    xs, ys = heat.x_values, heat.y_values
    colours = LinearSegmentedColormap.from_list("heat", HEAT)
    image = np.full((len(ys), len(xs)), np.nan)
    for (x, y), value in panel.values.items():
        image[ys.index(y), xs.index(x)] = value
    axes.imshow(image, cmap=colours, norm=norm, aspect="auto", origin="lower")
    for (x, y), value in panel.values.items():
        dark = float(norm(value)) > 0.6
        marked = (x, y) in panel.marked
        colour, below = "white" if dark else INK, panel.under.get((x, y))
        column, row = float(xs.index(x)), ys.index(y) + (0.1 if below else 0.0)
        axes.text(
            column, row, heat.label(value), ha="center", va="center", fontsize=8.5, color=colour,
            fontweight="bold" if marked else "normal",
        )  # fmt: skip
        if below:
            axes.text(column, row - 0.3, below, ha="center", va="center", fontsize=7, color=colour)
        if marked:
            _frame(axes, xs.index(x), ys.index(y))
    for (x, y), why in panel.missing.items():
        if (x, y) in panel.values:
            continue
        at = (xs.index(x) - 0.5, ys.index(y) - 0.5)
        axes.add_patch(
            Rectangle(at, 1, 1, facecolor="#f2f2f2", edgecolor="#c8c8c8", hatch="///", linewidth=0)
        )
        axes.text(
            at[0] + 0.5, at[1] + 0.5, textwrap.fill(why, 11), ha="center", va="center",
            fontsize=7.5, color=INK, bbox={"facecolor": "#f2f2f2", "linewidth": 0, "pad": 1.0},
        )  # fmt: skip
    _draw_contours(axes, heat, panel)
    axes.set_xticks(range(len(xs)), [str(x) for x in xs])
    axes.set_yticks(range(len(ys)), [str(y) for y in ys])
    axes.tick_params(length=0)
    axes.set_title(panel.name, loc="left", fontsize=10)
    axes.set_xlabel(heat.x_name)
    axes.set_ylabel(heat.y_name)
    axes.set_xlim(-0.5, len(xs) - 0.5)
    axes.set_ylim(-0.5, len(ys) - 0.5)
    for side in axes.spines.values():
        side.set_visible(False)


def _frame(axes: Axes, column: int, row: int) -> None:
    axes.add_patch(
        Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor=INK, linewidth=1.6)
    )


def _draw_contours(axes: Axes, heat: HeatMap, panel: Panel) -> None:
    """Its name stands above the lower end of a level's first line, which is inside the panel; of
    levels that begin with the same line, the names up to their parentheses."""
    styles: list[Any] = ["-", (0, (5, 2)), (0, (2, 2)), (0, (1, 1.5))]
    named: dict[tuple[float, float], list[str]] = {}
    for number, (name, level) in enumerate(heat.contours.items()):
        for i, (line_x, line_y) in enumerate(_contour(heat, panel, level)):
            style = styles[number % len(styles)]
            axes.plot(line_x, line_y, color=INK, linewidth=1.8, linestyle=style)
            if i == 0:
                named.setdefault((max(line_x), min(line_y)), []).append(name)
    for place, names in named.items():
        short = [name.partition(" (")[0] for name in names] if len(names) > 1 else names
        axes.annotate(
            ", ".join(short), place, (-2, 1), textcoords="offset points", ha="right", va="bottom",
            fontsize=7, color=INK,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip


def _contour(heat: HeatMap, panel: Panel, level: float) -> list[tuple[list[float], list[float]]]:
    """Edges between two cells on either side of the level."""
    xs, ys = heat.x_values, heat.y_values
    edges = []
    for (x, y), value in panel.levels.items():
        column, row = xs.index(x), ys.index(y)
        for step_x, step_y in ((1, 0), (0, 1)):
            if column + step_x >= len(xs) or row + step_y >= len(ys):
                continue
            other = panel.levels.get((xs[column + step_x], ys[row + step_y]))
            if other is None or (value <= level) == (other <= level):
                continue
            across = [column + 0.5, column + 0.5] if step_x else [column - 0.5, column + 0.5]
            along = [row - 0.5, row + 0.5] if step_x else [row + 0.5, row + 0.5]
            edges.append((across, along))
    return edges
