"""Options that choose what is measured, and what they said as the plan takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from click.core import ParameterSource

from chela_bench.bench import plan, store
from chela_bench.bench.cases import Distribution
from chela_bench.bench.load import is_file
from chela_bench.cli import complete
from chela_bench.errors import UsageError
from chela_bench.records import DIRECTIONS, DTYPES, L2, OUTCOMES, Outcome, Run, Timer

_F = TypeVar("_F", bound=Callable[..., Any])

lens_option = click.option("--lens", help="1k..64k (doubling) or 1k,3k,8k; k = 1024.")
sizes_option = click.option(
    "--set", "sizes", multiple=True, help="Sizes over the shape's: H=16,K=128."
)
axes_option = click.option(
    "--axis", "axes", multiple=True, help="Sweep a setting: BLOCK_T=32,64. Repeatable."
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(-(1 << 62), 1 << 62),
    help="Seed of inputs and of the order of points.",
)


class Names(click.ParamType):  # type: ignore[type-arg]
    """A comma-separated list of names."""

    name = "NAME[,NAME...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return value
        one_file = ".py:" in value and is_file(Path(value.rpartition(":")[0]))
        names = [value] if one_file else [part.strip() for part in value.split(",")]
        if not all(names):
            self.fail(f"empty name in {value!r}", param, ctx)
        return names


def many(flag: str, about: str, values: complete.Complete) -> Callable[[_F], _F]:
    return click.option(
        flag, multiple=True, type=Names(), help=about + " Repeatable.", shell_complete=values
    )


ops_option = many("--op", "Ops to measure.", complete.ops)
impls_option = many(
    "--impl", "Implementations, or path/to/file.py:function with one --op.", complete.impls
)
shapes_option = many("--shape", "Shapes by name, from bench.toml.", complete.shapes)
dtypes_option = many("--dtype", f"{', '.join(DTYPES)}.", complete.dtypes)
directions_option = many("--direction", f"{', '.join(DIRECTIONS)}.", complete.directions)

_SELECTION = (
    lens_option,
    ops_option,
    impls_option,
    shapes_option,
    dtypes_option,
    directions_option,
    sizes_option,
    axes_option,
    click.option(
        "--preset",
        help="A preset of bench.toml; 'cpu' by itself where there is no GPU.",
        shell_complete=complete.presets,
    ),
    click.option("--timer", type=click.Choice(get_args(Timer)), help="Events or profiler spans."),
    click.option("--l2", type=click.Choice(get_args(L2)), help="Evict the L2 cache, or leave it."),
    click.option("--inputs", type=click.Choice(get_args(Distribution)), help="Timed inputs."),
    seed_option,
)


resume_option = click.option(
    "--resume", type=click.Path(path_type=Path), help="Go on with this run folder."
)


def retry_option(what: str) -> Callable[[_F], _F]:
    return click.option(
        "--retry",
        multiple=True,
        type=click.Choice(OUTCOMES),
        help=f"With --resume: {what} of this outcome again.",
    )


def retried(given: Mapping[str, Any]) -> frozenset[Outcome]:
    """What both said: outcomes to try again, of a run that there is."""
    if given["retry"] and given["resume"] is None:
        raise UsageError("--retry goes with --resume RUN_FOLDER")
    return frozenset(given["retry"])


def said(ctx: click.Context) -> dict[str, str]:
    """What the command line gave: parameters by name, as they are written there."""
    return {
        each.name: each.opts[-1] if isinstance(each, click.Option) else each.human_readable_name
        for each in ctx.command.params
        if each.name and ctx.get_parameter_source(each.name) is ParameterSource.COMMANDLINE
    }


def to_resume(ctx: click.Context) -> tuple[Path, Run] | None:
    """The run to go on with, and its folder, which is where its records go."""
    folder: Path | None = ctx.params["resume"]
    if folder is None:
        return None
    run = store.load_header(folder)
    if "out" in said(ctx):
        raise UsageError("--resume goes on in the run's own folder: no --out")
    return folder, run


def refuse_without_live(ctx: click.Context, *names: str) -> None:
    """Options that records leave nothing to do."""
    for name, flag in said(ctx).items():
        if name in names:
            raise UsageError(f"{flag} goes with --live: records are not measured again")


def selection_options(command: _F) -> _F:
    """Which points: all that `sweep`, `compare --live`, `gate --live` and `noise` share."""
    for option in reversed(_SELECTION):
        command = option(command)
    return command


def flags_of(given: Mapping[str, Any], **changes: Any) -> plan.Flags:
    """What the options above said, as the plan takes it; those a command lacks are not given."""
    axes: dict[str, list[Any]] = {}
    for text in given.get("axes", ()):
        name, values = plan.parse_axis(text)
        axes.setdefault(name, []).extend(values)
    sizes: dict[str, int] = {}
    for text in given.get("sizes", ()):
        found = plan.parse_sizes(text)
        for name in sizes.keys() & found.keys():
            raise UsageError(f"--set gives {name} twice: {sizes[name]} and {found[name]}")
        sizes |= found
    lists = {"op": "ops", "impl": "impls", "shape": "shapes", "dtype": "dtypes",
             "direction": "directions"}  # fmt: skip
    named = {
        field: tuple(item for group in given.get(option, ()) for item in group)
        for option, field in lists.items()
    }
    singles = ("preset", "lens", "timer", "l2", "inputs", "seed", "mix_gpus", "hbm", "energy")
    said = {name: given[name] for name in singles if given.get(name) is not None}
    return plan.Flags(**{**named, "axes": axes, "sizes": sizes, **said, **changes})
