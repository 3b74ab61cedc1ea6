"""How figures look: one colour and one marker an implementation, and matplotlib's settings.

Colours are Okabe and Ito's, which colour-blind readers tell apart; their yellow is left out,
being too faint on white. Markers differ as well, so that a line is known without its colour.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import matplotlib

INK, QUIET, FAINT = "#1a1a1a", "#5a5a5a", "#d9d9d9"
HEAT = ("#eef4fa", "#9cc5e3", "#3f8bc4", "#0f4c81")  # from little to much; dark in grey too

_ORANGE, _SKY, _GREEN, _BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
_VERMILLION, _PURPLE, _BLACK = "#D55E00", "#CC79A7", "#000000"
_COLOURS = (_ORANGE, _SKY, _GREEN, _BLUE, _VERMILLION, _PURPLE, _BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p")


class Style(NamedTuple):
    """Colour (#rrggbb) and marker of one implementation."""

    colour: str
    marker: str


_KNOWN = {
    "triton": Style(_VERMILLION, "o"),
    "triton_chunked": Style(_VERMILLION, "o"),
    "fla_chunk": Style(_BLUE, "s"),
    "fla_fused_chunk": Style(_BLUE, "p"),
    "fla_recurrent": Style(_BLUE, "<"),
    "chunked": Style(_GREEN, "^"),
    "compiled_chunked": Style(_SKY, "v"),
    "recurrent": Style(_PURPLE, "D"),
    "quadratic": Style(_ORANGE, "X"),
    "naive_cumsum": Style(_BLACK, "P"),
    "sdpa_flash": Style(QUIET, "h"),
    "reference": Style(_GREEN, "^"),
    "fft": Style(_GREEN, "^"),
    "torch_rfft": Style(_BLUE, "s"),
    "direct": Style(_ORANGE, "X"),
}


def styles(impls: Iterable[str]) -> dict[str, Style]:
    """A style for each implementation, no two alike while there are pairs left.

    Ours are fixed. Another's follows from its name alone, unless its colour is taken by a known
    one or by a name before it in the alphabet: then it gets the next free one.
    """
    names = sorted(set(impls))
    chosen = {name: _KNOWN[name] for name in names if name in _KNOWN}
    for name in names:
        if name not in chosen:
            chosen[name] = _free_style(name, list(chosen.values()))
    return chosen


def _free_style(name: str, taken: list[Style]) -> Style:
    start = zlib.crc32(name.encode())
    colours = [_COLOURS[(start + i) % len(_COLOURS)] for i in range(len(_COLOURS))]
    markers = [_MARKERS[(start + i) % len(_MARKERS)] for i in range(len(_MARKERS))]
    uses = {colour: sum(style.colour == colour for style in taken) for colour in colours}
    colour = min(colours, key=uses.__getitem__)  # the first of the least used
    markers_taken = [style.marker for style in taken]
    marker = min(markers, key=lambda m: (Style(colour, m) in taken, markers_taken.count(m)))
    return Style(colour, marker)


def tint(colour: str, amount: float) -> str:
    """The colour mixed with white: 0 leaves it, 1 is white."""
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + (255 - c) * amount):02x}" for c in channels)


def settings() -> dict[Any, Any]:
    """For `matplotlib.rc_context`: its own defaults, not the user's, and ours on top."""
    ours = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana"],  # the second for a reader without the first
        "font.size": 9.5,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.8,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "text.color": INK,
        "lines.linewidth": 1.8,
        "lines.markersize": 6,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "svg.hashsalt": "chela-bench",
        "svg.fonttype": "none",  # text stays text: a third of the bytes that drawn letters take
    }
    defaults: dict[Any, Any] = {
        name: value
        for name, value in matplotlib.rcParamsDefault.items()
        if not name.startswith(("backend", "interactive", "toolbar", "webagg"))
    }
    return {**defaults, **ours}
