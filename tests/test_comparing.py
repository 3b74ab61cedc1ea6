"""`compare` on records: what it says, what it refuses, and what it looks like."""

from __future__ import annotations

import json
import re

import pytest

from chela_bench.records import Telemetry
from tests.factories import HOSTILE, make_failure, make_run
from tests.records import CLOCKS, pytest_json, samples, timed, write_run
from tests.running import in_this_process


@pytest.fixture
def two(tmp_path):
    """Compares two lists of timed points; returns the process and the rows by name."""

    def compare(before, after, *flags, run=None):
        folders = [
            write_run(tmp_path / "before", before),
            write_run(tmp_path / "after", after, run),
        ]
        done = in_this_process("compare", *folders, "--json", *flags, cwd=tmp_path)
        rows = json.loads(done.stdout)["points"] if done.stdout else []
        return done, {row["name"]: row for row in rows}

    return compare


def test_verdicts_of_stored_runs(two):
    lengths = {1024: 1.0, 2048: 1.08, 4096: 0.92}
    done, rows = two(
        [timed(T, ns=1e6) for T in lengths],
        [timed(T, ns=1e6 * change, seed=T) for T, change in lengths.items()],
    )
    assert done.returncode == 0
    assert [row["verdict"] for row in rows.values()] == ["same", "slower", "faster"]
    for row, change in zip(rows.values(), lengths.values(), strict=True):
        assert row["low"] < row["ratio"] < row["high"]
        assert row["ratio"] == pytest.approx(change, abs=0.003)


@pytest.mark.parametrize("clock", ["sm_clock_mhz", "mem_clock_mhz"])
def test_other_clocks_are_unclear_and_said(two, clock):
    then, now = Telemetry(**CLOCKS), Telemetry(**{**CLOCKS, clock: round(CLOCKS[clock] * 0.9)})
    _, rows = two([timed(telemetry=then)], [timed(ns=1.2e6, seed=1, telemetry=now)])
    [row] = rows.values()
    assert row["verdict"] == "unclear"
    assert f"{'SM' if clock.startswith('sm') else 'memory'} clock was" in row["reason"]


def test_a_step_of_the_clock_is_allowed_for(two):
    now = Telemetry(**{**CLOCKS, "sm_clock_mhz": 1965})
    _, rows = two([timed()], [timed(ns=1.08e6, seed=1, telemetry=now)])
    [row] = rows.values()
    assert row["verdict"] == "slower" and "1965 MHz" in row["reason"]


def test_drift_within_a_run_is_unclear(two):
    drifting = [ns * (1 + 0.05 * i / 90) for i, ns in enumerate(samples(1e6))]
    _, rows = two([timed()], [timed(ns=drifting)])
    [row] = rows.values()
    assert row["verdict"] == "unclear" and "drift by" in row["reason"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timer": "profiler"}, "timed by other means"),
        ({"l2": "warm"}, "timed by other means"),
        ({"device": "GPU-1"}, "other cards"),
    ],
)
def test_what_does_not_compare_is_unclear(two, changes, words):
    _, rows = two([timed()], [timed(**changes)])
    [row] = rows.values()
    assert row["verdict"] == "unclear" and words in row["reason"] and row["ratio"] is None


def test_a_wrong_result_is_no_time(two):
    wrong = make_failure("wrong", "off by 3e-1; budget 8e-3")
    done, rows = two([timed()], [(wrong, [])])
    [row] = rows.values()
    assert done.returncode == 3 and row["after_ns"] is None and "off by" in row["reason"]


def test_few_samples_are_unclear(two):
    _, rows = two([timed(ns=[1e6] * 5)], [timed(ns=[2e6] * 5)])
    [row] = rows.values()
    assert row["verdict"] == "unclear" and row["low"] is None and "5 samples" in row["reason"]


def test_one_sided_benchmarks_are_named(two):
    done, _ = two([timed(1024), timed(2048)], [timed(1024), timed(4096)])
    found = json.loads(done.stdout)
    assert [re.search(r"T\d+", name)[0] for name in found["missing"] + found["added"]] == [
        "T2048", "T4096",
    ]  # fmt: skip


def test_other_machines_are_refused_unless_asked_for(two):
    other = make_run()
    environment = other.environment.model_copy(update={"uuid": "GPU-1"})
    other = make_run(environment=environment)
    before = [timed(floor_ns=500_000), timed(2048)]
    after = [timed(ns=1.2e6, floor_ns=600_000, device="GPU-1"), timed(2048, device="GPU-1")]
    done, _ = two(before, after, run=other)
    assert done.returncode == 4 and "--across-machines" in done.stderr
    done, rows = two(before, after, "--across-machines", run=other)
    first, second = rows.values()
    assert first["verdict"] == "same" and first["ratio"] == pytest.approx(1.0, abs=0.01)
    assert first["after_ns"] == pytest.approx(1.2e6, rel=0.01)
    assert second["verdict"] == "unclear" and "no floor" in second["reason"]


def test_another_model_has_clocks_of_its_own(two):
    """Of multiples of each one's floor; two cards of one model are held to one clock."""
    slow = Telemetry(**{**CLOCKS, "sm_clock_mhz": 1410, "mem_clock_mhz": 1593})
    after = [timed(ns=2e6, floor_ns=1_000_000, telemetry=slow, device="GPU-1")]
    for name, verdict in (("NVIDIA A100", "same"), (make_run().environment.name, "unclear")):
        updates = {"uuid": "GPU-1", "name": name}
        other = make_run(environment=make_run().environment.model_copy(update=updates))
        _, rows = two([timed(floor_ns=500_000)], after, "--across-machines", run=other)
        assert [row["verdict"] for row in rows.values()] == [verdict]


