"""The roofline as a figure: the card's two ceilings, and below them a line for each series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from chela_bench.records import Point
from chela_bench.reports.drawing import Line, finish, line_looks, page
from chela_bench.reports.roofline import Roof, intensities
from chela_bench.reports.style import INK, SCREEN, Look, Style, settings
from chela_bench.reports.text import three_digits


@dataclass(frozen=True)
class Track:
    """One series over length: intensity and rate, measured and modelled."""

    name: str
    style: Style
    measured: tuple[tuple[float, float], ...]
    modelled: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class RoofPicture:
    title: str
    subtitle: str
    roof: Roof
    tracks: tuple[Track, ...]
    notes: tuple[str, ...]


def track(name: str, style: Style, points: Sequence[Point]) -> Track | None:
    """None where no point has kernel time, FLOPs and bytes."""
    measured, modelled = [], []
    for point in points:
        if point.time_ns is None or point.tflop_per_s is None:
            continue
        found = intensities(point)
        if found.measured is not None:
            measured.append((found.measured, point.tflop_per_s))
        if found.modelled is not None:
            modelled.append((found.modelled, point.tflop_per_s))
    if not measured and not modelled:
        return None
    return Track(name, style, tuple(measured), tuple(modelled))


def draw_roofline(picture: RoofPicture, look: Look = SCREEN) -> Figure:
    """The card's roof, and below it each series from its shortest to its longest sequence."""
    tracks = sorted(picture.tracks, key=lambda each: -_highest(each))
    lines = [_as_line(each) for each in tracks]
    with matplotlib.rc_context(settings(look)):
        figure, _ = page([line.name for line in lines], picture.notes, look)
        axes = figure.add_subplot()
        for each, line in zip(tracks, lines, strict=True):
            _draw_track(axes, each, line, look)
        _draw_roof(axes, picture.roof, tracks, look)
        axes.set_xlabel("FLOPs per byte of device memory")
        axes.set_ylabel("TFLOP/s")
        finish(axes, picture.title, picture.subtitle, lines, picture.notes, look)
    return figure


def _draw_track(axes: Axes, track: Track, line: Line, look: Look) -> None:
    looks = {**line_looks(line, look), "linewidth": 1.2 * look.thickness}
    for values, hollow in ((track.modelled, bool(track.measured)), (track.measured, False)):
        if values:
            more = {"markerfacecolor": "white", "markeredgecolor": looks["color"],
                    "markeredgewidth": 1.2 * look.thickness,
                    "linestyle": ":"} if hollow else {}  # fmt: skip
            axes.plot(*zip(*values, strict=True), zorder=3, **{**looks, **more})


def _draw_roof(axes: Axes, roof: Roof, tracks: Sequence[Track], look: Look) -> None:
    points = [value for each in tracks for value in (*each.measured, *each.modelled)]
    left = min(min(x for x, _ in points), roof.ridge) / 2
    right = max(max(x for x, _ in points), roof.ridge) * 3
    low = min(y for _, y in points) / 3
    corners = [left, roof.ridge, right]
    tops = [roof.tflop_per_s(x) for x in corners]
    axes.plot(corners, tops, color=INK, linewidth=1.4 * look.thickness, zorder=2)
    axes.fill_between(corners, tops, [tops[-1] * 100] * 3, color="#f0f0f0", linewidth=0, zorder=0.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(min(low, tops[0]), tops[-1] * 3)
    axes.text(
        0.985, 0.975,
        f"matmul {roof.matmul_tflop_per_s:.0f} TFLOP/s, copy {roof.copy_gb_per_s:.0f} GB/s",
        transform=axes.transAxes, ha="right", va="top",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{float(three_digits(value)):g}"))


def _as_line(track: Track) -> Line:
    """For the legend; hollow where nothing was measured."""
    return Line(track.name, track.style, ((1, 1.0),), hollow=not track.measured)


def _highest(track: Track) -> float:
    return max(rate for _, rate in (*track.measured, *track.modelled))
