"""Point and Run: the one shape that the bench writes and the reports read.

A run folder holds `run.json` (one Run) and `points.jsonl` (one Point a line). Units stand in the
names; bytes and nanoseconds are integers. What was not measured is null, and `null_reasons` says
why. A failed point carries an outcome and a reason, never a time.
"""

from __future__ import annotations

from chela_bench.records.base import (
    DIRECTIONS,
    DTYPES,
    L2,
    OUTCOMES,
    SCHEMA_VERSION,
    TIE,
    ConfigValue,
    Count,
    Direction,
    DType,
    Modelled,
    Nanoseconds,
    Outcome,
    Timer,
)
from chela_bench.records.kernels import AtlasRow, Kernel, Refused, Static
from chela_bench.records.point import (
    Hbm,
    Point,
    Quantiles,
    Spent,
    Telemetry,
    config_label,
    point_key,
    shape_label,
)
from chela_bench.records.run import Ceilings, Cost, Device, Environment, Run, document

__all__ = [
    "DIRECTIONS",
    "DTYPES",
    "L2",
    "OUTCOMES",
    "SCHEMA_VERSION",
    "TIE",
    "AtlasRow",
    "Ceilings",
    "ConfigValue",
    "Cost",
    "Count",
    "DType",
    "Device",
    "Direction",
    "Environment",
    "Hbm",
    "Kernel",
    "Modelled",
    "Nanoseconds",
    "Outcome",
    "Point",
    "Quantiles",
    "Refused",
    "Run",
    "Spent",
    "Static",
    "Telemetry",
    "Timer",
    "config_label",
    "document",
    "point_key",
    "shape_label",
]
