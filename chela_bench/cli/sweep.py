"""`chela-bench sweep`: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click

from chela_bench.bench import plan, store
from chela_bench.bench.cases import Case
from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.sweep import own_settings, refuse_other_settings
from chela_bench.cli.choices import (
    flags_of,
    resume_option,
    retried,
    retry_option,
    selection_options,
    to_resume,
)
from chela_bench.cli.options import (
    config_option,
    device_option,
    energy_option,
    json_option,
    ncu_report_option,
    out_option,
)
from chela_bench.cli.sweeping import carry_out
from chela_bench.errors import RecordError, UsageError
from chela_bench.profiles.machine import choose_device, choose_gpus
from chela_bench.records import Run
from chela_bench.reports.text import plain


@click.command()
@selection_options
@device_option
@click.option("--gpus", help="Several GPUs of this machine: 0,1 or all. Instead of --device.")
@click.option("--mix-gpus", is_flag=True, help="Allow --gpus of several models.")
@click.option(
    "--hbm",
    type=click.Choice(get_args(plan.HbmWay)),
    default="model",
    show_default=True,
    help="Bytes through device memory: ncu counts them, gpm too but coarsely (NVML, Hopper), model "
    "is each implementation's formula, auto the best that works here.",
)
@energy_option
@ncu_report_option
@config_option
@out_option
@resume_option
@retry_option("measure points")
@click.option("--dry-run", is_flag=True, help="List the points and stop.")
@json_option
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
      chela-bench sweep --op linear_attention --lens 4k,16k --hbm ncu
    """
    said = flags_of(given)
    retry = retried(given)
    folder, resumed = to_resume(ctx) or (None, None)
    devices_given = given["device"] != "auto" or given["gpus"] is not None
    if given["device"] != "auto" and given["gpus"] is not None:
        raise UsageError("--device names one device and --gpus several: give one of them")
    if given["mix_gpus"] and given["gpus"] is None:
        raise UsageError("--mix-gpus goes with --gpus 0,1 or --gpus all")
    silent = said == plan.Flags() and given["config"] is None and not devices_given
    if folder is not None and resumed is not None and silent:
        settings = _settings_of(folder, resumed)
    else:
        config = load_config(find_config(given["config"]))
        gpus = given["gpus"]
        devices = [choose_device(given["device"])] if gpus is None else choose_gpus(gpus)
        settings = plan.resolve(config, said, devices)
        if folder is not None and resumed is not None:
            refuse_other_settings(folder, resumed.settings, settings)
    if given["ncu_report"] is not None and settings.hbm != "ncu":
        raise UsageError("--ncu-report goes with --hbm ncu")
    if given["dry_run"]:
        points = [] if folder is None else store.load_points(folder)
        done = {p.key: f"done: {p.outcome}" for p in points if p.outcome not in retry}
        _print_plan(settings, plan.cases(settings), done, as_json=given["as_json"])
        return
    carry_out(
        ctx,
        settings,
        out=given["out"],
        as_json=given["as_json"],
        folder=folder,
        resumed=resumed,
        retry=retry,
        ncu_report=given["ncu_report"],
    )


def _settings_of(folder: Path, run: Run) -> plan.Settings:
    if run.settings.get("command") == "tune":
        raise RecordError(f"{folder} is a run of tune; go on with: chela-bench tune --resume")
    return own_settings(folder, run, plan.Settings)


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
