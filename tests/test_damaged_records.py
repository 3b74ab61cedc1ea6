"""Records that a disk, an editor or a script has damaged: one error, and no way through."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from chela_bench.bench import baseline, paths, sources, store
from chela_bench.bench.noise import noise_runs, write_noise
from chela_bench.bench.sources import Machine
from chela_bench.errors import BaselineProblem, EnvironmentProblem, RecordError
from chela_bench.profiles.inventory import unwritable
from tests.records import atlas_json, atlas_row, pytest_json, timed, write_run
from tests.running import in_this_process, tiny_config

LONG = "x" * 300
HUGE = 10**400


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", [timed()])


@pytest.fixture
def command(tmp_path):
    """`chela-bench ...` in the test's folder: its exit code, and its one line of error."""

    def called(*words):
        done = in_this_process(*words, cwd=tmp_path)
        assert "Traceback" not in done.stderr
        return done.returncode, " ".join(done.stderr.split())

    return called


def edited(path, change):
    """Its only record, as `change` leaves it."""
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record) + "\n")


def with_value(path, where, value):
    *above, last = where.split(".")

    def change(record):
        for name in above:
            record = record[name]
        record[last] = value

    edited(path, change)


@pytest.fixture
def saved(tmp_path, run, command):
    """A promoted baseline's folder."""
    assert command("baseline", "save", run, "--name", "first")[0] == 0
    assert command("baseline", "promote", "first")[0] == 0
    [path] = (tmp_path / "baselines").glob("*/first")
    return path


# Numbers


@pytest.mark.parametrize(
    "where",
    ["time_ns.median", "time_ns.n", "shape.T", "floor_ns", "parameters", "hbm.gpm_bytes",
     "hbm.model_bytes", "telemetry.memory_bytes", "static.spill_load_bytes", "config.BLOCK_T",
     "peak_bytes", "launches", "flops"],
)  # fmt: skip
def test_a_number_that_no_float_holds_is_refused(run, where):
    with_value(run / store.POINTS, where, HUGE)
    with pytest.raises(RecordError, match=f"points.jsonl, line 1: {where}: "):
        store.load_points(run)


@pytest.mark.parametrize("ns", [-1, 0, -HUGE, HUGE, 2**63])
def test_samples_that_are_no_times_are_refused_where_they_are_read(run, command, ns):
    with_value(run / store.SAMPLES, "samples_ns", [ns, 5])
    with pytest.raises(RecordError, match=r"samples.jsonl, line 1: samples_ns"):
        store.load_samples(run)
    for words in (("report", run), ("compare", run, run), ("baseline", "save", run)):
        code, said = command(*words)
        assert code == 2 and "samples.jsonl, line 1" in said


@pytest.mark.parametrize("where", ["smem_bytes", "regs", "spill_load_bytes", "config", "constants"])
def test_a_compiled_kernel_of_such_a_number_is_neither_saved_nor_gated(tmp_path, command, where):
    value = {"BLOCK_T": HUGE} if where in ("config", "constants") else HUGE
    bad, good = tmp_path / "bad.json", atlas_json(tmp_path / "good.json")
    atlas_json(bad, atlas_row(**{where: value}))
    code, said = command("baseline", "save", bad)
    assert code == 2 and f"bad.json, row 1: {where}" in said
    assert command("gate", bad, "--baseline", good)[0] == 2
    assert command("gate", good, "--baseline", bad)[0] == 4


def test_a_time_of_pytest_that_no_float_holds_is_refused(tmp_path):
    path = pytest_json(tmp_path / "now.json", [timed()])
    document = json.loads(path.read_text())
    document["benchmarks"][0]["stats"]["data"] = [HUGE]
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match="not as pytest-benchmark writes it"):
        sources.read(path)


@pytest.mark.parametrize("seconds", [1e-300, 1e290])
def test_a_time_that_no_clock_can_take_is_refused(tmp_path, seconds):
    """The ratio of two such is infinite."""
    path = tmp_path / "now.json"
    stats = {"data": [seconds] * 40}
    path.write_text(json.dumps({"benchmarks": [{"fullname": "test_sum", "stats": stats}]}))
    with pytest.raises(RecordError, match=r"test_sum holds a time of .* ns; measure it again"):
        sources.read(path)


