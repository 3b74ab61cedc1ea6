"""Runs functions in child processes that may die: each in a fork of its own, a few at a time.

A fork costs milliseconds where a new interpreter that imports torch costs seconds. The process that
forks had better have no other threads, and no CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Returned:
    value: Any  # JSON


@dataclass(frozen=True)
class Raised:
    kind: str  # name of the exception's class
    message: str


@dataclass(frozen=True)
class Died:
    reason: str  # how, and the last line that it printed


@dataclass(frozen=True)
class Hung:
    limit_s: float


Ending = Returned | Raised | Died | Hung


def each_in_a_fork(
    functions: Sequence[Callable[[], Any]], *, parallel: int, limit_s: float
) -> Iterator[tuple[int, Ending]]:
    """How each function ended, by its place, in the order in which they end.

    What one returns is sent as JSON. One that takes longer than `limit_s` is killed, with all that
    it started. What they print goes nowhere, but for the last line of one that dies.
    """
    waiting = list(enumerate(functions))[::-1]
    running: dict[int, _Child] = {}  # by the descriptor that it answers on
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while waiting and len(running) < max(1, parallel):
                    child = _Child(*waiting.pop(), limit_s)
                    running[child.answers] = child
                    selector.register(child.answers, selectors.EVENT_READ)
                now = time.monotonic()
                next_deadline = min(child.deadline for child in running.values())
                for key, _ in selector.select(max(0.0, next_deadline - now)):
                    running[key.fd].read()
                for child in list(running.values()):
                    if child.ended or time.monotonic() >= child.deadline:
                        selector.unregister(child.answers)
                        del running[child.answers]
                        yield child.place, child.ending()
        finally:
            for child in running.values():
                child.ending()


class _Child:
    def __init__(self, place: int, function: Callable[[], Any], limit_s: float) -> None:
        self.place, self._limit_s = place, limit_s
        self.deadline = time.monotonic() + limit_s
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  closed in `ending`
        self.answers, write_fd = os.pipe()
        self._answer = b""
        self.ended = False
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _live(function, write_fd, self._words.fileno(), parent)
        os.close(write_fd)

    def read(self) -> None:
        chunk = os.read(self.answers, 1 << 16)
        self._answer += chunk
        self.ended = not chunk

    def ending(self) -> Ending:
        """Of one that has closed its pipe; else it is killed."""
        hung = not self.ended
        if hung:
            with contextlib.suppress(ProcessLookupError):  # it does not lead a group yet
                os.killpg(self._pid, signal.SIGKILL)
            os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        os.close(self.answers)
        with self._words:
            if hung:
                return Hung(self._limit_s)
            try:
                answer = json.loads(self._answer)
            except ValueError:
                return Died(_obituary(status, self._last_line()))
        if "raised" in answer:
            return Raised(*answer["raised"])
        return Returned(answer["returned"])

    def _last_line(self) -> str:
        self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, self._words.tell() - _TAIL_BYTES))
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:200] if lines else ""


def _live(
    function: Callable[[], Any], answers: int, words: int, parent: int
) -> NoReturn:  # pragma: no cover: in the fork
    """The child's whole life."""
    code = 1
    try:
        os.setsid()  # what it starts can be killed with it
        die_with_parent(parent)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(words, 1)
        os.dup2(words, 2)
        try:
            answer: dict[str, Any] = {"returned": function()}
        except BaseException as error:
            traceback.print_exc()
            answer = {"raised": [type(error).__name__, str(error)]}
        data = json.dumps(answer).encode()
        while data:
            data = data[os.write(answers, data) :]
        code = 0
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def die_with_parent(parent_pid: int) -> None:
    """Linux: the kernel kills this process when its parent ends, however it ends.

    Elsewhere a worker ends when it next reads its closed standard input.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it ended before the line above
            os._exit(1)


def _obituary(status: int, last: str) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        known = {int(each): each.name for each in signal.Signals}
        how = f"killed by {known.get(number, f'signal {number}')}"
        if number == signal.SIGKILL:
            how += " (out of host memory, or killed by hand)"
    else:
        how = f"ended with exit code {os.waitstatus_to_exitcode(status)}"
    return f"{how}; last output: {last}" if last else how
