"""A run's points once more under a fake ncu: what is counted, retried, named and recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chela_bench.bench import plan, profiled, profiling, runner, store, sweep
from chela_bench.bench.cases import Case
from chela_bench.bench.config import load_config
from chela_bench.bench.models import STEPS
from chela_bench.bench.worker import Worker
from chela_bench.cli import noise as noise_command
from chela_bench.cli import profile as profile_command
from chela_bench.errors import EnvironmentProblem
from chela_bench.profiles import ncu
from chela_bench.records import Ceilings, Environment, Hbm, Kernel, Point
from tests.factories import make_point
from tests.fake_ncu import CAPTURE
from tests.running import (
    ROOT,
    STUB_WORKER,
    Silent,
    environment,
    in_this_process,
    tiny_config,
)
from tests.test_ncu import install

SHAPE = {"B": 1, "T": 128, "H": 2, "K": 16, "V": 16}
KERNELS = ["seg_state", "seg_out"]
MIB = 1 << 20
READ, WRITTEN = 25_179_136 + 53_500_672, 407_296 + 8_400_384


@pytest.fixture
def session(tmp_path):
    flags = plan.Flags(ops=["linear_attention"], lens="128")
    return plan.resolve(load_config(tiny_config(tmp_path)), flags, ["cpu"]).sessions()[0]


@pytest.fixture
def way(tmp_path, monkeypatch, session):
    """A way to a fake ncu, and the lines that it said."""
    script = install(tmp_path / "bin", monkeypatch)
    monkeypatch.setattr(profiling, "_START_S", 0.1)
    limits = session.limits.model_copy(update={"build_s": 0.7, "phase_s": 0.7})
    session = session.model_copy(update={"limits": limits})
    said = []
    tool = ncu.Tool(script, "2025.3.1.0")
    made = profiling.Way(tool, session, Ceilings(), tmp_path, said.append)
    object.__setattr__(made, "said", said)
    return made


def cases(count):
    return [
        (n, Case(op="linear_attention", impl="quadratic", direction="fwd", dtype="fp32",
                 shape={**SHAPE, "T": 128 + n}))
        for n in range(count)
    ]  # fmt: skip


def test_every_case_is_counted_in_one_run(way, tmp_path):
    counts = profiling.count(way, cases(3), [*ncu.BYTES, *ncu.LAUNCH], "ncu", None)
    assert {n: [k.name for k in kernels] for n, kernels in counts.kernels.items()} == dict.fromkeys(
        range(3), KERNELS
    )
    assert counts.reasons == {} and counts.late_bytes == dict.fromkeys(range(3), MIB)
    assert (tmp_path / "ncu.csv").exists()  # the capture stays, what steered it goes
    assert not [*tmp_path.glob("*.plan"), *tmp_path.glob("*.progress")]


@pytest.mark.parametrize(
    ("how", "lost", "said", "runs"),
    [
        ("dies at 1", [1], "under it this call ended the process", 2),
        ("refuses 1", [1], "under it, oom: CUDA out of memory", 1),
        ("torn", [], "", 2),
        ("hangs", [0, 1, 2], "under it this call did not end", 3),
    ],
)
def test_a_case_that_ends_a_run_costs_no_other(way, tmp_path, monkeypatch, how, lost, said, runs):
    monkeypatch.setenv("FAKE_NCU", how)
    counts = profiling.count(way, cases(3), ncu.BYTES, "ncu", tmp_path / "kept.ncu-rep")
    assert sorted(counts.reasons) == lost
    assert sorted(counts.kernels) == [n for n in range(3) if n not in lost]
    assert all(reason == f"ncu: {said}" for reason in counts.reasons.values())
    names = ["kept.ncu-rep", "kept-2.ncu-rep", "kept-3.ncu-rep"]
    assert [name for name in names if (tmp_path / name).exists()] == names[:runs]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("denied", "ERR_NVGPUCTRPERM.*as root"),
        ("taken", "another tool holds"),
        ("fails", "ncu says: Failed to prepare kernel"),
        ("garbage", "ended with exit code 0 and left nothing usable: no table of ncu's raw page"),
        ("silent", "ended with exit code 3 and left nothing usable"),
    ],
)
def test_a_tool_that_counts_nothing_is_an_error_that_says_why(way, monkeypatch, how, said):
    monkeypatch.setenv("FAKE_NCU", how)
    with pytest.raises(EnvironmentProblem, match=said):
        profiling.count(way, cases(2), ncu.BYTES, "ncu", None)


def test_metrics_that_this_tool_lacks_are_named_and_needed_ones_refused(way, monkeypatch):
    monkeypatch.setenv("FAKE_NCU", "no lts")
    known = profiling._known(way, ncu.DETAIL)
    assert ncu.L2_BYTES not in known and ncu.TENSOR in known and ncu.LAUNCH[0] in known
    assert "knows no lts__t_bytes.sum, lts__t_sector_hit_rate.pct: left empty" in way.said[0]
    monkeypatch.setenv("FAKE_NCU", "no dram")
    with pytest.raises(EnvironmentProblem, match=r"knows no dram__bytes_read\.sum of this card"):
        profiling._known(way, ncu.BYTES)


def test_a_point_takes_the_sum_of_its_kernels():
    kernels = [Kernel(name="a", read_bytes=100, write_bytes=20), Kernel(name="b", read_bytes=30,
               write_bytes=4)]  # fmt: skip
    point = make_point(
        hbm=Hbm(model_bytes=200, source="model", gpm_bytes=180),
        compulsory_bytes=100,
        null_reasons={profiling.COLUMN: "earlier", "energy_j": "no"},
    )
    counted = profiling.with_bytes(point, kernels, 6)
    assert counted.hbm == Hbm(
        read_bytes=130, write_bytes=30, late_write_bytes=6, gpm_bytes=180, model_bytes=200,
        source="ncu",
    )  # fmt: skip
    assert counted.hbm.measured_bytes == 160 and counted.hbm.measured_over_model == 0.8
    assert counted.hbm_x_floor == 1.6 and counted.kernels == kernels
    assert counted.null_reasons == {"energy_j": "no"}
    assert Point.model_validate_json(counted.model_dump_json()) == counted


def test_copies_that_are_no_kernels_are_named():
    kernel = Kernel(name="a", launches=2, read_bytes=1, write_bytes=1)
    assert "kernels" not in profiling.with_bytes(make_point(launches=2), [kernel], 0).null_reasons
    counted = profiling.with_bytes(make_point(launches=5), [kernel], 0)
    assert counted.null_reasons["kernels"] == "3 of 5 launches are the driver's copies or fills"


def test_a_step_takes_its_share():
    point = make_point(direction="decode", op="chela_layer", shape={"B": 2, "T": 256, "D": 16})
    kernel = Kernel(name="a", launches=STEPS, read_bytes=64 * 7, write_bytes=64, time_ns=640)
    counted = profiling.with_bytes(point, [kernel], 64 * 3)
    assert (counted.hbm.read_bytes, counted.hbm.write_bytes) == (7, 4)
    assert counted.kernels[0].launches == 1 and counted.kernels[0].time_ns == 10


def test_kernels_without_bytes_are_no_figure():
    counted = profiling.with_bytes(make_point(), [Kernel(name="a", time_ns=3)], 0)
    assert counted.hbm.measured_bytes is None and counted.kernels
    assert "no bytes" in counted.null_reasons[profiling.COLUMN]


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"launches": 3}, True),
        ({"launches": profiling.MOST_LAUNCHES + 1}, False),
        ({"launches": None, "T": 512}, True),
        ({"launches": 9000, "T": 512}, True),
        ({"launches": None, "direction": "decode", "T": 512}, False),
        ({"launches": None, "T": 513}, False),
        ({"launches": 60, "direction": "decode"}, True),
        ({"launches": 70, "direction": "decode"}, False),
    ],
)
def test_loops_over_tokens_are_counted_where_they_are_short(changes, taken):
    assert (profiling.too_many_launches(make_point(**changes)) is None) == taken


# The application, on the CPU: what it runs, in which order, and what it says.


@pytest.fixture
def worker(session):
    made = Worker(session, lambda message: None)
    made.hello()
    made.begin({})
    return made


def test_the_application_runs_each_case_once_in_its_range(worker):
    steps, ranges, threads = [], [], []

    def ranged(name, work):
        ranges.append(name)
        threads.append(torch._C._is_multithreading_enabled())
        work()

    some = [(4, cases(1)[0][1]), (7, cases(1)[0][1].model_copy(update={"direction": "fwdbwd"}))]
    profiled.run_all(worker, some, lambda **step: steps.append(step), ranged)
    assert ranges == ["chela-4", "chela-late-4", "chela-7", "chela-late-7"]
    assert steps == [
        {"begins": 4}, {"ended": 4, "problem": None}, {"begins": 7}, {"ended": 7, "problem": None},
    ]  # fmt: skip
    assert threads == [False] * 4 and torch._C._is_multithreading_enabled()


def test_the_application_goes_on_after_a_case_that_fails(worker):
    steps = []
    bad = Case(op="linear_attention", impl="quadratic", direction="fwd", dtype="fp32",
               shape=SHAPE, config={"no_such_option": 1})  # fmt: skip
    some = [(0, bad), (1, cases(1)[0][1])]
    profiled.run_all(worker, some, lambda **step: steps.append(step), lambda name, work: work())
    assert steps[1]["ended"] == 0 and "no_such_option" in steps[1]["problem"]
    assert steps[-1] == {"ended": 1, "problem": None}


def test_the_application_ends_after_a_case_that_spoils_it(worker, monkeypatch):
    steps = []
    monkeypatch.setattr(profiled, "left_behind", lambda before, cuda: "default dtype changed")
    profiled.run_all(worker, cases(2), lambda **s: steps.append(s), lambda name, work: work())
    assert steps[-1] == {"spoilt": "default dtype changed"} and {"begins": 1} not in steps


# The whole way, from the command line to the report, but for the GPU's own part.

GPU_STUB = STUB_WORKER.read_text().replace(
    '"device": "cpu",\n', '"device": "cuda", "uuid": UUID,\n'
)
GPU_STUB = GPU_STUB.replace(
    'point = {**case, "device": "cpu", "outcome": "ok", "wall_ns": os.getpid()}',
    'point = {**case, "device": UUID, "outcome": "ok", "wall_ns": 50_000, "launches": 2, "l2": '
    '"cold", "floor_ns": 20_000, "compulsory_bytes": 67108864, "flops": 2_000_000_000, '
    '"time_ns": {"median": 40_000, "q1": 39_000, "q3": 41_000, "min": 38_000, "n": 9}, '
    '"hbm": {"model_bytes": 88538112, "source": "model"}}',
).replace('{"ceilings": {}}', '{"ceilings": {"copy_gb_per_s": 3000.0, "matmul_tflop_per_s": '
          '{"fp32": 400.0}}}')  # fmt: skip
GPU_STUB = f'UUID = "GPU-stub"\n{GPU_STUB}'


@pytest.fixture
def stub_gpu(tmp_path, monkeypatch):
    assert GPU_STUB.count("UUID") == 3 and "67108864" in GPU_STUB and "3000.0" in GPU_STUB
    monkeypatch.setattr(runner, "_WORKER", GPU_STUB)
    monkeypatch.setattr(profile_command, "choose_device", lambda wanted: "cuda")
    monkeypatch.setattr(profiling, "_START_S", 1.0)
    install(tmp_path / "bin", monkeypatch)
    return tiny_config(tmp_path)


def profile(config, *arguments, way=""):
    return in_this_process(
        "profile", "linear_attention", "--config", config, "--out", config.parent / "runs",
        "--impl", "triton_chunked,quadratic", "--lens", "128,256", *arguments,
        FAKE_NCU=way, PATH=os.environ["PATH"],
    )  # fmt: skip


def test_noise_counts_bytes_run_by_run(stub_gpu, monkeypatch):
    monkeypatch.setattr(noise_command, "choose_device", lambda wanted: "cuda")
    folder = stub_gpu.parent / "baselines"
    done = in_this_process(
        "noise", "--config", stub_gpu, "--impl", "triton_chunked", "--lens", "128,256", "--hbm",
        "ncu", "--runs", 3, "--baselines", folder, "--json", FAKE_NCU="", PATH=os.environ["PATH"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["hbm_noise"] for row in found["points"]] == [0.0, 0.0]
    record = json.loads(Path(found["file"]).read_text())
    assert list(record["hbm_bytes"].values()) == [[READ + WRITTEN + MIB] * 3] * 2


def test_profile_from_the_command_line_to_the_report(stub_gpu):
    done = profile(stub_gpu, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["points"]) == 4
    for point in document["points"]:
        assert point["hbm"] == {
            "read_bytes": READ, "write_bytes": WRITTEN + MIB, "late_write_bytes": MIB,
            "gpm_bytes": None, "model_bytes": 88_538_112, "source": "ncu",
            "measured_bytes": READ + WRITTEN + MIB,
            "measured_over_model": (READ + WRITTEN + MIB) / 88_538_112,
        }  # fmt: skip
        assert [kernel["name"] for kernel in point["kernels"]] == KERNELS
        assert point["kernels"][1]["l2_bytes"] == 109_831_808  # by the run for detail
        assert point["kernels"][1]["passes"] == 1
    assert document["run"]["settings"]["hbm"] == "ncu" and document["run"]["settings"]["detail"]
    assert document["run"]["cost"]["profiling_s"] > 0
    [folder] = (stub_gpu.parent / "runs").iterdir()
    text = (folder / "report" / "summary.md").read_text()
    assert "### HBM traffic" in text and "### Kernels" in text and "### Roofline" in text
    assert (folder / "ncu.csv").exists() and (folder / "ncu-detail.csv").exists()
    header, *rows = (folder / "kernels.csv").read_text().splitlines()
    assert header.startswith("key,name,launches,grid") and len(rows) == 8
    assert (folder / "report" / "kernels.csv").read_text().splitlines() == [header, *rows]
    assert any(path.name.endswith("-roofline.png") for path in (folder / "report").iterdir())
    shown = in_this_process("show", folder)
    assert "HBM traffic" in shown.stdout and "triton_chunked" in shown.stdout


def test_profile_in_a_terminal_shows_kernels(stub_gpu):
    done = profile(stub_gpu)
    assert done.returncode == 0, done.stderr
    for word in ("HBM traffic", "Kernels", "Roofline", "seg_out", "x model", "of copy", "1.00"):
        assert word in done.stdout
    assert "4 points again under ncu 2025.3.1.0" in done.stderr


@pytest.mark.parametrize(
    ("way", "said"),
    [("old", "2022.3 or later is needed"), ("denied", "ERR_NVGPUCTRPERM"), ("fails", "ncu says")],
)
def test_profile_refuses_before_it_measures(stub_gpu, way, said):
    done = profile(stub_gpu, way=way)
    assert done.returncode == 6 and said in done.stderr and done.stdout == ""
    assert not (stub_gpu.parent / "runs").exists()


def _settings(config, hbm):
    flags = plan.Flags(ops=["linear_attention"], impls=["quadratic"], lens="128,256", hbm=hbm)
    return plan.resolve(load_config(config), flags, ["cuda"])


def test_auto_falls_back_and_says_why(stub_gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_NCU", "denied")
    settings = _settings(stub_gpu, "auto")
    assert settings.sessions(ncu=False)[0].gpm == "where it can"
    assert settings.sessions(ncu=True)[0].gpm == "no"
    result = sweep.sweep(settings, tmp_path / "run", Silent())
    for point in result.points:
        assert point.hbm.source == "model"
        assert "ERR_NVGPUCTRPERM" in point.null_reasons[profiling.COLUMN]


def test_auto_counts_where_it_can(stub_gpu, tmp_path):
    result = sweep.sweep(_settings(stub_gpu, "auto"), tmp_path / "run", Silent())
    assert {point.hbm.source for point in result.points} == {"ncu"}


def test_what_fails_late_keeps_the_times_and_goes_on_with_resume(stub_gpu, tmp_path, monkeypatch):
    settings, folder = _settings(stub_gpu, "ncu"), tmp_path / "run"
    monkeypatch.setattr(profiling, "usable_tool", ncu.find)
    monkeypatch.setenv("FAKE_NCU", "taken")
    with pytest.raises(EnvironmentProblem, match=f"the times are kept, .*--resume {folder}"):
        sweep.sweep(settings, folder, Silent())
    run, points = store.load_run(folder)
    assert run.finished_utc is None and len(points) == 2 and all(p.time_ns for p in points)
    monkeypatch.setenv("FAKE_NCU", "")
    heard = Silent()
    result = sweep.sweep(settings, folder, heard, resumed=run)
    assert {point.hbm.source for point in result.points} == {"ncu"}
    assert result.run.finished_utc is not None
    assert not [key for what, key in heard.heard if what == "case"]  # nothing is timed again


def test_counted_points_are_not_counted_again(stub_gpu, tmp_path):
    settings, folder = _settings(stub_gpu, "ncu"), tmp_path / "run"
    first = sweep.sweep(settings, folder, Silent())
    lines = (folder / store.POINTS).read_text()
    again = sweep.sweep(settings, folder, Silent(), resumed=first.run)
    assert again.points == first.points and (folder / store.POINTS).read_text() == lines


def test_only_one_counts_on_a_card(stub_gpu, way, tmp_path):
    card = Environment(device="cuda", name="stub", uuid="GPU-held", cpu="c", cpu_threads=1,
                              os="o", python="3")  # fmt: skip
    folder = tmp_path / "run"
    sweep.sweep(_settings(stub_gpu, "model"), folder, Silent())
    case = plan.cases(_settings(stub_gpu, "model"))[:1]
    with runner.gpu_lock(card), store.RunFolder(folder) as held:
        with pytest.raises(EnvironmentProblem, match="in use by another sweep"):
            profiling.add_bytes(way, case, card, held, detail=False)


@pytest.mark.parametrize("suffix", ["csv", "ncu-rep"])
def test_a_capture_of_somebody_elses(stub_gpu, tmp_path, suffix):
    file = tmp_path / f"theirs.{suffix}"
    file.write_text(CAPTURE.read_text() if suffix == "csv" else "binary")
    done = in_this_process("profile", "--from", file, "--json", PATH=os.environ["PATH"])
    rows = json.loads(done.stdout)["points"]
    assert [row["name"] for row in rows][2:] == KERNELS and rows[0]["read_bytes"] == 33_564_672
    shown = in_this_process("profile", "--from", file, PATH=os.environ["PATH"], COLUMNS="60")
    assert max(map(len, shown.stdout.splitlines())) <= 60 and "139" not in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["profile", "linear_attention"], 6, "profile counts on a GPU, and none is in use here"),
        (["profile"], 2, "name an op to profile"),
        (["profile", "nothing"], 2, "no op 'nothing'"),
        (["profile", "--from", "no.csv"], 2, "cannot read no.csv"),
        (["profile", "--from", "no.ncu-rep"], 2, "no such file: no.ncu-rep"),
        (["profile", "linear_attention", "--from", "no.csv"], 2, "leave OP and its options out"),
        (["profile", "--from", "README.md"], 2, "README.md: no table of ncu's raw page"),
        (["sweep", "--hbm", "ncu"], 6, "--hbm ncu counts on a GPU, and none is in use here"),
        (["sweep", "--hbm", "gpm"], 6, "--hbm gpm counts on a GPU"),
        (["sweep", "--energy"], 6, "--energy counts on a GPU"),
        (["sweep", "--ncu-report", "x"], 2, "--ncu-report goes with --hbm ncu"),
    ],
)
def test_what_cannot_be_counted_is_refused(arguments, code, said):
    done = in_this_process(*arguments)
    assert done.returncode == code and said in done.stderr, done.stderr


def test_the_application_is_a_process_of_its_own(tmp_path, session):
    plan_file, progress = tmp_path / "plan", tmp_path / "progress"
    content = {"session": session.model_dump(), "ceilings": {},
               "cases": [(n, case.model_dump()) for n, case in cases(2)]}  # fmt: skip
    plan_file.write_text(json.dumps(content))
    words = str(plan_file), str(progress), str(os.getpid())
    done = subprocess.run(
        [sys.executable, "-P", "-c", profiling._APPLICATION, *words],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in progress.read_text().splitlines()]
    assert [list(step) for step in steps] == [
        ["pid"], ["begins"], ["ended", "problem"], ["begins"], ["ended", "problem"],
    ]  # fmt: skip


def test_the_application_ends_when_the_bench_is_gone():
    code = "import time; from chela_bench.bench.profiled import watch; watch({}); time.sleep(60)"
    bench = subprocess.Popen(["sleep", "60"])
    application = subprocess.Popen(
        [sys.executable, "-c", code.format(bench.pid)], env=environment(), cwd=ROOT
    )
    bench.kill()
    bench.wait()
    assert application.wait(30) == 1
