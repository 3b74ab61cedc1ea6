"""bench.toml, checked: a wrong key or type names file, key, what was expected, what is allowed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from chela_bench.bench.cases import Distribution, Limits, Seconds
from chela_bench.bench.lengths import parse_lengths
from chela_bench.bench.registry import all_ops
from chela_bench.errors import ConfigError, UsageError
from chela_bench.records import L2, Direction, DType, Timer

FILE = "bench.toml"
LARGEST = 1 << 30  # of any dimension
Size = Annotated[int, Field(ge=1, le=LARGEST, strict=True)]
Seed = Annotated[int, Field(ge=-(1 << 62), le=1 << 62, strict=True)]
Some = Field(min_length=1)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0, strict=True)]
ShapeSizes = dict[str, Size]


def _whole_number(value: object) -> object:
    """1.0 and true equal 1 in Python, and are not what a version is written as."""
    if type(value) is not int:
        raise ValueError("input should be a whole number")
    return value


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Sweep(_Table):
    """What is measured when no flag says otherwise."""

    ops: list[str] = Some
    """Ops to measure, with all their implementations."""
    shapes: list[str] = Some
    """Names of shapes; each op takes those that it has."""
    lens: str
    """Lengths T in tokens: `1k..64k` doubles, `1k,3k,8k` lists; k = 1024, m = 1024^2."""
    dtypes: list[DType] = Some
    """Of inputs and outputs."""
    directions: list[Direction] = Some
    """fwd: forward; bwd: backward alone; fwdbwd: both in one call; decode: one token's step."""
    timer: Timer
    """event: between two CUDA events; profiler: the sum of kernel spans."""
    l2: L2
    """cold: the L2 cache is evicted before each sample; warm: left as it is."""
    inputs: Distribution
    """randn: standard normal; mean1: k, v, and the x of convolution and layer, with mean 1."""
    seed: Seed
    """Of the inputs and of the order of points."""


class SweepChanges(_Table):
    """What a preset changes of [sweep]."""

    ops: Annotated[list[str], Some] | None = None
    shapes: Annotated[list[str], Some] | None = None
    lens: str | None = None
    dtypes: Annotated[list[DType], Some] | None = None
    directions: Annotated[list[Direction], Some] | None = None
    timer: Timer | None = None
    l2: L2 | None = None
    inputs: Distribution | None = None
    seed: Seed | None = None


class Preset(_Table):
    """What `--preset NAME` changes."""

    sweep: SweepChanges = SweepChanges()
    """Any keys of [sweep]."""
    limits: dict[Literal["call_s", "sample_s", "build_s", "phase_s"], Seconds] = Field(
        default_factory=dict
    )
    """Any keys of [limits]."""


class Budget(_Table):
    """Limits that no baseline moves; what is not named is not limited."""

    impls: Annotated[list[str], Some] | None = None
    """Implementations that it holds for; all unless given."""
    directions: Annotated[list[Direction], Some] | None = None
    """Directions that it holds for; all unless given."""
    dtypes: Annotated[list[DType], Some] | None = None
    """Dtypes that it holds for; all unless given."""
    max_ms: Positive | None = None
    """Median time, milliseconds."""
    max_x_floor: Positive | None = None
    """Time as a multiple of the floor."""
    max_peak_bytes: Whole | None = None
    """Peak memory of a call beyond its live inputs, bytes."""
    max_hbm_x_model: Positive | None = None
    """Measured HBM bytes as a multiple of the modelled ones."""
    max_spill_bytes: Whole | None = None
    """Registers spilled, stores and loads, bytes a thread; of compiled kernels too, whatever
    their shape and direction."""

    @model_validator(mode="after")
    def _limits_something(self) -> Budget:
        limits = {name for name in type(self).model_fields if name.startswith("max_")}
        if not limits & self.model_fields_set:
            raise ValueError(f"limits nothing; give one of {', '.join(sorted(limits))}")
        return self


class Config(_Table):
    """The whole file."""

    schema_: Annotated[Literal[1], BeforeValidator(_whole_number)] = Field(alias="schema")
    """Version of this schema."""
    limits: Limits = Limits()
    """Where the bench gives up."""
    sweep: Sweep
    """What is measured when no flag says otherwise."""
    shapes: dict[str, dict[str, ShapeSizes]]
    """By op and name: the size of every dimension but T; with a T, a single point."""
    presets: dict[str, Preset] = Field(default_factory=dict)
    """By name; `cpu` is taken by itself where there is no GPU."""
    budgets: dict[str, dict[str, Budget]] = Field(default_factory=dict)
    """By op and shape; `gate` fails what is above one."""

    def limits_with(self, preset: Preset) -> Limits:
        return Limits.model_validate({**self.limits.model_dump(), **preset.limits})


