"""`chela-bench report`: tables and figures from run folders."""

from __future__ import annotations

from pathlib import Path

import click

from chela_bench.bench.store import load_run
from chela_bench.cli.output import print_run
from chela_bench.errors import UsageError


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the report [default: RUN/report]; with several runs, one folder each in it.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document a run on stdout.")
def report(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """One HTML page, tables (Markdown, CSV) and figures (PNG, SVG) from run folders.

    \b
    Example:  chela-bench report runs/20260101T120000Z-abc123 -o report
    """
    from chela_bench.cli.derived import PAGE, write_report, write_tables

    names = [folder.resolve().name for folder in runs]
    if out is not None and len(set(names)) < len(names):
        raise UsageError(f"two run folders of one name would share a folder in {out}: report each")
    for folder, name in zip(runs, names, strict=True):
        run, points = load_run(folder)
        if out is None:
            write_tables(folder, run, points)
            target = folder / "report"
        else:
            target = out if len(runs) == 1 else out / name
        paths = write_report(target, run, points)
        print_run(run, points, as_json=as_json)
        if not as_json:
            click.echo(f"report: {target / PAGE} ({len(paths)} files)")
