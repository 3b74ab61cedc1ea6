"""Two sides measured in turns, each in a process of its own: A B, B A, A B, ... until it is clear.

Whatever changes slowly (heat, clocks, neighbours) meets both sides alike, and a round is one pair:
drift, a clock with two states and outliers cannot pass for a change of the code.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chela_bench.bench import stats, verdict
from chela_bench.bench.cases import Case, Session
from chela_bench.bench.comparing import Noise, row_of
from chela_bench.bench.load import is_file
from chela_bench.bench.plan import Settings
from chela_bench.bench.runner import (
    PACKAGE_ROOT,
    START_LIMIT_S,
    WorkerDied,
    WorkerHung,
    WorkerProcess,
    gpu_lock,
)
from chela_bench.bench.sources import Machine, machine_of
from chela_bench.bench.verdict import Evidence
from chela_bench.errors import EnvironmentProblem, UsageError
from chela_bench.records import Environment
from chela_bench.verdicts import Change

LOOKS = (10, 20, 40, 80, 160, 320, 640)  # rounds after which the verdict is looked at
TURN_S = 0.05  # of samples, a side and round
Clear = Callable[[Evidence, int], bool]
Lack = tuple[str, str] | None  # outcome and reason of a side that cannot run a point


class Failed(Exception):
    """A side has no time: outcome and reason, and of rounds which side it is."""

    def __init__(self, outcome: str, reason: str, *, is_after: bool = True) -> None:
        super().__init__(reason)
        self.outcome, self.reason, self.is_after = outcome, reason, is_after


@dataclass(frozen=True)
class Pair:
    """The same point of both sides."""

    name: str
    before: Case
    after: Case
    lacks: tuple[Lack, Lack] = (None, None)  # of both sides

    def refuse(self, side: int) -> None:
        """Raises Failed where it is known without trying that a side cannot run it."""
        lack = self.lacks[side]
        if lack is not None:
            raise Failed(*lack)


class Seat:
    """One side: a worker with its own copy of the package."""

    def __init__(self, session: Session, log: Path, *, root: str = PACKAGE_ROOT) -> None:
        self._session, self._log, self._root = session, log, root
        self._worker: WorkerProcess | None = None
        self._holds = False
        self.environment: Environment | None = None
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Seat:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None
            self._holds = False

    @property
    def machine(self) -> Machine:
        assert self.environment is not None, "enter the seat first"
        return machine_of(self.environment, self.versions)

    def planned(self, settings: Settings, *, every_impl: bool) -> list[tuple[Case, str | None]]:
        """The settings' points as this side's revision has them, of all implementations if asked,
        and why one cannot run. Raises Failed where it is too old for the question."""
        wanted = {"settings": settings.model_dump(mode="json"), "every_impl": every_impl}
        found = self._ask({"plan": wanted}, "planned")
        try:
            return [(Case.model_validate(case), why_not) for case, why_not in found]
        except ValidationError as error:
            raise Failed("crash", f"it plans otherwise: {error}") from None

    def hold(self, case: Case) -> None:
        self._ask({"hold": case.model_dump(mode="json")}, "held")
        self._holds = True

    def take(self, seconds: float) -> tuple[float, str]:
        """The median of a turn's samples, nanoseconds, and the clock."""
        taken = self._ask({"take": seconds}, "taken")
        return stats.median(taken["samples_ns"]), taken["clock"]

    def release(self) -> None:
        self._holds = False
        self._ask({"release": None}, "released")

    def let_go(self) -> Failed | None:
        """After a failure: whatever is still held. Returns what its last judgement finds."""
        if self._holds:
            try:
                self.release()
            except Failed as failed:
                return failed
        return None

    def _start(self) -> WorkerProcess:
        try:
            worker = self._worker = WorkerProcess(self._session, self._log, root=self._root)
            hello = worker.ask(
                {"session": self._session.model_dump(mode="json")}, "hello", START_LIMIT_S
            )
            self.environment = Environment.model_validate(hello["environment"])
            self.versions = hello["versions"]
            worker.ask({"begin": {}}, "ready", START_LIMIT_S)
        except OSError as error:
            raise EnvironmentProblem(f"cannot start a worker: {error}") from error
        except WorkerDied as death:
            raise EnvironmentProblem(
                f"the worker of {self._root} does not start: {death.reason}"
            ) from death
        except WorkerHung:
            raise EnvironmentProblem(
                f"the worker of {self._root} did not start within {START_LIMIT_S:g} s"
            ) from None
        return worker

    def _ask(self, command: dict[str, Any], wanted: str) -> Any:
        """The answer; Failed if there is none to be had, and the next question has a new worker."""
        worker = self._worker or self._start()
        limits = self._session.limits
        phase, limit_s = "start", limits.phase_s
        try:
            worker.send(command)
            while True:
                answer = worker.receive(time.monotonic() + limit_s)
                if answer is None:
                    raise Failed("timeout", f"no answer for {limit_s:g} s in phase {phase!r}")
                if "phase" in answer:
                    phase = answer["phase"]
                    limit_s = limits.build_s if phase == "build" else limits.phase_s
                elif "failed" in answer:
                    raise Failed(*answer["failed"])
                elif wanted in answer:
                    return answer[wanted]
                else:
                    raise Failed("crash", "something else wrote into the worker's answers")
        except WorkerDied as death:
            self.__exit__()
            reason = death.reason
            if self._root != PACKAGE_ROOT and "KeyError" in reason:
                reason += "; is this revision older than live comparison? Compare sweeps of it"
            raise Failed("crash", reason) from death
        except Failed as failed:
            if failed.outcome in ("timeout", "crash"):
                self.__exit__()
            raise


