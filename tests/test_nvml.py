"""NVML on machines that are not here: whose reading it is, what a thread of readings says, energy,
and bytes by GPM."""

from __future__ import annotations

import contextlib
import ctypes
import time
from types import SimpleNamespace

import pynvml
import pytest
import torch

from chela_bench.bench import measure
from chela_bench.profiles import gpm, machine, nvml
from chela_bench.records import Hbm, Telemetry

# In NVML's order, PCI's; CUDA counts the fastest first.
CARDS = {"GPU-aaaa": 1100, "GPU-bbbb": 1200, "GPU-cccc": 1300}
IN_CUDA = ["bbbb", "cccc", "aaaa"]
SLICE = "MIG-dddd"


class Nvml:
    """pynvml with these cards and one slice of a card; a handle is its UUID."""

    def __init__(self, **changes):
        self.freed = []
        self.answers = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetHandleByUUID": self._handle,
            "nvmlDeviceGetClockInfo": self._clock,
            "nvmlDeviceGetPowerUsage": lambda handle: self._clock(handle, 0) * 100,
            "nvmlDeviceGetTemperature": lambda handle, kind: 50,
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=7, total=9),
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 4,
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: self._clock(handle, 0),
            "nvmlDeviceGetMaxClockInfo": lambda handle, kind: 2619,
            "nvmlDeviceGetMemoryBusWidth": lambda handle: 5120,
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 5000,
            "nvmlGpmQueryDeviceSupport": lambda handle: SimpleNamespace(isSupportedDevice=1),
            "nvmlGpmSampleAlloc": pynvml.c_nvmlGpmSample_t,
            "nvmlGpmSampleGet": lambda handle, sample: sample,
            "nvmlGpmSampleFree": self.freed.append,
            "nvmlGpmMetricsGet": self._utilisation,
            **changes,
        }
        self.percent = 50.0

    def __getattr__(self, name):
        if name in self.answers:
            return self.answers[name]
        real = getattr(pynvml, name)
        return _unsupported if name.startswith("nvml") and callable(real) else real

    def _handle(self, uuid):
        if uuid not in CARDS and uuid != SLICE:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def _clock(self, handle, kind):
        if handle == SLICE:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return CARDS[handle]

    def _utilisation(self, asked):
        assert asked.numMetrics == 1 and asked.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        assert asked.metrics[0].metricId == pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL
        asked.metrics[0].nvmlReturn = pynvml.NVML_SUCCESS
        asked.metrics[0].value = ctypes.c_double(self.percent)
        return asked


def _unsupported(*_):
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture
def fake(monkeypatch):
    made = Nvml()
    for module in (nvml, gpm):
        monkeypatch.setattr(module, "pynvml", made)
    return made


def as_cuda_counts(visible):
    """UUIDs without prefix, as CUDA orders what CUDA_VISIBLE_DEVICES leaves."""
    if visible is None:
        return IN_CUDA
    if visible.startswith("MIG-"):
        return [visible.removeprefix("MIG-")]
    names = visible.split(",")
    return [
        IN_CUDA[int(name)] if name.isdigit()
        else next(bare for bare in IN_CUDA if f"GPU-{bare}".startswith(name))
        for name in names
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-bbbb", "GPU-cccc", "GPU-aaaa"]),
        ("2", ["GPU-aaaa"]),
        ("2,0", ["GPU-aaaa", "GPU-bbbb"]),
        ("GPU-cccc", ["GPU-cccc"]),
        ("GPU-a,GPU-c", ["GPU-aaaa", "GPU-cccc"]),
        ("MIG-dddd", ["MIG-dddd"]),
    ],
)
def test_nvml_reads_the_card_that_cuda_counts(fake, monkeypatch, visible, uuids):
    there = as_cuda_counts(visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(there))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(
            uuid=there[index], name="card", major=9, minor=0, multi_processor_count=132,
            total_memory=1, L2_cache_size=1, shared_memory_per_block_optin=1,
            shared_memory_per_multiprocessor=1,
        ),
    )  # fmt: skip
    for index, uuid in enumerate(uuids):
        found = machine.environment(f"cuda:{index}")
        assert found.uuid == uuid
        assert found.power_limit_mw == CARDS.get(uuid)  # of a slice nothing is told, not another's
        assert nvml.telemetry(uuid)[0].sm_clock_mhz == CARDS.get(uuid)


