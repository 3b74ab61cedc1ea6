"""Short kernels added up to one, and to a long one: values, gradients and what they merge to."""

from __future__ import annotations

import pytest
import torch

from chela_bench.bench.check import relative_error
from chela_bench.kernels import short_long_conv as module
from chela_bench.kernels.reparameterization import added
from chela_bench.kernels.short_long_conv import (
    reparameterize,
    reparameterize_two_sided,
    short_long_conv,
)
from chela_bench.reference import short_long_conv as reference
from tests.attention import DEVICE, new_memory_is_nan
from tests.convolutions import (
    drawn,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def added_up(kernels, identity, causal, D):
    """What `_merged` returns, by PyTorch's own operators."""
    W = max([1, *[kernel.shape[1] for kernel in kernels]])
    ahead = 0 if causal else W // 2
    total = torch.zeros(D, W, device=DEVICE)
    for kernel in kernels:
        before = 0 if causal else (W - kernel.shape[1]) // 2
        after = W - kernel.shape[1] - before
        total = total + torch.nn.functional.pad(kernel.float(), (before, after))
    return total + torch.eye(W, device=DEVICE)[ahead] if identity else total, ahead


def strided(kernel, i):
    """The same kernel in one of four layouts, inside of memory that is NaN."""
    D, W = kernel.shape
    around = kernel.new_full((2 * D + 1, 2 * W + 1), torch.nan)
    tap_major = kernel.new_full((2 * W + 1, D + 3), torch.nan)
    view = (around[:D, :W], around[1::2, 1::2], tap_major[:W, 3:].mT, tap_major[1::2, :D].mT)[i % 4]
    view.copy_(kernel)
    return view


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize("identity", [True, False], ids=["identity", "bare"])
@pytest.mark.parametrize(
    ("D", "widths"),
    [
        (3, ()), (1, (1,)), (33, (9,)), (64, (3, 17)), (2, (5, 1, 5)), (1, (1, 1, 1, 1)),
        (40, (3, 1, 9, 5)), (3, (3, 7, 1, 5, 3)), (2, (3, 1, 1, 5, 3, 3, 11)), (0, (3, 5)),
    ],
    ids=str,
)  # fmt: skip
def test_short_kernels_are_added_up_with_their_gradients(D, widths, identity, causal):
    if not widths and not identity:
        pytest.skip("nothing to merge")
    kernels = [
        strided(drawn(D, width, seed=i).to(FLOATS[i % 3]), i).requires_grad_()
        for i, width in enumerate(widths)
    ]
    x = drawn(1, D, 1, seed=20)
    with new_memory_is_nan():
        taps, ahead = module._merged(kernels, identity, causal, D, x)
    exact, exact_ahead = added_up(kernels, identity, causal, D)
    assert torch.equal(taps, exact)
    assert ahead == exact_ahead
    assert taps.mT.is_contiguous()
    if not kernels:
        return
    for around in (drawn(D, 2 * taps.shape[1], seed=21), drawn(2 * taps.shape[1], D, seed=21).mT):
        dtaps = around[:, ::2]
        found = torch.autograd.grad(taps, kernels, dtaps, retain_graph=True)
        wanted = torch.autograd.grad(exact, kernels, dtaps, retain_graph=True)
        for one, other, kernel in zip(found, wanted, kernels, strict=True):
            assert one.dtype == kernel.dtype
            assert torch.equal(one, other)


def test_gradients_of_two_kernels_share_no_memory():
    kernels = [drawn(3, 1, seed=i).requires_grad_() for i in range(2)]
    for _ in range(2):  # the second time, .grad is added to in place
        taps, _ = module._merged(kernels, True, True, 3, kernels[0])
        taps.backward(torch.ones_like(taps))
    assert all(torch.equal(kernel.grad, torch.full_like(kernel, 2)) for kernel in kernels)


def test_a_kernel_that_is_merged_is_taken_as_it_is():
    kernels = [drawn(3, 5, seed=1), drawn(3, 2, seed=2)]
    merged, _ = reparameterize(kernels, kernels[0], order="serial")
    assert module._merged([merged], False, True, 3, merged)[0] is merged
    assert module._merged([merged], True, True, 3, merged)[0] is not merged


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("taps", [None, 7, 4, 2, 0])
def test_first_taps_are_added_to_a_long_kernel(taps, dtype):
    long = drawn(3, 6, seed=1).to(dtype).requires_grad_()
    for width in (4, 6, 9):
        first = drawn(width, 3, seed=2).mT.requires_grad_()
        total = added(long, first, taps)
        exact = added_up([long, first], False, True, 3)[0][:, :taps]
        assert total.dtype == torch.float32
        assert torch.equal(total, exact)
        dtotal = drawn(*exact.shape, seed=3)
        found = torch.autograd.grad(total, [long, first], dtotal)
        wanted = torch.autograd.grad(exact, [long, first], dtotal)
        assert [x.dtype for x in found] == [dtype, torch.float32]
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("order", ["serial", "parallel"])
@pytest.mark.parametrize("widths", [(), (1,), (3, 7), (30, 2)], ids=str)
@pytest.mark.parametrize("identity", [True, False], ids=["identity", "bare"])
def test_merged_equals_unmerged(order, widths, identity):
    if order == "serial" and not widths and not identity:
        pytest.skip("nothing to merge: an error, tested below")
    x, long = drawn(1, 20, 2, seed=1), drawn(2, 15, seed=2)
    short = [drawn(2, width, seed=3 + i) for i, width in enumerate(widths)]
    z = short_long_conv(x, short, long, order=order, identity=identity)
    merged, long_merged = reparameterize(short, long, order=order, identity=identity)
    exact = reference.reparameterize(short, long, order=order, identity=identity)
    for found, wanted in zip((merged, long_merged), exact, strict=True):
        assert found is wanted is None or torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
    kernels = [] if merged is None else [merged]
    again = short_long_conv(x, kernels, long_merged, identity=False, order=order)
    assert relative_error(again, z.double()) <= 2e-5


@pytest.mark.parametrize("order", ["serial", "parallel"])
@pytest.mark.parametrize(
    ("widths", "identity"), [((), True), ((3, 1, 7), True), ((5, 3), False), ((), False)]
)
def test_reparameterized_pairs_give_the_same_output(widths, identity, order):
    if order == "serial" and not widths and not identity:
        return  # nothing reaches the long kernels
    x, long, future = drawn(1, 20, 2, seed=1), drawn(2, 15, seed=2), drawn(2, 2, seed=3)
    short = [drawn(2, width, seed=4 + i) for i, width in enumerate(widths)]
    exact = reference.short_long_conv(
        x.double(), short, long, order=order, identity=identity, causal=False,
        long_kernel_future=future,
    )  # fmt: skip
    merged, past, ahead = reparameterize_two_sided(
        short, long, future, order=order, identity=identity
    )
    assert (merged is None) == (order == "parallel")
    z = short_long_conv(
        x, [] if merged is None else [merged], past, order=order, identity=False, causal=False,
        long_kernel_future=ahead,
    )  # fmt: skip
    assert relative_error(z, exact) <= 2e-5
