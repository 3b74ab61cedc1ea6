"""Baselines: saved whole, listed, promoted by name, and moved by nobody else; and A/A noise."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from chela_bench.bench import baseline
from chela_bench.bench.again import _noise_record, noise_runs
from chela_bench.bench.modelled import modelled_now
from chela_bench.bench.sources import Machine
from tests.factories import make_run
from tests.records import atlas_json, atlas_row, pytest_json, timed, write_run
from tests.running import in_this_process, tiny_config

KEY = "NVIDIA-H100-80GB-HBM3_driver-580_torch-2.11.0_triton-3.6.0"


@pytest.fixture
def run(tmp_path):
    """`chela-bench baseline ...` in the test's folder."""
    return lambda *words: in_this_process("baseline", *words, cwd=tmp_path)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def test_saving_promotes_nothing_and_changes_nothing(tmp_path, run):
    source = write_run(tmp_path / "run", [timed()])
    assert run("save", source, "--name", "first").returncode == 0
    folder = tmp_path / "baselines"
    assert not (folder / KEY / "current.json").exists()
    assert run("promote", "first").returncode == 0
    before = files(folder)
    assert run("save", source, "--name", "second").returncode == 0
    assert {name: before[name] for name in before} == {n: files(folder)[n] for n in before}
    assert json.loads(before[f"{KEY}/current.json"])["name"] == "first"
    found = json.loads(run("list", "--json").stdout)["baselines"]
    assert [(one["name"], one["current"], one["problem"]) for one in found] == [
        ("first", True, None), ("second", False, None),
    ]  # fmt: skip
    text = run("list").stdout
    assert KEY in text and "* first" in text and "  second" in text


def test_a_name_is_taken_once(tmp_path, run):
    source = write_run(tmp_path / "run", [timed()])
    run("save", source, "--name", "first")
    before = files(tmp_path / "baselines")
    done = run("save", source, "--name", "first")
    assert done.returncode == 2 and "never changes" in done.stderr
    assert files(tmp_path / "baselines") == before


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "x" * 200])
def test_names_that_are_no_file_names_are_refused(tmp_path, run, name):
    source = write_run(tmp_path / "run", [timed()])
    done = run("save", source, "--name", name)
    if name:
        assert done.returncode == 2 and "takes letters" in done.stderr
        assert not (tmp_path / "baselines").exists()


def test_the_name_of_the_file_that_names_the_promoted_one_is_taken(tmp_path, run):
    source = write_run(tmp_path / "run", [timed()])
    done = run("save", source, "--name", "current.json")
    assert done.returncode == 2 and "give another name" in done.stderr
    assert not (tmp_path / "baselines").exists()
    assert run("save", source, "--name", "current").returncode == 0
    assert run("promote", "current").returncode == 0


def test_a_machine_whose_name_is_no_text_is_kept(tmp_path, run):
    _, taken = timed()
    source = tmp_path / "node.json"
    benchmark = {"fullname": "test", "stats": {"data": [ns / 1e9 for ns in taken]}}
    document = {"machine_info": {"node": "x\ud801"}, "benchmarks": [benchmark]}
    source.write_text(json.dumps(document))
    done = run("save", source, "--name", "first")
    assert done.returncode == 0, done.stderr
    [header] = (tmp_path / "baselines").glob("*/first/baseline.json")
    assert json.loads(header.read_bytes())["machine"]["name"] == "x?"
    assert run("promote", "first").returncode == 0


@pytest.mark.parametrize("text", ["", "{", '{"points": []}'])
def test_what_holds_nothing_is_not_saved(tmp_path, run, text):
    source = tmp_path / "now.json"
    source.write_text(text)
    assert run("save", source).returncode == 2
    assert run("save", write_run(tmp_path / "run", [])).returncode == 2
    assert not (tmp_path / "baselines").exists()


def test_every_kind_is_kept_and_read_back(tmp_path, run):
    sources = [
        write_run(tmp_path / "run", [timed()]),
        pytest_json(tmp_path / "pytest.json", [timed()]),
        atlas_json(tmp_path / "atlas.json"),
    ]
    for number, source in enumerate(sources):
        done = run("save", source, "--name", f"n{number}")
        assert done.returncode == 0, done.stderr
    for path in (tmp_path / "baselines").glob("*/n*"):
        measured = baseline._load(path)
        assert measured.entries or measured.static
    assert not list((tmp_path / "baselines").glob("*/.saving-*"))


