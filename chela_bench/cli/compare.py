"""`chela-bench compare`: two records, or two things measured in turns, point by point."""

from __future__ import annotations

from pathlib import Path

import click

from chela_bench.bench import sources
from chela_bench.bench.comparing import Noise, assumed_noise, compare as compare_records
from chela_bench.cli.output import echo_rich, write_files
from chela_bench.verdicts import Comparison, document


@click.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@click.option(
    "--across-machines",
    is_flag=True,
    help="Allow records of different machines: multiples of each one's floor are compared.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder for comparison.md, .json, .png, .svg."
)
def compare(before: str, after: str, across_machines: bool, as_json: bool, out: Path | None) -> None:
    a, b = (sources.read(Path(path)) for path in (before, after))
    show(compare_records(a, b, assumed_noise(b.machine), across_machines=across_machines), as_json=as_json, out=out)


def show(comparison: Comparison, *, as_json: bool, out: Path | None) -> None: ...
