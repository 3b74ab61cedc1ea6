"""Without a GPU, Triton's kernels run in its interpreter, chosen before Triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

from tests.interpreter import without_repeats

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def a_quick_interpreter():
    if torch.cuda.is_available():
        yield
        return
    with without_repeats():
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For tensors too small to share: two threads on a core with other work wait for each other,
    twenty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def worker_server():
    from tests.forked_workers import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def forked_workers(worker_server):
    """For modules whose sweeps, in this process, start many workers."""
    from chela_bench.bench import runner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "subprocess", worker_server.subprocess())
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    needs_gpu = pytest.mark.skip(reason="needs a GPU: run `make test-gpu` on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(needs_gpu)
