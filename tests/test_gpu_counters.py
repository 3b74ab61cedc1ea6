"""The counters on a real card: bytes that are known beforehand, as ncu, GPM and the models see
them."""

from __future__ import annotations

import json
import time

import pytest
import torch

from chela_bench.bench import measure, plan, profiling, timing
from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.load import sha256_of_files
from chela_bench.bench.runner import utc_now
from chela_bench.errors import EnvironmentProblem
from chela_bench.profiles import gpm, ncu, nvml
from chela_bench.profiles.machine import environment as machine_environment
from chela_bench.records import Ceilings
from tests.running import ROOT, chela_bench, tiny_config

pytestmark = pytest.mark.gpu
GPU = {"CUDA_VISIBLE_DEVICES": "0"}
MIB = 1 << 20
COPIES = """
def copies(q, k, v):
    return v + 0  # a kernel; a clone would be a copy by the driver, which ncu does not count
"""


@pytest.fixture(scope="module")
def tool():
    try:
        return profiling.usable_tool()
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def facts():
    return machine_environment("cuda")


def _count(tool, folder, cases, settings):
    way = profiling.Way(tool, settings.sessions(ncu=True)[0], Ceilings(), folder, print)
    begin = time.monotonic()
    counts = profiling.count(way, cases, [*ncu.BYTES, *ncu.LAUNCH], "ncu", None)
    print(f"{utc_now()}: {len(cases)} cases in {time.monotonic() - begin:.1f} s")
    return counts


def test_a_copy_reads_and_writes_what_it_must(tool, tmp_path):
    """256 MiB, far beyond L2, and 16 MiB, which stay in it until they are evicted; and what
    autograd launches from a thread of its own is in the range as well."""
    file = tmp_path / "copies.py"
    file.write_text(COPIES)
    name, target = "copies.py:copies", f"{file}:copies"
    flags = plan.Flags(ops=["linear_attention"], impls=[target], lens="4k,64k", dtypes=["bf16"],
                       shapes=["medium"], directions=["fwd"], hbm="ncu")  # fmt: skip
    settings = plan.resolve(load_config(find_config(ROOT / "bench.toml")), flags, ["cuda"])
    assert settings.user_files_sha256 == sha256_of_files({name: target})
    cases = [(case.shape["T"], case) for case in plan.cases(settings)]
    chunked = cases[0][1].model_copy(update={"impl": "triton_chunked"})
    cases += [(1, chunked), (2, chunked.model_copy(update={"direction": "fwdbwd"}))]
    counts = _count(tool, tmp_path, cases, settings)
    assert counts.reasons == {}
    for tokens, size in ((4096, 16 * MIB), (65536, 256 * MIB)):
        [kernel] = counts.kernels[tokens]
        late = counts.late_bytes[tokens]
        print(tokens, kernel, late)
        assert kernel.passes in (1, None) and kernel.launches == 1
        assert kernel.read_bytes == pytest.approx(size, rel=0.03)
        assert kernel.write_bytes + late == pytest.approx(
            size, rel=0.1 if size < 50 * MIB else 0.03
        )
    forward, both = ({k.name for k in counts.kernels[n]} for n in (1, 2))
    assert len(both) > len(forward) >= 1


MODELLED = [
    ("linear_attention", "triton_chunked", "b1-t16k-h16-d128"),
    ("linear_attention", "triton_recurrent", "b1-t16k-h16-d128"),
    ("short_long_conv", "triton", "b1-t16k-d1024"),
]


def test_our_models_agree_with_what_is_counted(tool, tmp_path):
    """At 16k tokens, from a cold cache, within a tenth; and the records say so end to end."""
    ops, impls, shapes = (",".join(dict.fromkeys(column)) for column in zip(*MODELLED, strict=True))
    done = chela_bench(
        "sweep", "--json", "--device", "cuda", "--config", ROOT / "bench.toml", "--hbm", "ncu",
        "--out", tmp_path / "runs", "--op", ops, "--impl", impls, "--shape", shapes,
        "--direction", "fwd", "--ncu-report", tmp_path / "kept.ncu-rep", **GPU,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    found = {point["impl"]: point["hbm"]["measured_over_model"] for point in points}
    print(found)
    assert {point["hbm"]["source"] for point in points} == {"ncu"}
    assert all(kernel["passes"] in (1, None) for p in points for kernel in p["kernels"])
    assert (tmp_path / "kept.ncu-rep").stat().st_size > 1000
    wrong = {impl: ratio for impl, ratio in found.items() if not 0.9 <= ratio <= 1.1}
    assert not wrong and set(found) == {impl for _, impl, _ in MODELLED}


def test_gpm_sees_a_copy_of_known_size(facts):
    problem = gpm.problem(facts.uuid)
    if problem is not None:
        pytest.skip(problem)
    source = torch.randn(MIB * 256, device="cuda")
    target = torch.empty_like(source)

    def copy():
        target.copy_(source)

    timing.repeat(copy, 700_000, for_s=measure.LEAD_S)
    with gpm.Counted(facts.uuid) as counted:
        copies = timing.repeat(copy, 700_000, for_s=measure.GPM_S)
    moved = copies * 2 * source.nbytes
    print(f"GPM {counted.total_bytes} of {moved}: {counted.total_bytes / moved:.3f}")
    assert counted.total_bytes == pytest.approx(moved, rel=0.15)


def test_energy_is_power_times_time(tmp_path, facts):
    if nvml.energy_mj(facts.uuid) is None:
        pytest.skip("this card does not count its energy")
    done = chela_bench(
        "sweep", "--json", "--device", "cuda", "--config", tiny_config(tmp_path), "--out",
        tmp_path / "runs", "--impl", "triton_chunked", "--lens", "64k", "--set", "H=16,K=128,V=128",
        "--dtype", "bf16", "--energy", "--hbm", "auto", **GPU,
    )  # fmt: skip
    [point] = json.loads(done.stdout)["points"]
    power_w = point["energy_j"] / (point["wall_ns"] / 1e9)
    print(f"{point['energy_j']} J a call, {power_w:.0f} W; NVML said {point['telemetry']}")
    assert 50 < power_w < 1.3 * (facts.power_limit_mw or 700_000) / 1e3
    assert point["telemetry"]["readings"] >= 1


def test_doctor_has_tried_the_counters():
    checks = {
        c["name"]: c for c in json.loads(chela_bench("doctor", "--json", **GPU).stdout)["checks"]
    }
    assert checks["counters"]["state"] == "ok" or checks["counters"]["remedy"]
    for name in ("ncu", "counters", "GPM", "energy"):
        print(checks[name])
        assert checks[name]["state"] == "ok" or checks[name]["remedy"]
