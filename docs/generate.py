"""Writes what docs/ and README.md take from the code and from records. `make docs`.

records.md, bench-toml.md, cli.md, verdicts.md      from the code
decisions/README.md                                 from the decisions beside it
README.md and index.md, the table of results        from the records (results_table.py)
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import results_table
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from chela_bench import cli, records, verdicts
from chela_bench.bench import baseline, config, noise, store
from chela_bench.bench.cases import Limits
from chela_bench.bench.ops import OPS

HERE = Path(__file__).resolve().parent
SOURCE = "<!-- Written by docs/generate.py from the code: change that and run `make docs`. -->"
WORDS = {
    str: ("string", "strings"),
    int: ("integer", "integers"),
    float: ("number", "numbers"),
    bool: ("boolean", "booleans"),
    object: ("any", "any"),
}
FILES: dict[str, type[BaseModel]] = {
    "run.json": records.Run,
    "points.jsonl": records.Point,
    "samples.jsonl": store.SampleLine,
    "atlas --json, points": records.AtlasRow,
    "atlas --json, refused": records.Refused,
}


def pages() -> dict[str, str]:
    """File name -> text."""
    written = {
        "records.md": records_page(),
        "bench-toml.md": bench_toml_page(),
        "cli.md": cli_page(),
        "verdicts.md": verdicts_page(),
        "decisions/README.md": decisions_page(),
    }
    return {name: "\n\n".join((SOURCE, *parts)) + "\n" for name, parts in written.items()}


def records_page() -> Iterator[str]:
    yield f"# Run records\n\nSchema version {records.SCHEMA_VERSION}."
    yield (
        "A run folder holds `run.json` (one object), `points.jsonl` (one a line, appended as "
        "points end) and `samples.jsonl` (one a line, before its point). `sweep --json`, "
        '`report --json` and `show --json` print `{"run": run.json, "points": [points.jsonl]}`. '
        "Units stand in the names; bytes and nanoseconds are integers. What was not measured is "
        "null. Where a key occurs on several lines, the last one counts."
    )
    for file, model in FILES.items():
        yield f"## {file}\n\n{_about(model)}"
        yield from _record(model)
        for part in _parts(model):
            yield f"### {part.__name__}\n\n{_about(part)}"
            yield from _record(part)


def _record(model: type[BaseModel]) -> Iterator[str]:
    yield _fields(model)
    if model.model_computed_fields:
        yield "Derived from these, written for scripts and recomputed on reading:"
        yield _table(
            ("field", "type", "meaning"),
            (
                (f"`{name}`", kind(field.return_type), _one_line(field.description))
                for name, field in model.model_computed_fields.items()
            ),
        )


def _parts(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The records that stand in its fields, and in theirs, each once."""
    found: dict[type[BaseModel], None] = {}
    for field in model.model_fields.values():
        for part in _models(field.annotation):
            found |= dict.fromkeys([part, *_parts(part)])
    return list(found)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def verdicts_page() -> Iterator[str]:
    yield "# What compare and gate write"
    yield (
        "`compare --json` prints a Comparison, `gate --json` a Gating; `points` is the list of "
        "rows in both. Times are nanoseconds. What is not known is null."
    )
    for model in (verdicts.Comparison, verdicts.Gating):
        yield f"## {model.__name__}\n\n{_about(model)}"
        yield from _record(model)
        for part in _parts(model):
            yield f"### {part.__name__}\n\n{_about(part)}"
            yield from _record(part)
    yield f"## Baselines on disk\n\nSchema version {baseline.SCHEMA_VERSION}."
    for model in (baseline.Header, baseline.Current, baseline.ModelledPoint, noise.NoiseRecord):
        yield f"### {model.__name__}\n\n{_about(model)}"
        yield _fields(model)


def bench_toml_page() -> Iterator[str]:
    shipped = tomllib.loads((HERE.parent / config.FILE).read_text())
    yield "# bench.toml"
    yield (
        "What `chela-bench sweep` measures unless told otherwise. Read from `--config`, else "
        "`./bench.toml`, else the copy that came with the package. Flags win over the preset, the "
        "preset over `[sweep]`. An unknown key or a value of another type is an error."
    )
    yield "## Top level"
    yield _keys(config.Config, {})
    yield f"## [limits]\n\n{_about(Limits)}"
    yield _keys(Limits, {})
    yield f"## [sweep]\n\n{_about(config.Sweep)}"
    yield _keys(config.Sweep, shipped["sweep"])
    yield f"Ops: {', '.join(f'`{op.name}`' for op in OPS)}."
    yield "## [shapes.OP]"
    size = kind(config.Size)
    yield (
        f"A shape's name, and a table of its sizes, each an {size}: "
        "`medium = { B = 1, H = 16, K = 128, V = 128 }`. Lengths come from `lens`; a shape with a "
        "`T` is a single point, and `--lens` replaces its T."
    )
    sizes = ((f"`{op.name}`", _code(dim for dim in op.dims if dim != "T"), "`T`") for op in OPS)
    yield _table(("op", "required", "optional"), sizes)
    yield f"## [presets.NAME.sweep], [presets.NAME.limits]\n\n{_about(config.Preset)}"
    yield (
        "Any keys of `[sweep]` and `[limits]`, each with the same type; what a preset does not "
        f"name stays. In the file that comes with the package: {_code(shipped['presets'])}."
    )
    yield f"## [budgets.OP.SHAPE]\n\n{_about(config.Budget)}"
    yield (
        "The shape is one of `[shapes.OP]`; of one without a T the budget holds at every length. "
        "`gate` fails what is above a budget, and lists a budget whose figure was not measured, "
        "or that no benchmark was held to."
    )
    yield _keys(config.Budget, {})


