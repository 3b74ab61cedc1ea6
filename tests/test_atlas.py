"""Compiling for GPUs that are not there: planted kernels, the cache, kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import triton

from chela_bench.bench import atlas
from chela_bench.bench.compiler import Cache
from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.plan import Flags
from chela_bench.bench.sources import StaticRow
from chela_bench.errors import EnvironmentProblem
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
