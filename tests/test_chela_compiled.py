"""torch.compile(fullgraph=True) of whole blocks, forward and backward: the kernels' and the
reference's. By inductor on a GPU; without one by aot_eager, which traces as much and compiles no
C++."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from chela_bench.kernels.chela import ChelaBlock
from chela_bench.reference import chela as reference
from tests.attention import DEVICE

pytestmark = [
    pytest.mark.filterwarnings(  # of the reference's FFTs
        "ignore:Torchinductor does not support code generation for complex operators"
    ),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32"),  # which are off
]
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"
KINDS = pytest.mark.parametrize(
    ("kind", "options"),
    [(ChelaBlock, {"implementation": "triton"}), (reference.ChelaBlock, {})],
    ids=["triton", "reference"],
)
CASES = [  # every value of every switch, in one of them
    {},
    {
        "causal": False, "order": "parallel", "num_heads": 2, "norm": "rms",
        "norm_position": "after", "masked": True,
    },
    {
        "causal": False, "gate_activation": "silu", "output_gate": False, "short_sizes": (),
        "long_kernel": "multiscale", "masked": True,
    },
    {
        "order": "parallel", "projection": "none", "attention_gate": False, "short_sizes": (5, 1),
        "long_kernel": "multiscale",
    },
]  # fmt: skip


def block(kind, *, projection="shared", **options):
    torch.manual_seed(0)
    key = {"d_key": 4} if projection == "shared" else {}
    made = kind(8, d_value=12, d_ff=12, max_length=40, projection=projection, **key, **options)
    return made.to(DEVICE)


def inputs(T, masked=False):
    x, dy = torch.randn(2, 1, T, 8, generator=torch.Generator().manual_seed(T)).to(DEVICE)
    mask = torch.arange(T)[None] < T - 3
    return x, mask.to(DEVICE) if masked else None, dy


def results(function, module, x, mask, dy):
    """y, then dx and the gradients of all parameters."""
    x = x.clone().requires_grad_()
    y = function(x, mask)
    leaves = [x, *module.parameters()]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True)]


def assert_same(found, right):
    """But for rounding: compiled, norms and sums of gradients are PyTorch's."""
    allowed = 1e-5 if BACKEND == "aot_eager" else 1e-2  # inductor's pointwise steps, and TF32
    for x, y in zip(found, right, strict=True):
        if y is None:
            assert x is None
        else:
            assert (x - y).norm() <= allowed * y.norm() + 1e-6


@KINDS
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_block_is_one_graph_and_gives_the_same(kind, options, case):
    torch._dynamo.reset()
    switches = dict(case)
    masked = switches.pop("masked", False)
    made = block(kind, **options, **switches)
    compiled = torch.compile(made, fullgraph=True, backend=BACKEND)
    given = inputs(20, masked)
    found = results(compiled, made, *given)
    assert_same(found, results(made, made, *given))


@KINDS
def test_other_lengths_are_taken(kind, options):
    """Of the kernels' one graph more, whatever the length below the direct sums' end; of the
    reference one for each, since the length of its FFT is chosen by T."""
    torch._dynamo.reset()
    made = block(kind, **options)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(made, fullgraph=True, backend=counter)
    lengths = (20, 33, 9) if kind is ChelaBlock else (20, 33)
    for T in lengths:
        given = inputs(T)
        found, right = (results(f, made, *given) for f in (compiled, made))
        assert_same(found, right)
    assert counter.frame_count == (2 if kind is ChelaBlock else len(lengths))


@KINDS
def test_under_autocast(kind, options):
    torch._dynamo.reset()
    made = block(kind, **options)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    given = inputs(20)
    with torch.autocast(DEVICE, torch.float16):
        found, right = (results(f, made, *given) for f in (compiled, made))
    assert found[0].dtype == right[0].dtype
    for x, y in zip(found, right, strict=True):
        assert x.dtype == y.dtype and (x - y).norm() <= 1e-2 * y.norm() + 1e-6
