"""Runs cases in a worker process, one after another, and outlives whatever they do to it.

The parent never touches CUDA. A worker that hangs is killed, one that dies is replaced, and the
case it was at becomes a point with an outcome and a reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from chela_bench.bench.bounds import point_of
from chela_bench.bench.cases import Case, Session
from chela_bench.errors import EnvironmentProblem, UsageError
from chela_bench.records import Ceilings, Environment, Outcome, Point

START_LIMIT_S = 180.0  # importing torch, starting CUDA, measuring the ceilings
_FOREIGN_ANSWER = "something else wrote into the worker's answers"
_LAST_BREATH_S = 10.0  # for a worker whose pipe is closed to end
_LOOK_S = 0.5  # how often a silent worker is looked at: one that forked leaves its pipe open
PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


def main_of(module: str) -> str:
    """Code that runs `main` of a module of this package, for `python -P -c`.

    Not `-m`: that would put the current folder, with whatever lies in it, first.
    """
    return (
        f"import sys; root = {PACKAGE_ROOT!r}; root in sys.path or sys.path.insert(0, root); "
        f"from {module} import main; main()"
    )


_WORKER = main_of("chela_bench.bench.worker")


def worker_environment() -> dict[str, str]:
    return {
        **os.environ,
        # One process is one thing to kill: torch.compile's pool would outlive the worker.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TEARDOWN_CUPTI": "1",  # a profiler that stays attached slows every later launch
        "PYTHONUNBUFFERED": "1",  # the last words of one that dies
    }


class WorkerDied(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Stopped(Exception):
    """`Runner.stop` ended the worker: whatever it was at has no outcome."""


class WorkerHung(Exception):
    def __init__(self, phase: str, limit_s: float) -> None:
        super().__init__(phase)
        self.phase, self.limit_s = phase, limit_s


class WorkerProcess:
    """One worker process and the pipes to it."""

    def __init__(self, session: Session, log: Path, *, root: str = PACKAGE_ROOT) -> None:
        """`root` holds the chela_bench that the worker imports: this one unless given."""
        self.session = session
        self._log = log
        read_fd, write_fd = os.pipe()
        code = _WORKER.replace(repr(PACKAGE_ROOT), repr(root))
        with log.open("ab") as log_file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(write_fd), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=log_file,
                pass_fds=(write_fd,),
                start_new_session=True,  # Ctrl-C reaches the parent alone
                env=worker_environment(),
            )
        os.close(write_fd)
        self._answers = read_fd
        self._buffer = b""
        self._log_start = _size(log)
        self._selector = selectors.DefaultSelector()
        self._selector.register(read_fd, selectors.EVENT_READ)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, command: dict[str, Any], wanted: str, limit_s: float) -> Any:
        """Sends a command and returns the answer called `wanted`; raises what a refusal says."""
        self.send(command)
        answer = self.receive(time.monotonic() + limit_s)
        if answer is None:
            raise WorkerHung("start", limit_s)
        if wanted not in answer:
            raise WorkerDied(_FOREIGN_ANSWER)
        return answer[wanted]

    def send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._log_start = _size(self._log)  # what it prints from here on is of this command
        try:
            self._process.stdin.write((json.dumps(command) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerDied(self._obituary()) from None

    def receive(self, deadline: float) -> dict[str, Any] | None:
        """The next answer, or None at the deadline (time.monotonic())."""
        left_s = math.inf
        while b"\n" not in self._buffer:
            if left_s <= 0:
                return None
            left_s = deadline - time.monotonic()
            if self._selector.select(max(0.0, min(left_s, _LOOK_S))):
                chunk = os.read(self._answers, 1 << 16)
                if not chunk:
                    raise WorkerDied(self._obituary())
                self._buffer += chunk
            elif self.ended:
                raise WorkerDied(self._obituary())
        line, self._buffer = self._buffer.split(b"\n", 1)
        try:
            answer: object = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise WorkerDied(_FOREIGN_ANSWER)
        if "refused" in answer:
            refused = answer["refused"]
            kind = EnvironmentProblem if refused["exit_code"] == 6 else UsageError
            raise kind(refused["message"])
        return answer

    def end(self) -> None:
        """Kills the worker, from any thread; whoever waits for its answer sees it die."""
        self._process.kill()

    def kill(self) -> None:
        """Ends the worker and its process group, now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        with contextlib.suppress(KeyError):
            self._selector.unregister(self._answers)
            os.close(self._answers)
        self._selector.close()

    def _obituary(self) -> str:
        """How the process ended, and the last line it printed."""
        try:
            code = self._process.wait(timeout=_LAST_BREATH_S)
        except subprocess.TimeoutExpired:  # it closed its pipe and lives on
            self.kill()
            code = self._process.returncode
        if code < 0:
            known = {int(number): number.name for number in signal.Signals}
            how = f"worker killed by {known.get(-code, f'signal {-code}')}"
            if -code == signal.SIGKILL:
                how += " (out of host memory, or killed by hand)"
        else:
            how = f"worker ended with exit code {code}"
        last = _last_line(self._log, self._log_start)
        return f"{how}; last output: {last}" if last else how


