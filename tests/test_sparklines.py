"""What `show` adds to its tables: sparklines over lengths, colours by distance from the floor."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess

import pytest
from rich.console import Console

from chela_bench.reports.groups import groups
from chela_bench.reports.sparklines import BLOCKS, GAP, Scale, distance
from chela_bench.reports.terminal import sweep_table
from tests.factories import (
    LENGTHS,
    all_failed,
    cpu_sweep,
    h100_sweep,
    make_cpu_run,
    make_failure,
    make_point,
    make_run,
    sweeps,
)
from tests.running import ROOT, command, environment, in_this_process

SGR = re.compile(r"\x1b\[([\d;]*)m")


def printed(run, points, *, width=80, colour=None):
    out = io.StringIO()
    console = Console(
        file=out, width=width, color_system=colour, force_terminal=bool(colour), _environ={}
    )
    console.print(sweep_table(run, points))
    return out.getvalue()


def lines_of(points):
    [group] = groups(points)
    scale = Scale.of(group)
    assert scale is not None
    return {s.label: scale.line(s, group.lengths).plain for s in group.series}


def multiples(impl, *values):
    return [
        make_point(T, impl=impl, time_ns=value * 1e6, floor_ns=1_000_000)
        if value
        else make_failure("oom", "CUDA out of memory", T, impl=impl, floor_ns=1_000_000)
        for T, value in zip(LENGTHS, values, strict=False)
    ]


def test_a_block_a_length_on_one_scale_from_the_floor():
    found = lines_of([*multiples("near", 1, 1, 1.2), *multiples("far", 256, 16, None)])
    assert found == {"near": "▁▁▁", "far": f"█▅{GAP}"}


def test_its_height_is_logarithmic_and_each_step_as_high():
    [line] = lines_of(multiples("all", *(1.0001 * 2**i for i in range(7)))).values()
    steps = [BLOCKS.index(block) for block in line]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 7
    assert {steps[i + 1] - steps[i] for i in range(6)} <= {1, 2}


def test_without_a_floor_it_is_the_time_a_token():
    assert lines_of(cpu_sweep()) == {"chunked": "▁▁▁", "recurrent": "███"}
    text = printed(make_cpu_run(), cpu_sweep())
    assert "trend: time a token, ▁ 900 ns to █ 30.0 us" in " ".join(text.split())


@pytest.mark.parametrize("points", [[make_point(floor_ns=5555)], all_failed()])
def test_what_cannot_have_a_trend_has_no_sparkline(points):
    text = printed(make_run(), points)
    assert "trend" not in text and not set(BLOCKS) & set(text)


def test_below_its_column_stands_its_sparkline():
    text = printed(make_run(), multiples("mine", 256, 16, 1))
    last = [line.split() for line in text.splitlines() if line.startswith("trend")]
    assert last == [["trend", "█▅▁"]]
    assert "trend: multiple of the floor, ▁ 1x to █ 256x" in " ".join(text.split())


@pytest.mark.parametrize("width", [40, 60])
@sweeps
def test_a_narrow_terminal_is_kept_in_colour_too(run, points, width):
    text = printed(run, points, width=width, colour="standard")
    assert max(len(SGR.sub("", line)) for line in text.splitlines()) <= width
    assert SGR.sub("", text).count("trend:") == sum(Scale.of(g) is not None for g in groups(points))


@pytest.mark.parametrize(
    ("x_floor", "style"),
    [(1.0, "cyan"), (2.0, "cyan"), (2.1, ""), (5.1, "yellow"), (99.0, "magenta"), (None, "")],
)
def test_a_distance_has_its_colour(x_floor, style):
    assert distance(x_floor) == style


def test_cells_and_blocks_are_coloured_alike():
    text = printed(make_run(), multiples("mine", 99, 1.5), colour="standard")
    magenta, cyan = ("\x1b[35m", "\x1b[36m")
    assert f"{magenta}99.0 ms 99.0x*" in text.replace("\x1b[1;", "\x1b[")
    assert f"{magenta}█" in text and f"{cyan}▁" in text
    assert "to 2x" in text and "beyond" in text
    assert "beyond" not in printed(make_run(), multiples("mine", 99, 1.5))


def test_an_encoding_without_blocks_has_no_sparkline():
    folder = ROOT / "docs" / "results" / "h100-layer"
    done = subprocess.run(
        command("show", folder), env=environment(PYTHONIOENCODING="ascii", COLUMNS="60"),
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "857 us" in text and "trend" not in text


def on_a_terminal(*arguments, **variables):
    """What a process writes to a terminal, and its exit code."""
    ours, theirs = pty.openpty()
    told = environment(TERM="xterm-256color", **variables)
    told = {name: value for name, value in told.items() if name not in ("FORCE_COLOR", "COLUMNS")}
    process = subprocess.Popen(command(*arguments), stdout=theirs, stderr=theirs, env=told)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 65536):
            seen += chunk
    except OSError:  # Linux's way to say that the other side is closed
        pass
    os.close(ours)
    return process.wait(timeout=60), seen.decode()


@pytest.mark.parametrize("no_colour", ["", "1"])
def test_a_terminal_gets_colours_unless_it_wants_none(no_colour):
    folder = ROOT / "docs" / "results" / "h100-layer"
    code, text = on_a_terminal("show", folder, NO_COLOR=no_colour)
    assert code == 0
    colours = {
        n for codes in SGR.findall(text) for n in codes.split(";") if re.fullmatch(r"3\d", n)
    }
    assert bool(colours) is not bool(no_colour)
    assert ("colours:" in text) is not bool(no_colour)


@pytest.mark.parametrize("columns", ["40", "60"])
@pytest.mark.parametrize("name", ["h100", "h100-layer-crossover", "h100-attention/cold"])
def test_a_pipe_gets_plain_text_that_fits(name, columns):
    done = in_this_process("show", ROOT / "docs" / "results" / name, COLUMNS=columns)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout and "colours:" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= int(columns)


def test_a_sweep_without_a_trend_of_its_own_still_names_the_others():
    wall = [make_point(T, impl="recurrent", time_ns=None, wall_ns=T) for T in LENGTHS]
    text = printed(make_run(), [*wall, *h100_sweep()], width=200)
    assert GAP * 7 in text
