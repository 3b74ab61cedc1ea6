"""Options that say what is to be planned, and what they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from chela_bench.bench import plan
from chela_bench.bench.load import is_file
from chela_bench.cli import complete

_F = TypeVar("_F", bound=Callable[..., Any])


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


def flags_of(given: Mapping[str, Any]) -> plan.Flags:
    """Of a command's parameters, those that it has."""
    axes: dict[str, list[Any]] = {}
    for text in given.get("axes", ()):
        name, values = plan.parse_axis(text)
        axes.setdefault(name, []).extend(values)
    sizes: dict[str, int] = {}
    for text in given.get("sizes", ()):
        sizes |= plan.parse_sizes(text)

    def flat(name: str) -> tuple[str, ...]:
        return tuple(item for group in given.get(name, ()) for item in group)

    return plan.Flags(
        preset=given.get("preset"),
        ops=flat("op"),
        impls=flat("impl"),
        shapes=flat("shape"),
        lens=given.get("lens"),
        dtypes=flat("dtype"),
        directions=flat("direction"),
        axes=axes,
        sizes=sizes,
        timer=given.get("timer"),
        l2=given.get("l2"),
        inputs=given.get("inputs"),
        seed=given.get("seed"),
        mix_gpus=given.get("mix_gpus", False),
    )
