"""`chela-bench baseline`: records to hold against, chosen by somebody and moved by nobody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from chela_bench.bench import baseline as baselines_of
from chela_bench.bench import gating, sources
from chela_bench.bench.baseline import Header
from chela_bench.bench.config import find_config, load_config
from chela_bench.cli.lines import say
from chela_bench.cli.options import baselines_option, config_option, json_option
from chela_bench.reports.text import plain


@click.group()
def baseline() -> None:
    """Keep, list and promote the records that `gate` holds against.

    Baselines are kept by GPU model, driver, torch and Triton. None is promoted by itself.

    \b
    Examples:
      chela-bench baseline save runs/RUN --name 2026-03
      chela-bench baseline promote 2026-02
    """


@baseline.command("save")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--name", help="Its name [default: the time].")
@config_option
@baselines_option
def save(source: Path, name: str | None, config: Path | None, baselines: Path) -> None:
    """Keep a run folder, pytest-benchmark's JSON or `atlas --json` as a baseline.

    With compiled kernels, the HBM bytes that our formulas give at bench.toml's shapes are kept too.

    \b
    Examples:
      chela-bench baseline save runs/RUN --name 2026-03
      chela-bench baseline save atlas.json
    """
    models = {}
    measured = sources.read(source)
    if measured.kind == "static":
        from chela_bench.bench.modelled import all_modelled

        models = all_modelled(load_config(find_config(config)))
    key, name = baselines_of.save(source, baselines, name, models)
    say(f"saved {name} for {key} in {baselines}; it counts once promoted:")
    say(f"chela-bench baseline promote {name} --baselines {baselines}", indent=2)
    unsteady = gating.undecidable(measured)
    if unsteady:
        say(
            f"Its times of these are too unsteady, or too few, to hold to {gating.DEFAULT_LIMIT}, "
            "and will be unclear in a gate; measure again, leave them out, or use gate --live:"
        )
    for benchmark, reason in unsteady.items():
        say(f"{plain(benchmark)}: {plain(reason)}", indent=2)


@baseline.command("list")
@baselines_option
@json_option
def list_(baselines: Path, as_json: bool) -> None:
    """Baselines by machine; `*` marks the promoted one.

    \b
    Example:  chela-bench baseline list
    """
    found = baselines_of.listed(baselines)
    if as_json:
        rows = [
            {
                "machine": one.key,
                "name": one.name,
                "current": one.current,
                "problem": one.problem,
                **({} if one.header is None else _told(one.header)),
            }
            for one in found
        ]
        click.echo(json.dumps({"folder": str(baselines), "baselines": rows}, indent=2))
        return
    if not found:
        say(f"no baselines in {baselines}")
    for key in dict.fromkeys(one.key for one in found):
        say(key)
        for one in (one for one in found if one.key == key):
            what = "" if one.header is None else f"{one.header.kind}, {one.header.saved_utc[:16]}Z"
            say(f"{'*' if one.current else ' '} {plain(one.name)}  {what}", indent=2)
            if one.problem is not None:
                say(plain(one.problem), indent=4)


def _told(header: Header) -> dict[str, Any]:
    """Beside the folder's and the baseline's name: `machine` is the one that --machine takes."""
    found = header.model_dump(exclude={"name"})
    return {"measured_on": found.pop("machine"), **found}


@baseline.command("promote")
@click.argument("name")
@click.option("--machine", help="Its machine's folder, if several have one of this name.")
@baselines_option
def promote(name: str, machine: str | None, baselines: Path) -> None:
    """Make NAME the baseline that `gate` takes on its machine.

    \b
    Example:  chela-bench baseline promote 2026-02
    """
    key = baselines_of.promote(baselines, name, machine)
    say(f"{name} is the baseline of {key}")
