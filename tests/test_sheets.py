"""Tables of what was counted, and the roofline: what they say, and where they say nothing."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from chela_bench.records import Ceilings, Hbm
from chela_bench.reports.groups import groups
from chela_bench.reports.html import amount, page
from chela_bench.reports.markdown import summary
from chela_bench.reports.pictures import roofline_picture, sweeps
from chela_bench.reports.roofline import Roof, intensities
from chela_bench.reports.roofline_drawing import draw_roofline
from chela_bench.reports.sheets import sheets
from chela_bench.reports.tables import kernels_frame
from chela_bench.reports.terminal import sweep_table
from tests.factories import (
    HOSTILE,
    h100_sweep,
    make_cpu_run,
    make_point,
    make_run,
    profiled,
    profiled_sweep,
)
from tests.test_figures import FWD, words
from tests.test_html import rows_of, tables, tree


def forward(points, run=None):
    group = next(each for each in groups(points) if each.op == "linear_attention")
    return {sheet.name: sheet for sheet in sheets(run or make_run(), group)}


def row(sheet, *first):
    """The row of a sheet that begins like this, by column."""
    found = [each for each in sheet.rows if each[: len(first)] == first]
    return dict(zip(sheet.header, found[0], strict=True))


def roofline(points):
    """Its figure, of linear attention's forward."""
    picture = roofline_picture(sweeps(make_run(), points)[FWD])
    return draw_roofline(picture)


def test_a_sweep_without_counters_has_no_sheets():
    assert forward(h100_sweep()) == {}
    assert "HBM traffic" not in summary(make_run(), h100_sweep())


def test_traffic_says_measured_modelled_and_floor():
    traffic = forward(profiled_sweep())["HBM traffic"]
    assert row(traffic, "4k", "triton_chunked") == {
        "T": "4k", "implementation": "triton_chunked", "time ms": "0.0376", "launches": "3",
        "read MiB": "49.4", "written MiB": "16.5", "late MiB": "8.24", "both MiB": "65.9",
        "model MiB": "64.0", "x model": "1.03", "floor MiB": "64.0", "x floor": "1.03",
        "SRAM KiB": "136", "source": "ncu", "gpm / ncu": "0.950",
    }  # fmt: skip
    modelled = row(traffic, "4k", "chunked")
    assert modelled["both MiB"] == modelled["x model"] == modelled["SRAM KiB"] == ""
    assert modelled["source"] == "model" and modelled["x floor"] == "3.10"
    assert not [each for each in traffic.rows if each[1] == "recurrent"]  # nothing is known


def test_kernels_say_what_each_takes():
    kernels = forward(profiled_sweep())["Kernels"]
    walk = row(kernels, "4k", "triton_chunked", "_walk_kernel")
    assert walk["launches"] == "2" and walk["SRAM KiB"] == "0 + 136" and walk["registers"] == "196"
    assert walk["occupancy"] == "6 % / 6 %" and walk["limited by"] == "shared memory"
    assert walk["tensor"] == "229 376" and walk["local"] == "12" and walk["L2 hits"] == "29 %"
    moved = float(walk["read MiB"]) + float(walk["written MiB"])
    share = 100 * moved * 2**20 / 21_000 / 3020
    assert walk["of copy"] == f"{share:.0f} %"
    states = row(kernels, "4k", "triton_chunked", "_states_kernel")
    assert states["L2 MiB"] == states["tensor"] == "" and states["occupancy"] == "19 %"
    assert "passes" not in kernels.header  # all took one


def test_more_than_one_pass_is_shown():
    point = profiled(h100_sweep()[0], 1.0)
    more = [kernel.model_copy(update={"passes": 3}) for kernel in point.kernels]
    sheet = forward([point.model_copy(update={"kernels": more})])["Kernels"]
    assert {each[-1] for each in sheet.rows} == {"3"} and sheet.header[-1] == "passes"


def test_the_roofline_is_the_lower_of_both_ceilings():
    roof = Roof(copy_gb_per_s=3000.0, matmul_tflop_per_s=600.0)
    assert roof.ridge == 200.0
    assert (roof.tflop_per_s(100.0), roof.tflop_per_s(200.0), roof.tflop_per_s(1e4)) == (
        300.0, 600.0, 600.0,
    )  # fmt: skip
    assert Roof.of(Ceilings(copy_gb_per_s=3.0), "bf16") is None
    hbm = Hbm(read_bytes=15, write_bytes=5, model_bytes=25, source="ncu")
    point = make_point(flops=1000, compulsory_bytes=10, hbm=hbm)
    assert intensities(point) == (50.0, 40.0, 100.0)
    assert intensities(make_point(flops=1000)) == (None, None, None)


