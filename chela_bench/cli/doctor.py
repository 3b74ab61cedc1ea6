"""`chela-bench doctor`: whether the main job can run here, and what would make it better."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from chela_bench.cli.lines import say
from chela_bench.cli.options import config_option, device_option, json_option, out_option
from chela_bench.errors import ChelaBenchError
from chela_bench.profiles.compiling import compiling, examine_compiling
from chela_bench.profiles.doctor import Check, can_run, examine
from chela_bench.profiles.inventory import Peer, collect

_COLOURS = {"ok": None, "warning": "yellow", "problem": "red"}


@click.command()
@device_option
@config_option
@out_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, device: str, config: Path | None, out: Path, as_json: bool) -> None:
    """What this machine has, what stands in the way of a sweep, and the remedies.

    Exits with 6 if `chela-bench sweep` cannot run on the device.

    \b
    Example:  chela-bench doctor
    """
    path, problem = _config(config)
    peers, plugins = _peers(), _plugins()
    facts = collect(device, peers=peers, config=path, config_problem=problem, out=out)
    checks = [*examine(facts), *examine_compiling(compiling()), *plugins]
    runs = can_run(checks)
    if as_json:
        found = {"device": facts.device, "can_run": runs, "checks": [asdict(c) for c in checks]}
        click.echo(json.dumps(found, indent=2))
    else:
        _print(checks)
        say("")
        say(_verdict(facts.device, checks), style={"bold": True})
    ctx.exit(0 if runs else 6)


def _config(given: Path | None) -> tuple[str, str | None]:
    """bench.toml's path, and why it cannot be read."""
    try:
        from chela_bench.bench.config import find_config, load_config

        path = find_config(given)
        if not _plugins():
            load_config(path)
    except ChelaBenchError as error:
        return "", str(error)
    except ModuleNotFoundError as error:
        return "", f"cannot be read: {error.name} is not installed"
    return str(path), None


def _peers() -> tuple[Peer, ...]:
    """Modules that implementations need beyond the core dependencies, each once."""
    try:
        from chela_bench.bench.registry import all_ops

        ops = all_ops()
    except (ModuleNotFoundError, ChelaBenchError):  # named elsewhere
        return ()
    wanting: dict[tuple[str, str], list[str]] = {}
    missing = set()
    for impl in (impl for op in ops for impl in op.impls if impl.requires):
        module = impl.requires or ""
        wanting.setdefault((module, impl.install or ""), []).append(impl.name)
        if impl.missing():
            missing.add(module)
    return tuple(
        Peer(module, tuple(impls), install, module not in missing)
        for (module, install), impls in wanting.items()
    )


def _plugins() -> list[Check]:
    """What other distributions add: nothing to say unless it cannot be used."""
    try:
        from chela_bench.bench.registry import all_ops

        all_ops()
    except ModuleNotFoundError:  # a core dependency, named elsewhere
        return []
    except ChelaBenchError as error:
        found, _, remedy = str(error).rpartition("; ")
        return [Check("plug-ins", "problem", found, remedy)]
    return []


def _print(checks: list[Check]) -> None:
    width = max(len(check.name) for check in checks) + 2
    for check in checks:
        state = "" if check.state == "ok" else f"{check.state}: "
        say(
            f"{check.name:<{width}}{state}{check.found}",
            hang=width,
            style={"fg": _COLOURS[check.state]},
        )
        if check.remedy:
            say(f"-> {check.remedy}", indent=width, hang=3)


def _verdict(device: str, checks: list[Check]) -> str:
    count = {state: sum(c.state == state for c in checks) for state in ("problem", "warning")}
    counted = ", ".join(f"{n} {state}{'s' * (n > 1)}" for state, n in count.items() if n)
    able = "can run" if can_run(checks) else "cannot run"
    return f"chela-bench sweep {able} on {device}" + (f": {counted}" if counted else "")
