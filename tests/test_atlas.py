"""Compiling for GPUs that are not there: planted kernels, the cache, kills, what comes out."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import triton
from matplotlib.colors import to_hex
from rich.console import Console

from chela_bench.bench import atlas
from chela_bench.bench.compiler import Cache
from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.plan import Flags
from chela_bench.bench.sources import StaticRow
from chela_bench.errors import EnvironmentProblem
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
from tests.running import ROOT, command, environment, in_this_process

PLANTED = ROOT / "tests/planted_compiles.py"
CONFIG = load_config(find_config(ROOT / "bench.toml"))
COLUMNS = (
    "op", "kernel", "config", "arch", "triton", "fits", "smem_bytes", "regs", "spill_store_bytes",
    "spill_load_bytes", "stack_bytes", "tmem_columns", "ctas_per_sm", "limiter", "tensor_core",
    "instructions", "compile_ms",
)  # fmt: skip


def compiled(axes, *functions, archs=("sm_90",), cache=None, **options):
    flags = Flags(
        ops=["linear_attention"], impls=[f"{PLANTED}:{name}" for name in functions], lens="64",
        directions=("fwd",), axes=axes,
    )  # fmt: skip
    settings = atlas.resolve(CONFIG, flags)
    return atlas.compile_all(
        atlas.cases(settings),
        archs,
        atlas.Options(cache=cache, parallel=2, **options),
        user_impls=settings.user_impls,
    )


def ours(lens="64", archs=("sm_90",), cache=None, directions=("fwd",), axes=None, **sizes):
    flags = Flags(
        ops=["linear_attention"], impls=["triton_chunked"], lens=lens, dtypes=["fp32"],
        directions=directions, axes=axes or {"num_stages": [2]}, sizes=sizes,
    )  # fmt: skip
    settings = atlas.resolve(CONFIG, flags)
    return atlas.compile_all(atlas.cases(settings), archs, atlas.Options(cache=cache, parallel=2))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def planted(cache):
    names = ("greedy", "spilling", "crashing", "erring", "launching_nothing", "refusing")
    return compiled({"SIZE": [2, 5]}, *names, cache=cache)


def row_of(found, function, size):
    [row] = [
        row
        for row in found.rows
        if row.impl.endswith(f":{function}") and {"SIZE": size} in row.asked
    ]
    return row


def test_planted_kernels_are_reported_as_what_they_are(planted):
    fits, greedy = (row_of(planted, "greedy", size) for size in (2, 5))
    assert (fits.outcome, fits.smem_bytes, fits.ctas_per_sm) == ("ok", 128 * 1024, 1)
    assert (greedy.outcome, greedy.fits, greedy.limiter) == (
        "out_of_resources", False, "shared memory",
    )  # fmt: skip
    assert greedy.reason == "needs 320 KB of shared memory, sm_90 has 227 KB a block"
    spilling = row_of(planted, "spilling", 2)
    assert spilling.fits
    assert spilling.spill_store_bytes > 1000
    assert spilling.stack_bytes > 0
    assert spilling.instruction_counts["STL"] > 0
    assert row_of(planted, "crashing", 2).outcome == "ok"
    crashing = row_of(planted, "crashing", 5)
    assert (crashing.outcome, crashing.fits, crashing.smem_bytes) == ("crash", False, None)
    assert "SIGABRT; last output: last words of the compiler" in crashing.reason
    erring = row_of(planted, "erring", 5)
    assert erring.outcome == "compile_error"
    assert "SIZE is beyond what this kernel takes" in erring.reason
    refused = {(each.impl.rpartition(":")[2], each.reason) for each in planted.refused}
    assert refused == {
        ("launching_nothing", "it launches no Triton kernel"),
        ("refusing", "ValueError: it takes no such thing"),
    }
    assert fits.triton == triton.__version__
    assert fits.tensor_core == "HGMMA"


def test_a_second_run_compiles_what_crashed_or_is_damaged_alone_and_gives_up_what_hangs(
    planted, cache
):
    """Damaged: cut off, of another key, without a figure, nested beyond reason."""
    files = sorted(cache.rglob("*.json"))
    small = next(path for path in files if b'"smem_bytes": 0' in path.read_bytes())
    whole = json.loads(small.read_bytes())
    facts = {**whole["facts"], "smem_bytes": None}
    for damage in (
        b"", small.read_bytes()[:-5], b'{"key": 1}', b"[" * 100_000, b"\xff",
        json.dumps({**whole, "facts": facts}).encode(),
        json.dumps({**whole, "key": "of another"}).encode(),
    ):  # fmt: skip
        small.write_bytes(damage)
        assert Cache(str(cache)).read(small.stem) is None
    before = {path: path.stat().st_mtime_ns for path in files}
    names = ("greedy", "spilling", "crashing", "erring", "hanging")
    again = compiled({"SIZE": [2, 5]}, *names, cache=cache, limit_s=6.0)
    assert {path for path in files if path.stat().st_mtime_ns != before[path]} == {small}
    hanging = [row for row in again.rows if row.impl.endswith(":hanging")]
    assert [row.outcome for row in hanging] == ["ok", "timeout"]
    assert hanging[1].reason == "the compiler took longer than 6 s"
    assert _told(again.rows[: -len(hanging)]) == _told(planted.rows)


SMALL = {"archs": ("sm_86", "gfx942"), "H": 1, "K": 16, "V": 16}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A walk for two makers, and the cache that it is in."""
    folder = tmp_path_factory.mktemp("small")
    return ours(cache=folder, **SMALL), folder


