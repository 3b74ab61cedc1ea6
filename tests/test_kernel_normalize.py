"""kernels/normalize.py against float64 autograd of PyTorch's norms: interpreted, or on a GPU.

A result rounds once; before that it goes through about ten float32 operations and a sum over the
row (ARITHMETIC). dx is what is left of w dy orthogonal to n and, in layer norm, to ones: its error
is judged against w dy r, and that of a parameter's gradient against the root of the sum of its
terms' squares, where n counts as what it is a difference of.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chela_bench.bench.check import worst_block_error
from chela_bench.errors import ArgumentError
from chela_bench.kernels import normalize as module
from chela_bench.kernels.normalize import normalize
from tests.attention import DEVICE, new_memory_is_nan

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
if DEVICE == "cpu":
    ROUNDING[torch.bfloat16] = 2.0**-7  # the interpreter truncates
ARITHMETIC = 1e-6
SHAPES = [(2, 70, 1), (1, 130, 3), (2, 33, 100), (1, 9, 600), (3, 2048), (4096,)]
dtypes = pytest.mark.parametrize(
    "dtype", ROUNDING, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
kinds = pytest.mark.parametrize("kind", ["layer", "rms"])


def drawn(*size, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(size))
    return torch.randn(size, generator=generator).to(DEVICE)


def new_norm(kind, D, dtype=torch.float32, eps=1e-5):
    norm = (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(D, eps=eps).to(DEVICE, dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(1 + drawn(D, seed=seed + 5))
    return norm


def gradients_of(norm, x, dy, around=None):
    """y; gradients of x and of the parameters; `around` is what reaches x around the norm."""
    x = x.detach().requires_grad_()
    leaves = [x, *norm.parameters()]
    with new_memory_is_nan():
        y, beside = normalize(norm, x)
        outputs, upstream = ([y], [dy]) if around is None else ([y, beside], [dy, around])
        return y.detach(), torch.autograd.grad(outputs, leaves, upstream)


def exact_of(norm, x, dy, around=None):
    double = new_norm("layer" if isinstance(norm, nn.LayerNorm) else "rms", x.shape[-1]).double()
    double.load_state_dict({n: y.double() for n, y in norm.state_dict().items()})
    double.eps = norm.eps
    x = x.detach().double().requires_grad_()
    y = double(x)
    gradients = torch.autograd.grad(y, [x, *double.parameters()], dy.double())
    if around is not None:
        gradients = (gradients[0] + around.double(), *gradients[1:])
    return y.detach(), gradients


def error_of(actual, exact, size):
    rows = [y.double().reshape(1, -1, y.shape[-1]) for y in (actual, exact, size)]
    return worst_block_error(rows[2] + (rows[0] - rows[1]), rows[2])


def check(norm, x, dy, around=None):
    y, (dx, *others) = gradients_of(norm, x, dy, around)
    y_exact, (dx_exact, *others_exact) = exact_of(norm, x, dy, around)
    allowed = ROUNDING[x.dtype] + ARITHMETIC
    assert y.dtype == dx.dtype == x.dtype and y.is_contiguous() and dx.is_contiguous()
    assert error_of(y, y_exact, y_exact) <= allowed
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else wide
    r = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
    size = (dy.double() * norm.weight.detach().double() * r).abs() + 1e-12
    size = size if around is None else size + around.double().abs()
    lost = (wide.abs() * r).amax().item()  # of n's digits, where x is much like its mean
    assert error_of(dx, dx_exact, size) <= allowed + ARITHMETIC * lost
    terms = [dy.double() * (wide.abs() + (wide - centred).abs()) * r, dy.double()]
    for found, exact, parts in zip(others, others_exact, terms, strict=False):
        scale = parts.reshape(-1, parts.shape[-1]).norm(dim=0)
        bound = (ROUNDING[found.dtype] * 2 + 4 * ARITHMETIC) * torch.maximum(scale, exact.abs())
        assert found.dtype == norm.weight.dtype
        assert ((found.double() - exact).abs() <= bound + 1e-12).all()
    return y, dx


@kinds
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_pytorchs_in_float64(kind, dtype, shape):
    x, dy = drawn(*shape).to(dtype), drawn(*shape, seed=1).to(dtype)
    check(new_norm(kind, shape[-1]), x + 2, dy)


@kinds
@dtypes
def test_adds_what_reaches_x_around_it(kind, dtype):
    x, dy, around = (drawn(3, 50, 96, seed=seed).to(dtype) for seed in range(3))
    check(new_norm(kind, 96), x, dy, around)


@kinds
def test_parameters_in_16_bits(kind):
    x, dy = (drawn(2, 40, 64, seed=seed).bfloat16() for seed in range(2))
    check(new_norm(kind, 64, torch.bfloat16), x, dy)


@kinds
def test_any_strides_give_the_same(kind):
    norm = new_norm(kind, 24)
    x, dy, around = (drawn(4, 5, 24, seed=seed) for seed in range(3))
    y, gradients = gradients_of(norm, x, dy, around)

    def moved(u):
        return torch.cat([u, u * 3], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)[..., :24]

    found, moved_gradients = gradients_of(norm, moved(x), moved(dy), moved(around))
    assert torch.equal(found, y)
    for actual, wanted in zip(moved_gradients, gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@kinds
def test_only_what_is_trained_gets_a_gradient(kind):
    norm = new_norm(kind, 24)
    x, dy = drawn(3, 24), drawn(3, 24, seed=1)
    _, wanted = gradients_of(norm, x, dy)
    y, beside = normalize(norm, x)
    assert beside is x  # which has no gradient for anyone to add to
    for actual, exact in zip(
        torch.autograd.grad(y, list(norm.parameters()), dy), wanted[1:], strict=True
    ):
        assert torch.equal(actual, exact)
    norm.requires_grad_(False)
    x.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(normalize(norm, x)[0], x, dy)[0], wanted[0])


@kinds
def test_only_what_goes_around_has_a_gradient(kind):
    x, around = drawn(3, 24).requires_grad_(), drawn(3, 24, seed=1)
    _, beside = normalize(new_norm(kind, 24), x)
    assert torch.equal(torch.autograd.grad(beside, x, around)[0], around)


@kinds
@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 8)], ids=str)
def test_nothing_gives_nothing(kind, shape):
    y, (dx, *others) = gradients_of(new_norm(kind, 8), drawn(*shape), drawn(*shape))
    assert y.shape == dx.shape == shape
    assert all(not gradient.any() for gradient in others)


@kinds
def test_rows_too_wide_for_a_program_are_pytorchs(kind):
    x, dy = drawn(2, module.MAX_D + 8), drawn(2, module.MAX_D + 8, seed=1)
    check(new_norm(kind, module.MAX_D + 8), x, dy)


def test_nan_stays_in_its_row():
    norm, x, dy = new_norm("layer", 40), drawn(6, 40), drawn(6, 40, seed=1)
    y, (dx, *_) = gradients_of(norm, x, dy)
    x[3, 7] = float("nan")
    found, (found_dx, *_) = gradients_of(norm, x, dy)
    for actual, clean in ((found, y), (found_dx, dx)):
        assert actual[3].isnan().all()
        actual[3] = clean[3]
        assert torch.equal(actual, clean)


@pytest.mark.parametrize("walks", [1, 64])
def test_sums_over_many_rows_have_the_same_bits_each_time(monkeypatch, walks):
    monkeypatch.setattr(module.walks_of, "__defaults__", (walks,))
    R = 3000 if DEVICE == "cuda" else 300  # five steps of four programs, or nineteen of one
    norm, x, dy = new_norm("layer", 40), drawn(R, 40), drawn(R, 40, seed=1)
    check(norm, x, dy)
    first, second = (gradients_of(norm, x, dy)[1] for _ in range(2))
    assert all(map(torch.equal, first, second))


@kinds
def test_compiled_gives_the_same_bits(kind):
    torch._dynamo.reset()
    norm, x, dy = new_norm(kind, 24), drawn(3, 24).requires_grad_(), drawn(3, 24, seed=1)
    compiled = torch.compile(lambda x: normalize(norm, x)[0], fullgraph=True, backend="aot_eager")
    leaves = [x, *norm.parameters()]
    y, right = compiled(x), normalize(norm, x)[0]
    assert torch.equal(y, right)
    found, wanted = (torch.autograd.grad(z, leaves, dy) for z in (y, right))
    assert all(map(torch.equal, found, wanted))


@kinds
@pytest.mark.parametrize("trained", [False, True])
def test_the_operator_keeps_pytorchs_rules(kind, trained):
    x, norm = drawn(2, 3, 8).half(), new_norm(kind, 8)
    given = [x, norm.weight.detach(), norm.bias.detach() if kind == "layer" else None]
    for tensor in given:
        if trained and tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(module._normalize.registered.default, (*given, 1e-5))


def test_has_first_derivatives_alone():
    x = drawn(3, 8).requires_grad_()
    y, _ = normalize(new_norm("layer", 8), x)
    with pytest.raises(ArgumentError, match="wanted first derivatives of a norm"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
