"""Gradients from kept states (kernels/linear_attention_kept.py): interpreted, or on a GPU."""

import pytest
import torch

from chela_bench.kernels import linear_attention_ops as ops
from chela_bench.kernels.linear_attention import linear_attention
from chela_bench.kernels.linear_attention_config import OPTIONS
from tests.attention import check, dtypes, inputs, label, randn_like

KEPT = [(2, 257, 2, 16, 128), (1, 520, 1, 90, 64), (1, 1, 1, 3, 64), (1, 0, 1, 16, 64)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("shape", KEPT, ids=label)
def test_gradients_from_kept_states(shape, dtype, segments):
    q, k, v, state = inputs(*shape, dtype)
    config = {"keep": 1, "segments": segments}
    check(q, k, v, config=config, initial_state=state, output_final_state=True, scale=0.5)


@dtypes
def test_states_that_could_overflow_are_not_kept(monkeypatch, dtype):
    calls = []
    monkeypatch.setattr(ops, "gradients_of_kept", lambda *tensors: calls.append(tensors))
    q, k, v, _ = inputs(1, 3, 1, 16, 64, dtype)
    o, _ = linear_attention(q.requires_grad_(), k, v, config={"keep": 1})
    o.sum().backward()
    assert len(calls) == (0 if dtype == torch.float16 else 1)


def test_states_that_were_not_kept_are_found_again():
    q, k, v, state = inputs(1, 300, 1, 16, 64, torch.float32)
    do = randn_like(v, 1)
    leaves = [x.requires_grad_() for x in (q, k, v, state)]
    o, _ = linear_attention(*leaves[:3], initial_state=state, config={"keep": 1, "segments": 2})
    wanted = torch.autograd.grad(o, leaves, do)
    options = [-1] * (len(OPTIONS) - 1) + [1]
    found = torch.ops.chela_bench.linear_attention_backward(
        q, k, v, state, None, None, do, None, 0.25, True, False, 2, 1, options
    )
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
