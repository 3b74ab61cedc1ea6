"""bench.toml and flags become settings, settings become cases. No torch, no device."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from chela_bench.bench.cases import Case, Distribution, GpmWay, Limits, Session
from chela_bench.bench.config import LARGEST, Config, Size
from chela_bench.bench.lengths import parse_lengths
from chela_bench.bench.load import is_file, sha256_of_files
from chela_bench.bench.ops import Impl, Op, user_impl
from chela_bench.bench.registry import all_ops, get_op
from chela_bench.errors import EnvironmentProblem, UsageError
from chela_bench.records import (
    DIRECTIONS,
    DTYPES,
    L2,
    ConfigValue,
    Direction,
    DType,
    Timer,
)

HbmWay = Literal["model", "ncu", "gpm", "auto"]

_WHOLE = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True)
class Flags:
    """What the command line said; None or empty where it said nothing."""

    preset: str | None = None
    ops: Sequence[str] = ()
    impls: Sequence[str] = ()
    shapes: Sequence[str] = ()
    lens: str | None = None
    dtypes: Sequence[str] = ()
    directions: Sequence[str] = ()
    axes: Mapping[str, Sequence[ConfigValue]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    timer: Timer | None = None
    l2: L2 | None = None
    inputs: Distribution | None = None
    seed: int | None = None
    mix_gpus: bool = False
    hbm: HbmWay = "model"
    energy: bool = False
    detail: bool = False


class Settings(BaseModel):
    """All that decides which points are measured and how; in run.json, compared on resume."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    devices: list[str] = Field(min_length=1)  # a worker each; "cpu", "cuda" or "cuda:N"
    mix_gpus: bool = False  # GPUs of several models in one run
    preset: str | None
    impls: dict[str, list[str]]  # by op
    user_impls: dict[str, str] = Field(default_factory=dict)  # name -> file:function
    user_files_sha256: dict[str, str] = Field(default_factory=dict)
    shapes: dict[str, dict[str, dict[str, Size]]]  # by op and name; T only in single points
    lens: list[Size]
    lens_replace_T: bool  # noqa: N815  T is the dimension's name
    dtypes: list[DType]
    directions: list[Direction]
    axes: dict[str, list[ConfigValue]] = Field(default_factory=dict)
    timer: Timer
    l2: L2
    inputs: Distribution
    seed: int
    limits: Limits
    hbm: HbmWay = "model"
    energy: bool = False
    detail: bool = False  # more of each kernel than its bytes, in a second run under ncu

    @model_validator(mode="after")
    def _every_op_is_whole(self) -> Settings:
        for name, shapes in self.shapes.items():
            dims = {dim for dim in get_op(name).dims if dim != "T"}
            if name not in self.impls or not all(dims <= set(sizes) for sizes in shapes.values()):
                raise ValueError(f"{name} lacks implementations, or a dimension of a shape")
        return self

    @property
    def device_kind(self) -> str:
        return self.devices[0].partition(":")[0]

    def sessions(self, *, ncu: bool = False) -> list[Session]:
        """One a device. With `ncu`, which counts afterwards, --hbm auto needs no other counter."""
        gpm: GpmWay = "no"
        if self.hbm == "gpm":
            gpm = "or refuse"
        elif self.detail or (self.hbm == "auto" and not ncu):
            gpm = "where it can"
        return [
            Session(
                device=device,
                timer=self.timer,
                l2=self.l2,
                seed=self.seed,
                inputs=self.inputs,
                limits=self.limits,
                user_impls=self.user_impls,
                user_files_sha256=self.user_files_sha256,
                energy=self.energy,
                gpm=gpm,
            )
            for device in self.devices
        ]