def test_a_uuid_without_a_driver_is_a_cards(monkeypatch):
    monkeypatch.setattr(nvml, "pynvml", Nvml(nvmlInit=_unsupported))
    assert nvml.uuid_of("aaaa") == "GPU-aaaa"
    assert nvml.telemetry("GPU-aaaa") == (Telemetry(), None)
    assert nvml.energy_mj("GPU-aaaa") is None


def test_a_sampler_keeps_extremes_and_every_reason(monkeypatch):
    readings = iter(
        [
            (Telemetry(sm_clock_mhz=1980, power_mw=100, temperature_c=40), ["gpu_idle"]),
            (Telemetry(sm_clock_mhz=1200, power_mw=700, temperature_c=60), ["power_cap"]),
            (Telemetry(sm_clock_mhz=1500, power_mw=500, temperature_c=50, memory_bytes=3), []),
        ]
    )
    monkeypatch.setattr(nvml, "telemetry", lambda uuid: next(readings))
    with nvml.Sampler("GPU-aaaa", every_s=60) as sampled:
        sampled._readings += [nvml.telemetry(""), nvml.telemetry("")]
    assert sampled.reading == Telemetry(
        sm_clock_mhz=1500, sm_clock_min_mhz=1200, power_mw=500, power_max_mw=700,
        temperature_c=50, temperature_max_c=60, memory_bytes=3, readings=3,
    )  # fmt: skip
    assert sampled.throttle == ["power_cap"]


def test_a_sampler_reads_while_the_block_runs(fake):
    with nvml.Sampler("GPU-bbbb", every_s=0.01) as sampled:
        time.sleep(0.3)
    assert sampled.reading.readings >= 5 and sampled.reading.sm_clock_mhz == 1200
    assert sampled.throttle == ["power_cap"]  # bit 4
    count = sampled.reading.readings
    time.sleep(0.05)
    assert sampled.reading.readings == count  # the thread is over


def test_a_sampler_of_nothing_says_nothing(fake):
    with nvml.Sampler("GPU-gone", every_s=0.01) as sampled:
        time.sleep(0.03)
    assert sampled.reading == Telemetry() and sampled.throttle is None


def test_idle_all_the_time_is_said(monkeypatch):
    monkeypatch.setattr(nvml, "telemetry", lambda uuid: (Telemetry(sm_clock_mhz=1), ["gpu_idle"]))
    with nvml.Sampler("GPU-aaaa") as sampled:
        pass
    assert sampled.throttle == ["gpu_idle"]


def test_gpm_turns_utilisation_into_bytes(fake, monkeypatch):
    monkeypatch.setattr(gpm, "time", SimpleNamespace(perf_counter=iter([10.0, 12.0]).__next__))
    with gpm.Counted("GPU-aaaa") as counted:
        pass
    assert counted.reason is None
    assert counted.total_bytes == round(0.5 * 2619e6 * 2 * 5120 / 8 * 2)  # half of 3352 GB/s, 2 s
    assert len(fake.freed) == 2


@pytest.mark.parametrize("percent", [0.0, -1.0, 101.0, float("nan")])
def test_an_impossible_utilisation_is_no_figure(fake, percent):
    fake.percent = percent
    with gpm.Counted("GPU-aaaa") as counted:
        pass
    assert counted.total_bytes is None and "no utilisation" in counted.reason


