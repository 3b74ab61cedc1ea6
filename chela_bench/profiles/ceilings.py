"""The two ceilings of a card, measured on it in this run: copy bandwidth and matmul rate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from chela_bench.records import Ceilings, DType

COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192
REPEATS = 10


def measure_ceilings(device: torch.device) -> Ceilings:
    """Median of ten: a 1 GiB device-to-device copy (bytes read plus written) and 8192^3 products
    of random bf16, fp16 and, as the fastest that float32 inputs have, tf32 operands.
    """
    rates: dict[DType, float] = {
        "bf16": _matmul_tflop_per_s(device, torch.bfloat16),
        "fp16": _matmul_tflop_per_s(device, torch.float16),
        "fp32": _tf32_tflop_per_s(device),
    }
    copy = _copy_gb_per_s(device)
    torch.cuda.empty_cache()
    return Ceilings(copy_gb_per_s=copy, matmul_tflop_per_s=rates)


def _copy_gb_per_s(device: torch.device) -> float:
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _median_seconds(lambda: target.copy_(source)) / 1e9


def _matmul_tflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype)
    b = torch.randn_like(a)
    out = torch.empty_like(a)
    return 2 * MATMUL_SIZE**3 / _median_seconds(lambda: torch.mm(a, b, out=out)) / 1e12


def _tf32_tflop_per_s(device: torch.device) -> float:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return _matmul_tflop_per_s(device, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def _median_seconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(REPEATS)
    ]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = sorted(float(start.elapsed_time(end)) for start, end in events)
    return (times[REPEATS // 2 - 1] + times[REPEATS // 2]) / 2 / 1e3
