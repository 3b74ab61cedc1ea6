"""`chela-bench atlas`: what the compiler says of every block size, with no GPU."""

from __future__ import annotations

import json
import keyword
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chela_bench.bench import atlas as bench
from chela_bench.bench import paths
from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.load import refuse_changed_files
from chela_bench.bench.plan import unique
from chela_bench.cli import complete
from chela_bench.cli.choices import Names, flags_of, many
from chela_bench.cli.figure_options import figure_files, figure_options
from chela_bench.cli.options import Finite, config_option, json_option
from chela_bench.cli.output import echo_rich, files_first, refuse_unwritable, write_files
from chela_bench.cli.progress import CompileProgress
from chela_bench.cli.signals import interrupted_by_signals, interruption_code
from chela_bench.errors import EnvironmentProblem, UsageError
from chela_bench.profiles.occupancy import ARCHS, find_arch

if TYPE_CHECKING:
    from chela_bench.reports.figures import Format
    from chela_bench.reports.style import Look


TABLE, DOCUMENT = "atlas.csv", "atlas.json"


@click.command()
@click.argument("op", required=False, shell_complete=complete.ops)
@many("--impl", "Implementations, or path/to/file.py:function with an OP.", complete.impls)
@click.option(
    "--arch",
    "archs",
    multiple=True,
    type=Names(),
    help=f"Architectures: {', '.join(ARCHS)}. Repeatable.  [default: all but sm_75, 87, 103]",
    shell_complete=complete.archs,
)
@click.option("--axis", "axes", multiple=True, help="A setting: BLOCK_T=32,64. Repeatable.")
@click.option("--lens", help=f"T of the calls; {bench.DEFAULT_LENS} unless said.")
@many("--shape", "Shapes by name, from bench.toml.", complete.shapes)
@many("--dtype", "fp32, bf16, fp16.", complete.dtypes)
@many("--direction", "fwd, fwdbwd, decode.", complete.directions)
@click.option("--set", "sizes", multiple=True, help="Sizes over the shape's: H=16,K=128.")
@click.option("--fits-on", metavar="ARCH", help="List the configurations that run there.")
@click.option(
    "--export-prune",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.py",
    help="Write an early_config_prune for triton.autotune.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for atlas.csv, atlas.json and heat maps.",
)
@figure_options
@click.option("--jobs", type=click.IntRange(1), help="Compilers side by side; all processors.")
@click.option(
    "--limit",
    "limit_s",
    type=Finite(0.1, 86400),
    default=bench.LIMIT_S,
    show_default=True,
    help="Seconds for one kernel's compiler.",
)
@click.option("--no-cache", is_flag=True, help="Compile everything, and keep nothing.")
@config_option
@json_option
@click.pass_context
def atlas(ctx: click.Context, /, **given: Any) -> None:
    """Compile every configuration for every architecture: shared memory, registers, spills.

    No GPU is needed. Each call runs on tensors without memory up to its launches, and what it would
    launch is compiled in a process that may die. Without OP: all ops with Triton kernels.

    \b
    Exits with 1 if a compiler crashed or hung.
    Examples:
      chela-bench atlas
      chela-bench atlas linear_attention --axis BLOCK_T=32,64,128 --axis BLOCK_V=32,64,128
      chela-bench atlas linear_attention --fits-on sm_86
    """
    written = figure_files(ctx, given)
    _refuse_places(given["export_prune"], given["out"])
    archs = _archs(given["archs"], given["fits_on"])
    op = () if given["op"] is None else ((given["op"],),)
    flags = flags_of({**given, "op": op})
    config = load_config(find_config(given["config"]))
    settings = bench.resolve(config, flags)
    refuse_changed_files(settings.user_impls, settings.user_files_sha256)
    options = bench.Options(
        limit_s=given["limit_s"],
        cache=None if given["no_cache"] else bench.cache_folder(),
        **({} if given["jobs"] is None else {"parallel": given["jobs"]}),
    )
    try:
        with interrupted_by_signals(), CompileProgress() as progress:
            found = bench.compile_all(
                bench.cases(settings),
                archs,
                options,
                user_impls=settings.user_impls,
                progress=progress,
            )
    except KeyboardInterrupt as stop:
        click.echo("interrupted; what was compiled is kept for the next time", err=True)
        ctx.exit(interruption_code(stop))
    nothing = not found.rows and bool(found.refused)
    files = [] if nothing else [lambda: _write(found, archs, given, written)]
    exit_code = 0 if all(row.known for row in found.rows) else 1
    with files_first(*files, exit_code=exit_code):
        if given["as_json"]:
            click.echo(_document(found, archs, given["fits_on"]))
        else:
            _print(found, archs, given["fits_on"])
    if nothing:
        raise UsageError(f"nothing was compiled: {found.refused[0].reason}")
    ctx.exit(exit_code)