@pytest.mark.parametrize("extra", [5, ["op", "impl", "outcome"], "op"])
def test_extra_info_that_is_no_table_is_refused(tmp_path, extra):
    path = pytest_json(tmp_path / "now.json", [timed()])
    document = json.loads(path.read_text())
    document["benchmarks"][0]["extra_info"] = extra
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match="not as pytest-benchmark writes it"):
        sources.read(path)


# Baselines


@pytest.mark.parametrize("damage", [os.unlink, lambda path: path.write_text("")])
def test_nothing_passes_against_a_baseline_of_nothing(tmp_path, run, command, damage):
    then = write_run(tmp_path / "then", [timed()])
    damage(then / store.POINTS)
    code, said = command("gate", run, "--baseline", then)
    assert code == 4 and "holds no points to hold against" in said
    (tmp_path / "none.json").write_text('{"benchmarks": []}')
    assert command("gate", run, "--baseline", "none.json")[0] == 4


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no SHA-256 of run.json"),
        ({"a\0b": "0"}, r"names a file elsewhere, or of another kind: 'a\x00b'"),
        ({"\ud800": "0"}, r"names a file elsewhere, or of another kind: '\ud800'"),
        ({"atlas.json": "0"}, "names a file elsewhere, or of another kind: 'atlas.json'"),
    ],
)
def test_every_file_of_a_baseline_is_held_to_its_digest(saved, run, command, files, words):
    path = saved / baseline.HEADER
    header = json.loads(path.read_text())
    path.write_text(json.dumps({**header, "files": files}))
    for asked in (("gate", run, "--baseline", "baselines"), ("baseline", "promote", "first")):
        code, said = command(*asked)
        assert code == 4 and words in said
    assert command("baseline", "list")[0] == 0


@pytest.mark.parametrize("file", [store.POINTS, store.SAMPLES])
def test_a_file_without_its_digest_is_none_of_a_baseline(saved, run, command, file):
    edited(saved / baseline.HEADER, lambda header: header["files"].pop(file))
    code, said = command("gate", run, "--baseline", "baselines")
    assert code == 4 and f"has no SHA-256 of {file}" in said


def test_a_current_baseline_of_an_endless_name(saved, run, command):
    path = saved.parent / baseline.CURRENT
    path.write_text(json.dumps({**json.loads(path.read_text()), "name": LONG}))
    assert command("baseline", "list")[0] == 0
    code, said = command("gate", run, "--baseline", "baselines")
    assert code == 4 and "which is not there; promote another" in said
    assert command("baseline", "promote", "first")[0] == 0


def test_other_folders_are_no_baselines(tmp_path, run, command):
    (tmp_path / "src" / "package").mkdir(parents=True)
    code, said = command("baseline", "promote", "package", "--baselines", ".")
    assert code == 4 and "there are: none" in said


# Noise


@pytest.fixture
def noise(tmp_path):
    """The file of the runs' card."""
    machine = Machine("cuda", "NVIDIA H100 80GB HBM3", "GPU-0")
    record = noise_runs(machine, {"a": [[100], [103]]}).record
    return write_noise(tmp_path / "baselines", machine, record)


@pytest.mark.parametrize("field", ["by_key", "hbm_by_key"])
@pytest.mark.parametrize("size", [-3, 1, 1e308])
def test_noise_is_a_share(noise, run, command, field, size):
    with_value(noise, field, {"a": size})
    code, said = command("compare", run, run)
    assert code == 4 and f"{field}.a: Input should be" in said


@pytest.mark.parametrize("text", ["{", '{"schema_version": 7}', '{"schema_version": 1}'])
def test_damaged_noise_is_measured_again(noise, run, command, text):
    noise.write_text(text)
    code, said = command("compare", run, run)
    assert code == 4 and said.endswith("measure it again: chela-bench noise")


