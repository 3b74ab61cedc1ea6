"""`chela-bench report`: tables and figures from run folders."""

from __future__ import annotations

from pathlib import Path

import click

from chela_bench.bench.paths import real_name
from chela_bench.bench.store import load_run, load_samples
from chela_bench.cli.figure_options import figure_options
from chela_bench.cli.options import baselines_option
from chela_bench.cli.output import print_run, write_files
from chela_bench.errors import UsageError

SEVERAL = Path("report")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the report [default: RUN/report]; with several runs, one folder each in it, "
    "and one page of them all [default of that page: report/index.html].",
)
@click.option("--compare", is_flag=True, help="Each further run with the first one, on that page.")
@click.option(
    "--across-machines",
    is_flag=True,
    help="With --compare: multiples of each machine's own floor.",
)
@baselines_option
@click.option(
    "--atlas",
    "atlas_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="What `atlas --out` wrote, for the page [default: RUN/atlas.json, if there].",
)
@figure_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document a run on stdout.")
@click.option(
    "--markdown", "as_markdown", is_flag=True, help="summary.md on stdout, for a pull request."
)
def report(
    runs: tuple[Path, ...],
    out: Path | None,
    compare: bool,
    across_machines: bool,
    baselines: Path,
    atlas_file: Path | None,
    formats: list[str],
    style: str,
    as_json: bool,
    as_markdown: bool,
) -> None:
    """One HTML page, tables (Markdown, CSV) and figures from run folders.

    \b
    Examples:
      chela-bench report runs/RUN -o report
      chela-bench report runs/BEFORE runs/AFTER --compare -o report
      chela-bench report runs/RUN -o figures --format pdf,svg,png --style paper
      chela-bench report runs/RUN --markdown
    """
    from chela_bench.cli.derived import PAGE, SUMMARY, formats_of, report_files, write_tables
    from chela_bench.cli.pages import atlas_of, compared
    from chela_bench.reports.html import pages
    from chela_bench.reports.style import LOOKS

    if as_json and as_markdown:
        raise UsageError("--json and --markdown both write to stdout: give one of them")
    kinds, look = formats_of(formats), LOOKS[style]
    names = [real_name(folder) for folder in runs]
    if out is not None and len(set(names)) < len(names):
        raise UsageError(f"two run folders of one name would share a folder in {out}: report each")
    if len(runs) == 1 and (compare or across_machines):
        raise UsageError("--compare takes two runs or more, as in: report BEFORE AFTER --compare")
    if across_machines and not compare:
        raise UsageError("--across-machines goes with --compare")
    if len(runs) > 1 and atlas_file is not None:
        raise UsageError("--atlas goes with one run; of several each has its own atlas.json")
    comparisons = compared(runs, baselines, across_machines=across_machines) if compare else []
    loaded = [
        (*load_run(folder), load_samples(folder), atlas_of(folder, atlas_file)) for folder in runs
    ]  # all of them, before the first file is written
    found = []
    for folder, name, (run, points, samples, atlas) in zip(runs, names, loaded, strict=True):
        if out is None:
            write_tables(folder, run, points)
            target = folder / "report"
        else:
            target = out if len(runs) == 1 else out / name
        reported, files = report_files(run, points, samples, atlas, formats=kinds, look=look)
        write_files({target / file: data for file, data in files.items()})
        found.append(reported)
        if as_markdown:
            click.echo(files[SUMMARY].decode(), nl=False)
        else:
            print_run(run, points, as_json=as_json)
        click.echo(f"report: {target / PAGE} ({len(files)} files)", err=as_json or as_markdown)
    if len(found) > 1:
        path = (out or SEVERAL) / PAGE
        write_files({path: pages(found, comparisons).encode()})
        click.echo(f"report of all: {path}", err=as_json or as_markdown)
