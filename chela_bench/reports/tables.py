"""Points as one tidy table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import pandas as pd

from chela_bench.records import ConfigValue, Kernel, Point, Run
from chela_bench.reports.groups import reading_order

_DIMS = ("B", "T", "H", "K", "V", "D")
_INTEGER: Final = "Int64"
_FLOAT: Final = "float64"
_TEXT: Final = "string"
_FLAG: Final = "boolean"
_FRACTIONS = ("waves", "measured_over_model")  # of kernels, besides percentages

# column -> (dtype, value); null stays null.
_Column = tuple[str, Callable[[Run, Point], object]]
_IDENTITY: dict[str, _Column] = {
    "op": (_TEXT, lambda _, p: p.op),
    "impl": (_TEXT, lambda _, p: p.impl),
    "direction": (_TEXT, lambda _, p: p.direction),
    "dtype": (_TEXT, lambda _, p: p.dtype),
}
_MEASURED: dict[str, _Column] = {
    "outcome": (_TEXT, lambda _, p: p.outcome),
    "reason": (_TEXT, lambda _, p: p.reason),
    "time_median_ns": (_INTEGER, lambda _, p: p.time_ns and p.time_ns.median),
    "time_q1_ns": (_INTEGER, lambda _, p: p.time_ns and p.time_ns.q1),
    "time_q3_ns": (_INTEGER, lambda _, p: p.time_ns and p.time_ns.q3),
    "time_min_ns": (_INTEGER, lambda _, p: p.time_ns and p.time_ns.min),
    "time_samples": (_INTEGER, lambda _, p: p.time_ns and p.time_ns.n),
    "wall_ns": (_INTEGER, lambda _, p: p.wall_ns),
    "host_ns": (_INTEGER, lambda _, p: p.host_ns),
    "launches": (_INTEGER, lambda _, p: p.launches),
    "floor_ns": (_INTEGER, lambda _, p: p.floor_ns),
    "x_floor": (_FLOAT, lambda _, p: p.x_floor),
    "tokens_per_s": (_FLOAT, lambda _, p: p.tokens_per_s),
    "hbm_bytes_per_token": (_FLOAT, lambda _, p: p.hbm_bytes_per_token),
    "gb_per_s": (_FLOAT, lambda _, p: p.gb_per_s),
    "tflop_per_s": (_FLOAT, lambda _, p: p.tflop_per_s),
    "compulsory_bytes": (_INTEGER, lambda _, p: p.compulsory_bytes),
    "flops": (_INTEGER, lambda _, p: p.flops),
    "parameters": (_INTEGER, lambda _, p: p.parameters),
    "peak_bytes": (_INTEGER, lambda _, p: p.peak_bytes),
    "hbm_model_bytes": (_INTEGER, lambda _, p: p.hbm.model_bytes),
    "hbm_read_bytes": (_INTEGER, lambda _, p: p.hbm.read_bytes),
    "hbm_write_bytes": (_INTEGER, lambda _, p: p.hbm.write_bytes),
    "hbm_late_write_bytes": (_INTEGER, lambda _, p: p.hbm.late_write_bytes),
    "hbm_gpm_bytes": (_INTEGER, lambda _, p: p.hbm.gpm_bytes),
    "hbm_x_floor": (_FLOAT, lambda _, p: p.hbm_x_floor),
    "hbm_source": (_TEXT, lambda _, p: p.hbm.source),
    "hbm_measured_over_model": (_FLOAT, lambda _, p: p.hbm.measured_over_model),
    "oracle": (_TEXT, lambda _, p: p.oracle),
    "error_rel": (_FLOAT, lambda _, p: p.error_rel),
    "error_budget": (_FLOAT, lambda _, p: p.error_budget),
    "smem_bytes": (_INTEGER, lambda _, p: p.static.smem_bytes),
    "regs": (_INTEGER, lambda _, p: p.static.regs),
    "spill_store_bytes": (_INTEGER, lambda _, p: p.static.spill_store_bytes),
    "spill_load_bytes": (_INTEGER, lambda _, p: p.static.spill_load_bytes),
    "ctas_per_sm": (_INTEGER, lambda _, p: p.static.ctas_per_sm),
    "sm_clock_mhz": (_INTEGER, lambda _, p: p.telemetry.sm_clock_mhz),
    "mem_clock_mhz": (_INTEGER, lambda _, p: p.telemetry.mem_clock_mhz),
    "power_mw": (_INTEGER, lambda _, p: p.telemetry.power_mw),
    "temperature_c": (_INTEGER, lambda _, p: p.telemetry.temperature_c),
    "sm_clock_min_mhz": (_INTEGER, lambda _, p: p.telemetry.sm_clock_min_mhz),
    "power_max_mw": (_INTEGER, lambda _, p: p.telemetry.power_max_mw),
    "temperature_max_c": (_INTEGER, lambda _, p: p.telemetry.temperature_max_c),
    "memory_bytes": (_INTEGER, lambda _, p: p.telemetry.memory_bytes),
    "throttle": (_TEXT, lambda _, p: _throttle(p)),
    "energy_j": (_FLOAT, lambda _, p: p.energy_j),
    "timer": (_TEXT, lambda _, p: p.timer),
    "l2": (_TEXT, lambda _, p: p.l2),
    "null_reasons": (_TEXT, lambda _, p: _null_reasons(p)),
    "device": (_TEXT, lambda _, p: p.device),
    "device_name": (_TEXT, lambda run, _: run.environment.name),
    "torch": (_TEXT, lambda run, _: run.versions.get("torch")),
    "triton": (_TEXT, lambda run, _: run.versions.get("triton")),
    "run_id": (_TEXT, lambda run, _: run.run_id),
    "started_utc": (_TEXT, lambda _, p: p.started_utc),
    "spent_s": (_FLOAT, lambda _, p: p.spent_s),
}


def points_frame(run: Run, points: list[Point]) -> pd.DataFrame:
    """One row a point, units in the names; bytes and nanoseconds stay integers (Int64) where null.

    Columns: op, impl, direction, dtype; the dims B, T, H, K, V, D and any other; `config_NAME`;
    the measurements; `error_rel_TENSOR`. The order of rows and columns depends on the points
    only, not on the order they came in. `throttle` is null where it was not read, else `none`
    or the reasons.
    """
    points = sorted(points, key=reading_order)
    dims = [*_DIMS, *sorted({name for point in points for name in point.shape} - set(_DIMS))]
    configs = sorted({name for point in points for name in point.config})
    errors = sorted({name for point in points for name in point.errors})
    columns = {
        **_columns(_IDENTITY, run, points),
        **{name: _series([p.shape.get(name) for p in points], _INTEGER) for name in dims},
        **{f"config_{name}": _config([p.config.get(name) for p in points]) for name in configs},
        **_columns(_MEASURED, run, points),
        **{
            f"error_rel_{name}": pd.Series([p.errors.get(name) for p in points], dtype=_FLOAT)
            for name in errors
        },
    }
    return pd.DataFrame(columns)


def kernels_frame(points: list[Point]) -> pd.DataFrame:
    """One row a kernel of each profiled point, units in the names; `key` is the point's."""
    rows = [
        {
            "key": point.key,
            **kernel.model_dump(),
            "limiters": "; ".join(kernel.limiters),
            "model_l2": "; ".join(f"{name} {size}" for name, size in kernel.model_l2.items()),
        }
        for point in sorted(points, key=reading_order)
        for kernel in point.kernels
    ]
    fields = [*Kernel.model_fields, *Kernel.model_computed_fields]
    frame = pd.DataFrame(rows, columns=["key", *fields])
    kinds = {
        name: _FLOAT if name.endswith("_pct") or name in _FRACTIONS else _INTEGER
        for name in fields
        if name not in ("name", "grid", "limiters", "model_l2")
    }
    return frame.astype(kinds)


def _columns(
    columns: Mapping[str, _Column], run: Run, points: list[Point]
) -> dict[str, pd.Series[Any]]:
    return {
        name: _series([value(run, point) for point in points], dtype)
        for name, (dtype, value) in columns.items()
    }


def _series(values: list[Any], dtype: str) -> pd.Series[Any]:
    """Of this dtype; floats if an integer is beyond Int64, as the FLOPs of absurd sizes are."""
    beyond = dtype == _INTEGER and any(value is not None and abs(value) >> 63 for value in values)
    return pd.Series(values, dtype=_FLOAT if beyond else dtype)


def _config(values: list[ConfigValue | None]) -> pd.Series[Any]:
    """Integers or flags where all values are; otherwise text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int}:
        return _series(values, _INTEGER)
    if kinds == {bool}:
        return pd.Series(values, dtype=_FLAG)
    return pd.Series([None if value is None else str(value) for value in values], dtype=_TEXT)


def _throttle(point: Point) -> str | None:
    return None if point.throttle is None else "; ".join(point.throttle) or "none"


def _null_reasons(point: Point) -> str | None:
    return "; ".join(f"{name}: {why}" for name, why in sorted(point.null_reasons.items())) or None
