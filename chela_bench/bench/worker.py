"""The worker process: owns the device, measures one case after another, can be killed at any time.

Started with two arguments, a file descriptor and the parent's process id. Commands come as JSON
lines on standard input, answers go as JSON lines to the descriptor; standard output and error
belong to whatever the implementations print and go to the run's worker.log.

    -> {"session": {...}}      <- {"hello": {"environment": ..., "versions": ...}}
    -> {"begin": ceilings}     <- {"ready": {"ceilings": ...}}      (null: measure them)
    -> {"case": {...}}         <- {"phase": "build"} ... {"point", "samples_ns", "spoilt"}
    -> {"interleave": {...}}   <- {"phase": "build"} ... {"samples_ns", "rounds", "spoilt"}
    -> {"plan": {...}}         <- {"planned": [[case, why it cannot run], ...]}, or {"failed": ...}
    -> {"hold": {...}}         <- {"phase": "build"} ... {"held": {}}, or {"failed": [outcome, why]}
    -> {"take": seconds}       <- {"taken": {"samples_ns", "clock"}}, or {"failed": ...}
    -> {"release": null}       <- {"phase": "check"} ... {"released": {}}, or {"failed": ...}
    -> any of these            <- {"refused": {"exit_code", "message"}}
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from chela_bench.bench.cases import Case, Session
from chela_bench.errors import ArgumentError, ChelaBenchError, EnvironmentProblem
from chela_bench.profiles.forks import die_with_parent
from chela_bench.records import Ceilings, Outcome, Spent

_ALLOCATOR_SAYS = ("can't allocate memory", "Storage size calculation overflowed")


def main() -> None:
    answer_fd, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def answer(message: dict[str, Any]) -> None:
        data = (json.dumps(message) + "\n").encode()
        while data:
            data = data[os.write(answer_fd, data) :]

    commands = os.fdopen(os.dup(0), "r")  # an implementation that reads its input gets nothing
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    worker: Worker | None = None
    for line in commands:
        command = json.loads(line)
        try:
            if "session" in command:
                worker = Worker(Session.model_validate(command["session"]), answer)
                worker.hello()
            elif worker is None:
                raise EnvironmentProblem("the first command of a worker must be its session")
            elif "begin" in command:
                gc.disable()  # a tenth of what importing torch takes
                worker.begin(command["begin"])
                gc.freeze()
                gc.enable()
            elif "interleave" in command:
                worker.interleave(**command["interleave"])
            elif "case" in command:
                worker.measure(Case.model_validate(command["case"]))
            else:
                worker.turn(command)
        except ChelaBenchError as error:
            answer({"refused": {"exit_code": error.exit_code, "message": str(error)}})


class Worker:
    def __init__(self, session: Session, answer: Any) -> None:
        self.session = session
        self.answer = answer
        self.user_impls: dict[str, Any] = {}
        self.held: Any = None  # turns.Held

    def hello(self) -> None:
        """Says what this machine is; uses the device only as far as asking for its properties."""
        from chela_bench.bench.registry import plugin_versions
        from chela_bench.profiles import machine

        self.environment = machine.environment(self.session.device)
        self.answer(
            {
                "hello": {
                    "environment": self.environment.model_dump(mode="json"),
                    "versions": machine.versions() | plugin_versions(),
                }
            }
        )

    def begin(self, ceilings: dict[str, Any] | None) -> None:
        """Loads the user's functions and measures the card's ceilings, unless they are given."""
        import torch

        from chela_bench.bench import timing
        from chela_bench.bench.job import Bench
        from chela_bench.bench.load import load, refuse_changed_files
        from chela_bench.bench.ops import user_impl
        from chela_bench.profiles import gpm, nvml
        from chela_bench.profiles.ceilings import measure_ceilings

        device = torch.device(self.session.device)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
        l2_bytes = self.environment.l2_bytes or 0
        cuda, cold = device.type == "cuda", self.session.l2 == "cold"
        events = cuda and self.session.timer == "event"
        refuse_changed_files(self.session.user_impls, self.session.user_files_sha256)
        for name, target in self.session.user_impls.items():
            load(target)
            self.user_impls[name] = user_impl(name, target)
        if cuda:
            torch.cuda.set_device(device)
            nvml.keep_open()
        else:
            limit_memory(self.session.memory_limit_bytes)
        uuid = self.environment.uuid
        if uuid and self.session.gpm == "or refuse" and (problem := gpm.problem(uuid)):
            raise EnvironmentProblem(f"--hbm gpm: {problem}")
        known = Ceilings() if ceilings is None else Ceilings.model_validate(ceilings)
        if cuda and ceilings is None:
            known = measure_ceilings(device)
        self.bench = Bench(
            session=self.session,
            device=device,
            device_name=uuid or "cpu",
            l2_bytes=l2_bytes,
            ceilings=known,
            sampler=lambda: nvml.Sampler(uuid or ""),
            announce=lambda phase: self.answer({"phase": phase}),
            timer=timing.EventTimer(l2_bytes=l2_bytes, cold=cold) if events else None,
            evictor=timing.L2Evictor(l2_bytes) if cuda and cold and not events else None,
        )
        self.answer({"ready": {"ceilings": known.model_dump(mode="json")}})

    def measure(self, case: Case) -> None:
        from chela_bench.bench.bounds import point_of
        from chela_bench.bench.leftovers import release_memory, state
        from chela_bench.bench.measure import measure

        bench = self.bench
        bench.spent_s = {}
        samples: list[float] = []
        before = state(cuda=bench.cuda)
        try:
            point, samples = measure(bench, case, self.user_impls)
        except (Exception, SystemExit) as error:  # what an implementation raises is an outcome
            outcome, reason = outcome_of(error)
            point = point_of(
                case,
                self.session,
                bench.device_name,
                bench.ceilings,
                outcome=outcome,
                reason=reason,
            )
        release_memory(cuda=bench.cuda)
        spoilt = self._spoilt(case.key, before)
        spent = Spent(**{f"{name}_s": round(s, 6) for name, s in bench.spent_s.items()})
        point = point.model_copy(update={"spent": spent})
        answer = {"point": point.model_dump(mode="json"), "samples_ns": samples}
        self.answer({**answer, "spoilt": spoilt})

    def interleave(self, cases: list[dict[str, Any]], seconds: float) -> None:
        """Times right configurations of one call in turn."""
        from chela_bench.bench.interleave import interleaved
        from chela_bench.bench.leftovers import release_memory, state

        bench = self.bench
        wanted = [Case.model_validate(case) for case in cases]
        before = state(cuda=bench.cuda)
        samples, rounds = interleaved(bench, wanted, self.user_impls, seconds)
        release_memory(cuda=bench.cuda)
        spoilt = self._spoilt(f"{len(cases)} configurations in turn", before)
        self.answer({"samples_ns": samples, "rounds": rounds, "spoilt": spoilt})

    def _spoilt(self, what: str, before: Any) -> bool:
        """Whether something was left behind, which the log tells."""
        from chela_bench.bench.leftovers import left_behind

        spoilt = left_behind(before, cuda=self.bench.cuda)
        if spoilt is not None:
            print(f"{what}: {spoilt}; a new worker follows", file=sys.stderr, flush=True)
        return spoilt is not None

    def turn(self, command: dict[str, Any]) -> None:
        """Two workers in turns: what each has is told, then a case is held ready, sampled now and
        again, and let go."""
        from chela_bench.bench import plan
        from chela_bench.bench.leftovers import release_memory
        from chela_bench.bench.turns import Held

        try:
            if "plan" in command:
                found = plan.planned_here(**command["plan"])
                rows = [(case.model_dump(mode="json"), why_not) for case, why_not in found]
                self.answer({"planned": rows})
            elif "hold" in command:
                self.held = Held(self.bench, Case.model_validate(command["hold"]), self.user_impls)
                self.answer({"held": {}})
            elif "take" in command:
                samples_ns, clock = self.held.take(command["take"])
                self.answer({"taken": {"samples_ns": samples_ns, "clock": clock}})
            else:
                self.held.release()
                self.answer({"released": {}})
        except (Exception, SystemExit) as error:  # what an implementation raises is an outcome
            self.answer({"failed": failure_of(error)})
        if "release" in command:
            self.held = None
            release_memory(cuda=self.bench.cuda)


def failure_of(error: BaseException) -> tuple[Outcome, str]:
    """As `outcome_of`; what the bench itself found keeps its own words."""
    from chela_bench.bench.job import Finished

    if isinstance(error, Finished):
        return error.outcome, error.reason
    return outcome_of(error)


def outcome_of(error: BaseException) -> tuple[Outcome, str]:
    """A failed point's outcome and reason, from the exception that ended it."""
    import torch

    text = f"{type(error).__name__}: {error}"
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    allocator = any(words in str(error) for words in _ALLOCATOR_SAYS)
    if allocator or any(isinstance(link, torch.OutOfMemoryError | MemoryError) for link in chain):
        return "oom", text.partition(" Including non-PyTorch")[0]  # the rest is advice
    if "OutOfResources" in names:  # triton.runtime.errors, wherever this version keeps it
        return "out_of_resources", text
    if isinstance(error, ArgumentError):  # a kernel of ours that says it does not take this
        return "skipped", text
    compiler = {"CompilationError", "PTXASError", "InductorError", "CompileTimeAssertionFailure"}
    dynamo = sys.modules.get("torch._dynamo.exc")  # seconds to import, and needed only if it raised
    if (dynamo and isinstance(error, dynamo.TorchDynamoException)) or names & compiler:
        return "compile_error", text
    return "crash", text


def limit_memory(limit_bytes: int | None) -> None:
    """Linux: allocations beyond `limit_bytes` (default: 90 % of what is available) fail as
    MemoryError does, instead of having the system kill some process."""
    meminfo = Path("/proc/meminfo")
    if sys.platform != "linux" or not meminfo.exists():
        return
    if limit_bytes is None:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
        limit_bytes = int(min(available, _left_in_cgroup()) * 0.9)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))


def _left_in_cgroup() -> float:
    """Bytes that this process's control group may still take; infinity where none says."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        return (
            math.inf if limit == "max" else int(limit) - int((root / "memory.current").read_text())
        )
    except (OSError, ValueError):
        return math.inf
