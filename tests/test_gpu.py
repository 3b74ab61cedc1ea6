"""The engine on a real card: what the timer measures, and what faults do to a sweep."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from chela_bench.bench import timing, tuning
from chela_bench.profiles.machine import environment as machine_environment
from chela_bench.profiles.nvml import telemetry
from tests.planted import doubles_in_place
from tests.running import FAULTS, ROOT, chela_bench, command, environment, tiny_config

pytestmark = pytest.mark.gpu

SECOND = timing.Budget(1.0, 1.0)
GPU = {"CUDA_VISIBLE_DEVICES": "0"}


@pytest.fixture(scope="module")
def facts():
    return machine_environment("cuda")


@pytest.fixture(scope="module")
def timer(facts):
    return timing.EventTimer(l2_bytes=facts.l2_bytes, cold=True)


def _spin(microseconds):
    """One kernel that spins for a known time, whatever memory does."""
    cycles = int(microseconds * 1e3 * timing._spin_cycles_per_ns())
    return lambda: torch.cuda._sleep(cycles)


@pytest.mark.parametrize("microseconds", [5, 50])
def test_a_short_kernel_is_not_reported_as_a_long_one(timer, microseconds):
    call = _spin(microseconds)
    call()
    measured = timing.event_samples(call, timer, SECOND)
    spans = timing.profiler_samples(call, None, SECOND, launches=1)
    event_us = sorted(measured)[len(measured) // 2] / 1e3
    profiler_us = sorted(spans)[len(spans) // 2] / 1e3
    print(f"{microseconds} us kernel: {event_us:.2f} us by events, {profiler_us:.2f} by profiler")
    assert abs(profiler_us - microseconds) < 0.15 * microseconds + 1.5
    assert event_us < profiler_us + 3.0  # an event costs one to two microseconds; a launch five


def test_host_time_between_launches_stays_out(timer):
    """Ten tiny kernels with 2 ms of host time between them: microseconds, not milliseconds."""
    x = torch.ones(1024, device="cuda")

    def call():
        for _ in range(10):
            x.add_(1.0)
            end = timing.time.perf_counter() + 2e-4
            while timing.time.perf_counter() < end:
                pass

    call()
    samples = timing.event_samples(call, timer, SECOND)
    assert sorted(samples)[len(samples) // 2] < 60e3


def test_a_call_that_synchronises_has_no_kernel_time(timer, monkeypatch):
    monkeypatch.setattr(timing, "_LONGEST_HOLD_NS", 2_000_000)
    with pytest.raises(timing.NoKernelTime, match="synchronises"):
        timing.event_samples(torch.cuda.synchronize, timer, SECOND)


def test_cold_is_slower_than_warm_where_the_inputs_fit_l2(facts):
    x = torch.randn(4 << 20, device="cuda")  # 16 MiB
    out = torch.empty((), device="cuda")

    def call():
        torch.sum(x, dim=0, out=out)

    times = {}
    for cold in (True, False):
        samples = timing.event_samples(
            call, timing.EventTimer(l2_bytes=facts.l2_bytes, cold=cold), SECOND
        )
        times[cold] = sorted(samples)[len(samples) // 2]
    assert times[True] > 1.1 * times[False], times


def test_nvml_speaks_of_the_card_that_torch_uses(facts):
    reading, throttle = telemetry(facts.uuid)
    assert reading.sm_clock_mhz and reading.power_mw and reading.temperature_c
    assert throttle is not None
    assert facts.driver and facts.l2_bytes > 1 << 20


def test_an_autotuned_kernel_is_tuned_at_every_shape(monkeypatch):
    tuned_at = []
    bench = tuning._bench

    def counting(kernel_call, quantiles):
        tuned_at.append(shape)
        return bench(kernel_call, quantiles)

    monkeypatch.setattr(tuning, "_bench", counting)
    tunings = tuning.Tunings()
    for tokens in (1024, 4096, 1024):
        shape = f"T{tokens}"
        x = torch.ones(tokens, device="cuda")
        with tunings.at(shape):
            for _ in range(2):
                doubles_in_place[lambda meta: (-(-tokens // meta["BLOCK"]),)](x, tokens)  # noqa: B023
    assert tuned_at == ["T1024"] * 2 + ["T4096"] * 2  # two candidates each


def _sweep(config, *arguments, op="linear_attention"):
    done = chela_bench(
        "sweep", "--json", "--device", "cuda", "--config", config,
        "--out", config.parent / "runs", "--op", op, *arguments, **GPU,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done, json.loads(done.stdout)


@pytest.mark.parametrize("timer", ["event", "profiler"])
def test_steps_on_the_card_have_kernel_time_and_are_right(tmp_path, timer):
    config = tiny_config(tmp_path, sample_s=1.0, build_s=120.0)
    done, document = _sweep(
        config, "--direction", "decode", "--dtype", "bf16", "--lens", "300", "--timer", timer,
        "--impl", "chela,sdpa_flash,products", op="chela_layer,softmax_layer",
    )  # fmt: skip
    points = {point["impl"]: point for point in document["points"]}
    assert {point["outcome"] for point in points.values()} == {"ok"}, points
    assert done.returncode == 0 and len(points) == 3
    for point in points.values():
        assert 0 < point["time_ns"]["median"] < point["wall_ns"] * 1.5
        assert 3 <= point["launches"] < 100 and point["host_ns"] and point["floor_ns"]
        assert point["hbm_bytes_per_token"] > 0 and point["parameters"] > 0


def test_faults_on_the_card_are_outcomes(tmp_path):
    names = {
        "right": "ok",
        "skips_last_rows": "wrong",
        "out_of_gpu_memory": "oom",
        "reads_out_of_bounds": "crash",
        "hangs_on_the_gpu": "timeout",
        "synchronises": "ok",
    }
    flags = [part for name in names for part in ("--impl", f"{FAULTS}:{name}")]
    config = tiny_config(tmp_path, build_s=8.0, phase_s=8.0)
    done, document = _sweep(config, *flags)
    points = {point["impl"].partition(":")[2]: point for point in document["points"]}
    assert {name: point["outcome"] for name, point in points.items()} == names, points
    assert points["synchronises"]["time_ns"] is None
    assert points["synchronises"]["wall_ns"] > 0
    assert "synchronises" in points["synchronises"]["null_reasons"]["time_ns"]
    right = points["right"]
    for column in ("time_ns", "wall_ns", "host_ns", "floor_ns", "peak_bytes", "launches"):
        assert right[column], column
    assert right["telemetry"]["sm_clock_mhz"] and right["throttle"] is not None
    assert right["device"].startswith("GPU-") and right["l2"] == "cold"
    assert done.returncode == 3


def test_two_sweeps_on_one_card_are_refused(tmp_path):
    config = tiny_config(tmp_path, build_s=60.0)
    holder = subprocess.Popen(
        command("sweep", "--device", "cuda", "--config", config, "--out", tmp_path / "one",
                "--op", "linear_attention", "--impl", f"{FAULTS}:hangs"),
        env=environment(**GPU), cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert "points on" in holder.stderr.readline()
        done = chela_bench("sweep", "--device", "cuda", "--config", config,
                           "--out", tmp_path / "two", **GPU)  # fmt: skip
    finally:
        holder.kill()
        holder.communicate()
    assert done.returncode == 6
    assert f"in use by another sweep (process {holder.pid})" in done.stderr
    assert not any((tmp_path / "two").iterdir())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_a_sweep(tmp_path):
    done = chela_bench(
        "sweep", "--json", "--gpus", "all", "--config", tiny_config(tmp_path),
        "--out", tmp_path / "runs", "--impl", "chunked,triton_chunked", "--dtype", "bf16",
        "--lens", "256..4k", CUDA_VISIBLE_DEVICES="0,1",
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert {point["outcome"] for point in document["points"]} == {"ok"}, done.stderr
    run = document["run"]
    cards = [run["environment"], *(device["environment"] for device in run["other_devices"])]
    assert len({card["uuid"] for card in cards}) == 2
    assert {point["device"] for point in document["points"]} == {card["uuid"] for card in cards}
    assert run["other_devices"][0]["ceilings"]["copy_gb_per_s"] > 100


@pytest.mark.parametrize("timer_name", ["event", "profiler"])
@pytest.mark.parametrize("l2", ["cold", "warm"])
def test_every_convention_gives_a_time_near_the_others(tmp_path, timer_name, l2):
    _, document = _sweep(
        tiny_config(tmp_path), "--impl", "triton_chunked", "--dtype", "bf16",
        "--set", "H=16,K=64,V=64", "--axis", "schedule=fused", "--lens", "4k",
        "--timer", timer_name, "--l2", l2,
    )  # fmt: skip
    [point] = document["points"]
    assert point["outcome"] == "ok", point["reason"]
    assert 5e3 < point["time_ns"]["median"] < 200e3
    assert point["launches"] == 1


MEMCHECK = """
import sys, torch
from chela_bench.kernels.linear_attention import (
    linear_attention, linear_attention_recurrent, linear_attention_step,
)
from chela_bench.kernels.short_long_conv import short_long_conv
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for B, T, H, K, V in [(1, 1, 1, 16, 16), (2, 65, 3, 60, 130), (1, 100, 2, 128, 64)]:
        for causal in (True, False):
            q, k = torch.randn(2, B, T, H, K, device="cuda", dtype=dtype)
            v = torch.randn(B, T, H, V, device="cuda", dtype=dtype)
            h0 = torch.randn(B, H, K, V, device="cuda")
            inputs = [x.requires_grad_() for x in (q, k, v, h0)]
            for config in ({"sweep": 0}, {"sweep": 1, "segments": 2}, {"keep": 1}):
                results = linear_attention(
                    q, k, v, initial_state=h0, output_final_state=True, causal=causal, config=config
                )
                torch.autograd.grad(results, inputs, [torch.ones_like(x) for x in results])
            with torch.no_grad():
                linear_attention_recurrent(q, k, v, initial_state=h0, causal=causal)
                linear_attention_step(q[:, 0], k[:, 0], v[:, 0], h0)
    bounds = torch.tensor([0, 0, 1, 64, 100], device="cuda")
    q, k, v = (torch.randn(1, 100, 2, 64, device="cuda", dtype=dtype) for _ in range(3))
    v.requires_grad_()
    o, _ = linear_attention(q, k, v, cu_seqlens=bounds, output_final_state=True)
    torch.autograd.grad(o, v, torch.ones_like(o))
