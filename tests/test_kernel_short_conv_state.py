"""The short convolution in pieces, with a state from one to the next."""

from __future__ import annotations

import itertools

import pytest
import torch

from chela_bench.bench.check import relative_error
from chela_bench.kernels import short_long_conv as module
from chela_bench.kernels.short_long_conv import (
    short_conv,
)
from chela_bench.reference import short_long_conv as reference
from tests.attention import DEVICE
from tests.convolutions import (
    DTYPES,
    ROUNDING,
    drawn,
    laid_out,
)


@pytest.mark.parametrize(
    ("activation", "widths", "layout", "dtype"),
    [
        ("silu", (3, 6), "btd", "float16"),
        (None, (3, 6), "bdt", "float32"),
        ("silu", (1,), "bdt", "float32"),
        (None, (), "btd", "float16"),
    ],
)
def test_streaming_equals_the_whole(activation, widths, layout, dtype):
    B, T, D = 1, 20, 3
    x = drawn(B, T, D, seed=1).to(DTYPES[dtype])
    short = [drawn(D, width, seed=2) for width in widths]
    whole = short_conv(x, short, activation=activation)
    exact = reference.short_conv(x.double(), short, activation=activation)
    assert relative_error(whole, exact) <= ROUNDING[x.dtype] + 1e-6
    state = torch.zeros(B, D, max([1, *widths]) - 1, device=DEVICE)
    pieces = []
    bounds = [*range(6), 5, 8, T]  # token by token, none, three, the rest
    for start, end in itertools.pairwise(bounds):
        piece = laid_out(x[:, start:end], layout)
        y = short_conv(piece, short, activation=activation, layout=layout, state=state)
        pieces.append(laid_out(y, layout))
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(state, x.mT[..., T - state.shape[2] :].float())


@pytest.mark.parametrize("tokens", [1, 9])
def test_gradients_after_a_state(tokens):
    x, short, state = drawn(2, tokens, 3, seed=1), drawn(3, 5, seed=2), drawn(2, 3, 4, seed=3)
    before = state.clone()
    results = []
    for function, dtype, kept in (
        (short_conv, torch.float32, state),
        (reference.short_conv, torch.float64, before.double()),
    ):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, short)]
        y = function(leaves[0], [leaves[1]], state=kept)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for found, exact in zip(*results, strict=True):
        assert relative_error(found, exact) <= 2e-5
    assert torch.equal(state, torch.cat([before, x.mT], dim=2)[..., tokens:])


def test_a_failed_call_leaves_the_state_as_it_was(monkeypatch):
    x, short, state = drawn(1, 4, 2, seed=1), [drawn(2, 3, seed=2)], drawn(1, 2, 2, seed=3)
    before = state.clone()

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "short", fails)
    with pytest.raises(RuntimeError):
        short_conv(x, short, state=state)
    assert torch.equal(state, before)