def cli_page() -> Iterator[str]:
    yield "# Command line"
    group = click.Context(
        cli.cli, info_name="chela-bench", terminal_width=80, **cli.cli.context_settings
    )
    yield _help(cli.cli, group)
    for name in cli.COMMANDS:
        command = cli.cli.get_command(group, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=group, terminal_width=80)
        yield f"## {name}"
        yield _help(command, context)
        if isinstance(command, click.Group):
            for inner_name, inner in command.commands.items():
                yield f"### {name} {inner_name}"
                yield _help(
                    inner,
                    click.Context(inner, info_name=inner_name, parent=context, terminal_width=80),
                )


def decisions_page() -> Iterator[str]:
    yield "# Decisions\n\nWhat was decided, when and why; measured where it could be."
    rows = []
    for path in sorted((HERE / "decisions").glob("0*.md")):
        text = path.read_text()
        title = re.match(r"# \d+\. (.+)", text)
        day = re.search(r"^\d{4}-\d\d-\d\d$", text, re.MULTILINE)
        if title is None or day is None:
            raise ValueError(f"{path}: wanted `# N. Title` and a day on a line of its own")
        rows.append((path.name[:4], f"[{title[1]}]({path.name})", day[0]))
    yield _table(("", "decision", "day"), rows)


def _help(command: click.Command, context: click.Context) -> str:
    return f"```\n{command.get_help(context)}\n```"


def _fields(model: type[BaseModel]) -> str:
    return _table(
        ("field", "type", "meaning"),
        (
            (f"`{name}`", _kind_of(field), _one_line(field.description))
            for name, field in model.model_fields.items()
        ),
    )


def _keys(model: type[BaseModel], shipped: dict[str, Any]) -> str:
    """Keys with their default: the code's, or what the shipped file says for a required one."""
    rows = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        if not field.is_required():
            default = "see below" if _is_table(field) else f"`{json.dumps(field.get_default())}`"
        elif key in shipped:
            default = f"required; shipped: `{json.dumps(shipped[key])}`"
        else:
            default = "required"
        rows.append((f"`{key}`", _kind_of(field), default, _one_line(field.description)))
    return _table(("key", "type", "default", "meaning"), rows)


def _is_table(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict or isinstance(field.get_default(), BaseModel)


def _kind_of(field: FieldInfo) -> str:
    return kind(field.annotation) + _bounds(field.metadata)


def kind(annotation: Any, *, plural: bool = False) -> str:
    """A type in words: `integer ≥ 0 or null`, `list of strings`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        found: list[Any] = []
        for item in arguments[1:]:
            found += item.metadata if isinstance(item, FieldInfo) else [item]
        return kind(arguments[0], plural=plural) + _bounds(found)
    if origin in (Union, UnionType):
        return " or ".join(kind(one, plural=plural) for one in arguments)
    if origin is Literal:
        *first, last = (f"`{json.dumps(value)}`" for value in arguments)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is list:
        return f"list of {kind(arguments[0], plural=True)}"
    if origin is dict:
        return f"map{'s' * plural} of {kind(arguments[1], plural=True)}"
    if annotation is NoneType:
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        name = annotation.__name__
        known = hasattr(records, name) or hasattr(verdicts, name)
        return f"[{name}](#{name.lower()})" if known else "table" + "s" * plural
    return WORDS[annotation][plural]


def _bounds(metadata: Iterable[Any]) -> str:
    text = ""
    for item in metadata:
        if isinstance(item, Gt):
            text += f" > {_number(item.gt)}"
        elif isinstance(item, Ge):
            text += f" ≥ {_number(item.ge)}"
        elif isinstance(item, Le):
            text += f" and ≤ {_number(item.le)}"
        elif isinstance(item, MinLen):
            text += ", at least one"
    return text


def _number(value: Any) -> str:
    """Large powers of two as such."""
    power = abs(value).bit_length() - 1
    return (
        f"{'-' * (value < 0)}2^{power}" if power >= 20 and abs(value) == 1 << power else f"{value}"
    )


def _about(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _one_line(text: str | None) -> str:
    if not text:
        raise ValueError("a field without a docstring: say what it means and when it is null")
    return " ".join(text.split()).replace("|", "\\|")


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text)
    for path, text in results_table.marked().items():
        path.write_text(text)
