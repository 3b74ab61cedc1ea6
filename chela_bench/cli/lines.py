"""Lines wrapped to the terminal's width; names, sizes and paths are not broken."""

from __future__ import annotations

import os
import shutil
import textwrap
from typing import Any

import click


def say(text: str, *, indent: int = 0, hang: int = 2, style: dict[str, Any] | None = None) -> None:
    """Prints on stdout; lines after the first are indented by `hang` more; styled on a terminal."""
    width = max(shutil.get_terminal_size().columns, indent + 20)
    lines = textwrap.fill(
        "".join(c if c.isprintable() else " " for c in text),
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hang),
        break_long_words=False,
        break_on_hyphens=False,
    )
    colour = False if os.environ.get("NO_COLOR") else None
    click.echo(click.style(lines, **style) if style else lines, color=colour)
