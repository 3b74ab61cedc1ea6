"""NVML through nvidia-ml-py: which GPUs there are, and how one of them is doing. Reads only.

A device is always matched by its UUID: NVML counts GPUs in PCI order and ignores
CUDA_VISIBLE_DEVICES, so indices of NVML and CUDA need not agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pynvml

from chela_bench.records import Telemetry

THROTTLE_REASONS = {
    "gpu_idle": "nvmlClocksEventReasonGpuIdle",
    "applications_clocks": "nvmlClocksEventReasonApplicationsClocksSetting",
    "power_cap": "nvmlClocksEventReasonSwPowerCap",
    "hw_slowdown": "nvmlClocksThrottleReasonHwSlowdown",
    "sync_boost": "nvmlClocksEventReasonSyncBoost",
    "sw_thermal": "nvmlClocksEventReasonSwThermalSlowdown",
    "hw_thermal": "nvmlClocksThrottleReasonHwThermalSlowdown",
    "power_brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
    "display_clocks": "nvmlClocksEventReasonDisplayClockSetting",
}


@contextlib.contextmanager
def _nvml() -> Iterator[bool]:
    """NVML started for the block; yields False where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


@contextlib.contextmanager
def _device(uuid: str) -> Iterator[Any]:
    """The device's handle; None without a driver, or where NVML does not know the device."""
    with _nvml() as available:
        yield _ask(pynvml.nvmlDeviceGetHandleByUUID, uuid) if available else None


def keep_open() -> None:
    """Starts NVML for the rest of the process, so that a reading takes microseconds."""
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()  # counted: the pairs in `_nvml` neither start nor stop it after this


def gpu_count() -> int:
    """GPUs that the driver knows; 0 without a driver."""
    with _nvml() as available:
        return int(pynvml.nvmlDeviceGetCount()) if available else 0


def problem() -> str | None:
    """Why NVML does not start, in its own words; None if it does, or if there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return None
    except pynvml.NVMLError as error:
        return str(error)
    pynvml.nvmlShutdown()
    return None


def driver() -> tuple[str | None, str | None]:
    """The driver's version, and the newest CUDA version that it runs ("13.0")."""
    with _nvml() as available:
        if not available:
            return None, None
        cuda = _ask(pynvml.nvmlSystemGetCudaDriverVersion)
        newest = None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}"
        return _ask(pynvml.nvmlSystemGetDriverVersion), newest


def cards() -> list[dict[str, Any]]:
    """uuid, name and memory_bytes of every GPU, in PCI order; [] without a driver."""
    with _nvml() as available:
        handles = [
            _ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            for index in range(_ask(pynvml.nvmlDeviceGetCount) or 0 if available else 0)
        ]
        found = []
        for handle in filter(None, handles):
            memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
            found.append(
                {
                    "uuid": _ask(pynvml.nvmlDeviceGetUUID, handle),
                    "name": _ask(pynvml.nvmlDeviceGetName, handle),
                    "memory_bytes": None if memory is None else int(memory.total),
                }
            )
        return found


def facts(uuid: str) -> dict[str, Any]:
    """Driver, power limit, clock limits, ECC and MIG, under Environment's names.

    What this card or driver does not tell is left out.
    """
    with _device(uuid) as handle:
        if handle is None:
            return {}
        found = {
            "driver": _ask(pynvml.nvmlSystemGetDriverVersion),
            "power_limit_mw": _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle),
            "max_sm_clock_mhz": _ask(
                pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM
            ),
            "max_mem_clock_mhz": _ask(
                pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM
            ),
        }
        ecc = _ask(pynvml.nvmlDeviceGetEccMode, handle)
        mig = _ask(pynvml.nvmlDeviceGetMigMode, handle)
        found["ecc"] = None if ecc is None else bool(ecc[0])
        found["mig"] = None if mig is None else bool(mig[0])
        return {name: value for name, value in found.items() if value is not None}


def telemetry(uuid: str) -> tuple[Telemetry, list[str] | None]:
    """Clocks, power and temperature now, and the throttle reasons in force ([]: none)."""
    with _device(uuid) as handle:
        if handle is None:
            return Telemetry(), None
        reading = Telemetry(
            sm_clock_mhz=_ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            mem_clock_mhz=_ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
            power_mw=_ask(pynvml.nvmlDeviceGetPowerUsage, handle),
            temperature_c=_ask(
                pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU
            ),
        )
        bits = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if bits is None:
            return reading, None
        reasons = [name for name, flag in THROTTLE_REASONS.items() if bits & getattr(pynvml, flag)]
        return reading, reasons


def other_processes(uuid: str, own: set[int]) -> list[str]:
    """Compute processes on the card that are not ours, as "pid (name)"."""
    with _device(uuid) as handle:
        if handle is None:
            return []
        processes = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
        return [
            f"{process.pid} ({_ask(pynvml.nvmlSystemGetProcessName, process.pid) or 'unknown'})"
            for process in processes
            if process.pid not in own
        ]


def _ask(question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where this card, driver or permission does not give one."""
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None
