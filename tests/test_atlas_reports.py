"""What comes out of an atlas: tables, heat maps, CSV, and what an autotuner is kept from."""

from __future__ import annotations

import importlib.util
import io
import json

import pandas as pd
import pytest
import triton
from matplotlib.colors import to_hex
from rich.console import Console

from chela_bench.bench import atlas
from chela_bench.records import AtlasRow
from chela_bench.reports.atlas import (
    atlas_frame,
    atlas_table,
    not_known_on,
    runs_on,
    runs_on_table,
)
from chela_bench.reports.atlas_maps import atlas_maps
from chela_bench.reports.figures import render
from chela_bench.reports.heat import HeatMap, Panel, draw_heat_map
from chela_bench.reports.prune import prune_module
from chela_bench.reports.style import HEAT, NOTHING
from tests.running import in_this_process


def make_row(**changes):
    fields = {
        "op": "linear_attention", "impl": "triton_chunked", "kernel": "walk", "language": "triton",
        "dtype": "bf16", "config": {"BLOCK_T": 64, "BLOCK_V": 64, "num_warps": 4, "num_stages": 2},
        "constants": {"K": 128}, "asked": [{"BLOCK_T": 64, "BLOCK_V": 64}], "directions": ["fwd"],
        "lens": [4096], "arch": "sm_90", "triton": "3.7.1", "outcome": "ok", "fits": True,
        "smem_bytes": 96 * 1024, "regs": 181, "spill_store_bytes": 0, "spill_load_bytes": 0,
        "stack_bytes": 0, "tmem_columns": 0, "ctas_per_sm": 2, "limiter": "registers",
        "tensor_core": "HGMMA", "instructions": 1000, "compile_ms": 800,
    }  # fmt: skip
    return AtlasRow.model_validate({**fields, **changes})


def grid(arch, misfit=None):
    """3 x 3 configurations of a walk, and a kernel that all of them share."""
    rows, every = [], []
    for t in (32, 64, 128):
        for v in (32, 64, 128):
            asked = {"BLOCK_T": t, "BLOCK_V": v}
            every.append(asked)
            smem = (t * v * 8 + 4096) if arch == "sm_90" else t * v * 6
            config = {**asked, "num_warps": 4, "num_stages": 2}
            row = make_row(arch=arch, config=config, asked=[asked], smem_bytes=smem)
            if (t, v) == misfit:
                row = make_row(
                    arch=arch, config=config, asked=[asked], outcome="out_of_resources",
                    fits=False, reason="needs 128 KB of shared memory, sm_86 has 99 KB a block",
                    smem_bytes=128 * 1024, ctas_per_sm=0, limiter="shared memory",
                )  # fmt: skip
            rows.append(row)
    rows.append(make_row(arch=arch, kernel="scan", config={"BLOCK": 1024}, asked=every))
    return rows


ROWS = [*grid("sm_90"), *grid("sm_86", misfit=(128, 128))]
ARCHS = ["sm_90", "sm_86"]


def drawn(what, width=100):
    console = Console(width=width, file=io.StringIO())
    console.print(what)
    return console.file.getvalue()


def test_the_table_tells_each_kernel_on_each_architecture():
    text = drawn(atlas_table(ROWS, [], ARCHS))
    assert "linear_attention: walk" in text
    assert "needs 128 KB of shared memory, sm_86 has 99 KB a block" in text
    assert "20 kernels compiled: 19 fit, 1 out_of_resources" in text
    assert "too much" in text
    for line in drawn(atlas_table(ROWS, [], ARCHS), width=60).splitlines():
        assert len(line) <= 60


def test_the_table_of_nothing_is_one_line():
    assert "0 kernels compiled" in drawn(atlas_table([], [], ARCHS))


def test_one_kernel_is_one_kernel():
    assert "\n1 kernel compiled: 1 fit" in drawn(atlas_table(ROWS[:1], [], ARCHS))


def test_what_runs_on_a_card_are_the_configurations_whose_every_kernel_fits():
    found = runs_on(ROWS, "sm_86")
    assert len(found) == 8
    assert {"BLOCK_T": 128, "BLOCK_V": 128} not in [each["config"] for each in found]
    assert len(runs_on(ROWS, "sm_90")) == 9
    assert "runs on sm_86: 8 of 9 configurations" in drawn(runs_on_table(ROWS, "sm_86"))


def ended(outcome, t, v, **changes):
    """A row of a compiler that did not get to say whether it fits."""
    asked = {"BLOCK_T": t, "BLOCK_V": v}
    settings = {
        "arch": "sm_86", "config": {**asked, "num_warps": 4, "num_stages": 2}, "asked": [asked],
        "outcome": outcome, "fits": False, "reason": "the compiler took longer than 6 s",
    }  # fmt: skip
    return make_row(**{**settings, **changes})


