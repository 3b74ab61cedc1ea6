"""The command line. One command a file, imported when it is called: --help loads no torch."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import click
from click.shell_completion import CompletionItem

from chela_bench import __version__
from chela_bench.cli.signals import interruption_code
from chela_bench.errors import ChelaBenchError, EnvironmentProblem

COMMANDS = {  # name -> module:attribute, and the line that --help shows without importing it
    "sweep": ("chela_bench.cli.sweep:sweep", "Measure implementations over sequence lengths."),
    "profile": ("chela_bench.cli.profile:profile", "Every kernel's bytes, SRAM and occupancy."),
    "tune": ("chela_bench.cli.tune:tune", "Try block sizes: compiled, checked, timed in turn."),
    "atlas": ("chela_bench.cli.atlas:atlas", "Compile block sizes for GPUs that are not there."),
    "report": ("chela_bench.cli.report:report", "Tables and figures from run folders."),
    "compare": ("chela_bench.cli.compare:compare", "Two runs or two versions, point by point."),
    "gate": ("chela_bench.cli.gate:gate", "Fail what got slower, fatter, wrong or lost."),
    "baseline": ("chela_bench.cli.baseline:baseline", "Records that gate holds against."),
    "noise": ("chela_bench.cli.noise:noise", "How far runs of the same code differ here."),
    "runs": ("chela_bench.cli.runs:runs", "Run folders, newest first."),
    "show": ("chela_bench.cli.show:show", "The tables of a run, writing nothing."),
    "list": ("chela_bench.cli.list:list_", "Ops, implementations and shapes, and what can run."),
    "doctor": ("chela_bench.cli.doctor:doctor", "What stands in the way here, and the remedies."),
    "completion": ("chela_bench.cli.completion:completion", "The completion script of a shell."),
}


_OUTPUT_IS_GONE = (errno.ENOSPC, errno.EPIPE, errno.EIO)  # EIO: the terminal was closed


@contextlib.contextmanager
def _output_lost() -> Iterator[None]:
    """A full disk or closed pipe behind standard output is the machine's problem, in one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OUTPUT_IS_GONE or error.filename is not None:
            raise
        raise EnvironmentProblem(f"cannot write to standard output: {error.strerror}") from error


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS]  # `list` is one of this package's modules

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def make_context(self, *given: Any, **more: Any) -> click.Context:
        with _output_lost():
            return super().make_context(*given, **more)

    def invoke(self, ctx: click.Context) -> Any:
        with _output_lost():
            return super().invoke(ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names and lines without importing the commands."""
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        return [
            *(CompletionItem(name, help=COMMANDS[name][1]) for name in names),
            *click.Command.shell_complete(self, ctx, incomplete),
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="chela-bench")
def cli() -> None:
    """Triton kernels around the CHELA layer, and the bench that measures them.

    \b
    Exit codes: 0 ok, 1 a regression, or a point crashed or timed out, 2 usage, 3 a wrong
    result, 4 no baseline for this machine, 5 unclear, 6 the machine lacks something, 129, 130
    or 143 interrupted.

    \b
    Examples:
      chela-bench sweep --lens 1k,4k
      chela-bench list
    """


def main() -> None:
    """Runs the command line; errors raised on purpose become one line and their exit code."""
    try:
        code = cli.main(prog_name="chela-bench", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort as abort:  # what click makes of a KeyboardInterrupt
        click.echo("interrupted", err=True)
        sys.exit(interruption_code(abort.__cause__))
    except ChelaBenchError as error:
        click.echo(f"chela-bench: {error}", err=True)
        sys.exit(error.exit_code)
