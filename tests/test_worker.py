"""The worker in this process: what an implementation does becomes an outcome, or costs it the
process."""

from __future__ import annotations

import _thread
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from chela_bench.bench import leftovers
from chela_bench.bench import worker as worker_module
from chela_bench.bench.cases import Case, Limits, Session
from chela_bench.bench.load import sha256_of_files
from chela_bench.bench.worker import Worker, outcome_of
from chela_bench.errors import RecordError
from tests.running import FAULTS

LIMITS = Limits(call_s=1.0, sample_s=0.02, build_s=10.0, phase_s=10.0)


@pytest.fixture
def measured(monkeypatch):
    """Measures one function of tests/faults.py; the answer with its point, samples and spoilt."""
    monkeypatch.setattr(worker_module, "limit_memory", lambda limit_bytes: None)
    before = torch.get_default_dtype(), torch.get_num_threads(), Path.cwd()

    def measure(name, direction="fwd"):
        answers = []
        targets = {name: f"{FAULTS}:{name}"}
        session = Session(
            device="cpu", timer="event", l2="cold", seed=0, inputs="randn", limits=LIMITS,
            user_impls=targets, user_files_sha256=sha256_of_files(targets),
        )  # fmt: skip
        worker = Worker(session, answers.append)
        worker.hello()
        worker.begin(None)
        worker.measure(
            Case(
                op="linear_attention",
                impl=name,
                direction=direction,
                dtype="fp32",
                shape={"B": 1, "T": 64, "H": 1, "K": 16, "V": 16},
            )
        )
        return answers[-1]

    yield measure
    torch.set_default_dtype(before[0])
    torch.set_num_threads(before[1])
    os.chdir(before[2])
    torch.set_grad_enabled(True)


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        ("right", "ok", None),
        ("returns_a_tuple", "ok", None),
        ("returns_nothing", "wrong", "it returns NoneType; wanted a tensor, or a tuple that"),
        ("returns_an_empty_tuple", "wrong", "it returns tuple; wanted a tensor, or a tuple that"),
        ("returns_a_list", "wrong", "it returns list; wanted a tensor, or a tuple that"),
        ("changes_its_input", "wrong", "it changes its input v"),
        ("refuses", "skipped", "ArgumentError: K of at most 8 wanted; got 16"),
        ("exits", "crash", "SystemExit: 4"),
        ("raises", "crash", "RuntimeError: no luck [red]today[/red]"),
    ],
)
def test_what_an_implementation_does_is_an_outcome(measured, name, outcome, reason):
    answer = measured(name)
    point = answer["point"]
    assert point["outcome"] == outcome, point["reason"]
    assert (point["reason"] or "").startswith(reason or "")
    assert bool(answer["samples_ns"]) == (outcome == "ok")
    assert not answer["spoilt"]


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("sets_the_default_dtype", "fwd"),
        ("sets_the_threads", "fwd"),
        ("changes_the_folder", "fwd"),
        ("removes_its_folder", "fwd"),
        ("switches_gradients_off", "fwdbwd"),
    ],
)
def test_what_an_implementation_leaves_changed_costs_it_the_process(measured, name, direction):
    assert measured(name, direction)["spoilt"]


def test_a_users_file_that_changed_since_the_run_began_is_not_measured(tmp_path):
    """A worker that replaces another loads the file anew."""
    file = tmp_path / "mine.py"
    file.write_text("def f(q, k, v): return v\n")
    targets = {"mine.py:f": f"{file}:f"}
    session = Session(
        device="cpu", timer="event", l2="cold", seed=0, inputs="randn", limits=LIMITS,
        user_impls=targets, user_files_sha256=sha256_of_files(targets),
    )  # fmt: skip
    file.write_text("def f(q, k, v): return q\n")
    worker = Worker(session, lambda message: None)
    worker.hello()
    with pytest.raises(RecordError, match=r"mine\.py:f has changed since the run began"):
        worker.begin(None)


class OutOfResources(Exception):
    """As Triton's, wherever it is kept."""


class CompilationError(Exception):
    pass


def _raised(error, cause):
    try:
        raise error from cause
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (MemoryError("no room"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (_raised(RuntimeError("while running"), MemoryError()), "oom"),
        (OutOfResources("shared memory"), "out_of_resources"),
        (CompilationError("at 3:4"), "compile_error"),
        (_raised(RuntimeError("in a kernel"), CompilationError("at 3:4")), "compile_error"),
        (ValueError("x"), "crash"),
    ],
)
def test_an_exception_has_an_outcome(error, outcome):
    assert outcome_of(error)[0] == outcome


def test_an_exception_of_the_compiler_has_an_outcome():
    from torch._dynamo.exc import TorchDynamoException

    assert outcome_of(TorchDynamoException("a graph break"))[0] == "compile_error"


def test_an_exception_that_is_its_own_cause_has_an_end():
    error, other = ValueError("a"), ValueError("b")
    error.__cause__, other.__context__ = other, error
    assert outcome_of(error) == ("crash", "ValueError: a")


def test_advice_about_memory_is_left_out():
    said = "CUDA out of memory. Tried 2 GiB. Including non-PyTorch memory, this process has 4 GiB."
    reason = outcome_of(torch.OutOfMemoryError(said))[1]
    assert reason == "OutOfMemoryError: CUDA out of memory. Tried 2 GiB."


def test_a_thread_that_python_did_not_start_is_no_leftover():
    """Autograd's threads on a GPU, say, once a backward written in Python has run in them."""
    before, known, end = leftovers.python_threads(), threading.Event(), threading.Event()

    def run():
        threading.current_thread()
        known.set()
        end.wait()

    _thread.start_new_thread(run, ())
    known.wait()
    assert threading.active_count() > len(before)
    assert leftovers.python_threads() == before
    end.set()


def test_a_thread_on_its_way_to_its_wait_is_not_busy():
    """A busy machine lets it run late: here it works on for longer than the first look."""
    ended = threading.Event()

    def ends_up_waiting():
        until = time.monotonic() + 1.5 * leftovers._LOOK_S
        while time.monotonic() < until:
            pass
        ended.wait()

    def polls():
        while not ended.is_set():
            time.sleep(0.001)

    threads = [threading.Thread(target=each, daemon=True) for each in (ends_up_waiting, polls)]
    for thread in threads:
        thread.start()
    try:
        assert list(leftovers._busy(threads)) == threads[1:]
    finally:
        ended.set()