def resolve(config: Config, flags: Flags, devices: Sequence[str]) -> Settings:
    """Flags over the preset over [sweep]; preset "cpu" by itself where the device is the CPU."""
    preset_name = flags.preset
    if preset_name is None and devices[0] == "cpu" and "cpu" in config.presets:
        preset_name = "cpu"
    sweep, limits = config.sweep, config.limits
    if preset_name is not None:
        if preset_name not in config.presets:
            raise _unknown("preset", preset_name, config.presets)
        preset = config.presets[preset_name]
        sweep = sweep.model_copy(update=preset.sweep.model_dump(exclude_none=True))
        limits = config.limits_with(preset)
    ops = [get_op(name) for name in unique(flags.ops or sweep.ops)]
    ops, impls, user_impls = _choose_impls(ops, flags)
    shapes = _choose_shapes(config, ops, flags, sweep.shapes)
    chosen = [op for op in ops if op.name in shapes]
    directions = _known("direction", flags.directions or sweep.directions, DIRECTIONS)
    if not flags.impls:
        impls = {op.name: _with_some_of(op, directions) for op in chosen}
    _refuse_counters_of_nothing(flags, devices)
    settings = Settings(
        devices=list(devices),
        mix_gpus=flags.mix_gpus,
        preset=preset_name,
        impls={op.name: impls[op.name] for op in chosen},
        user_impls=user_impls,
        user_files_sha256=sha256_of_files(user_impls),
        shapes=shapes,
        lens=parse_lengths(sweep.lens if flags.lens is None else flags.lens),
        lens_replace_T=flags.lens is not None,
        dtypes=_known("dtype", flags.dtypes or sweep.dtypes, DTYPES),
        directions=directions,
        axes={name: list(values) for name, values in flags.axes.items()},
        timer=flags.timer or sweep.timer,
        l2=flags.l2 or sweep.l2,
        inputs=flags.inputs or sweep.inputs,
        seed=sweep.seed if flags.seed is None else flags.seed,
        limits=limits,
        hbm=flags.hbm,
        energy=flags.energy,
        detail=flags.detail,
    )
    _refuse_unused_axes(settings)
    return settings


def _refuse_counters_of_nothing(flags: Flags, devices: Sequence[str]) -> None:
    """What only a GPU counts, where there is none; ncu's bytes of one model under other cards'."""
    if devices[0] == "cpu":
        way_out = "see chela-bench doctor"
        if flags.detail:
            raise EnvironmentProblem(
                "profile counts on a GPU, and none is in use here; read a capture with --from, or "
                f"{way_out}"
            )
        given = {"--energy": flags.energy, f"--hbm {flags.hbm}": flags.hbm in ("ncu", "gpm")}
        for flag in (flag for flag, on in given.items() if on):
            raise EnvironmentProblem(
                f"{flag} counts on a GPU, and none is in use here; leave it out, or {way_out}"
            )
    if flags.mix_gpus and flags.hbm == "ncu":
        raise UsageError("--hbm ncu counts on one card, for GPUs of one model; without --mix-gpus")


def cases(settings: Settings) -> list[Case]:
    """Every point of the settings, each once."""
    found: dict[str, Case] = {}
    for op_name, shapes in settings.shapes.items():
        op = get_op(op_name)
        directions = _directions(op, settings)
        for name, sizes in shapes.items():
            del name
            for tokens in _lengths_of(sizes, settings):
                shape = {dim: tokens if dim == "T" else sizes[dim] for dim in op.dims}
                for impl_name, dtype, direction in itertools.product(
                    settings.impls[op_name], settings.dtypes, directions
                ):
                    impl = find_impl(settings, op, impl_name)
                    for config in _configs(op, impl, settings.axes):
                        case = Case(
                            op=op_name,
                            impl=impl_name,
                            direction=direction,
                            dtype=dtype,
                            shape=shape,
                            config=config,
                        )
                        found[case.key] = case
    return list(found.values())


def _directions(op: Op, settings: Settings) -> list[Direction]:
    """Those asked for that an implementation of the op has, or all asked for: an op that is only
    ever run forward has no empty figure of its gradients."""
    impls = [*op.impls, *(find_impl(settings, op, name) for name in settings.impls[op.name])]
    known = {direction for impl in impls for direction in impl.directions}
    return [direction for direction in settings.directions if direction in known] or list(
        settings.directions
    )


def _with_some_of(op: Op, directions: Sequence[Direction]) -> list[str]:
    """Implementations that have one of the directions, or all if none has: unless it is asked for
    by name, one that only steps is no row of a forward's table."""
    some = [impl.name for impl in op.impls if not set(directions).isdisjoint(impl.directions)]
    return some or [impl.name for impl in op.impls]


def find_impl(settings: Settings, op: Op, name: str) -> Impl:
    if name in settings.user_impls:
        return user_impl(name, settings.user_impls[name])
    return op.impl(name)