def test_whether_a_call_runs_is_not_known_where_a_compiler_did_not_say():
    known = [row for row in ROWS if row.config.get("BLOCK_V") != 32]
    rows = [
        *known, ended("timeout", 32, 32), ended("crash", 64, 32), ended("compile_error", 128, 32),
        ended("crash", 128, 128, kernel="scan"),  # whose walk does not fit
    ]  # fmt: skip
    assert len(runs_on(rows, "sm_86")) == 5
    call = {"op": "linear_attention", "impl": "triton_chunked"}
    assert not_known_on(rows, "sm_86") == [
        {**call, "config": {"BLOCK_T": 32, "BLOCK_V": 32}},
        {**call, "config": {"BLOCK_T": 64, "BLOCK_V": 32}},
    ]
    assert not_known_on(rows, "sm_90") == []
    text = drawn(runs_on_table(rows, "sm_86"))
    assert "runs on sm_86: 5 of 9 configurations; 2 not known" in text
    assert "not known: linear_attention/triton_chunked BLOCK_T=64, BLOCK_V=32" in text


def test_a_row_is_a_line_of_csv():
    frame = atlas_frame(ROWS)
    assert list(frame.columns) == list(AtlasRow.model_fields)
    again = pd.read_csv(pd.io.common.StringIO(frame.to_csv(index=False)))
    assert len(again) == len(ROWS)
    assert json.loads(again["config"][0])["BLOCK_T"] == 32


def test_heat_maps_show_every_value_and_why_one_is_missing():
    maps = atlas_maps(ROWS, ARCHS)
    assert sorted(name.rpartition("-")[2] for name in maps) == ["blocks", "smem", "spills"]
    smem = next(heat for name, heat in maps.items() if name.endswith("smem"))
    assert [panel.name for panel in smem.panels] == ARCHS
    assert (smem.y_name, smem.x_name) == ("BLOCK_T", "BLOCK_V")
    assert smem.panels[0].values[128, 64] == (64 * 128 * 8 + 4096) / 1024  # the scan counts not
    assert smem.panels[1].missing == {(128, 128): "128 KB: too much"}
    for heat in maps.values():
        figure = draw_heat_map(heat)
        words = {text.get_text() for axes in figure.axes for text in axes.texts}
        assert {heat.label(x) for panel in heat.panels for x in panel.values.values()} <= words
        assert render(figure, "png")[:4] == b"\x89PNG"
        svg = render(figure, "svg").decode()
        assert "BLOCK_T" in svg
        assert "sm_86" in svg
    assert atlas_maps([make_row()], ARCHS) == {}


def test_colours_tell_small_spills_apart_beside_a_huge_one():
    spills = {(32, 32): 0, (64, 32): 20, (32, 64): 400, (64, 64): 69432}
    rows = [
        make_row(config=config, asked=[config], spill_store_bytes=spilled)
        for (t, v), spilled in spills.items()
        for config in [{"BLOCK_T": t, "BLOCK_V": v}]
    ]
    heat = next(h for name, h in atlas_maps(rows, ARCHS).items() if name.endswith("spills"))
    [axes] = [axes for axes in draw_heat_map(heat).axes if axes.images]
    [image] = axes.images
    zero, few, some, most = (
        image.cmap(image.norm(image.get_array()[i, j])) for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))
    )
    assert to_hex(zero) == NOTHING and to_hex(few) == HEAT[0] and to_hex(most) == HEAT[-1]
    assert few[0] - some[0] > 0.2 and some[0] - most[0] > 0.2  # red falls from little to much


def test_a_cell_that_is_neither_measured_nor_refused_has_no_colour():
    panel = Panel("one", {(1, 1): 0.0, (2, 2): 5000.0, (1, 2): 1.0})
    [axes] = draw_heat_map(HeatMap("t", "s", "x", "y", (panel,), str)).axes
    [image] = axes.images
    assert bool(image.get_array().mask[0, 1]) and image.get_array().mask.sum() == 1


# --- pruning --------------------------------------------------------------------------------------


