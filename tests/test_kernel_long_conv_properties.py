"""The long convolution of every method: linear, of any scale, and what a transform spreads."""

from __future__ import annotations

import pytest
import torch

from chela_bench.bench.check import relative_error, worst_block_error
from chela_bench.kernels.long_conv_factors import Transform
from chela_bench.kernels.short_long_conv import (
    long_conv,
    short_long_conv,
)
from chela_bench.reference import short_long_conv as reference
from tests.attention import DEVICE
from tests.convolutions import (
    ALONE,
    DTYPES,
    LENGTHS,
    ROUNDING,
    WAYS,
    Call,
    all_ways,
    drawn,
    laid_out,
)


@all_ways
def test_impulses_come_out_as_the_kernel_and_sums_as_sums(way):
    T, config = LENGTHS[way], WAYS[way]
    kernel = drawn(1, T, seed=1, scale=T**-0.5)
    noise = drawn(1, T, 1, seed=2)
    impulses = torch.zeros(2, T, 1, device=DEVICE)
    impulses[0, 0], impulses[1, T // 3] = 1, -2
    x = torch.cat([impulses, noise, 3 * noise + impulses[1:]])
    z = long_conv(x, kernel, config=config)[..., 0]
    torch.testing.assert_close(z[0], kernel[0], rtol=0, atol=1e-6)
    late = -2 * kernel[0, : T - T // 3]
    torch.testing.assert_close(z[1, T // 3 :], late, rtol=0, atol=1e-6)
    torch.testing.assert_close(z[3], 3 * z[2] + z[1], rtol=0, atol=2e-5)


@all_ways
@pytest.mark.parametrize("order", ["serial", "parallel"])
def test_the_adjoint_is_the_gradient(way, order):
    """<A x, y> = <x, A^T y> and, of two long kernels, each is its own tap's derivative."""
    x, y = drawn(1, 40, 1, seed=1), drawn(1, 40, 1, seed=2)
    long, future = drawn(1, 40, seed=3), drawn(1, 30, seed=4)
    x, long, future = (tensor.requires_grad_() for tensor in (x, long, future))
    options = {"activation": None, "causal": False, "identity": order == "serial"}
    z = short_long_conv(
        x, [], long, order=order, long_kernel_future=future, config=WAYS[way], **options
    )
    dx, dlong, dfuture = torch.autograd.grad(z, [x, long, future], y)
    products = [(x, dx), (-z, y)], [(long, dlong), (future, dfuture), (-z, y)]
    size = float((z.norm() * y.norm()).detach())
    for pairs in products:
        difference = sum(float((a * b).sum().detach()) for a, b in pairs)
        assert abs(difference) < 1e-6 * size


@all_ways
def test_same_inputs_same_bits_whatever_the_neighbours(way):
    """In float32, too, but for the interpreter, whose products depend on a row's place in a tile"""
    case = {"shape": (3, 40, 2), "dtype": "float16", "gate": "fixed", "way": way}
    call = Call(case)
    first, again = call.run(), call.run()
    assert all(torch.equal(first[name], again[name]) for name in first)
    alone = Call(case)
    alone.tensors["x"], alone.tensors["gate"] = (call.tensors[n][1:2] for n in ("x", "gate"))
    alone.dz = call.dz[1:2]
    found = alone.run()
    assert all(torch.equal(found[name], first[name][1:2]) for name in ("z", "x"))


@all_ways
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scales", [(1e4, 1e-6), (1e-6, 1e4)], ids=str)
def test_any_scale(way, dtype, scales):
    T = 100
    x = (drawn(1, T, 2, seed=1) * scales[0]).to(DTYPES[dtype])
    kernel = drawn(2, T, seed=2, scale=T**-0.5) * scales[1]
    z = long_conv(x, kernel, config=WAYS[way])
    exact = reference.long_conv(x.double(), kernel.double())
    assert worst_block_error(z, exact, row_rms=True) <= ALONE[x.dtype]
    if x.dtype == torch.float32:
        for size in scales:  # 1e8, then 1e-12
            z = long_conv(x * (size / scales[0]), kernel * (size / scales[1]), config=WAYS[way])
            factor = size * size / (scales[0] * scales[1])
            assert worst_block_error(z, exact * factor, row_rms=True) <= 2e-5


@pytest.mark.parametrize("sizes", [(1e31, 1e-3), (1e-33, 1e3), (1e-9, 1.0)], ids=str)
def test_factors_at_the_ends_of_float32(sizes):
    """Squares of rows overflow and vanish; so does a product of x and dz, of which dk is a sum."""
    T = 2048
    x, dz = drawn(2, 2, T, seed=1), drawn(2, 2, T, seed=3)
    kernel = drawn(2, T, seed=2, scale=T**-0.5)
    leaves = (x * sizes[0]).requires_grad_(), (kernel * sizes[1]).requires_grad_()
    z = long_conv(*leaves, layout="bdt", config=WAYS["factors"])
    dx, dk = torch.autograd.grad(z, leaves, dz * 1e-30)
    exact = [y.detach().double().requires_grad_() for y in (x, kernel)]
    right = reference.long_conv(*exact, layout="bdt")
    (right_dk,) = torch.autograd.grad(right, exact[1:], dz.double())
    assert relative_error(z.detach() / sizes[0] / sizes[1], right.detach()) <= 2e-5
    if sizes[0] == 1e31:
        assert relative_error(dk.double() / sizes[0] * 1e30, right_dk) <= 2e-5
    assert dk.isfinite().all() and dx.isfinite().all()


def test_what_is_far_below_the_norm_still_counts_in_it():
    """A norm taken too small would let float16 overflow."""
    T = 8192
    x, kernel = torch.full((1, 1, T), 2.0**-107, device=DEVICE), drawn(1, T, seed=1)
    x[..., 0] = 2.0**-104
    z = long_conv(x, kernel, layout="bdt", config=WAYS["factors"])
    exact = reference.long_conv(x.double(), kernel.double(), layout="bdt")
    assert relative_error(z * 2.0**104, exact * 2.0**104) <= 2e-5


def test_a_scale_for_each_frequency_of_blocks():
    transform = Transform(3, 16, torch.float16, torch.device(DEVICE), exact=False)
    y, scale = transform.there(drawn(2, 2, 3000, seed=1).half())
    each = 2.0 ** torch.arange(12, device=DEVICE).reshape(4, 3).flip(0)
    one, several = torch.empty(2, 2, 2, 3000, device=DEVICE).unbind()
    transform.back(y, scale, None, None, one)
    transform.back(y / each[:, :, None, None, None], scale[:, None] * each, None, None, several)
    assert relative_error(several, one.double()) <= 1e-3


def test_weights_of_a_large_batch():
    """More rows than one step of the kernel that weighs them, one of them far above the rest."""
    T, B = 1030, 70
    x, dz = drawn(B, 1, T, seed=1), drawn(B, 1, T, seed=3)
    x[66] *= 1e3
    kernel = drawn(1, T, seed=2, scale=T**-0.5).requires_grad_()
    z = long_conv(x, kernel, layout="bdt", config=WAYS["factors"])
    (dk,) = torch.autograd.grad(z, kernel, dz)
    exact = kernel.detach().double().requires_grad_()
    right = reference.long_conv(x.double(), exact, layout="bdt")
    (right_dk,) = torch.autograd.grad(right, exact, dz.double())
    assert relative_error(dk, right_dk) <= 2e-5


@all_ways
def test_an_outlier_leaks_little_into_its_past(way):
    """An error is relative to rms(z) of the whole row, and a transform spreads it over the row."""
    T, t = LENGTHS[way], LENGTHS[way] * 2 // 3
    x, kernel = drawn(1, T, 1, seed=1).half(), drawn(1, T, seed=2, scale=T**-0.5).half()
    x[0, t] = 1e4
    z = long_conv(x, kernel, config=WAYS[way])
    leak = (z - reference.long_conv(x.double(), kernel.double()))[:, :t]
    size = 1e4 * float(kernel.float().norm()) / T**0.5
    assert float(leak.square().mean().sqrt()) <= 1e-3 * size
    assert float(leak.abs().max()) <= 4e-3 * size


@all_ways
@pytest.mark.parametrize("order", ["serial", "parallel"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_no_number_spoils_its_own_row_alone(way, order):
    x, short, long = drawn(2, 20, 2, seed=1), [drawn(2, 3, seed=2)], drawn(2, 20, seed=3)
    clean = short_long_conv(x, short, long, order=order, config=WAYS[way])
    for number in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[1, 7, 1] = number
        z = short_long_conv(spoiled, short, long, order=order, config=WAYS[way])
        assert z[1, 7:, 1].isnan().all()
        z[1, :, 1] = clean[1, :, 1]
        assert torch.equal(z, clean)


@all_ways
@pytest.mark.parametrize("layout", ["btd", "bdt"])
def test_exact_head(way, layout):
    """The first tokens are small, and so is their output: a transform's error is not."""
    T, config = LENGTHS[way], WAYS[way]
    x = drawn(1, T, 1, seed=1).half()
    x[:, :70] *= 2.0**-9
    kernel = drawn(1, T, seed=2, scale=T**-0.5).half()
    gate = drawn(1, T, 1, seed=3).half()
    options = {"gate": laid_out(gate, layout), "layout": layout, "config": config}
    plain = laid_out(long_conv(laid_out(x, layout), kernel, **options), layout)
    exact = reference.long_conv(x.double(), kernel.double(), gate=gate.double())

    def head_error(z):
        return worst_block_error(z[:, :64], exact[:, :64])

    assert way == "direct" or head_error(plain) > 2e-2
    for head in (64, T + 5):
        z = long_conv(laid_out(x, layout), kernel, exact_head=head, **options)
        z = laid_out(z, layout)
        assert head_error(z) <= 1e-3 + ROUNDING[torch.float16]
        assert torch.equal(z[:, head:], plain[:, head:])
