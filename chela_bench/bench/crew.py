"""One worker a device, cases dealt out as workers become free, results in the order they end.

Each device has a thread that starts its worker, feeds it and replaces it. It has to live as long as
the worker: Linux kills a process that asked to die with its parent when the *thread* that started
it ends.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chela_bench.bench.cases import Case, Session
from chela_bench.bench.runner import Runner, Stopped
from chela_bench.records import Ceilings, Device, Point

_JOIN_S = 30.0  # a thread ends as soon as its worker is dead


@dataclass(frozen=True)
class Began:
    case: Case


@dataclass(frozen=True)
class Entered:
    """A worker enters a phase of its case."""

    phase: str


@dataclass(frozen=True)
class Ended:
    point: Point
    samples_ns: list[float]


@dataclass(frozen=True)
class _Ready:
    pass


@dataclass(frozen=True)
class _Idle:
    """A device has no more cases."""


Event = Began | Entered | Ended


class Crew:
    """The devices of a sweep. Use as a context manager."""

    def __init__(
        self, sessions: Sequence[Session], log: Path, *, ceilings: Mapping[str, Ceilings]
    ) -> None:
        """One runner a session. `ceilings` by device (its UUID, or "cpu") are kept, not measured.

        `log` belongs to the first worker; the others write beside it (`worker-1.log`, ...).
        """
        self.runners = [
            Runner(
                session,
                log if i == 0 else log.with_stem(f"{log.stem}-{i}"),
                ceilings=ceilings,
            )
            for i, session in enumerate(sessions)
        ]
        self._events: queue.SimpleQueue[Event | _Ready | _Idle | BaseException] = (
            queue.SimpleQueue()
        )
        self._cases: queue.SimpleQueue[Case | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, args=(runner,), daemon=True)
            for runner in self.runners
        ]

    def __enter__(self) -> Crew:
        """Starts every worker and takes every device; raises what the first refusal says."""
        try:
            for thread in self._threads:
                thread.start()
            for _ in self._threads:
                self._next_event()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for runner in self.runners:
            runner.stop()
        for thread in self._threads:
            self._cases.put(None)
            if thread.ident is not None:
                thread.join(_JOIN_S)

    @property
    def devices(self) -> list[Device]:
        return [
            Device(environment=runner.environment, ceilings=runner.ceilings)
            for runner in self.runners
        ]

    def measure(self, cases: Iterable[Case]) -> Iterator[Event]:
        """What happens, until every case has ended. Raises what a device's thread raised."""
        for case in cases:
            self._cases.put(case)
        for _ in self._threads:
            self._cases.put(None)
        idle = 0
        while idle < len(self._threads):
            event = self._next_event()
            if isinstance(event, _Idle):
                idle += 1
            elif not isinstance(event, _Ready):
                yield event

    def _next_event(self) -> Event | _Ready | _Idle:
        event = self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    def _serve(self, runner: Runner) -> None:
        try:
            with runner:
                self._events.put(_Ready())
                while (case := self._cases.get()) is not None:
                    self._events.put(Began(case))
                    point, samples = runner.measure(case, lambda p: self._events.put(Entered(p)))
                    self._events.put(Ended(point, samples))
            self._events.put(_Idle())
        except Stopped:
            pass
        except BaseException as error:  # the main thread raises it
            self._events.put(error)
