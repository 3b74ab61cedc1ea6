"""kernels/short_conv.py against the float64 reference, in every layout.

A row of an output rounds once, to its dtype, so ||error|| <= EPS * ||row||; float32 sums of at most
64 taps add 64 * 2^-24. A channel's dweight is a float32 sum over all tokens: twice that.
"""

import pytest
import torch
import torch.nn.functional as F

import chela_bench.kernels.short_conv as kernels
from chela_bench.kernels import transposed_product
from chela_bench.kernels.short_conv import short_backward, short_forward
from chela_bench.kernels.transposed_product import transpose_gate, transpose_gate_backward
from chela_bench.reference.short_long_conv import _direct, short_conv
from tests.attention import DEVICE, EPS, new_memory_is_nan

SUMS = 4e-6
ROUNDING = EPS if DEVICE == "cuda" else EPS | {torch.bfloat16: 2.0**-7}  # the interpreter truncates
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
LAYOUTS = ("bdt", "btd", "sliced", "strided")
CASES = [  # B, D, T, W, ahead, activation, layouts of x, y and dy, dx, dtype
    (1, 1, 1, 1, 0, True, "bdt", "btd", "bdt", F32),
    (3, 3, 2, 3, 0, True, "btd", "bdt", "btd", F16),
    (1, 64, 3, 9, 4, True, "btd", "btd", "btd", BF16),
    (1, 3, 63, 12, 0, True, "btd", "btd", "bdt", BF16),
    (1, 100, 64, 12, 0, True, "btd", "bdt", "btd", BF16),
    (1, 64, 64, 9, 4, True, "bdt", "btd", "bdt", F16),
    (3, 3, 100, 2, 0, True, "bdt", "bdt", "bdt", F32),
    (1, 100, 33, 3, 1, True, "bdt", "btd", "btd", BF16),
    (1, 3, 1000, 2, 0, False, "bdt", "bdt", "bdt", F32),
    (1, 1, 200, 3, 1, True, "btd", "bdt", "btd", F16),
    (1, 3, 50, 16, 0, True, "bdt", "btd", "btd", F32),
    (1, 64, 72, 15, 7, True, "btd", "btd", "bdt", BF16),
    (1, 3, 63, 33, 16, True, "btd", "bdt", "btd", F32),
    (1, 64, 64, 33, 0, False, "bdt", "btd", "bdt", BF16),
    (3, 3, 3, 64, 0, True, "bdt", "bdt", "bdt", F32),
    (1, 3, 40, 64, 0, True, "btd", "btd", "btd", F16),
    (1, 3, 50, 17, 8, False, "btd", "btd", "btd", F32),
    (3, 64, 64, 1, 0, True, "btd", "bdt", "btd", BF16),
    (1, 3, 65, 9, 0, True, "sliced", "strided", "sliced", F32),
    (1, 3, 40, 12, 0, True, "strided", "sliced", "strided", BF16),
    (1, 3, 33, 33, 0, True, "sliced", "bdt", "strided", F16),
]


def ids(case):
    names = [f"{name}{size}" for name, size in zip("BDTWA", case, strict=False)]
    rest = ["silu" if case[5] else "linear", *case[6:9], str(case[9]).removeprefix("torch.")]
    return "-".join(names + rest)


