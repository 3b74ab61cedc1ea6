"""Heat maps over two settings, a panel each: values in cells, what has none hatched, limits as
lines between cells."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from chela_bench.reports.style import HEAT, INK, NOTHING, QUIET, SCREEN, Look, settings

Place = tuple[int | str, int | str]  # x, y
_CELL_IN, _SIDE_IN, _HEAD_IN, _FOOT_IN = 0.72, 0.75, 0.95, 0.55
_WIDTH_IN, _LEAST_IN = 10.5, 4.5
_LINES: tuple[tuple[str, Any], ...] = (
    ("solid", "-"),
    ("dashed", (0, (5, 2))),
    ("short dashes", (0, (2, 2))),
    ("dotted", (0, (1, 1.5))),
)
_WRAPPED = 9  # characters of a line in a cell
_NO_LOGARITHM = 1e-9  # drawn for 0: below every value
_WIDE_SPAN = 100  # of values, from which on their colours are logarithmic
_NOTE_CHARACTERS = 60  # below the maps in a column


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


@dataclass(frozen=True)
class _Plan:
    """How the panels are laid out, and letters set."""

    look: Look
    across: int
    size_in: tuple[float, float]
    notes: str
    wrapped: int  # characters of a line in a cell
    shrunk: float = 1.0  # letters in a cell that is too narrow for them

    def pt(self, on_screen: float) -> float:
        """A column has letters of one size."""
        return on_screen if self.look.titled else self.look.font_pt

    def cell_pt(self, on_screen: float) -> float:
        return self.pt(on_screen) * self.shrunk


def draw_heat_map(heat: HeatMap, look: Look = SCREEN) -> Figure:
    """Panels in rows as wide as a page, or a column, on one scale of colours. Untitled, the title
    is the figure's label."""
    plan = _on_screen(heat) if look.titled else _in_column(heat, look)
    down = math.ceil(len(heat.panels) / plan.across)
    with matplotlib.rc_context({**settings(look), "axes.grid": False}):
        dpi = 100 if look.titled else look.dpi
        figure = Figure(plan.size_in, dpi=dpi, layout="constrained")
        FigureCanvasAgg(figure)
        figure.set_label(f"{heat.title}; {heat.subtitle}")
        if look.titled:
            _titles(figure, heat, plan)
        if plan.notes:
            figure.supxlabel(plan.notes, x=0.01, ha="left", fontsize=plan.pt(9), color=QUIET)
        grid = figure.subplots(down, plan.across, squeeze=False)
        norm = _norm(heat)
        for i, axes in enumerate(grid.flat):
            if i < len(heat.panels):
                _draw_panel(axes, heat, heat.panels[i], norm, plan)
            else:
                axes.set_axis_off()
    return figure


