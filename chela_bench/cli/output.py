"""A run on stdout, as sweep, report and show print it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import click
from rich.console import Console, RenderableType

from chela_bench.bench.paths import make_folder
from chela_bench.bench.store import write_atomically
from chela_bench.errors import EnvironmentProblem
from chela_bench.records import Point, Run, document
from chela_bench.reports.terminal import sweep_table
from chela_bench.reports.text import plain

_FEWEST_COLUMNS = 20


def print_run(
    run: Run, points: Sequence[Point], *, as_json: bool, beside: Sequence[str] = ("HBM traffic",)
) -> None:
    """Tables for a terminal, or the `--json` document."""
    if as_json:
        click.echo(document(run, list(points)))
        return
    echo_rich(sweep_table(run, points, beside=beside))


def echo_rich(renderable: RenderableType) -> None:
    """Through click: rich by itself ends the process where a pipe is closed."""
    console = terminal()
    with console.capture() as captured:
        console.print(renderable)
    click.echo(captured.get(), nl=False)


def terminal() -> Console:
    """Of some width: where it has none, as COLUMNS=0 says, rich prints nothing."""
    console = Console()
    console.width = max(console.width, _FEWEST_COLUMNS)
    return console


def write_files(files: Mapping[Path, bytes]) -> None:
    """Each whole or not at all."""
    for path, data in files.items():
        try:
            make_folder(path.parent)
            write_atomically(path, data)
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot write {path}: {error.strerror}; give another place"
            ) from error


@contextlib.contextmanager
def files_first(*writes: Callable[[], None], exit_code: int = 0) -> Iterator[None]:
    """Then what the block prints, since the terminal may be gone. What cannot be written is said
    last: no result is lost for it, nor the exit code that the result has by itself."""
    problems = []
    for write in writes:
        try:
            write()
        except EnvironmentProblem as error:
            problems.append(str(error))
    yield
    if problems:
        problem = EnvironmentProblem("\n".join(problems))
        problem.exit_code = exit_code or problem.exit_code
        raise problem


def refuse_unwritable(folder: Path) -> None:
    """Before what is to be written takes its time."""
    from chela_bench.profiles.inventory import unwritable

    problem = unwritable(folder)
    if problem is not None:
        raise EnvironmentProblem(f"{problem}; give another place")


def say_progress(line: str) -> None:
    """One line on stderr. A terminal that is gone does not end a measurement."""
    with contextlib.suppress(OSError):
        click.echo(plain(line), err=True)
