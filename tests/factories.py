"""Synthetic records: a run on a card or a CPU, a point, and a sweep that looks like a real one."""

from __future__ import annotations

from typing import Any

import pytest

from chela_bench.records import (
    Ceilings,
    Environment,
    Hbm,
    Kernel,
    Point,
    Quantiles,
    Run,
    Telemetry,
)

H100 = "NVIDIA H100 80GB HBM3"
LENGTHS = tuple(1024 * 2**i for i in range(7))
COPY_GB_PER_S = 3020.0


def make_run(**changes: Any) -> Run:
    """A run on an H100; `changes` replace its fields."""
    environment = Environment(
        device="cuda",
        name=H100,
        uuid="GPU-0",
        compute_capability="9.0",
        sm_count=132,
        memory_bytes=80 * 2**30,
        l2_bytes=50 * 2**20,
        driver="580.95",
        cuda="13.0",
        power_limit_mw=700_000,
        cpu="Intel Xeon 8480C",
        cpu_threads=16,
        os="Linux 6.8",
        python="3.11.9",
    )
    fields: dict[str, Any] = {
        "run_id": "2026-01-02T03-04-05Z-h100",
        "started_utc": "2026-01-02T03:04:05Z",
        "finished_utc": "2026-01-02T03:34:05Z",
        "argv": ["chela-bench", "sweep", "--lens", "1k..64k"],
        "git_sha": "0123456789abcdef0123456789abcdef01234567",
        "git_dirty": False,
        "seed": 0,
        "inputs": "randn; k, v with mean 1",
        "settings": {},
        "planned_points": 0,
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "environment": environment,
        "ceilings": Ceilings(copy_gb_per_s=COPY_GB_PER_S, matmul_tflop_per_s={"bf16": 716.0}),
    }
    return Run(**{**fields, **changes})


def make_cpu_run(**changes: Any) -> Run:
    environment = Environment(
        device="cpu",
        name="Intel Xeon 8480C",
        cpu="Intel Xeon 8480C",
        cpu_threads=16,
        os="Linux 6.8",
        python="3.11.9",
    )
    fields = {"environment": environment, "ceilings": Ceilings(), "versions": {"torch": "2.13.0"}}
    return make_run(**{**fields, **changes})


def quantiles(median: float, *, n: int = 40) -> Quantiles:
    at = round(median)
    return Quantiles(median=at, q1=round(at * 0.99), q3=round(at * 1.02), min=round(at * 0.98), n=n)


def make_point(T: int = 1024, *, time_ns: float | None = 1e6, **changes: Any) -> Point:
    """An ok point of linear_attention at B1-H16-K128-V128; `time_ns` is the median."""
    fields: dict[str, Any] = {
        "op": "linear_attention",
        "impl": "chunked",
        "direction": "fwd",
        "dtype": "bf16",
        "shape": {"B": 1, "T": T, "H": 16, "K": 128, "V": 128},
        "device": "GPU-0",
        "l2": "cold",
        "outcome": "ok",
        "time_ns": None if time_ns is None else quantiles(time_ns),
    }
    return Point(**{**fields, **changes})


def make_failure(outcome: str, reason: str, T: int = 1024, **changes: Any) -> Point:
    return make_point(T, time_ns=None, **{"outcome": outcome, "reason": reason, **changes})


def h100_sweep(direction: str = "fwd") -> list[Point]:
    """Seven implementations and softmax beside them, 1k to 64k, in an H100's magnitudes."""
    backward = 3.0 if direction == "fwdbwd" else 1.0
    points = []
    for T in LENGTHS:
        k = T / 1024
        bytes_moved = 8 * 128 * 16 * T
        floor = bytes_moved / COPY_GB_PER_S
        times = {
            "triton_chunked": 6e3 + 7.9e3 * k,
            "fla_chunk": 1.2e4 + 1.62e4 * k,
            "compiled_chunked": 4.5e4 + 5.8e4 * k,
            "chunked": 2.1e5 + 1.75e5 * k,
            "quadratic": 4e4 + 9.1e4 * k**2,
            "recurrent": 3.4e7 * k,
            "naive_cumsum": 2.9e6 * k,
        }
        for impl, time in times.items():
            common: dict[str, Any] = {
                "impl": impl,
                "direction": direction,
                "floor_ns": round(floor * backward),
                "compulsory_bytes": bytes_moved,
                "flops": 4 * 128 * 128 * 16 * T,
            }
            if impl == "naive_cumsum" and T > 16384:
                reason = f"CUDA out of memory. Tried to allocate {k:.2f} GiB. GPU 0 has 79.18 GiB"
                points.append(make_failure("oom", reason, T, **common))
            elif impl == "quadratic" and T > 32768:
                reason = (
                    f"CUDA out of memory. Tried to allocate {2 * k:.2f} GiB. GPU 0 has 79.18 GiB"
                )
                points.append(make_failure("oom", reason, T, **common))
            elif impl == "recurrent" and T > 8192:
                reason = f"estimated {time / 1e9:.2f} s > limit 0.30 s"
                points.append(make_failure("skipped", reason, T, **common))
            elif impl == "recurrent":
                points.append(
                    make_point(
                        T,
                        time_ns=None,
                        wall_ns=round(time * backward),
                        launches=3 * T,
                        peak_bytes=bytes_moved // 2,
                        error_rel=1.2e-3,
                        error_budget=8e-3,
                        **common,
                    )
                )
            else:
                peak = {"naive_cumsum": 64.0, "quadratic": 0.35 * k, "chunked": 3.1}.get(impl, 1.0)
                points.append(
                    make_point(
                        T,
                        time_ns=time * backward,
                        wall_ns=round(time * backward + 2.5e4),
                        host_ns=182_000,
                        launches=3,
                        peak_bytes=round(bytes_moved * peak / 4),
                        hbm=Hbm(model_bytes=round(bytes_moved * peak), source="model"),
                        error_rel=1.7e-3,
                        error_budget=8e-3,
                        throttle=[],
                        telemetry=Telemetry(sm_clock_mhz=1980, power_mw=512_000, temperature_c=54),
                        **common,
                    )
                )
        points.append(
            make_point(
                T,
                time_ns=(1.2e4 + 1.25e4 * k**2) * backward,
                op="softmax_attention",
                impl="sdpa_flash",
                direction=direction,
                peak_bytes=bytes_moved // 4,
                floor_ns=round(floor * backward),
            )
        )
    return points