def unavailable(settings: Settings, case: Case) -> str | None:
    """Why the case cannot run here, known without trying, or None."""
    impl = find_impl(settings, get_op(case.op), case.impl)
    return impl.unavailable(
        settings.device_kind,
        dtype=case.dtype,
        direction=case.direction,
        tokens=case.shape["T"],
    )


def planned(settings: Settings) -> list[tuple[Case, str | None]]:
    """Its cases, and why one cannot run here."""
    return [(case, unavailable(settings, case)) for case in cases(settings)]


def planned_here(settings: Mapping[str, Any], *, every_impl: bool) -> list[tuple[Case, str | None]]:
    """As `planned`, of settings that another revision has made: of its implementations those that
    there are here, or all of its ops'."""
    ops = {op.name: op for op in all_ops() if op.name in settings["impls"]}
    impls = {
        name: _with_some_of(op, settings["directions"])
        if every_impl
        else [
            impl for impl in settings["impls"][name]
            if impl in settings["user_impls"] or any(impl == known.name for known in op.impls)
        ]
        for name, op in ops.items()
    }  # fmt: skip
    shapes = {name: shapes for name, shapes in settings["shapes"].items() if name in ops}
    return planned(Settings.model_validate({**settings, "impls": impls, "shapes": shapes}))


def runnable(settings: Settings) -> list[Case]:
    """Those of its cases that are available."""
    return [case for case, why_not in planned(settings) if why_not is None]


def parse_axis(text: str) -> tuple[str, list[ConfigValue]]:
    """`BLOCK_T=32,64,128`; values are whole numbers where they look like one, else words."""
    name, equals, values = _utf8("--axis", text).partition("=")
    parts = [part.strip() for part in values.split(",")]
    if not equals or not name.strip().isidentifier() or not all(parts):
        raise UsageError(f"--axis takes NAME=VALUE,VALUE,..., as in BLOCK_T=32,64; got {text!r}")
    return name.strip(), unique([int(p) if _WHOLE.fullmatch(p) else p for p in parts])


def parse_sizes(text: str) -> dict[str, int]:
    """`H=16,K=128`."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        whole = int(size) if _WHOLE.fullmatch(size) else 0
        if not equals or not name or not 1 <= whole <= LARGEST:
            raise UsageError(
                f"--set takes DIM=SIZE,DIM=SIZE, as in H=16,K=128, sizes up to 2^30; got {text!r}"
            )
        if name in sizes:
            raise UsageError(f"--set gives {name} twice: {sizes[name]} and {whole}")
        sizes[name] = whole
    return sizes


def _choose_impls(
    ops: list[Op], flags: Flags
) -> tuple[list[Op], dict[str, list[str]], dict[str, str]]:
    """The ops left, their implementations by name, and the user's functions by name."""
    files = [name for name in flags.impls if ".py:" in name or name.endswith(".py")]
    names = unique([name for name in flags.impls if name not in files])
    if not flags.impls:
        return ops, {op.name: [impl.name for impl in op.impls] for op in ops}, {}
    for name in names:
        if not any(impl.name == name for op in ops for impl in op.impls):
            available = {impl.name: None for op in ops for impl in op.impls}
            raise _unknown("implementation", name, available, "or path/to/file.py:function")
    impls = {op.name: [impl.name for impl in op.impls if impl.name in names] for op in ops}
    kept = [op for op in ops if impls[op.name]] if names else ops
    user_impls = _user_impls(files)
    if user_impls:
        if len(kept) != 1:
            raise UsageError(
                f"{files[0]} implements one op; say which with --op "
                f"({', '.join(op.name for op in ops)})"
            )
        impls[kept[0].name] += list(user_impls)
    if flags.ops and len(kept) < len(ops):
        left_out = [op.name for op in ops if op not in kept]
        raise UsageError(f"no implementation of {', '.join(left_out)} among {', '.join(names)}")
    return kept, impls, user_impls


def _user_impls(texts: Sequence[str]) -> dict[str, str]:
    """Targets by name: `file.py:function`, with as many folders in front as tell files apart."""
    targets = unique(user_target(text) for text in texts)
    names: dict[str, str] = {}
    for target in targets:
        path, _, function = target.rpartition(":")
        parts = Path(path).parts
        for count in range(1, len(parts) + 1):
            name = f"{'/'.join(parts[-count:])}:{function}"
            if sum(other.endswith(f"/{name}") for other in targets) <= 1:
                break
        names[name] = target
    return names


