"""`chela-bench profile`: kernel by kernel, by Nsight Compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from chela_bench.bench import plan
from chela_bench.bench.config import find_config, load_config
from chela_bench.cli import complete
from chela_bench.cli.captures import capture_sheet, read_capture
from chela_bench.cli.choices import (
    axes_option,
    directions_option,
    dtypes_option,
    flags_of,
    lens_option,
    many,
    said,
    seed_option,
    shapes_option,
    sizes_option,
)
from chela_bench.cli.options import (
    config_option,
    device_option,
    energy_option,
    json_option,
    ncu_report_option,
    out_option,
)
from chela_bench.cli.sweeping import carry_out
from chela_bench.errors import UsageError
from chela_bench.profiles.machine import choose_device

_SHEETS = ("HBM traffic", "Kernels", "Roofline")
_LENS = "4k"  # where bench.toml's would take minutes


@click.command()
@click.argument("op", required=False, shell_complete=complete.ops)
@many("--impl", "Implementations, or path/to/file.py:function.", complete.impls)
@lens_option
@shapes_option
@dtypes_option
@directions_option
@sizes_option
@axes_option
@device_option
@seed_option
@energy_option
@ncu_report_option
@click.option(
    "--from",
    "capture",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Read a capture instead: .ncu-rep, or CSV of `ncu --csv --page raw`. Needs no GPU.",
)
@config_option
@out_option
@json_option
@click.pass_context
def profile(ctx: click.Context, /, op: str | None, capture: Path | None, **given: Any) -> None:
    """Bytes, time, registers, SRAM and occupancy of every kernel of OP's implementations.

    A sweep of OP (4k tokens forward unless told otherwise), each call checked and timed as in one,
    then its kernels counted by Nsight Compute: bytes in one pass, from a cold L2, the rest in a
    second run; where GPM works, its bytes stand beside them. The run folder is a sweep's.

    \b
    Examples:
      chela-bench profile linear_attention --impl triton_chunked,fla_chunk --lens 4k,16k
      chela-bench profile --from capture.csv
    """
    if capture is not None:
        others = [flag for name, flag in said(ctx).items() if name not in ("capture", "as_json")]
        if others:
            raise UsageError(
                "--from reads a capture as it is: leave OP and its options out, here "
                f"{', '.join(others)}"
            )
        found = read_capture(capture)
        if given["as_json"]:
            rows = [
                {"point": point, **kernel.model_dump(mode="json")}
                for point, kernels in found.by_point().items()
                for kernel in kernels
            ]
            click.echo(json.dumps({"capture": str(capture), "torn": found.torn, "points": rows}))
        else:
            click.echo(capture_sheet(found), nl=False)
        return
    if op is None:
        raise UsageError("name an op to profile (chela-bench list), or give a capture with --from")
    given["direction"] = given["direction"] or (["fwd"],)
    given["lens"] = given["lens"] or (None if given["shape"] else _LENS)
    flags = flags_of(given, ops=(op,), hbm="ncu", detail=True)
    device = choose_device(given["device"])
    settings = plan.resolve(load_config(find_config(given["config"])), flags, [device])
    carry_out(
        ctx,
        settings,
        out=given["out"],
        as_json=given["as_json"],
        ncu_report=given["ncu_report"],
        beside=_SHEETS,
    )