HOSTILE = "[red]x[/red] | `code` <script>alert(1)</script> $a$ \x1b[31mred\x1b[0m\x07\u202e **b**"
LONG = "path/to/some/folder/kernels.py:" + "linear_attention_" * 6


def all_failed() -> list[Point]:
    wrong = {"peak_bytes": 12345, "error_rel": 0.75, "host_ns": 777_000}
    return [
        make_failure(outcome, reason, T, impl=impl, floor_ns=5555, **more)
        for T in LENGTHS
        for impl, outcome, reason, more in (
            ("fla_chunk", "skipped", "fla is not installed", {}),
            ("chunked", "oom", "CUDA out of memory", {}),
            ("quadratic", "wrong", "error above its budget", wrong),
        )
    ]


def cpu_sweep() -> list[Point]:
    return [
        make_point(T, impl=impl, device="cpu", l2=None, dtype="fp32", time_ns=scale * T)
        for T in (128, 256, 512)
        for impl, scale in (("chunked", 900), ("recurrent", 30_000))
    ]


def contenders(count: int) -> list[Point]:
    return [
        make_point(T, impl=f"contender_{i:02d}", time_ns=20.0 * T * 1.3**i, floor_ns=5 * T)
        for i in range(count)
        for T in LENGTHS
    ]


def block_sizes() -> list[Point]:
    return [
        make_point(T, time_ns=T * block, impl="triton_chunked", config={"BLOCK_T": block, "w": 4})
        for T in LENGTHS
        for block in (32, 64, 128)
    ]


def conv_sweep() -> list[Point]:
    """The serial order, in an H100's magnitudes."""
    points = []
    for T in (1024, 4096, 16384, 65536):
        for impl, ns in (("triton", 43.0), ("torch_rfft", 361.0), ("flashfftconv", 108.0)):
            shape = {"B": 8, "T": T, "D": 1024}
            conv: dict[str, Any] = {
                "op": "short_long_conv",
                "shape": shape,
                "config": {"order": "serial"},
            }
            more: dict[str, Any] = {
                "floor_ns": 11 * T,
                "compulsory_bytes": 33 * 1024 * T,
                "peak_bytes": 16384 * T,
            }
            points.append(make_point(impl=impl, time_ns=ns * T**1.05, **conv, **more))
        reason = f"estimated {T / 4096:.1f} s > limit 2 s"
        points.append(make_failure("skipped", reason, impl="direct", **conv))
    return points


LAYER_LENGTHS = tuple(1024 * k for k in (1, 2, 4, 6, 8, 10, 12, 16, 32, 64, 128, 256))


def layer_sweep(direction: str = "fwd") -> list[Point]:
    """chela_layer and softmax_layer, B = 1, D = 1024, in an H100's magnitudes: each one's time is
    linear, and quadratic, beside a constant."""
    backward = {"fwd": 1.0, "fwdbwd": 3.1}[direction]
    points = []
    for T in LAYER_LENGTHS:
        k = T / 1024
        chela: dict[str, Any] = {
            "op": "chela_layer",
            "shape": {"B": 1, "T": T, "D": 1024, "K": 128, "V": 2048},
            "direction": direction,
            "floor_ns": round(2.3e4 * k * backward),
            "parameters": 8_548_864 + 1024 * T,
            "flops": round(1.9e10 * k * backward),
        }
        softmax: dict[str, Any] = {
            "op": "softmax_layer",
            "shape": {"B": 1, "T": T, "D": 1024},
            "direction": direction,
            "floor_ns": round((1.2e4 * k + 2.5e3 * k * k) * backward),
            "parameters": 4_200_448,
            "flops": round((8.6e9 * k + 1e9 * k * k) * backward),
        }
        points.append(make_point(impl="chela", time_ns=(1e5 + 6e4 * k) * backward, **chela))
        if direction == "fwd":
            points.append(make_point(impl="chela_merged", time_ns=5e4 + 5.6e4 * k, **chela))
        time_ns = (4e4 + 2.2e4 * k + 3.5e3 * k * k) * backward
        points.append(make_point(impl="sdpa_cudnn", time_ns=time_ns, **softmax))
        if T == 262144 and direction == "fwdbwd":
            reason = "estimated 2.4 s > limit 2 s"
            points.append(make_failure("skipped", reason, impl="sdpa_flash", **softmax))
        else:
            points.append(make_point(impl="sdpa_flash", time_ns=1.6 * time_ns, **softmax))
    return points


