"""`chela-bench compare`: two records, or two things measured in turns, point by point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chela_bench.bench import comparing, live, sources
from chela_bench.bench.noise import noise_of
from chela_bench.bench.plan import Flags
from chela_bench.cli.choices import flags_of, refuse_without_live, selection_options
from chela_bench.cli.figure_options import figure_files, figure_options
from chela_bench.cli.options import (
    baselines_option,
    budget_option,
    config_option,
    device_option,
    json_option,
)
from chela_bench.cli.output import echo_rich, files_first, say_progress, write_files
from chela_bench.cli.signals import interrupted_by_signals
from chela_bench.cli.turns import two_sides
from chela_bench.errors import UsageError
from chela_bench.reports import changes
from chela_bench.verdicts import Comparison, Side, document

if TYPE_CHECKING:
    from chela_bench.reports.figures import Format
    from chela_bench.reports.style import Look


@click.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@click.option("--live", "is_live", is_flag=True, help="Measure both now, in turns.")
@budget_option
@click.option(
    "--across-machines",
    is_flag=True,
    help="Allow two machines: multiples of each one's own floor are compared.",
)
@selection_options
@device_option
@config_option
@baselines_option
@json_option
@click.option("--markdown", "as_markdown", is_flag=True, help="Markdown on stdout.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for comparison.md, comparison.json and the figure.",
)
@figure_options
@click.pass_context
def compare(ctx: click.Context, /, **given: Any) -> None:
    """Point by point, is B slower than A? Ratios with 95 % intervals, and a verdict.

    A and B are run folders or JSON files of pytest-benchmark. With --live they are two
    implementations, or two git revisions of this package's checkout (`.` is the tree as it
    stands); which points is said as to `sweep`.

    \b
    Examples:
      chela-bench compare runs/BEFORE runs/AFTER
      chela-bench compare runs/BEFORE runs/AFTER -o figures --format pdf --style paper
      chela-bench compare --live chunked my_kernel.py:attention --op linear_attention --lens 4k
      chela-bench compare --live main . --op long_conv --shape b8-t4k-d1024
    """
    if given["as_json"] and given["as_markdown"]:
        raise UsageError("--json and --markdown both write to stdout: give one of them")
    flags = flags_of(given)
    written = figure_files(ctx, given)
    if given["is_live"]:
        if given["across_machines"]:
            raise UsageError("--live measures both sides on one machine: no --across-machines")
        with interrupted_by_signals():
            comparison = _live(given, flags)
    else:
        refuse_without_live(ctx, "budget_s", "device", "config")
        if flags != Flags():
            raise UsageError("records hold their own points; which ones goes with --live")
        a, b = (sources.read(Path(given[side])) for side in ("before", "after"))
        comparison = comparing.compare(
            a,
            b,
            noise_of(given["baselines"], b.machine),
            across_machines=given["across_machines"],
        )
    files = [] if written is None else [lambda: _write(given["out"], comparison, *written)]
    exit_code = 3 if any(change.wrong for change in comparison.points) else 0
    with files_first(*files, exit_code=exit_code):
        if given["as_json"]:
            click.echo(document(comparison))
        elif given["as_markdown"]:
            click.echo(changes.markdown(comparison), nl=False)
        else:
            echo_rich(changes.terminal(comparison))
    ctx.exit(exit_code)


def _live(given: dict[str, Any], flags: Flags) -> Comparison:
    labels: tuple[str, str] = (given["before"], given["after"])
    with two_sides(given, flags, labels) as sides:
        if not sides.timed:
            raise UsageError("nothing of what is selected can run here on both sides")
        rows = live.compare(
            sides.before,
            sides.after,
            sides.timed,
            sides.noise,
            budget_s=given["budget_s"],
            on_pair=lambda pair: say_progress(pair.name),
        )
        before, after = (
            Side(label=label, machine=str(seat.machine), versions=seat.machine.versions())
            for label, seat in zip(labels, (sides.before, sides.after), strict=True)
        )
    return Comparison(
        mode="live",
        before=before,
        after=after,
        noise=sides.noise.typical,
        points=rows,
        missing=[
            *(pair.name for pair in sides.pairs if pair.lacks[0] is None is not pair.lacks[1]),
            *sides.gone,
        ],
        added=[pair.name for pair in sides.pairs if pair.lacks[1] is None is not pair.lacks[0]],
        notes=[f"noise: {sides.noise.source}", *sides.notes],
    )


def _write(out: Path, comparison: Comparison, kinds: Sequence[Format], look: Look) -> None:
    from chela_bench.reports.figures import render

    files = {
        "comparison.md": changes.markdown(comparison).encode(),
        "comparison.json": document(comparison).encode() + b"\n",
    }
    drawn = changes.figure(comparison, look)
    if drawn is not None:
        files |= {f"comparison.{kind}": render(drawn, kind, look) for kind in kinds}
    write_files({out / name: data for name, data in files.items()})