def test_a_machine_whose_times_double_has_no_noise_to_keep():
    with pytest.raises(EnvironmentProblem, match="times of a differ by 150 % between runs"):
        noise_runs(Machine("cpu", "CPU"), {"a": [[100], [250]]})


def test_what_is_steady_beside_them_is_kept():
    samples = {"a": [[100], [250]], "b": [[100], [101]], "c": [[100], [102]]}
    found = noise_runs(Machine("cpu", "CPU"), samples, {"a": [1, 1], "b": [1, 2]})
    record, unsteady = found.record, found.unsteady
    assert record.by_key == {"b": 0.01, "c": 0.02}
    assert list(record.samples_ns) == ["b", "c"]
    assert 0.01 < record.typical <= 0.02 and record.hbm_by_key == {}
    assert unsteady == ["the times of a differ by 150 %", "the bytes of b differ by 100 %"]


# Paths


def test_what_the_system_does_not_tell_of_a_path_is_one_error(tmp_path, monkeypatch):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert not paths.exists(tmp_path / "none" / "x") and not paths.is_dir(Path(__file__))
    for ask in (paths.exists, paths.is_dir, paths.is_file):
        with pytest.raises(RecordError, match=f"cannot read {loop}: Too many levels"):
            ask(loop)
        with pytest.raises(BaselineProblem, match="File name too long"):
            ask(tmp_path / LONG, BaselineProblem)

    def closed(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", closed)
    for ask in (paths.exists, paths.is_dir, paths.is_file, paths.folders):
        with pytest.raises(RecordError, match=f"cannot read {tmp_path}: Permission denied"):
            ask(tmp_path)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("runs", "{}"), 2),
        (("show", "{}"), 2),
        (("report", "{}"), 2),
        (("report", "run", "{}", "--compare", "-o", "out"), 2),
        (("report", "run", "other", "--compare", "--baselines", "{}", "-o", "out"), 4),
        (("compare", "run", "{}"), 2),
        (("compare", "run", "run", "--baselines", "{}"), 4),
        (("gate", "run", "--baseline", "{}"), 4),
        (("gate", "{}", "--baseline", "run"), 2),
        (("gate", "run", "--baseline", "run", "--baselines", "{}"), 4),
        (("baseline", "save", "{}"), 2),
        (("baseline", "save", "run", "--baselines", "{}"), 6),
        (("baseline", "list", "--baselines", "{}"), 4),
        (("baseline", "promote", "x", "--baselines", "{}"), 4),
        (("profile", "--from", "{}"), 2),
        (("profile", "--from", "{}.ncu-rep"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("path", [LONG, "loop"])
def test_every_command_names_a_path_that_it_cannot_ask_about(tmp_path, run, command, words, code,
                                                             path):  # fmt: skip
    write_run(tmp_path / "other", [timed()])
    for name in ("loop", "loop.ncu-rep"):
        (tmp_path / name).symlink_to(name)
    found, said = command(*(word.format(path) for word in words))
    assert found == code and path in said and "Usage" not in said


def test_the_doctor_finds_in_the_way_what_a_sweep_finds(tmp_path, command):
    config = tiny_config(tmp_path)
    for name, target in (("loop", "loop"), ("astray", "nowhere"), ("device", "/dev/full")):
        (tmp_path / name).symlink_to(target)
    for out in ("loop", "astray", "device", LONG, f"loop/{LONG}"):
        code, said = command("sweep", "--config", config, "--impl", "chunked", "--out", out)
        assert code == 6 and "cannot write" in said
        assert unwritable(tmp_path / out)
    assert unwritable(tmp_path / "new" / "folder") is None


def test_a_closed_folder_is_listed_beside_the_runs(tmp_path, run, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "other").mkdir()
    real = Path.stat

    def stat(path, **options):
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    done = in_this_process("runs", tmp_path, "--json")
    rows = [(row["folder"], row["state"]) for row in json.loads(done.stdout)["runs"]]
    assert rows == [(str(run), "finished"), (str(tmp_path / "closed"), "damaged")]
