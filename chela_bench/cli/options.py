"""Options that several commands share."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click

from chela_bench.cli import complete


class Seconds(click.ParamType):  # type: ignore[type-arg]
    """`90s`, `5m`, `1h`, or a number of seconds."""

    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value).strip())
        if not found or float(found[1]) <= 0:
            self.fail(f"{value!r} is no time; write 90s, 5m or 1h", param, ctx)
        return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


class Finite(click.FloatRange):
    """`nan` is in no range."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is no number", param, ctx)
        return found


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
    type=Seconds(),
    default="30s",
    show_default=True,
    help="With --live: time for a point, unless it is clear before.",
)