def decode_sweep() -> list[Point]:
    """A step of both layers, B = 64 and 16k tokens."""
    common: dict[str, Any] = {"direction": "decode", "shape": {"B": 64, "T": 16384, "D": 1024}}
    layer = {**common["shape"], "K": 128, "V": 2048}
    return [
        make_point(
            time_ns=8e4, op="chela_layer", impl="chela", parameters=25_318_016, flops=1_192_000_000,
            hbm=Hbm(model_bytes=200_000_000, source="model"), **{**common, "shape": layer},
        ),
        make_point(
            time_ns=1.6e6, op="softmax_layer", impl="sdpa_flash", parameters=4_200_448,
            hbm=Hbm(model_bytes=4_230_000_000, source="model"), **common,
        ),
        make_failure("oom", "CUDA out of memory", op="softmax_layer", impl="products", **common),
    ]  # fmt: skip


def profiled_sweep() -> list[Point]:
    """The forward sweep, four of its implementations counted by ncu, one of them by GPM too."""
    over_model = {"triton_chunked": 1.03, "fla_chunk": 0.98, "naive_cumsum": 1.0, "quadratic": 0.4}
    return [
        profiled(point, over_model[point.impl])
        if point.impl in over_model and point.hbm.model_bytes
        else point
        for point in h100_sweep()
    ]


def profiled(point: Point, over_model: float) -> Point:
    """The point with three parts of its bytes read and one written, by two kernels."""
    moved = round((point.hbm.model_bytes or 0) * over_model)
    read, written = moved * 3 // 4, moved - moved * 3 // 4
    common: dict[str, Any] = {"threads": 128, "limiters": ["shared memory"], "passes": 1}
    kernels = [
        Kernel(
            name="_states_kernel", grid="(4, 16, 1)", time_ns=9000, read_bytes=read // 3,
            write_bytes=0, regs=128, smem_static_bytes=16, smem_dynamic_bytes=73_728,
            occupancy_limit_pct=18.75, waves=0.24, **common,
        ),
        Kernel(
            name="_walk_kernel", grid="(2, 16, 1)", launches=2, time_ns=21_000,
            read_bytes=read - read // 3, write_bytes=written // 2, l2_bytes=2 * moved,
            l2_hit_pct=28.8, regs=196, smem_static_bytes=0, smem_dynamic_bytes=139_264,
            local_load_instructions=0, local_store_instructions=12, tensor_instructions=229_376,
            bank_conflicts=98_993, occupancy_pct=6.2, occupancy_limit_pct=6.25, waves=0.97,
            **common,
        ),
    ]  # fmt: skip
    gpm = round(moved * 0.95) if point.impl == "triton_chunked" else None
    hbm = point.hbm.model_copy(
        update={
            "read_bytes": read,
            "write_bytes": written,
            "late_write_bytes": written - written // 2,
            "gpm_bytes": gpm,
            "source": "ncu",
        }
    )
    return point.model_copy(update={"hbm": hbm, "kernels": kernels})


SWEEPS = {
    "h100": (make_run(), h100_sweep()),
    "fwdbwd": (make_run(), h100_sweep("fwdbwd")),
    "cpu": (make_cpu_run(), cpu_sweep()),
    "all failed": (make_run(), all_failed()),
    "one point": (make_run(), [make_point(floor_ns=5555)]),
    "one failure": (make_run(), [make_failure("oom", "CUDA out of memory")]),
    "one length": (make_run(), [p for p in h100_sweep() if p.shape["T"] == 1024]),
    "many": (make_run(), contenders(16)),
    "block sizes": (make_run(), block_sizes()),
    "hostile": (make_run(), [make_point(impl=HOSTILE), make_failure("crash", HOSTILE, 2048)]),
    "long names": (make_run(), [make_point(T, impl=LONG, floor_ns=T) for T in LENGTHS]),
    "odd lengths": (make_run(), [make_point(T) for T in (1000, 1024, 3072, 8000, 50000)]),
    "conv": (make_run(), conv_sweep()),
    "layers": (make_run(), [*layer_sweep(), *layer_sweep("fwdbwd")]),
    "decode": (make_run(), decode_sweep()),
    "profiled": (make_run(), profiled_sweep()),
    "no memory used": (make_run(), [make_point(T, peak_bytes=T - 1024) for T in LENGTHS]),
}
sweeps = pytest.mark.parametrize(("run", "points"), SWEEPS.values(), ids=SWEEPS)
