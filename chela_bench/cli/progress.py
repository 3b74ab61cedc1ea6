"""How a sweep looks while it runs: a live bar on a terminal, plain lines when piped."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from chela_bench.bench.cases import Case
from chela_bench.records import Point, Run
from chela_bench.reports.text import duration, plain


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Falls silent, where rich would end the process."""
        self.quiet = True


class CompileProgress:
    """How kernels of an atlas are compiled: a bar on a terminal, a line an architecture when
    piped. On standard error."""

    def __init__(self) -> None:
        self._console = _Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting the compiler", total=None)

    def __enter__(self) -> CompileProgress:
        with contextlib.suppress(OSError):
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._bar.stop()

    def __call__(self, arch: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=arch, completed=done, total=total)
        if done == total:
            with contextlib.suppress(OSError):
                self._console.print(f"{arch}: {total} kernels", highlight=False, soft_wrap=True)


class SweepProgress:
    """A bench.sweep.Listener on standard error. A terminal that is gone does not end a sweep."""

    def __init__(self) -> None:
        self._console = _Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=True),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._label = ""
        self._done = 0
        self._total = 0
        self.begun = False

    def __enter__(self) -> SweepProgress:
        with contextlib.suppress(OSError):
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._bar.stop()

    def started(self, run: Run, folder: Path, left: int, warnings: list[str]) -> None:
        self.begun = True
        environment = run.environment
        preset = run.settings.get("preset")
        how = f", preset {preset}" if preset else ""
        self._say(f"{left} points on {environment.name}{how}, into {folder}")
        for warning in warnings:
            self._say(f"warning: {warning}")
        self._total = left
        self._bar.update(self._task, total=left)

    def case(self, case: Case) -> None:
        self._label = case.key
        self.phase("start")

    def phase(self, phase: str) -> None:
        self._bar.update(self._task, description=escape(f"{plain(self._label)} ({phase})"))

    def finished(self, point: Point) -> None:
        self._done += 1
        self._bar.advance(self._task)
        if point.seconds is not None:
            result = duration(point.seconds * 1e9)
        else:
            result = f"{point.outcome}: {point.reason}"
        self._say(f"[{self._done}/{self._total}] {point.key}: {result}")

    def said(self, line: str) -> None:
        self._say(line)

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self._console.print(plain(line), markup=False, highlight=False, soft_wrap=True)
