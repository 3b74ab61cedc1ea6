"""`chela_benchmark` in pytest sessions of its own: pytest-benchmark's table, JSON and storage."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from unittest import mock

import numpy as np
import pytest

from chela_bench.bench import sources
from chela_bench.bench.again import code_here
from chela_bench.bench.pytest_fixture import _case
from chela_bench.bench.stats import median
from chela_bench.errors import UsageError
from chela_bench.profiles.machine import source_sha256
from tests.running import TINY, environment, in_this_process, ran_here

pytest.importorskip("pytest_benchmark", reason="the extra [pytest] is not installed")

TESTS = """
import pytest

SHAPE = dict(B=1, T=256, H=2, K=16, V=16)

@pytest.mark.parametrize("impl", ["chunked", "quadratic"])
def test_attention(chela_benchmark, impl):
    point = chela_benchmark("linear_attention", impl, **SHAPE)
    assert point.outcome == "ok" and point.error_rel <= point.error_budget

def test_on_a_gpu(chela_benchmark):
    chela_benchmark("linear_attention", "triton_chunked", **SHAPE)

def test_a_dimension_short(chela_benchmark):
    chela_benchmark("linear_attention", "chunked", B=1, T=256)

def test_no_such_op(chela_benchmark):
    chela_benchmark("attention", "chunked", **SHAPE)

def test_that_fails_after_it_measured(chela_benchmark):
    chela_benchmark("linear_attention", "chunked", **{**SHAPE, "T": 128})
    assert False, "on purpose"

def test_that_fails_before_it_measures(chela_benchmark):
    assert False, "on purpose"

def test_of_another_plugin(benchmark):
    benchmark(sum, range(100))

def test_no_benchmark():
    pass
