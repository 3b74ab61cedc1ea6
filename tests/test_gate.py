"""`gate`: every exit code, every way to get worse, and baselines that somebody broke."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from chela_bench.bench import again, sources
from chela_bench.errors import UsageError
from chela_bench.records import Hbm, Kernel, Static, Telemetry
from tests.factories import make_failure, make_run
from tests.records import CLOCKS, pytest_json, samples, timed, write_run
from tests.running import ROOT, in_this_process

MB = 1_000_000


@pytest.fixture
def gate(tmp_path):
    """Holds points against points; returns the exit code and what did not pass."""

    def held(before, after, *flags, run=None):
        baseline = write_run(tmp_path / "baseline", before)
        candidate = write_run(tmp_path / "candidate", after, run)
        return gated(tmp_path, candidate, "--baseline", baseline, *flags)

    return held


def gated(folder, *arguments, **environment):
    done = in_this_process(
        "gate", *arguments, "--rounds", 0, "--json", cwd=folder,
        **{"GITHUB_STEP_SUMMARY": "", **environment},
    )  # fmt: skip
    checks = json.loads(done.stdout)["points"] if done.stdout else []
    loud = [check for check in checks if check["outcome"] != "passed"]
    return done, loud


def test_the_same_passes(gate):
    done, loud = gate([timed(T) for T in (1024, 2048)], [timed(T, seed=1) for T in (1024, 2048)])
    assert done.returncode == 0 and loud == []


def test_slower_fails_with_the_name(gate):
    done, [check] = gate([timed(), timed(2048)], [timed(), timed(2048, ns=1.08e6)])
    assert done.returncode == 1 and check["outcome"] == "failed" and check["figure"] == "time"
    assert "T2048" in check["name"] and check["change"]["low"] > 1.05
    assert "+8." in check["reason"] or "+7.9" in check["reason"]


def test_a_limit_in_time_lets_short_kernels_pass(gate):
    before, after = [timed(ns=10_000)], [timed(ns=11_500)]
    assert gate(before, after)[0].returncode == 0
    assert gate(before, after, "--limit", "5%")[0].returncode == 1


def test_near_the_limit_is_unclear(gate):
    done, [check] = gate([timed()], [timed(ns=1.05e6, seed=1)])
    assert done.returncode == 5 and check["outcome"] == "unclear"
    assert "where 5.0% is allowed" in check["reason"]


def test_other_clocks_are_unclear(gate):
    """8 % more time at a clock 9 % lower is no fault of the code."""
    now = Telemetry(**{**CLOCKS, "sm_clock_mhz": 1800})
    done, [check] = gate([timed()], [timed(ns=1.08e6, telemetry=now)])
    assert done.returncode == 5 and "SM clock was 1980 MHz and is 1800 MHz" in check["reason"]


def test_noise_that_was_measured_here_is_allowed(tmp_path):
    candidate = write_run(tmp_path / "now", [timed(ns=1.08e6)])
    saved(tmp_path, write_run(tmp_path / "then", [timed()]))
    noise = tmp_path / "baselines" / "noise" / "GPU-0.json"
    noise.parent.mkdir()
    record = {"measured_utc": "2026-01-01", "machine": {}, "typical": 0.01, "by_key": {}}
    noise.write_text(json.dumps(record))
    assert gated(tmp_path, candidate, "--baseline", "baselines")[0].returncode == 1
    [key] = [timed()[0].key]
    noise.write_text(json.dumps({**record, "by_key": {key: 0.12}}))
    assert gated(tmp_path, candidate, "--baseline", "baselines")[0].returncode == 0
    for other in ({"triton": "1.0"}, {"name": "another CPU"}):
        noise.write_text(json.dumps({**record, "typical": 0.12, "machine": other}))
        done, _ = gated(tmp_path, candidate, "--baseline", "baselines")
        [(fact, value)] = other.items()
        source = json.loads(done.stdout)["noise_source"]
        assert done.returncode == 1 and f"is of {fact} {value}" in source
    noise.write_text(noise.read_text()[:40])
    assert gated(tmp_path, candidate, "--baseline", "baselines")[0].returncode == 4


def measured_noise(folder, **record):
    path = folder / "noise" / "GPU-0.json"
    path.parent.mkdir(parents=True)
    found = {"measured_utc": "2026-01-01", "machine": {}, "typical": 0.01, "by_key": {}, **record}
    path.write_text(json.dumps(found))


def test_a_failure_says_the_noise_of_its_own_point(tmp_path):
    candidate = write_run(tmp_path / "now", [timed(ns=1.3e6), timed(2048, ns=1.3e6)])
    saved(tmp_path, write_run(tmp_path / "then", [timed(), timed(2048)]))
    measured_noise(tmp_path / "baselines", by_key={timed()[0].key: 0.2})
    done, loud = gated(tmp_path, candidate, "--baseline", "baselines")
    words = {"T1024": "noise of 20.0% allow 20.0%", "T2048": "noise of 1.0% allow 5.0%"}
    assert done.returncode == 1 and len(loud) == 2
    for check in loud:
        [allowed] = [said for tokens, said in words.items() if tokens in check["name"]]
        assert allowed in check["reason"]


def test_noise_of_the_folder_that_is_named_counts(tmp_path):
    candidate = write_run(tmp_path / "now", [timed(ns=1.08e6)])
    saved(tmp_path, write_run(tmp_path / "then", [timed()]))
    measured_noise(tmp_path / "other", typical=0.12)
    words = (candidate, "--baseline", "baselines")
    assert gated(tmp_path, *words)[0].returncode == 1
    assert gated(tmp_path, *words, "--baselines", "other")[0].returncode == 0
    assert gated(tmp_path, *words, "--baselines", "baselines")[0].returncode == 1


def test_noise_of_bytes_that_was_measured_here_is_allowed(tmp_path):
    before, after = timed(**counted(646 * MB)), timed(**counted(672 * MB))
    candidate = write_run(tmp_path / "now", [after])
    saved(tmp_path, write_run(tmp_path / "then", [before]))
    noise = tmp_path / "baselines" / "noise" / "GPU-0.json"
    noise.parent.mkdir()
    record = {"measured_utc": "2026-01-01", "machine": {}, "typical": 0.01, "by_key": {}}
    for size, code in ((0.039, 1), (0.041, 0)):  # of 4.02 %
        noise.write_text(json.dumps({**record, "hbm_by_key": {before[0].key: size}}))
        assert gated(tmp_path, candidate, "--baseline", "baselines")[0].returncode == code


@pytest.mark.parametrize(
    ("after", "code", "words"),
    [
        ([], 1, "missing"),
        ([(make_failure("skipped", "needs a GPU"), [])], 1, "newly skipped: needs a GPU"),
        ([(make_failure("oom", "CUDA out of memory"), [])], 1, "newly oom"),
        ([(make_failure("wrong", "o is off by 3e-1"), [])], 3, "o is off by 3e-1"),
    ],
    ids=["missing", "skipped", "oom", "wrong"],
)
def test_what_lost_its_result_fails_with_the_name(gate, after, code, words):
    done, loud = gate([timed(), timed(2048)], [timed(2048), *after])
    assert done.returncode == code
    assert "T1024" in loud[0]["name"] and words in loud[0]["reason"]


def test_what_never_ran_still_does_not(gate):
    skipped = (make_failure("skipped", "needs a GPU"), [])
    done, [check] = gate([skipped, timed(2048)], [skipped, timed(2048)])
    assert done.returncode == 0 and check["outcome"] == "unchecked"
    assert check["reason"] == "skipped, as in the baseline: needs a GPU"
    done, [check] = gate([skipped, timed(2048)], [timed(), timed(2048)])
    assert done.returncode == 0 and check["outcome"] == "better"


@pytest.mark.parametrize("outcome", ["skipped", "crash", "wrong"])
def test_a_baseline_of_failures_is_none(gate, tmp_path, outcome):
    """Held against it, whatever fails as it did would pass."""
    failed = (make_failure(outcome, "no luck"), [])
    done, _ = gate([failed], [failed])
    assert done.returncode == 4 and "or all failed" in done.stderr
    done = in_this_process("baseline", "save", tmp_path / "baseline", cwd=tmp_path)
    assert done.returncode == 2 and "no point of it has a figure" in done.stderr


def test_a_new_benchmark_is_listed(gate):
    done, [check] = gate([timed()], [timed(), timed(2048)])
    assert done.returncode == 0 and check["outcome"] == "new" and "T2048" in check["name"]


def test_a_new_benchmark_that_is_wrong_fails(gate):
    done, [check] = gate([timed()], [timed(), (make_failure("wrong", "no", 2048), [])])
    assert done.returncode == 3 and check["outcome"] == "wrong"


def test_a_renamed_benchmark_fails_and_says_its_new_name(tmp_path):
    then = pytest_json(tmp_path / "then.json", [timed()], ["t.py::test_old"])
    now = pytest_json(tmp_path / "now.json", [timed()], ["t.py::test_new"])
    done, loud = gated(tmp_path, now, "--baseline", then)
    assert done.returncode == 1 and [c["outcome"] for c in loud] == ["failed", "new"]
    assert loud[0]["name"] == "t.py::test_old" and "t.py::test_new" in loud[0]["reason"]


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        ({"launches": 2}, {"launches": 3}, "failed"),
        ({"launches": 3}, {"launches": 2}, "better"),
        ({"launches": 2}, {"launches": None}, "failed"),
        ({"launches": None}, {"launches": 2}, None),
        ({"peak_bytes": 4096}, {"peak_bytes": 4097}, "failed"),
        ({"hbm": Hbm(model_bytes=100)}, {"hbm": Hbm(model_bytes=101)}, "failed"),
        ({"static": Static(regs=168)}, {"static": Static(regs=169)}, "failed"),
        ({"static": Static(ctas_per_sm=2)}, {"static": Static(ctas_per_sm=1)}, "failed"),
        ({"static": Static(ctas_per_sm=1)}, {"static": Static(ctas_per_sm=2)}, "better"),
    ],
)
def test_exact_figures_gate_exactly(gate, before, after, outcome):
    done, loud = gate([timed(**before)], [timed(**after)])
    assert [check["outcome"] for check in loud] == ([] if outcome is None else [outcome])
    assert done.returncode == (1 if outcome == "failed" else 0)


def counted(size, source="ncu", passes=1):
    hbm = Hbm(read_bytes=size // 2, write_bytes=size // 2, source=source)
    return {"hbm": hbm, "kernels": [Kernel(name="seg_out", passes=passes)]}


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        (counted(646 * MB), counted(655 * MB), None),
        (counted(646 * MB), counted(700 * MB), "failed"),  # a pass over HBM more, in no more time
        (counted(646 * MB), counted(600 * MB), "better"),
        (counted(90 * MB), counted(180 * MB), None),  # too few bytes for counters
        (counted(646 * MB), {}, "failed"),
        (counted(646 * MB), counted(700 * MB, "gpm"), "failed"),
        (counted(646 * MB, "gpm"), counted(700 * MB, "gpm"), None),
        (counted(646 * MB), counted(650 * MB, passes=2), "failed"),  # in part of a warm L2
        (counted(646 * MB, passes=2), counted(700 * MB), None),
    ],
)
def test_measured_bytes(gate, before, after, outcome):
    done, loud = gate([timed(**before)], [timed(**after)])
    assert [check["outcome"] for check in loud] == ([] if outcome is None else [outcome])
    assert done.returncode == (1 if outcome == "failed" else 0)


BUDGETS = """
[budgets.linear_attention.medium]
{}
"""


@pytest.mark.parametrize(
    ("budget", "point", "outcome"),
    [
        ("max_ms = 0.9", {}, "failed"),
        ("max_ms = 1.1", {}, None),
        ("max_x_floor = 1.5", {"floor_ns": 500_000}, "failed"),
        ("max_x_floor = 1.5", {}, "unchecked"),
        ("max_peak_bytes = 4095", {}, "failed"),
        ("max_hbm_x_model = 1.2", {"hbm": Hbm(read_bytes=70, write_bytes=60, model_bytes=100,
                                              source="ncu")}, "failed"),
        ("max_spill_bytes = 0", {"static": Static(spill_store_bytes=8, spill_load_bytes=8)},
         "failed"),
        ('max_ms = 0.9\nimpls = ["triton_chunked"]', {}, None),
        ('max_ms = 0.9\ndirections = ["fwdbwd"]', {}, None),
        ('max_ms = 0.9\ndtypes = ["fp32"]', {}, None),
    ],
)  # fmt: skip
def test_budgets(gate, tmp_path, budget, point, outcome):
    config = tmp_path / "own.toml"
    config.write_text((ROOT / "bench.toml").read_text() + BUDGETS.format(budget))
    done, loud = gate([timed(**point)], [timed(**point)], "--config", config)
    assert [check["outcome"] for check in loud] == ([] if outcome is None else [outcome])
    assert done.returncode == (1 if outcome == "failed" else 0), done.stderr
    [idle] = [note for note in json.loads(done.stdout)["notes"] if "held to the budgets" in note]
    assert ("linear_attention.medium" in idle) is ("\n" in budget)  # no benchmark is of those
    assert "long_conv.b8-t8k-d1024" in idle


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("", "limits nothing"),
        ("max_ms = 0", "greater than 0"),
        ("max_s = 1", "unknown key; allowed here: impls"),
        ('max_ms = 1\nimpls = ["tritn"]', "no implementation 'tritn'"),
    ],
)
def test_budgets_that_say_nothing_are_refused(gate, tmp_path, budget, words):
    config = tmp_path / "own.toml"
    config.write_text((ROOT / "bench.toml").read_text() + BUDGETS.format(budget))
    done, _ = gate([timed()], [timed()], "--config", config)
    assert done.returncode == 2 and words in done.stderr


@pytest.mark.parametrize("name", ["no_op.medium", "linear_attention.no_shape"])
def test_a_budget_of_nothing_is_refused(gate, tmp_path, name):
    config = tmp_path / "own.toml"
    budget = f"\n[budgets.{name}]\nmax_ms = 1\n"
    config.write_text((ROOT / "bench.toml").read_text() + budget)
    done, _ = gate([timed()], [timed()], "--config", config)
    assert (
        done.returncode == 2 and f"budgets.{name.removesuffix('.medium')}: no such" in done.stderr
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"versions": {"torch": "2.11.0", "triton": "3.7.1"}}, "Triton 3.6.0, here 3.7.1"),
        ({"versions": {"torch": "2.13.0", "triton": "3.6.0"}}, "torch 2.11.0, here 2.13.0"),
        ({"driver": "600.1"}, "driver 580, here 600"),
        ({"name": "NVIDIA A100"}, "machine NVIDIA H100 80GB HBM3, here NVIDIA A100"),
    ],
)
def test_a_baseline_of_another_machine_is_none(gate, changes, words):
    environment = {k: v for k, v in changes.items() if k != "versions"}
    other = make_run(environment=make_run().environment.model_copy(update=environment))
    other = other.model_copy(update={k: v for k, v in changes.items() if k == "versions"})
    done, _ = gate([timed()], [timed()], run=other)
    assert done.returncode == 4 and words in done.stderr


@pytest.mark.parametrize("outcome", ["skipped", "timeout", "oom"])
def test_a_busy_round_settles_nothing(outcome):
    """What was measured stands; that it ran out of memory now is something else."""
    point, taken = timed()
    before = sources.Entry("a", point, taken, point.device)
    found = again._together(before, make_failure(outcome, "busy"), [])
    assert (found is before) == (outcome != "oom")
    assert found.outcome == ("ok" if found is before else "oom")


def test_another_card_of_the_model_is_said(gate):
    environment = make_run().environment.model_copy(update={"uuid": "GPU-1", "driver": "580.99"})
    other = make_run(environment=environment)
    done, loud = gate([timed()], [timed(device="GPU-1")], run=other)
    assert done.returncode == 0 and loud == []
    assert "another card of this model" in done.stdout


def saved(folder, source, name="first"):
    in_this_process("baseline", "save", source, "--name", name, cwd=folder)
    done = in_this_process("baseline", "promote", name, cwd=folder)
    assert done.returncode == 0, done.stderr
    [path] = (folder / "baselines").glob(f"*/{name}")
    return path


def torn(path):
    path.write_bytes(path.read_bytes()[:-20])


def edited(path):
    path.write_text(path.read_text().replace('"bf16"', '"fp16"'))


def removed(path):
    path.unlink()


BREAKS = [
    ("points.jsonl", torn, "was changed after it was saved"),
    ("points.jsonl", edited, "was changed after it was saved"),
    ("samples.jsonl", removed, "lacks samples.jsonl"),
    ("run.json", torn, "was changed after it was saved"),
    ("baseline.json", torn, "half of it"),
    ("baseline.json", removed, "which is not there"),
    ("../current.json", torn, "half of it"),
    ("../current.json", removed, "none of"),
]


@pytest.mark.parametrize(
    ("file", "damage", "words"), BREAKS, ids=[f"{d.__name__} {f}" for f, d, _ in BREAKS]
)
def test_a_broken_baseline_is_none(tmp_path, file, damage, words):
    run = write_run(tmp_path / "run", [timed()])
    damage(saved(tmp_path, run) / file)
    done, _ = gated(tmp_path, run, "--baseline", "baselines")
    assert done.returncode == 4 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_baseline_of_another_schema_is_none(tmp_path, version):
    run = write_run(tmp_path / "run", [timed()])
    path = saved(tmp_path, run) / "baseline.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": version}))
    done, _ = gated(tmp_path, run, "--baseline", "baselines")
    assert done.returncode == 4 and "schema_version" in done.stderr


def test_an_edited_header_leads_nowhere_else(tmp_path):
    run = write_run(tmp_path / "run", [timed()])
    path = saved(tmp_path, run) / "baseline.json"
    header = json.loads(path.read_text())
    path.write_text(json.dumps({**header, "files": {"../../secret": "0"}}))
    done, _ = gated(tmp_path, run, "--baseline", "baselines")
    assert done.returncode == 4 and "names a file elsewhere" in done.stderr


def test_a_run_whose_points_and_samples_disagree_is_none(tmp_path):
    run = write_run(tmp_path / "run", [timed()])
    points = run / "points.jsonl"
    faster = points.read_text().replace(f'"median":{timed()[0].time_ns.median}', '"median":500000')
    points.write_text(faster)
    done, _ = gated(tmp_path, run, "--baseline", run)
    assert done.returncode == 2 and "changed by hand" in done.stderr
    good = write_run(tmp_path / "good", [timed()])
    done, _ = gated(tmp_path, good, "--baseline", run)
    assert done.returncode == 4 and "changed by hand" in done.stderr


def test_no_baseline_at_all(tmp_path):
    run = write_run(tmp_path / "run", [timed()])
    done, _ = gated(tmp_path, run, "--baseline", "baselines")
    assert done.returncode == 4 and "no baseline at baselines" in done.stderr


@pytest.mark.parametrize(("count", "code"), [(0, 5), (1, 5), (5, 5), (6, 0), (12, 0)])
def test_few_samples_do_not_pass(tmp_path, count, code):
    """None of the samples kept, one, and so on."""
    taken = samples(1e6, n=count or 1)
    run = write_run(tmp_path / "run", [timed(ns=taken)])
    if count == 0:
        (run / "samples.jsonl").write_text("")
    done, [check] = gated(tmp_path, run, "--baseline", run) if code else (None, [None])
    if code:
        assert done.returncode == code and check["outcome"] == "unclear"
        text = in_this_process("gate", run, "--baseline", run, "--rounds", 0, cwd=tmp_path).stdout
        assert "UNCLEAR: some times cannot be decided: 4 checks" in text
    else:
        assert gated(tmp_path, run, "--baseline", run)[0].returncode == 0


@pytest.mark.parametrize("ns", [0, -5, 10**30])
def test_samples_that_are_no_times_are_refused(tmp_path, ns):
    run = write_run(tmp_path / "run", [timed()])
    path = run / "samples.jsonl"
    line = json.loads(path.read_text())
    path.write_text(json.dumps({**line, "samples_ns": [ns, *line["samples_ns"][1:]]}) + "\n")
    done, _ = gated(tmp_path, run, "--baseline", run)
    assert done.returncode in (2, 0) and "Traceback" not in done.stderr
    if ns <= 0:
        assert done.returncode == 2 and "a time of" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [(), ("--baseline", "b", "--live", "main"), ("run", "--live", "main"), ("--limit", "x")],
)
def test_a_gate_without_sides_is_refused(tmp_path, arguments):
    done = in_this_process("gate", *arguments, cwd=tmp_path)
    assert done.returncode == 2


def test_junit_counts_a_regression_as_a_failed_test(gate, tmp_path):
    path = tmp_path / "reports" / "gate.xml"
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    gate(
        [timed(), timed(2048), timed(4096)],
        [timed(), timed(2048, ns=1.5e6), timed(4096, ns=1.05e6, seed=1), timed(8192)],
        "--junit", path, "--summary", summary,
    )  # fmt: skip
    suites = ElementTree.parse(path).getroot()
    [suite] = suites
    cases = suite.findall("testcase")
    for element in (suites, suite):
        assert (element.get("failures"), element.get("errors")) == ("1", "1")
        assert element.get("tests") == str(len(cases)) and element.get("skipped") == "1"
    [failure] = suite.iter("failure")
    [error] = suite.iter("error")
    assert "+50" in failure.get("message") and "allowed" in error.get("message")
    text = summary.read_text()
    assert text.startswith("before\n") and "**failed**" in text and "T2048" in text


def test_a_job_on_github_gets_its_summary(tmp_path):
    run = write_run(tmp_path / "run", [timed()])
    summary = tmp_path / "step.md"
    done, _ = gated(tmp_path, run, "--baseline", run, GITHUB_STEP_SUMMARY=str(summary))
    assert done.returncode == 0 and "chela-bench gate: passed" in summary.read_text()


def test_the_terminal_says_why(tmp_path):
    then = write_run(tmp_path / "then", [timed()])
    now = write_run(tmp_path / "now", [timed(ns=1.2e6)])
    done = in_this_process(
        "gate", now, "--baseline", then, "--rounds", 0, cwd=tmp_path, COLUMNS="60"
    )
    assert done.returncode == 1 and max(map(len, done.stdout.splitlines())) <= 60
    words = " ".join(done.stdout.split())
    assert "slower, where 5%,2us and noise of 1.5% allow 5.0%" in words and "FAILED" in words


def test_unclear_here_without_the_card_says_so(tmp_path):
    """Rounds are wanted, and there is no such card: exit 5, with the reason."""
    then = write_run(tmp_path / "then", [timed()])
    now = write_run(tmp_path / "now", [timed(ns=1.05e6, seed=1)])
    done = in_this_process("gate", now, "--baseline", then, cwd=tmp_path)
    assert done.returncode == 5 and "were not measured again" in " ".join(done.stdout.split())


def test_a_run_of_tune_is_measured_by_tune(tmp_path):
    """It times its configurations in turn, which a gate that measures by itself does not."""
    run = make_run(run_id="tuned", settings={"command": "tune"})
    tuned = sources.read(write_run(tmp_path / "tuned", [timed()], run))
    with pytest.raises(UsageError, match=r"a run of tune, .*chela-bench tune again and give its"):
        again.settings_of(tuned, "cuda")
    saved(tmp_path, tmp_path / "tuned")
    done, loud = gated(tmp_path, tmp_path / "tuned", "--baseline", "baselines")
    assert done.returncode == 0 and not loud and json.loads(done.stdout)["points"]
