"""reference/short_long_conv.py against double loops, against itself merged, by FFT and by sums."""

import math

import pytest
import torch

from chela_bench.errors import ArgumentError
from chela_bench.reference.short_long_conv import (
    default_short_sizes,
    kernel_spectrum,
    long_conv,
    reparameterize,
    short_conv,
    short_long_conv,
)

ORDERS = pytest.mark.parametrize("order", ["serial", "parallel"])
METHODS = pytest.mark.parametrize("method", ["fft", "direct"])


def randn(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype)


def kernels(D, *widths):
    return [randn(D, width) for width in widths]


def distance(actual, exact):
    """||actual - exact|| / ||exact||: an FFT's error is normwise."""
    return float((actual - exact).norm() / exact.norm())


def summed(x, taps, *, ahead=0):
    """z[b, t, d] = sum_n taps[d, n] x[b, t - n + ahead, d], by a double loop over t and n."""
    z, T = torch.zeros_like(x), x.shape[1]
    for t in range(T):
        for n in range(taps.shape[1]):
            if 0 <= t - n + ahead < T:
                z[:, t] += taps[:, n] * x[:, t - n + ahead]
    return z


def defined(x, short, long, *, order, activation, identity, future=None):
    """short_long_conv by double loops; two-sided if `future` is given."""

    def narrow(u):
        ahead = [0 if future is None else kernel.shape[1] // 2 for kernel in short]
        branches = [summed(u, kernel, ahead=a) for kernel, a in zip(short, ahead, strict=True)]
        return sum(branches, u if identity else torch.zeros_like(u))

    def wide(u):
        z = summed(u, long)
        if future is not None:
            for t in range(u.shape[1]):
                for s in range(1, min(future.shape[1], u.shape[1] - 1 - t) + 1):
                    z[:, t] += future[:, s - 1] * u[:, t + s]
        return z

    if order == "parallel":
        return narrow(x) + wide(x)
    h = narrow(x)
    return wide(torch.nn.functional.silu(h) if activation else h)


@ORDERS
@METHODS
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("identity", [True, False], ids=["identity", "bare"])
@pytest.mark.parametrize("T_long", [1, 4, 9, 20])
def test_matches_double_loops(order, method, activation, identity, T_long):
    x, short, long = randn(2, 9, 3), kernels(3, 3, 4), randn(3, T_long)
    options = {"order": order, "activation": activation, "identity": identity}
    z = short_long_conv(x, short, long, method=method, **options)
    assert distance(z, defined(x, short, long, **options)) < 1e-14


@ORDERS
@METHODS
@pytest.mark.parametrize("T_future", [1, 8, 20])
def test_two_sided_matches_double_loops(order, method, T_future):
    x, short, long, future = randn(2, 9, 3), kernels(3, 3, 5), randn(3, 9), randn(3, T_future)
    z = short_long_conv(
        x, short, long, order=order, causal=False, long_kernel_future=future, method=method
    )
    exact = defined(x, short, long, order=order, activation="silu", identity=True, future=future)
    assert distance(z, exact) < 1e-14


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
def test_serial_is_a_short_and_a_long_convolution(causal):
    x, short, long = randn(2, 9, 3), kernels(3, 3, 5), randn(3, 9)
    two = {"causal": causal, "long_kernel_future": None if causal else randn(3, 8)}
    h = short_conv(x, short, causal=causal)
    z = short_long_conv(h, [], long, order="parallel", identity=False, **two)
    assert torch.equal(z, short_long_conv(x, short, long, **two))


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("T_long", [1, 64, 1500])
def test_fft_and_direct_agree(T, T_long):
    x, long = randn(2, T, 3), randn(3, T_long)
    assert distance(long_conv(x, long), long_conv(x, long, method="direct")) < 1e-13


@ORDERS
@METHODS
@pytest.mark.parametrize("T_long", [2, 100, 300])
@pytest.mark.parametrize("widths", [(), (1,), (3, 7), (7, 2, 3)], ids=str)
@pytest.mark.parametrize("identity", [True, False], ids=["identity", "bare"])
def test_merged_equals_unmerged(order, method, T_long, widths, identity):
    if order == "serial" and not widths and not identity:
        pytest.skip("nothing to merge: an error, tested below")
    x, short, long = randn(2, 100, 3), kernels(3, *widths), randn(3, T_long)
    options = {"order": order, "method": method}
    z = short_long_conv(x, short, long, identity=identity, **options)
    short_merged, long_merged = reparameterize(short, long, order=order, identity=identity)
    assert (short_merged is None) == (order == "parallel")
    merged = [] if short_merged is None else [short_merged]
    assert distance(short_long_conv(x, merged, long_merged, identity=False, **options), z) < 1e-12


def test_a_merged_serial_kernel_is_one_kernel_as_wide_as_the_widest():
    short, long = kernels(2, 3, 5), randn(2, 8)
    merged, same = reparameterize(short, long, order="serial")
    expected = short[1].clone()
    expected[:, :3] += short[0]
    expected[:, 0] += 1
    torch.testing.assert_close(merged, expected, rtol=1e-15, atol=1e-15)
    assert torch.equal(same, long)


@ORDERS
@METHODS
@pytest.mark.parametrize("t", [0, 1, 64, 99])
def test_the_past_is_blind_to_the_future(order, method, t):
    x, short, long = randn(1, 100, 3), kernels(3, 3, 5), randn(3, 100)
    z = short_long_conv(x, short, long, order=order, method=method)
    x[:, t:] += randn(1, 100 - t, 3)
    changed = short_long_conv(x, short, long, order=order, method=method)
    leak = (z - changed)[:, :t].abs().max() if t else torch.tensor(0.0)
    assert leak <= (1e-12 if method == "fft" else 0)
    assert not torch.allclose(z[:, t], changed[:, t])


def test_layouts_and_gate():
    x, short, long, gate = randn(2, 30, 3), kernels(3, 3), randn(3, 30), randn(2, 30, 3) + 1
    z = short_long_conv(x, short, long)
    gated = short_long_conv(x, short, long, gate=gate)
    torch.testing.assert_close(gated, z * gate, rtol=1e-15, atol=0)
    other = short_long_conv(x.mT, short, long, gate=gate.mT, layout="bdt")
    assert torch.equal(other.mT, gated)
    assert torch.equal(short_conv(x.mT, short, layout="bdt").mT, short_conv(x, short))


def test_a_spectrum_replaces_the_kernels_transform():
    x, short, long = randn(2, 30, 3), kernels(3, 3), randn(3, 50)
    spectrum = kernel_spectrum(long, 30)
    assert torch.equal(long_conv(x, long, spectrum=spectrum), long_conv(x, long))
    z = short_long_conv(x, short, long, spectrum=spectrum)
    assert torch.equal(z, short_long_conv(x, short, long))


def test_rejects_a_spectrum_of_another_call():
    x, long = randn(2, 30, 3), randn(3, 50)
    for other in [
        kernel_spectrum(long, 31),  # of the same padded length
        kernel_spectrum(long[:2], 30),
        kernel_spectrum(long.float(), 30),
    ]:
        with pytest.raises(ArgumentError, match="make it with kernel_spectrum"):
            long_conv(x, long, spectrum=other)
    with pytest.raises(ArgumentError, match="takes no spectrum"):
        long_conv(x, long, spectrum=kernel_spectrum(long, 30), method="direct")


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("widths", [(1,), (3, 6)], ids=str)
@pytest.mark.parametrize("layout", ["btd", "bdt"])
def test_streaming_equals_the_whole(activation, widths, layout):
    x, short = randn(2, 40, 3), kernels(3, *widths)
    whole = short_conv(x, short, activation=activation)
    state = torch.zeros(2, 3, max(widths) - 1, dtype=x.dtype)
    pieces = []
    for start, end in [(0, 1), (1, 3), (3, 3), (3, 20), (20, 40)]:
        piece = x[:, start:end].mT if layout == "bdt" else x[:, start:end]
        y = short_conv(piece, short, activation=activation, layout=layout, state=state)
        pieces.append(y.mT if layout == "bdt" else y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-14, atol=1e-14)
    assert torch.equal(state, x.mT[..., 40 - state.shape[-1] :])


@ORDERS
@METHODS
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
def test_gradients(order, method, causal):
    x, short, long, gate = randn(1, 5, 2), kernels(2, 3), randn(2, 4), randn(1, 5, 2)
    future = None if causal else randn(2, 3)
    tensors = [x, *short, long, gate] + ([] if causal else [future])

    def call(x, short, long, gate, future=None):
        return short_long_conv(
            x,
            [short],
            long,
            order=order,
            gate=gate,
            causal=causal,
            long_kernel_future=future,
            method=method,
        )

    tensors = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@METHODS
def test_no_tokens_give_no_output(method):
    x, short, long = randn(2, 0, 3), kernels(3, 3), randn(3, 8)
    assert short_long_conv(x, short, long, method=method).shape == (2, 0, 3)
    future = {"causal": False, "long_kernel_future": randn(3, 8)}
    assert short_long_conv(x, short, long, method=method, **future).shape == (2, 0, 3)


@METHODS
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)])
def test_no_tokens_give_gradients_of_zero(method, shape):
    """Not none at all: processes that train together wait for each other's gradients."""
    x, short, long, future = randn(*shape), kernels(3, 3), randn(3, 8), randn(3, 8)
    leaves = [leaf.requires_grad_() for leaf in (x, *short, long, future)]
    z = short_long_conv(x, short, long, causal=False, long_kernel_future=future, method=method)
    assert not any(g.any() for g in torch.autograd.grad(z.sum(), leaves))


