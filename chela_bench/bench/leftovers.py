"""What a case leaves changed in its worker's process, which would spoil the figures of the next."""

from __future__ import annotations

import contextlib
import gc
import resource
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

LEAK_BYTES = 1 << 30  # libraries keep some: workspaces, compiled code, the heap's own slack
_LOOKS, _LOOK_S = 5, 0.05


@dataclass(frozen=True)
class State:
    settings: dict[str, object]
    threads: frozenset[threading.Thread]
    held_bytes: int


def state(*, cuda: bool) -> State:
    folder = Path().stat()  # its name is gone if somebody removed it
    settings: dict[str, object] = {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "gradients enabled": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "matmul TF32": torch.backends.cuda.matmul.allow_tf32,
        "cuDNN TF32": torch.backends.cudnn.allow_tf32,
        "cuDNN benchmark": torch.backends.cudnn.benchmark,
        "working folder": (folder.st_dev, folder.st_ino),
    }
    return State(settings, python_threads(), _held_bytes(cuda=cuda))


def left_behind(before: State, *, cuda: bool) -> str | None:
    """What differs since `before` and costs the process its place, or None."""
    after = state(cuda=cuda)
    for name, value in after.settings.items():
        if value != before.settings[name]:
            return f"{name}: {before.settings[name]} before, {value} now"
    if cuda and (error := _cuda_error()):
        return f"the device is broken: {error}"
    if after.held_bytes - before.held_bytes > LEAK_BYTES:
        return f"{(after.held_bytes - before.held_bytes) / 2**30:.1f} GiB more are held"
    started = after.threads - before.threads
    if started and (busy := _busy(started)):
        return f"it left threads running: {', '.join(sorted({thread.name for thread in busy}))}"
    return None


def release_memory(*, cuda: bool) -> None:
    """What the last case held is free again; after an exception only now that it is gone."""
    gc.collect()
    gc.freeze()  # what lives on (torch, peers: a third of a second to search) is not searched again
    if cuda:
        with contextlib.suppress(RuntimeError):  # after a CUDA error this fails as well
            torch.cuda.empty_cache()


def python_threads() -> frozenset[threading.Thread]:
    """Threads that Python code started; autograd's own show up as dummies once they run any."""
    threads = threading.enumerate()
    return frozenset(t for t in threads if not isinstance(t, threading._DummyThread))


def _busy(threads: Collection[threading.Thread]) -> Collection[threading.Thread]:
    """Those that take time while nobody asks them to, however often one looks. One that waits, as
    the monitor of a progress bar or an idle pool does, takes none from anyone, once it is there."""
    for _ in range(_LOOKS):
        before = {thread: _ran_ns(thread) for thread in threads}
        time.sleep(_LOOK_S)
        threads = [t for t in threads if t.is_alive() and _ran_since(t, before[t])]
        if not threads:
            break
    return threads


def _ran_since(thread: threading.Thread, before_ns: int | None) -> bool:
    """Taken for granted where the system does not say."""
    return before_ns is None or _ran_ns(thread) != before_ns


def _ran_ns(thread: threading.Thread) -> int | None:
    """Processor time that it has had; None where the system does not say (not Linux)."""
    try:
        return int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _held_bytes(*, cuda: bool) -> int:
    """Memory that a case finds taken: the allocator's on a GPU, else the process's own."""
    if cuda:
        return torch.cuda.memory_allocated()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return 0
    return pages * resource.getpagesize()


def _cuda_error() -> str | None:
    """After an illegal access every CUDA call fails: only a new process can go on."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None
