"""The gates as PyTorch's operators: its rules, compiled, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from chela_bench.errors import ArgumentError
from chela_bench.kernels import gates_ops as ops
from chela_bench.kernels.queries_keys_ops import _queries_keys
from tests.gates import (
    EPS,
    FUNCTIONS,
    SHRINK,
    drawn,
    functions,
    inputs_of,
    with_gradients,
)


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
