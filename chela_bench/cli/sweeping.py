"""Carrying a sweep out for a command: progress, interruption, files, what is printed, exit code."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from pathlib import Path

import click

from chela_bench.bench import store
from chela_bench.bench.plan import Settings
from chela_bench.bench.sweep import Result, new_folder
from chela_bench.bench.sweep import sweep as run_sweep
from chela_bench.cli.output import print_run
from chela_bench.cli.progress import SweepProgress
from chela_bench.cli.signals import interrupted_by_signals, interruption_code
from chela_bench.errors import ChelaBenchError
from chela_bench.records import Outcome, Point, Run
from chela_bench.reports.text import own_cost

TRAFFIC = ("HBM traffic",)


def carry_out(
    ctx: click.Context,
    settings: Settings,
    *,
    out: Path,
    as_json: bool,
    folder: Path | None = None,
    resumed: Run | None = None,
    retry: frozenset[Outcome] = frozenset(),
    ncu_report: Path | None = None,
    beside: Sequence[str] = TRAFFIC,
) -> None:
    """Measures, writes and prints; ends the command with its exit code. `beside` names the sheets
    that are printed below the times, where something was counted."""
    importlib.import_module("chela_bench.cli.derived")  # slow or broken: now, not an hour later
    target = folder or new_folder(out)
    progress = SweepProgress()
    try:
        with interrupted_by_signals(), progress:
            result = run_sweep(
                settings, target, progress, resumed=resumed, retry=retry, ncu_report=ncu_report
            )
    except ChelaBenchError:
        if progress.begun:
            with contextlib.suppress(ChelaBenchError):  # a full disk takes no tables either
                _conclude_interrupted(target, as_json=as_json, beside=beside)
        raise
    except KeyboardInterrupt as stop:
        if progress.begun:
            _conclude_interrupted(target, as_json=as_json, beside=beside)
        ctx.exit(interruption_code(stop))
    _conclude(result, as_json=as_json, beside=beside)
    ctx.exit(exit_code(result.points))


def exit_code(points: list[Point]) -> int:
    """3 if a result is wrong, 1 if a point crashed or timed out, else 0."""
    outcomes = {point.outcome for point in points}
    if "wrong" in outcomes:
        return 3
    return 1 if outcomes & {"crash", "timeout"} else 0


def _conclude_interrupted(target: Path, *, as_json: bool, beside: Sequence[str]) -> None:
    """What was measured is worth its tables."""
    run, points = store.load_run(target)
    note = f"interrupted; go on with: chela-bench sweep --resume {target}"
    _conclude(Result(target, run, points), as_json=as_json, note=note, beside=beside)


def _conclude(
    result: Result, *, as_json: bool, beside: Sequence[str], note: str | None = None
) -> None:
    """Files first: the terminal may be gone."""
    from chela_bench.cli.derived import PAGE, write_report, write_tables

    write_tables(result.folder, result.run, result.points)
    report = result.folder / "report"
    samples = store.load_samples(result.folder)
    paths = write_report(report, result.run, result.points, samples)
    if note is not None:
        click.echo(note, err=True)
    print_run(result.run, result.points, as_json=as_json, beside=beside)
    cost = own_cost(result.run, result.points)
    if cost is not None:
        click.echo(f"the bench's own cost: {cost}", err=as_json)
    figures = sum(path.suffix == ".png" for path in paths)
    click.echo(
        f"records: {result.folder}\nreport:  {report / PAGE} ({figures} figures)", err=as_json
    )
