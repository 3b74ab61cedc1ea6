"""Steps of decoding as a CUDA graph: kernels/chela_graph.py, and what of it needs no GPU."""

from __future__ import annotations

import pytest
import torch

from chela_bench.errors import ArgumentError
from chela_bench.kernels.chela import ChelaBlock, ChelaLayer
from chela_bench.kernels.chela_graph import StepGraph
from chela_bench.reference import chela as reference
from tests.attention import DEVICE
from tests.test_chela_decode import SMALL, N, drawn, states, steps
from tests.test_kernel_chela import BUDGET, assert_near, layers

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_orders = pytest.mark.parametrize("order", ["serial", "parallel"])


def replays(module, x, cache):
    """As a graph would run it: what is captured launches the same again and again."""
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        with cache.captured():
            y[:, t] = module.step(x[:, t], cache)
        with cache.replay():
            pass
    return y


@pytest.mark.parametrize(
    ("order", "dtype"), [("serial", torch.float16), ("parallel", torch.float32)], ids=str
)
def test_what_is_captured_is_a_step_at_any_position(order, dtype):
    """Past the end of a block, after a step and a prompt between, and after a reset."""
    ours, exact = layers(dtype=dtype, max_length=N, order=order, **SMALL)
    x = drawn(69, dtype)
    whole = exact(x.double()).detach()
    y, cache = ours.prefill(x[:, :62])
    parts = [
        y,
        replays(ours, x[:, 62:65], cache),
        steps(ours, x[:, 65:66], cache),
        ours.prefill(x[:, 66:68], cache)[0],
        replays(ours, x[:, 68:], cache),
    ]
    assert cache.position == 69
    assert_near({"y": torch.cat(parts, dim=1)}, {"y": whole}, BUDGET[dtype])
    cache.reset()
    y = replays(ours, x[:, :2], cache)
    assert_near({"y": y}, {"y": whole[:, :2]}, BUDGET[dtype])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_captured_step_gives_the_bits_of_a_step(dtype):
    ours, _ = layers(dtype=dtype, max_length=N, **SMALL)
    x = drawn(67, dtype)
    caches = [ours.prefill(x[:, :62])[1] for _ in range(2)]
    y = steps(ours, x[:, 62:], caches[0])
    assert torch.equal(replays(ours, x[:, 62:], caches[1]), y)
    assert all(map(torch.equal, *map(states, caches)))


def test_a_warm_up_leaves_nothing():
    ours, _ = layers(max_length=N, **SMALL)
    x = drawn(64)
    cache = ours.prefill(x[:, :63])[1]
    before = [state.clone() for state in states(cache)]
    for _ in range(2):
        with cache.unchanged():
            ours.step(x[:, 0], cache)
    assert cache.position == 63 and all(map(torch.equal, states(cache), before))
    fresh = ours.prefill(x[:, :63])[1]
    assert torch.equal(replays(ours, x[:, 63:], cache), steps(ours, x[:, 63:], fresh))


def test_a_prompt_is_not_captured():
    ours, _ = layers(max_length=N, **SMALL)
    cache = ours.prefill(drawn(3))[1]
    with cache.captured(), pytest.raises(ArgumentError, match=r"wanted one token .*got 2"):
        ours.prefill(drawn(2), cache)


def test_a_replay_that_breaks_leaves_a_cache_that_says_so():
    ours, _ = layers(max_length=N, **SMALL)
    cache = ours.prefill(drawn(3))[1]
    with pytest.raises(ZeroDivisionError), cache.replay():
        raise ZeroDivisionError
    for call in (cache.check_room, lambda: ours.step(drawn(1)[:, 0], cache)):
        with pytest.raises(ArgumentError, match="left half updated; reset"):
            call()
    cache.reset()
    cache.check_room()