@contextlib.contextmanager
def seats(
    sessions: Sequence[Session], log_folder: Path, roots: Sequence[str]
) -> Iterator[tuple[Seat, Seat]]:
    """Both sides, started, on one device that is locked for them."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Seat(sessions[0], log_folder / "before.log", root=roots[0]))
        assert first.environment is not None
        if first.environment.uuid is not None:
            stack.callback(gpu_lock(first.environment).close)
        second = stack.enter_context(Seat(sessions[1], log_folder / "after.log", root=roots[1]))
        if second.machine.identity != first.machine.identity:
            raise EnvironmentProblem(f"two devices: {first.machine} and {second.machine}")
        yield first, second


def rounds(
    before: Seat,
    after: Seat,
    pair: Pair,
    clear: Clear,
    *,
    budget_s: float,
    turn_s: float = TURN_S,
) -> Evidence | str:
    """Evidence, or why there is none. Raises Failed if a side has no time or is not right.

    `clear` is asked after each of LOOKS, with how many looks there can be at most.
    """
    sides = (before, after)
    for side in (0, 1):
        _named(side == 1, lambda s=side: pair.refuse(s))  # type: ignore[misc]
    for seat, case in zip(sides, (pair.before, pair.after), strict=True):
        _named(seat is after, lambda s=seat, c=case: s.hold(c))  # type: ignore[misc]
    taken: list[tuple[float, float]] = []
    known: set[str] = set()
    deadline = time.monotonic() + budget_s
    while len(taken) < LOOKS[-1]:
        order = (0, 1) if len(taken) % 2 == 0 else (1, 0)
        times = [0.0, 0.0]
        for side in order:
            times[side], clock = _named(side == 1, lambda s=sides[side]: s.take(turn_s))  # type: ignore[misc]
            known.add(clock)
        taken.append((times[0], times[1]))
        if len(known) > 1:
            break
        enough = len(taken) >= LOOKS[0] and time.monotonic() > deadline
        if enough or (len(taken) in LOOKS and clear(verdict.paired(taken), len(LOOKS))):
            break
    for seat in sides:
        _named(seat is after, seat.release)
    if len(known) > 1:
        return f"timed by other means: {' and '.join(sorted(known))}"
    return verdict.paired(taken)


def _named(is_after: bool, act: Callable[[], Any]) -> Any:
    """A failure says whose it is."""
    try:
        return act()
    except Failed as failed:
        side = "after" if is_after else "before"
        reason = f"{side}: {failed.outcome}: {failed.reason}"
        raise Failed(failed.outcome, reason, is_after=is_after) from None


@dataclass(frozen=True)
class Refusal:
    """Why a pair has no ratio."""

    reason: str
    outcomes: tuple[str, str] = ("ok", "ok")  # of both sides, as far as each was looked at
    after_ns: float | None = None  # of one turn, where it is the first side alone that has no time
    tried: bool = True  # the first side; else it is known to have nothing to run

    @property
    def wrong(self) -> bool:
        """Whether a side's result is not right."""
        return "wrong" in self.outcomes


def in_turns(
    before: Seat,
    after: Seat,
    pairs: Sequence[Pair],
    clear: Clear,
    *,
    budget_s: float,
    on_pair: Callable[[Pair], None] = lambda pair: None,
) -> list[Evidence | Refusal]:
    """Evidence a pair, each measured until `clear(evidence, looks)` or the budget's end."""
    found: list[Evidence | Refusal] = []
    for pair in pairs:
        on_pair(pair)
        try:
            evidence = rounds(before, after, pair, clear, budget_s=budget_s)
            found.append(Refusal(evidence) if isinstance(evidence, str) else evidence)
        except Failed as failed:
            before.let_go()
            found.append(_refused(failed, after, pair))
    return found


def _refused(failed: Failed, after: Seat, pair: Pair) -> Refusal:
    """Where it is the first side that fails, how the second one fares: it may be the one mended,
    which every judgement has to say."""
    last = after.let_go()
    if failed.is_after:
        return Refusal(failed.reason, ("ok", failed.outcome))
    try:
        if last is not None:
            raise last
        pair.refuse(1)
        after.hold(pair.after)
        after_ns, _ = after.take(TURN_S)
        after.release()
    except Failed as other:
        reason = f"{failed.reason}; after: {other.outcome}: {other.reason}"
        return Refusal(reason, (failed.outcome, other.outcome))
    finally:
        after.let_go()
    return Refusal(failed.reason, (failed.outcome, "ok"), after_ns, pair.lacks[0] is None)


