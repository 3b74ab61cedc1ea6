"""runs and show: run folders as they lie on disk, whole, unfinished and damaged."""

from __future__ import annotations

import json

import pytest

from chela_bench.bench.store import RunFolder, being_written
from tests.factories import h100_sweep, make_failure, make_point, make_run
from tests.running import ROOT, in_this_process


def _write(folder, run, points):
    with RunFolder(folder) as held:
        held.write_run(run)
        for point in points:
            held.append(point, [1e6])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run, an interrupted one of changed code, and two damaged ones."""
    top = tmp_path_factory.mktemp("runs")
    _write(top / "b-old", make_run(run_id="b-old", planned_points=2), [
        make_point(), make_failure("oom", "out of memory", 2048),
    ])  # fmt: skip
    changes = {"started_utc": "2026-03-01T00:00:00Z", "finished_utc": None, "git_dirty": True}
    settings = {"impls": {"linear_attention": [], "chela_layer": []}}
    _write(
        top / "a-new",
        make_run(run_id="a-new", planned_points=9, settings=settings, **changes),
        [make_point()],
    )
    _write(top / "torn", make_run(), [make_point()])
    (top / "torn" / "points.jsonl").write_text('{"op": "x\n')
    (top / "headless").mkdir()
    (top / "headless" / "points.jsonl").touch()
    (top / "notes").mkdir()
    (top / "file").touch()
    return top


def test_runs_are_listed_newest_first_and_damaged_ones_last(folder):
    done = in_this_process("runs", folder, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["folder"] == str(folder)
    new, old, headless, torn = document["runs"]
    assert new == {
        "folder": str(folder / "a-new"),
        "run_id": "a-new",
        "state": "interrupted",
        "started_utc": "2026-03-01T00:00:00Z",
        "finished_utc": None,
        "card": "NVIDIA H100 80GB HBM3",
        "git_sha": "0123456789abcdef0123456789abcdef01234567",
        "git_dirty": True,
        "ops": ["linear_attention", "chela_layer"],
        "planned_points": 9,
        "outcomes": {"ok": 1},
    }
    assert (old["run_id"], old["state"]) == ("b-old", "finished")
    assert old["ops"] == ["linear_attention"]
    assert old["outcomes"] == {"ok": 1, "oom": 1}
    assert (headless["state"], torn["state"]) == ("damaged", "damaged")
    assert "it has no run.json" in headless["reason"]
    assert "points.jsonl, line 1" in torn["reason"]


def test_the_list_says_the_same_in_words(folder):
    done = in_this_process("runs", cwd=folder.parent, COLUMNS="200")
    assert done.returncode == 2  # ./runs
    done = in_this_process("runs", folder.name, cwd=folder.parent, COLUMNS="200")
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        f"{folder.name}/a-new  2026-03-01 00:00 UTC  interrupted",
        "  1 point of 9 planned: 1 ok",
        "  linear_attention, chela_layer on NVIDIA H100 80GB HBM3, commit 0123456+",
    ]
    assert lines[3:6] == [
        f"{folder.name}/b-old  2026-01-02 03:04 UTC  finished",
        "  2 points: 1 ok, 1 oom",
        "  linear_attention on NVIDIA H100 80GB HBM3, commit 0123456",
    ]
    assert lines[6].endswith("headless  damaged")
    assert len(lines) == 10


@pytest.mark.parametrize("columns", ["40", "80"])
def test_the_list_fits(folder, columns):
    done = in_this_process("runs", folder.name, cwd=folder.parent, COLUMNS=columns)
    assert "\x1b" not in done.stdout
    for line in done.stdout.splitlines():
        assert len(line) <= int(columns) or " " not in line.strip()


def test_a_run_that_is_being_written_is_running(folder):
    assert not being_written(folder / "a-new")
    assert not being_written(folder / "notes")
    with RunFolder(folder / "a-new"):
        assert being_written(folder / "a-new")
        document = json.loads(in_this_process("runs", folder, "--json").stdout)
    assert document["runs"][0]["state"] == "running"


def test_no_runs(tmp_path):
    done = in_this_process("runs", tmp_path)
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["no", "runs"])
    assert json.loads(in_this_process("runs", tmp_path, "--json").stdout)["runs"] == []


def test_show_prints_a_run_and_writes_nothing(tmp_path):
    points = [*h100_sweep(), make_failure("wrong", "too far off", impl="fft")]
    _write(tmp_path / "run", make_run(planned_points=len(points)), points)
    before = sorted(tmp_path.rglob("*"))
    done = in_this_process("show", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert "NVIDIA H100 80GB HBM3 | torch 2.11.0 | triton 3.6.0" in first
    assert "linear_attention fwd bf16" in done.stdout
    done = in_this_process("show", tmp_path / "run", "--json")
    document = json.loads(done.stdout)
    assert [point["key"] for point in document["points"]] == [point.key for point in points]
    assert document["run"]["run_id"] == make_run().run_id
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_show_fits_and_carries_no_colour(columns):
    done = in_this_process("show", ROOT / "docs" / "results" / "h100", COLUMNS=columns)
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= int(columns)