def test_pytests_json_against_a_run_and_against_itself(tmp_path):
    points = [timed(1024), timed(2048)]
    run = write_run(tmp_path / "run", points)
    slower = [timed(1024, ns=1.2e6), timed(2048)]
    found = pytest_json(tmp_path / "now.json", slower)
    for before in (run, pytest_json(tmp_path / "then.json", points)):
        done = in_this_process("compare", before, found, "--json", cwd=tmp_path)
        rows = json.loads(done.stdout)["points"]
        assert [row["verdict"] for row in rows] == ["slower", "same"]


def another_plugins(path, *, ns=1e6, **more):
    """No columns of ours: name, samples and processor are all there is."""
    stats = {"data": [ns / 1e9 for ns in samples(ns)]}
    machine = {"node": "n", "cpu": {"brand_raw": "some CPU"}}
    benchmark = {"fullname": "t.py::test", "stats": stats, "extra_info": {}, **more}
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": [benchmark]}))
    return path


def test_another_plugins_json_compares_by_name(tmp_path):
    paths = another_plugins(tmp_path / "a.json"), another_plugins(tmp_path / "b.json", ns=1.5e6)
    done = in_this_process("compare", *paths, "--json", cwd=tmp_path)
    [row] = json.loads(done.stdout)["points"]
    assert row["verdict"] == "slower" and row["name"] == "t.py::test"


@pytest.mark.parametrize("options", [{"timer": "process_time"}, {}, None, 5])
def test_another_plugins_times_by_another_timer_do_not_compare(tmp_path, options):
    usual = another_plugins(tmp_path / "a.json", options={"timer": "perf_counter"})
    other = another_plugins(tmp_path / "b.json", ns=5e5, options=options)
    for paths, verdict in (((usual, usual), "same"), ((usual, other), "unclear")):
        done = in_this_process("compare", *paths, "--json", cwd=tmp_path)
        [row] = json.loads(done.stdout)["points"]
        assert row["verdict"] == verdict
    assert "timed by other means: pytest-benchmark's perf_counter, then" in row["reason"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "half of it"),
        ('{"benchmarks": [', "half of it"),
        ("[" * 100_000, "half of it"),
        ("[]", "no run folder"),
        ('{"points": []}', "no run folder"),
        ('{"benchmarks": [1]}', "benchmark 1: not as pytest-benchmark"),
        ('{"benchmarks": [{"fullname": "a", "stats": {}}]}', "--benchmark-json"),
        ('{"benchmarks": [{"fullname": "a", "stats": {"data": [0]}}]}', "a time of 0 ns"),
        ('{"benchmarks": [{"fullname": "a", "stats": {"data": [Infinity]}}]}', "a time of inf ns"),
        ('{"benchmarks": [{"fullname": "a", "stats": {"data": [NaN]}}]}', "a time of nan ns"),
        ('{"benchmarks": [{"fullname": "a", "stats": {"data": [-1]}}]}', "a time of -1e+09 ns"),
        ('{"benchmarks": [{"fullname": "a", "stats": {"data": ["x"]}}]}', "not as pytest"),
    ],
)
def test_files_that_hold_nothing_to_compare(tmp_path, text, words):
    path = tmp_path / "now.json"
    path.write_text(text)
    done = in_this_process("compare", path, path, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_is_none_is_named(tmp_path):
    done = in_this_process("compare", tmp_path / "no", tmp_path / "no", cwd=tmp_path)
    assert done.returncode == 2 and "no such file or run folder" in done.stderr


@pytest.mark.parametrize("flags", [("--op", "long_conv"), ("--json", "--markdown")])
def test_flags_that_do_nothing_are_refused(tmp_path, flags):
    run = write_run(tmp_path / "run", [timed()])
    done = in_this_process("compare", run, run, *flags, cwd=tmp_path)
    assert done.returncode == 2


@pytest.mark.parametrize("columns", [60, 140])
def test_terminal_text_fits_and_names_everything(tmp_path, columns):
    before = write_run(tmp_path / "before", [timed(1024), timed(2048)])
    after = write_run(tmp_path / "after", [timed(1024, ns=1.2e6), timed(2048)])
    done = in_this_process("compare", before, after, cwd=tmp_path, COLUMNS=str(columns))
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert "1 slower, 1 same" in done.stdout and "1.20 ms" in done.stdout
    assert done.stdout.index("slower") < done.stdout.index("same")


def test_files_for_a_pull_request(tmp_path):
    """Markdown, JSON and the figure; other people's names are no markup."""
    hostile = [timed(impl=HOSTILE, ns=ns) for ns in (1e6, 1.3e6)]
    folders = [
        write_run(tmp_path / name, [point, timed()])
        for name, point in zip("ab", hostile, strict=True)
    ]
    done = in_this_process("compare", *folders, "-o", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0 and "\x1b" not in done.stdout
    out = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(out) == {f"comparison.{kind}" for kind in ("md", "json", "png", "svg")}
    markdown = out["comparison.md"].decode()
    assert "<script>" not in markdown and "**slower**" in markdown and "1 the same" in markdown
    assert b"slower" in out["comparison.svg"] and b"after / before" in out["comparison.svg"]
