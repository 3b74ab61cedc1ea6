"""kernels/gates_ops.py against float64 autograd of the plain formulas: interpreted, or on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo.testing

from chela_bench.errors import ArgumentError
from chela_bench.kernels import gates_ops as ops
from chela_bench.kernels.gates_ops import (
    joint_output_gate,
    norm_gate,
    output_gate,
    silu,
)
from chela_bench.kernels.queries_keys_ops import queries_keys
from tests.attention import DEVICE
from tests.gates import (
    ARITHMETIC,
    EPS,
    FUNCTIONS,
    PARAMETERS,
    ROUNDING,
    SHRINK,
    check,
    doubled,
    drawn,
    dtypes,
    exact_norm_gate,
    functions,
    inputs_of,
    with_gradients,
)

SHAPES = [(2, 70, 1), (1, 130, 3), (2, 65, 100), (1, 9, 600), (3, 2048), (4096,)]


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