def compare(
    before: Seat,
    after: Seat,
    pairs: Sequence[Pair],
    noise: Noise,
    *,
    budget_s: float,
    on_pair: Callable[[Pair], None] = lambda pair: None,
) -> list[Change]:
    """A row a pair. Verdicts are corrected for the number of pairs and of looks."""

    def clear(evidence: Evidence, looks: int) -> bool:
        alpha = verdict.COMPARE_ALPHA / looks / len(pairs)
        [(word, _)] = verdict.verdicts([evidence], noise=[noise.typical], alpha=alpha)
        return word != "unclear"

    taken = in_turns(before, after, pairs, clear, budget_s=budget_s, on_pair=on_pair)
    found = [one for one in taken if isinstance(one, Evidence)]
    alpha = verdict.COMPARE_ALPHA / len(LOOKS)
    judged = iter(verdict.verdicts(found, noise=[noise.typical] * len(found), alpha=alpha))
    rows = []
    for pair, one in zip(pairs, taken, strict=True):
        if isinstance(one, Refusal):
            rows.append(
                Change(name=pair.name, verdict="unclear", reason=one.reason, wrong=one.wrong)
            )
            continue
        word, p = next(judged)
        reason = "the budget ended before it was clear" if word == "unclear" else None
        row = row_of(pair.name, one, min(1.0, p * len(LOOKS)))
        rows.append(row.model_copy(update={"verdict": word, "reason": reason}))
    return rows


def clear_of(thresholds: Callable[[Evidence], float], pairs: int) -> Clear:
    """For the gate: until it is known on which side of its threshold the ratio lies."""

    def clear(evidence: Evidence, looks: int) -> bool:
        alpha = verdict.GATE_ALPHA / looks / pairs
        [(within, _)] = verdict.gated([evidence], [thresholds(evidence)], alpha=alpha)
        return within is not None

    return clear


@contextlib.contextmanager
def checkouts(revisions: Sequence[str]) -> Iterator[list[str]]:
    """A worktree of the package's repository for every revision; `.` is the tree as it stands."""
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="chela-bench-", ignore_cleanup_errors=True)
            )
        )
        # Signals reach the main thread alone: a git that is cut short leaves its worktree locked.
        thread = stack.enter_context(ThreadPoolExecutor(1))

        def git(*command: str) -> str | None:
            return thread.submit(_git, *command).result()

        roots = []
        for number, revision in enumerate(revisions):
            if revision == ".":
                roots.append(PACKAGE_ROOT)
                continue
            prefix = git("rev-parse", "--show-prefix")  # of the package in its repository
            if prefix is None:
                raise UsageError(
                    f"{revision!r} is no implementation of what is selected, and no revision: "
                    f"{PACKAGE_ROOT} is no git checkout; there, `.` is all there is"
                )
            commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
            if commit is None or commit.startswith("^"):  # all that is not of the revision
                raise UsageError(
                    f"{revision!r} is no implementation of what is selected, and no revision of "
                    f"{PACKAGE_ROOT}; there, `.` is the tree as it stands"
                )
            root = folder / f"{number}"
            stack.callback(git, "worktree", "remove", "--force", "--force", str(root))
            if git("worktree", "add", "--detach", str(root), commit) is None:
                raise EnvironmentProblem(f"git cannot check {revision} out into {root}")
            if not (root / prefix / "chela_bench" / "bench" / "turns.py").exists():
                raise UsageError(
                    f"{revision} is older than live comparison, or the repository around "
                    f"{PACKAGE_ROOT} is not chela-bench's; compare sweeps instead"
                )
            roots.append(str(root / prefix))
        yield roots


def there(target: str, root: str) -> str | None:
    """A user's `/path/file.py:function` as the checkout in `root` has it; None if it has no such
    file. Raises UsageError for a file outside the repository, which no revision has of its own."""
    file, _, function = target.rpartition(":")
    other = inside(Path(file), root)
    if other is None:
        raise UsageError(
            f"{file} is the same on both sides of a comparison of revisions: it lies outside the "
            f"repository of {PACKAGE_ROOT}. Keep both versions and time them: chela-bench compare "
            f"--live A.py:{function} B.py:{function}"
        )
    return f"{other}:{function}" if is_file(other) else None


def inside(file: Path, root: str) -> Path | None:
    """Where a file of the repository lies in the checkout in `root`; None of one outside."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or not file.is_relative_to(top):
        return None
    return Path(os.path.normpath(Path(root, os.path.relpath(file, PACKAGE_ROOT))))


def _git(*command: str) -> str | None:
    """What git says of the package's repository; None if it refuses."""
    try:
        return subprocess.run(
            ["git", "-C", PACKAGE_ROOT, *command],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            start_new_session=True,  # Ctrl-C reaches the parent alone
            env={k: v for k, v in os.environ.items() if not k.startswith("GIT_")},  # as in hooks
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
