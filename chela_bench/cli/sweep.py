"""`chela-bench sweep`: the main job."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from chela_bench.bench import plan, store
from chela_bench.bench.cases import Case
from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.load import refuse_changed_files
from chela_bench.bench.sweep import Result, new_folder, refuse_other_settings
from chela_bench.bench.sweep import sweep as run_sweep
from chela_bench.cli.options import config_option, device_option, out_option
from chela_bench.cli.output import print_run
from chela_bench.cli.progress import SweepProgress
from chela_bench.cli.selection import flags_of, selection_options
from chela_bench.cli.signals import Interrupted, interrupted_by_signals
from chela_bench.errors import ChelaBenchError, RecordError, UsageError
from chela_bench.profiles.machine import choose_device, choose_gpus
from chela_bench.records import OUTCOMES, Point, Run
from chela_bench.reports.text import own_cost, plain


@click.command()
@selection_options
@device_option
@click.option("--gpus", help="Several GPUs of this machine: 0,1 or all. Instead of --device.")
@click.option("--mix-gpus", is_flag=True, help="Allow --gpus of several models.")
@config_option
@out_option
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with this run folder.")
@click.option(
    "--retry",
    multiple=True,
    type=click.Choice(OUTCOMES),
    help="With --resume: measure points of this outcome again.",
)
@click.option("--dry-run", is_flag=True, help="List the points and stop.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def sweep(ctx: click.Context, /, **given: Any) -> None:
    """Measure implementations over sequence lengths, each checked against its oracle.

    Without flags: every op and implementation of bench.toml's [sweep]. Results go to stdout and
    into a run folder with tables, figures and a page of both, progress to stderr.

    \b
    Examples:
      chela-bench sweep --lens 1k..64k
      chela-bench sweep --op linear_attention --impl triton_chunked --axis BLOCK_T=32,64,128
      chela-bench sweep --op linear_attention --impl fla_chunk --impl my_kernel.py:attention
    """
    flags = flags_of(given)
    retry = frozenset(given["retry"])
    folder: Path | None = given["resume"]
    if retry and folder is None:
        raise UsageError("--retry goes with --resume RUN_FOLDER")
    resumed = None if folder is None else store.load_header(folder)
    devices_given = given["device"] != "auto" or given["gpus"] is not None
    if given["device"] != "auto" and given["gpus"] is not None:
        raise UsageError("--device names one device and --gpus several: give one of them")
    silent = flags == plan.Flags() and given["config"] is None and not devices_given
    if resumed is not None and silent:
        settings = _settings_of(folder, resumed)
        refuse_changed_files(settings.user_impls, settings.user_files_sha256)
    else:
        config = load_config(find_config(given["config"]))
        gpus = given["gpus"]
        devices = [choose_device(given["device"])] if gpus is None else choose_gpus(gpus)
        settings = plan.resolve(config, flags, devices)
        if folder is not None and resumed is not None:
            refuse_other_settings(folder, resumed.settings, settings)
    if given["dry_run"]:
        points = [] if folder is None else store.load_points(folder)
        done = {p.key: f"done: {p.outcome}" for p in points if p.outcome not in retry}
        _print_plan(settings, plan.cases(settings), done, as_json=given["as_json"])
        return
    importlib.import_module("chela_bench.cli.derived")  # slow or broken: now, not an hour later
    target = folder or new_folder(given["out"])
    progress = SweepProgress()
    try:
        with interrupted_by_signals(), progress:
            result = run_sweep(settings, target, progress, resumed=resumed, retry=retry)
    except ChelaBenchError:
        if progress.begun:
            with contextlib.suppress(ChelaBenchError):  # a full disk takes no tables either
                _conclude_interrupted(target, as_json=given["as_json"])
        raise
    except KeyboardInterrupt as stop:
        if progress.begun:
            _conclude_interrupted(target, as_json=given["as_json"])
        ctx.exit(stop.exit_code if isinstance(stop, Interrupted) else 130)
    _conclude(result, as_json=given["as_json"])
    ctx.exit(exit_code(result.points))


def exit_code(points: list[Point]) -> int:
    """3 if a result is wrong, 1 if a point crashed or timed out, else 0."""
    outcomes = {point.outcome for point in points}
    if "wrong" in outcomes:
        return 3
    return 1 if outcomes & {"crash", "timeout"} else 0


def _conclude_interrupted(target: Path, *, as_json: bool) -> None:
    """What was measured is worth its tables."""
    run, points = store.load_run(target)
    note = f"interrupted; go on with: chela-bench sweep --resume {target}"
    _conclude(Result(target, run, points), as_json=as_json, note=note)


def _conclude(result: Result, *, as_json: bool, note: str | None = None) -> None:
    """Files first: the terminal may be gone."""
    from chela_bench.cli.derived import PAGE, write_report, write_tables

    write_tables(result.folder, result.run, result.points)
    report = result.folder / "report"
    paths = write_report(report, result.run, result.points)
    if note is not None:
        click.echo(note, err=True)
    print_run(result.run, result.points, as_json=as_json)
    cost = own_cost(result.run)
    if cost is not None:
        click.echo(f"the bench's own cost: {cost}", err=as_json)
    figures = sum(path.suffix == ".png" for path in paths)
    click.echo(
        f"records: {result.folder}\nreport:  {report / PAGE} ({figures} figures)", err=as_json
    )


def _settings_of(folder: Path | None, run: Run) -> plan.Settings:
    try:
        return plan.Settings.model_validate(run.settings)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(["settings", *map(str, problem["loc"])])
        message = problem["msg"].removeprefix("Value error, ")
        raise RecordError(f"{folder} cannot be resumed: {where}: {message}") from None


def _print_plan(
    settings: plan.Settings, cases: list[Case], done: dict[str, str], *, as_json: bool
) -> None:
    skips = {case.key: plan.unavailable(settings, case) for case in cases}
    reasons = {key: done.get(key) or (f"skipped: {skip}" if skip else None)
               for key, skip in skips.items()}  # fmt: skip
    if as_json:
        rows = [{**case.model_dump(), "not_tried": reasons[case.key]} for case in cases]
        plan_document = {"settings": settings.model_dump(mode="json"), "points": rows}
        click.echo(json.dumps(plan_document, indent=2))
        return
    for key, reason in reasons.items():
        click.echo("  ".join(plain(part) for part in (key, reason) if part))
    runnable = sum(reason is None for reason in reasons.values())
    click.echo(f"{len(cases)} points, {runnable} to be tried", err=True)