def user_target(text: str) -> str:
    """`/whole/path/file.py:function` of what a user wrote."""
    file, colon, function = text.rpartition(":")
    path = Path(file if colon else text)
    if not colon or not function.isidentifier():
        raise UsageError(f"--impl {text!r}: name the function too, as in {path}:function")
    if not is_file(path):
        raise UsageError(f"--impl {text!r}: no such file {path}")
    return _utf8("--impl", f"{path.resolve()}:{function}")


def _utf8(flag: str, text: str) -> str:
    """Records are UTF-8: other bytes, which the shell passes on, cannot stand in them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{flag} {text!r}: not valid UTF-8; give it another name") from None
    return text


def _choose_shapes(
    config: Config, ops: list[Op], flags: Flags, default: Sequence[str]
) -> dict[str, dict[str, dict[str, int]]]:
    names = unique(flags.shapes or default)
    chosen: dict[str, dict[str, dict[str, int]]] = {}
    for op in ops:
        table = config.shapes.get(op.name, {})
        found = {name: dict(table[name]) for name in names if name in table}
        if found:
            chosen[op.name] = found
        elif flags.ops or not any(name in t for t in config.shapes.values() for name in names):
            raise UsageError(
                f"no shape {', '.join(map(repr, names))} for {op.name} in bench.toml; "
                f"it has: {', '.join(table) or 'none'}"
            )
    known = unique(name for op in ops for name in config.shapes.get(op.name, {}))
    for name in flags.shapes:  # a preset's may belong to ops that were not asked for
        if name not in known:
            raise _unknown("shape", name, dict.fromkeys(known), "(see bench.toml)")
    for dim, size in flags.sizes.items():
        users = [op for op in ops if dim in op.dims and op.name in chosen]
        if not users or dim == "T":
            dims = unique(d for op in ops for d in op.dims if d != "T")
            way_out = "lengths are --lens" if dim == "T" else f"there are: {', '.join(dims)}"
            raise UsageError(f"--set {dim}={size}: no such dimension here; {way_out}")
        for op in users:
            for sizes in chosen[op.name].values():
                sizes[dim] = size
    return chosen


def _lengths_of(sizes: Mapping[str, int], settings: Settings) -> list[int]:
    if "T" in sizes and not settings.lens_replace_T:
        return [sizes["T"]]
    return settings.lens


def _configs(
    op: Op, impl: Impl, axes: Mapping[str, Sequence[ConfigValue]]
) -> Iterator[dict[str, ConfigValue]]:
    """The product of the axes that this implementation takes; other options at their default."""
    taken = {name: axes[name] for name in axes if _takes(op, impl, name)}
    options = {name: values[:1] for name, values in op.options.items() if name not in taken}
    every: dict[str, Sequence[Any]] = {**options, **taken}
    for values in itertools.product(*every.values()):
        yield dict(zip(every, values, strict=True))


def _takes(op: Op, impl: Impl, axis: str) -> bool:
    return axis in op.options or impl.axes is None or axis in impl.axes


def _refuse_unused_axes(settings: Settings) -> None:
    pairs = [
        (get_op(op), find_impl(settings, get_op(op), name))
        for op, names in settings.impls.items()
        for name in names
    ]
    for axis, values in settings.axes.items():
        if not any(_takes(op, impl, axis) for op, impl in pairs):
            known = unique(name for op, impl in pairs for name in (*op.options, *(impl.axes or ())))
            raise UsageError(
                f"--axis {axis}: nothing selected has such an axis; there are: "
                f"{', '.join(known) or 'none'}"
            )
        for op, _ in pairs:
            for value in values:
                if axis in op.options and value not in op.options[axis]:
                    raise _unknown(axis, str(value), dict.fromkeys(op.options[axis]))


def _known(kind: str, given: Sequence[str], allowed: Sequence[Any]) -> list[Any]:
    for name in given:
        if name not in allowed:
            raise _unknown(kind, name, dict.fromkeys(allowed))
    return unique(given)


def _unknown(kind: str, name: str, known: Mapping[str, object], more: str = "") -> UsageError:
    return UsageError(f"no {kind} {name!r}; there are: {', '.join(known)} {more}".strip())


def unique(items: Any) -> list[Any]:
    return list(dict.fromkeys(items))
