"""Values that a shell completes: names of ops, implementations, shapes and the like. No torch.

Where bench.toml or a plug-in does not load, its names are left out: a shell has no place for a
message. What the names come from is imported when a shell asks, so that commands which need none
of it start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from chela_bench.errors import ChelaBenchError

if TYPE_CHECKING:
    from chela_bench.bench.config import Config
    from chela_bench.bench.ops import Op

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def ops(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _listed((op.name for op in _all_ops()), incomplete)


def impls(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Of the ops given so far; files for a user's own function."""
    found = _listed((impl.name for op in _ops(ctx) for impl in op.impls), incomplete)
    return found or [CompletionItem(incomplete, type="file")]


def shapes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    config = _config(ctx)
    if config is None:
        return []
    return _listed(
        (name for op in _ops(ctx) for name in config.shapes.get(op.name, ())), incomplete
    )


def dtypes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from chela_bench.records import DTYPES

    return _listed(DTYPES, incomplete)


def directions(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from chela_bench.records import DIRECTIONS

    return _listed(DIRECTIONS, incomplete)


def presets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    config = _config(ctx)
    return _starting(() if config is None else config.presets, incomplete)


def devices(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from chela_bench.profiles import nvml

    gpus = nvml.gpu_count()
    numbered = [f"cuda:{index}" for index in range(gpus)] if gpus > 1 else []
    return _starting(["auto", "cpu", "cuda", *numbered], incomplete)


def archs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from chela_bench.profiles.occupancy import ARCHS

    return _listed(ARCHS, incomplete)


def formats(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from typing import get_args

    from chela_bench.reports.figures import Format

    return _listed(get_args(Format), incomplete)


def _listed(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """The last of a comma-separated list, with what stands before it; none twice."""
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    left = [name for name in names if name not in given]
    return [CompletionItem(before + comma + item.value) for item in _starting(left, last)]


def _starting(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in dict.fromkeys(names) if name.startswith(incomplete)]


def _ops(ctx: click.Context) -> list[Op]:
    """Those given with --op, or as the argument that `profile` takes; else all."""
    said = ctx.params.get("op") or ()
    given = [said] if isinstance(said, str) else [name for names in said for name in names]
    return [op for op in _all_ops() if not given or op.name in given]


def _config(ctx: click.Context) -> Config | None:
    from chela_bench.bench.config import find_config, load_config

    with contextlib.suppress(ChelaBenchError):
        return load_config(find_config(ctx.params.get("config")))
    return None


def _all_ops() -> tuple[Op, ...]:
    """None where a plug-in cannot be used."""
    from chela_bench.bench.registry import all_ops

    with contextlib.suppress(ChelaBenchError):
        return all_ops()
    return ()
