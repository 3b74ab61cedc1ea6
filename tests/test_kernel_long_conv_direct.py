"""The direct convolution of short sequences against its sum in float64.

Errors are a row's (b, d) in blocks of 64 tokens, against the row's rms, and budgets are twice what
roundings come to: taps to 11 bits where operands are float16, the output to its dtype, which the
interpreter truncates to bfloat16 instead. Sums in float32 add about 1e-7.
"""

import pytest
import torch
import torch.nn.functional as F

from chela_bench.bench.check import worst_block_error
from chela_bench.kernels.long_conv_direct import direct_forward, direct_taps_gradient
from tests.attention import DEVICE, new_memory_is_nan

# Of a block, against its row. bfloat16 output alone rounds by up to 2^-8 of itself: 3.3e-3 measured
# in blocks that are larger than their row is on the whole.
BUDGET = {torch.float32: 2e-5, torch.float16: 8e-4, torch.bfloat16: 2.0**-8}
CASES = [  # B, D, T, N, dtype, layouts of x, gate and z, gated, reverse
    (1, 1, 1, 1, "float32", "btd btd btd", False, False),
    (3, 3, 1, 8, "bfloat16", "bdt bdt btd", True, True),
    (1, 20, 2, 5, "float16", "btd bdt btd", True, False),
    (3, 3, 3, 3, "float32", "bdt btd bdt", True, True),
    (33, 1, 3, 10, "float16", "btd btd bdt", False, False),
    (1, 20, 63, 5, "bfloat16", "btd btd btd", False, False),
    (3, 20, 64, 64, "float16", "btd btd btd", True, True),
    (3, 20, 64, 71, "float32", "bdt bdt bdt", False, False),
    (9, 3, 64, 64, "bfloat16", "bdt bdt bdt", True, False),
    (3, 3, 100, 107, "float16", "sliced btd sliced", True, False),
    (1, 20, 100, 100, "bfloat16", "bdt sliced btd", True, True),
    (3, 24, 128, 33, "float16", "btd btd btd", False, True),
    (3, 3, 257, 257, "bfloat16", "btd btd btd", False, False),
    (1, 3, 257, 34, "float32", "sliced bdt btd", True, True),
    (3, 3, 512, 512, "float16", "bdt bdt btd", False, True),
    (1, 20, 512, 519, "bfloat16", "btd btd btd", True, False),
    (1, 1, 512, 1, "float32", "btd btd bdt", False, True),
    (1, 3, 800, 800, "float16", "btd btd bdt", True, False),
    (3, 1, 800, 5, "float32", "bdt bdt btd", False, False),
    (1, 3, 800, 807, "bfloat16", "bdt bdt btd", True, True),
    (1, 1, 1601, 700, "float32", "btd btd btd", False, False),
    (1, 1, 1601, 1601, "float16", "btd btd btd", False, True),
]
cases = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "B{}-D{}-T{}-N{}-{}-{}-gate{:d}-reverse{:d}".format(*c)
)


def budget(dtype):
    interpreted = DEVICE == "cpu" and dtype == torch.bfloat16
    return 2.0**-7 if interpreted else BUDGET[dtype]  # truncation


def laid_out(x, layout):
    """x [B, D, T], in memory as its layout says."""
    if layout == "btd":
        return x.mT.contiguous().mT
    if layout == "sliced":  # no axis of stride 1
        B, D, T = x.shape
        whole = x.new_zeros(B, T + 3, D + 1, 2)
        whole[:, 2 : T + 2, 1:, 1] = x.mT
        return whole[:, 2 : T + 2, 1:, 1].mT
    return x.contiguous()


def inputs(B, D, T, N, dtype, layouts="btd btd btd", gated=False, reverse=False, *, seed=0):
    generator = torch.Generator().manual_seed(1000 * T + N + seed)
    x, gate = torch.randn(2, B, D, T, generator=generator).to(DEVICE, getattr(torch, dtype))
    taps = torch.randn(D, N, generator=generator).to(DEVICE) / N**0.5
    layout_x, layout_g, _ = layouts.split()
    return laid_out(x, layout_x), taps, laid_out(gate, layout_g) if gated else None


