"""Implementations that misbehave, machines that fail: each becomes an outcome with a reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.running import (
    FAULTS,
    command,
    environment,
    gone,
    hear_signals,
    in_this_process,
    played,
    run_folder,
    swept,
    tiny_config,
    wait_for_points,
    workers_of,
)

pytestmark = pytest.mark.usefixtures("forked_workers")

WRONG = {  # function -> a word of its reason
    "off_by_two_percent": "off by 2.00e-02",
    "zeros": "off by 1.00e+00",
    "nan": "not finite",
    "skips_last_rows": "not finite",
    "zeroes_first_block": "off by 1.00e+00",
    "wrong_shape": "[1, 256, 2, 16]",
    "wrong_dtype": "torch.float64",
    "remembers": "after timing, on fresh inputs",
}
CRASH = {
    "raises": "RuntimeError: no luck [red]today[/red]",
    "kills_itself": "SIGKILL",
    "segfaults": "SIGSEGV; last output: about to fall over",
}
OOM = {"out_of_memory": "allocate", "out_of_memory_gently": "allocate"}
TIMEOUT = {"hangs": "no answer for 4 s in phase 'build'"}


@pytest.fixture(scope="module")
def misbehaved(forked_workers, tmp_path_factory):
    """All of them in one sweep, beside one that is right: what one does must not touch another."""
    config = tiny_config(tmp_path_factory.mktemp("faults"), build_s=4.0)
    names = ["right", "reads_its_input", *WRONG, *CRASH, *OOM, *TIMEOUT]
    flags = [part for name in names for part in ("--impl", f"{FAULTS}:{name}")]
    done, document = swept("--op", "linear_attention", *flags, config=config)
    points = {point["impl"].partition(":")[2]: point for point in document["points"]}
    assert sorted(points) == sorted(names)
    return done, points, config


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        (name, outcome, reason)
        for outcome, group in [
            ("wrong", WRONG),
            ("crash", CRASH),
            ("oom", OOM),
            ("timeout", TIMEOUT),
        ]
        for name, reason in group.items()
    ],
)
def test_misbehaviour_is_an_outcome_without_a_time(misbehaved, name, outcome, reason):
    _, points, _ = misbehaved
    point = points[name]
    assert point["outcome"] == outcome, point["reason"]
    assert reason in point["reason"]
    assert point["time_ns"] is None and point["wall_ns"] is None
    assert point["tokens_per_s"] is None and point["x_floor"] is None


def test_an_implementation_that_reads_its_input_gets_nothing(misbehaved):
    assert misbehaved[1]["reads_its_input"]["outcome"] == "ok"


def test_the_sweep_goes_on_and_exits_with_3(misbehaved):
    done, points, config = misbehaved
    assert points["right"]["outcome"] == "ok"
    assert points["right"]["time_ns"]["n"] >= 3
    assert done.returncode == 3
    folder = run_folder(config)
    lines = (folder / "samples.jsonl").read_text().splitlines()
    names = {json.loads(line)["key"].split("/")[1] for line in lines}
    assert names == {"faults.py:right", "faults.py:reads_its_input"}
    summary = (folder / "report" / "summary.md").read_text()
    assert "SIGSEGV" in summary and "SIGKILL" in summary


def test_a_wrong_gradient_is_wrong(tmp_path):
    done, document = swept(
        "--op", "linear_attention", "--impl", f"{FAULTS}:wrong_gradient",
        "--direction", "fwd,fwdbwd", config=tiny_config(tmp_path),
    )  # fmt: skip
    outcomes = {p["direction"]: (p["outcome"], p["reason"]) for p in document["points"]}
    assert outcomes["fwd"][0] == "ok"
    assert outcomes["fwdbwd"][0] == "wrong" and outcomes["fwdbwd"][1].startswith("dk is off")
    assert done.returncode == 3


def test_a_long_call_is_skipped_before_it_is_tried(tmp_path):
    done, document = swept(
        "--op", "linear_attention", "--impl", f"{FAULTS}:slow", "--lens", "256,4k,64k",
        config=tiny_config(tmp_path),
    )  # fmt: skip
    points = {p["shape"]["T"]: p for p in document["points"]}
    assert points[256]["outcome"] == "ok"
    for tokens in (4096, 65536):
        assert points[tokens]["outcome"] == "skipped"
        assert points[tokens]["reason"].startswith("estimated ")
        assert points[tokens]["reason"].endswith(" s > limit 0.5 s")
        assert points[tokens]["spent_s"] < 10
    assert done.returncode in (0, 1)


def test_three_samples_are_wanted(tmp_path):
    """0.4 s a call where 0.1 s is the limit: one sample in 0.3 s, a timeout and not a time."""
    _, document = swept(
        "--op", "linear_attention", "--impl", f"{FAULTS}:slow_alone_at_512", "--lens", "512",
        config=tiny_config(tmp_path, call_s=0.1),
    )  # fmt: skip
    [point] = document["points"]
    assert point["outcome"] == "timeout"
    assert "only 1 of the 3 samples wanted came" in point["reason"]


def _sweep_in_background(config: Path, command=command) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("sweep", "--config", config, "--out", config.parent / "runs", *PLAN),
        env=environment(STUB_CASE_S="0.5"),
        cwd=config.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )


PLAN = ("--op", "linear_attention", "--impl", "chunked,quadratic", "--lens", "16,32,64,128")


@pytest.fixture(scope="module")
def killed(forked_workers, tmp_path_factory):
    """`kill -9` of the sweep in mid-run, then --resume."""
    config = tiny_config(tmp_path_factory.mktemp("killed"), sample_s=0.2)
    process = _sweep_in_background(config)
    folder = wait_for_points(config, 3)
    workers = workers_of(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    orphans = [pid for pid in workers if not gone(pid)]
    before = (folder / "points.jsonl").read_bytes()
    with (folder / "points.jsonl").open("ab") as handle:  # a torn last line, as a crash leaves
        handle.write(before.splitlines()[0][:40])
    resumed = in_this_process("sweep", "--json", "--resume", folder, cwd=config.parent)
    return workers, orphans, before, folder, resumed


def test_no_orphan_stays(killed):
    workers, orphans, *_ = killed
    assert workers and not orphans


def test_resume_completes_and_measures_nothing_twice(killed):
    _, _, before, folder, resumed = killed
    assert resumed.returncode == 0, resumed.stderr
    lines = (folder / "points.jsonl").read_bytes().splitlines()
    assert b"\n".join(lines).startswith(before.rstrip())  # nothing on record was touched
    keys = [json.loads(line)["key"] for line in lines]
    assert len(keys) == len(set(keys)) == 8
    undisturbed = {
        f"linear_attention/{impl}/fwd/fp32/B1-T{tokens}-H2-K16-V16"
        for impl in ("chunked", "quadratic")
        for tokens in (16, 32, 64, 128)
    }
    assert set(keys) == undisturbed
    assert json.loads(resumed.stdout)["run"]["finished_utc"] is not None


def test_another_configuration_is_refused_with_the_difference(killed):
    folder = killed[3]
    config = folder.parent.parent / "bench.toml"
    done = in_this_process("sweep", "--resume", folder, "--config", config, *PLAN[:-1], "16,32")
    assert done.returncode == 2
    assert "lens was [16, 32, 64, 128] and is now [16, 32]" in done.stderr


def test_another_machine_is_refused_with_the_difference(killed):
    folder = killed[3]
    run = json.loads((folder / "run.json").read_text())
    original = json.dumps(run)
    try:
        run["environment"]["cpu"] = "Other CPU"
        (folder / "run.json").write_text(json.dumps(run))
        done = in_this_process("sweep", "--resume", folder)
    finally:
        (folder / "run.json").write_text(original)
    assert done.returncode == 2
    assert "cpu was 'Other CPU' and is now" in done.stderr


def test_retry_measures_again_and_counts_once(killed):
    folder = killed[3]
    done = in_this_process("sweep", "--json", "--resume", folder, "--retry", "ok")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["points"]) == 8
    assert (folder / "points.jsonl").read_bytes().count(b"\n") == 16


@pytest.fixture(scope="module")
def interrupted(forked_workers, tmp_path_factory):
    """Ctrl-C in mid-run, after a second sweep into the same folder."""
    config = tiny_config(tmp_path_factory.mktemp("interrupted"))
    process = _sweep_in_background(config, played)
    folder = wait_for_points(config, 2)
    workers = workers_of(process.pid)
    second = in_this_process("sweep", "--resume", folder)
    process.send_signal(signal.SIGINT)
    return process, process.communicate(timeout=60), folder, workers, second


def test_ctrl_c_saves_what_was_measured(interrupted):
    process, (stdout, stderr), folder, workers, _ = interrupted
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert f"--resume {folder}" in stderr
    assert "records:" in stdout
    assert all(map(gone, workers))
    assert (folder / "report" / "summary.md").exists()
    assert json.loads((folder / "run.json").read_text())["finished_utc"] is None


def test_two_sweeps_into_one_folder_are_refused(interrupted):
    process, *_, second = interrupted
    assert second.returncode == 6
    assert f"is being written by another sweep (process {process.pid})" in second.stderr


def test_a_killed_worker_is_replaced(tmp_path, worker_server):
    config = tiny_config(tmp_path, sample_s=0.5)

    def kill_the_worker():
        wait_for_points(config, 1)
        os.kill(worker_server.last_pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_worker)
    killer.start()
    done = in_this_process("sweep", "--config", config, "--out", config.parent / "runs", *PLAN)
    killer.join()
    folder = run_folder(config)
    points = [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]
    crashed = [point for point in points if point["outcome"] == "crash"]
    assert len(points) == 8 and len(crashed) == 1
    assert "SIGKILL" in crashed[0]["reason"]
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("def f(q, k, v:\n", "SyntaxError"),
        ("import no_such_module_anywhere\n", "no_such_module_anywhere"),
        ("def g(q, k, v): return v\n", "no function 'f'"),
        ("import os; os._exit(7)\n", "exit code 7"),
    ],
)
def test_a_file_that_does_not_import_leaves_nothing_behind(tmp_path, content, reason):
    file = tmp_path / "mine.py"
    file.write_text(content)
    done = in_this_process(
        "sweep", "--config", tiny_config(tmp_path), "--out", tmp_path / "runs",
        "--op", "linear_attention", "--impl", f"{file}:f",
    )  # fmt: skip
    assert done.returncode in (2, 6)
    assert reason in done.stderr and "Traceback" not in done.stderr
    assert not any((tmp_path / "runs").iterdir())
