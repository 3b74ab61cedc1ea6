"""`chela-bench compare`: two records, or two things measured in turns, point by point."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from chela_bench.bench import comparing, live, plan, sources
from chela_bench.bench.baseline import noise_of
from chela_bench.bench.cases import Case
from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.live import Pair
from chela_bench.bench.plan import Flags, Settings
from chela_bench.bench.registry import all_ops
from chela_bench.cli.options import baselines_option, config_option, device_option
from chela_bench.cli.output import echo_rich, say_progress
from chela_bench.cli.selection import flags_of, selection_options
from chela_bench.cli.signals import interrupted_by_signals
from chela_bench.errors import UsageError
from chela_bench.profiles.machine import choose_device
from chela_bench.records import shape_label
from chela_bench.reports import changes
from chela_bench.verdicts import Comparison, Side, document


@click.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@click.option("--live", "is_live", is_flag=True, help="Measure both now, in turns.")
@click.option(
    "--budget",
    "budget_s",
    type=click.FloatRange(1, 3600),
    default=30.0,
    show_default=True,
    help="With --live: seconds a point, unless it is clear before.",
)
@click.option(
    "--across-machines",
    is_flag=True,
    help="Allow two machines: multiples of each one's own floor are compared.",
)
@selection_options
@device_option
@config_option
@baselines_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Markdown on stdout.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for comparison.md, .json, .png and .svg.",
)
@click.pass_context
def compare(ctx: click.Context, /, **given: Any) -> None:
    """Point by point, is B slower than A? Ratios with 95 % intervals, and a verdict.

    A and B are run folders or JSON files of pytest-benchmark. With --live they are two
    implementations, or two git revisions of this package's checkout (`.` is the tree as it
    stands); which points is said as to `sweep`.

    \b
    Examples:
      chela-bench compare runs/BEFORE runs/AFTER
      chela-bench compare --live triton_chunked fla_chunk --op linear_attention --lens 4k
      chela-bench compare --live main . --op long_conv --shape b8-t4k-d1024
    """
    if given["as_json"] and given["as_markdown"]:
        raise UsageError("--json and --markdown both write to stdout: give one of them")
    flags = flags_of(given)
    if given["is_live"]:
        if given["across_machines"]:
            raise UsageError("--live measures both sides on one machine: no --across-machines")
        with interrupted_by_signals():
            comparison = _live(given, flags)
    else:
        if flags != Flags():
            raise UsageError("records hold their own points; which ones goes with --live")
        a, b = (sources.read(Path(given[side])) for side in ("before", "after"))
        comparison = comparing.compare(
            a,
            b,
            noise_of(given["baselines"], b.machine),
            across_machines=given["across_machines"],
        )
    if given["out"] is not None:
        _write(given["out"], comparison)
    if given["as_json"]:
        click.echo(document(comparison))
    elif given["as_markdown"]:
        click.echo(changes.markdown(comparison), nl=False)
    else:
        echo_rich(changes.terminal(comparison))
    ctx.exit(3 if any(change.wrong for change in comparison.points) else 0)


def _live(given: dict[str, Any], flags: Flags) -> Comparison:
    labels: tuple[str, str] = (given["before"], given["after"])
    config = load_config(find_config(given["config"]))
    device = choose_device(given["device"])
    implementations = all(map(_is_implementation, labels))
    if implementations:
        if flags.impls:
            raise UsageError(f"--live {' '.join(labels)} are the implementations: no --impl")
        settings, pairs = _pairs_of_impls(config, flags, device, labels)
        revisions: tuple[str, str] = (".", ".")
    else:
        settings = plan.resolve(config, flags, [device])
        pairs = [Pair(case.key, case, case) for case in _available(settings)]
        revisions = labels
    if not pairs:
        raise UsageError("nothing of what is selected can run here on both sides")
    with tempfile.TemporaryDirectory(prefix="chela-bench-") as folder:
        with live.checkouts(revisions) as (root_a, root_b):
            session = settings.sessions()[0]
            with live.seats(session, Path(folder), (root_a, root_b)) as (a, b):
                noise = noise_of(given["baselines"], a.machine, live=True)
                rows = live.compare(
                    a,
                    b,
                    pairs,
                    noise,
                    budget_s=given["budget_s"],
                    on_pair=lambda pair: say_progress(pair.name),
                )
                sides = [
                    Side(label=label, machine=str(seat.machine), versions=seat.machine.versions())
                    for label, seat in zip(labels, (a, b), strict=True)
                ]
    return Comparison(
        mode="live",
        before=sides[0],
        after=sides[1],
        noise=noise.typical,
        points=rows,
        notes=[f"noise: {noise.source}"],
    )


def _is_implementation(name: str) -> bool:
    return ".py:" in name or any(name == impl.name for op in all_ops() for impl in op.impls)


def _pairs_of_impls(
    config: Any, flags: Flags, device: str, labels: tuple[str, str]
) -> tuple[Settings, list[Pair]]:
    import dataclasses

    settings = plan.resolve(config, dataclasses.replace(flags, impls=labels), [device])
    names = [_resolved(settings, label) for label in labels]
    sides: list[dict[tuple[str, ...], Case]] = [{}, {}]
    for case in _available(settings):
        point = (case.op, case.direction, case.dtype, shape_label(case.shape))
        for side, name in zip(sides, names, strict=True):
            if case.impl == name:
                config_words = [f"{k}={v}" for k, v in sorted(case.config.items())]
                side[*point, *config_words] = case
    return settings, [
        Pair("/".join(point), case, sides[1][point])
        for point, case in sides[0].items()
        if point in sides[1]
    ]


def _resolved(settings: Settings, label: str) -> str:
    """The name that a user's file has in the plan."""
    for name in settings.user_impls:
        if label.endswith(name) or name.endswith(label):
            return name
    return label


def _available(settings: Settings) -> list[Case]:
    return [case for case in plan.cases(settings) if plan.unavailable(settings, case) is None]


def _write(out: Path, comparison: Comparison) -> None:
    from chela_bench.cli.derived import FORMATS, write_files
    from chela_bench.reports.figures import render

    files = {
        "comparison.md": changes.markdown(comparison).encode(),
        "comparison.json": document(comparison).encode() + b"\n",
    }
    drawn = changes.figure(comparison)
    if drawn is not None:
        files |= {f"comparison.{kind}": render(drawn, kind) for kind in FORMATS}
    write_files(out, files)