def test_the_dtype_rule():
    x, short, long = randn(1, 9, 2).bfloat16(), [randn(2, 3).float()], randn(2, 9).half()
    assert short_long_conv(x, short, long).dtype == torch.float32
    assert short_long_conv(x, short, long.double()).dtype == torch.float64
    assert short_conv(x, short).dtype == torch.float32


def test_default_short_sizes():
    assert default_short_sizes(1) == (3, 1)
    assert default_short_sizes(1024) == (3, 7)
    assert default_short_sizes(65536) == (3, 11)
    for length in (0, -1, -math.inf):
        with pytest.raises(ArgumentError, match="max_length"):
            default_short_sizes(length)


def test_rejects_what_does_not_fit():
    x, short, long = randn(2, 9, 3), kernels(3, 3), randn(3, 9)
    for match, bad in {
        "no order": lambda: short_long_conv(x, short, long, order="both"),
        "no activation": lambda: short_long_conv(x, short, long, activation="relu"),
        "no layout": lambda: short_long_conv(x, short, long, layout="tbd"),
        "no method": lambda: short_long_conv(x, short, long, method="slow"),
        "wanted x": lambda: short_long_conv(x[0], short, long),
        "short kernels .* at 1": lambda: short_long_conv(x, [*short, randn(2, 3)], long),
        "wanted long_kernel": lambda: short_long_conv(x, short, long[:2]),
        "wanted gate": lambda: short_long_conv(x, short, long, gate=x[:1]),
        "the half that": lambda: short_long_conv(x, short, long, causal=False),
        "no place": lambda: short_long_conv(x, short, long, long_kernel_future=long),
        "odd": lambda: short_long_conv(
            x, kernels(3, 4), long, causal=False, long_kernel_future=long
        ),
        "nothing reaches": lambda: short_long_conv(x, [], long, identity=False),
        "no short kernel": lambda: short_conv(x, [], identity=False),
        "wanted state": lambda: short_conv(x, short, state=torch.zeros(2, 3, 3)),
        "a state of those before": lambda: short_conv(
            x, short, state=torch.zeros(2, 3, 2), causal=False
        ),
        "wanted kernel": lambda: kernel_spectrum(long[0], 9),
        "identity=False": lambda: reparameterize([], long, order="serial", identity=False),
        "no order '": lambda: reparameterize(short, long, order="both"),
        "at 0": lambda: reparameterize([randn(2, 3)], long, order="serial"),
    }.items():
        with pytest.raises(ArgumentError, match=match):
            bad()
