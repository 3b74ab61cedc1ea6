"""kernels/gates_ops.py against float64 autograd of the plain formulas: interpreted, or on a GPU.

A result rounds once: half a spacing of its dtype, which the interpreter truncates to bfloat16 and
so spends a whole one. Before that it goes through about ten float32 operations, exp and division
among them, each off by at most two spacings of float32, 2^-22: 1e-6 in rms, for they do not add up
all one way. A parameter's gradient sums R terms in float32, of which the error is judged against
the root of the sum of their squares; do is what is left of dm act(a) r along the row's sphere, and
judged against that. Both can cancel: do to nearly nothing for V = 1.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from chela_bench.bench.check import worst_block_error
from chela_bench.errors import ArgumentError
from chela_bench.kernels import gates_ops as ops
from chela_bench.kernels import queries_keys as shared
from chela_bench.kernels import row_sums
from chela_bench.kernels.gates_ops import (
    joint_output_gate,
    norm_gate,
    output_gate,
    silu,
)
from chela_bench.kernels.queries_keys_ops import _queries_keys, queries_keys
from tests.attention import DEVICE, new_memory_is_nan

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
if DEVICE == "cpu":
    ROUNDING[torch.bfloat16] = 2.0**-7
ARITHMETIC = 1e-6
EPS = 1e-5
SHRINK = torch.tensor([1.0, 0.25, 2.0**-9], device=DEVICE)
ACTIVATIONS = {"sigmoid": torch.sigmoid, "silu": F.silu, None: lambda a: a}
SHAPES = [(2, 70, 1), (1, 130, 3), (2, 65, 100), (1, 9, 600), (3, 2048), (4096,)]
MANY_ROWS = (3, 700, 40) if DEVICE == "cuda" else (3, 67, 40)
dtypes = pytest.mark.parametrize(
    "dtype", ROUNDING, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def exact_norm_gate(o, a=None, *, eps=EPS, activation="sigmoid"):
    m = o * torch.rsqrt(o.square().mean(dim=-1, keepdim=True) + eps)
    return m if a is None else m * ACTIVATIONS[activation](a)


def exact_queries_keys(p, a_q, m_q, a_k, m_k, *, activation):
    s = F.silu(p) if activation else p
    return a_q * s + m_q, a_k * s + m_k


def exact_output_gate(h, g, x):
    return torch.sigmoid(g) * F.silu(h) + (1 - torch.sigmoid(g)) * x


FUNCTIONS = {  # ours, the formula, and what they take
    "norm": (lambda o: norm_gate(o, None, eps=EPS), exact_norm_gate, "o"),
    **{
        f"norm_gate_{act}": (
            partial(norm_gate, eps=EPS, activation=act),
            partial(exact_norm_gate, activation=act),
            "o a",
        )
        for act in ACTIVATIONS
    },
    **{
        f"queries_keys_{act}": (
            partial(queries_keys, activation=act),
            partial(exact_queries_keys, activation=act),
            "p a_q m_q a_k m_k",
        )
        for act in (True, False)
    },
    "silu": (silu, F.silu, "p"),
    "output_gate": (output_gate, exact_output_gate, "h g x"),
    "residual": (lambda h, x: output_gate(h, None, x), lambda h, x: F.silu(h) + x, "h x"),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)
PARAMETERS = ("a_q", "m_q", "a_k", "m_k")


def drawn(*size, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(size))
    return (torch.randn(size, generator=generator) * scale).to(DEVICE)


def inputs_of(name, shape, dtype=torch.float32):
    """By name; the rows of a gate from one saturated end to the other."""
    found = {}
    for seed, x in enumerate(FUNCTIONS[name][2].split()):
        size = shape[-1:] if x in PARAMETERS else shape
        found[x] = drawn(*size, seed=seed, scale=4 if x in ("a", "g") else 1).to(dtype)
    return found


def with_gradients(function, inputs, upstream=None, *, trained=None):
    """Outputs, gradients by the name of their input, and the gradients that came in."""
    leaves = {
        name: x.detach().requires_grad_(trained is None or name in trained)
        for name, x in inputs.items()
    }
    with new_memory_is_nan():
        outputs = function(*leaves.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if upstream is None:
            upstream = [drawn(*y.shape, seed=20 + i).to(y.dtype) for i, y in enumerate(outputs)]
        wanted = [x for x in leaves.values() if x.requires_grad]
        gradients = torch.autograd.grad(outputs, wanted, upstream)
    names = [name for name, x in leaves.items() if x.requires_grad]
    return [y.detach() for y in outputs], dict(zip(names, gradients, strict=True)), upstream


def doubled(tensors):
    return {name: x.double() for name, x in tensors.items()}


def token_error(actual, exact, size=None):
    """In blocks of 64 rows. `size`: what the error is judged against, if not against `exact`."""
    size = exact if size is None else size
    rows = [x.double().reshape(1, -1, x.shape[-1]) for x in (actual, exact, size)]
    actual, exact, size = rows
    return worst_block_error(size + (actual - exact), size)


def check(name, inputs, *, eps=EPS, scale=1.0, function=None, formula=None):
    """Outputs and gradients; upstream gradients are of this scale."""
    ours, plain = function or FUNCTIONS[name][0], formula or FUNCTIONS[name][1]
    outputs, gradients, upstream = with_gradients(ours, inputs)
    if scale != 1:
        upstream = [scale * dy for dy in upstream]
        outputs, gradients, _ = with_gradients(ours, inputs, upstream)
    exact = doubled(inputs)
    outputs_exact, gradients_exact, _ = with_gradients(plain, exact, [x.double() for x in upstream])
    for y, y_exact in zip(outputs, outputs_exact, strict=True):
        assert y.is_contiguous()
        assert token_error(y, y_exact) <= ROUNDING[y.dtype] + ARITHMETIC
    for x, gradient in gradients.items():
        assert gradient.dtype == inputs[x].dtype
        size = uncancelled(
            name, x, exact, [dy.double() for dy in upstream], gradients_exact[x], eps
        )
        error = token_error(gradient, gradients_exact[x], size)
        assert error <= ROUNDING.get(gradient.dtype, 0) + ARITHMETIC, x
    return outputs, gradients


def uncancelled(name, x, inputs, upstream, gradient, eps):
    """What a gradient's error is judged against."""
    activation = name.rpartition("_")[2]
    if x == "o":
        o, a = inputs["o"], inputs.get("a")
        gate = 1 if a is None else ACTIVATIONS.get(activation, ACTIVATIONS[None])(a)
        return upstream[0] * gate * torch.rsqrt(o.square().mean(dim=-1, keepdim=True) + eps)
    if x in PARAMETERS:
        terms = upstream[x.endswith("k")]
        if x.startswith("a"):
            terms = terms * (F.silu(inputs["p"]) if activation == "True" else inputs["p"])
        square = terms.reshape(-1, gradient.shape[0]).square().sum(dim=0)
        return torch.maximum(square.sqrt(), gradient.abs())
    return gradient


