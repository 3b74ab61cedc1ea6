"""A run on stdout, as sweep, report and show print it."""

from __future__ import annotations

from collections.abc import Sequence

import click
from rich.console import Console

from chela_bench.records import Point, Run, document
from chela_bench.reports.terminal import sweep_table


def print_run(run: Run, points: Sequence[Point], *, as_json: bool) -> None:
    """Tables for a terminal, or the `--json` document."""
    if as_json:
        click.echo(document(run, list(points)))
    else:
        Console().print(sweep_table(run, points))
