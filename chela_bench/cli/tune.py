"""`chela-bench tune`: block sizes, compiled, checked, and timed in turn."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import click

from chela_bench.bench import store
from chela_bench.bench import tune as bench
from chela_bench.bench.atlas import LIMIT_S
from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.sweep import new_folder, own_settings
from chela_bench.bench.tables import write_table
from chela_bench.cli import complete
from chela_bench.cli.choices import (
    flags_of,
    many,
    resume_option,
    retried,
    retry_option,
    said,
    seed_option,
    sizes_option,
    to_resume,
)
from chela_bench.cli.options import Seconds, config_option, device_option, json_option, out_option
from chela_bench.cli.output import echo_rich, write_files
from chela_bench.cli.progress import SweepProgress
from chela_bench.cli.signals import interrupted_by_signals, interruption_code
from chela_bench.cli.sweeping import exit_code
from chela_bench.errors import RecordError, UsageError
from chela_bench.profiles.machine import choose_device
from chela_bench.profiles.occupancy import ARCHS
from chela_bench.records import Point, Run, document

FOLDER = "tune"  # in the run folder
_ALSO_RESUMED = ("resume", "retry", "budget", "write_table", "table", "as_json")


@click.command()
@click.argument("op", required=False, shell_complete=complete.ops)
@many("--impl", "The implementation, or path/to/file.py:function.", complete.impls)
@click.option("--axis", "axes", multiple=True, help="A setting: BLOCK_T=32,64. Repeatable.")
@click.option("--lens", help="1k..64k (doubling) or 4k,16k; k = 1024.")
@many("--shape", "Shapes by name, from bench.toml.", complete.shapes)
@many("--dtype", "fp32, bf16, fp16.", complete.dtypes)
@many("--direction", "fwd, bwd, fwdbwd.  [default: fwd]", complete.directions)
@sizes_option
@device_option
@click.option("--timer", type=click.Choice(("event", "profiler")), help="How to time.")
@click.option("--l2", type=click.Choice(("cold", "warm")), help="Evict the L2 cache, or leave it.")
@seed_option
@click.option(
    "--arch",
    help=f"Compile for it: {', '.join(ARCHS)}.  [default: the device's]",
    shell_complete=complete.archs,
)
@click.option("--budget", type=Seconds(), help="Stop trying in time to end by then: 5m, 90s.")
@click.option(
    "--write-table",
    is_flag=True,
    help="Put the fastest where the kernels look: chela_bench/kernels/tuned.json.",
)
@click.option(
    "--table",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Another file than that, for --write-table.",
)
@config_option
@out_option
@resume_option
@retry_option("try configurations")
@json_option
@click.pass_context
def tune(ctx: click.Context, /, **given: Any) -> None:
    """Try every configuration: compiled, checked against the oracle, timed in turn.

    What cannot fit is known from compiling and not tried. Every configuration is a point of the run
    folder, with its shared memory and registers; heat maps stand in its folder tune/.

    \b
    Examples:
      chela-bench tune linear_attention --lens 4k,16k --axis BLOCK_V=32,64,128 \\
          --axis num_warps=4,8 --axis segments=1,2,4,8 --budget 5m
      chela-bench tune long_conv --lens 4k --axis method=monarch,factors --axis N2=16,32,64
      chela-bench tune --resume runs/TUNED --write-table
    """
    retry = retried(given)
    folder, resumed = to_resume(ctx) or (None, None)
    if folder is None or resumed is None:
        settings = _new(given)
    else:
        settings = _settings_of(folder, resumed, ctx)
    if given["table"] is not None and not given["write_table"]:
        raise UsageError("--table goes with --write-table")
    importlib.import_module("chela_bench.cli.derived")  # slow or broken: now, not an hour later
    target = folder or new_folder(given["out"])
    progress = SweepProgress()
    tuning = bench.Tuning(
        settings,
        target,
        progress,
        budget_s=given["budget"],
        resumed=resumed,
        retry=retry,
        compile_limit_s=LIMIT_S,
    )
    try:
        with interrupted_by_signals(), progress:
            done = tuning.run()
    except KeyboardInterrupt as stop:
        if progress.begun:
            run, points = store.load_run(target)
            click.echo(f"interrupted; go on with: chela-bench tune --resume {target}", err=True)
            _conclude(run, points, target, given, [])
        ctx.exit(interruption_code(stop))
    untried = [case.key for case in done.untried]
    _conclude(done.run, done.points, target, given, untried, write=given["write_table"])
    ctx.exit(exit_code(done.points))


def _new(given: dict[str, Any]) -> bench.TuneSettings:
    if given["op"] is None:
        raise UsageError("tune wants an OP, as in: chela-bench tune linear_attention --axis ...")
    flags = flags_of({**given, "op": ((given["op"],),)})
    if not flags.directions:
        from dataclasses import replace

        flags = replace(flags, directions=("fwd",))
    device = choose_device(given["device"])
    config = load_config(find_config(given["config"]))
    return bench.resolve(config, flags, device, arch=given["arch"])


def _settings_of(folder: Path, run: Run, ctx: click.Context) -> bench.TuneSettings:
    others = [flag for name, flag in said(ctx).items() if name not in _ALSO_RESUMED]
    if others:
        raise UsageError(
            f"--resume takes the run's own settings: leave the others out, here {', '.join(others)}"
        )
    if run.settings.get("command") != "tune":
        raise RecordError(f"{folder} is no run of tune; go on with: chela-bench sweep --resume")
    return own_settings(folder, run, bench.TuneSettings)


def _conclude(
    run: Run,
    points: list[Point],
    folder: Path,
    given: dict[str, Any],
    untried: list[str],
    *,
    write: bool = False,
) -> None:
    """Files first: the terminal may be gone."""
    from chela_bench.cli.derived import FORMATS, write_tables
    from chela_bench.reports.figures import render
    from chela_bench.reports.heat import draw_heat_map
    from chela_bench.reports.tune import summaries, tune_maps, tune_table

    as_json = given["as_json"]
    write_tables(folder, run, points)
    files = {}
    for name, heat in tune_maps(run, points).items():
        figure = draw_heat_map(heat)
        for kind in FORMATS:
            files[folder / FOLDER / f"{name}.{kind}"] = render(figure, kind)
    write_files(files)
    written = write_table(run, points, given["table"]) if write else None
    if as_json:
        whole = json.loads(document(run, points))
        whole["calls"] = summaries(points)
        whole["not_tried"] = untried
        whole["table"] = None if written is None else str(written.path)
        click.echo(json.dumps(whole, indent=2))
    else:
        echo_rich(tune_table(run, points))
    if untried:
        click.echo(
            f"not tried for lack of time: {len(untried)} configurations, as {untried[0]}; go on "
            f"with: chela-bench tune --resume {folder}",
            err=as_json,
        )
    if written is not None:
        click.echo(
            f"table: {written.path}: {written.added} calls written, {written.kept_defaults} whose "
            f"defaults are within 1 % of the fastest left out",
            err=as_json,
        )
    maps = sum(path.suffix == ".png" for path in files)
    click.echo(f"records: {folder}\nheat maps: {folder / FOLDER} ({maps})", err=as_json)
