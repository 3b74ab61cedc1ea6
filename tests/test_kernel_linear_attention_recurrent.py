"""linear_attention_recurrent and linear_attention_step, token by token."""

import pytest
import torch

from chela_bench.errors import ArgumentError
from chela_bench.kernels.linear_attention import (
    linear_attention_recurrent,
    linear_attention_step,
)
from chela_bench.reference.linear_attention import linear_attention_step as reference_step
from tests.attention import (
    EPS,
    both_ways,
    check,
    dtypes,
    inputs,
    label,
)


@dtypes
@both_ways
@pytest.mark.parametrize("shape", [(2, 5, 1, 3, 1), (1, 20, 2, 60, 40)], ids=label)
def test_token_by_token(shape, dtype, causal):
    q, k, v, state = inputs(*shape, dtype)
    options = {"function": linear_attention_recurrent, "causal": causal, "gradients": False}
    check(q, k, v, **options)
    check(q, k, v, scale=0.5, initial_state=state, output_final_state=True, **options)


def test_token_by_token_packed():
    lengths = [0, 1, 20, 0]
    q, k, v, state = inputs(1, sum(lengths), 2, 20, 24, torch.float32, N=len(lengths))
    check(
        q, k, v, function=linear_attention_recurrent, gradients=False, initial_state=state,
        output_final_state=True, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
    )  # fmt: skip


@dtypes
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 16, 16), (3, 1, 2, 17, 40), (2, 1, 1, 60, 130)], ids=label
)
def test_steps_continue_a_sequence(shape, dtype):
    q, k, v, state = inputs(*shape, dtype)
    exact_state = state.double()
    for token in range(3):
        one = [x[:, 0] + token for x in (q, k, v)]
        kept = state
        o = linear_attention_step(*one, state, scale=0.3)
        assert state is kept and o.dtype == dtype
        exact = reference_step(*(x.double() for x in one), exact_state, scale=0.3)
        assert (o - exact).norm() <= (EPS[dtype] + 1e-6) * exact.norm()
        assert (state - exact_state).norm() <= 1e-6 * exact_state.norm()


def test_a_step_that_cannot_be_taken_leaves_the_state():
    q, k, v, state = (x.squeeze(1) for x in inputs(1, 1, 2, 16, 16, torch.float32))
    before = state.clone()
    for match, bad in {
        r"wanted q, k \[B, H, K\]": lambda: linear_attention_step(q[None], k, v, state),
        "updated in place: wanted": lambda: linear_attention_step(q, k, v, state[:, :1]),
        "in float32, contiguous": lambda: linear_attention_step(q, k, v, state.mT),
        "in torch.float64": lambda: linear_attention_step(q, k, v, state.double()),
        "a step has no gradient": lambda: linear_attention_step(
            q.clone().requires_grad_(), k, v, state
        ),
    }.items():
        with pytest.raises(ArgumentError, match=match):
            bad()
    assert torch.equal(state, before)