@functions
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_matches_the_formula(name, dtype, shape):
    outputs, _ = check(name, inputs_of(name, shape, dtype))
    assert all(y.dtype == dtype and y.shape == shape for y in outputs)


@pytest.mark.parametrize(
    ("name", "mixture"),
    [
        ("norm_gate_sigmoid", {"o": torch.float32, "a": torch.bfloat16}),
        ("norm_gate_silu", {"o": torch.float16, "a": torch.float32}),
        ("output_gate", {"h": torch.float16, "g": torch.float32, "x": torch.bfloat16}),
        ("residual", {"h": torch.float32, "x": torch.float16}),
        (
            "queries_keys_True",
            {
                "p": torch.bfloat16,
                "a_q": torch.float16,
                "a_k": torch.float64,
                "m_k": torch.bfloat16,
            },
        ),
    ],
)
def test_any_mixture_of_dtypes(name, mixture):
    inputs = inputs_of(name, (2, 33, 40))
    inputs |= {x: inputs[x].to(dtype) for x, dtype in mixture.items()}
    outputs, _ = check(name, inputs)
    wanted = inputs.get("a", inputs.get("x", inputs.get("p")))
    assert all(y.dtype == wanted.dtype for y in outputs)


def test_norm_and_gate_round_in_a_dtype_of_their_own():
    inputs = inputs_of("norm_gate_sigmoid", (3, 40), torch.float32)
    function = partial(norm_gate, eps=EPS, dtype=torch.float16)
    [m], _ = check("norm_gate_sigmoid", inputs, function=function)
    assert m.dtype == torch.float16
    assert norm_gate(inputs["o"].half(), None, eps=EPS).dtype == torch.float16


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows past the last, where eps = 0
@pytest.mark.parametrize(
    ("dtype", "size", "eps"),
    [
        (torch.bfloat16, 1e30, EPS),
        (torch.float32, 1e30, EPS),
        (torch.float32, 3e37, EPS),
        (torch.float16, 1.5e4, EPS),
        (torch.float32, 1e-25, 0.0),
        (torch.float32, 1e-3, EPS),
        (torch.float32, 1e-25, EPS),
    ],
)
def test_any_magnitude_is_normed(dtype, size, eps):
    """A float16's gradient is subnormal, and loses digits, unless the upstream one is large."""
    o = drawn(3, 5, 100).clamp(-4, 4) * size
    o[0, 2] = size / 100
    inputs = {"o": o.to(dtype), "a": drawn(3, 5, 100, seed=1).to(dtype)}
    check(
        "norm_gate_sigmoid", inputs, eps=eps, scale=2.0**14 if dtype == torch.float16 else 1.0,
        function=partial(norm_gate, eps=eps), formula=partial(exact_norm_gate, eps=eps),
    )  # fmt: skip


