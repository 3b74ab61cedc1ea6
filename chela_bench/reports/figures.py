"""Figures of a run, by matplotlib; `render` turns one into bytes.

Against length, both axes are logarithmic, so that T**p is a straight line of slope p. The strip
below them names what failed, at its length and without a number.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Container, Sequence
from typing import Literal

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from chela_bench.records import Point, Run
from chela_bench.reports.compact import compact
from chela_bench.reports.drawing import Picture, draw
from chela_bench.reports.groups import named_groups
from chela_bench.reports.heat import draw_heat_map
from chela_bench.reports.pictures import (
    Sweep,
    error_picture,
    floor_picture,
    hbm_picture,
    memory_picture,
    roofline_picture,
    sweeps,
    time_picture,
)
from chela_bench.reports.roofline_drawing import RoofPicture, draw_roofline
from chela_bench.reports.style import SCREEN, Look, settings
from chela_bench.reports.tune import block_maps

Format = Literal["svg", "png", "pdf"]

_KINDS: dict[str, Callable[[Sweep], Picture | RoofPicture | None]] = {
    "time": time_picture,
    "floor": floor_picture,
    "hbm": hbm_picture,
    "memory": memory_picture,
    "roofline": roofline_picture,
    "error": error_picture,
}
_NO_DATES: dict[Format, dict[str, str | None]] = {
    "svg": {"Date": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
}


def figures(
    run: Run,
    points: Sequence[Point],
    look: Look = SCREEN,
    *,
    only: Container[str] | None = None,
) -> dict[str, Figure]:
    """Every figure of a run: `linear_attention-fwd-bf16-B1-H16-K128-V128-time`, and with
    `-floor`, `-hbm`, `-memory`, `-roofline` and `-error` where a point has such a value.

    Time is the median, with quartiles, the floor, and each line's exponent of T (`fitted_slope`'s,
    over the longer half of the lengths, with its 95 % interval). Points of softmax_attention at the
    same direction, dtype and dims are drawn dashed beside linear_attention, as another function.
    The names are safe as file names. An op that is drawn beside another has no figure of its own.
    `only` names the figures that are wanted, if not all are.
    """
    found: dict[str, Figure] = {}
    for slug, sweep in sweeps(run, points).items():
        for kind, picture_of in _KINDS.items():
            name = f"{slug}-{kind}"
            if only is not None and name not in only:
                continue
            picture = picture_of(sweep)
            if isinstance(picture, RoofPicture):
                found[name] = draw_roofline(picture, look)
            elif picture is not None:
                found[name] = draw(picture, look)
    return found


def heat_maps(run: Run, points: Sequence[Point], look: Look = SCREEN) -> dict[str, Figure]:
    """Time over two settings where a sweep varied two, by a name that is safe for a file."""
    return {
        name: draw_heat_map(heat, look)
        for slug, group in named_groups(points).items()
        for name, (_, heat) in block_maps(run, slug, group).items()
    }


def render(figure: Figure, format: Format, look: Look = SCREEN) -> bytes:
    """The figure as a file's content; the same figure gives the same bytes, at any time. What has
    no title in it has one in the file's metadata."""
    content = io.BytesIO()
    metadata = dict(_NO_DATES[format])
    if not look.titled:
        metadata["Title"] = str(figure.get_label())
    with matplotlib.rc_context(settings(look)):
        if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
            _settle(figure, look.dpi)
        figure.savefig(content, format=format, dpi=look.dpi, metadata=metadata)
    drawn = content.getvalue()
    return compact(drawn.decode()).encode() if format == "svg" else drawn


def _settle(figure: Figure, dpi: int) -> None:
    """Lays out for good: each drawing would move it a little, and another dpi more."""
    drawn_at = figure.get_dpi()
    figure.set_dpi(dpi)
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # not "none": then each file is drawn twice
    figure.set_dpi(drawn_at)