def _on_screen(heat: HeatMap) -> _Plan:
    columns, rows = len(heat.x_values), len(heat.y_values)
    panel_in = columns * _CELL_IN + _SIDE_IN
    across = max(1, min(len(heat.panels), int(_WIDTH_IN // panel_in)))
    width = max(_LEAST_IN, across * panel_in + 0.3)
    notes = textwrap.fill("; ".join(_notes(heat)), max(40, int(width * 13)))
    lines = sum(text.count("\n") for text in (*_headings(heat, width), notes))
    height = math.ceil(len(heat.panels) / across) * (rows * _CELL_IN * 0.62 + 0.85)
    return _Plan(
        SCREEN, across, (width, height + _HEAD_IN + _FOOT_IN + 0.17 * lines), notes, _WRAPPED
    )


def _in_column(heat: HeatMap, look: Look) -> _Plan:
    """The flattest whose cells are as wide as what stands in them."""
    letter_in, line_in = 0.64 * look.font_pt / 72, 1.25 * look.font_pt / 72
    whole = [heat.label(value) for panel in heat.panels for value in panel.values.values()]
    whole += [text for panel in heat.panels for text in panel.under.values()]
    reasons = {why for panel in heat.panels for why in panel.missing.values()}
    words = [word for why in reasons for word in why.split()]
    needed_in = letter_in * (max(map(len, [*whole, *words]), default=1) + 1)
    side_in = letter_in * max(len(str(y)) for y in heat.y_values or ["0"]) + 4 * line_in
    columns, panels = max(len(heat.x_values), 1), len(heat.panels)
    notes = textwrap.fill("; ".join(_notes(heat, named_lines=False)), _NOTE_CHARACTERS)
    below_in = (notes.count("\n") + 1.5) * line_in if notes else 0.0
    plans = []
    for across in range(1, max(panels, 1) + 1):
        cell_in = (look.width_in / across - side_in) / columns
        if cell_in < needed_in and across > 1:
            break
        shrunk = min(1.0, cell_in / needed_in)
        wrapped = max(1, int(cell_in / letter_in / shrunk))
        lines = [2 if any(panel.under for panel in heat.panels) else 1]
        lines += [len(textwrap.wrap(why, wrapped)) for why in reasons]
        panel_in = (len(heat.y_values) * (max(lines) + 0.8) + 5) * line_in
        size_in = look.width_in, math.ceil(panels / across) * panel_in + below_in
        plans.append(_Plan(look, across, size_in, notes, wrapped, shrunk))
    return min(plans, key=lambda plan: plan.size_in[1])


def _headings(heat: HeatMap, width: float) -> tuple[str, str]:
    """Title and subtitle, in lines."""
    title = textwrap.fill(heat.title, max(30, int(width * 9)))
    return title, textwrap.fill(heat.subtitle, max(40, int(width * 13)))


def _titles(figure: Figure, heat: HeatMap, plan: _Plan) -> None:
    width, height = plan.size_in
    title, subtitle = _headings(heat, width)
    room = "\n" * (subtitle.count("\n") + 1)  # below the title, for what is smaller
    figure.suptitle(
        title.replace("$", r"\$") + room, x=0.01, ha="left", fontsize=12.5, fontweight="bold"
    )
    figure.text(
        0.01, 1 - (0.36 + 0.19 * title.count("\n")) / height, subtitle.replace("$", r"\$"),
        ha="left", va="top", fontsize=9.5, color=QUIET,
    )  # fmt: skip


def _notes(heat: HeatMap, *, named_lines: bool = True) -> list[str]:
    """Lines that have no name in the maps are told apart by how they are drawn."""
    notes = list(heat.notes)
    if isinstance(_norm(heat), LogNorm) and not heat.logarithmic:
        notes.append("colours are logarithmic; green: 0")
    if any(panel.missing for panel in heat.panels):
        notes.append("hatched: no value, for the reason in the cell")
    if any(panel.marked for panel in heat.panels):
        notes.append("framed: best, and all within 1 % of it")
    crossed = [
        name if named_lines else f"{name}: {how}"
        for (name, level), (how, _) in zip(heat.contours.items(), cycle(_LINES), strict=False)
        if any(_contour(heat, panel, level) for panel in heat.panels)
    ]
    if crossed:
        notes.append(f"lines: where shared memory passes {', '.join(crossed)}")
    return notes


def _norm(heat: HeatMap) -> Normalize:
    values = [value for panel in heat.panels for value in panel.values.values()]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    least = min((value for value in values if value > 0), default=high)
    wide = low >= 0 and high > _WIDE_SPAN * least
    if wide or (heat.logarithmic and low > 0):
        return LogNorm(least, max(high, least * 1.01))
    return Normalize(low, high if high > low else low + 1)


def _draw_panel(axes: Axes, heat: HeatMap, panel: Panel, norm: Normalize, plan: _Plan) -> None:
    xs, ys = heat.x_values, heat.y_values
    colours = LinearSegmentedColormap.from_list("heat", HEAT).with_extremes(under=NOTHING)
    image = np.full((len(ys), len(xs)), np.nan)
    for (x, y), value in panel.values.items():
        image[ys.index(y), xs.index(x)] = value or _NO_LOGARITHM
    axes.imshow(image, cmap=colours, norm=norm, aspect="auto", origin="lower")
    for (x, y), value in panel.values.items():
        dark = value > 0 and float(norm(value)) > 0.6
        marked = (x, y) in panel.marked
        colour, below = "white" if dark else INK, panel.under.get((x, y))
        column, row = float(xs.index(x)), ys.index(y) + (0.1 if below else 0.0)
        axes.text(
            column, row, heat.label(value), ha="center", va="center", color=colour,
            fontsize=plan.cell_pt(8.5), fontweight="bold" if marked else "normal",
        )  # fmt: skip
        if below:
            axes.text(
                column, row - 0.3, below, ha="center", va="center", fontsize=plan.cell_pt(7),
                color=colour,
            )  # fmt: skip
        if marked:
            _frame(axes, xs.index(x), ys.index(y), plan.look)
    for (x, y), why in panel.missing.items():
        if (x, y) in panel.values:
            continue
        at = (xs.index(x) - 0.5, ys.index(y) - 0.5)
        axes.add_patch(
            Rectangle(at, 1, 1, facecolor="#f2f2f2", edgecolor="#c8c8c8", hatch="///", linewidth=0)
        )
        axes.text(
            at[0] + 0.5, at[1] + 0.5, textwrap.fill(why, plan.wrapped), ha="center", va="center",
            fontsize=plan.cell_pt(8.5), color=INK,
            bbox={"facecolor": "#f2f2f2", "linewidth": 0, "pad": plan.look.thickness},
        )  # fmt: skip
    _draw_contours(axes, heat, panel, plan)
    axes.set_xticks(range(len(xs)), [str(x) for x in xs])
    axes.set_yticks(range(len(ys)), [str(y) for y in ys])
    axes.tick_params(length=0)
    axes.set_title(panel.name, loc="left", fontsize=plan.pt(10))
    axes.set_xlabel(heat.x_name)
    axes.set_ylabel(heat.y_name)
    axes.set_xlim(-0.5, len(xs) - 0.5)
    axes.set_ylim(-0.5, len(ys) - 0.5)
    for side in axes.spines.values():
        side.set_visible(False)


def _frame(axes: Axes, column: int, row: int, look: Look) -> None:
    axes.add_patch(
        Rectangle(
            (column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor=INK,
            linewidth=1.6 * look.thickness,
        )
    )  # fmt: skip


def _draw_contours(axes: Axes, heat: HeatMap, panel: Panel, plan: _Plan) -> None:
    """Its name stands above the lower end of a level's first line, which is inside the panel; of
    levels that begin with the same line, the names up to their parentheses. In a column there is
    no room for names."""
    named: dict[tuple[float, float], list[str]] = {}
    for number, (name, level) in enumerate(heat.contours.items()):
        for i, (line_x, line_y) in enumerate(_contour(heat, panel, level)):
            _, style = _LINES[number % len(_LINES)]
            axes.plot(
                line_x, line_y, color=INK, linewidth=1.8 * plan.look.thickness, linestyle=style
            )
            if i == 0 and plan.look.titled:
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
