"""The gates and their formulas, with gradients, and how far apart they may be.

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
from chela_bench.kernels.gates_ops import (
    norm_gate,
    output_gate,
    silu,
)
from chela_bench.kernels.queries_keys_ops import queries_keys
from tests.attention import DEVICE, new_memory_is_nan

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
if DEVICE == "cpu":
    ROUNDING[torch.bfloat16] = 2.0**-7
ARITHMETIC = 1e-6
EPS = 1e-5
SHRINK = torch.tensor([1.0, 0.25, 2.0**-9], device=DEVICE)
ACTIVATIONS = {"sigmoid": torch.sigmoid, "silu": F.silu, None: lambda a: a}
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
