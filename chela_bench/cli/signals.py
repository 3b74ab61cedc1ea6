"""SIGTERM and SIGHUP end a command as Ctrl-C does: what was measured is kept."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


class Interrupted(KeyboardInterrupt):
    """Asked to end by another signal than Ctrl-C's."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum  # as shells report it


def interruption_code(stop: BaseException | None) -> int:
    """Of a KeyboardInterrupt; Ctrl-C's if nothing is known."""
    return stop.exit_code if isinstance(stop, Interrupted) else 128 + signal.SIGINT


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raises Interrupted in the block on SIGTERM (kill) or SIGHUP (the terminal closed).

    One that is ignored, as under nohup, stays so. After SIGHUP what went to the terminal goes
    nowhere: writing to one that is gone would fail.
    """
    terminal = [fd for fd in (1, 2) if os.isatty(fd)]

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        if signum == signal.SIGHUP:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for fd in terminal:
                os.dup2(nowhere, fd)
        raise Interrupted(signum)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for signum, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(signum, interrupt)
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
