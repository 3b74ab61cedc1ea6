"""Several devices in one sweep. Two workers on the CPU stand for two GPUs."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from chela_bench.bench import plan, sweep
from chela_bench.bench.config import load_config
from chela_bench.bench.crew import Crew, Ended
from chela_bench.errors import EnvironmentProblem, UsageError
from chela_bench.profiles import machine, nvml
from chela_bench.records import Cost, Device, Spent
from chela_bench.reports.text import device_name, facts
from tests.factories import make_point, make_run
from tests.running import FAULTS, Silent, tiny_config

pytestmark = pytest.mark.usefixtures("forked_workers")


def _settings(folder, devices=("cpu", "cpu"), **flags):
    flags = {"impls": ("chunked", "quadratic", "triton_chunked"), "lens": "16,32,64", **flags}
    config = load_config(tiny_config(folder, sample_s=0.2))
    return plan.resolve(config, plan.Flags(**flags), devices)


@pytest.fixture(scope="module")
def shared(forked_workers, tmp_path_factory):
    folder, listener = tmp_path_factory.mktemp("crew"), Silent()
    return sweep.sweep(_settings(folder), folder / "run", listener), listener


def test_every_point_is_measured_once_and_two_at_a_time(shared):
    result, listener = shared
    outcomes = [(p.impl, p.shape["T"], p.outcome) for p in result.points]
    assert sorted(outcomes) == [
        (impl, tokens, "skipped" if impl == "triton_chunked" else "ok")
        for impl in ("chunked", "quadratic", "triton_chunked")
        for tokens in (16, 32, 64)
    ]
    in_flight = most = 0
    for kind, key in listener.heard:
        if "triton" not in key:
            in_flight += 1 if kind == "case" else -1
            most = max(most, in_flight)
    assert most == 2 and in_flight == 0
    assert (result.folder / "worker-1.log").exists()


def test_the_run_names_every_device_and_its_own_cost(shared):
    result, _ = shared
    assert [device.environment.device for device in result.run.other_devices] == ["cpu"]
    cost = result.run.cost
    assert cost.timing_s >= 6 * 0.05  # six points, at least 50 ms of samples each
    assert cost.compiling_s > 0 and cost.checking_s > 0
    assert cost.wall_s == pytest.approx(
        cost.own_s + cost.compiling_s + cost.checking_s + cost.timing_s, abs=0.01
    )
    assert 0 < cost.own_share < 1
    spent = [point.spent for point in result.points if point.outcome == "ok"]
    assert cost.timing_s == pytest.approx(sum(each.timing_s for each in spent), abs=0.01)
    for point in result.points:
        if point.spent is not None:
            assert sum(point.spent.model_dump().values()) <= point.spent_s


def test_a_killed_worker_costs_one_point(tmp_path):
    user = (f"{FAULTS}:slow",)  # 0.05 s a call
    settings = _settings(tmp_path, impls=user, ops=("linear_attention",), lens="250,251,252,253")
    with Crew(settings.sessions(), tmp_path / "worker.log", ceilings={}) as crew:
        os.kill(crew.runners[1].worker_pid, signal.SIGSTOP)  # so that it is at its first case
        killer = threading.Timer(1.0, os.kill, (crew.runners[1].worker_pid, signal.SIGKILL))
        killer.start()
        events = list(crew.measure(plan.cases(settings)))
        killer.join()
    outcomes = [event.point.outcome for event in events if isinstance(event, Ended)]
    assert sorted(outcomes) == ["crash", "ok", "ok", "ok"]


def test_one_device_that_is_refused_ends_them_all(tmp_path):
    settings = _settings(tmp_path, devices=("cpu", "cuda:7"))
    crew = Crew(settings.sessions(), tmp_path / "worker.log", ceilings={})
    with pytest.raises(EnvironmentProblem, match="cuda:7"):
        crew.__enter__()
    assert all(runner.worker_pid is None for runner in crew.runners)


def test_leaving_in_the_middle_kills_what_runs(tmp_path):
    settings = _settings(tmp_path, impls=(f"{FAULTS}:hangs",), ops=("linear_attention",))
    with Crew(settings.sessions(), tmp_path / "worker.log", ceilings={}) as crew:
        pids = [runner.worker_pid for runner in crew.runners]
        for _ in crew.measure(plan.cases(settings)):
            break
        begin = time.monotonic()
    assert time.monotonic() - begin < 10
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _gpu(name):
    return Device(environment=make_run().environment.model_copy(update={"name": name}))


def test_gpus_of_several_models_are_refused_unless_told(tmp_path):
    settings = _settings(tmp_path, devices=("cuda:0", "cuda:1"))
    sweep._refuse_mixed_models(settings, [_gpu("H100"), _gpu("H100")])
    with pytest.raises(UsageError, match=r"cuda:0 is H100, cuda:1 is L4; .*--mix-gpus"):
        sweep._refuse_mixed_models(settings, [_gpu("H100"), _gpu("L4")])
    allowed = settings.model_copy(update={"mix_gpus": True})
    sweep._refuse_mixed_models(allowed, [_gpu("H100"), _gpu("L4")])


def test_reports_count_the_cards():
    run = make_run(other_devices=[_gpu("L4"), _gpu(make_run().environment.name)])
    assert device_name(run) == "2 x NVIDIA H100 80GB HBM3 and L4"


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(machine, "no_gpu_reason", lambda: None)
    monkeypatch.setattr(nvml, "gpu_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("text", "visible", "chosen"),
    [("0,1", None, [0, 1]), (" 3 , 0,3", None, [3, 0]), ("all", None, [0, 1, 2, 3]),
     ("all", "2,3", [0, 1]), ("all", "0,1,2,3,4,5", [0, 1, 2, 3])],
)  # fmt: skip
def test_gpus_are_numbered_as_torch_counts(four_gpus, monkeypatch, text, visible, chosen):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.choose_gpus(text) == [f"cuda:{index}" for index in chosen]


@pytest.mark.parametrize("text", ["", "0,", "a", "-1", "0..3", "0 1", "1000"])
def test_other_gpus_are_refused_with_an_example(four_gpus, text):
    with pytest.raises(UsageError, match="--gpus takes all, or numbers as in 0,1"):
        machine.choose_gpus(text)


def test_gpus_need_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(EnvironmentProblem, match=r"--gpus 0,1 needs a GPU, but .*--device cpu"):
        machine.choose_gpus("0,1")


def test_reports_say_what_the_bench_itself_cost():
    cost = Cost(wall_s=312.0, compiling_s=56.0, checking_s=20.06, timing_s=180.0)
    said = facts(make_run(cost=cost), [])["Bench's own cost"]
    assert said == "18 % of 312 s; the rest: 56.0 s compiling, 20.1 s checking, 180 s timing"
    assert "Bench's own cost" not in facts(make_run(), [])
    points = [make_point(spent=Spent(timing_s=60.0)) for _ in range(3)]
    assert facts(make_run(cost=cost), points)["Bench's own cost"] == said
    points.append(make_point(spent=Spent(timing_s=0.02)))
    resumed = facts(make_run(cost=cost), points)["Bench's own cost"]
    assert resumed.startswith("18 % of 312 s since it was last resumed; the rest: 56.0 s")