def convolve(x, taps, gate=None, *, reverse=False):
    """The sum in float64, of autograd's kind."""
    if reverse:
        x = x if gate is None else x.double() * gate.double()
        return convolve(x.flip(-1), taps).flip(-1)
    x, taps = x.double(), taps.double()
    D, T = x.shape[1:]
    weight = taps[:, :T].flip(-1)[:, None]
    z = F.conv1d(F.pad(x, (weight.shape[-1] - 1, 0)), weight, groups=D)
    return z if gate is None else z * gate.double()


def run(x, taps, gate=None, *, reverse=False, layout="btd", dtype=None):
    B, D, T = x.shape
    z = torch.full((B, D, T), float("nan"), dtype=dtype or x.dtype, device=x.device)
    z = laid_out(z, layout)
    with new_memory_is_nan():
        direct_forward(x, taps, z, gate=gate, reverse=reverse)
    return z


def gradient(x, dz, gate=None, *, taps):
    with new_memory_is_nan():
        return direct_taps_gradient(x, dz, gate=gate, taps=taps)


def exact_gradient(x, dz, gate, N):
    D = x.shape[1]
    taps = torch.zeros(D, N, dtype=torch.float64, device=x.device, requires_grad=True)
    (convolve(x, taps, gate) * dz.double()).sum().backward()
    return taps.grad


def error(actual, exact):
    """[B, D, T], or [D, taps]."""
    if actual.ndim == 2:
        actual, exact = actual[None], exact[None]
    return worst_block_error(actual.mT, exact.mT, row_rms=True)


@cases
def test_matches_the_sum(case):
    *_, layouts, _, reverse = case
    x, taps, gate = inputs(*case)
    z = run(x, taps, gate, reverse=reverse, layout=layouts.split()[2])
    assert error(z, convolve(x, taps, gate, reverse=reverse)) <= budget(z.dtype)


@pytest.mark.parametrize("case", [CASES[i] for i in (5, 8, 10, 15)], ids=lambda c: f"T{c[2]}")
def test_bfloat16_operands_lose_nothing_but_the_taps_rounding(case):
    x, taps, gate = inputs(*case)
    z = run(x, taps, gate, reverse=case[-1], dtype=torch.float32)
    assert error(z, convolve(x, taps, gate, reverse=case[-1])) <= 8e-4


@pytest.mark.parametrize("case", CASES[1::2], ids=lambda c: "B{}-D{}-T{}-N{}-{}-{}".format(*c))
def test_gradient_of_the_taps(case):
    B, D, T, N, dtype, layouts, *_ = case
    x, _, gate = inputs(*case)
    dz = laid_out(inputs(B, D, T, N, dtype, seed=1)[0], layouts.split()[2])
    dk = gradient(x, dz, gate, taps=N)
    exact = exact_gradient(x, dz, gate, N)
    assert dk.shape == (D, N) and dk.dtype == torch.float32
    assert error(dk, exact) <= BUDGET[x.dtype]


@pytest.mark.parametrize("gated", [False, True], ids=["", "gate"])
def test_adjoint_identities(gated):
    x, taps, gate = inputs(2, 5, 90, 70, "float32", gated=gated)
    dz = inputs(2, 5, 90, 70, "float32", seed=1)[0]
    z = run(x, taps, gate).double()
    dx = run(dz, taps, gate, reverse=True).double()
    dk = gradient(x, dz, gate, taps=70).double()
    wanted = (dz.double() * z).sum()
    scale = dz.double().norm() * z.norm()
    assert abs((dx * x.double()).sum() - wanted) <= 1e-5 * scale
    assert abs((dk * taps.double()).sum() - wanted) <= 1e-5 * scale


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("size_x", "size_k"), [(1e4, 1e4), (1e-6, 1e4), (1e4, 1e-6), (1e-6, 1e-6)])
def test_large_and_small_numbers(dtype, size_x, size_k):
    """float16 x is no smaller than 1e-2, and dz no larger than 6e4: what it can hold."""
    if dtype == "float16":
        size_x = max(size_x, 1e-2)
    x, taps, _ = inputs(2, 3, 70, 70, "float32")
    x, taps = (x * size_x).to(getattr(torch, dtype)), taps * size_k
    x[1] /= 64  # rows have scales of their own
    taps[2] *= 1e-3
    z = run(x, taps, dtype=torch.float32)
    assert error(z, convolve(x, taps)) <= (2e-5 if dtype == "float32" else 8e-4)
    dz = (inputs(2, 3, 70, 70, "float32", seed=1)[0] * size_k).clamp(-6e4, 6e4).to(x.dtype)
    dk = gradient(x, dz, taps=70)
    assert error(dk, exact_gradient(x, dz, None, 70)) <= (2e-5 if dtype == "float32" else 8e-4)