@pytest.mark.parametrize(
    ("changes", "uuid", "said"),
    [
        ({}, "GPU-aaaa", None),
        ({}, "GPU-gone", "NVML does not know the card; measure on a whole card"),
        ({"nvmlGpmQueryDeviceSupport": _unsupported}, "GPU-aaaa", "NVML refuses GPM: Not Supp"),
        (
            {"nvmlGpmQueryDeviceSupport": lambda handle: SimpleNamespace(isSupportedDevice=0)},
            "GPU-aaaa",
            "this card has no GPM (Hopper and later have); take --hbm ncu or --hbm model",
        ),
        ({"nvmlDeviceGetMemoryBusWidth": _unsupported}, "GPU-aaaa", "clock and width"),
    ],
)
def test_why_gpm_cannot_tell(monkeypatch, changes, uuid, said):
    for module in (nvml, gpm):
        monkeypatch.setattr(module, "pynvml", Nvml(**changes))
    problem = gpm.problem(uuid)
    assert problem is None if said is None else said in problem


@pytest.mark.parametrize("broken", ["nvmlGpmSampleAlloc", "nvmlGpmSampleGet", "nvmlGpmMetricsGet"])
def test_gpm_that_fails_on_the_way_says_so(monkeypatch, broken):
    for module in (nvml, gpm):
        monkeypatch.setattr(module, "pynvml", Nvml(**{broken: _unsupported}))
    with gpm.Counted("GPU-aaaa") as counted:
        pass
    assert counted.total_bytes is None and "GPM: Not Supported" in counted.reason


def test_gpm_of_a_block_that_raises_counts_nothing(fake):
    with pytest.raises(ZeroDivisionError), gpm.Counted("GPU-aaaa") as counted:
        _ = 1 / 0
    assert counted.total_bytes is None and len(fake.freed) == 2


def _loop(monkeypatch, call=lambda: None, **asked):
    """What a loop of 100 calls writes into a point's columns, and the seconds that it and the one
    before it were to last."""
    counted = SimpleNamespace(total_bytes=50_000, reason=None)
    monkeypatch.setattr(measure.gpm, "Counted", lambda uuid: contextlib.nullcontext(counted))
    lasted = []
    monkeypatch.setattr(
        measure.timing, "repeat", lambda call, ns, for_s: lasted.append(for_s) or 100
    )
    job = SimpleNamespace(
        bench=SimpleNamespace(
            device_name="GPU-aaaa",
            session=SimpleNamespace(**{"energy": False, "gpm": "no", **asked}),
            announce=lambda phase: None,
            spending=lambda activity: contextlib.nullcontext(),
        )
    )
    columns, nulls = {}, {}
    measure._count_in_a_loop(job, call, 1000, columns, nulls)
    return columns, nulls, lasted


def test_a_loop_shares_energy_and_bytes_among_its_calls(monkeypatch):
    millijoules = iter([1000, 3000])
    monkeypatch.setattr(nvml, "energy_mj", lambda uuid: next(millijoules))
    columns, nulls, lasted = _loop(monkeypatch, energy=True, gpm="where it can")
    assert columns == {"energy_j": 0.02, "gpm_bytes": 500} and nulls == {}
    assert lasted == [measure.LEAD_S, measure.ENERGY_S] and measure.ENERGY_S >= 2
    assert measure.LEAD_S > 0.11  # as old as a sample of GPM was
    hbm = measure._with_gpm(Hbm(model_bytes=400, source="model"), 500)
    assert hbm.source == "gpm" and hbm.measured_bytes == 500 and hbm.measured_over_model == 1.25


def test_nothing_is_run_where_nothing_is_asked(monkeypatch):
    assert _loop(monkeypatch) == ({}, {}, [])


def test_an_energy_counter_that_stands_still_is_no_figure(monkeypatch):
    monkeypatch.setattr(nvml, "energy_mj", lambda uuid: 1000)
    columns, nulls, _ = _loop(monkeypatch, energy=True)
    assert columns == {} and "does not count its energy" in nulls["energy_j"]


def test_steps_have_no_loop(monkeypatch):
    steps = measure.timing.Steps(lambda: None, lambda: None, 64)
    columns, nulls, lasted = _loop(monkeypatch, steps, energy=True, gpm="or refuse")
    assert columns == {} and lasted == []
    assert set(nulls) == {"energy_j", "hbm.gpm_bytes"}
