"""Which points: the options that `sweep`, `compare --live` and `noise` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from chela_bench.bench import plan
from chela_bench.bench.cases import Distribution
from chela_bench.bench.load import is_file
from chela_bench.cli import complete
from chela_bench.records import DIRECTIONS, DTYPES, L2, Timer

_F = TypeVar("_F", bound=Callable[..., Any])


class _Names(click.ParamType):  # type: ignore[type-arg]
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


def _many(flag: str, about: str, values: complete.Complete) -> Callable[[_F], _F]:
    return click.option(
        flag, multiple=True, type=_Names(), help=about + " Repeatable.", shell_complete=values
    )


_OPTIONS = (
    click.option("--lens", help="1k..64k (doubling) or 1k,3k,8k; k = 1024."),
    _many("--op", "Ops to measure.", complete.ops),
    _many("--impl", "Implementations, or path/to/file.py:function with one --op.", complete.impls),
    _many("--shape", "Shapes by name, from bench.toml.", complete.shapes),
    _many("--dtype", f"{', '.join(DTYPES)}.", complete.dtypes),
    _many("--direction", f"{', '.join(DIRECTIONS)}.", complete.directions),
    click.option("--set", "sizes", multiple=True, help="Sizes over the shape's: H=16,K=128."),
    click.option(
        "--axis", "axes", multiple=True, help="Sweep a setting: BLOCK_T=32,64. Repeatable."
    ),
    click.option(
        "--preset",
        help="A preset of bench.toml; 'cpu' by itself where there is no GPU.",
        shell_complete=complete.presets,
    ),
    click.option("--timer", type=click.Choice(get_args(Timer)), help="Events or profiler spans."),
    click.option("--l2", type=click.Choice(get_args(L2)), help="Evict the L2 cache, or leave it."),
    click.option("--inputs", type=click.Choice(get_args(Distribution)), help="Timed inputs."),
    click.option(
        "--seed",
        type=click.IntRange(-(1 << 62), 1 << 62),
        help="Seed of inputs and of the order of points.",
    ),
)


def selection_options(command: _F) -> _F:
    """Adds them all, in this order."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def flags_of(given: dict[str, Any]) -> plan.Flags:
    """What the shared options said."""
    axes: dict[str, list[Any]] = {}
    for text in given["axes"]:
        name, values = plan.parse_axis(text)
        axes.setdefault(name, []).extend(values)
    sizes: dict[str, int] = {}
    for text in given["sizes"]:
        sizes |= plan.parse_sizes(text)

    def flat(name: str) -> tuple[str, ...]:
        return tuple(item for group in given[name] for item in group)

    return plan.Flags(
        preset=given["preset"],
        ops=flat("op"),
        impls=flat("impl"),
        shapes=flat("shape"),
        lens=given["lens"],
        dtypes=flat("dtype"),
        directions=flat("direction"),
        axes=axes,
        sizes=sizes,
        timer=given["timer"],
        l2=given["l2"],
        inputs=given["inputs"],
        seed=given["seed"],
        mix_gpus=given.get("mix_gpus", False),
    )
