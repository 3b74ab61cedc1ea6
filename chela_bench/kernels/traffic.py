"""What kernels move, tensor by tensor, and what of it L2 keeps from device memory.

A kernel's file lists what each launch reads and writes; here that becomes bytes of device memory.
L2 is taken to hold the tensors that were touched last, whole, up to half of its size, as an H100
does (docs/decisions/0011): what a launch reads of them is not read from memory, and of what two
launches write to one place only the second is written to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # which would import torch
    from chela_bench.kernels.launching import Launcher

PRODUCT = "matrix product"  # by cuBLAS, which calls its kernels as it likes
OTHER = "PyTorch's"  # its own kernels, whose names are its own affair


class Again(NamedTuple):
    """What one launch reads more than once, from L2 if that holds what is touched in between."""

    size: int  # bytes of all readings but the first
    between: int  # bytes touched from one reading to the next


class Step(NamedTuple):
    """A launch, and the bytes of each tensor that it reads and writes, once."""

    kernel: str  # as ncu calls it; or PRODUCT or OTHER
    reads: Mapping[str, int]
    writes: Mapping[str, int]
    again: Again | None = None


class Moved(NamedTuple):
    """Of a launch: bytes through memory, and those of each tensor that L2 keeps from it."""

    kernel: str
    size: int
    in_l2: dict[str, int]


def moved(steps: Sequence[Step], l2_bytes: int | None = None) -> list[Moved]:
    """Of each launch, from a cold L2. Where its size is not given, L2 holds nothing from launch to
    launch, and all that one launch reads again."""
    room = (l2_bytes or 0) // 2
    held: dict[str, int] = {}  # bytes by tensor; the last one touched last
    dirty: dict[str, dict[str, int]] = {}  # by tensor, what L2 keeps of the launch that wrote it
    kept: list[dict[str, int]] = []
    for step in steps:
        mine: dict[str, int] = {}
        names = list(held)
        found = {
            tensor: held[tensor]
            for n, tensor in enumerate(names)
            if sum(held[name] for name in names[n:]) <= room
        }
        for tensor, size in step.reads.items():
            if tensor in found:
                mine[tensor] = min(size, found[tensor])
            else:
                dirty.pop(tensor, None)  # it comes from memory, so it was written there
        for tensor, size in step.writes.items():
            if tensor in found and tensor in dirty:
                before = dirty[tensor]
                before[tensor] = before.get(tensor, 0) + min(size, found[tensor])
            dirty[tensor] = mine
        for tensor, size in (*step.reads.items(), *step.writes.items()):
            held.pop(tensor, None)
            held[tensor] = size
        kept.append(mine)
    return [
        Moved(step.kernel, _asked(step) - sum(mine.values()) + _missed(step.again, room), mine)
        for step, mine in zip(steps, kept, strict=True)
    ]


def total(steps: Iterable[Step]) -> int:
    """Bytes of all launches, none of which finds in L2 what another left there."""
    return sum(_asked(step) for step in steps)


def renamed(steps: Iterable[Step], **names: str) -> list[Step]:
    """The same with other tensors."""
    return [
        step._replace(
            reads={names.get(tensor, tensor): size for tensor, size in step.reads.items()},
            writes={names.get(tensor, tensor): size for tensor, size in step.writes.items()},
        )
        for step in steps
    ]


def name_of(launcher: Launcher) -> str:
    """As ncu calls its kernel."""
    kernel: Any = launcher.kernel
    return str(kernel.fn.__name__)


def _asked(step: Step) -> int:
    return sum(step.reads.values()) + sum(step.writes.values())


def _missed(again: Again | None, room: int) -> int:
    if again is None or room == 0 or again.between <= room:
        return 0
    return round(again.size * (1 - room / again.between))