def randn(*shape, seed=0, dtype=F32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def laid(values, layout):
    """A view [B, D, T] with these values, and the memory around it, which is NaN."""
    B, D, T = values.shape
    if layout == "bdt":
        around = values.new_empty(B, D, T)
        view = around
    elif layout == "btd":
        around = values.new_empty(B, T, D)
        view = around.mT
    elif layout == "sliced":  # D is contiguous, and nothing is aligned
        around = values.new_empty(B, 2 * T, D + 3)
        view = around[:, ::2, 1 : D + 1].mT
    else:
        around = values.new_empty(B, D, 2 * T)
        view = around[..., ::2]
    around.fill_(torch.nan)
    view.copy_(values)
    return view, around


def blank(shape, layout, dtype):
    return laid(torch.full(shape, torch.nan, device=DEVICE, dtype=dtype), layout)


def case_inputs(case):
    B, D, T, W, *_, x_layout, y_layout, _, dtype = case
    x, _ = laid(randn(B, D, T, seed=T + W, dtype=dtype), x_layout)
    dy, _ = laid(randn(B, D, T, seed=1 + T + W, dtype=dtype), y_layout)
    return x, randn(D, W, seed=D) / W**0.5, dy


def exact_conv(x, weight, activation, ahead):
    h = _direct(x.double(), weight.double(), ahead=ahead)
    return F.silu(h) if activation else h


def exact_gradients(x, weight, dy, activation, ahead):
    leaves = [v.double().requires_grad_() for v in (x, weight)]
    return torch.autograd.grad(exact_conv(*leaves, activation, ahead), leaves, dy.double())


def assert_rows_near(actual, exact, budget, size=None):
    """`size`: rows of what was added up, where much of it may cancel."""
    error = (actual.double() - exact).norm(dim=-1)
    size = (exact if size is None else size).norm(dim=-1)
    assert (error <= budget * size).all(), float((error / size).max())


def assert_only_view_written(view, around):
    assert not view.isnan().any()
    assert int((~around.isnan()).sum()) == view.numel()


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_forward_is_the_reference(case):
    B, D, T, _, ahead, activation, _, y_layout, _, dtype = case
    x, weight, _ = case_inputs(case)
    y, around = blank((B, D, T), y_layout, dtype)
    short_forward(x, weight, y, activation=activation, ahead=ahead)
    assert_only_view_written(y, around)
    assert_rows_near(y, exact_conv(x, weight, activation, ahead), ROUNDING[dtype] + SUMS)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_backward_is_autograd_of_the_reference(case):
    B, D, T, W, ahead, activation, *_, dx_layout, dtype = case
    x, weight, dy = case_inputs(case)
    dx, around = blank((B, D, T), dx_layout, dtype)
    with new_memory_is_nan():
        dweight = short_backward(x, weight, dy, dx, activation=activation, ahead=ahead)
    exact_dx, exact_dweight = exact_gradients(x, weight, dy, activation, ahead)
    assert_only_view_written(dx, around)
    assert_rows_near(dx, exact_dx, ROUNDING[dtype] + SUMS)
    assert dweight.shape == (D, W) and dweight.dtype == F32
    assert_rows_near(dweight, exact_dweight, 2 * SUMS)


@pytest.mark.parametrize("W", [9, 20])
@pytest.mark.parametrize("activation", [True, False])
def test_each_gradient_alone_is_the_same(W, activation):
    x, weight, dy = randn(1, 3, 24), randn(3, W, seed=1), randn(1, 3, 24, seed=2)
    both, alone = torch.empty_like(x), torch.empty_like(x)
    options = {"activation": activation, "ahead": W // 2}
    dweight = short_backward(x, weight, dy, both, **options)
    assert short_backward(x, weight, dy, alone, need_dweight=False, **options) is None
    assert torch.allclose(both, alone, rtol=0, atol=1e-5)  # without activation by another kernel
    only = short_backward(x, weight, dy, None, **options)
    assert torch.allclose(dweight, only, rtol=0, atol=1e-4)  # segments begin elsewhere
    assert short_backward(x, weight, dy, None, need_dweight=False, **options) is None


def test_many_segments_add_up(monkeypatch):
    monkeypatch.setattr(kernels, "SEGMENTS", (16,))
    for layout, ahead in (("bdt", 0), ("btd", 2)):
        x, _ = laid(randn(2, 3, 40), layout)
        weight, dy = randn(3, 5, seed=1), randn(2, 3, 40, seed=2)
        dx, around = blank(x.shape, layout, F32)
        dweight = short_backward(x, weight, dy, dx, activation=True, ahead=ahead)
        exact_dx, exact_dweight = exact_gradients(x, weight, dy, True, ahead)
        assert_only_view_written(dx, around)
        assert_rows_near(dx, exact_dx, EPS[F32] + SUMS)
        assert_rows_near(dweight, exact_dweight, 2 * SUMS)


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [(F32, BF16), (BF16, F32), (F16, BF16)])
def test_each_tensor_has_its_own_dtype(x_dtype, y_dtype):
    x, weight = randn(1, 3, 70, dtype=x_dtype).mT.contiguous().mT, randn(3, 5, seed=1)
    y, dx = torch.empty_like(x, dtype=y_dtype), torch.empty_like(x)
    short_forward(x, weight, y, activation=True)
    assert_rows_near(y, exact_conv(x, weight, True, 0), ROUNDING[y_dtype] + SUMS)
    dy = randn(1, 3, 70, seed=2, dtype=y_dtype)
    short_backward(x, weight, dy, dx, activation=True)
    assert_rows_near(dx, exact_gradients(x, weight, dy, True, 0)[0], ROUNDING[x_dtype] + SUMS)


@pytest.mark.parametrize(
    ("T", "W", "layout"),
    [(1, 12, "btd"), (1, 4, "bdt"), (5, 1, "btd"), (5, 40, "bdt"), (5, 40, "btd"), (70, 4, "btd"),
     (70, 12, "bdt"), (70, 12, "btd")],
)  # fmt: skip
def test_past_comes_before_the_first_token(T, W, layout):
    x, _ = laid(randn(2, 3, T, seed=1, dtype=BF16), layout)
    past = randn(2, W - 1, 3, seed=2).mT
    weight = randn(3, W, seed=3)
    y, around = blank((2, 3, T), "btd", F32)
    short_forward(x, weight, y, activation=True, past=past)
    exact, size = (
        short_conv(u, [k], activation=act, identity=False, layout="bdt", state=state)
        for u, k, state, act in (
            (x.double(), weight.double(), past.double(), "silu"),
            (x.double().abs(), weight.double().abs(), past.double().abs(), None),
        )
    )
    assert_only_view_written(y, around)
    assert_rows_near(y, exact, EPS[F32] + SUMS, size)


def test_a_gradient_may_be_expanded():
    """The gradient of y.sum() has strides of zero."""
    x, weight = randn(2, 3, 20), randn(3, 9, seed=1)
    dy, dx = torch.ones(1, 1, 1, device=DEVICE).expand(2, 3, 20), torch.empty_like(x)
    dweight = short_backward(x, weight, dy, dx, activation=True)
    exact_dx, exact_dweight = exact_gradients(x, weight, dy, True, 0)
    assert_rows_near(dx, exact_dx, EPS[F32] + SUMS)
    assert_rows_near(dweight, exact_dweight, 2 * SUMS)


@pytest.mark.parametrize("layout", ["bdt", "btd"])
def test_batch_rows_are_independent_and_bits_repeat(layout):
    x, weight, dy = randn(2, 3, 12), randn(3, 3, seed=1), randn(2, 3, 12, seed=2)
    x, dy = (laid(v, layout)[0] for v in (x, dy))

    def run(x, dy):
        y, dx = torch.empty_like(x), torch.empty_like(x)
        short_forward(x, weight, y, activation=True, ahead=1)
        return y, dx, short_backward(x, weight, dy, dx, activation=True, ahead=1)

    together = run(x, dy)
    assert all(map(torch.equal, together, run(x, dy)))
    for b in range(2):
        y, dx, _ = run(x[b : b + 1], dy[b : b + 1])
        assert y.equal(together[0][b : b + 1]) and dx.equal(together[1][b : b + 1])


@pytest.mark.parametrize(("W", "layout"), [(3, "btd"), (20, "bdt")])
def test_a_nan_reaches_its_own_taps_only(W, layout):
    x, weight, dy = randn(2, 3, 16), randn(3, W, seed=1), randn(2, 3, 16, seed=2)
    ahead = W // 2

    def run(x):
        x = laid(x, layout)[0]
        y, dx = torch.empty_like(x), torch.empty_like(x)
        short_forward(x, weight, y, activation=True, ahead=ahead)
        return y, dx, short_backward(x, weight, dy, dx, activation=True, ahead=ahead)

    clean = run(x)
    for t in (0, 15):
        spoilt = x.clone()
        spoilt[1, 2, t] = torch.nan
        y, dx, dweight = run(spoilt)
        reached = torch.zeros_like(x, dtype=torch.bool)
        reached[1, 2, max(t - ahead, 0) : t - ahead + W] = True
        assert y.isnan().equal(reached)
        assert y[~reached].equal(clean[0][~reached])
        reached[1, 2, max(t - W + 1, 0) : t + W] = True
        assert dx.isnan().equal(reached)
        assert dx[~reached].equal(clean[1][~reached])
        assert dweight[:2].equal(clean[2][:2])


def test_silu_far_out():
    x = torch.tensor([-80.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 200.0], device=DEVICE)[None, None]
    if DEVICE == "cuda":  # numpy warns where exp overflows
        x[..., 0] = -200.0
    weight, y = torch.ones(1, 1, device=DEVICE), torch.empty_like(x)
    dy, dx = torch.ones_like(x), torch.empty_like(x)
    short_forward(x, weight, y, activation=True)
    short_backward(x, weight, dy, dx, activation=True)
    exact_dx, _ = exact_gradients(x, weight, dy, True, 0)
    # rtol: exp(-h) by a product with log2(e), which rounds, costs |h| * 2^-24
    assert torch.allclose(y.double(), F.silu(x.double()), rtol=1e-5, atol=1e-30)
    assert torch.allclose(dx.double(), exact_dx, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=["B", "D", "T"])
@pytest.mark.parametrize("W", [3, 20])
def test_nothing_in_gives_nothing_out(shape, W):
    x, weight = torch.empty(shape, device=DEVICE), torch.ones(shape[1], W, device=DEVICE)
    short_forward(x, weight, x.clone(), activation=True)
    dweight = short_backward(x, weight, x, x.clone(), activation=True)
    assert dweight.shape == weight.shape and not dweight.any()
    transpose_gate(x, x, x.clone())
    transpose_gate_backward(x, x, x, x.clone(), x.clone())


def test_new_sizes_compile_nothing():
    x, weight = randn(2, 3, 24), randn(3, 2, seed=1)

    def run(B, T):
        for layout in ("bdt", "btd"):
            v = laid(x[:B, :, :T], layout)[0]
            dx = torch.empty_like(v)
            short_forward(v, weight, dx, activation=True)
            short_backward(v, weight, v, dx, activation=True)
            transpose_gate(v, v, dx)

    run(2, 16)
    launchers = kernels._forward, kernels._backward, transposed_product._products
    before = [len(launcher._variants) for launcher in launchers]
    run(2, 24)
    assert [len(launcher._variants) for launcher in launchers] == before


@pytest.mark.parametrize(
    ("shape", "z_dtype", "dtype"),
    [((1, 1, 1), F32, BF16), ((3, 3, 63), F16, F16), ((2, 100, 64), F32, F16),
     ((1, 64, 100), BF16, F32)],
)  # fmt: skip
@pytest.mark.parametrize(
    ("z_layout", "y_layout", "gate_layout"),
    [("bdt", "btd", "btd"), ("btd", "bdt", "bdt"), ("bdt", "bdt", "btd"),
     ("strided", "sliced", "btd"), ("sliced", "btd", "strided")],
)  # fmt: skip
def test_gate_multiplies_and_its_gradients(shape, z_layout, y_layout, gate_layout, z_dtype, dtype):
    z, _ = laid(randn(*shape, dtype=z_dtype), z_layout)
    gate, _ = laid(randn(*shape, seed=1, dtype=dtype), gate_layout)
    dy, _ = laid(randn(*shape, seed=2, dtype=dtype), y_layout)
    y, around_y = blank(shape, y_layout, dtype)
    dz, around_dz = blank(shape, z_layout, z_dtype)
    dgate, around_dgate = blank(shape, gate_layout, dtype)
    transpose_gate(z, gate, y)
    transpose_gate_backward(z, gate, dy, dz, dgate)
    for view, around, exact in (
        (y, around_y, z.float() * gate.float()),
        (dz, around_dz, dy.float() * gate.float()),
        (dgate, around_dgate, dy.float() * z.float()),
    ):
        assert_only_view_written(view, around)
        if view.dtype == BF16 and DEVICE != "cuda":
            assert_rows_near(view, exact.double(), ROUNDING[BF16])
        else:
            assert view.equal(exact.to(view.dtype))  # one product in float32, rounded once


@pytest.mark.parametrize("z_layout", LAYOUTS)
@pytest.mark.parametrize("y_layout", LAYOUTS)
def test_without_a_gate_it_is_a_copy(z_layout, y_layout):
    z, _ = laid(randn(2, 5, 70, dtype=BF16), z_layout)
    y, around_y = blank(z.shape, y_layout, BF16)
    transpose_gate(z, None, y)
    assert_only_view_written(y, around_y)
    assert y.equal(z)
    dz, around_dz = blank(z.shape, z_layout, BF16)
    transpose_gate_backward(None, None, y, dz, None)
    assert_only_view_written(dz, around_dz)
    assert dz.equal(z)
