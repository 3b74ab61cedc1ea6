"""Without a GPU, Triton's kernels run in its interpreter, chosen before Triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    needs_gpu = pytest.mark.skip(reason="needs a GPU: run `make test-gpu` on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(needs_gpu)
