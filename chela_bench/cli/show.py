"""`chela-bench show`: one run's tables again, writing nothing."""

from __future__ import annotations

from pathlib import Path

import click

from chela_bench.bench.store import load_run
from chela_bench.cli.options import json_option
from chela_bench.cli.output import print_run


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@json_option
def show(folder: Path, as_json: bool) -> None:
    """The tables of a run folder on stdout. Writes nothing; `report` writes files.

    \b
    Example:  chela-bench show runs/RUN
    """
    run, points = load_run(folder)
    print_run(run, points, as_json=as_json)
