"""`chela-bench list`: what there is to measure, and what of it can run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.registry import all_ops
from chela_bench.cli.lines import say
from chela_bench.cli.options import config_option, device_option, json_option
from chela_bench.profiles.machine import choose_device
from chela_bench.records import shape_label


@click.command("list")
@config_option
@device_option
@json_option
def list_(config: Path | None, device: str, as_json: bool) -> None:
    """Ops, implementations and shapes, and what can run here.

    \b
    Example:  chela-bench list --device cpu
    """
    path = find_config(config)
    shapes = load_config(path).shapes
    kind = choose_device(device).partition(":")[0]
    rows: list[dict[str, Any]] = [
        {
            "op": op.name,
            "summary": op.summary,
            "options": {name: list(values) for name, values in op.options.items()},
            "implementations": [
                {
                    "name": impl.name,
                    "summary": impl.summary,
                    "directions": list(impl.directions),
                    "axes": list(impl.axes or ()),
                    "available": impl.unavailable(kind) is None,
                    "reason": impl.unavailable(kind),
                }
                for impl in op.impls
            ],
            "shapes": shapes.get(op.name, {}),
        }
        for op in all_ops()
    ]
    if as_json:
        click.echo(json.dumps({"device": kind, "config": str(path), "ops": rows}, indent=2))
        return
    say(f"device {kind}, shapes from {path}")
    for row in rows:
        say("")
        say(f"{row['op']}: {row['summary']}")
        for name, values in row["options"].items():
            say(f"option {name}: {', '.join(values)}", indent=2)
        width = max(len(impl["name"]) for impl in row["implementations"])
        for impl in row["implementations"]:
            state = "unavailable: " + impl["reason"] if impl["reason"] else "ok"
            axes = f"; axes {', '.join(impl['axes'])}" if impl["axes"] else ""
            say(f"{impl['name']:<{width}}  {state}", indent=2)
            say(f"{impl['summary']} ({', '.join(impl['directions'])}{axes})", indent=width + 4)
        labels = [f"{name} ({shape_label(sizes)})" for name, sizes in row["shapes"].items()]
        say(f"shapes: {', '.join(labels) or 'none'}", indent=2)
