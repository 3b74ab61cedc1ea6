"""How figures look: one colour an implementation, whatever the run and figure, and matplotlib's
settings, for a screen or for a printed column.

Seven colours are Okabe and Ito's (their yellow is left out, being too faint on white), and four
fill the gaps between them: any two stay apart under each kind of colour blindness. Markers differ
as well, so that a line is known without its colour.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import matplotlib

INK, QUIET, FAINT = "#1a1a1a", "#5a5a5a", "#d9d9d9"
HEAT = ("#eef4fa", "#9cc5e3", "#3f8bc4", "#0f4c81")  # from little to much; dark in grey too
NOTHING = "#e3f2dc"  # of a zero where colours are logarithmic

_ORANGE, _SKY, _GREEN, _BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
_VERMILLION, _PURPLE, _BLACK = "#D55E00", "#CC79A7", "#000000"
_INDIGO, _BROWN, _LIME, _GREY = "#332288", "#7A2E00", "#8FD07F", QUIET
COLOURS = (_ORANGE, _SKY, _GREEN, _BLUE, _VERMILLION, _PURPLE, _BLACK, _INDIGO, _BROWN, _LIME,
           _GREY)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")  # no common factor with the colours


class Style(NamedTuple):
    """Colour (#rrggbb) and marker of one implementation."""

    colour: str
    marker: str


KNOWN = {  # of one op, and of the one drawn beside it, no two share a colour
    "triton": Style(_VERMILLION, "o"),
    "triton_chunked": Style(_VERMILLION, "o"),
    "triton_recurrent": Style(_BROWN, ">"),
    "fla_chunk": Style(_BLUE, "s"),
    "fla_fused_chunk": Style(_INDIGO, "p"),
    "fla_recurrent": Style(_LIME, "<"),
    "chunked": Style(_GREEN, "^"),
    "compiled_chunked": Style(_SKY, "v"),
    "recurrent": Style(_PURPLE, "D"),
    "quadratic": Style(_ORANGE, "X"),
    "naive_cumsum": Style(_BLACK, "P"),
    "reference": Style(_GREEN, "^"),
    "fft": Style(_GREEN, "^"),
    "torch_rfft": Style(_BLUE, "s"),
    "direct": Style(_ORANGE, "X"),
    "triton_merged": Style(_VERMILLION, "o"),
    "triton_unmerged": Style(_BROWN, ">"),
    "torch_merged": Style(_BLUE, "s"),
    "torch_unmerged": Style(_SKY, "v"),
    "chela": Style(_VERMILLION, "o"),
    "chela_merged": Style(_BROWN, ">"),
    "composed": Style(_BLUE, "s"),
    "sdpa_flash": Style(_GREY, "h"),
    "sdpa_cudnn": Style(_BLACK, "P"),
    "sdpa_efficient": Style(_PURPLE, "D"),
    "products": Style(_ORANGE, "X"),
}


def styles(impls: Iterable[str]) -> dict[str, Style]:
    """A style for each implementation; its colour follows from its name alone.

    Ours and the peers' are fixed. Another's name is read as a number, so that names which count up
    get different colours. Of several with one colour each has a marker of its own, while there are
    any: it is the marker that gives way, never the colour.
    """
    names = sorted(set(impls))
    chosen = {name: KNOWN[name] for name in names if name in KNOWN}
    for name in names:
        if name not in chosen:
            chosen[name] = _by_name(name, taken=set(chosen.values()))
    return chosen


def _by_name(name: str, *, taken: set[Style]) -> Style:
    number = int.from_bytes(name.encode())
    colour, first = COLOURS[number % len(COLOURS)], number % len(_MARKERS)
    markers = [*_MARKERS[first:], *_MARKERS[:first]]
    free = (marker for marker in markers if Style(colour, marker) not in taken)
    return Style(colour, next(free, markers[0]))


def tint(colour: str, amount: float) -> str:
    """The colour mixed with white: 0 leaves it, 1 is white."""
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + (255 - c) * amount):02x}" for c in channels)


class Look(NamedTuple):
    """How a figure is set for the place where it is read."""

    width_in: float
    plot_in: float  # height of the axes
    font_pt: float
    thickness: float  # of lines and markers
    titled: bool  # with the title, the machine, and a strip of what has no value
    name_characters: int  # a longer name goes on in the next line
    axis_characters: int  # of an axis' name, and of words within the plot
    most_ticks: int  # of lengths
    mark_share: float  # of the axis that a mark's name takes
    dpi: int  # of a PNG
    svg_fonttype: str


LOOKS = {
    # Text stays text: a third of the bytes that drawn letters take, and searchable.
    "screen": Look(9.0, 3.9, 9.5, 1.0, True, 32, 80, 12, 0.07, 200, "none"),
    # One column of a two-column page; titles are for captions. An SVG's letters are drawn, so that
    # it looks the same where the font is missing.
    "paper": Look(3.35, 2.3, 7.0, 0.6, False, 48, 38, 7, 0.13, 400, "path"),
}
SCREEN = LOOKS["screen"]


def settings(look: Look = SCREEN) -> dict[Any, Any]:
    """For `matplotlib.rc_context`: its own defaults, not the user's, and ours on top."""
    ours = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana"],  # the second for a reader without the first
        "font.size": look.font_pt,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.8 * look.thickness,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.8 * look.thickness,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.major.width": 0.8 * look.thickness,
        "ytick.major.width": 0.8 * look.thickness,
        "text.color": INK,
        "lines.linewidth": 1.8 * look.thickness,
        "lines.markersize": 6 * look.thickness,
        "legend.frameon": False,
        "legend.fontsize": look.font_pt,
        "svg.hashsalt": "chela-bench",
        "svg.fonttype": look.svg_fonttype,
        "pdf.fonttype": 42,  # whole outlines (TrueType): journals refuse Type 3
    }
    defaults: dict[Any, Any] = {
        name: value
        for name, value in matplotlib.rcParamsDefault.items()
        if not name.startswith(("backend", "interactive", "toolbar", "webagg"))
    }
    return {**defaults, **ours}
