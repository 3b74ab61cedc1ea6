"""What the bytes and FLOPs of a case allow on a card: the floor, and what no time can be below."""

from __future__ import annotations

from typing import Any

from chela_bench.bench.cases import Case, Session
from chela_bench.bench.registry import get_op
from chela_bench.records import Ceilings, Point

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def bounds(ceilings: Ceilings, case: Case) -> dict[str, Any]:
    """Parameters, compulsory bytes, FLOPs, and the floor that these make on this card, under
    Point's names."""
    op = get_op(case.op)
    parameters = {} if op.parameters is None else {"parameters": op.parameters(case.shape)}
    if case.direction == "decode" and not op.decodes:
        return parameters
    moved = sum(op.compulsory_bytes(case.shape, ITEMSIZE[case.dtype], case.direction))
    flops = op.flops(case.shape, case.direction)
    columns: dict[str, Any] = {"compulsory_bytes": moved, "flops": flops, **parameters}
    floor = floor_ns(ceilings, case.dtype, moved, flops)
    if floor:
        columns["floor_ns"] = max(1, round(floor))
    return columns


def floor_ns(ceilings: Ceilings, dtype: str, moved_bytes: float, flops: float) -> float:
    """The longer of bytes over copy bandwidth and FLOPs over the matmul rate; 0 if unmeasured."""
    floor = 0.0
    if ceilings.copy_gb_per_s:
        floor = moved_bytes / ceilings.copy_gb_per_s
    rate = ceilings.matmul_tflop_per_s.get(dtype)  # type: ignore[call-overload]
    if rate:
        floor = max(floor, flops / rate / 1e3)
    return floor


def shortest_ns(ceilings: Ceilings, case: Case, l2_bytes: int, *, cold: bool) -> float:
    """A time below 0.9x of this did not do the work.

    Less than the floor: the inputs that forward and backward share are counted once, and taken off
    are writes that L2 may still hold at the end and, warm or after another step, inputs that it may
    hold already.
    """
    op, itemsize = get_op(case.op), ITEMSIZE[case.dtype]
    read, written = op.compulsory_bytes(case.shape, itemsize, case.direction)
    if case.direction == "fwdbwd":
        read, _ = op.compulsory_bytes(case.shape, itemsize, "bwd")  # forward's inputs among them
    cacheable = written if cold and case.direction != "decode" else read + written
    moved = read + written - min(cacheable, l2_bytes)
    return floor_ns(ceilings, case.dtype, moved, op.flops(case.shape, case.direction))


def point_of(
    case: Case, session: Session, device: str, ceilings: Ceilings, **columns: Any
) -> Point:
    """The case's point: what is known of it without running it, and `columns`.

    device: "cpu", or the GPU's UUID.
    """
    return Point(
        **case.model_dump(),
        device=device,
        timer=session.timer,
        l2=None if device == "cpu" else session.l2,
        **bounds(ceilings, case),
        **columns,
    )
