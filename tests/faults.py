"""Implementations of linear_attention that misbehave, each in one way. Loaded with --impl."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time

import numpy as np
import torch

from chela_bench.errors import ArgumentError
from chela_bench.reference.linear_attention import chunked


def right(q, k, v):
    return chunked(q, k, v)[0].to(q.dtype)


def chunks_of(q, k, v, *, CHUNK):
    """Right, but for a CHUNK of -1."""
    if CHUNK < 0:
        return right(q, k, v) * CHUNK
    return chunked(q, k, v, chunk_size=CHUNK)[0].to(q.dtype)


_MET = set()


def dies_in_turn(q, k, v, *, CHUNK):
    """The process, at the second CHUNK that is called without a check of it before."""
    if torch.utils.deterministic.fill_uninitialized_memory and (
        torch.are_deterministic_algorithms_enabled() or torch.get_deterministic_debug_mode() == 1
    ):
        _MET.clear()
    _MET.add(CHUNK)
    if len(_MET) > 1:
        os._exit(9)
    return right(q, k, v)


def off_by_two_percent(q, k, v):
    return right(q, k, v) * 1.02


def zeros(q, k, v):
    return right(q, k, v) * 0


def nan(q, k, v):
    return right(q, k, v) + float("nan")


def skips_last_rows(q, k, v):
    out = torch.empty_like(v)  # what is not written stays as the allocator left it
    out[:, :-32] = right(q, k, v)[:, :-32]
    return out


def zeroes_first_block(q, k, v):
    out = right(q, k, v)
    return torch.cat([out[:, :64] * 0, out[:, 64:]], dim=1)


def wrong_gradient(q, k, v):
    return right(q, k.detach() + 0 * k, v)


def wrong_shape(q, k, v):
    return right(q, k, v)[..., :-1]


def wrong_dtype(q, k, v):
    return right(q, k, v).double()


_FIRST: dict[torch.Size, torch.Tensor] = {}


def remembers(q, k, v):
    """Right when checked, then returns the same numbers whatever it is given."""
    return _FIRST.setdefault(q.shape, right(q, k, v))


def changes_its_input(q, k, v):
    out = right(q, k, v)
    v.mul_(2)
    return out


def returns_a_tuple(q, k, v):
    return right(q, k, v), None


def returns_a_list(q, k, v):
    return [right(q, k, v)]


def returns_nothing(q, k, v):
    right(q, k, v)


def returns_an_empty_tuple(q, k, v):
    return ()


def reads_its_input(q, k, v):
    return right(q, k, v) + len(sys.stdin.read())


def refuses(q, k, v):
    raise ArgumentError("K of at most 8 wanted; got 16")


def exits(q, k, v):
    sys.exit(4)


def sets_the_default_dtype(q, k, v):
    torch.set_default_dtype(torch.float64)
    return right(q, k, v)


def sets_the_threads(q, k, v):
    torch.set_num_threads(torch.get_num_threads() + 1)
    return right(q, k, v)


def changes_the_folder(q, k, v):
    os.chdir("/")
    return right(q, k, v)


def removes_its_folder(q, k, v):
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)  # noqa: PTH106
    return right(q, k, v)


def switches_gradients_off(q, k, v):
    torch.set_grad_enabled(False)
    return right(q, k, v)


def raises(q, k, v):
    raise RuntimeError("no luck [red]today[/red]")


def kills_itself(q, k, v):
    os.kill(os.getpid(), signal.SIGKILL)


def segfaults(q, k, v):
    print("about to fall over", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(q, k, v):
    while True:
        time.sleep(0.1)


def out_of_memory(q, k, v):
    return torch.ones(1 << 50, dtype=torch.float64).sum() + right(q, k, v)


def out_of_memory_gently(q, k, v):
    """Asks for far more than the machine has, in pieces that would each be granted."""
    pieces = [np.empty(1 << 31, dtype=np.uint8) for _ in range(1 << 8)]  # never touched
    return right(q, k, v) + len(pieces)


def slow(q, k, v):
    """0.2 ms a token: over any limit at long lengths."""
    time.sleep(2e-4 * q.shape[1])
    return right(q, k, v)


_PREVIOUS_TOKENS: list[int] = []


def slow_alone_at_512(q, k, v):
    if q.shape[1] == 512:
        time.sleep(0.4)
    return right(q, k, v)


def hangs_on_the_gpu(q, k, v):
    torch.cuda._sleep(1 << 40)  # ten minutes
    return right(q, k, v)


def out_of_gpu_memory(q, k, v):
    return torch.empty(1 << 40, device=q.device)[0] + right(q, k, v)


def reads_out_of_bounds(q, k, v):
    index = torch.full((1,), 1 << 40, device=q.device)
    return right(q, k, v) + q.flatten()[index]


def synchronises(q, k, v):
    torch.cuda.synchronize()
    return right(q, k, v)


def prints(q, k, v):
    print('{"point": "an answer that is none"}')
    print("on standard error", file=sys.stderr)
    os.write(1, b"past Python's buffer\n")
    return right(q, k, v)


def starts_an_idle_thread(q, k, v):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    return right(q, k, v)


def starts_a_busy_thread(q, k, v):
    threading.Thread(target=_polls, name="polls", daemon=True).start()
    return right(q, k, v)


def _polls():
    while True:
        time.sleep(0.001)


def wants_no_compiler(q, k, v):
    assert "torch._dynamo" not in sys.modules
    return right(q, k, v)


_KEPT: list[torch.Tensor] = []


def leaks_memory(q, k, v):
    if not _KEPT:
        _KEPT.append(torch.ones(5 << 28, dtype=torch.uint8, device=q.device))
    return right(q, k, v)


def exits_at_once(q, k, v):
    os._exit(0)
