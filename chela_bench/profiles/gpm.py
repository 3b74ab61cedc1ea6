"""Bytes through device memory by NVML's GPM counters, on Hopper and later: no ncu, no permission.

GPM tells how busy DRAM was between two samples, as a percentage of its peak. Times the peak and the
time between them that is bytes, read and written together, of everything that ran meanwhile: good
for a loop of calls, at least a tenth of a second long. A sample is up to 0.1 s old, so the card
should have done the same for that long when the first one is taken.
"""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import Any

import pynvml

from chela_bench.profiles.nvml import device

_TRANSFERS_PER_CLOCK = 2  # every memory of these cards is double data rate


def problem(uuid: str) -> str | None:
    """Why GPM cannot tell the bytes of this card, with the remedy; None if it can."""
    with device(uuid) as handle:
        if handle is None:
            return "NVML does not know the card; measure on a whole card that nvidia-smi -L shows"
        try:
            supported = pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice
        except pynvml.NVMLError as error:
            return f"NVML refuses GPM: {error}; take --hbm ncu or --hbm model"
        if not supported:
            return "this card has no GPM (Hopper and later have); take --hbm ncu or --hbm model"
        if _peak_bytes_per_s(handle) is None:
            return "NVML does not tell the memory's clock and width; take --hbm ncu or --hbm model"
        return None


class Counted:
    """Counts while the block runs. `total_bytes` afterwards, or `reason`.

    The same calls should run before, and no other work meanwhile.
    """

    total_bytes: int | None = None
    reason: str | None = None

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self._held = contextlib.ExitStack()
        self._handle: Any = None
        self._samples: list[Any] = []
        self._begin_s = 0.0

    def __enter__(self) -> Counted:
        self._handle = self._held.enter_context(device(self._uuid))
        self._take()
        self._begin_s = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        elapsed_s = time.perf_counter() - self._begin_s
        self._take()
        with self._held:
            if kind is None and self.reason is None:
                self._conclude(elapsed_s)
            for sample in self._samples:
                with contextlib.suppress(pynvml.NVMLError):
                    pynvml.nvmlGpmSampleFree(sample)

    def _take(self) -> None:
        if self.reason is not None:
            return
        if self._handle is None:
            self.reason = "GPM: NVML does not know the card"
            return
        try:
            self._samples.append(pynvml.nvmlGpmSampleAlloc())
            pynvml.nvmlGpmSampleGet(self._handle, self._samples[-1])
        except pynvml.NVMLError as error:
            self.reason = f"GPM: {error}"

    def _conclude(self, elapsed_s: float) -> None:
        asked = pynvml.c_nvmlGpmMetricsGet_t()
        asked.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        asked.numMetrics = 1
        asked.sample1, asked.sample2 = self._samples
        asked.metrics[0].metricId = pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL
        peak = _peak_bytes_per_s(self._handle)
        try:
            metric = pynvml.nvmlGpmMetricsGet(asked).metrics[0]
        except pynvml.NVMLError as error:
            self.reason = f"GPM: {error}"
            return
        if metric.nvmlReturn != pynvml.NVML_SUCCESS or peak is None:
            self.reason = "GPM: this card does not tell how busy its memory is"
        elif not 0 < metric.value <= 100:
            self.reason = f"GPM: {metric.value:g} % is no utilisation of a busy memory"
        else:
            self.total_bytes = round(metric.value / 100 * peak * elapsed_s)


def _peak_bytes_per_s(handle: Any) -> float | None:
    try:
        mhz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
        bits = pynvml.nvmlDeviceGetMemoryBusWidth(handle)
    except pynvml.NVMLError:
        return None
    return float(mhz) * 1e6 * _TRANSFERS_PER_CLOCK * bits / 8 or None