@dtypes
@pytest.mark.parametrize("gated", [True, False])
def test_eps_shrinks_with_its_row(dtype, gated):
    """To the last bits, where shrinking by powers of two is exact."""
    inputs = {"o": drawn(30, 3, 100), "a": drawn(30, 3, 100, seed=1)}
    eps = 0.5
    if not gated:
        del inputs["a"]
    name = "norm_gate_sigmoid" if gated else "norm"
    inputs = {x: y.to(dtype) for x, y in inputs.items()}
    inputs["o"] *= SHRINK[:, None].to(dtype)
    upstream = 2.0**-9 if dtype == torch.float16 else 1.0  # do is up to 2^9 as large

    def ours(o, a=None):
        return norm_gate(o, a, eps=eps, shrink=SHRINK)

    each = eps * SHRINK.double().square()[:, None]
    formula = partial(exact_norm_gate, eps=each)
    check(name, inputs, eps=each, scale=upstream, function=ours, formula=formula)
    whole = inputs["o"] / SHRINK[:, None].to(dtype)
    assert torch.equal(ours(**inputs), norm_gate(whole, inputs.get("a"), eps=eps))


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1e30), (torch.float16, 6e4)])
def test_huge_values_pass_the_gates(dtype, size):
    """Saturated gates choose one side and leave nothing of the other's gradient but zeros."""
    sign = drawn(2, 40).sign()
    h, g, x = (size * sign * y for y in (1, drawn(2, 40, seed=1).sign(), drawn(2, 40, seed=2)))
    h, g, x = (y.clamp(-size, size).to(dtype) for y in (h, g, x))
    for name, inputs in (
        ("silu", {"p": h}), ("output_gate", {"h": h, "g": g, "x": x}),
        ("queries_keys_True", {"p": h, **{y: drawn(40, scale=0.2) for y in PARAMETERS}}),
    ):  # fmt: skip
        outputs, gradients, upstream = with_gradients(FUNCTIONS[name][0], inputs)
        exact, exact_gradients, _ = with_gradients(
            FUNCTIONS[name][1], doubled(inputs), [y.double() for y in upstream]
        )
        pairs = [*zip(outputs, exact, strict=True)]
        pairs += [(y, exact_gradients[i]) for i, y in gradients.items()]
        for y, y_exact in pairs:
            rtol = ROUNDING[y.dtype] + ARITHMETIC
            torch.testing.assert_close(y.double(), y_exact, rtol=rtol, atol=1e-30)


def test_nan_stays_in_its_row():
    inputs = inputs_of("norm_gate_sigmoid", (6, 40))
    function = FUNCTIONS["norm_gate_sigmoid"][0]
    [clean], clean_gradients, _ = with_gradients(function, inputs)
    inputs["o"][3, 7] = float("nan")
    [m], gradients, _ = with_gradients(function, inputs)
    for y, y_clean in ((m, clean), *((gradients[x], clean_gradients[x]) for x in "oa")):
        assert y[3].isnan().all()
        y[3] = y_clean[3]
        assert torch.equal(y, y_clean)


