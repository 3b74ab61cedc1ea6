"""Noise: how far two runs of the same code differ, kept by device and versions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from chela_bench.bench.noise import noise_runs
from chela_bench.bench.sources import Machine
from tests.running import in_this_process, tiny_config


def test_noise_is_the_largest_change_between_two_runs():
    machine = Machine("cuda", "NVIDIA H100", "GPU-0")
    record = noise_runs(
        machine, {"a": [[100, 100], [103, 103], [101]], "b": [[50], [50], [50]]}
    ).record
    assert record.by_key == {"a": 0.03, "b": 0.0}
    assert 0.0 < record.typical <= 0.03
    again = noise_runs(machine, {"a": [[100], [100]]}, {"a": [1000, 1010, 990]}).record
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
        found = noise_runs(machine, samples, moved)
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
    every = noise_runs(HERE, record["samples_ns"]).record
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
