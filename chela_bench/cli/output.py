"""A run on stdout, as sweep, report and show print it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import click
from rich.console import Console, RenderableType

from chela_bench.records import Point, Run, document
from chela_bench.reports.terminal import sweep_table
from chela_bench.reports.text import plain


def print_run(
    run: Run, points: Sequence[Point], *, as_json: bool, beside: Sequence[str] = ("HBM traffic",)
) -> None:
    """Tables for a terminal, or the `--json` document.

    Through click: rich by itself ends the process where a pipe is closed.
    """
    if as_json:
        click.echo(document(run, list(points)))
        return
    console = Console()
    with console.capture() as captured:
        console.print(sweep_table(run, points, beside=beside))
    click.echo(captured.get(), nl=False)


def echo_rich(renderable: RenderableType) -> None:
    """As `print_run` prints."""
    console = Console()
    with console.capture() as captured:
        console.print(renderable)
    click.echo(captured.get(), nl=False)


def say_progress(line: str) -> None:
    """One line on stderr. A terminal that is gone does not end a measurement."""
    with contextlib.suppress(OSError):
        click.echo(plain(line), err=True)
