"""HBM bytes by an implementation's own formula: known without running anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from chela_bench.bench.bounds import ITEMSIZE
from chela_bench.bench.cases import Case
from chela_bench.bench.config import Config
from chela_bench.bench.lengths import parse_lengths
from chela_bench.bench.load import load
from chela_bench.bench.ops import Impl, Op
from chela_bench.bench.registry import all_ops, get_op
from chela_bench.errors import ArgumentError, UsageError
from chela_bench.kernels.traffic import Moved, moved
from chela_bench.records import ConfigValue, Hbm


def modelled_bytes(case: Case, op: Op, impl: Impl, l2_bytes: int | None = None) -> Hbm:
    """What the case moves from a cold L2 of this size; no figure where its implementation has no
    formula for this direction."""
    itemsize = ITEMSIZE[case.dtype]
    if case.direction == "decode" and impl.step_hbm_bytes is not None:
        return Hbm(model_bytes=impl.step_hbm_bytes(case.shape, itemsize), source="model")
    launches = modelled_launches(case, impl, l2_bytes)
    if launches is not None:
        return Hbm(model_bytes=sum(size for _, size, _ in launches), source="model")
    if impl.hbm_bytes is None or isinstance(impl.hbm_bytes, str) or case.direction != "fwd":
        return Hbm()
    return Hbm(model_bytes=impl.hbm_bytes(case.shape, itemsize), source="model")


def modelled_launches(case: Case, impl: Impl, l2_bytes: int | None) -> list[Moved] | None:
    """The same by launch, in order; None where the formula is not by launches, or takes no such
    configuration."""
    if not isinstance(impl.hbm_bytes, str) or case.direction != "fwd":
        return None
    try:
        steps = load(impl.hbm_bytes)(case.shape, case.config, itemsize=ITEMSIZE[case.dtype])
    except ArgumentError:
        return None
    return moved(steps, l2_bytes)


def all_modelled(config: Config) -> dict[str, tuple[Case, int]]:
    """Case and bytes by key, of every GPU implementation that has a formula at every shape of
    bench.toml; swept shapes at [sweep]'s lengths."""
    found: dict[str, tuple[Case, int]] = {}
    for case in _cases(config):
        model_bytes = modelled_now(case)
        if model_bytes is not None:
            found[case.key] = (case, model_bytes)
    return found


def modelled_now(case: Case) -> int | None:
    """Bytes by today's formula; None if the implementation is gone, or has none for the case."""
    try:
        op = get_op(case.op)
        return modelled_bytes(case, op, op.impl(case.impl)).model_bytes
    except UsageError:
        return None


def _cases(config: Config) -> Iterator[Case]:
    lengths = parse_lengths(config.sweep.lens)
    for op in all_ops():
        for impl, sizes in _impls_and_shapes(op, config):
            options: dict[str, ConfigValue] = {
                name: values[0] for name, values in op.options.items()
            }
            for tokens in [sizes["T"]] if "T" in sizes else lengths:
                shape = {dim: tokens if dim == "T" else sizes[dim] for dim in op.dims}
                for dtype in config.sweep.dtypes:
                    for direction in impl.directions:
                        yield Case(
                            op=op.name,
                            impl=impl.name,
                            direction=direction,
                            dtype=dtype,
                            shape=shape,
                            config=options,
                        )


def _impls_and_shapes(op: Op, config: Config) -> Iterable[tuple[Impl, dict[str, int]]]:
    impls = [impl for impl in op.impls if "cuda" in impl.devices and _has_formula(impl)]
    return [(impl, sizes) for impl in impls for sizes in config.shapes.get(op.name, {}).values()]


def _has_formula(impl: Impl) -> bool:
    return impl.hbm_bytes is not None or impl.step_hbm_bytes is not None
