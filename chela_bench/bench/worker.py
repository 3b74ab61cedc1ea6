"""The worker process: owns the device, measures one case after another, can be killed at any time.

Started as `python -m chela_bench.bench.worker FD PARENT_PID`. Commands come as JSON lines on
standard input, answers go as JSON lines to file descriptor FD; standard output and error belong
to whatever the implementations print and go to the run's worker.log.

    -> {"session": {...}}   <- {"hello": {"environment": ..., "versions": ...}}
    -> {"begin": true}      <- {"ready": {"ceilings": ...}} or {"refused": {"kind", "message"}}
    -> {"case": {...}}      <- {"phase": "build"} ... {"point": {...}, "samples_ns": [...], "fatal"}
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from chela_bench.bench.cases import Case, Session
from chela_bench.errors import ChelaBenchError, EnvironmentProblem
from chela_bench.records import Ceilings, Outcome, Point, Telemetry

_PR_SET_PDEATHSIG = 1


def main() -> None:
    answer_fd, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def answer(message: dict[str, Any]) -> None:
        data = (json.dumps(message) + "\n").encode()
        while data:
            data = data[os.write(answer_fd, data) :]

    worker: Worker | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if "session" in command:
                worker = Worker(Session.model_validate(command["session"]), answer)
                worker.hello()
            elif worker is None:
                raise EnvironmentProblem("the first command of a worker must be its session")
            elif "begin" in command:
                worker.begin(command["begin"])
            else:
                worker.measure(Case.model_validate(command["case"]))
        except ChelaBenchError as error:
            answer({"refused": {"exit_code": error.exit_code, "message": str(error)}})


class Worker:
    def __init__(self, session: Session, answer: Any) -> None:
        self.session = session
        self.answer = answer
        self.user_impls: dict[str, Any] = {}

    def hello(self) -> None:
        """Says what this machine is; uses the device only as far as asking for its properties."""
        from chela_bench.profiles import machine

        self.environment = machine.environment(self.session.device)
        self.answer(
            {
                "hello": {
                    "environment": self.environment.model_dump(mode="json"),
                    "versions": machine.versions(),
                }
            }
        )

    def begin(self, ceilings: dict[str, Any] | None) -> None:
        """Loads the user's functions and measures the card's ceilings, unless they are given."""
        import torch

        from chela_bench.bench import timing
        from chela_bench.bench.load import load
        from chela_bench.bench.measure import Bench
        from chela_bench.bench.ops import user_impl
        from chela_bench.profiles import nvml
        from chela_bench.profiles.ceilings import measure_ceilings

        device = torch.device(self.session.device)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
        l2_bytes = self.environment.l2_bytes or 0
        cuda = device.type == "cuda"
        cold = self.session.l2 == "cold"
        for name, target in self.session.user_impls.items():
            load(target)
            self.user_impls[name] = user_impl(name, target)
        if cuda:
            torch.cuda.set_device(device)
        else:
            limit_memory(self.session.memory_limit_bytes)
        known = Ceilings() if ceilings is None else Ceilings.model_validate(ceilings)
        if cuda and ceilings is None:
            known = measure_ceilings(device)
        uuid = self.environment.uuid
        self.bench = Bench(
            session=self.session,
            device=device,
            device_name=uuid or "cpu",
            l2_bytes=l2_bytes,
            ceilings=known,
            telemetry=lambda: nvml.telemetry(uuid) if uuid else (Telemetry(), None),
            announce=lambda phase: self.answer({"phase": phase}),
            timer=timing.EventTimer(l2_bytes=l2_bytes, cold=cold) if cuda else None,
            evictor=timing.L2Evictor(l2_bytes) if cuda and cold else None,
        )
        self.answer({"ready": {"ceilings": known.model_dump(mode="json")}})

    def measure(self, case: Case) -> None:
        from chela_bench.bench.measure import measure

        samples: list[float] = []
        fatal = False
        try:
            point, samples = measure(self.bench, case, self.user_impls)
        except Exception as error:  # whatever an implementation raises is that point's outcome
            fatal = self.bench.cuda and device_is_broken()
            outcome, reason = outcome_of(error)
            point = Point(
                **case.model_dump(),
                device=self.bench.device_name,
                timer=self.session.timer,
                l2=self.session.l2 if self.bench.cuda else None,
                outcome=outcome,
                reason=reason,
            )
        self.answer({"point": point.model_dump(mode="json"), "samples_ns": samples, "fatal": fatal})


def outcome_of(error: BaseException) -> tuple[Outcome, str]:
    """A failed point's outcome and reason, from the exception that ended it."""
    import torch
    from torch._dynamo.exc import TorchDynamoException

    text = f"{type(error).__name__}: {error}"
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    allocator = "can't allocate memory" in str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or allocator:
        return "oom", text.partition(" Including non-PyTorch")[0]  # the rest is advice
    if "OutOfResources" in names:  # triton.runtime.errors, wherever this version keeps it
        return "out_of_resources", text
    compiler = {"CompilationError", "PTXASError", "InductorError", "CompileTimeAssertionFailure"}
    if isinstance(error, TorchDynamoException) or names & compiler:
        return "compile_error", text
    return "crash", text


def device_is_broken() -> bool:
    """After an illegal access every CUDA call fails: only a new process can go on."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def die_with_parent(parent_pid: int) -> None:
    """Linux: the kernel kills this process when its parent ends, however it ends.

    Elsewhere the worker ends when it next reads its closed standard input.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it ended before the line above
            os._exit(1)


def limit_memory(limit_bytes: int | None) -> None:
    """Linux: allocations beyond `limit_bytes` (default: 90 % of what is available) fail as
    MemoryError does, instead of having the system kill some process."""
    meminfo = Path("/proc/meminfo")
    if sys.platform != "linux" or not meminfo.exists():
        return
    if limit_bytes is None:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limit_bytes = int(fields["MemAvailable"].split()[0]) * 1024 * 9 // 10
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))


if __name__ == "__main__":
    main()