def test_a_full_cache_has_no_room():
    ours, _ = layers(max_length=5, **SMALL)
    cache = ours.prefill(drawn(4))[1]
    cache.check_room()
    ours.step(drawn(1)[:, 0], cache)
    with pytest.raises(ArgumentError, match="at most max_length = 5 tokens, got 1 after 5"):
        cache.check_room()


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_is_refused():
    ours, _ = layers(**SMALL)
    cache = ours.prefill(drawn(3))[1]
    with pytest.raises(ArgumentError, match="wanted x on a GPU for a CUDA graph, got cpu"):
        StepGraph(lambda x: ours.step(x, cache), drawn(1)[:, 0], [cache])


@pytest.mark.gpu
@dtypes
@both_orders
@pytest.mark.parametrize("made", [ChelaLayer, ChelaBlock])
def test_a_graph_gives_the_bits_of_steps(made, order, dtype):
    like = reference.ChelaLayer if made is ChelaLayer else reference.ChelaBlock
    ours, exact = layers(
        D=64, dtype=dtype, made=made, like=like, max_length=N, order=order, d_key=32
    )
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 140, 64, generator=generator).to(DEVICE, dtype)
    caches = [ours.prefill(x[:, :60])[1] for _ in range(2)]
    graph = StepGraph(lambda x: ours.step(x, caches[0]), x[:, 0], caches[:1])
    assert caches[0].position == 60
    for t in range(60, 140):  # squares of 64 and 128 tokens come due
        if t == 100:
            y, right = (ours.prefill(x[:, 100:105], cache)[0] for cache in caches)
            assert torch.equal(y, right)
        if not 100 <= t < 105:
            assert torch.equal(graph(x[:, t]), ours.step(x[:, t], caches[1]))
    assert all(map(torch.equal, *map(states, caches)))
    caches[0].reset()
    y = torch.stack([graph(x[:, t]) for t in range(70)], dim=1)
    right = exact(x[:, :70].double()).detach()
    assert_near({"y": y}, {"y": right}, BUDGET[dtype])


@pytest.mark.gpu
def test_one_graph_of_a_stack():
    torch.manual_seed(0)
    stack = [ChelaBlock(64, d_key=32, max_length=N).cuda().bfloat16() for _ in range(3)]
    x = torch.randn(2, 70, 64, device=DEVICE, dtype=torch.bfloat16)

    def prefilled():
        y, caches = x[:, :60], []
        for block in stack:
            y, cache = block.prefill(y)
            caches.append(cache)
        return caches

    def step(x, caches):
        for block, cache in zip(stack, caches, strict=True):
            x = block.step(x, cache)
        return x

    caches, others = prefilled(), prefilled()
    graph = StepGraph(lambda x: step(x, caches), x[:, 0], caches)
    for t in range(60, 70):
        assert torch.equal(graph(x[:, t]), step(x[:, t], others))


@pytest.mark.gpu
def test_a_graph_refuses_what_it_cannot_repeat():
    ours, _ = layers(max_length=5, **SMALL)
    x = drawn(5)
    cache = ours.prefill(x[:, :4])[1]
    graph = StepGraph(lambda x: ours.step(x, cache), x[:, 0], [cache])
    for bad in (x[:1, 0], x[:, 0].half(), x[:, 0].cpu()):
        with pytest.raises(ArgumentError, match="as the graph was captured with"):
            graph(bad)
    graph(x[:, 4])
    for call in (
        lambda: graph(x[:, 0]),
        lambda: StepGraph(lambda x: ours.step(x, cache), x[:, 0], [cache]),
    ):
        with pytest.raises(ArgumentError, match="at most max_length = 5 tokens, got 1 after 5"):
            call()
    plain = ChelaLayer(8, max_length=40, implementation="reference", **SMALL).cuda()
    history = plain.prefill(x)[1]
    for caches, named in (([history], "got HistoryCache"), ([], "got none")):
        with pytest.raises(ArgumentError, match=named):
            StepGraph(lambda x: plain.step(x, history), x[:, 0], caches)