"""


WORDS = ("pytest", "-p", "chela_bench.bench.pytest_plugin", "-p", "no:cacheprovider",
         "-p", "no:xdist", "--chela-device", "cpu", "--chela-config", "bench.toml")  # fmt: skip


def run(folder, *arguments):
    """A session in a process of its own, with the plugin loaded as an entry point would."""
    words = [sys.executable, "-m", *WORDS, *arguments]
    return subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240
    )


def run_here(folder, *arguments):
    """One in this process, which it leaves as it was."""
    with mock.patch.object(sys, "path", list(sys.path)), warnings.catch_warnings():
        done = ran_here(pytest.main, *WORDS, *arguments, cwd=folder)
    sys.modules.pop("test_suite", None)
    return done


@pytest.fixture(scope="module")
def session(forked_workers, tmp_path_factory):
    """One whole session: its folder, its output and its JSON."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "bench.toml").write_text(TINY)
    (folder / "test_suite.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    words = ("--benchmark-json", "now.json", "--benchmark-save", "first", "--benchmark-save-data")
    done = run_here(folder, *words, "-rA")
    return folder, done, json.loads((folder / "now.json").read_text())


def test_outcomes_of_tests(session):
    _, done, _ = session
    assert "4 passed, 1 skipped" in done.stdout and "4 failed" in done.stdout, done.stdout
    assert "needs a GPU" in done.stdout
    assert "the shape of linear_attention lacks H, K, V; it takes B, T, H, K, V" in done.stdout
    assert "no op 'attention'; there are: linear_attention" in done.stdout
    for unwanted in ("Traceback", "not used at all", "During handling"):
        assert unwanted not in done.stdout


def test_the_json_holds_our_samples_in_seconds_and_our_columns(session):
    _, _, found = session
    names = [one["name"] for one in found["benchmarks"]]
    assert names == ["test_attention[chunked]", "test_attention[quadratic]",
                     "test_of_another_plugin"]  # fmt: skip
    for one in found["benchmarks"][:2]:
        point = one["extra_info"]
        assert point["outcome"] == "ok" and point["op"] == "linear_attention"
        assert len(one["stats"]["data"]) == point["time_ns"]["n"] == one["stats"]["rounds"]
        assert median(one["stats"]["data"]) * 1e9 == pytest.approx(
            point["time_ns"]["median"], abs=1
        )
        assert one["options"]["timer"] == "wall" and one["stats"]["iterations"] == 1
        assert one["group"] == "linear_attention/fwd/fp32/B1-T256-H2-K16-V16"
    assert found["benchmarks"][2]["extra_info"] == {}


def test_machine_info_says_device_and_versions(session):
    _, _, found = session
    ours = found["machine_info"]["chela_bench"]
    assert ours["device"] == "cpu" and ours["torch"] and ours["name"]


def test_commit_info_says_which_code_measured(session):
    """So that the gate may measure the same again."""
    folder, _, found = session
    assert found["commit_info"]["chela_bench_source_sha256"] == source_sha256()
    assert sources.read(folder / "now.json").code.is_known_as(code_here())


def test_the_table_groups_implementations_by_shape(session):
    _, done, _ = session
    assert "benchmark 'linear_attention/fwd/fp32/B1-T256-H2-K16-V16': 2 tests" in done.stdout


def test_the_gate_reads_it(session):
    folder, _, _ = session
    done = in_this_process("gate", "now.json", "--baseline", "now.json", "--limit", "900%",
                           "--rounds", 0, "--json", cwd=folder)  # fmt: skip
    checks = json.loads(done.stdout)["points"]
    assert {check["name"] for check in checks if check["figure"] == "outcome"} == {
        "test_suite.py::test_attention[chunked]",
        "test_suite.py::test_attention[quadratic]",
        "test_suite.py::test_of_another_plugin",
    }
    assert done.returncode in (0, 5), done.stdout  # a loaded machine may be unclear


def test_a_stored_one_is_compared(session):
    folder, _, _ = session
    done = run_here(folder, "-k", "chunked", "--benchmark-compare", "0001")
    assert done.returncode == 0, done.stdout
    assert "(0001_first)" in done.stdout and "(NOW)" in done.stdout
    assert "machine_info is different" not in done.stdout + done.stderr


def test_another_gpus_is_an_error(session):
    folder, _, _ = session
    [stored] = folder.glob(".benchmarks/*/0001_first.json")
    found = json.loads(stored.read_text())
    ours = {"device": "cuda", "name": "NVIDIA H100", "uuid": "GPU-1"}
    found["machine_info"]["chela_bench"] = ours
    (stored.parent / "0002_other.json").write_text(json.dumps(found))
    done = run_here(folder, "-k", "chunked", "--benchmark-compare", "0002")
    assert done.returncode == 4 and "passed" not in done.stdout
    assert "NVIDIA H100 (GPU-1)" in done.stderr and "do not compare" in done.stderr


def test_disabled_it_still_checks(session):
    folder, _, _ = session
    done = run(folder, "-k", "chunked", "--benchmark-disable")
    assert done.returncode == 0 and "1 passed" in done.stdout


MODULES = """
import sys

def test_modules():
    print("MODULES", *sorted(sys.modules))

def test_fixture(chela_benchmark):
    pass
"""


@pytest.mark.parametrize("there", [True, False])
def test_starting_pytest_imports_no_torch(tmp_path, there):
    """Without pytest-benchmark nothing but the plugin's own file, and the fixture refuses."""
    (tmp_path / "bench.toml").write_text(TINY)
    (tmp_path / "test_startup.py").write_text(MODULES)
    done = run(tmp_path, "-s", *(("-k", "modules") if there else ("-p", "no:benchmark")))
    [line] = [line for line in done.stdout.splitlines() if "MODULES" in line]
    modules = set(line.split())
    assert not modules & {"torch", "triton", "numpy", "pandas", "matplotlib"}
    ours = {name for name in modules if name.startswith("chela_bench.")}
    if there:
        assert "chela_bench.bench.pytest_fixture" in ours and "1 passed" in done.stdout
    else:
        assert ours == {"chela_bench.bench", "chela_bench.bench.pytest_plugin"}
        assert "1 passed, 1 error" in done.stdout
        assert "pip install -e '.[pytest]' in the checkout" in done.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"op": 5}, "op: Input should be a valid string; got 5"),
        ({"direction": "sideways"}, "direction: Input should be 'fwd', .*; got 'sideways'"),
        ({"dtype": "float32"}, "dtype: Input should be 'fp32', .*; got 'float32'"),
        ({"config": [1]}, r"config: Input should be a valid dictionary; got \[1\]"),
        ({"config": {"BLOCK_T": 1.5}}, "config.BLOCK_T.*; got 1.5"),
        ({"H": "x"}, "shape.H: Input should be a valid integer; got 'x'"),
        ({"T": -64}, "shape.T: Input should be greater than or equal to 1; got -64"),
    ],
)
def test_what_no_case_can_have_is_refused_in_a_sentence(changes, words):
    given = {"op": "linear_attention", "impl": "chunked", "direction": "fwd", "dtype": "fp32",
             "config": {}} | changes  # fmt: skip
    shape = {name: given.pop(name) for name in list(given) if len(name) == 1}
    with pytest.raises(UsageError, match=f"chela_benchmark: {words}"):
        _case(**given, shape={"B": 1, "T": 64, "H": 2, "K": 16, "V": 16} | shape)


def test_sizes_may_be_any_integers():
    shape = {"B": 1, "T": np.int64(64), "H": np.int32(2), "K": 16, "V": 16}
    case = _case("linear_attention", "chunked", "fwd", "fp32", {}, shape)
    assert case.shape == {"B": 1, "T": 64, "H": 2, "K": 16, "V": 16}
    for size in (True, 64.0):
        with pytest.raises(UsageError, match=r"shape\.T: Input should be a valid integer"):
            _case("linear_attention", "chunked", "fwd", "fp32", {}, {**shape, "T": size})


def test_a_function_in_a_file_needs_a_name():
    with pytest.raises(UsageError, match=r"have a name, got 'mine\.py:attention': .*entry point"):
        _case("linear_attention", "mine.py:attention", "fwd", "fp32", {}, {})
