"""All ops there are: the project's own, and what installed distributions add to them.

A distribution names its additions in the entry point group `chela_bench.impls`. The entry point's
value is an `Op`, or one `Impl` or several for the op that the entry point is named after:

    [project.entry-points."chela_bench.impls"]
    linear_attention = "my_package.bench:IMPLS"
    my_op = "my_package.bench:OP"

The module that holds them is imported wherever something is planned or listed: like ops.py it had
better be data that names its functions. No torch, no device.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import EntryPoint

from chela_bench.bench.ops import OPS, Impl, Op
from chela_bench.errors import UsageError

GROUP = "chela_bench.impls"


@functools.cache
def all_ops() -> tuple[Op, ...]:
    """Every op with every implementation. Raises UsageError for a plug-in that cannot be used."""
    ops = {op.name: op for op in OPS}
    additions: list[tuple[EntryPoint, Impl]] = []
    for entry in _entry_points():
        found = _load(entry)
        if isinstance(found, Op):
            _add_op(ops, entry, found)
        else:
            additions += [(entry, impl) for impl in _impls(entry, found)]
    for entry, impl in additions:  # once every op is known, whatever the order of plug-ins
        _add_impl(ops, entry, impl)
    return tuple(ops.values())


def get_op(name: str) -> Op:
    for op in all_ops():
        if op.name == name:
            return op
    raise UsageError(f"no op {name!r}; there are: {', '.join(op.name for op in all_ops())}")


def plugin_versions() -> dict[str, str]:
    """Versions of the distributions that add something, by name."""
    return {
        entry.dist.name: entry.dist.version for entry in _entry_points() if entry.dist is not None
    }


def _entry_points() -> list[EntryPoint]:
    found = importlib.metadata.entry_points(group=GROUP)
    return sorted(found, key=lambda entry: (entry.name, entry.value))


def _load(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except (Exception, SystemExit) as error:
        raise _refusal(entry, f"does not load: {type(error).__name__}: {error}") from error


def _impls(entry: EntryPoint, found: object) -> list[Impl]:
    impls = [found] if isinstance(found, Impl) else found
    if isinstance(impls, Iterable):
        impls = list(impls)
        if impls and all(isinstance(impl, Impl) for impl in impls):
            return impls
    raise _refusal(
        entry, f"holds {type(found).__name__}; wanted an Op, an Impl or a sequence of Impl"
    )


def _add_op(ops: dict[str, Op], entry: EntryPoint, op: Op) -> None:
    if op.name in ops:
        raise _refusal(entry, f"brings an op {op.name!r}, which there is already")
    if not {"B", "T"} <= set(op.dims):
        raise _refusal(entry, f"brings an op {op.name!r} whose dims lack B or T: {op.dims}")
    for name, sizes in op.shapes.items():
        wanted = set(op.dims) - {"T"}
        if not wanted <= set(sizes) <= set(op.dims) or not all(
            isinstance(size, int) and size >= 1 for size in sizes.values()
        ):
            raise _refusal(entry, f"brings a shape {name!r} that is no size for each of {op.dims}")
    ops[op.name] = op


def _add_impl(ops: dict[str, Op], entry: EntryPoint, impl: Impl) -> None:
    op = ops.get(entry.name)
    if op is None:
        raise _refusal(entry, f"is named after no op; there are: {', '.join(ops)}")
    if any(impl.name == known.name for known in op.impls):
        raise _refusal(entry, f"brings {op.name}/{impl.name}, which there is already")
    ops[op.name] = replace(op, impls=(*op.impls, impl))


def _refusal(entry: EntryPoint, problem: str) -> UsageError:
    name = "unknown distribution" if entry.dist is None else entry.dist.name
    return UsageError(
        f"plug-in {name}: the entry point {entry.name} = {entry.value} {problem}; "
        f"mend it, or: pip uninstall {name}"
    )
