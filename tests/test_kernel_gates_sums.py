"""What gates sum over their rows: gradients of parameters and of biases."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from chela_bench.errors import ArgumentError
from chela_bench.kernels import queries_keys as shared
from chela_bench.kernels import row_sums
from chela_bench.kernels.gates_ops import (
    joint_output_gate,
    norm_gate,
    output_gate,
    silu,
)
from chela_bench.kernels.queries_keys_ops import queries_keys
from tests.attention import DEVICE
from tests.gates import (
    EPS,
    FUNCTIONS,
    PARAMETERS,
    ROUNDING,
    check,
    drawn,
    dtypes,
    inputs_of,
    with_gradients,
)

MANY_ROWS = (3, 700, 40) if DEVICE == "cuda" else (3, 67, 40)


@pytest.fixture
def long_walks(monkeypatch):
    """Each program takes several steps over MANY_ROWS, which the interpreter has fewer of."""
    if DEVICE == "cpu":
        monkeypatch.setattr(row_sums, "processors", lambda device: 1)


def test_sums_over_rows_have_the_same_bits_each_time(long_walks):
    inputs = inputs_of("queries_keys_True", MANY_ROWS, torch.bfloat16)
    first, second = (with_gradients(FUNCTIONS["queries_keys_True"][0], inputs)[1] for _ in range(2))
    assert all(map(torch.equal, first.values(), second.values()))


@pytest.mark.parametrize("walks", [1, 128])
def test_sums_over_many_rows(monkeypatch, walks):
    """Programs that walk far, and more of them than one step of their sum."""
    R = 3000 if DEVICE == "cuda" else 300  # five steps of four programs, or nineteen of one
    monkeypatch.setattr(shared, "WALKS", walks)
    check("queries_keys_True", inputs_of("queries_keys_True", (1, R, 40)))


BIASED = {  # ours, with biases that the values have in already, and where those are
    "norm_gate": (lambda o, a, b: norm_gate(o, a, eps=EPS, bias=b), "o a", "a"),
    "queries_keys": (
        lambda p, a_q, m_q, a_k, m_k, b: queries_keys(
            p, a_q, m_q, a_k, m_k, activation=True, bias=b
        ),
        "p a_q m_q a_k m_k",
        "p",
    ),
    "silu": (lambda p, b: silu(p, bias=b), "p", "p"),
    "residual": (lambda h, x, b: output_gate(h, None, x, bias_h=b), "h x", "h"),
    "output_gate": (
        lambda h, g, x, b, c: output_gate(h, g, x, bias_h=b, bias_g=c),
        "h g x",
        "h g",
    ),
    "joint": (
        lambda h, g, x, b, c: joint_output_gate(torch.cat([h, g], dim=-1), x, bias_h=b, bias_g=c),
        "h g x",
        "h g",
    ),
}


def biased_inputs(name, shape, dtype):
    _, names, biased = BIASED[name]
    found = {
        x: drawn(*(shape[-1:] if x in PARAMETERS else shape), seed=seed).to(dtype)
        for seed, x in enumerate(names.split())
    }
    return found | {f"bias of {x}": drawn(shape[-1], seed=30).float() for x in biased.split()}


def biased_gradients(name, inputs, upstream=None, trained=None):
    return with_gradients(BIASED[name][0], inputs, upstream, trained=trained)


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("shape", [(2, 70, 1), (1, 130, 3), MANY_ROWS, (2, 9, 600)], ids=str)
@dtypes
def test_a_bias_gets_the_sum_of_what_it_is_in(name, dtype, shape, request):
    """And nothing else changes."""
    if shape == MANY_ROWS:
        request.getfixturevalue("long_walks")
    inputs = biased_inputs(name, shape, dtype)
    plain = [x for x in inputs if not x.startswith("bias")]
    outputs, gradients, upstream = biased_gradients(name, inputs)
    alone, without, _ = biased_gradients(name, inputs, upstream, trained=plain)
    assert all(map(torch.equal, outputs, alone))
    for x in plain:  # a GPU's compiler may contract other products and sums
        torch.testing.assert_close(gradients[x], without[x], rtol=2 * ROUNDING[dtype], atol=1e-5)
    for x in BIASED[name][2].split():
        terms = gradients[x].double().reshape(-1, shape[-1])
        error = (gradients[f"bias of {x}"] - terms.sum(dim=0)).abs()
        # The terms are rounded, what is summed is not.
        assert (error <= 4 * ROUNDING[dtype] * terms.norm(dim=0) + 1e-5).all()


@pytest.mark.parametrize("name", BIASED)
def test_a_bias_alone_is_trained(name):
    inputs = biased_inputs(name, (2, 33, 24), torch.float32)
    _, every, upstream = biased_gradients(name, inputs)
    for x in inputs:
        if x.startswith("bias"):
            _, alone, _ = biased_gradients(name, inputs, upstream, trained=[x])
            torch.testing.assert_close(alone[x], every[x])
            assert alone[x].any()


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("shape", [(2, 0, 8), (3, 0)], ids=str)
def test_nothing_has_a_bias_without_gradient(name, shape):
    _, gradients, _ = biased_gradients(name, biased_inputs(name, shape, torch.float32))
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_bias_has_a_gradient_in_its_dtype(dtype):
    inputs = biased_inputs("output_gate", (3, 24), torch.float16)
    inputs["bias of g"] = inputs["bias of g"].to(dtype)
    _, gradients, _ = biased_gradients("output_gate", inputs)
    assert gradients["bias of g"].dtype == dtype and gradients["bias of h"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows past the last, where eps = 0
def test_padded_rows_leave_nothing_in_a_sum():
    """Of a narrow norm: tiles of many rows, and eps = 0, which makes NaN of rows of zeros."""
    o, a = drawn(5, 3).requires_grad_(), drawn(5, 3, seed=1)
    bias = drawn(3).requires_grad_()
    norm_gate(o, a, eps=0.0, bias=bias).sum().backward()
    assert bias.grad.isfinite().all()


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(7), r"a bias \[8\] of floats"),
        (torch.zeros(8, dtype=torch.long), "of floats"),
        (torch.zeros(1, 8), r"got \[1, 8\]"),
    ],
)
def test_rejects_a_bias_that_cannot_be_in(bias, message):
    p = drawn(3, 8)
    with pytest.raises(ArgumentError, match=message):
        silu(p, bias=bias.to(DEVICE))
    with pytest.raises(ArgumentError, match="no bias without a"):
        norm_gate(p, None, eps=EPS, bias=drawn(8))