def test_the_roofline_sheet_compares_with_what_the_bytes_allow():
    line = row(forward(profiled_sweep())["Roofline"], "4k", "triton_chunked")
    point = next(p for p in profiled_sweep() if p.impl == "triton_chunked" and p.shape["T"] == 4096)
    top = 3020 * point.flops / point.hbm.measured_bytes / 1e3
    assert float(line["roof TFLOP/s"]) == pytest.approx(top, rel=0.01)
    assert line["of the roof"] == f"{100 * point.tflop_per_s / top:.0f} %"
    assert (line["FLOP/byte measured"], line["modelled"], line["at the floor"]) == (
        "62.1", "64.0", "64.0",
    )  # fmt: skip
    assert line["roof set by"] == "memory"


def test_without_ceilings_there_is_no_roofline():
    run = make_cpu_run()
    assert "Roofline" not in forward(profiled_sweep(), run)
    assert all(roofline_picture(sweep) is None for sweep in sweeps(run, profiled_sweep()).values())


def test_the_roofline_figure_names_series_ceilings_and_what_is_hollow(monkeypatch):
    text = words(roofline(profiled_sweep()), monkeypatch)
    for word in ("matmul 716 TFLOP/s, copy 3020 GB/s", "triton_chunked", "hollow: modelled bytes",
                 "FLOPs per byte of device memory", "TFLOP/s", "bf16"):  # fmt: skip
        assert word in text
    assert "sdpa_flash" not in text  # another function, of other FLOPs
    modelled = words(roofline(h100_sweep()), monkeypatch)
    assert "bytes modelled, none measured" in modelled


def test_the_roofline_draws_measured_where_they_are_and_modelled_beside_them():
    points = [profiled(point, 2.0) for point in h100_sweep() if point.impl == "triton_chunked"]
    axes = roofline(points).axes[0]
    modelled, measured, roof = (line.get_xdata() for line in axes.lines)
    assert list(modelled) == pytest.approx([64.0] * 7) and list(measured) == pytest.approx(
        [32.0] * 7
    )
    tops = axes.lines[2].get_ydata()
    assert roof[1] == pytest.approx(716e3 / 3020) and tops[1] == tops[2] == 716.0
    low, high = axes.get_ylim()
    for line in axes.lines:
        assert all(low <= y <= high for y in line.get_ydata())


def test_markdown_and_page_show_the_same_rows():
    run, points = make_run(), profiled_sweep()
    text = summary(run, points)
    counted = tables(tree(page(run, points, {})), "points counted")
    wanted = list(forward(points).values())
    assert len(counted) == 3
    for table, sheet in zip(counted, wanted, strict=True):
        assert f"### {sheet.name}" in text
        assert rows_of(table) == [list(each) for each in sheet.rows]
        for cells in sheet.rows:
            assert cells[-1] in text


def test_hostile_names_are_made_safe():
    point = profiled(h100_sweep()[0], 1.0)
    kernels = [kernel.model_copy(update={"name": HOSTILE}) for kernel in point.kernels]
    bad = point.model_copy(update={"kernels": kernels})
    assert "<script>" not in summary(make_run(), [bad])
    assert "<script>alert" not in page(make_run(), [bad], {})


@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_terminal_keeps_its_width(width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(sweep_table(make_run(), profiled_sweep(), beside=("HBM traffic", "Kernels")))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "HBM traffic" in text and "Roofline" not in text
    for number in ("49.4", "1.03", "229 376", "_walk_kernel"):
        assert number in text


@pytest.mark.parametrize(
    ("text", "value"),
    [("16k", 16384), ("1M", 1048576), ("12 % / 62 %", 12), ("229 376", 229376), ("0 + 40.0", 0),
     ("1.03", 1.03), ("", None), ("registers", None), ("0.0139 (wall)", 0.0139)],
)  # fmt: skip
def test_cells_sort_by_their_first_number(text, value):
    assert amount(text) == value


def test_kernels_csv_has_a_row_a_kernel():
    frame = kernels_frame(profiled_sweep())
    assert len(frame) == sum(len(point.kernels) for point in profiled_sweep()) > 40
    assert str(frame.read_bytes.dtype) == "Int64" and str(frame.waves.dtype) == "float64"
    assert set(frame.limiters) == {"shared memory"}
    assert kernels_frame(h100_sweep()).empty


def test_energy_is_a_column_where_it_was_measured():
    points = [make_point(energy_j=0.0125), make_point(2048)]
    assert "| mJ |" in summary(make_run(), points) and "12.5" in summary(make_run(), points)
    assert "| mJ |" not in summary(make_run(), h100_sweep())
