"""doctor: facts become checks with remedies; facts are read from whatever machine this is."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tomllib
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pynvml
import pytest

from chela_bench.profiles import inventory, machine, nvml
from chela_bench.profiles.compiling import compiling
from chela_bench.profiles.doctor import PYTHON, at_least, can_run, examine
from chela_bench.profiles.inventory import REQUIRED, Card, Facts, Ncu, Peer, Torch
from tests.running import ROOT, chela_bench, in_this_process, tiny_config
from tests.test_ncu import install

UUID = "99089055-3dcd-58d1-01b8-980b633b446e"
GPU = {
    "uuid": UUID,
    "name": "NVIDIA H100 80GB HBM3",
    "compute_capability": "9.0",
    "memory_bytes": 85017493504,
    "sm_count": 132,
    "smem_per_block_bytes": 232448,
    "smem_per_sm_bytes": 233472,
    "l2_bytes": 52428800,
}
CARD = Card(f"GPU-{UUID}", GPU["name"], GPU["memory_bytes"], ecc=True, mig=False)
FLA = Peer("fla", ("fla_chunk",), "pip install -e '.[peers]' in the checkout", installed=True)
H100 = Facts(
    device="cuda",
    no_gpu=None,
    python="3.11.7",
    packages={**REQUIRED, "torch": "2.11.0", "triton": "3.6.0"},
    wanted_triton="3.6.0",
    torch=Torch(version="2.11.0+cu130", cuda="13.0", usable=True, gpus=(GPU,)),
    compiler="/usr/bin/gcc",
    driver="580.159.04",
    driver_cuda="13.0",
    cards=(CARD,),
    ncu=Ncu("/usr/local/cuda/bin/ncu", "2025.3.1.0"),
    counters_admin_only=False,
    counters_tried=True,
    energy=True,
    peers=(FLA,),
    config="bench.toml",
    out="runs",
)
UNTRIED = replace(H100, counters_tried=False)
CPU_BUILD = "the installed torch is a CPU build"
CPU = replace(
    H100,
    device="cpu",
    no_gpu=CPU_BUILD,
    torch=Torch(version="2.13.0+cpu"),
    driver=None,
    driver_cuda=None,
    cards=(),
    ncu=None,
)


def test_a_good_gpu_machine_is_all_plain_facts():
    checks = {check.name: check for check in examine(H100)}
    assert {check.state for check in checks.values()} == {"ok"}
    assert {check.remedy for check in checks.values()} == {None}
    assert checks["GPU"].found == f"NVIDIA H100 80GB HBM3, 79.2 GiB, cuda:0 of 1, GPU-{UUID}"
    assert checks["SRAM"].found == "227 KiB a block, 228 KiB an SM"
    assert checks["L2"].found == "50 MiB"
    assert checks["SM"].found == "132, compute capability 9.0"
    assert list(checks) == [
        "Python", "packages", "torch", "triton", "compiler", "driver", "CUDA", "NVML", "GPU", "SM",
        "SRAM", "L2", "ECC", "MIG", "processes", "ncu", "counters", "GPM", "energy", "peers",
        "bench.toml", "run folder",
    ]  # fmt: skip


def test_a_cpu_machine_can_run_without_a_warning():
    checks = examine(CPU)
    assert {check.state for check in checks} == {"ok"}
    found = {check.name: check.found for check in checks}
    assert found["driver"] == "none"
    assert found["GPU"] == f"none: {CPU_BUILD}"


def _without(package):
    return {**H100.packages, package: None}


TWO = (GPU, {**GPU, "uuid": "other"})


@pytest.mark.parametrize(
    ("facts", "name", "state", "found", "remedy"),
    [
        # the interpreter and what is installed
        (replace(H100, python="3.10.12"), "Python", "problem", "3.11 or later", "later Python"),
        (replace(H100, packages=_without("pyarrow")), "packages", "problem",
         "pyarrow is not installed", "pip install 'pyarrow>=18'"),
        (replace(H100, packages={**H100.packages, "pandas": "2.1.4"}), "packages", "problem",
         "pandas 2.1.4 is older than 2.2", "pip install 'pandas>=2.2'"),
        (replace(H100, packages=_without("torch"), torch=Torch("not installed")), "torch",
         "problem", "not installed", "pip install 'torch>=2.10'"),
        (replace(H100, torch=Torch("starting it died of SIGABRT")), "torch", "problem",
         "2.11.0; starting it died of SIGABRT", "--force-reinstall torch"),
        (replace(H100, torch=replace(H100.torch, version="2.9.1+cu128")), "torch", "problem",
         "2.9.1+cu128; 2.10 or later", "pip install 'torch>=2.10'"),
        (replace(H100, packages=_without("triton")), "triton", "problem", "not installed",
         "pip install 'triton==3.6.0'"),
        (replace(H100, packages={**H100.packages, "triton": "3.5.1"}, wanted_triton=None),
         "triton", "problem", "3.5.1; 3.6 or later", "pip install 'triton>=3.6'"),
        (replace(H100, packages={**H100.packages, "triton": "3.7.1"}), "triton", "warning",
         "3.7.1; this torch wants 3.6.0", "pip install 'triton==3.6.0'"),
        (replace(CPU, compiler=None), "compiler", "warning", "cannot build", "install gcc"),
        (replace(CPU, python_headers=False), "compiler", "warning", "without Python.h",
         "python3-dev"),
        # no driver, or one that does not do
        (replace(H100, no_gpu="the NVIDIA driver reports no GPU", cards=(), driver=None), "GPU",
         "problem", "the NVIDIA driver reports no GPU", "install NVIDIA's driver"),
        (replace(H100, nvml_problem="Driver/library version mismatch", driver=None), "driver",
         "warning", "version mismatch", "reboot"),
        (replace(H100, driver_cuda="12.8"), "CUDA", "warning",
         "torch is built for 13.0, the driver runs 12.8", "update the driver"),
        (replace(H100, torch=replace(H100.torch, usable=False, gpus=(), said="driver too old")),
         "GPU", "problem", "torch finds no usable GPU: driver too old", "--device cpu"),
        (replace(H100, torch=replace(H100.torch, said="sm_103 is not compatible")), "GPU",
         "warning", "torch says: sm_103 is not compatible", "install a torch for this card"),
        (replace(H100, device="cuda:2", torch=replace(H100.torch, gpus=TWO)), "GPU", "problem",
         "no cuda:2: torch sees 2", "--device cuda:0 to cuda:1"),
        # a driver, and a torch that does not use it
        (replace(CPU, cards=(CARD,), driver="580.1"), "GPU", "warning",
         f"NVIDIA H100 80GB HBM3, unused: {CPU_BUILD}", "install a torch for CUDA"),
        (replace(CPU, cards=(CARD,), driver="580.1", forced_cpu=True), "GPU", "ok",
         "unused with --device cpu", None),
        (replace(CPU, device="cuda", cards=(CARD,), driver="580.1"), "GPU", "problem", CPU_BUILD,
         "install a torch for CUDA"),
        (replace(CPU, cards=(CARD,), no_gpu="CUDA_VISIBLE_DEVICES hides every GPU"), "GPU",
         "warning", "hides every GPU", "unset CUDA_VISIBLE_DEVICES"),
        # the card
        (replace(H100, cards=(replace(CARD, ecc=False),)), "ECC", "warning", "off", "nvidia-smi"),
        (replace(H100, cards=(replace(CARD, ecc=None),)), "ECC", "ok", "has none", None),
        (replace(H100, cards=(replace(CARD, mig=True),)), "MIG", "warning", "on: a slice",
         "nvidia-smi -mig 0"),
        (replace(H100, cards=(replace(CARD, uuid="GPU-whole", mig=True),)), "MIG", "warning",
         "on: a slice", "nvidia-smi -mig 0"),
        (replace(H100, cards=(replace(CARD, processes=("4711 (python)",)),)), "processes",
         "warning", "4711 (python)", "--device cuda:N"),
        (replace(H100, cards=(replace(CARD, uuid="GPU-a"), replace(CARD, uuid="GPU-b"))), "card",
         "warning", "NVML knows none", "nvidia-smi -L"),
        # tools and peers
        (replace(H100, ncu=None), "ncu", "warning", "not found", "nsight-compute"),
        (replace(H100, ncu=Ncu("/opt/ncu", None)), "ncu", "warning",
         "/opt/ncu does not tell its version", "install 2022.3 or later: https"),
        (replace(H100, ncu=Ncu("/opt/ncu", "2021.3.1.0")), "ncu", "warning",
         "2021.3.1.0, /opt/ncu; 2022.3 or later is needed", "install 2022.3 or later: https"),
        (replace(H100, counters_problem=("ncu may not (ERR_NVGPUCTRPERM)", "run as root")),
         "counters", "warning", "ncu may not (ERR_NVGPUCTRPERM)", "run as root"),
        (UNTRIED, "counters", "ok", "permitted, as the driver says; not tried", None),
        (replace(UNTRIED, counters_admin_only=True), "counters", "warning", "ERR_NVGPUCTRPERM",
         "NVreg_RestrictProfilingToAdminUsers=0"),
        (replace(UNTRIED, counters_admin_only=True, admin=True), "counters", "ok", "permitted",
         None),
        (replace(UNTRIED, counters_admin_only=None), "counters", "ok", "does not say who may",
         None),
        (replace(H100, gpm_problem="this card has no GPM; take --hbm ncu"), "GPM", "warning",
         "this card has no GPM", "take --hbm ncu"),
        (replace(H100, energy=False), "energy", "warning", "does not count", "Volta or later"),
        (replace(H100, peers=(replace(FLA, installed=False),)), "peers", "warning",
         "fla is not installed: fla_chunk", "pip install -e '.[peers]' in the checkout"),
        # files
        (replace(H100, config_problem="bench.toml: sweep: missing"), "bench.toml", "problem",
         "sweep: missing", "--config"),
        (replace(H100, out_problem="cannot write to /x: Read-only"), "run folder", "problem",
         "Read-only", "--out"),
    ],
)  # fmt: skip
def test_each_problem_has_its_remedy(facts, name, state, found, remedy):
    checks = examine(facts)
    [check] = [check for check in checks if check.name == name]
    assert check.state == state
    assert found in check.found
    assert (remedy in (check.remedy or "")) if remedy else check.remedy is None
    assert can_run(checks) == (state != "problem")
    assert all((check.remedy is None) == (check.state == "ok") for check in checks)


def test_the_card_in_use_is_matched_by_uuid():
    busy = replace(CARD, uuid="GPU-other", processes=("1 (x)",))
    facts = replace(H100, cards=(busy, CARD), torch=replace(H100.torch, gpus=TWO))
    states = {check.name: check.state for check in examine(facts)}
    assert states["processes"] == "ok"
    states = {check.name: check.state for check in examine(replace(facts, device="cuda:1"))}
    assert states["processes"] == "warning"


def test_a_card_that_is_not_used_is_not_judged():
    busy = replace(CARD, ecc=False, mig=True, processes=("1 (x)",))
    facts = replace(H100, device="cpu", forced_cpu=True, cards=(busy,), counters_admin_only=True)
    assert {check.state for check in examine(facts)} == {"ok"}


@pytest.mark.parametrize(
    ("version", "minimum", "enough"),
    [
        ("2.10.0+cu130", "2.10", True), ("2.9.1", "2.10", False), ("2.10.0a0+git1", "2.10", True),
        ("12.560.30", "12.560", True), ("8.1.7", "8.1.8", False), ("18", "18", True),
    ],
)  # fmt: skip
def test_versions_compare_as_numbers(version, minimum, enough):
    assert at_least(version, minimum) == enough


def test_minimum_versions_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dict(line.partition(";")[0].split(">=") for line in project["dependencies"])
    assert wanted == REQUIRED
    assert project["requires-python"] == f">={PYTHON}"


# Reading the facts.


def stub_torch(folder: Path, body: str) -> Path:
    package = folder / "stub" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(body)
    return package.parent


STUB = """
import types
__version__ = "2.13.0"
version = types.SimpleNamespace(cuda=None)
cuda = types.SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
"""


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("raise ImportError('libcudart.so.13: no such file')", "exit code 1: ImportError: libcud"),
        ("import os; os.abort()", "starting it died of SIGABRT"),
        ("import time; time.sleep(60)", "starting it did not end within 0.5 s"),
        ("import sys; sys.exit(0)", "exit code 0"),
        ("import sys; print('[]'); sys.exit(0)", "exit code 0"),
    ],
)
def test_a_torch_that_does_not_start_is_a_finding(tmp_path, monkeypatch, body, error):
    monkeypatch.setenv("PYTHONPATH", str(stub_torch(tmp_path, body)))
    found = inventory.probe_torch(0.5 if "sleep" in body else 30)
    assert error in found.error
    assert found.version is None


def test_the_probe_takes_what_torch_says(tmp_path, monkeypatch):
    body = f"""