def _refuse_places(prune: Path | None, out: Path | None) -> None:
    """What cannot be written, or not both; compiling takes minutes."""
    if out is not None:
        refuse_unwritable(out)
    if prune is None:
        return
    if not prune.stem.isidentifier() or keyword.iskeyword(prune.stem):
        raise UsageError(f"--export-prune {prune}: {prune.stem!r} is no name to import a module by")
    file = Path(os.path.realpath(prune))
    if not paths.exists(prune, EnvironmentProblem) or paths.is_file(file):
        refuse_unwritable(file.parent)
    if out is not None:
        folder = Path(os.path.realpath(out))
        own = (folder, *folder.parents, *(folder / name for name in (TABLE, DOCUMENT)))
        if file in own:
            raise UsageError(f"--export-prune {prune} and --out {out} are in each other's place")


def _archs(given: Sequence[Sequence[str]], fits_on: str | None) -> list[str]:
    names = unique(name for group in given for name in group)
    if not names:
        names = list(bench.DEFAULT_ARCHS) if fits_on is None else [fits_on]
    if fits_on is not None and fits_on not in names:
        names.append(fits_on)
    for name in names:
        find_arch(name)
    return names


def _print(found: bench.Found, archs: Sequence[str], fits_on: str | None) -> None:
    from chela_bench.reports.atlas import atlas_table, runs_on_table

    echo_rich(atlas_table(found.rows, found.refused, archs))
    if fits_on is not None:
        echo_rich(runs_on_table(found.rows, fits_on))


def _document(found: bench.Found, archs: Sequence[str], fits_on: str | None) -> str:
    from chela_bench.reports.atlas import not_known_on, runs_on

    document: dict[str, Any] = {
        "triton": found.triton,
        "archs": list(archs),
        "points": [row.model_dump(mode="json") for row in found.rows],
        "refused": [each.model_dump(mode="json") for each in found.refused],
    }
    if fits_on is not None:
        document["fits_on"] = {
            "arch": fits_on,
            "configs": runs_on(found.rows, fits_on),
            "not_known": not_known_on(found.rows, fits_on),
        }
    return json.dumps(document, indent=2)


def _write(
    found: bench.Found,
    archs: Sequence[str],
    given: dict[str, Any],
    written: tuple[Sequence[Format], Look] | None,
) -> None:
    files: dict[Path, bytes] = {}
    target: Path | None = given["export_prune"]
    if target is not None:
        from chela_bench.reports.prune import prune_module

        files[target] = prune_module(found.rows, target.stem).encode()
    if written is not None:
        from chela_bench.reports.atlas import atlas_frame
        from chela_bench.reports.atlas_maps import atlas_maps
        from chela_bench.reports.figures import render
        from chela_bench.reports.heat import draw_heat_map

        out, (kinds, look) = given["out"], written
        files[out / TABLE] = atlas_frame(found.rows).to_csv(index=False).encode()
        files[out / DOCUMENT] = _document(found, archs, given["fits_on"]).encode()
        for name, heat in atlas_maps(found.rows, archs).items():
            figure = draw_heat_map(heat, look)
            for kind in kinds:
                files[out / f"{name}.{kind}"] = render(figure, kind, look)
    write_files(files)
    for path in files:
        click.echo(f"wrote {path}", err=True)