def test_nan_in_a_pointwise_input_stays_where_it_is():
    inputs = inputs_of("output_gate", (4, 40))
    [clean], clean_gradients, _ = with_gradients(output_gate, inputs)
    inputs["h"][3, 7] = float("nan")
    [y], gradients, _ = with_gradients(output_gate, inputs)
    for found, before in ((y, clean), *((gradients[i], clean_gradients[i]) for i in "hg")):
        assert found[3, 7].isnan()
        found[3, 7] = before[3, 7]
        assert torch.equal(found, before)
    assert torch.equal(gradients["x"], clean_gradients["x"])


def wider(x, columns):
    """x as a part of wider rows."""
    rows = torch.cat([x, x.new_full((*x.shape[:-1], columns), float("nan"))], dim=-1)
    return rows[..., : x.shape[-1]]


LAYOUTS = {
    "whole vectors": partial(wider, columns=8),
    "odd": partial(wider, columns=1),
    "columns first": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 2 else x,
    "every other": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


@functions
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same(name, layout):
    """But for the order of sums, where a GPU's threads hold fewer neighbours."""
    inputs = inputs_of(name, (2, 5, 24), torch.float16)
    outputs, gradients, upstream = with_gradients(FUNCTIONS[name][0], inputs)
    moved = {x: LAYOUTS[layout](tensor) for x, tensor in inputs.items()}
    assert not all(x.is_contiguous() for x in moved.values())
    found, moved_gradients, _ = with_gradients(
        FUNCTIONS[name][0], moved, [LAYOUTS[layout](dy) for dy in upstream]
    )
    pairs = [*zip(found, outputs, strict=True)]
    pairs += [(gradient, gradients[x]) for x, gradient in moved_gradients.items()]
    for y, wanted in pairs:
        torch.testing.assert_close(y, wanted, rtol=2 * ROUNDING[y.dtype], atol=1e-5)


@functions
def test_rows_of_one_row_expanded(name):
    inputs = inputs_of(name, (1, 24))
    row = FUNCTIONS[name][0](*inputs.values())
    expanded = [x if x.ndim == 1 else x.expand(5, -1) for x in inputs.values()]
    outputs = FUNCTIONS[name][0](*expanded)
    if torch.is_tensor(row):
        row, outputs = (row,), (outputs,)
    assert all(torch.equal(y, first.expand(5, -1)) for y, first in zip(outputs, row, strict=True))


@functions
@pytest.mark.parametrize("shape", [(2, 0, 8), (0,), (3, 0)], ids=str)
def test_nothing_gives_nothing(name, shape):
    outputs, gradients, _ = with_gradients(FUNCTIONS[name][0], inputs_of(name, shape))
    assert all(y.shape == shape for y in outputs)
    for x, gradient in gradients.items():
        assert gradient.shape == (shape[-1:] if x in PARAMETERS else shape)
        assert not gradient.any()


@functions
def test_only_what_is_trained_gets_a_gradient(name):
    inputs = inputs_of(name, (2, 9, 24))
    _, every, upstream = with_gradients(FUNCTIONS[name][0], inputs)
    for x, wanted in every.items():
        _, alone, _ = with_gradients(FUNCTIONS[name][0], inputs, upstream, trained=[x])
        assert list(alone) == [x]
        torch.testing.assert_close(alone[x], wanted)


def test_keys_alone_are_trained():
    inputs = inputs_of("queries_keys_True", (3, 24))
    leaves = [x.requires_grad_() for x in inputs.values()]
    _, k = queries_keys(*leaves, activation=True)
    *gradients, da_k, dm_k = torch.autograd.grad(k.sum(), leaves)
    assert gradients[0].any() and da_k.any() and (dm_k == 3).all()
    assert not gradients[1].any() and not gradients[2].any()


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


def test_a_gradient_may_take_the_place_of_the_one_that_nobody_else_holds():
    inputs = inputs_of("norm_gate_sigmoid", (2, 70, 40), torch.float16)
    [m], wanted, [dm] = with_gradients(partial(norm_gate, eps=EPS), inputs)
    function = partial(norm_gate, eps=EPS, owns_gradient=True)
    [found], gradients, _ = with_gradients(function, inputs, [dm])
    assert torch.equal(found, m)
    assert gradients["o"].data_ptr() == dm.data_ptr()
    assert all(torch.equal(gradients[x], wanted[x]) for x in "oa")
    strided = torch.cat([dm, dm], dim=-1)[..., :40]  # a place of another layout is left alone
    before = strided.clone()
    _, gradients, _ = with_gradients(function, inputs, [strided])
    assert torch.equal(strided, before)


def test_halves_are_gated_as_two_tensors_are():
    inputs = inputs_of("output_gate", (2, 70, 40), torch.bfloat16)
    [y], gradients, upstream = with_gradients(output_gate, inputs)
    joint = {"hg": torch.cat([inputs["h"], inputs["g"]], dim=-1), "x": inputs["x"]}
    [found], joint_gradients, _ = with_gradients(joint_output_gate, joint, upstream)
    assert torch.equal(found, y)
    halves = torch.cat([gradients["h"], gradients["g"]], dim=-1)
    assert torch.equal(joint_gradients["hg"], halves)
    assert torch.equal(joint_gradients["x"], gradients["x"])


def test_rejects_halves_that_are_none():
    with pytest.raises(ArgumentError, match=r"wanted hg \[..., 2 D\], got \[3, 7\]"):
        joint_output_gate(drawn(3, 7), drawn(3, 3))
    with pytest.raises(ArgumentError, match="one shape"):
        joint_output_gate(drawn(3, 8), drawn(3, 8))


@pytest.mark.parametrize("trained", [False, True])
def test_the_operators_keep_pytorchs_rules(trained):
    def opcheck(operator, *arguments):
        for x in arguments:
            if trained and torch.is_tensor(x):
                x.requires_grad_()
        torch.library.opcheck(operator.registered.default, arguments)

    def x(*shape, dtype=torch.float32):
        return drawn(*(shape or (2, 3, 8))).to(dtype)

    half = torch.float16
    bf16 = torch.bfloat16
    opcheck(ops._norm_gate, x(), x(dtype=half), x(8, dtype=half), None, EPS, "silu", bf16, False)
    opcheck(ops._norm_gate, x(), x(), None, None, EPS, "silu", bf16, False)
    opcheck(ops._norm_gate, x(), None, None, SHRINK, EPS, None, torch.float32, True)
    parameters = [x(8) for _ in range(4)]
    opcheck(_queries_keys, x(dtype=half), *parameters, None, True)
    opcheck(_queries_keys, x(dtype=half), *parameters, x(8, dtype=half), True)
    opcheck(ops._output_gate, x(), x(), x(dtype=half), x(8), x(8, dtype=half))
    opcheck(ops._output_gate, x(2, 3, 16), None, x(), x(8), None)
    opcheck(ops._output_gate, x().transpose(0, 1), None, x().transpose(0, 1), None, None)
    opcheck(ops._output_gate, x(), None, None, x(8), None)


@pytest.mark.parametrize("needed", [(True,) * 5, (False, True, False, False, True)])
def test_the_gradients_operators_keep_pytorchs_rules(needed):
    operators = torch.ops.chela_bench
    half, x, moved = drawn(2, 3, 8).half(), drawn(2, 3, 8), drawn(3, 2, 8).transpose(0, 1)
    for operator, arguments in (
        (
            operators.norm_gate_backward,
            (moved, half, x, None, EPS, "silu", torch.float16, *needed[:2], needed[4]),
        ),
        (
            operators.queries_keys_backward,
            (
                half,
                x[0, 0],
                half[0, 0],
                x,
                moved,
                True,
                torch.bfloat16,
                torch.float32,
                torch.float16,
                *needed[:2],
                needed[4],
            ),
        ),
        (
            operators.output_gate_backward,
            (moved, half, x, half, torch.float32, torch.float16, *needed),
        ),
    ):
        torch.library.opcheck(operator.default, arguments)


@functions
def test_compiled_gives_the_same_bits(name):
    torch._dynamo.reset()
    inputs = inputs_of(name, (2, 5, 24))
    function = FUNCTIONS[name][0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outputs, gradients, upstream = with_gradients(function, inputs)
    found, compiled_gradients, _ = with_gradients(compiled, inputs, upstream)
    assert all(map(torch.equal, found, outputs))
    assert all(map(torch.equal, compiled_gradients.values(), gradients.values()))


@functions
def test_compiled_with_dynamic_lengths_compiles_a_few_times(name):
    torch._dynamo.reset()
    function = FUNCTIONS[name][0]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for T in (5, 7, 12, 30):
        inputs = inputs_of(name, (2, T, 24))
        outputs, found = (f(*inputs.values()) for f in (function, compiled))
        if torch.is_tensor(outputs):
            outputs, found = (outputs,), (found,)
        assert all(map(torch.equal, found, outputs))
    assert counter.frame_count <= 2


@functions
def test_a_second_derivative_is_refused(name):
    leaves = [x.requires_grad_() for x in inputs_of(name, (3, 8)).values()]
    y = FUNCTIONS[name][0](*leaves)
    y = y[0] + y[1] if isinstance(y, tuple) else y
    [first] = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(ArgumentError, match=r"of \w+, got a second one: .*\.reference"):
        first.sum().backward()


X = torch.zeros(2, 3, 8, device=DEVICE)
ROW = X[0, 0]
WRONG = [
    (lambda: norm_gate(X, X[:1], eps=EPS), r"wanted o, a \[\.\.\., N\] of one shape .*\[1, 3, 8\]"),
    (lambda: norm_gate(X.double(), X, eps=EPS), r"wanted o in float32, .*float64.*reference"),
    (lambda: norm_gate(X, X.int(), eps=EPS), r"wanted a in float32, .*int32"),
    (lambda: norm_gate(X, X, eps=-1.0), "wanted eps >= 0, got -1.0"),
    (lambda: norm_gate(X, X, eps=float("nan")), "wanted eps >= 0, got nan"),
    (lambda: norm_gate(X, X, eps=EPS, shrink=X[0, :2, 0]), r"wanted shrink \[T\] = \[3\].*\[2\]"),
    (lambda: norm_gate(X, X, eps=EPS, shrink=X[0, :, 0].half()), "in float32, .*float16"),
    (lambda: norm_gate(X, X, eps=EPS, activation="tanh"), "no activation 'tanh'; .*'sigmoid'"),
    (lambda: norm_gate(X, X, eps=EPS, dtype=torch.float64), "wanted dtype float32, .*float64"),
    (lambda: norm_gate(X[0, 0, 0], None, eps=EPS), r"\[\.\.\., N\]"),
    (lambda: norm_gate(X.new_zeros(1, 4097), None, eps=EPS), r"V <= 4096, got \[1, 4097\]"),
    (lambda: norm_gate(X, X.to("meta"), eps=EPS), "on one device, .*meta"),
    (lambda: queries_keys(X, ROW, ROW, ROW[:7], ROW, activation=True), r"wanted a_k \[8\].*\[7\]"),
    (lambda: queries_keys(X, ROW, ROW.int(), ROW, ROW, activation=True), "wanted m_q .*int32"),
    (lambda: queries_keys(X.int(), ROW, ROW, ROW, ROW, activation=True), "wanted p in float32"),
    (lambda: silu(X.double()), "wanted p in float32"),
    (lambda: output_gate(X, None, X[..., :7]), r"wanted h, g, x .*\[2, 3, 8\].* x \[2, 3, 7\]"),
    (lambda: output_gate(X, X.double(), X), "wanted g in float32"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_rejects(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(ops.gates._norm_gate_fwd, "interpreted", False)
    with pytest.raises(ArgumentError, match=r"wanted p on a GPU, got cpu; .*TRITON_INTERPRET=1"):
        silu(X.cpu())


@pytest.mark.gpu
@functions
def test_a_cuda_graph_replays_it(name):
    inputs = inputs_of(name, (2, 65, 256), torch.float16)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def step(leaves):
        y = FUNCTIONS[name][0](*leaves)
        y = y if isinstance(y, tuple) else (y,)
        return [*y, *torch.autograd.grad(sum(x.float().square().sum() for x in y), leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves)
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    graph.replay()
    afresh = [x.detach().requires_grad_() for x in leaves]
    assert all(map(torch.equal, captured, step(afresh)))


@pytest.mark.gpu
@functions
def test_a_new_number_of_rows_compiles_nothing(name):
    from chela_bench.kernels import gates, queries_keys
    from chela_bench.kernels.launching import Launcher

    modules = gates, queries_keys
    launchers = [x for m in modules for x in vars(m).values() if isinstance(x, Launcher)]

    def compiled():
        return [sum(len(c[0]) for c in x.kernel.device_caches.values()) for x in launchers]

    with_gradients(FUNCTIONS[name][0], inputs_of(name, (2, 64, 136), torch.bfloat16))
    before = compiled()
    for shape in ((1, 136), (3, 1000, 136), (17, 136)):
        with_gradients(FUNCTIONS[name][0], inputs_of(name, shape, torch.bfloat16))
    assert compiled() == before
