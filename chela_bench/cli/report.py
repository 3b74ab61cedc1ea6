"""`chela-bench report`: tables and figures from run folders."""

from __future__ import annotations

from pathlib import Path

import click

from chela_bench.bench.store import load_run
from chela_bench.cli import complete
from chela_bench.cli.choices import Names
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
@click.option(
    "--format",
    "formats",
    type=Names(),
    default="png,svg",
    show_default=True,
    help="Files of each figure: png, svg, pdf.",
    shell_complete=complete.formats,
)
@click.option(
    "--style",
    type=click.Choice(("screen", "paper")),
    default="screen",
    show_default=True,
    help="Of figures; paper: one column wide, no title, fonts embedded.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document a run on stdout.")
@click.option(
    "--markdown", "as_markdown", is_flag=True, help="summary.md on stdout, for a pull request."
)
def report(
    runs: tuple[Path, ...],
    out: Path | None,
    formats: list[str],
    style: str,
    as_json: bool,
    as_markdown: bool,
) -> None:
    """One HTML page, tables (Markdown, CSV) and figures from run folders.

    \b
    Examples:
      chela-bench report runs/RUN -o report
      chela-bench report runs/RUN -o figures --format pdf,svg,png --style paper
      chela-bench report runs/RUN --markdown
    """
    from chela_bench.cli.derived import (
        PAGE,
        SUMMARY,
        formats_of,
        write_report,
        write_tables,
    )
    from chela_bench.reports.style import LOOKS

    if as_json and as_markdown:
        raise UsageError("--json and --markdown both write to stdout: give one of them")
    kinds, look = formats_of(formats), LOOKS[style]
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
        paths = write_report(target, run, points, formats=kinds, look=look)
        if as_markdown:
            click.echo((target / SUMMARY).read_text(encoding="utf-8"), nl=False)
        else:
            print_run(run, points, as_json=as_json)
        click.echo(f"report: {target / PAGE} ({len(paths)} files)", err=as_json or as_markdown)
