"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from chela_bench.cli import complete

device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda or cuda:N.",
    shell_complete=complete.devices,
)
config_option = click.option(
    "--config", type=click.Path(path_type=Path), help="Another bench.toml."
)
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder that run folders go into.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
energy_option = click.option(
    "--energy", is_flag=True, help="Joules of a call too, over two seconds of calls each."
)
ncu_report_option = click.option(
    "--ncu-report",
    type=click.Path(path_type=Path),
    metavar="FILE.ncu-rep",
    help="Keep Nsight Compute's own report, for its window.",
)
baselines_option = click.option(
    "--baselines",
    type=click.Path(path_type=Path),
    default=Path("baselines"),
    show_default=True,
    help="Folder of baselines and of this machine's noise.",
)
budget_option = click.option(
    "--budget",
    "budget_s",
    type=click.FloatRange(1, 3600),
    default=30.0,
    show_default=True,
    help="With --live: seconds a point, unless it is clear before.",
)
