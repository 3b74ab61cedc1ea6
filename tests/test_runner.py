"""The runner against a stub of the worker: a process that speaks its protocol and misbehaves."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest

from chela_bench.bench import runner as runner_module
from chela_bench.bench.cases import Case, Limits, Session
from chela_bench.bench.runner import Runner
from chela_bench.errors import EnvironmentProblem
from tests.running import STUB_WORKER


@pytest.fixture
def runner(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "_WORKER", STUB_WORKER.read_text())
    session = Session(
        device="cpu", timer="event", l2="cold", seed=0, inputs="randn",
        limits=Limits(call_s=0.01, sample_s=0.01, build_s=2.0, phase_s=1.0),
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    with Runner(session, tmp_path / "run" / "worker.log", ceilings={}) as started:
        yield started


def _measure(runner, impl):
    shape = {"B": 1, "T": 64, "H": 1, "K": 16, "V": 16}
    case = Case(op="linear_attention", impl=impl, direction="fwd", dtype="fp32", shape=shape)
    return runner.measure(case)[0]


@pytest.mark.parametrize(
    ("impl", "reason"),
    [
        ("garbage", "something else wrote into the worker's answers"),
        ("number", "something else wrote into the worker's answers"),
        ("deep", "something else wrote into the worker's answers"),
        ("nothing", "something else wrote into the worker's answers"),
        ("half_a_point", "something else wrote into the worker's answers"),
        ("forks", "worker ended with exit code 9"),
        ("real_time_signal", f"worker killed by signal {signal.SIGRTMIN + 3}"),
        ("floods", "no answer for 1 s in phase 'start'"),
        ("hangs", "no answer for 1 s in phase 'check'"),
    ],
)
def test_what_a_worker_does_ends_its_point_and_not_the_sweep(runner, impl, reason):
    begin = time.monotonic()
    point = _measure(runner, impl)
    assert point.outcome == ("timeout" if reason.startswith("no answer") else "crash")
    assert point.reason == reason
    assert _measure(runner, "right").outcome == "ok"
    assert time.monotonic() - begin < 5


def test_a_worker_that_closed_its_pipe_is_ended(runner, monkeypatch):
    monkeypatch.setattr(runner_module, "_LAST_BREATH_S", 0.1)
    assert _measure(runner, "closes_its_pipe").reason.startswith("worker killed by SIGKILL")
    assert _measure(runner, "right").outcome == "ok"


def test_the_last_output_is_that_of_the_point_itself(runner):
    assert _measure(runner, "prints").outcome == "ok"
    assert _measure(runner, "silent").reason == "worker ended with exit code 9"


def test_a_worker_that_dies_while_idle_is_not_the_next_cases_doing(runner):
    os.kill(runner.worker_pid, signal.SIGKILL)
    while not runner._worker.ended:
        time.sleep(0.01)
    assert _measure(runner, "right").outcome == "ok"


def test_a_spoilt_worker_is_replaced_and_others_are_kept(runner):
    """The stub's wall_ns is its process id."""
    pids = [_measure(runner, impl).wall_ns for impl in ("right", "spoils", "right", "right")]
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_modules_of_the_current_folder_do_not_shadow(runner, tmp_path, monkeypatch):
    for name in ("json", "time", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    _measure(runner, "silent")  # the next worker starts here
    assert _measure(runner, "right").outcome == "ok"


def test_a_folder_that_vanishes_stops_the_sweep_when_a_worker_must_start(runner, tmp_path):
    shutil.rmtree(tmp_path / "run")
    assert _measure(runner, "right").outcome == "ok"
    assert _measure(runner, "silent").outcome == "crash"
    with pytest.raises(EnvironmentProblem, match=r"cannot start a worker: .*No such file"):
        _measure(runner, "right")
