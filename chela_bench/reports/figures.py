"""Figures of a run, by matplotlib; `render` turns one into bytes.

Against length, both axes are logarithmic, so that T**p is a straight line of slope p. The strip
below them names what failed, at its length and without a number.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Literal

import matplotlib
from matplotlib.figure import Figure

from chela_bench.records import Point, Run
from chela_bench.reports.drawing import Picture, draw
from chela_bench.reports.groups import named_groups
from chela_bench.reports.heat import draw_heat_map
from chela_bench.reports.pictures import (
    Sweep,
    floor_picture,
    hbm_picture,
    memory_picture,
    roofline_picture,
    sweeps,
    time_picture,
)
from chela_bench.reports.roofline_drawing import draw_roofline
from chela_bench.reports.style import settings
from chela_bench.reports.tune import block_maps

Format = Literal["svg", "png", "pdf"]

_KINDS: dict[str, Callable[[Sweep], Picture | None]] = {
    "time": time_picture,
    "floor": floor_picture,
    "hbm": hbm_picture,
    "memory": memory_picture,
}
_PICTURE_DPI = 200
_NO_DATES: dict[Format, dict[str, None]] = {
    "svg": {"Date": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
}


def figures(run: Run, points: Sequence[Point]) -> dict[str, Figure]:
    """Every figure of a run: `linear_attention-fwd-bf16-B1-H16-K128-V128-time`, and with
    `-floor`, `-hbm`, `-memory` and `-roofline` where a point has such a value.

    Time is the median, with quartiles, the floor, and each line's exponent of T (`fitted_slope`'s,
    over the longer half of the lengths, with its 95 % interval). Points of softmax_attention at the
    same direction, dtype and dims are drawn dashed beside linear_attention, as another function.
    The names are safe as file names. An op that is drawn beside another has no figure of its own.
    """
    found: dict[str, Figure] = {}
    for slug, sweep in sweeps(run, points).items():
        for kind, picture_of in _KINDS.items():
            picture = picture_of(sweep)
            if picture is not None:
                found[f"{slug}-{kind}"] = draw(picture)
        roofline = roofline_picture(sweep)
        if roofline is not None:
            found[f"{slug}-roofline"] = draw_roofline(roofline)
    return found


def heat_maps(run: Run, points: Sequence[Point]) -> dict[str, Figure]:
    """Time over two settings where a sweep varied two, by a name that is safe for a file."""
    return {
        name: draw_heat_map(heat)
        for slug, group in named_groups(points).items()
        for name, (_, heat) in block_maps(run, slug, group).items()
    }


def render(figure: Figure, format: Format) -> bytes:
    """The figure as a file's content; the same figure gives the same bytes, at any time."""
    content = io.BytesIO()
    with matplotlib.rc_context(settings()):
        figure.savefig(content, format=format, dpi=_PICTURE_DPI, metadata=_NO_DATES[format])
    return content.getvalue()
