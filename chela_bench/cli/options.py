"""Options that several commands share."""

from __future__ import annotations

import click

from chela_bench.cli import complete

device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda or cuda:N.",
    shell_complete=complete.devices,
)