def test_modelled_bytes_are_kept_with_kernels_and_gate(tmp_path, run, monkeypatch):
    """The formulas' own bytes at bench.toml's shapes; a formula that grew fails."""
    rows = atlas_json(tmp_path / "atlas.json", atlas_row())
    done = run("save", rows, "--name", "first")
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "baselines").glob("*/first")
    kept = [json.loads(line) for line in (path / "models.json").read_text().splitlines()]
    ops = {row["case"]["op"] for row in kept}
    assert {"linear_attention", "short_long_conv", "chela_layer"} <= ops and len(kept) > 50
    monkeypatch.chdir(tmp_path)
    done = in_this_process("gate", rows, "--baseline", path, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[:2000]
    grown = {row["case"]["impl"] for row in kept if row["case"]["op"] == "short_long_conv"}
    monkeypatch.setattr(
        "chela_bench.bench.gating.modelled_now",
        lambda case: modelled_now(case) + (case.op == "short_long_conv"),
    )
    done = in_this_process("gate", rows, "--baseline", path, "--json", cwd=tmp_path)
    failed = [c for c in json.loads(done.stdout)["points"] if c["outcome"] == "failed"]
    assert done.returncode == 1 and failed
    assert {check["name"].split("/")[1] for check in failed} == grown
    monkeypatch.setattr("chela_bench.bench.gating.modelled_now", lambda case: None)
    done = in_this_process("gate", rows, "--baseline", path, "--json", cwd=tmp_path)
    assert done.returncode == 1 and "implementation is gone" in done.stdout


def test_promoting_what_is_not_there(tmp_path, run):
    done = run("promote", "first")
    assert done.returncode == 4 and "no folder of baselines" in done.stderr
    run("save", write_run(tmp_path / "run", [timed()]), "--name", "first")
    done = run("promote", "second")
    assert done.returncode == 4 and "there are: first" in done.stderr


def test_a_name_of_two_machines_wants_to_know_which(tmp_path, run):
    other = make_run(versions={"torch": "2.13.0", "triton": "3.7.1"})
    run("save", write_run(tmp_path / "a", [timed()]), "--name", "first")
    run("save", write_run(tmp_path / "b", [timed()], other), "--name", "first")
    done = run("promote", "first")
    assert done.returncode == 2 and "--machine" in done.stderr
    assert run("promote", "first", "--machine", KEY).returncode == 0


def test_a_damaged_one_is_not_promoted_and_is_listed(tmp_path, run):
    run("save", write_run(tmp_path / "run", [timed()]), "--name", "first")
    path = tmp_path / "baselines" / KEY / "first"
    (path / "points.jsonl").write_text("")
    assert run("promote", "first").returncode == 4
    (path / "baseline.json").write_text("{")
    done = run("list")
    assert done.returncode == 0 and "half of it" in " ".join(done.stdout.split())


def test_a_folder_that_cannot_be_written(tmp_path, run):
    (tmp_path / "baselines").write_text("a file")
    done = run("save", write_run(tmp_path / "run", [timed()]))
    assert done.returncode == 6 and "cannot write" in done.stderr


def test_noise_is_the_largest_change_between_two_runs():
    machine = Machine("cuda", "NVIDIA H100", "GPU-0")
    record, _ = _noise_record(
        machine, {"a": [[100, 100], [103, 103], [101]], "b": [[50], [50], [50]]}
    )
    assert record.by_key == {"a": 0.03, "b": 0.0}
    assert 0.0 < record.typical <= 0.03
    again, _ = _noise_record(machine, {"a": [[100], [100]]}, {"a": [1000, 1010, 990]})
    assert again.by_key == {"a": 0.0} and again.hbm_by_key == {"a": pytest.approx(0.020202)}


def test_noise_is_measured_kept_and_used(tmp_path, forked_workers):
    """On this CPU: two runs in processes of their own, kept under its name."""
    config = tiny_config(tmp_path)
    words = ("--config", config, "--impl", "chunked", "--device", "cpu")
    done = in_this_process("noise", *words, "--runs", 2, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    [row] = found["points"]
    assert row["noise"] >= 0 and "chunked" in row["key"]
    record = json.loads((tmp_path / found["file"]).read_text())
    assert [len(runs) for runs in record["samples_ns"].values()] == [2]


HERE = Machine("cuda", "NVIDIA H100", "GPU-0", driver="580.95", torch="2.11.0", triton="3.6.0")
OLD = {"a": [[100], [103]], "b": [[100], [110]], "c": [[100], [120]]}


@pytest.fixture
def told(tmp_path, monkeypatch):
    """`chela-bench noise` in the test's folder; only the measuring is played."""
    monkeypatch.setattr("chela_bench.cli.noise.choose_device", lambda wanted: "cpu")

    def run(samples, moved=None, *, machine=HERE, as_json=False):
        found = noise_runs(machine, samples, moved or {})
        monkeypatch.setattr("chela_bench.cli.noise.measure_noise", lambda *_, **__: found)
        words = ("--device", "cpu", "--impl", "chunked", *(["--json"] if as_json else []))
        return in_this_process("noise", *words, cwd=tmp_path)

    return run


def kept_in(tmp_path):
    return json.loads((tmp_path / "baselines" / "noise" / "GPU-0.json").read_text())


def test_noise_of_a_smaller_selection_keeps_the_others(tmp_path, told):
    first = told(OLD, {"a": [10, 11], "b": [10, 12], "c": [10, 13]})
    assert first.returncode == 0 and "measured before" not in first.stdout
    done = told({"a": [[100], [101]]}, {"a": [10, 10]})
    record = kept_in(tmp_path)
    assert record["by_key"] == {"a": 0.01, "b": 0.1, "c": 0.2}
    assert record["samples_ns"] == {**OLD, "a": [[100], [101]]}
    assert record["hbm_by_key"] == {"a": 0.0, "b": 0.2, "c": 0.3}
    assert record["hbm_bytes"] == {"a": [10, 10], "b": [10, 12], "c": [10, 13]}
    every, _ = _noise_record(HERE, record["samples_ns"])
    assert record["typical"] == every.typical > 0.1
    assert "2 points that were measured before are kept" in done.stdout
    assert f"stay within {every.typical * 100:.2f} % on" in done.stdout
    assert " b\n" not in done.stdout  # of what was measured now alone
    document = json.loads(told({"d": [[100], [101]]}, as_json=True).stdout)
    assert document["kept"] == 3 and [row["key"] for row in document["points"]] == ["d"]
    assert document["typical"] == kept_in(tmp_path)["typical"]


def test_bytes_that_were_not_counted_now_are_kept(tmp_path, told):
    told(OLD, {"a": [10, 11]})
    done = told({key: [[100], [101]] for key in OLD})
    assert kept_in(tmp_path)["hbm_by_key"] == {"a": 0.1} and "before" not in done.stdout


def test_noise_that_doubled_now_is_not_kept_from_before(tmp_path, told):
    told(OLD, {"a": [10, 11], "b": [10, 12]})
    done = told({"a": [[100], [300]], "b": [[100], [101]]}, {"a": [10, 10], "b": [10, 20]})
    assert done.returncode == 6 and "1 point that was measured before is kept" in done.stdout
    record = kept_in(tmp_path)
    assert record["by_key"] == {"b": 0.01, "c": 0.2}
    assert record["hbm_by_key"] == record["hbm_bytes"] == {}


@pytest.mark.parametrize("fact", ["name", "driver", "torch", "triton"])
def test_noise_of_another_machine_is_replaced(tmp_path, told, fact):
    told(OLD, machine=replace(HERE, **{fact: "another"}))
    done = told({"a": [[100], [101]]}, as_json=True)
    assert json.loads(done.stdout)["kept"] == 0
    assert kept_in(tmp_path)["by_key"] == {"a": 0.01}


@pytest.mark.parametrize(
    "damage",
    [
        {"by_key": {"b": 7}}, {"samples_ns": {"b": [[], [100]]}},
        {"samples_ns": {"b": [[100], [300]]}}, {"schema_version": 7}, None,
    ],
)  # fmt: skip
def test_noise_that_is_damaged_is_replaced(tmp_path, told, damage):
    told(OLD)
    path = tmp_path / "baselines" / "noise" / "GPU-0.json"
    text = json.dumps({**kept_in(tmp_path), **(damage or {})})
    path.write_text(text if damage else text[:40])
    done = told({"a": [[100], [101]]}, as_json=True)
    assert done.returncode == 0 and json.loads(done.stdout)["kept"] == 0
    assert kept_in(tmp_path)["by_key"] == {"a": 0.01}


def test_noise_without_samples_is_kept_without(tmp_path, told):
    """A record may lack them."""
    told(OLD)
    record = {**kept_in(tmp_path), "samples_ns": {}}
    (tmp_path / "baselines" / "noise" / "GPU-0.json").write_text(json.dumps(record))
    told({"a": [[100], [101]]})
    record = kept_in(tmp_path)
    assert set(record["by_key"]) == set(OLD) and record["typical"] == 0.01


def test_noise_of_what_cannot_run_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    words = ("--config", config, "--impl", "triton_chunked", "--device", "cpu")
    done = in_this_process("noise", *words, cwd=tmp_path)
    assert done.returncode == 2 and "nothing of what is selected can run here" in done.stderr
