"""Records and run folders: what is written can be read, and what is damaged is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from chela_bench.bench import store
from chela_bench.cli.derived import write_report, write_tables
from chela_bench.errors import EnvironmentProblem, RecordError
from chela_bench.records import Point, document
from tests.factories import make_failure, make_point, make_run


@pytest.fixture
def points():
    return [make_point(shape={"B": 1, "T": tokens, "H": 1, "K": 16, "V": 16})
            for tokens in (1024, 2048, 4096)]  # fmt: skip


@pytest.fixture
def folder(tmp_path, points):
    with store.RunFolder(tmp_path / "run") as writer:
        writer.write_run(make_run())
        for point in points:
            writer.append(point, [10.4, 11.6])
    return tmp_path / "run"


def test_what_is_written_is_read(folder, points):
    run, loaded = store.load_run(folder)
    assert run == make_run()
    assert loaded == points
    assert store.load_samples(folder) == {point.key: [10, 12] for point in points}


def test_a_record_survives_json(points):
    for point in [*points, make_failure("oom", "out of memory")]:
        assert Point.model_validate_json(point.model_dump_json()) == point
    text = json.loads(document(make_run(), points))
    assert set(text) == {"run", "points"}
    assert text["points"][0]["time_ns"].keys() == {"median", "q1", "q3", "min", "n"}


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_last_line_is_dropped_then_cut_off(folder, points, cut):
    path = folder / store.POINTS
    path.write_bytes(path.read_bytes()[:-cut])
    assert store.load_points(folder) == points[:-1]
    with store.RunFolder(folder) as writer:
        writer.append(points[-1], [])
    assert store.load_points(folder) == points
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_damaged_line_in_the_middle_is_named(folder):
    path = folder / store.POINTS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:50], lines[2], ""]))
    with pytest.raises(RecordError, match=r"points\.jsonl, line 2"):
        store.load_points(folder)


def test_a_point_measured_again_counts_once(folder, points):
    again = points[0].model_copy(update={"spent_s": 99.0})
    with store.RunFolder(folder) as writer:
        writer.append(again, [5.0])
    loaded = store.load_points(folder)
    assert len(loaded) == 3
    assert again in loaded
    assert store.load_samples(folder)[again.key] == [5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run folder"),
        ("", "not a run record"),
        ("[]", "not a run record"),
        ('{"schema_version": 99}', "has schema_version 99; this chela-bench reads 1"),
        ('{"schema_version": 1}', "run_id: Field required"),
    ],
)
def test_a_header_that_is_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / store.RUN).write_text(content)
    with pytest.raises(RecordError, match=message):
        store.load_run(tmp_path)


def test_a_failure_needs_a_reason_and_carries_no_time(points):
    data = points[0].model_dump()
    with pytest.raises(ValidationError, match="carries no time"):
        Point.model_validate({**data, "outcome": "wrong", "reason": "off"})
    with pytest.raises(ValidationError, match="needs a reason"):
        Point.model_validate({**data, "outcome": "oom", "time_ns": None, "wall_ns": None})
    with pytest.raises(ValidationError, match="needs time_ns or wall_ns"):
        Point.model_validate({**data, "time_ns": None, "wall_ns": None})
    with pytest.raises(ValidationError):
        Point.model_validate({**data, "error_rel": float("nan")})


def test_a_reason_is_one_line_of_bounded_length():
    point = make_failure("crash", "a\n\tb  " + "x" * 10_000)
    assert point.reason.startswith("a b x")
    assert len(point.reason) == 500


def test_derived_tables_hold_every_sample_and_point(folder):
    import pandas as pd

    run, points = store.load_run(folder)
    write_tables(folder, run, points)
    samples = pd.read_parquet(folder / "samples.parquet")
    assert len(samples) == 6
    assert set(samples["key"]) == {point.key for point in points}
    assert len(pd.read_csv(folder / "results.csv")) == 3
    write_report(folder / "report", run, points)
    names = {path.name for path in (folder / "report").iterdir()}
    assert {"index.html", "summary.md", "results.csv"} < names
    assert any(name.endswith(".png") for name in names)


def test_nothing_half_written_stays_when_writing_fails(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_text("old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.write_atomically(target, b"new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot write the run folder"):
        store.RunFolder(tmp_path / "runs" / "x")
    with pytest.raises(EnvironmentProblem, match="cannot write the report"):
        write_report(Path(tmp_path / "runs" / "x"), make_run(), [])
