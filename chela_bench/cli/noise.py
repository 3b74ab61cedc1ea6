"""`chela-bench noise`: how far two runs of the same code differ on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from chela_bench.bench import plan
from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.noise import (
    NoiseRecord,
    NoiseRuns,
    measure_noise,
    too_unsteady,
    with_older,
    write_noise,
)
from chela_bench.cli.choices import flags_of, selection_options
from chela_bench.cli.lines import say
from chela_bench.cli.options import baselines_option, config_option, device_option, json_option
from chela_bench.cli.output import say_progress
from chela_bench.cli.signals import interrupted_by_signals
from chela_bench.errors import EnvironmentProblem
from chela_bench.profiles.machine import choose_device
from chela_bench.reports.text import plain


@click.command()
@selection_options
@click.option(
    "--runs",
    type=click.IntRange(2, 100),
    default=5,
    show_default=True,
    help="Processes that measure the same, one after another.",
)
@click.option(
    "--hbm",
    type=click.Choice(["model", "ncu"]),
    default="model",
    help="ncu: how far counted bytes through device memory differ, too.",
)
@device_option
@config_option
@baselines_option
@json_option
def noise(**given: Any) -> None:
    """Measure the same code several times over, each in a process of its own (A/A), and keep how
    far the times differ, and the bytes if they are counted: `compare` and `gate` allow so much on
    this device. Points measured before, on the same machine and versions, are kept.

    \b
    Examples:
      chela-bench noise --preset attention --impl triton_chunked
      chela-bench noise --op linear_attention --hbm ncu --runs 3
    """
    config = load_config(find_config(given["config"]))
    settings = plan.resolve(config, flags_of(given), [choose_device(given["device"])])
    with interrupted_by_signals():
        found = measure_noise(settings, given["runs"], heard=say_progress)
    path: Path | None = None
    whole = found.record
    problems = [too_unsteady(found.unsteady)] if found.unsteady else []
    try:
        older = with_older(given["baselines"], found)
        path = write_noise(given["baselines"], found.machine, older)
        whole = older
    except EnvironmentProblem as error:  # said last: what was measured is not lost for it
        problems.append(str(error))
    _print(found, whole, path, as_json=given["as_json"])
    if problems:
        raise EnvironmentProblem("\n".join(problems))


def _print(found: NoiseRuns, whole: NoiseRecord, path: Path | None, *, as_json: bool) -> None:
    """`whole`: what is in the file, with older points."""
    record = found.record
    file = None if path is None else str(path)
    kept = len(whole.by_key) - len(record.by_key)
    if as_json:
        rows = [
            {"key": key, "noise": size, "hbm_noise": record.hbm_by_key.get(key)}
            for key, size in record.by_key.items()
        ]
        document = {"file": file, "machine": record.machine, "typical": whole.typical}
        click.echo(json.dumps({**document, "kept": kept, "points": rows}, indent=2))
        return
    for key, size in sorted(record.by_key.items(), key=lambda item: -item[1]):
        say(f"{size * 100:5.2f} %  {plain(key)}", hang=9)
    for key, size in sorted(record.hbm_by_key.items(), key=lambda item: -item[1]):
        say(f"{size * 100:5.2f} % of bytes  {plain(key)}", hang=9)
    for point in found.failed:
        say(f"no time  {plain(f'{point.key}: {point.outcome}: {point.reason}')}", hang=9)
    if kept:
        points = "1 point that was" if kept == 1 else f"{kept} points that were"
        say(f"{points} measured before {'is' if kept == 1 else 'are'} kept")
    where = "" if file is None else f": {file}"
    typical = f"{whole.typical * 100:.2f} %"
    say(f"95 of 100 pairs of runs stay within {typical} on {found.machine}{where}")