class Runner:
    """Starts workers as needed and turns cases into points. Use as a context manager."""

    def __init__(self, session: Session, log: Path, *, ceilings: Mapping[str, Ceilings]) -> None:
        """`ceilings` by device (a resumed run's) are kept instead of being measured again."""
        self._session = session
        self._log = log
        self._known_ceilings = ceilings
        self._worker: WorkerProcess | None = None
        self._stopped = False
        self._gpu_lock: IO[str] | None = None
        self._environment: Environment | None = None
        self._ceilings: Ceilings | None = None
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Runner:
        """Starts the first worker and takes the device.

        Raises EnvironmentProblem (no such device, device taken) or UsageError (a user's file does
        not import), before anything is written.
        """
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()
        if self._gpu_lock is not None:
            self._gpu_lock.close()

    def stop(self) -> None:
        """From another thread: ends the worker; what waits for it raises Stopped."""
        self._stopped = True
        worker = self._worker
        if worker is not None:
            worker.end()

    @property
    def environment(self) -> Environment:
        assert self._environment is not None, "enter the runner first"
        return self._environment

    @property
    def ceilings(self) -> Ceilings:
        assert self._ceilings is not None, "enter the runner first"
        return self._ceilings

    @property
    def device(self) -> str:
        """As it stands in points: the GPU's UUID, or "cpu"."""
        return self.environment.uuid or "cpu"

    @property
    def worker_pid(self) -> int | None:
        return None if self._worker is None else self._worker.pid

    def measure(
        self, case: Case, on_phase: Callable[[str], None] = lambda phase: None
    ) -> tuple[Point, list[float]]:
        """The case's point and samples, whatever happens to the worker on the way."""
        begin = time.monotonic()
        started = utc_now()
        if self._worker is not None and self._worker.ended:  # while idle: not this case's doing
            self._discard()
        try:
            point, samples = self._ask_worker(case, on_phase)
        except WorkerDied as death:
            self._discard()
            if self._stopped:
                raise Stopped from None
            point, samples = self.failed(case, "crash", death.reason), []
        except WorkerHung as hang:
            self._discard()
            reason = f"no answer for {hang.limit_s:g} s in phase {hang.phase!r}"
            point, samples = self.failed(case, "timeout", reason), []
        spent = {"started_utc": started, "spent_s": round(time.monotonic() - begin, 4)}
        return point.model_copy(update=spent), samples

    def interleave(
        self,
        cases: Sequence[Case],
        seconds: float,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> tuple[dict[str, list[float]], int]:
        """Samples by key of configurations of one call, timed in turn for so long, and how many
        rounds there were. Raises WorkerDied or WorkerHung; the next case gets a new worker."""
        if self._worker is not None and self._worker.ended:
            self._discard()
        if self._worker is None:
            self._start()
        assert self._worker is not None
        limits = self._session.limits
        try:
            rows = [case.model_dump(mode="json") for case in cases]
            self._worker.send({"interleave": {"cases": rows, "seconds": seconds}})
            phase, limit_s = "start", limits.phase_s
            while True:
                answer = self._worker.receive(time.monotonic() + limit_s)
                if answer is None:
                    raise WorkerHung(phase, limit_s)
                if "phase" not in answer:
                    break
                phase = answer["phase"]
                limit_s = limits.build_s if phase == "build" else limits.phase_s
                on_phase(phase)
            try:
                samples, rounds, spoilt = (answer[x] for x in ("samples_ns", "rounds", "spoilt"))
            except KeyError:
                raise WorkerDied(_FOREIGN_ANSWER) from None
        except (WorkerDied, WorkerHung):
            self._discard()
            raise
        if spoilt:
            self._discard()
        return samples, rounds

    def _ask_worker(self, case: Case, on_phase: Callable[[str], None]) -> tuple[Point, list[float]]:
        if self._worker is None:
            self._start()
        assert self._worker is not None
        limits = self._session.limits
        self._worker.send({"case": case.model_dump(mode="json")})
        phase, limit_s = "start", limits.phase_s
        while True:
            answer = self._worker.receive(time.monotonic() + limit_s)
            if answer is None:
                raise WorkerHung(phase, limit_s)
            if "phase" in answer:
                phase = answer["phase"]
                limit_s = limits.build_s if phase == "build" else limits.phase_s
                on_phase(phase)
                continue
            try:
                point = Point.model_validate(answer["point"])
                samples, spoilt = answer["samples_ns"], answer["spoilt"]
            except (KeyError, ValueError):  # pydantic's ValidationError is one
                raise WorkerDied(_FOREIGN_ANSWER) from None
            if spoilt:  # a CUDA error, or torch's state changed: the next case needs a new process
                self._discard()
            return point, samples

    def _start(self) -> None:
        try:
            worker = self._worker = WorkerProcess(self._session, self._log)
        except OSError as error:
            raise EnvironmentProblem(f"cannot start a worker: {error}") from error
        try:
            if self._stopped:
                raise Stopped
            session = self._session.model_dump(mode="json")
            hello = worker.ask({"session": session}, "hello", START_LIMIT_S)
            environment = Environment.model_validate(hello["environment"])
            if self._environment is None:
                self._environment, self.versions = environment, hello["versions"]
                self._lock_gpu()
            elif environment.uuid != self.environment.uuid:
                raise EnvironmentProblem(
                    f"the GPU was {self.environment.uuid} and is now {environment.uuid}"
                )
            known = self._ceilings or self._known_ceilings.get(self.device)
            given = None if known is None else known.model_dump(mode="json")
            ready = worker.ask({"begin": given}, "ready", START_LIMIT_S)
            self._ceilings = Ceilings.model_validate(ready["ceilings"])
        except WorkerDied as death:
            if self._stopped:
                raise Stopped from None
            raise EnvironmentProblem(f"the worker does not start: {death.reason}") from death
        except WorkerHung:
            raise EnvironmentProblem(
                f"the worker did not start within {START_LIMIT_S:g} s; last output: "
                f"{_last_line(self._log, 0) or 'none'}"
            ) from None

    def _lock_gpu(self) -> None:
        if self.environment.uuid is not None and self._gpu_lock is None:
            self._gpu_lock = gpu_lock(self.environment)

    def _discard(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def failed(self, case: Case, outcome: Outcome, reason: str) -> Point:
        """The point of a case that has no result."""
        return point_of(
            case,
            self._session,
            self.device,
            self.ceilings,
            outcome=outcome,
            reason=reason,
        )


def gpu_lock(environment: Environment) -> IO[str]:
    """One sweep holds one GPU; the system drops the lock when this process ends."""
    shared = Path("/tmp")  # one place for all users, whatever their TMPDIR
    folder = shared if shared.is_dir() else Path(tempfile.gettempdir())
    path = folder / f"chela-bench-{environment.uuid}.lock"
    return lock_file(path, f"{environment.name} ({environment.uuid}) is in use by another sweep")


def lock_file(path: Path, taken: str) -> IO[str]:
    """An exclusive lock held as long as the returned file is open; EnvironmentProblem if taken.

    The file stays. Another user's can be locked as well, but not written: flock needs no more than
    reading.
    """
    try:
        handle = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        writable = True
    except PermissionError:
        handle, writable = path.open(), False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "unknown"
        handle.close()
        raise EnvironmentProblem(f"{taken} (process {holder}); wait for it or stop it") from None
    if writable:
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
    return handle


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _size(path: Path) -> int:
    """Bytes of a file; 0 if somebody removed it."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _last_line(path: Path, start: int, tail_bytes: int = 4096) -> str:
    with contextlib.suppress(OSError), path.open("rb") as handle:
        handle.seek(0, os.SEEK_END)
        handle.seek(max(start, handle.tell() - tail_bytes))
        lines = handle.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else ""
    return ""


def shuffled(cases: list[Case], seed: int) -> Iterator[Case]:
    """In an order that the seed alone decides, so that drift is not read as a slope in T."""
    import random

    order = list(cases)
    random.Random(seed).shuffle(order)
    return iter(order)
