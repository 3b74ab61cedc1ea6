"""Short-long convolution as PyTorch operators: torch.compile, checkpointing, autocast."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from chela_bench.errors import ArgumentError
from chela_bench.kernels import short_long_conv_ops as ops
from chela_bench.kernels.short_long_conv import (
    kernel_spectrum,
    long_conv,
    short_conv,
    short_long_conv,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = [{"method": "direct"}, {"method": "monarch", "N2": 16}, {"method": "factors", "N2": 16}]


def randn(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


def leaves(T=12, D=1):
    """x, a short kernel, the long one and its future, a gate."""
    shapes = [(1, T, D), (D, 3), (D, T), (D, T), (1, T, D)]
    return [randn(*shape).requires_grad_() for shape in shapes]


def whole(x, short, long, future, gate, **options):
    return short_long_conv(
        x,
        [short],
        long,
        causal=future is None,
        long_kernel_future=future,
        gate=gate,
        **options,
    )


def opcheck(operator, *arguments):
    torch.library.opcheck(operator.registered.default, arguments)


def test_the_merging_operator_keeps_pytorchs_rules():
    kernels = [randn(2, 3).requires_grad_(), randn(2, 5).half(), randn(5, 2).mT.requires_grad_()]
    opcheck(ops.merged, *kernels, None, 7, False, True)
    opcheck(ops.merged, kernels[0], None, None, None, 3, True, False)


@pytest.mark.parametrize(
    ("activation", "has_past", "tokens"),
    [(True, False, (True, False)), (True, True, (True, True)), (False, False, (False, True))],
)
def test_the_short_operator_keeps_pytorchs_rules(activation, has_past, tokens):
    x, weight = randn(1, 3, 2).mT, randn(2, 3).requires_grad_()
    past, ahead = (randn(1, 2, 2), 0) if has_past else (None, 1)
    opcheck(ops.short, x, weight, past, activation, ahead, *tokens)
    opcheck(ops.short, x.requires_grad_(), weight, past, activation, ahead, *tokens)


@pytest.mark.parametrize("config", WAYS, ids=str)
def test_the_long_operator_keeps_pytorchs_rules(config):
    x, gate = randn(1, 2, 8).requires_grad_(), randn(1, 2, 8)
    for taps, adjoint, g, exact_head in ((5, False, gate, 3), (20, True, None, 0)):
        kernel = randn(2, taps).requires_grad_()
        spectrum = kernel_spectrum(kernel, 8, config=config)
        arguments = spectrum.values, spectrum.scale, g, spectrum.method, adjoint, not adjoint
        opcheck(ops.long, x, kernel, *arguments, exact_head)


@pytest.mark.parametrize("gated", [False, True])
def test_the_product_operator_keeps_pytorchs_rules(gated):
    z, gate = randn(1, 3, 8).requires_grad_(), randn(1, 3, 8) if gated else None
    opcheck(ops.products, z, gate, False, True)
    if gate is not None:
        opcheck(ops.products, z.detach(), gate.requires_grad_(), True, False)


@pytest.mark.parametrize("method", ["monarch", "factors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_spectrum_operator_keeps_pytorchs_rules(dtype, method):
    operator = torch.ops.chela_bench.long_conv_spectrum.default
    torch.library.opcheck(operator, (randn(2, 20), 30, 16, method, dtype))


@pytest.mark.parametrize(("order", "two_sided"), [("serial", True), ("parallel", False)])
@pytest.mark.parametrize("config", WAYS, ids=str)
def test_compiled_whole_gives_the_same_bits(order, two_sided, config):
    torch._dynamo.reset()
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    inputs = leaves()
    if not two_sided:
        inputs[3] = None
    trained = [x for x in inputs if x is not None]
    results = []
    for function in (whole, compiled):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            z = function(*inputs, order=order, config=config)
        results.append([z, *torch.autograd.grad(z.square().sum(), trained)])
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)


@pytest.mark.parametrize("order", ["serial", "parallel"])
def test_compiled_with_many_short_kernels(order):
    torch._dynamo.reset()

    def many(x, long, *short):
        return short_long_conv(x, short, long, order=order, config=WAYS[0])

    x, long = leaves()[0], randn(1, 12).half().requires_grad_()
    short = [randn(1, 1 + i).to([torch.float32, torch.half][i % 2]) for i in range(5)]
    inputs = [x, long, *[kernel.requires_grad_() for kernel in short]]
    results = []
    for function in (many, torch.compile(many, fullgraph=True, backend="aot_eager")):
        z = function(*inputs)
        results.append([z, *torch.autograd.grad(z.square().sum(), inputs)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("config", WAYS, ids=str)
def test_compiled_with_a_spectrum_from_outside_and_from_inside(config):
    x, _, long, _, gate = (x.detach() for x in leaves())

    def inside(x, long, gate):
        spectrum = kernel_spectrum(long, 12, config=config)
        return long_conv(x, long, spectrum=spectrum, gate=gate, layout="btd")

    def outside(x, long, gate, spectrum):
        return long_conv(x, long, spectrum=spectrum, gate=gate, exact_head=4)

    spectrum = kernel_spectrum(long, 12, config=config)
    for function, arguments in ((inside, ()), (outside, (spectrum,))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        eager = function(x, long, gate, *arguments)
        assert torch.equal(compiled(x, long, gate, *arguments), eager)


@pytest.mark.parametrize("trained", [False, True])
def test_a_compiled_step_updates_the_state(trained):
    def step(x, short, state):
        return short_conv(x, [short], state=state)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, short = leaves(T=3)[:2]
    states = [randn(1, 1, 2), randn(1, 1, 2)]
    results = []
    for function, state in zip((step, compiled), states, strict=True):
        with torch.set_grad_enabled(trained):
            y = function(x, short, state)
        gradients = torch.autograd.grad(y.sum(), [x, short]) if trained else ()
        results.append([y, *gradients, state])
    assert all(map(torch.equal, *results))
    assert torch.equal(states[0], x.detach().mT[..., 1:])


def test_compiled_with_dynamic_lengths_compiles_a_few_times():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole, fullgraph=True, backend=counter, dynamic=True)
    for T in (20, 33, 47, 60):
        inputs = leaves(T)
        inputs[3] = None
        assert torch.equal(compiled(*inputs), whole(*inputs))
    assert counter.frame_count <= 2


def test_recomputed_in_the_backward():
    inputs = leaves()
    kept, recomputed = (
        torch.autograd.grad(z.sum(), inputs)
        for z in (whole(*inputs), checkpoint(whole, *inputs, use_reentrant=False))
    )
    assert all(map(torch.equal, kept, recomputed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_takes_any_mixture(dtype):
    x, short, long, future, gate = leaves()
    with torch.autocast(DEVICE, dtype):
        z = whole(x, short, long, future, gate.to(dtype))
        y = short_conv(x.double().detach(), [short])
        spectrum = kernel_spectrum(long, 12, dtype=dtype)
        assert torch.equal(long_conv(x, long, spectrum=spectrum), long_conv(x, long))
    assert z.dtype == y.dtype == dtype
    gradients = torch.autograd.grad(z.float().sum(), [x, short, long, future, gate])
    assert {x.dtype for x in gradients} == {torch.float32}


@pytest.mark.parametrize("i", [0, 1, 2, 4])  # x, the short kernel, the long one, the gate
def test_a_second_derivative_is_refused(i):
    inputs = leaves()
    [first] = torch.autograd.grad(whole(*inputs).square().sum(), [inputs[i]], create_graph=True)
    with pytest.raises(ArgumentError, match=r"of \w+, got a second one: .*\.reference"):
        first.sum().backward()


def test_only_what_is_trained_gets_a_gradient():
    inputs = leaves()
    every = torch.autograd.grad(whole(*inputs).sum(), inputs)
    for i, wanted in enumerate(every):
        trained = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        [alone] = torch.autograd.grad(whole(*trained).sum(), [trained[i]])
        torch.testing.assert_close(alone, wanted)


def test_what_is_saved():
    """x and u in series, x in parallel, the gate where it is fixed and its factor where it is not;
    beside them only kernels."""
    B, T, D = 3, 32, 1
    x, short, long = randn(B, T, D), randn(D, 3), randn(D, 3)
    gate = randn(B, T, D)
    for order, trained_gate, wanted in (
        ("serial", None, 2), ("parallel", None, 1), ("serial", False, 3), ("serial", True, 4),
    ):  # fmt: skip
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        leaves = [tensor.clone().requires_grad_() for tensor in (x, short, long)]
        g = None if trained_gate is None else gate.clone().requires_grad_(trained_gate)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            short_long_conv(leaves[0], [leaves[1]], leaves[2], gate=g, order=order)
        large = {tensor.data_ptr() for tensor in saved if tensor.numel() >= x.numel()}
        assert len(large) == wanted


def test_a_tensor_that_outlived_its_transform_is_taken():
    kept = []
    x, short, long, _, _ = leaves()
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(x.detach())
    z = whole(kept[0], short, long, None, None)
    assert torch.equal(z, whole(x, short, long, None, None))
    z.sum().backward()
    assert short.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("T", [300, 2000, 9000])
def test_a_cuda_graph_replays_it(T):
    inputs = [x.detach().half().requires_grad_() for x in leaves(T, D=8)]

    def step(inputs):
        z = whole(*inputs)
        return [z, *torch.autograd.grad(z.float().square().mean(), inputs)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs)
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    afresh = [x.detach().requires_grad_() for x in inputs]
    for replayed, eager in zip(captured, step(afresh), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.gpu
def test_a_new_length_or_batch_compiles_nothing():
    from chela_bench.kernels import (
        long_conv_direct,
        long_conv_factors,
        long_conv_monarch,
        merged_taps,
        short_conv,
        transposed_product,
    )
    from chela_bench.kernels.launching import Launcher

    modules = (
        long_conv_direct,
        long_conv_factors,
        long_conv_monarch,
        merged_taps,
        short_conv,
        transposed_product,
    )
    launchers = [x for m in modules for x in vars(m).values() if isinstance(x, Launcher)]

    def compiled():
        return [sum(len(c[0]) for c in x.kernel.device_caches.values()) for x in launchers]

    def run(B, T):
        x, short, long, future, gate = (tensor.detach().half() for tensor in leaves(T, D=8))
        inputs = [x.expand(B, -1, -1).contiguous(), short, long, future]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        whole(*inputs, gate.expand(B, -1, -1).contiguous()).sum().backward()

    for lengths in (
        (200, 216, 221),
        (1032, 2000, 1999),
        (9000, 11000, 9001),
        (70000, 71000, 70001),
    ):
        for B in (1, 2):  # dk of one sequence is a convolution, of more a sum
            for T in lengths[1:]:  # a multiple of 8, and none
                run(B, T)
        before = compiled()
        for B, T in ((1, lengths[0] + 8), (3, lengths[0]), (4, lengths[2] - 2)):
            run(B, T)
        assert compiled() == before
