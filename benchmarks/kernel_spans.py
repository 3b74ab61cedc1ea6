"""Kernel spans of a call, by PyTorch's profiler: back to back, warm L2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def spans(call: Callable[[], object], calls: int = 10) -> dict[str, tuple[float, float]]:
    """Of each kernel, how often it runs in a call, and for how many microseconds in all."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found: dict[str, tuple[float, float]] = {}
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times, us = found.get(event.name, (0.0, 0.0))
            found[event.name] = times + 1 / calls, us + event.device_time / calls
    return found