for dtype, T in ((torch.bfloat16, 100), (torch.bfloat16, 3001), (torch.float16, 9001),
                 (torch.bfloat16, 40000), (torch.float32, 700)):
    x = torch.randn(2, T, 5, device="cuda", dtype=dtype).requires_grad_()
    short = [torch.randn(5, W, device="cuda").requires_grad_() for W in (3, 11)]
    long = torch.randn(5, T, device="cuda").requires_grad_()
    z = short_long_conv(x, short, long)
    torch.autograd.grad(z, (x, *short, long), torch.randn_like(z))
torch.cuda.synchronize()
if sys.argv[1:] == ["plant"]:  # the checker must be able to see an overrun
    import triton, triton.language as tl
    from tests.planted import _writes_one_past
    _writes_one_past[(1,)](torch.empty(8, device="cuda"))
    torch.cuda.synchronize()
print("done")
"""


RACECHECK = """
import sys, torch
from chela_bench.kernels.linear_attention import linear_attention
from chela_bench.kernels.short_long_conv import long_conv
torch.manual_seed(0)
ways = [({"sweep": 0}, 128, 128), ({"sweep": 0, "BLOCK_V": 128, "num_warps": 8}, 128, 128),
        ({"sweep": 0}, 256, 256), ({"sweep": 1}, 128, 128), ({"sweep": 1}, 64, 64),
        ({"keep": 1}, 128, 128), ({"keep": 1, "BLOCK_V": 128, "num_warps": 8}, 128, 128)]