import types, warnings
__version__ = "2.11.0+cu130"
version = types.SimpleNamespace(cuda="13.0")
p = types.SimpleNamespace(
    uuid={UUID!r}, name={GPU["name"]!r}, major=9, minor=0, total_memory=85017493504,
    multi_processor_count=132, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, L2_cache_size=52428800)
def available():
    warnings.warn("CUDA initialization: slow")
    return True
cuda = types.SimpleNamespace(
    is_available=available, device_count=lambda: 1, get_device_properties=lambda index: p)
"""
    monkeypatch.setenv("PYTHONPATH", str(stub_torch(tmp_path, body)))
    assert inventory.probe_torch(30) == replace(H100.torch, said="CUDA initialization: slow")


def _fake_nvml(**changes):
    """pynvml as on a machine with one H100."""
    real = {name: getattr(pynvml, name) for name in dir(pynvml) if not name.startswith("nvml")}
    process = SimpleNamespace(pid=4711)
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.159.04",
        "nvmlSystemGetCudaDriverVersion": lambda: 13000,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: "handle",
        "nvmlDeviceGetHandleByUUID": lambda uuid: "handle" if uuid == CARD.uuid else None,
        "nvmlDeviceGetUUID": lambda handle: CARD.uuid,
        "nvmlDeviceGetName": lambda handle: CARD.name,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=CARD.memory_bytes),
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: 1980,
        "nvmlDeviceGetEccMode": lambda handle: (1, 1),
        "nvmlDeviceGetMigMode": lambda handle: (0, 0),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [process],
        "nvmlSystemGetProcessName": lambda pid: "python",
    }
    return SimpleNamespace(**{**real, **answers, **changes})


def _gpu_facts(monkeypatch, fake, wanted="auto"):
    monkeypatch.setattr(nvml, "pynvml", fake)
    monkeypatch.setattr(machine, "torch_cuda_version", lambda: "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return inventory._gpu_facts(wanted)


def test_nvml_tells_the_card_without_torch(monkeypatch):
    assert _gpu_facts(monkeypatch, _fake_nvml()) == {
        "device": "cuda",
        "no_gpu": None,
        "driver": "580.159.04",
        "driver_cuda": "13.0",
        "nvml_problem": None,
        "cards": (replace(CARD, processes=("4711 (python)",)),),
    }


def test_a_card_that_answers_little_is_still_listed(monkeypatch):
    def refuse(*_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    names = ("nvmlDeviceGetEccMode", "nvmlDeviceGetMigMode", "nvmlDeviceGetComputeRunningProcesses",
             "nvmlDeviceGetMemoryInfo", "nvmlSystemGetCudaDriverVersion")  # fmt: skip
    found = _gpu_facts(monkeypatch, _fake_nvml(**dict.fromkeys(names, refuse)))
    assert found["cards"] == (Card(CARD.uuid, CARD.name),)
    assert found["driver_cuda"] is None


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, None),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "RM has detected an NVML/RM version mismatch."),
    ],
)
def test_no_driver_is_told_from_a_broken_one(monkeypatch, error, problem):
    def fail():
        raise pynvml.NVMLError(error)

    found = _gpu_facts(monkeypatch, _fake_nvml(nvmlInit=fail), "cuda:1")
    assert found["device"] == "cuda:1"
    assert found["no_gpu"] == "the NVIDIA driver reports no GPU"
    assert found["cards"] == ()
    assert found["nvml_problem"] is None if problem is None else problem in found["nvml_problem"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("RmProfilingAdminOnly: 1\n", True), ("A: 1\nRmProfilingAdminOnly: 0\n", False), ("", None)],
)
def test_who_may_read_the_counters(tmp_path, text, expected):
    params = tmp_path / "params"
    params.write_text(text)
    assert inventory.counters_admin_only(params) is expected
    assert inventory.counters_admin_only(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CapEff:\t000001ffffffffff\n", True),
        ("CapEff:\t00000000a80425fb\n", False),  # root in a container
        ("CapEff:\t0000000000000000\n", False),
    ],
)
def test_who_is_an_administrator(tmp_path, text, expected):
    status = tmp_path / "status"
    status.write_text(text)
    assert inventory.is_admin(status) is expected


def test_what_counts_is_tried(tmp_path, monkeypatch):
    """ncu on a kernel, GPM and the energy counter on the card in use."""
    from chela_bench.profiles import gpm

    facts = replace(UNTRIED, ncu=Ncu(install(tmp_path, monkeypatch, "denied"), "2025.3.1.0"))
    monkeypatch.setattr(gpm, "problem", lambda uuid: f"no GPM of {uuid}; none")
    monkeypatch.setattr(nvml, "energy_mj", lambda uuid: 5 if uuid == CARD.uuid else None)
    found = inventory._counters(facts)
    assert found["counters_tried"] and "ERR_NVGPUCTRPERM" in found["counters_problem"].what
    assert found["gpm_problem"] == f"no GPM of {CARD.uuid}; none" and found["energy"]
    monkeypatch.setenv("FAKE_NCU", "")
    assert inventory._counters(facts)["counters_problem"] is None
    old = replace(facts, ncu=Ncu("/opt/ncu", "2020.1"))
    assert "counters_tried" not in inventory._counters(old)  # it would say nothing that helps
    assert inventory._counters(CPU) == {}


def test_a_slice_of_a_card_is_found_by_its_own_name():
    slice_ = replace(CARD, uuid=f"MIG-{UUID}")
    other = replace(CARD, uuid="GPU-other")
    assert inventory.card_in_use(replace(H100, cards=(other, slice_))) == slice_
    assert inventory.card_in_use(replace(H100, cards=(other, CARD))) == CARD
    assert inventory.card_in_use(CPU) is None


def test_a_tool_that_says_its_version(tmp_path, monkeypatch):
    ncu = tmp_path / "ncu"
    ncu.write_text("#!/bin/sh\necho 'NVIDIA (R) Nsight Compute'\necho 'Version 2025.3.1.0 (x)'\n")
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert inventory.find_ncu() == str(ncu)
    assert inventory.ncu_version(str(ncu)) == "2025.3.1.0"


def test_a_folder_that_cannot_be_written(tmp_path):
    assert inventory.unwritable(tmp_path / "a" / "b") is None
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    assert inventory.unwritable(file / "x") == f"cannot write to {file}: Not a directory"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('triton==3.6.0; platform_system == "Linux"', "3.6.0"),
        ("triton (==3.6.0)", "3.6.0"),
        ("sympy>=1.13", None),
    ],
)
def test_torch_pins_its_triton(monkeypatch, line, wanted):
    monkeypatch.setattr(inventory.importlib.metadata, "requires", lambda name: ["filelock", line])
    assert inventory._triton_of_torch() == wanted


@pytest.mark.parametrize(
    ("package", "module"), [("pyarrow", "pyarrow"), ("nvidia-ml-py", "pynvml")]
)
def test_a_package_whose_module_is_gone_is_not_installed(monkeypatch, package, module):
    assert inventory._version(package)
    monkeypatch.setitem(sys.modules, module, None)
    assert inventory._version(package) is None


# The command.


def _doctor(tmp_path, *arguments, body=STUB, **changes):
    stub = stub_torch(tmp_path, body)
    module = importlib.import_module("chela_bench.cli.doctor")
    with mock.patch.object(module, "compiling", partial(_compiling, body)):
        return in_this_process(
            "doctor", "--config", tiny_config(tmp_path), "--out", tmp_path / "runs", *arguments,
            PYTHONPATH=f"{ROOT}{os.pathsep}{stub}", **changes,
        )  # fmt: skip


@cache
def _compiling(body):
    """What compiles beside such a torch, tried once."""
    return compiling()


def test_doctor_of_this_machine():
    done = chela_bench("doctor", "--json", "--device", "cpu")
    document = json.loads(done.stdout)
    assert list(document) == ["device", "can_run", "checks"]
    assert (document["device"], document["can_run"], done.returncode) == ("cpu", True, 0)
    for check in document["checks"]:
        assert list(check) == ["name", "state", "found", "remedy"]
    found = {check["name"]: check["found"] for check in document["checks"]}
    assert REQUIRED["torch"] <= found["torch"]


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_piped_lines_fit_and_carry_no_colour(tmp_path, columns):
    done = _doctor(tmp_path, COLUMNS=columns)
    assert done.returncode == 0, done.stdout
    assert "\x1b" not in done.stdout
    longest = max(done.stdout.splitlines(), key=len)
    assert len(longest) <= int(columns) or " " not in longest.strip().removeprefix("-> ")
    assert "chela-bench sweep can run on cpu" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "body", "name"),
    [
        (["--device", "cuda"], STUB, "GPU"),
        ([], "import os; os.abort()", "torch"),
        ([], STUB.replace("2.13.0", "2.9.0"), "torch"),
        (["--config", "/nope.toml"], STUB, "bench.toml"),
        (["--out", "/dev/null/runs"], STUB, "run folder"),
    ],
)
def test_what_stops_the_main_job_is_exit_code_6(tmp_path, arguments, body, name):
    done = _doctor(tmp_path, "--json", *arguments, body=body)
    assert done.returncode == 6, done.stderr
    document = json.loads(done.stdout)
    assert not document["can_run"]
    assert [c["name"] for c in document["checks"] if c["state"] == "problem"] == [name]


@pytest.mark.parametrize("missing", ["pynvml", "pydantic"])
def test_a_missing_dependency_does_not_stop_doctor(tmp_path, missing):
    (tmp_path / "shadow").mkdir()
    shadow = tmp_path / "shadow" / f"{missing}.py"
    shadow.write_text(f"raise ModuleNotFoundError('gone', name={missing!r})")
    done = chela_bench(
        "doctor", "--device", "cpu",
        PYTHONPATH=os.pathsep.join(map(str, (ROOT, shadow.parent, stub_torch(tmp_path, STUB)))),
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert f"{missing} is not installed" in done.stdout
    assert "chela-bench sweep" in done.stdout


def test_a_device_that_is_none_is_a_usage_error(tmp_path):
    done = _doctor(tmp_path, "--device", "tpu")
    assert done.returncode == 2
    assert "--device takes auto, cpu, cuda or cuda:N" in done.stderr
