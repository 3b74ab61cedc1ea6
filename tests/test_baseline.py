"""Baselines: saved whole, listed, promoted by name, and moved by nobody else."""

from __future__ import annotations

import json

import pytest

from chela_bench.bench import baseline
from chela_bench.bench.modelled import modelled_now
from tests.factories import make_run
from tests.records import atlas_json, atlas_row, pytest_json, samples, timed, write_run
from tests.running import ROOT, in_this_process

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


def test_times_too_unsteady_to_be_held_are_named(tmp_path, run):
    """Against itself such a point is unclear; the other one passes."""
    drifting = [ns * (1 + 0.0007 * i) for i, ns in enumerate(samples(1e6))]
    source = write_run(tmp_path / "run", [timed(1024), timed(4096, ns=drifting)])
    done = run("save", source, "--name", "first")
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and "unclear in a gate" in said and "its samples drift by" in said
    assert "T4096" in said and "T1024" not in said
    gated = in_this_process("gate", source, "--baseline", source, "--rounds", 0, cwd=tmp_path)
    assert gated.returncode == 5
    assert "unclear" not in run("save", write_run(tmp_path / "two", [timed()])).stdout


def test_the_recorded_suite_holds_against_itself_but_for_the_time_that_save_names(tmp_path, run):
    suite = ROOT / "docs" / "results" / "h100-gate" / "benchmarks.json"
    said = " ".join(run("save", suite, "--name", "whole").stdout.split())
    assert said.count("its samples") == 1 and "fwd/bf16/B1-T1048576-D1024]: its samples" in said
    done = in_this_process(
        "gate", suite, "--baseline", suite, "--rounds", 0, "--json", cwd=tmp_path
    )
    checks = json.loads(done.stdout)["points"]
    [unclear] = [check for check in checks if check["outcome"] != "passed"]
    assert done.returncode == 5 and len(checks) == 282
    assert unclear["outcome"] == "unclear" and "long_conv/triton/fwd" in unclear["name"]


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


@pytest.mark.parametrize(("node", "kept"), [("x\ud801", "x?"), ("日本", "日本"), ("...", "...")])
def test_a_machine_of_any_name_is_kept(tmp_path, run, node, kept):
    _, taken = timed()
    source = tmp_path / "node.json"
    benchmark = {"fullname": "test", "stats": {"data": [ns / 1e9 for ns in taken]}}
    document = {"machine_info": {"node": node}, "benchmarks": [benchmark]}
    source.write_text(json.dumps(document))
    done = run("save", source, "--name", "first")
    assert done.returncode == 0, done.stderr
    [header] = (tmp_path / "baselines").glob("*/first/baseline.json")
    assert json.loads(header.read_bytes())["machine"]["name"] == kept
    assert run("promote", "first").returncode == 0
    [one] = json.loads(run("list", "--json").stdout)["baselines"]
    assert one["current"] and f"saved first for {one['machine']} in" in done.stdout
    assert in_this_process("gate", source, "--baseline", "baselines", cwd=tmp_path).returncode == 0


def test_the_listed_machine_is_the_one_to_promote_on(tmp_path, run):
    """Whether the baseline is damaged or not."""
    for name in ("good", "damaged"):
        run("save", write_run(tmp_path / name, [timed()]), "--name", name)
    (tmp_path / "baselines" / KEY / "damaged" / "baseline.json").write_text("{")
    found = json.loads(run("list", "--json").stdout)["baselines"]
    assert {one["name"]: one["machine"] for one in found} == {"good": KEY, "damaged": KEY}
    [good] = [one for one in found if one["problem"] is None]
    assert good["measured_on"]["uuid"] == "GPU-0" and good["kind"] == "run"
    assert run("promote", "good", "--machine", good["machine"]).returncode == 0


@pytest.mark.parametrize("text", ["", "{", '{"points": []}'])
def test_what_holds_nothing_is_not_saved(tmp_path, run, text):
    source = tmp_path / "now.json"
    source.write_text(text)
    assert run("save", source).returncode == 2
    assert run("save", write_run(tmp_path / "run", [])).returncode == 2
    assert not (tmp_path / "baselines").exists()


@pytest.mark.parametrize(
    ("changes", "lost", "words"),
    [
        ({"finished_utc": None}, 0, "it did not finish, and 1 of 2 points are there; finish the"),
        ({}, 0, "1 of 2 points are there; finish the run with chela-bench sweep --resume"),
        ({"settings": {"command": "tune"}}, 0, "with chela-bench tune --resume"),
        ({"planned_points": 0}, 1, "the last line of points.jsonl is torn"),
    ],
)
def test_what_was_cut_off_is_no_baseline(tmp_path, run, changes, lost, words):
    """The points that it lacks would be held against nothing."""
    whole = write_run(tmp_path / "whole", [timed(), timed(2048)], make_run(planned_points=2))
    source = write_run(tmp_path / "run", [timed()], make_run(**{"planned_points": 2, **changes}))
    if lost:
        with (source / "points.jsonl").open("ab") as handle:
            handle.write(b'{"op": "line')
    done = run("save", source)
    assert done.returncode == 2 and words in done.stderr
    assert not (tmp_path / "baselines").exists()
    done = in_this_process("gate", whole, "--baseline", source, cwd=tmp_path)
    assert done.returncode == 4 and words in done.stderr
    assert run("save", whole).returncode == 0


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
