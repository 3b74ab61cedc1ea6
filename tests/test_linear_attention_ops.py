"""Linear attention as a PyTorch operator: torch.compile, checkpointing, autocast, CUDA graphs."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from chela_bench.errors import ArgumentError
from chela_bench.kernels import linear_attention as module
from chela_bench.kernels import linear_attention_ops as ops
from chela_bench.kernels import linear_attention_walk as walks
from chela_bench.kernels.linear_attention import linear_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def leaves(T=20, H=1, K=16, V=16):
    generator = torch.Generator().manual_seed(T)
    shapes = [(1, T, H, K), (1, T, H, K), (1, T, H, V), (1, H, K, V)]
    tensors = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    return [x.requires_grad_() for x in tensors]


def both(q, k, v, state):
    return linear_attention(q, k, v, initial_state=state, output_final_state=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("segments", "pieces", "sweep", "keep"), [(1, 1, 0, -1), (2, 2, 1, -1), (2, 1, -1, 1)]
)
@pytest.mark.parametrize("has_state", [True, False])
def test_the_operator_keeps_pytorchs_rules(causal, segments, pieces, has_state, sweep, keep):
    q, k, v, state = leaves(V=64 if keep == 1 else 16)
    options = [16, -1, -1, -1, sweep, -1, keep if causal else -1]
    arguments = (q, k, v, state if has_state else None, None, 0.25, has_state, causal, False)
    torch.library.opcheck(
        torch.ops.chela_bench.linear_attention_forward.default,
        (*arguments, segments, pieces, options),
    )


def test_compiled_whole_gives_the_same_bits():
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    inputs = leaves()
    results = []
    for function in (both, compiled):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            o, final = function(*inputs)
        results.append([o, final, *torch.autograd.grad(o.sum() + final.sum(), inputs)])
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)


def test_compiled_with_dynamic_lengths_compiles_a_few_times():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, fullgraph=True, backend=counter, dynamic=True)
    for T in (20, 33, 47, 60):
        inputs = leaves(T)
        assert torch.equal(compiled(*inputs)[0], both(*inputs)[0])
    assert counter.frame_count <= 2


def test_the_plan_for_hopper_can_be_traced(monkeypatch):
    """The model of times cannot: its choice would be compiled for each T."""
    monkeypatch.setattr(module, "has_wgmma", lambda _: True)
    monkeypatch.setattr(module, "suits_wgmma", lambda *_: True)
    monkeypatch.setattr(module, "processors", lambda _: 132)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_attention, fullgraph=True, backend=counter, dynamic=True)
    for T in (1100, 1300):
        q, k, v, _ = leaves(T)
        o = compiled(q, k, v)[0]
        assert torch.allclose(o, linear_attention(q, k, v)[0], rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


def test_recomputed_in_the_backward():
    inputs = leaves()
    kept, recomputed = (
        torch.autograd.grad(o.sum() + final.sum(), inputs)
        for o, final in (both(*inputs), checkpoint(both, *inputs, use_reentrant=False))
    )
    assert all(map(torch.equal, kept, recomputed))


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_autocast_takes_any_mixture(dtype):
    q, k, v, state = leaves()
    with torch.autocast(DEVICE, dtype):
        o, final = both(q, k.to(dtype), v, state)
    assert o.dtype == dtype and final.dtype == torch.float32
    gradients = torch.autograd.grad(o.float().sum(), [q, v, state])
    assert {x.dtype for x in gradients} == {torch.float32}


def test_a_second_derivative_is_refused():
    q, k, v, state = leaves()
    [dq] = torch.autograd.grad(both(q, k, v, state)[0].square().sum(), [q], create_graph=True)
    with pytest.raises(ArgumentError, match=r"a second one: .*reference\.linear_attention"):
        dq.sum().backward()


def test_only_the_final_state_is_used():
    q, k, v, state = leaves()
    final = both(q, k, v, state)[1]
    dk, dstate = torch.autograd.grad(final.sum(), [k, state])
    assert torch.allclose(dk, v.sum(-1, keepdim=True).expand_as(k), atol=1e-5)
    assert torch.equal(dstate, torch.ones_like(dstate))


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["fused", "split"])
def test_a_cuda_graph_replays_it(schedule):
    inputs = leaves(T=300, H=2, K=64, V=64)

    def step(inputs):
        o, final = linear_attention(
            *inputs[:3], initial_state=inputs[3], output_final_state=True, schedule=schedule
        )
        return [o, final, *torch.autograd.grad(o.sum() + final.sum(), inputs)]

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
    afresh = [
        x.detach().requires_grad_() for x in inputs
    ]  # their gradients belong to no stream yet
    for replayed, eager in zip(captured, step(afresh), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.gpu
def test_a_new_length_batch_or_number_of_heads_compiles_nothing():
    from chela_bench.kernels import linear_attention_walk as module

    kernels = [
        module._linear_attention_walk_kernel,
        module._linear_attention_sum_kernel,
        module._linear_attention_scan_kernel,
    ]

    def compiled():
        return [sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels]

    def run(B, T, H, K):
        q, k, v = (torch.randn(B, T, H, K, device="cuda", requires_grad=True) for _ in range(3))
        for schedule in ("fused", "split"):
            linear_attention(q, k, v, schedule=schedule)[0].sum().backward()

    for K in (64, 60):
        run(1, 256, 2, K)
        before = compiled()
        for shape in [(1, 1000, 2, K), (2, 1, 2, K), (3, 130, 1, K), (1, 129, 16, K)]:
            run(*shape)
        assert compiled() == before


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("schedule", ["fused", "split"])
def test_the_walk_known_beforehand_is_the_one_that_it_would_plan(monkeypatch, causal, schedule):
    planned = []

    def walk(q, k, v, o, call, *, plan, **states):
        walks.walk(q, k, v, o, call, plan=plan, **states)
        strides = [x.stride() for x in (q, k, v, o)]
        wanted = walks.walk_plan(
            q.shape, v.shape[-1], *strides, q.dtype, q.device, call.scale, call.N, call.segments,
            call.pieces, call.options, call.precise, call.causal, False, call.packed,
            states.get("initial") is not None, states.get("final") is not None, False,
            states.get("kept") is not None,
        )  # fmt: skip
        assert plan in (None, wanted)
        planned.append(plan is not None)

    monkeypatch.setattr(ops, "walk", walk)
    q, k, v, state = leaves(T=20, H=2)
    options = {"causal": causal, "schedule": schedule}
    heads_first = v.transpose(1, 2).contiguous().transpose(1, 2)
    for given, final in ((None, False), (state, True)):
        linear_attention(q, k, v, initial_state=given, output_final_state=final, **options)
        linear_attention(q, k, heads_first, initial_state=given, **options)
    assert planned == [True] * 4
    columns = v.transpose(2, 3).contiguous().transpose(2, 3)  # to be copied
    linear_attention(q, k, columns, **options)
    bounds = torch.tensor([0, 7, 20], device=DEVICE)
    linear_attention(q, k, v, cu_seqlens=bounds, **options)
    assert planned[4:] == [False] * 2


def test_a_tensor_that_outlived_its_transform_is_taken():
    kept = []
    q, k, v, _ = leaves()
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(q.detach())
    o = linear_attention(kept[0], k, v)[0]
    assert torch.equal(o, linear_attention(q, k, v)[0])
    o.sum().backward()
    assert k.grad is not None