def test_the_same_question_of_the_same_code_starts_no_compiler(small, monkeypatch):
    """The second time; a damaged answer, other code or another setting asks anew."""
    first, folder = small
    assert [row.outcome for row in first.rows] == ["ok", "ok"]

    def no_compiler(request, scratch):
        raise AssertionError(f"asked again for {request['archs']}")

    monkeypatch.setattr(atlas, "_answers", no_compiler)
    assert ours(cache=folder, **SMALL) == first
    for changed in ({"V": 32}, {"archs": ("sm_86", "sm_80")}):
        with pytest.raises(AssertionError, match="asked again"):
            ours(cache=folder, **{**SMALL, **changed})
    kept = next(p for p in (folder / "whole").iterdir() if b'"arch": "sm_86"' in p.read_bytes())
    whole = kept.read_bytes()
    for damage in (
        b"", whole[:-3], b"{}", b"[" * 100_000, whole.replace(b'"fits": true', b'"fits": 7'),
        whole.replace(b'"asked"', b'"asker"', 1),
    ):  # fmt: skip
        kept.write_bytes(damage)
        with pytest.raises(AssertionError, match="asked again"):
            ours(cache=folder, **SMALL)
    kept.write_bytes(whole)
    monkeypatch.setattr(atlas.machine, "source_sha256", lambda: "of other code")
    with pytest.raises(AssertionError, match="asked again"):
        ours(cache=folder, **SMALL)


def _told(rows):
    return [row.model_dump(exclude={"compile_ms"}) for row in rows]


def test_ours_compile_as_the_launcher_would_have_them(small):
    """Pointers aligned, scalars not specialised, constants of the plan; on Hopper by hand in bf16,
    elsewhere never; AMD's shared memory."""
    found, _ = small
    kernels = {(row.arch, row.kernel) for row in found.rows}
    assert {kernel for _, kernel in kernels} >= {"linear_attention_walk"}
    walk = next(row for row in found.rows if row.kernel == "linear_attention_walk")
    assert walk.config == {
        "BLOCK_T": 32, "BLOCK_K": 16, "BLOCK_V": 16, "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    assert walk.constants["IS_CAUSAL"] is True
    assert walk.constants["final_ptr"] is None
    assert walk.instruction_counts["LDGSTS"] > 0  # without alignment nothing is copied so
    assert walk.lens == [64]
    assert {row.language for row in found.rows} == {"triton"}
    amd = [row for row in found.rows if row.arch == "gfx942"]
    assert amd
    assert all(row.smem_bytes is not None and row.ctas_per_sm is None for row in amd)
    for row in found.rows:
        record = json.loads(row.model_dump_json())
        assert set(COLUMNS) <= set(record)


RECORD = """
import json, sys
from chela_bench.bench import atlas, compiler
from chela_bench.bench.cases import Case
from chela_bench.profiles.forks import each_in_a_fork
from chela_bench.profiles.occupancy import find_arch
request = json.load(sys.stdin)
compiler._import_all(request)
import torch._dynamo

def recorded(name):
    refused = []
    found = compiler._Atlas(find_arch(name), request, refused.append)
    launches, users = found._recorded()
    told = [
        [x.kernel, x.is_gluon, x.source.attrs == {}, found.description(x, used)]
        for x, used in zip(launches.values(), users, strict=True)
    ]
    return {"launches": told, "users": users, "refused": refused}

jobs = [lambda name=name: recorded(name) for name in request["archs"]]
endings = dict(each_in_a_fork(jobs, parallel=2, limit_s=600))
print(json.dumps([endings[i].value for i in range(len(jobs))]))
"""


def test_every_op_with_kernels_of_ours_can_be_recorded_for_every_architecture():
    flags = Flags(lens="128,64k", directions=("fwd", "fwdbwd", "decode"))
    settings = atlas.resolve(CONFIG, flags)
    assert set(settings.impls) == {
        "linear_attention", "short_long_conv", "long_conv", "reparameterization", "chela_layer",
    }  # fmt: skip
    cases = atlas.cases(settings)
    assert any(case.direction == "decode" for case in cases)
    archs = ["sm_90", "sm_120"]
    request = {"archs": archs, "cases": [case.model_dump() for case in cases], "impls": {},
               "processors": None}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RECORD], input=json.dumps(request), env=environment(), text=True,
        capture_output=True, check=True, timeout=240,
    )  # fmt: skip
    kernels = set()
    for arch, found in zip(archs, json.loads(done.stdout), strict=True):
        assert found["refused"] == []
        used = {case for users in found["users"] for case in users}
        assert used == set(range(len(cases)))
        assert {by_hand for _, by_hand, *_ in found["launches"]} == {False, arch == "sm_90"}
        assert not any(unaligned for _, _, unaligned, _ in found["launches"])
        kernels |= {kernel for kernel, *_ in found["launches"]}
        names = [
            StaticRow(op=op, impl=impl, dtype=dtype, arch=arch, triton="", **row).name
            for (*_, row), used in zip(found["launches"], found["users"], strict=True)
            for op, impl, dtype in {(cases[i].op, cases[i].impl, cases[i].dtype) for i in used}
        ]
        assert len(set(names)) == len(names)  # a gate tells them apart
    assert kernels >= {
        "linear_attention_sum", "linear_attention_scan", "linear_attention_sweep",
        "linear_attention_recurrent", "short_conv_fwd", "short_conv_bwd", "direct", "taps_gradient",
        "convolve_rows", "gradient_rows", "norm_gate_fwd", "norm_gate_bwd", "queries_keys_fwd",
        "queries_keys_bwd", "output_gate_bwd", "long_conv_strip", "linear_attention_wgmma",
    }  # fmt: skip