def find_config(given: Path | None) -> Path:
    """`--config`, else ./bench.toml, else the one that came with the package."""
    if given is not None:
        return given
    package = Path(__file__).resolve().parent.parent
    for candidate in (Path(FILE), package / FILE, package.parent / FILE):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"no {FILE} here or beside the package; give one with --config")


def load_config(path: Path) -> Config:
    try:
        data = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, an endless number
        raise ConfigError(f"{path} is not TOML: {error}") from None
    if not data:
        raise ConfigError(f"{path} is empty; it needs [sweep] and [shapes.OP] (see the docs)")
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in _explain(error))) from None
    _check_names(path, config)
    for name, preset in config.presets.items():
        try:
            config.limits_with(preset)
        except ValidationError as error:
            raise ConfigError(
                f"{path}: presets.{name}.limits: {_message(error.errors()[0])}"
            ) from None
    brought = {op.name: op.shapes for op in all_ops() if op.shapes}
    shapes = {
        name: {**brought.get(name, {}), **config.shapes.get(name, {})}
        for name in [*config.shapes, *(name for name in brought if name not in config.shapes)]
    }
    return config.model_copy(update={"shapes": shapes})


def _check_names(path: Path, config: Config) -> None:
    ops = {op.name: op for op in all_ops()}
    for name, shapes in config.shapes.items():
        if name not in ops:
            raise ConfigError(f"{path}: shapes.{name}: no such op; there are: {', '.join(ops)}")
        dims = ops[name].dims
        for shape, sizes in shapes.items():
            wanted = [dim for dim in dims if dim != "T"]
            missing = [dim for dim in wanted if dim not in sizes]
            unknown = [dim for dim in sizes if dim not in dims]
            if missing or unknown:
                problem = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
                raise ConfigError(
                    f"{path}: shapes.{name}.{shape} {problem}; it takes {', '.join(wanted)}, "
                    "and T for a single length"
                )
    for name, budgets in config.budgets.items():
        if name not in ops:
            raise ConfigError(f"{path}: budgets.{name}: no such op; there are: {', '.join(ops)}")
        known_shapes = {**ops[name].shapes, **config.shapes.get(name, {})}
        known_impls = [impl.name for impl in ops[name].impls]
        for shape, budget in budgets.items():
            if shape not in known_shapes:
                raise ConfigError(
                    f"{path}: budgets.{name}.{shape}: no such shape; there are: "
                    f"{', '.join(known_shapes)}"
                )
            for impl in budget.impls or ():
                if impl not in known_impls:
                    raise ConfigError(
                        f"{path}: budgets.{name}.{shape}.impls: no implementation {impl!r}; there "
                        f"are: {', '.join(known_impls)}"
                    )
    sweeps: dict[str, Sweep | SweepChanges] = {"sweep": config.sweep}
    sweeps |= {f"presets.{name}.sweep": preset.sweep for name, preset in config.presets.items()}
    shape_names = {name for shapes in config.shapes.values() for name in shapes}
    shape_names |= {name for op in ops.values() for name in op.shapes}
    for where, sweep in sweeps.items():
        for kind, given, known in (
            ("op", sweep.ops, list(ops)),
            ("shape", sweep.shapes, sorted(shape_names)),
        ):
            for name in given or ():
                if name not in known:
                    raise ConfigError(
                        f"{path}: {where}.{kind}s: no {kind} {name!r}; there are: "
                        f"{', '.join(known)}"
                    )
        if sweep.lens is not None:
            try:
                parse_lengths(sweep.lens)
            except UsageError as error:
                raise ConfigError(f"{path}: {where}.{error}".replace(".--lens", ".lens")) from None


def _explain(error: ValidationError) -> list[str]:
    """One line a problem: key, what was expected, what came."""
    lines = []
    for problem in error.errors():
        location = [part for part in problem["loc"] if part != "[key]"]
        key = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            allowed = ", ".join(_keys_at(Config, location[:-1]))
            lines.append(f"{key}: unknown key; allowed here: {allowed}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: missing")
        else:
            came = repr(problem["input"])
            lines.append(
                f"{key}: {_message(problem)}; got {came if len(came) < 80 else came[:77] + '...'}"
            )
    return lines


def _message(problem: ErrorDetails) -> str:
    text = problem["msg"].removeprefix("Value error, ")
    return text[0].lower() + text[1:]


def _keys_at(model: type[BaseModel], location: list[Any]) -> list[str]:
    """The keys that the table at `location` may have."""
    kind: Any = model
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = _by_key(kind)[str(part)].annotation
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
    return list(_by_key(kind)) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}
