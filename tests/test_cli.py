"""The command line as a user meets it: its streams, its exit code, and the process it is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from chela_bench.bench.ops import OPS
from chela_bench.cli import derived
from tests.running import (
    ROOT,
    chela_bench,
    command,
    environment,
    in_this_process,
    prepared,
    run_folder,
    swept,
    tiny_config,
)


@pytest.mark.parametrize(
    "name", ["sweep", "report", "runs", "show", "list", "doctor", "completion"]
)
def test_every_command_has_help_with_an_example(name):
    done = in_this_process(name, "--help")
    assert done.returncode == 0
    assert f"chela-bench {name}" in done.stdout.split("Example", 1)[1]
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--lens", "0"], "'0' is not a length"),
        (["sweep", "--lens", ""], "is not a length"),
        (["sweep", "--op", "nope"], "no op 'nope'"),
        (["sweep", "--op", "linear_attention,,"], "empty name"),
        (["sweep", "--impl", "nope"], "no implementation 'nope'"),
        (["sweep", "--dtype", "fp8"], "no dtype 'fp8'"),
        (["sweep", "--config", "nope.toml"], "no such file: nope.toml"),
        (["sweep", "--resume", "nope"], "nope is no run folder"),
        (["sweep", "--retry", "oom"], "--retry goes with --resume"),
        (["sweep", "--seed", str(1 << 63)], "is not in the range"),
        (["sweep", "--device", "tpu"], "--device takes auto, cpu, cuda or cuda:N; got 'tpu'"),
        (["sweep", "--timer", "sundial"], "'event', 'profiler'"),
        (["report", "nope"], "nope is no run folder"),
        (["report"], "Missing argument"),
        (["show", "nope"], "nope is no run folder"),
        (["runs", "nope"], "no folder nope"),
        (["runs", "docs/results/h100"], "chela-bench show docs/results/h100"),
        (["nope"], "No such command 'nope'"),
    ],
)
def test_mistakes_are_one_message_on_stderr_and_exit_code_2(arguments, message):
    done = in_this_process(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["nope"], ["sweep", "--op", "nope"]])
def test_a_process_ends_with_the_message_and_exit_code_of_this_one(arguments):
    """Of a mistake that click finds, and of one that we do."""
    done, here = chela_bench(*arguments), in_this_process(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", here.stderr)


def test_a_gpu_that_is_not_there_is_exit_code_6():
    done = in_this_process("sweep", "--device", "cuda")
    assert done.returncode == 6
    assert "--device cuda needs a GPU, but" in done.stderr
    assert "--device cpu" in done.stderr


def test_list_says_what_cannot_run_and_why():
    done = in_this_process("list", "--json", "--device", "cpu")
    rows = {row["op"]: row for row in json.loads(done.stdout)["ops"]}
    impls = {impl["name"]: impl for impl in rows["linear_attention"]["implementations"]}
    assert impls["triton_chunked"]["reason"] == "needs a GPU"
    assert impls["chunked"]["available"]
    assert "medium" in rows["linear_attention"]["shapes"]
    text = in_this_process("list", "--device", "cpu").stdout
    assert "unavailable: needs a GPU" in text


def test_dry_run_measures_nothing(tmp_path):
    done = in_this_process(
        "sweep", "--dry-run", "--config", tiny_config(tmp_path), "--out", tmp_path / "runs"
    )
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "linear_attention/chunked/fwd/fp32/B1-T256-H2-K16-V16" in lines
    assert any(line.endswith("skipped: needs a GPU") for line in lines)
    assert not (tmp_path / "runs").exists()


IMPLS = [impl.name for op in OPS for impl in op.impls if not impl.compiled]
NEED_A_GPU = tuple(
    f"{op.name}/{impl.name}/" for op in OPS for impl in op.impls if impl.devices == ("cuda",)
)

STEP_ALONE = tuple(
    f"{op.name}/{impl.name}/" for op in OPS for impl in op.impls if impl.directions == ("decode",)
)


def _everything(folder, *arguments):
    """Every op and implementation on the CPU, at an odd length."""
    config = tiny_config(folder, build_s=120.0)
    done, document = swept(
        "--op", ",".join(op.name for op in OPS),
        "--lens", "100", "--axis", "order=serial,parallel", "--impl", ",".join(IMPLS), *arguments,
        config=config,
    )  # fmt: skip
    return done, document, config


def _draw_nothing(monkeypatch):
    """Figures take seconds."""
    monkeypatch.setattr(derived, "figures", lambda run, points: {})


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return _everything(tmp_path_factory.mktemp("all"), "--direction", "fwd,bwd,fwdbwd,decode")


def _assert_all_right(done, document, *, groups, direction=None):
    assert done.returncode == 0, [
        (p["key"], p["reason"]) for p in document["points"] if p["outcome"] not in ("ok", "skipped")
    ]
    outcomes = {p["key"]: (p["outcome"], p["reason"]) for p in document["points"]}
    once = sum(p["op"] == "reparameterization" for p in document["points"])
    assert once == (4 * 2 * groups if direction == "fwdbwd" else 4 * 2)
    steps = 0 if direction == "fwdbwd" else 4 + 5
    assert len(outcomes) == groups * (9 + 1 + 4 * 2 + 3 + 4 + 5) + steps + once
    for key, (outcome, reason) in outcomes.items():
        if key.startswith(NEED_A_GPU):
            assert (outcome, reason) == ("skipped", "needs a GPU")
        elif key.startswith("reparameterization/") and "/fwd/" not in key:
            assert outcome == "skipped" and "merged has no" in reason
        elif key.startswith(STEP_ALONE) and "/decode/" not in key:
            assert outcome == "skipped" and reason.endswith("; it has: decode")
        else:
            assert outcome == "ok", (key, reason)


def test_every_implementation_is_right_on_the_cpu_in_every_direction(everything):
    done, document, _ = everything
    _assert_all_right(done, document, groups=3)


def test_every_implementation_is_right_on_the_cpu_in_16_bits(tmp_path, monkeypatch):
    """fwdbwd judges the output and every gradient."""
    _draw_nothing(monkeypatch)
    done, document, _ = _everything(tmp_path, "--dtype", "bf16,fp16", "--direction", "fwdbwd")
    _assert_all_right(done, document, groups=2, direction="fwdbwd")


def test_errors_are_real_and_within_budget(everything):
    for point in everything[1]["points"]:
        if point["outcome"] == "ok":
            assert 0 < point["error_rel"] <= point["error_budget"]
            gradients = set(point["errors"]) - {"o"}
            assert bool(gradients) == (point["direction"] in ("bwd", "fwdbwd"))
            assert point["oracle"].startswith("float64 ")


def test_what_a_cpu_cannot_tell_is_null_with_the_reason(everything):
    for point in everything[1]["points"]:
        if point["outcome"] == "ok":
            for column in ("floor_ns", "peak_bytes", "host_ns", "throttle"):
                assert point[column] is None
                assert point["null_reasons"][column].startswith("CPU: ")
            assert point["wall_ns"] == point["time_ns"]["median"]
            assert point["tokens_per_s"] > 0


def test_points_are_shuffled(everything):
    folder = run_folder(everything[2])
    written = [
        json.loads(line)["key"] for line in (folder / "points.jsonl").read_text().splitlines()
    ]
    assert len({key.split("/")[1] for key in written[:20]}) > 3  # not one implementation at a time
    assert written != sorted(written)


def test_the_document_and_the_folder_say_the_same(everything):
    _, document, config = everything
    folder = run_folder(config)
    assert json.loads((folder / "run.json").read_text()) == document["run"]
    assert document["run"]["finished_utc"] is not None
    assert document["run"]["planned_points"] == len(document["points"])
    assert (folder / "results.csv").exists()
    assert (folder / "samples.parquet").exists()
    names = {path.name for path in (folder / "report").iterdir()}
    assert {"index.html", "summary.md"} < names
    assert sum(name.endswith("-time.png") for name in names) >= 4


def test_report_makes_the_same_files_elsewhere(everything, some, tmp_path):
    done = in_this_process("report", some, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "linear_attention fwd fp32" in done.stdout
    drawn = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".svg", ".png")]
    assert len(drawn) >= 8
    for path in drawn:
        before = run_folder(everything[2]) / "report" / path.name
        assert path.read_bytes() == before.read_bytes(), path.name


@pytest.fixture(scope="module")
def some(everything, tmp_path_factory):
    """The run folder of `everything`, with a third of its points."""
    folder = tmp_path_factory.mktemp("some") / "run"
    shutil.copytree(run_folder(everything[2]), folder)
    lines = (folder / "points.jsonl").read_text().splitlines(keepends=True)
    (folder / "points.jsonl").write_text("".join(line for line in lines if "/fwd/fp32/" in line))
    return folder


def test_a_report_that_cannot_be_written_says_so(some, monkeypatch):
    _draw_nothing(monkeypatch)
    done = in_this_process("report", some, "-o", "/dev/null/x")
    assert done.returncode == 6
    assert "cannot write /dev/null/x/" in done.stderr


def _process_that_draws_nothing(*arguments, **changes):
    code = "from chela_bench.cli import derived; derived.figures = lambda run, points: {}"
    words = prepared(code, *arguments)
    return subprocess.run(
        words, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize(
    ("columns", "run"),
    [
        ("40", in_this_process),
        pytest.param("80", _process_that_draws_nothing, id="80-chela_bench"),
        ("200", in_this_process),
    ],
)
def test_piped_tables_fit_and_carry_no_colour(some, columns, run, monkeypatch):
    if run is in_this_process:
        _draw_nothing(monkeypatch)
    done = run("report", some, COLUMNS=columns, LANG="C", LC_ALL="C", PYTHONIOENCODING="utf-8")
    assert "\x1b" not in done.stdout
    tables = done.stdout.split("report: ")[0]
    assert max(len(line) for line in tables.splitlines()) <= int(columns)


def test_progress_is_plain_lines_on_stderr_when_piped(tmp_path):
    done = chela_bench(
        "sweep", "--config", tiny_config(tmp_path), "--out", tmp_path / "runs", "--impl", "chunked"
    )
    assert done.returncode == 0
    assert "\x1b" not in done.stderr
    assert re.search(r"\[1/1\] linear_attention/chunked/fwd/fp32/\S+: [0-9.]+ [mu]?s", done.stderr)
    assert "records: " in done.stdout
    assert re.search(r"report:  \S+/report/index.html \(\d+ figures\)", done.stdout)
    assert "[1/1]" not in done.stdout


def test_the_example_kernel_runs(tmp_path):
    _, document = swept(
        "--op", "linear_attention", "--impl", f"{ROOT / 'examples' / 'my_kernel.py'}:attention",
        config=tiny_config(tmp_path),
    )  # fmt: skip
    [point] = document["points"]
    assert point["outcome"] == "ok", point["reason"]
    assert point["impl"] == "my_kernel.py:attention"


def test_it_runs_uninstalled_from_another_folder(tmp_path):
    done = subprocess.run(
        command("list"), cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0
    assert str(ROOT / "bench.toml") in done.stdout
