"""Run folders, pytest-benchmark's JSON and compiled kernels' rows with known times, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from chela_bench.bench import store
from chela_bench.bench.stats import summarise
from chela_bench.records import Point, Run, Telemetry
from tests.factories import make_point, make_run

CLOCKS = {"sm_clock_mhz": 1980, "mem_clock_mhz": 2619}


def samples(median_ns: float, *, n: int = 90, scatter: float = 0.004, seed: int = 0) -> list[float]:
    """Noise around a median, in nanoseconds."""
    rng = np.random.default_rng(seed)
    return [float(ns) for ns in np.round(median_ns * (1 + scatter * rng.standard_normal(n)))]


def timed(
    T: int = 1024, *, ns: float | list[float] = 1e6, seed: int = 0, **changes: Any
) -> tuple[Point, list[float]]:
    """An ok point and the samples that its time comes from."""
    taken = samples(ns, seed=seed) if isinstance(ns, int | float) else ns
    given = {"telemetry": Telemetry(**CLOCKS), "launches": 2, "peak_bytes": 4096, **changes}
    point = make_point(T, **given)
    return point.model_copy(update={"time_ns": summarise(taken)}), taken


def write_run(
    folder: Path, timed_points: list[tuple[Point, list[float]]], run: Run | None = None
) -> Path:
    with store.RunFolder(folder) as held:
        held.write_run(run or make_run(run_id=folder.name))
        for point, taken in timed_points:
            held.append(point, taken)
    return folder


def pytest_json(
    path: Path, timed_points: list[tuple[Point, list[float]]], names: list[str] | None = None
) -> Path:
    """As our fixture has pytest-benchmark write it."""
    names = names or [f"test_kernels.py::test[{point.key}]" for point, _ in timed_points]
    benchmarks = [
        {
            "fullname": name,
            "name": name.partition("::")[2],
            "extra_info": point.model_dump(mode="json"),
            "stats": {"data": [ns / 1e9 for ns in taken]},
        }
        for name, (point, taken) in zip(names, timed_points, strict=True)
    ]
    machine = {"device": "cuda", "name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-0",
               "driver": "580.95", "torch": "2.11.0", "triton": "3.6.0"}  # fmt: skip
    path.write_text(
        json.dumps({"machine_info": {"chela_bench": machine}, "benchmarks": benchmarks})
    )
    return path


def atlas_row(**changes: Any) -> dict[str, Any]:
    return {
        "op": "linear_attention",
        "impl": "triton_chunked",
        "kernel": "_linear_attention_fwd",
        "language": "triton",
        "dtype": "bf16",
        "constants": {"BLOCK_T": 64, "K": 128, "V": 128, "HAS_STATE": False},
        "asked": [{}],
        "directions": ["fwd"],
        "lens": [4096],
        "outcome": "ok",
        "config": {"BLOCK_T": 64, "num_warps": 4},
        "arch": "sm_86",
        "triton": "3.7.1",
        "fits": True,
        "smem_bytes": 65536,
        "regs": 168,
        "spill_store_bytes": 0,
        "spill_load_bytes": 0,
        "stack_bytes": 0,
        "tmem_columns": 0,
        "ctas_per_sm": 1,
        "limiter": "smem",
        "tensor_core": "HMMA",
        "instructions": 812,
        "compile_ms": 812,
        **changes,
    }


def atlas_json(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"points": list(rows or (atlas_row(),))}))
    return path
