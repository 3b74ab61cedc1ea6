"""Records and run folders: what is written can be read, and what is damaged is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from chela_bench.bench import store
from chela_bench.cli.derived import write_report, write_tables
from chela_bench.errors import EnvironmentProblem, RecordError
from chela_bench.records import Point, document
from tests.factories import make_failure, make_point, make_run
from tests.running import environment


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
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*/x/"):
        write_report(Path(tmp_path / "runs" / "x"), make_run(), [])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"key": "a", "samples_ns": ["long"]}', "samples_ns.0: Input should be a valid integer"),
        ('{"key": "a"}', "samples_ns: Field required"),
        ("[1, 2]", "record: Input should be an object"),
        ("null", "record: Input should be an object"),
    ],
)
def test_a_line_of_samples_that_is_none_is_named(folder, line, problem):
    path = folder / store.SAMPLES
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(RecordError) as error:
        store.load_samples(folder)
    assert str(error.value).startswith(f"{path}, line 4: {problem}")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema_version": 2}, "schema_version 2; this chela-bench reads 1"),
        ({"shape": {"B": 1}}, "a shape has at least B and T; this one has B"),
        ({"shape": {"T": 1}}, "a shape has at least B and T; this one has T"),
        ({"shape": {"B": 1, "T": 0}}, "greater than or equal to 1"),
    ],
)
def test_a_point_of_another_kind_is_named_with_its_line(folder, points, changes, problem):
    path = folder / store.POINTS
    damaged = json.dumps({**points[0].model_dump(mode="json"), **changes})
    path.write_text(path.read_text() + damaged + "\n")
    with pytest.raises(RecordError, match=r"points\.jsonl, line 4: .*" + problem):
        store.load_points(folder)


def test_a_reason_that_is_no_unicode_can_be_written(folder):
    point = make_failure("crash", "bytes \udcff of \ud800 a name")
    assert point.reason == "bytes ? of ? a name"
    with store.RunFolder(folder) as writer:
        writer.append(point, [])
    assert point in store.load_points(folder)


def test_a_full_disk_is_answered_with_the_way_to_go_on(folder, points, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    with store.RunFolder(folder) as writer:
        monkeypatch.setattr(os, "fsync", full)
        for write in (
            lambda: writer.append(points[0], [1.0]),
            lambda: writer.write_run(make_run()),
        ):
            with pytest.raises(EnvironmentProblem) as error:
                write()
            assert str(error.value) == (
                f"cannot write to {folder}: No space left on device; what was measured before is "
                f"kept, go on with --resume {folder}"
            )


def test_a_folder_that_disappears_is_answered_likewise(folder, points):
    with store.RunFolder(folder) as writer:
        shutil.rmtree(folder)
        with pytest.raises(EnvironmentProblem, match=f"{folder} was removed or replaced"):
            writer.append(points[0], [1.0])


@pytest.mark.parametrize("name", [store.RUN, store.POINTS, store.SAMPLES])
def test_a_file_that_cannot_be_read_is_named(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(RecordError, match=f"cannot read {folder / name}: Is a directory"):
        _ = store.load_run(folder), store.load_samples(folder)


def test_lost_samples_are_named(folder, points):
    path = folder / store.SAMPLES
    path.write_text(path.read_text().splitlines(keepends=True)[1])
    with pytest.raises(RecordError) as error:
        write_tables(folder, *store.load_run(folder))
    assert str(error.value) == f"{folder} holds no samples for {points[0].key} (2 such points)"


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "link", tmp_path / "far" / "file"
    link.symlink_to("far/file")
    for data in (b"made", b"replaced"):
        store.write_atomically(link, data)
        assert link.readlink() == Path("far/file") and target.read_bytes() == data
    assert list((tmp_path / "far").iterdir()) == [target]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        store.write_atomically(loop, b"")
    assert loop.is_symlink()


def test_devices_and_pipes_are_written_into(tmp_path):
    pipe, device = tmp_path / "pipe", tmp_path / "device"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    store.write_atomically(pipe, b"through")
    assert os.read(reader, 100) == b"through" and pipe.is_fifo()
    os.close(reader)
    device.symlink_to(os.devnull)
    store.write_atomically(device, b"gone")
    assert device.is_char_device() and Path(os.devnull).is_char_device()
    device.unlink()
    device.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        store.write_atomically(device, b"gone")


@pytest.mark.parametrize("name", ["stdout", "file"])
def test_what_standard_output_goes_to_is_written_into(tmp_path, name):
    """Through its descriptor: nothing that is printed before or after is lost."""
    code = (
        "import os; from pathlib import Path; from chela_bench.bench import store; "
        f"os.write(1, b'a'); store.write_atomically(Path({name!r}), b'b'); os.write(1, b'c')"
    )
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    with (tmp_path / "file").open("wb") as handle:
        subprocess.run(
            [sys.executable, "-c", code], stdout=handle, cwd=tmp_path, env=environment(), check=True
        )
    assert (tmp_path / "file").read_bytes() == b"abc"


def test_a_folder_that_is_none_says_what_was_wanted(tmp_path):
    with pytest.raises(EnvironmentProblem) as error:
        write_report(Path("/dev/full"), make_run(), [])
    assert str(error.value) == (
        "cannot write /dev/full/index.html: /dev/full is no folder, and a folder was wanted; give "
        "another place"
    )
