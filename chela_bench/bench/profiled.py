"""The process that Nsight Compute watches: one call of each case, in an NVTX range of its own.

Started with three arguments: a file with the session and the cases, a file that says how far it
is, a line a step, and the bench's process id. A case is compiled, tuned and run once before; then
L2 is evicted, and the kernels of the next call alone are counted; then L2 is evicted once more, so
that what the call wrote and L2 still holds is counted on its way out. Before the first case L2 is
evicted in a range as well: at the first kernel that it sees the tool writes some megabytes, which
would be the first case's. The results are not judged: the bench has done that, on the same code,
shape and dtype.

    {"pid": 17}    {"begins": 0}    {"ended": 0, "problem": null}    {"spoilt": "..."}

Where there is one, `model` stands beside `problem`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from chela_bench.bench import timing
from chela_bench.bench.cases import Case, Session
from chela_bench.bench.job import Job
from chela_bench.bench.leftovers import left_behind, release_memory, state
from chela_bench.bench.load import load
from chela_bench.bench.modelled import modelled_launches
from chela_bench.bench.registry import get_op
from chela_bench.bench.worker import Worker, outcome_of
from chela_bench.profiles.ncu import RANGE

_LOOK_S = 1.0
Ranged = Callable[[str, Callable[[], object]], None]


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    watch(int(sys.argv[3]))
    with Path(sys.argv[2]).open("a") as progress:

        def tell(**step: Any) -> None:
            progress.write(json.dumps(step) + "\n")
            progress.flush()

        tell(pid=os.getpid())
        session = Session.model_validate(plan["session"])
        cold = session.model_copy(update={"timer": "profiler", "l2": "cold"})
        worker = Worker(cold, lambda message: None)
        worker.hello()
        worker.begin(plan["ceilings"])
        cases = [(number, Case.model_validate(case)) for number, case in plan["cases"]]
        run_all(worker, cases, tell, ranged)


def run_all(
    worker: Worker, cases: list[tuple[int, Case]], tell: Callable[..., None], ranged: Ranged
) -> None:
    """Each case in turn, until one leaves the process unfit for the next."""
    cuda = worker.bench.cuda
    if worker.bench.evictor is not None:
        ranged(f"{RANGE}-begin", worker.bench.evictor)
    for number, case in cases:
        tell(begins=number)
        before, problem, known = state(cuda=cuda), None, {}
        try:
            run(worker, number, case, ranged)
            known = model(worker, case)
        except (Exception, SystemExit) as error:  # a case that fails here keeps its time
            problem = ": ".join(outcome_of(error))
        release_memory(cuda=cuda)
        tell(ended=number, problem=problem, **known)
        spoilt = left_behind(before, cuda=cuda)
        if spoilt is not None:
            tell(spoilt=spoilt)
            return


def run(worker: Worker, number: int, case: Case, ranged: Ranged) -> None:
    op = get_op(case.op)
    impl = worker.user_impls.get(case.impl) or op.impl(case.impl)
    job = Job(worker.bench, case, op, impl, load(impl.target))
    # Ranges belong to the thread that opens them, and autograd has threads of its own.
    with job.tuned(), torch.autograd.set_multithreading_enabled(False):
        call = job.call(job.draw())
        call()
        steps = timing.steps_of(call)
        steps.rewind()
        evict = worker.bench.evictor or _nothing
        evict()
        ranged(f"{RANGE}-{number}", steps.run)
        ranged(f"{RANGE}-late-{number}", evict)


def model(worker: Worker, case: Case) -> dict[str, Any]:
    """What the implementation's formula says of each launch: kernel, bytes, and bytes in L2."""
    impl = worker.user_impls.get(case.impl) or get_op(case.op).impl(case.impl)
    launches = modelled_launches(case, impl, worker.bench.l2_bytes)
    return {} if launches is None else {"model": launches}


def _nothing() -> None: ...


def ranged(name: str, work: Callable[[], object]) -> None:
    """Runs the work on the device, idle before and after, in the range that is counted."""
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_push(RANGE)
    torch.cuda.nvtx.range_push(name)
    try:
        work()
        torch.cuda.synchronize()
    finally:
        torch.cuda.nvtx.range_pop()
        torch.cuda.nvtx.range_pop()


def watch(bench_pid: int) -> None:
    """Ends this process when the bench is gone: its parent is the tool, which would go on."""

    def look() -> None:
        while True:
            time.sleep(_LOOK_S)
            try:
                os.kill(bench_pid, 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=look, daemon=True, name="watch").start()