def test_gradient_of_rows_whose_sizes_are_opposite():
    """Each row's product counts alike, though one's x, and the other's dz, is 1e10 times less."""
    x, _, _ = inputs(2, 3, 70, 70, "bfloat16")
    dz, _, _ = inputs(2, 3, 70, 70, "bfloat16", seed=1)
    x[0], x[1], dz[0], dz[1] = x[0] * 1e5, x[1] * 1e-5, dz[0] * 1e-5, dz[1] * 1e5
    assert error(gradient(x, dz, taps=70), exact_gradient(x, dz, None, 70)) <= 8e-4


@pytest.mark.parametrize("largest", [3e38, 1e-37, 0.0])
def test_the_ends_of_bfloat16(largest):
    x = torch.full((2, 3, 40), largest, dtype=torch.bfloat16, device=DEVICE)
    x[1] = 1.0
    taps = torch.full((3, 1), 0.5, device=DEVICE)
    assert torch.equal(run(x, taps, dtype=torch.float32), x.float() / 2)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("T", "dtype"), [(40, "float16"), (40, "float32"), (600, "float16")])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_what_is_not_finite_stays_in_its_row(bad, T, dtype, reverse):
    x, taps, _ = inputs(2, 3, T, 40, dtype)
    clean = run(x, taps, reverse=reverse)
    x[1, 2, T // 2] = bad
    z = run(x, taps, reverse=reverse)
    rest = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    rest[1, 2] = False
    assert torch.equal(z[rest], clean[rest])
    assert z[1, 2, T // 2].isnan()
    dk = gradient(x, clean, taps=40)
    assert dk[:2].isfinite().all() and not dk[2].isfinite().all()
    taps[0, 0] = bad
    z = run(x, taps, reverse=reverse)
    assert not z[:, 0].isfinite().any()
    assert torch.equal(z[:, 1], clean[:, 1])


@pytest.mark.parametrize(("B", "D", "T"), [(35, 2, 20), (5, 18, 70), (2, 2, 600)])
def test_rows_and_channels_are_independent(B, D, T):
    x, taps, gate = inputs(B, D, T, T, "float16", gated=True)
    z = run(x, taps, gate)
    assert torch.equal(run(x, taps, gate), z)
    one = run(x[-1:, 1:2], taps[1:2], gate[-1:, 1:2], layout="bdt")
    assert torch.equal(one, z[-1:, 1:2])
    dk = gradient(x, z, gate, taps=T)
    assert torch.equal(gradient(x, z, gate, taps=T), dk)


def test_taps_beyond_the_sequence_are_not_read():
    x, taps, _ = inputs(1, 3, 50, 50, "float16")
    more = torch.cat([taps, taps.new_full((3, 9), float("nan"))], dim=1)
    assert torch.equal(run(x, more), run(x, taps))
    dk = gradient(x, x, taps=59)
    assert torch.equal(dk[:, 50:], torch.zeros_like(dk[:, 50:]))


def test_taps_of_any_strides():
    x, taps, _ = inputs(2, 3, 50, 40, "float32")
    assert torch.equal(run(x, taps.T.contiguous().T), run(x, taps))


def test_writes_nothing_but_z():
    x, taps, _ = inputs(2, 5, 50, 40, "float32")
    whole = torch.zeros(3, 60, 9, device=DEVICE)
    z = whole[1:, 4:54, 2:7].mT
    direct_forward(x, taps, z)
    assert error(z, convolve(x, taps)) <= 2e-5
    z.zero_()
    assert not whole.any()


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_to_do(shape):
    x = torch.empty(shape, device=DEVICE)
    taps = torch.ones(shape[1], 4, device=DEVICE)
    direct_forward(x, taps, torch.empty_like(x))
    dk = direct_taps_gradient(x, x, taps=4)
    assert torch.equal(dk, torch.zeros(shape[1], 4, device=DEVICE))
