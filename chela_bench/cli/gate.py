"""`chela-bench gate`: passes, or says which benchmark got slower, fatter, wrong or lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from chela_bench.bench import again, gating, live, paths, sources
from chela_bench.bench.baseline import HEADER, resolve
from chela_bench.bench.config import Config, find_config, load_config
from chela_bench.bench.gating import Rules
from chela_bench.bench.noise import noise_of
from chela_bench.bench.plan import Flags
from chela_bench.bench.sources import Measured, alike
from chela_bench.bench.store import RUN
from chela_bench.bench.sweep import new_folder
from chela_bench.bench.sweep import sweep as run_sweep
from chela_bench.bench.verdict import Evidence, Limit, parse_limit
from chela_bench.cli.choices import flags_of, refuse_without_live, said, selection_options
from chela_bench.cli.options import (
    baselines_option,
    budget_option,
    config_option,
    device_option,
    json_option,
    out_option,
)
from chela_bench.cli.output import echo_rich, files_first, say_progress, write_files
from chela_bench.cli.progress import SweepProgress
from chela_bench.cli.signals import interrupted_by_signals
from chela_bench.cli.turns import two_sides
from chela_bench.errors import BaselineProblem, EnvironmentProblem, UsageError
from chela_bench.profiles.machine import choose_device
from chela_bench.reports import gating as report
from chela_bench.verdicts import Check, Gating, document


@click.command()
@click.argument("candidate", required=False, type=click.Path(path_type=Path))
@click.option(
    "--baseline",
    "baseline_path",
    type=click.Path(path_type=Path),
    help="A folder of baselines, a baseline, a run folder or a JSON file.",
)
@click.option(
    "--live",
    "live_against",
    metavar="REVISION",
    help="Instead of a baseline: measure this git revision and the tree as it stands, in turns.",
)
@budget_option
@selection_options
@click.option(
    "--limit",
    default=str(gating.DEFAULT_LIMIT),
    show_default=True,
    help="Change of time that is allowed: both must be exceeded to fail.",
)
@click.option(
    "--rounds",
    type=click.IntRange(0, 20),
    default=2,
    show_default=True,
    help="How often unclear points are measured again; not with --live.",
)
@device_option
@config_option
@out_option
@baselines_option
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML here.")
@click.option(
    "--summary",
    type=click.Path(path_type=Path),
    help="Append Markdown here [default: $GITHUB_STEP_SUMMARY, if set].",
)
@json_option
@click.pass_context
def gate(ctx: click.Context, /, **given: Any) -> None:
    """Hold a run against a baseline. Without CANDIDATE the baseline's points are measured now.

    CANDIDATE is a run folder, pytest-benchmark's JSON, or `atlas --json`, for which no GPU is
    needed. Times may grow by --limit; exact figures (SRAM, registers, spills, launches, peak
    memory) not at all; a benchmark that is missing fails.

    \b
    Exit codes: 0 passed, 1 a regression, 3 a wrong result, 4 no baseline for this machine,
    5 unclear after measuring again, or nothing that could be checked.

    \b
    Examples:
      chela-bench gate --baseline baselines
      chela-bench gate now.json --baseline baselines --limit 5%,2us --junit gate.xml
      chela-bench gate --live origin/main --op long_conv --impl triton
    """
    limit = parse_limit(given["limit"])
    flags = flags_of(given)
    if (given["baseline_path"] is None) == (given["live_against"] is None):
        raise UsageError("hold against what? Give --baseline PATH or --live REVISION, one of them")
    if given["live_against"] is not None:
        if given["candidate"] is not None:
            raise UsageError("--live measures the tree as it stands: no CANDIDATE")
        if given["live_against"] == ".":
            raise UsageError(
                "--live . would hold the tree as it stands against itself; give a git revision"
            )
        if "rounds" in said(ctx):
            raise UsageError("--rounds goes with --baseline: --live goes on until --budget ends")
        with interrupted_by_signals():
            result = _in_turns(given, flags, limit)
    elif flags != Flags():
        raise UsageError("a baseline holds its own points; which ones goes with --live")
    else:
        refuse_without_live(ctx, "budget_s")
        noise_in = given["baselines"] if "baselines" in said(ctx) else None
        result = _against_baseline(given, limit, noise_in)
    files = _files(result, given["junit"], given["summary"])
    with files_first(*files, exit_code=result.exit_code):
        if given["as_json"]:
            click.echo(document(result))
        else:
            echo_rich(report.terminal(result))
    ctx.exit(result.exit_code)


def _in_turns(given: dict[str, Any], flags: Flags, limit: Limit) -> Gating:
    """Times only; there is no noise between days in them, and nothing stored to go stale."""
    config = load_config(find_config(given["config"]))
    with two_sides(given, flags, (given["live_against"], ".")) as sides:
        rules = Rules(limit, sides.noise)

        def threshold(evidence: Evidence) -> float:
            return limit.threshold(evidence.before_ns, sides.noise.typical)

        taken = live.in_turns(
            sides.before,
            sides.after,
            sides.pairs,
            live.clear_of(threshold, max(1, len(sides.timed))),
            budget_s=given["budget_s"],
            on_pair=lambda pair: say_progress(pair.name),
        )
        machine = sides.after.machine
    return Gating(
        baseline=given["live_against"],
        candidate="the tree as it stands",
        machine=str(machine),
        limit=str(limit),
        noise=sides.noise.typical,
        noise_source=sides.noise.source,
        points=gating.worst_first(
            [
                *gating.live_checks([pair.name for pair in sides.pairs], taken, rules),
                *gating.live_budgets(sides.pairs, taken, config, machine),
                *map(gating.gone, sides.gone),
            ]
        ),
        notes=sides.notes,
    )


def _against_baseline(given: dict[str, Any], limit: Limit, noise_in: Path | None) -> Gating:
    """`noise_in`: the folder of baselines that the command line says holds the noise."""
    config = load_config(find_config(given["config"]))
    path: Path = given["baseline_path"]
    if given["candidate"] is None:
        with interrupted_by_signals():
            baseline, candidate = _measured_now(given, path)
    else:
        candidate = sources.read(given["candidate"])
        baseline = resolve(path, candidate.machine)
    one = any(paths.exists(path / name, BaselineProblem) for name in (HEADER, RUN))
    is_folder = not one and paths.is_dir(path, BaselineProblem)
    noise = noise_of(noise_in or (path if is_folder else given["baselines"]), candidate.machine)
    baseline, candidate = alike(baseline, candidate)
    same_card = not {m.uuid for m in baseline.machines}.isdisjoint(
        m.uuid for m in candidate.machines
    )
    rules = Rules(limit, noise, same_card=same_card)
    with interrupted_by_signals():
        checks, notes = _settled(baseline, candidate, rules, config, given)
    if all(check.outcome == "unchecked" for check in checks):
        raise BaselineProblem(
            f"the baseline {baseline.label} has no figure to hold {candidate.label} against: save "
            "one of a run that measured, or of an atlas that compiled"
        )
    if not same_card:
        notes.append("the baseline is of another card of this model")
    idle = gating.idle_budgets(candidate, config)
    if idle:
        notes.append(f"no benchmark here is held to the budgets {', '.join(idle)}")
    return Gating(
        baseline=baseline.label,
        candidate=candidate.label,
        machine=str(candidate.machine),
        limit=str(limit),
        noise=noise.typical,
        noise_source=noise.source,
        points=checks,
        notes=notes,
    )


def _measured_now(given: dict[str, Any], path: Path) -> tuple[Measured, Measured]:
    """The baseline of this machine, and its points as they are today, in a run folder."""
    device = choose_device(given["device"])
    baseline = resolve(path, again.here(device))
    if baseline.kind != "run":
        raise UsageError(
            f"the baseline {baseline.label} is pytest-benchmark's JSON: give today's as CANDIDATE"
        )
    settings, _ = again.settings_of(baseline, device)
    folder = new_folder(given["out"])
    with SweepProgress() as progress:
        run_sweep(settings, folder, progress)
    return baseline, sources.read(folder)


def _settled(
    baseline: Measured,
    candidate: Measured,
    rules: Rules,
    config: Config,
    given: dict[str, Any],
) -> tuple[list[Check], list[str]]:
    """Checks, with unclear times measured again as often as allowed; and what stood in the way."""
    checks = gating.gate(baseline, candidate, rules, config)
    names = gating.unclear_times(checks)
    if not names or not given["rounds"] or candidate.kind == "static":
        return checks, []
    try:
        device = choose_device(given["device"])
        session = again.session_of(candidate, device, config.limits)
        for _ in range(given["rounds"]):
            candidate = again.again(candidate, names, session, heard=say_progress)
            checks = gating.gate(baseline, candidate, rules, config)
            names = gating.unclear_times(checks)
            if not names:
                break
    except (EnvironmentProblem, UsageError) as error:
        return checks, [f"unclear times were not measured again: {error}"]
    return checks, []


def _files(
    result: Gating, junit: Path | None, summary: Path | None
) -> Iterator[Callable[[], None]]:
    in_job = os.environ.get("GITHUB_STEP_SUMMARY")
    summary = summary or (Path(in_job) if in_job else None)
    if junit is not None:
        yield lambda: write_files({junit: report.junit(result).encode()})
    if summary is not None:
        yield lambda: _append(summary, report.markdown(result))


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(text)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write {path}: {error.strerror}; give another place"
        ) from error
