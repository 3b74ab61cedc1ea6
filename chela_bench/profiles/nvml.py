"""NVML through nvidia-ml-py: which GPUs there are, and how one of them is doing. Reads only.

A device is always matched by its UUID: NVML counts GPUs in PCI order and ignores
CUDA_VISIBLE_DEVICES, so indices of NVML and CUDA need not agree. CUDA's UUID of a slice of a card
is NVML's of a MIG device, which tells neither clocks nor power.
"""

from __future__ import annotations

import contextlib
import threading
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
def device(uuid: str) -> Iterator[Any]:
    """The device's handle; None without a driver, or where NVML does not know the device."""
    with _nvml() as available:
        yield _ask(pynvml.nvmlDeviceGetHandleByUUID, uuid) if available else None


def uuid_of(bare: str) -> str:
    """CUDA's UUID, as torch shows it, under NVML's name: `GPU-...`, or `MIG-...` for a slice."""
    with _nvml() as available:
        known = [
            name
            for name in (f"GPU-{bare}", f"MIG-{bare}")
            if available and _ask(pynvml.nvmlDeviceGetHandleByUUID, name) is not None
        ]
    return known[0] if known else f"GPU-{bare}"


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
    with device(uuid) as handle:
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
    """Clocks, power, temperature and memory now, and the throttle reasons in force ([]: none)."""
    with device(uuid) as handle:
        if handle is None:
            return Telemetry(), None
        memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
        reading = Telemetry(
            sm_clock_mhz=_ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            mem_clock_mhz=_ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
            power_mw=_ask(pynvml.nvmlDeviceGetPowerUsage, handle),
            temperature_c=_ask(
                pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU
            ),
            memory_bytes=None if memory is None else int(memory.used),
        )
        bits = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if bits is None:
            return reading, None
        reasons = [name for name, flag in THROTTLE_REASONS.items() if bits & getattr(pynvml, flag)]
        return reading, reasons


class Sampler:
    """Reads the card every so often while the block runs, from a thread, and once at its end.

    `reading` then holds the last values with the extremes of all, `throttle` every reason met.
    """

    def __init__(self, uuid: str, *, every_s: float = 0.1) -> None:
        self._uuid, self._every_s = uuid, every_s
        self._readings: list[tuple[Telemetry, list[str] | None]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._readings.append(telemetry(self._uuid))

    @property
    def reading(self) -> Telemetry:
        readings = [reading for reading, _ in self._readings]
        if not readings or readings[-1] == Telemetry():
            return Telemetry()

        def extreme(name: str, most: Callable[[list[int]], int]) -> int | None:
            values = [getattr(reading, name) for reading in readings]
            known = [value for value in values if value is not None]
            return most(known) if known else None

        return readings[-1].model_copy(
            update={
                "sm_clock_min_mhz": extreme("sm_clock_mhz", min),
                "power_max_mw": extreme("power_mw", max),
                "temperature_max_c": extreme("temperature_c", max),
                "memory_bytes": extreme("memory_bytes", max),
                "readings": len(readings),
            }
        )

    @property
    def throttle(self) -> list[str] | None:
        """An idle card is no reason while it waits for the next call: only if it was never busy."""
        known = [reasons for _, reasons in self._readings if reasons is not None]
        if not known:
            return None
        idle = all("gpu_idle" in reasons for reasons in known)
        met = {reason for reasons in known for reason in reasons}
        return [name for name in THROTTLE_REASONS if name in met and (name != "gpu_idle" or idle)]

    def _sample(self) -> None:
        while not self._over.wait(self._every_s):
            self._readings.append(telemetry(self._uuid))


def energy_mj(uuid: str) -> int | None:
    """Millijoules since the driver was loaded; None if this card does not count them."""
    with device(uuid) as handle:
        return None if handle is None else _ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)


def other_processes(uuid: str, own: set[int]) -> list[str]:
    """Compute processes on the card that are not ours, as "pid (name)"."""
    with device(uuid) as handle:
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
