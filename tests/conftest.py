"""Without a GPU, Triton's kernels run in its interpreter, chosen before Triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def helpers_are_called_as_they_are():
    """The interpreter replaces triton.language's functions by its own at every launch, and looks
    for what to replace again at every call of a helper: a quarter of the time that kernels take."""
    if torch.cuda.is_available():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    def replace_unless_replaced(fn):
        modules = [x for x in (tl, tl.core) if any(x is value for value in fn.__globals__.values())]
        if any(tl.core.is_builtin(module.load) for module in modules):
            return replace(fn)
        return None

    replace = interpreter._patch_lang
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_unless_replaced)
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For tensors too small to share: two threads on a core with other work wait for each other,
    twenty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    needs_gpu = pytest.mark.skip(reason="needs a GPU: run `make test-gpu` on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(needs_gpu)
