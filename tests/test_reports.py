"""Reports on synthetic runs: every number whole, every failure named, nothing overlapping."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from itertools import pairwise

import pandas as pd
import pytest
from rich.console import Console

from chela_bench.records import Hbm, Point, Quantiles, Run, Static, Telemetry
from chela_bench.reports.fit import fitted_slope
from chela_bench.reports.groups import drawn_beside, drawn_with, failures, groups
from chela_bench.reports.markdown import summary
from chela_bench.reports.tables import points_frame
from chela_bench.reports.terminal import sweep_table
from chela_bench.reports.text import duration, length, lengths, memory, plain, three_digits
from tests.factories import (
    LENGTHS,
    SWEEPS,
    all_failed,
    block_sizes,
    h100_sweep,
    make_failure,
    make_point,
    make_run,
    sweeps,
)


def printed(run: Run, points: list[Point], width: int = 80) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(sweep_table(run, points))
    return capture.get()


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (1, "1.00 ns"),
        (89_012, "89.0 us"),
        (999_999, "1.00 ms"),
        (1.05e6, "1.05 ms"),
        (2e12, "2000 s"),
    ],
)
def test_a_duration_has_three_digits_and_its_unit(ns: float, text: str) -> None:
    assert duration(ns) == text


def test_memory_counts_in_powers_of_two() -> None:
    assert [memory(b) for b in (0, 512, 2**20, 1.25 * 2**30)] == [
        "0 B", "512 B", "1.00 MiB", "1.25 GiB",
    ]  # fmt: skip


def test_three_digits_never_cuts_the_whole_part() -> None:
    assert [three_digits(v) for v in (0, 0.01234, 9.996, 99.96, 12345.6)] == [
        "0", "0.0123", "10.0", "100", "12346",
    ]  # fmt: skip


def test_lengths_are_written_as_the_flag_reads_them() -> None:
    assert [length(t) for t in (1000, 1024, 1536, 65536, 2**20)] == [
        "1000", "1k", "1536", "64k", "1M",
    ]  # fmt: skip
    assert lengths([1024, 8192, 16384, 32768], LENGTHS) == "1k, 8k..32k"


def test_plain_text_has_no_control_characters() -> None:
    assert plain("a\x1b[31mb\x1b]0;title\x07c\x00\u202e\nd") == "abc d"


# Groups


def test_configurations_split_a_line_only_where_they_share_a_length() -> None:
    (split,) = groups(block_sizes())
    labels = [
        "triton_chunked BLOCK_T=32",
        "triton_chunked BLOCK_T=64",
        "triton_chunked BLOCK_T=128",
    ]
    assert [series.label for series in split.series] == labels
    tuned = [p for p in block_sizes() if (p.shape["T"] < 8192) == (p.config["BLOCK_T"] == 32)]
    tuned = [p for p in tuned if p.config["BLOCK_T"] != 128]
    (one_line,) = groups(tuned)
    assert [series.label for series in one_line.series] == ["triton_chunked"]


def test_of_equal_keys_the_later_point_stands() -> None:
    (group,) = groups([make_failure("timeout", "slow"), make_point(time_ns=5000)])
    assert [point.outcome for point in group.points] == ["ok"]


def test_reasons_that_differ_in_numbers_are_one() -> None:
    reasons = {4096: "estimated 8.5 s > limit 2 s", 8192: "skipped: estimated 17 s > limit 2 s"}
    points = [make_failure("skipped", reason, T) for T, reason in reasons.items()]
    points.append(make_failure("skipped", "no bf16 on H100", 4096, impl="direct"))
    found = {failure.reason: failure.where for failure in failures(*groups(points))}
    assert found == {
        "estimated 8.5 to 17 s > limit 2 s": (("chunked", (4096, 8192)),),
        "no bf16 on H100": (("direct", (4096,)),),
    }


def test_functions_that_differ_are_never_in_one_table() -> None:
    shape = {"B": 8, "T": 1024, "D": 1024}
    points = [
        make_point(op="short_long_conv", impl=impl, shape=shape, config={"order": order})
        for impl in ("fft", "direct")
        for order in ("serial", "parallel")
    ]
    found = groups(points)
    assert [group.slug for group in found] == [
        "short_long_conv-fwd-bf16-B8-D1024-order_parallel",
        "short_long_conv-fwd-bf16-B8-D1024-order_serial",
    ]
    assert [series.label for series in found[0].series] == ["direct", "fft"]


# Slope


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_slope_of_an_exact_power_law(power: float) -> None:
    fit = fitted_slope(LENGTHS, [3e-9 * T**power for T in LENGTHS])
    assert fit is not None
    assert fit == pytest.approx((power, power, power), abs=1e-9)


def test_slope_ignores_the_launch_bound_half() -> None:
    fit = fitted_slope(LENGTHS, [max(T, 8192) * 1e-9 for T in LENGTHS])
    assert fit is not None
    assert fit.slope == pytest.approx(1.0)


def test_slope_interval_is_student_s() -> None:
    # y = 0, 1, 0 at x = 0, 1, 2: slope 0, residual sum of squares 2/3, one degree of freedom.
    fit = fitted_slope([1, 2, 4], [1.0, 2.0, 1.0])
    assert fit is not None
    assert fit.high == pytest.approx(12.706 * math.sqrt(2 / 3 / 2))
    assert fit.low == pytest.approx(-fit.high)


def test_slope_needs_three_lengths() -> None:
    assert fitted_slope([], []) is None
    assert fitted_slope([1024, 2048, 2048], [1.0, 2.0, 2.1]) is None


@pytest.mark.parametrize(("some", "seconds"), [([1, 2], [1.0]), ([1, 2, 3], [1.0, 0.0, 1.0])])
def test_slope_refuses_what_has_no_logarithm(some: list[int], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        fitted_slope(some, seconds)


# Table of points


def test_every_column() -> None:
    point = make_point(
        impl="triton_chunked",
        config={"BLOCK_T": 64, "schedule": "fused", "fast": True},
        time_ns=None,
        reason=None,
        wall_ns=2100,
        host_ns=300,
        launches=2,
        floor_ns=500,
        compulsory_bytes=2**53 + 1,
        flops=2**53 + 3,
        parameters=2**53 + 5,
        peak_bytes=7,
        hbm=Hbm(
            read_bytes=60,
            write_bytes=40,
            late_write_bytes=30,
            gpm_bytes=90,
            model_bytes=80,
            source="ncu",
        ),
        oracle="chunked float64",
        error_rel=0.001,
        error_budget=0.008,
        errors={"o": 0.001},
        static=Static(smem_bytes=1, regs=2, spill_store_bytes=3, spill_load_bytes=4, ctas_per_sm=5),
        telemetry=Telemetry(
            sm_clock_mhz=6,
            mem_clock_mhz=7,
            power_mw=8,
            temperature_c=9,
            sm_clock_min_mhz=5,
            power_max_mw=11,
            temperature_max_c=12,
            memory_bytes=13,
            readings=4,
        ),
        throttle=["power cap", "thermal"],
        energy_j=0.5,
        null_reasons={"energy_j": "not asked for"},
        started_utc="2026-01-02T03:05:00Z",
        spent_s=1.5,
    ).model_copy(update={"time_ns": Quantiles(median=2000, q1=1900, q3=2200, min=1800, n=12)})
    frame = points_frame(make_run(), [point, make_failure("oom", "no memory", 2048)])
    row = frame[frame.impl == "triton_chunked"].iloc[0].dropna().to_dict()
    assert row == {
        "op": "linear_attention", "impl": "triton_chunked", "direction": "fwd", "dtype": "bf16",
        "B": 1, "T": 1024, "H": 16, "K": 128, "V": 128,
        "config_BLOCK_T": 64, "config_fast": True, "config_schedule": "fused",
        "outcome": "ok", "time_median_ns": 2000, "time_q1_ns": 1900, "time_q3_ns": 2200,
        "time_min_ns": 1800, "time_samples": 12, "wall_ns": 2100, "host_ns": 300, "launches": 2,
        "floor_ns": 500, "x_floor": 4.0, "tokens_per_s": 1024 / 2e-6,
        "gb_per_s": point.gb_per_s, "tflop_per_s": point.tflop_per_s,
        "compulsory_bytes": 2**53 + 1, "flops": 2**53 + 3, "peak_bytes": 7,
        "parameters": 2**53 + 5, "hbm_bytes_per_token": point.hbm_bytes_per_token,
        "hbm_model_bytes": 80, "hbm_read_bytes": 60, "hbm_write_bytes": 40, "hbm_source": "ncu",
        "hbm_late_write_bytes": 30, "hbm_gpm_bytes": 90, "hbm_x_floor": point.hbm_x_floor,
        "sm_clock_min_mhz": 5, "power_max_mw": 11, "temperature_max_c": 12, "memory_bytes": 13,
        "hbm_measured_over_model": 1.25, "oracle": "chunked float64", "error_rel": 0.001,
        "error_budget": 0.008, "smem_bytes": 1, "regs": 2, "spill_store_bytes": 3,
        "spill_load_bytes": 4, "ctas_per_sm": 5, "sm_clock_mhz": 6, "mem_clock_mhz": 7,
        "power_mw": 8, "temperature_c": 9, "throttle": "power cap; thermal", "energy_j": 0.5,
        "timer": "event", "l2": "cold", "null_reasons": "energy_j: not asked for",
        "device": "GPU-0", "device_name": "NVIDIA H100 80GB HBM3", "torch": "2.11.0",
        "triton": "3.6.0", "run_id": make_run().run_id, "started_utc": "2026-01-02T03:05:00Z",
        "spent_s": 1.5, "error_rel_o": 0.001,
    }  # fmt: skip
    assert set(frame.columns) - set(row) == {"D", "reason"}
    integers = [c for c in map(str, frame) if re.search(r"_(ns|bytes|mhz|mw)$|^[BTHKVD]$", c)]
    assert {str(frame[column].dtype) for column in integers} == {"Int64"}


def test_frame_does_not_depend_on_the_order_of_points() -> None:
    points = [*h100_sweep("fwdbwd"), *h100_sweep(), *block_sizes()]
    frame = points_frame(make_run(), points)
    pd.testing.assert_frame_equal(frame, points_frame(make_run(), points[::-1]))
    assert list(frame.direction.unique()) == ["fwd", "fwdbwd"]
    assert len(frame) == len(points)


def test_frame_tells_no_throttling_from_not_read() -> None:
    points = [make_point(1024, throttle=[]), make_point(2048)]
    assert points_frame(make_run(), points).throttle.fillna("null").tolist() == ["none", "null"]


def test_frame_of_a_failure_has_no_time() -> None:
    frame = points_frame(make_run(), all_failed())
    timed = [
        c for c in map(str, frame) if c.startswith(("time_", "wall_", "x_floor")) or "per_s" in c
    ]
    assert len(timed) == 11
    assert frame[timed].isna().all().all()


def test_counts_of_sizes_that_no_machine_holds_become_floats():
    points = [make_point(flops=1 << 90), make_failure("oom", "no room", 2048, flops=None)]
    frame = points_frame(make_run(), points)
    assert frame.flops[0] == 2.0**90 and frame.flops.isna()[1]
    assert frame.compulsory_bytes.dtype == "Int64"


def test_frame_of_no_points_keeps_its_columns() -> None:
    empty, full = points_frame(make_run(), []), points_frame(make_run(), [make_point()])
    assert len(empty) == 0
    assert list(empty.columns) == list(full.columns)


# Terminal


@pytest.mark.parametrize("width", [40, 80, 200])
@sweeps
def test_terminal_fits_its_width_and_keeps_every_number_whole(
    run: Run, points: list[Point], width: int
) -> None:
    text = printed(run, points, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert "\x1b" not in text
    for point in points:
        if point.seconds is not None:
            time = re.escape(duration(point.seconds * 1e9))
            multiple = "" if point.x_floor is None else f" +{three_digits(point.x_floor)}x"
            assert re.search(rf"(?<![\d.]){time}{multiple}(?![\d.])", text), point.key


def test_terminal_marks_the_fastest_of_each_row() -> None:
    text = printed(make_run(), h100_sweep(), 200).split("softmax_attention")[0]
    rows = [line for line in text.splitlines() if re.match(r" *\d+k ", line)]
    assert len(rows) == 7
    assert all(re.search(r"\d us [\d.]+x\* ", row) and row.count("*") == 1 for row in rows)


def test_terminal_shows_a_failure_by_its_outcome_alone() -> None:
    text = printed(make_run(), all_failed(), 80)
    rows = [line.split() for line in text.splitlines() if re.match(r" *\d+k ", line)]
    assert [row[3:] for row in rows] == [["oom", "wrong"]] * 7  # skipped ones stand below
    assert "oom: chunked at 1k..64k\n  CUDA out of memory" in text
    assert "21 points: 7 wrong, 7 oom, 7 skipped" in text
    assert "777" not in text
    assert "fastest" not in text


def test_terminal_names_wall_time_as_such() -> None:
    text = printed(make_run(), [make_point(time_ns=None, wall_ns=3_000_000)])
    assert "3.00 ms wall*" in text
    assert "launch to synchronised end" in text


def test_terminal_does_not_compare_wall_with_kernel_time() -> None:
    wall = make_point(impl="recurrent", time_ns=None, wall_ns=1000)
    text = printed(make_run(), [wall, make_point(time_ns=5000)])
    assert "5.00 us*" in text
    assert "1.00 us wall " in text


def test_terminal_says_that_softmax_is_another_function() -> None:
    text = printed(make_run(), h100_sweep(), 200)
    title = next(line for line in text.splitlines() if line.startswith("softmax_attention"))
    assert "another function than linear_attention" in title


def test_terminal_escapes_other_peoples_text() -> None:
    text = printed(*SWEEPS["hostile"], width=200)
    assert "[red]x[/red] | `code`" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)


def test_terminal_counts_what_was_planned() -> None:
    assert "1 point of 9 planned: 1 ok" in printed(make_run(planned_points=9), [make_point()])
    assert "no points: nothing was measured (9 planned)" in printed(make_run(planned_points=9), [])


# Markdown


@sweeps
def test_markdown_tables_are_rectangular(run: Run, points: list[Point]) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", summary(run, points), flags=re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}
        assert len(cells) == 1


def test_markdown_row() -> None:
    text = summary(make_run(), h100_sweep())
    row = next(line for line in text.splitlines() if line.startswith("| 64k | triton_chunked"))
    assert row == (
        "| 64k | triton_chunked | **0.512** | 1.44 | 128M | 256 | 1024 (model) | 182 "
        "| 1.7e-03 / 8.0e-03 |"
    )
    assert "Another function than linear_attention" in text
    assert "| Copy bandwidth | 3020 GB/s |" in text
    assert "chela-bench sweep --lens 1k..64k" in text


def test_markdown_of_a_failure_has_no_number() -> None:
    text = summary(make_run(), all_failed())
    assert "| 1k | quadratic | wrong |  |  |  |  |  |  |" in text
    assert "1k | oom | CUDA out of memory |" in text
    assert "0.75" not in text
    assert "777" not in text


def test_markdown_escapes_other_peoples_text() -> None:
    text = summary(*SWEEPS["hostile"])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert r"\[red\]x\[/red\] \| \`code\`" in text
    assert r"\$a\$" in text
    assert r"\*\*b\*\*" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)


def test_markdown_of_no_points_says_so() -> None:
    assert "no points: nothing was measured" in summary(make_run(), [])


def test_reports_need_no_torch_and_no_pyplot() -> None:
    code = (
        "import sys, chela_bench.reports.figures, chela_bench.reports.terminal, "
        "chela_bench.reports.markdown, chela_bench.reports.tables, chela_bench.reports.html;"
        "sys.exit(bool({'torch', 'triton', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_text_needs_no_pandas_and_no_matplotlib() -> None:
    code = (
        "import sys, chela_bench.reports.terminal, chela_bench.reports.markdown;"
        "import chela_bench.reports.html;"
        "sys.exit(bool({'pandas', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_sweep_of_these_tests_grows() -> None:
    times = [p.seconds for p in h100_sweep() if p.impl == "triton_chunked"]
    assert all(a is not None and b is not None and a < b for a, b in pairwise(times))


def test_what_was_never_tried_has_no_column_but_a_reason() -> None:
    never = [make_failure("skipped", "needs a GPU", impl="untried", T=T) for T in LENGTHS]
    shown = printed(make_run(), [*h100_sweep(), *never], width=200)
    table, _, below = shown.partition("* fastest correct")
    assert "recurrent" in table and "untried" not in table
    assert "untried at 1k..64k" in below and "needs a GPU" in below
    assert "untried" in printed(make_run(), never).partition("skipped: untried")[0]


def test_another_function_is_drawn_beside_one_of_its_sizes() -> None:
    layer = {"B": 1, "T": 1024, "D": 1024, "K": 128, "V": 2048}
    shapes = [("chela_layer", layer), ("chela_layer", {**layer, "D": 512})]
    shapes += [("softmax_layer", {"B": 1, "T": 1024, "D": width}) for width in (512, 1024)]
    found = groups([make_point(op=op, shape=shape) for op, shape in shapes])
    pairs = [(group, drawn_beside(group, found)) for group in found]
    assert [(g.dims["D"], o and o.op, o and o.dims["D"]) for g, o in pairs] == [
        (512, "softmax_layer", 512), (1024, "softmax_layer", 1024), (512, None, None),
        (1024, None, None),
    ]  # fmt: skip
    assert [drawn_with(group, found) for group in found[2:]] == found[:2]


@pytest.mark.parametrize(
    ("outcome", "impls"), [("skipped", ["sdpa_flash"]), ("oom", ["sdpa_flash", "untried"])]
)
def test_what_is_skipped_throughout_is_not_drawn_beside_another(outcome, impls) -> None:
    layer, softmax = {"B": 1, "T": 1024, "D": 64, "K": 32, "V": 128}, {"B": 1, "T": 1024, "D": 64}
    failed = make_failure(outcome, "why", op="softmax_layer", impl="untried", shape=softmax)
    measured = make_point(op="softmax_layer", impl="sdpa_flash", shape=softmax)
    group, own = groups([make_point(op="chela_layer", shape=layer), measured, failed])
    beside = drawn_beside(group, [group, own])
    assert beside is not None and [s.impl for s in beside.series] == impls
    assert [s.impl for s in own.series] == ["sdpa_flash", "untried"]
    group, own = groups([make_point(op="chela_layer", shape=layer), failed])
    assert drawn_beside(group, [group, own]) == own
