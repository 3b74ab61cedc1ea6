"""--format and --style, of commands that write figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from chela_bench.cli import complete
from chela_bench.cli.choices import Names
from chela_bench.errors import UsageError

if TYPE_CHECKING:
    from chela_bench.reports.figures import Format
    from chela_bench.reports.style import Look


def figure_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a command's figures are written."""
    for option in (
        click.option(
            "--style",
            type=click.Choice(("screen", "paper")),
            default="screen",
            show_default=True,
            help="Of figures; paper: one column wide, no title, fonts embedded.",
        ),
        click.option(
            "--format",
            "formats",
            type=Names(),
            default="png,svg",
            show_default=True,
            help="Files of each figure: png, svg, pdf.",
            shell_complete=complete.formats,
        ),
    ):
        command = option(command)
    return command


def figure_files(
    ctx: click.Context, given: dict[str, Any]
) -> tuple[tuple[Format, ...], Look] | None:
    """How a command with --out writes its figures; None without that."""
    if given["out"] is None:
        said = {ctx.get_parameter_source(name) for name in ("formats", "style")}
        if ParameterSource.COMMANDLINE in said:
            raise UsageError("--format and --style go with --out DIR: figures are files")
        return None
    from chela_bench.cli.derived import formats_of
    from chela_bench.reports.style import LOOKS

    return formats_of(given["formats"]), LOOKS[given["style"]]
