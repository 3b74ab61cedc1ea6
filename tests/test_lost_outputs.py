"""Outputs that cannot be written: what was found is told all the same, and code 6 says so, unless
what was found has a code of its own; what takes minutes asks before."""

from __future__ import annotations

import json

import pytest

from chela_bench.bench import atlas
from chela_bench.bench.noise import noise_runs
from chela_bench.bench.sources import Machine
from chela_bench.records import Refused
from tests.factories import make_failure
from tests.records import timed, write_run
from tests.running import in_this_process
from tests.test_atlas_reports import ROWS

ATLAS = ("atlas", "linear_attention", "--arch", "sm_90,sm_86")


@pytest.fixture
def places(tmp_path):
    """A folder, a file, and what takes nothing."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full").symlink_to("/dev/full")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "unwritten"),
    [
        (("--junit", "folder"), "folder: Is a directory"),
        (("--junit", "full"), "full: No space left on device"),
        (("--junit", "file/gate.xml"), "file/gate.xml: file is no folder, and a folder was wanted"),
        (("--summary", "full"), "full: No space left on device"),
        (("--summary", "none/here"), "none/here: No such file or directory"),
    ],
)
@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_gate_says_its_verdict_and_what_is_unwritten(places, words, unwritten, as_json):
    then = write_run(places / "then", [timed()])
    now = write_run(places / "now", [timed(ns=2e6)])
    done = in_this_process(
        "gate", now, "--baseline", then, "--rounds", 0, *words, *as_json, cwd=places
    )
    assert done.returncode == 1 and "slower, where" in " ".join(done.stdout.split())
    assert done.stderr == f"chela-bench: cannot write {unwritten}; give another place\n"


def test_one_file_that_is_unwritten_leaves_the_other(places):
    run = write_run(places / "run", [timed()])
    words = ("gate", run, "--baseline", run, "--junit", "folder", "--summary", "file")
    assert in_this_process(*words, cwd=places).returncode == 6
    assert "chela-bench gate: passed" in (places / "file").read_text()


@pytest.mark.parametrize(
    ("points", "code"),
    [([timed()], 6), ([(make_failure("wrong", "o is off"), [])], 3), ([timed(ns=1.05e6)], 5)],
)
def test_an_unwritten_summary_hides_no_verdict(places, points, code):
    then, now = write_run(places / "then", [timed()]), write_run(places / "now", points)
    words = ("gate", now, "--baseline", then, "--rounds", 0)
    done = in_this_process(*words, cwd=places, GITHUB_STEP_SUMMARY=str(places / "none" / "here"))
    assert done.returncode == code and "cannot write" in done.stderr, done.stdout


@pytest.mark.parametrize("command", ["gate", "compare", "show"])
def test_a_terminal_of_no_width_is_told_all_the_same(places, command):
    run = write_run(places / "run", [timed()])
    words = {"gate": (run, "--baseline", run), "compare": (run, run), "show": (run,)}[command]
    done = in_this_process(command, *words, cwd=places, COLUMNS="0", GITHUB_STEP_SUMMARY="")
    assert done.returncode == 0 and "NVIDIA" in done.stdout


def test_an_unwritten_file_hides_no_wrong_result_of_compare(places):
    run = write_run(places / "run", [(make_failure("wrong", "o is off"), [])])
    done = in_this_process("compare", run, run, "-o", "file", cwd=places)
    assert done.returncode == 3 and "cannot write" in done.stderr


def test_compare_says_its_verdict_and_what_is_unwritten(places):
    run = write_run(places / "run", [timed()])
    done = in_this_process("compare", run, run, "-o", "file", "--markdown", cwd=places)
    assert done.returncode == 6 and timed()[0].key in done.stdout
    assert "file is no folder, and a folder was wanted" in done.stderr


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_noise_says_its_figures_and_what_is_unwritten(places, monkeypatch, as_json):
    machine = Machine("cpu", "some CPU")
    samples = {"a": [[100], [103]], "b": [[100], [300]]}
    found = noise_runs(machine, samples)
    monkeypatch.setattr("chela_bench.cli.noise.measure_noise", lambda *_, **__: found)
    words = ("noise", "--device", "cpu", "--impl", "chunked", "--baselines", "file")
    done = in_this_process(*words, *as_json, cwd=places)
    assert done.returncode == 6 and "cannot write file/noise/some-CPU.json" in done.stderr
    assert "the times of b differ by 200 % between runs of the same code" in done.stderr
    if as_json:
        document = json.loads(done.stdout)
        assert document["file"] is None and document["points"][0]["noise"] == 0.03
    else:
        assert " 3.00 %  a\n" in done.stdout and done.stdout.endswith("on some CPU\n")


@pytest.fixture
def compiling(monkeypatch):
    """What `atlas` found, and how often it compiled."""
    calls = []

    def compiled(*_, **__):
        calls.append(1)
        return atlas.Found("3.7.1", ROWS)

    monkeypatch.setattr("chela_bench.bench.atlas.compile_all", compiled)
    return calls


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--export-prune", "a-b.py"), 2, "'a-b' is no name to import a module by"),
        (("--export-prune", "class.py"), 2, "'class' is no name to import a module by"),
        (("--export-prune", "file/p.py"), 6, "file: Not a directory; give another place"),
        (("--export-prune", "loop"), 6, "loop: Too many levels of symbolic links"),
        (("--out", "file/x"), 6, "file: Not a directory; give another place"),
        (("--out", "loop"), 6, "loop: Too many levels of symbolic links; give another place"),
        (("--export-prune", "p", "--out", "p"), 2, "are in each other's place"),
        (("--export-prune", "p", "--out", "./p"), 2, "are in each other's place"),
        (("--export-prune", "p", "--out", "p/q"), 2, "are in each other's place"),
        (("--export-prune", "folder/atlas.json", "--out", "link"), 2, "are in each other's place"),
    ],
)
def test_atlas_asks_before_it_compiles(places, compiling, words, code, said):
    (places / "loop").symlink_to("loop")
    (places / "link").symlink_to("folder")
    before = sorted(places.iterdir())
    done = in_this_process(*ATLAS, *words, cwd=places)
    assert (done.returncode, compiling) == (code, []), done.stderr
    assert said in done.stderr and sorted(places.iterdir()) == before


def test_atlas_says_what_it_compiled_and_what_is_unwritten(places, compiling):
    done = in_this_process(*ATLAS, "--export-prune", "full", cwd=places)
    assert done.returncode == 6 and compiling and "20 kernels compiled" in done.stdout
    assert done.stderr.endswith("cannot write full: No space left on device; give another place\n")


def test_an_unwritten_table_hides_no_crash_of_the_compiler(places, compiling, monkeypatch):
    crashed = ROWS[0].model_copy(update={"outcome": "crash"})
    found = atlas.Found("3.7.1", [crashed, *ROWS[1:]])
    monkeypatch.setattr("chela_bench.bench.atlas.compile_all", lambda *_, **__: found)
    done = in_this_process(*ATLAS, "--export-prune", "full", cwd=places)
    assert done.returncode == 1 and "cannot write full" in done.stderr


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_an_atlas_of_nothing_but_refusals_is_an_error(places, monkeypatch, as_json):
    refused = Refused(
        op="linear_attention", impl="triton_chunked", arch="sm_90", direction="fwd",
        asked={"BLOCK_T": 7}, tokens=64, reason="BLOCK_T=7: a power of two was wanted",
    )  # fmt: skip
    found = atlas.Found("3.7.1", [], [refused])
    monkeypatch.setattr("chela_bench.bench.atlas.compile_all", lambda *_, **__: found)
    done = in_this_process(*ATLAS, "--export-prune", "p.py", *as_json, cwd=places)
    assert done.returncode == 2 and not (places / "p.py").exists()
    assert done.stderr.endswith(f"chela-bench: nothing was compiled: {refused.reason}\n")
    assert "BLOCK_T" in done.stdout