for way, K, V in ways:
    q, k, v = (torch.randn(1, 600, 1, x, device="cuda", dtype=torch.bfloat16) for x in (K, K, V))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for segments in (1, 2):
        o, _ = linear_attention(q, k, v, config={**way, "segments": segments})
        torch.autograd.grad(o, leaves, torch.randn_like(o))
for dtype, T in ((torch.bfloat16, 1000), (torch.float16, 4096), (torch.bfloat16, 4096),
                 (torch.bfloat16, 12000), (torch.bfloat16, 20000)):
    x = torch.randn(2, 2, T, device="cuda", dtype=dtype).requires_grad_()
    long = torch.randn(2, T, device="cuda").requires_grad_()
    z = long_conv(x, long, layout="bdt")
    torch.autograd.grad(z, (x, long), torch.randn_like(z))
torch.cuda.synchronize()
if sys.argv[1:] == ["plant"]:
    from tests.planted import _races
    _races[(1,)](torch.zeros(1024, device="cuda", dtype=torch.int32), num_warps=8)
    torch.cuda.synchronize()
print("done")
"""


def sanitized(tool, script, folder, plant):
    """compute-sanitizer's exit code and what it says of a script."""
    path = folder / f"{tool}.py"
    path.write_text(script)
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
         sys.executable, str(path), *plant],
        env=environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1", **GPU),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr[-2000:]


planted = pytest.mark.parametrize("plant", [[], ["plant"]])
has_sanitizer = pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer"
)


@has_sanitizer
@planted
def test_memcheck(tmp_path, plant):
    code, report = sanitized("memcheck", MEMCHECK, tmp_path, plant)
    if plant:
        assert code == 9 and "Invalid __global__ write" in report, report
    else:
        assert code == 0 and "ERROR SUMMARY: 0 errors" in report, report


@has_sanitizer
@planted
def test_racecheck(tmp_path, plant):
    """Of kernels whose barriers we place, on Hopper; elsewhere Triton's. Shared memory that a
    product still reads after it was started is not seen: barriers for that are read in SASS."""
    code, report = sanitized("racecheck", RACECHECK, tmp_path, plant)
    if plant:
        assert code == 9 and "_races" in report, report
    else:
        assert code == 0 and "(0 errors, 0 warnings)" in report, report