def test_a_killed_atlas_leaves_nothing_running_and_keeps_what_was_compiled(tmp_path):
    words = command(
        "atlas", "linear_attention", "--impl", f"{PLANTED}:hanging", "--axis", "SIZE=2,5",
        "--lens", "64", "--direction", "fwd", "--arch", "sm_90", "--jobs", 2, "--limit", 600,
    )  # fmt: skip
    variables = environment(XDG_CACHE_HOME=str(tmp_path))
    process = subprocess.Popen(
        words, env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("*.json")) or len(_descendants(process.pid)) < 3:
        assert time.monotonic() < deadline, process.communicate(timeout=5)
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    family = _descendants(process.pid)
    process.kill()
    process.communicate(timeout=60)
    while any(_alive(pid) for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [kept] = tmp_path.rglob("*.json")
    assert json.loads(kept.read_bytes())["facts"]["outcome"] == "ok"


def test_an_interrupted_atlas_says_what_is_kept(monkeypatch):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr("chela_bench.bench.atlas.compile_all", interrupted)
    done = in_this_process("atlas", "linear_attention", "--arch", "sm_90")
    assert done.returncode == 143
    assert "what was compiled is kept for the next time" in done.stderr


def _descendants(pid):
    """Of a process, by their parents."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(path.parent.name)] = int(fields[1])
    found, waiting = set(), {pid}
    while waiting:
        waiting = {child for child, parent in parents.items() if parent in waiting} - found
        found |= waiting
    return found


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_a_compiling_process_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(atlas, "_WORKER", "import sys; sys.exit('no torch here')")
    with pytest.raises(EnvironmentProblem, match="exit code 1; last output: no torch here"):
        ours()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "sm_99"], "no architecture 'sm_99'; there are: sm_75"),
        (["--fits-on", "h100"], "no architecture 'h100'"),
        (["nothing"], "no op 'nothing'; there are: linear_attention"),
        (["softmax_attention"], "no kernel of ours computes softmax_attention; there are:"),
        (["linear_attention", "--axis", "BLOCKT=32"], "nothing selected has such an axis"),
        (["linear_attention", "--axis", "BLOCK_T"], "--axis takes NAME=VALUE"),
        (["linear_attention", "--lens", "5x"], "'5x' is not a length"),
        (["linear_attention", "--dtype", "fp8"], "no dtype 'fp8'"),
        (["linear_attention", "--impl", "fla_chunky"], "no implementation 'fla_chunky'"),
        (["linear_attention", "--limit", "0"], "0"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_a_sentence(arguments, words):
    done = in_this_process("atlas", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# --- what comes out -------------------------------------------------------------------------------


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
    assert [row["BLOCK_T"] for row, _ in module.TABLE["walk"]["sm_86"]] == [64, 32]
    assert module.TABLE["scan"] == {"sm_86": []}
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
