"""The roofline: FLOPs a second against FLOPs a byte, below what the card did in this run.

A point's intensity is the function's least FLOPs over the bytes that the call moved: measured, and
as its formula says. Where the two stand apart, the formula is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from chela_bench.records import Ceilings, Point


class Intensities(NamedTuple):
    """FLOPs a byte."""

    measured: float | None
    modelled: float | None
    least_bytes: float | None  # of the compulsory bytes: what nothing can pass from a cold cache


@dataclass(frozen=True)
class Roof:
    """The card's two ceilings."""

    copy_gb_per_s: float
    matmul_tflop_per_s: float

    @classmethod
    def of(cls, ceilings: Ceilings, dtype: str) -> Roof | None:
        """None where the card's were not measured."""
        rate = ceilings.matmul_tflop_per_s.get(dtype)  # type: ignore[call-overload]
        return cls(ceilings.copy_gb_per_s, rate) if ceilings.copy_gb_per_s and rate else None

    @property
    def ridge(self) -> float:
        """FLOPs a byte at which the two meet."""
        return self.matmul_tflop_per_s * 1e3 / self.copy_gb_per_s

    def tflop_per_s(self, intensity: float) -> float:
        return min(self.matmul_tflop_per_s, intensity * self.copy_gb_per_s / 1e3)


def intensities(point: Point) -> Intensities:
    def over(size: int | None) -> float | None:
        return point.flops / size if point.flops and size else None

    hbm = point.hbm
    return Intensities(
        over(hbm.measured_bytes), over(hbm.model_bytes), over(point.compulsory_bytes)
    )