def prune_of(rows, tmp_path):
    path = tmp_path / "pruned.py"
    path.write_text(prune_module(rows, "pruned"))
    spec = importlib.util.spec_from_file_location("pruned", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(**settings):
    return triton.Config(
        {name: x for name, x in settings.items() if name.isupper()},
        num_warps=settings.get("num_warps", 4), num_stages=settings.get("num_stages", 2),
    )  # fmt: skip


def test_an_autotuner_is_kept_from_what_cannot_run(tmp_path, monkeypatch):
    module = prune_of(ROWS, tmp_path)
    large, small = config(BLOCK_T=128, BLOCK_V=128), config(BLOCK_T=64, BLOCK_V=64)
    unknown = config(BLOCK_T=256, BLOCK_V=16)
    elsewhere = config(BLOCK_T=128, BLOCK_V=128, num_warps=8)
    on_86 = module.prune(arch="sm_86")
    assert on_86([large, small, unknown, elsewhere], {}) == [small, unknown, elsewhere]
    assert module.prune("walk", "sm_90")([large, small], {}) == [large, small]
    assert module.prune(arch="sm_75")([large], {}) == [large]  # not in the table
    with pytest.raises(RuntimeError, match=r"no configuration runs on sm_86.*needs 128 KB"):
        on_86([large], {})
    monkeypatch.setattr(module, "current_arch", lambda: "sm_86")

    @triton.autotune(
        configs=[large, small], key=["n"],
        prune_configs_by={"early_config_prune": module.early_config_prune},
    )  # fmt: skip
    @triton.jit
    def kernel(x_ptr, n, BLOCK_T: triton.language.constexpr, BLOCK_V: triton.language.constexpr):
        pass

    kernel.nargs = {"x_ptr": None, "n": 1}
    assert kernel.prune_configs({"x_ptr": None, "n": 1}) == [small]


@pytest.mark.parametrize("outcome", ["timeout", "crash"])
def test_an_autotuner_tries_what_no_compiler_said_anything_of(tmp_path, outcome):
    module = prune_of(
        [
            ended("out_of_resources", 128, 128), ended(outcome, 128, 128, constants={"K": 256}),
            ended("out_of_resources", 64, 64), ended(outcome, 64, 64, kernel="scan"),
            ended("out_of_resources", 32, 32), ended(outcome, 32, 64), make_row(arch="sm_90"),
            ended(outcome, 64, 64, arch="sm_90"),
        ],
        tmp_path,
    )  # fmt: skip
    flags, kernels, never, one = configs = [
        config(BLOCK_T=t, BLOCK_V=v) for t, v in ((128, 128), (64, 64), (32, 32), (32, 64))
    ]
    assert module.prune(arch="sm_86")(configs, {}) == [flags, kernels, one]
    assert module.prune("walk", "sm_86")(configs, {}) == [flags, one]
    assert module.prune("scan", "sm_86")(configs, {}) == configs
    assert never not in module.prune("walk", "sm_86")(configs, {})
    why = {row["BLOCK_T"]: why for row, why in module.TABLE["walk"]["sm_86"] if row["BLOCK_V"] > 32}
    assert why[128] is None and why[64] is not None
    assert [why for _, why in module.TABLE["walk"]["sm_90"]] == [None]


def test_the_command_writes_all_of_it(tmp_path, monkeypatch):
    """Only the compiling is played."""
    found = atlas.Found("3.7.1", ROWS)
    monkeypatch.setattr("chela_bench.bench.atlas.compile_all", lambda *_, **__: found)
    prune, out = tmp_path / "pruned.py", tmp_path / "out"
    done = in_this_process(
        "atlas", "linear_attention", "--arch", "sm_90,sm_86", "--json", "--fits-on", "sm_86",
        "--out", out, "--export-prune", prune,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["points"]) == len(ROWS)
    assert len(document["fits_on"]["configs"]) == 8 and document["fits_on"]["not_known"] == []
    names = {path.name for path in out.iterdir()}
    assert {"atlas.csv", "atlas.json"} < names
    assert len([name for name in names if name.endswith(".png")]) == 3
    assert "early_config_prune" in prune.read_text()
    bad = in_this_process("atlas", "--arch", "sm_90", "--export-prune", tmp_path / "not-a-name.py")
    assert bad.returncode == 2
    assert "'not-a-name' is no name to import" in bad.stderr
    (tmp_path / "file").write_text("")
    lost = in_this_process("atlas", "--arch", "sm_90", "--export-prune", tmp_path / "file" / "p.py")
    assert lost.returncode == 6
    assert "give another place" in lost.stderr


def test_a_crash_or_a_hang_is_told_by_the_exit_code(monkeypatch):
    crash = make_row(outcome="crash", fits=False, reason="the compiler was killed by SIGSEGV")
    monkeypatch.setattr(
        "chela_bench.bench.atlas.compile_all", lambda *_, **__: atlas.Found("3.7.1", [crash])
    )
    done = in_this_process("atlas", "linear_attention", "--arch", "sm_90")
    assert done.returncode == 1
    assert "the compiler was killed by SIGSEGV" in done.stdout
