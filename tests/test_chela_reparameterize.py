"""A reparameterized ChelaLayer: the same function, merged once, and never stale."""

from __future__ import annotations

import copy

import pytest
import torch

from chela_bench.errors import ArgumentError
from chela_bench.kernels import chela, chela_merged, short_long_conv, short_long_conv_ops
from chela_bench.kernels.chela import ChelaBlock, ChelaLayer
from chela_bench.kernels.short_long_conv import kernel_spectrum
from chela_bench.reference import chela as reference
from tests.attention import DEVICE
from tests.pairwise import pairwise
from tests.test_kernel_chela import BUDGET, FACTORS, assert_near, inputs, layers, results

N = 160
SMALL = {"d_key": 4, "d_value": 12}
NAMES = ("dtype", "causal", "order", "norm_position", "short_sizes", "long_kernel", "masked")
CASES = pairwise({**{name: FACTORS[name] for name in NAMES}, "T": [1, 20, 150]})
both_ways = pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
both_orders = pytest.mark.parametrize("order", ["serial", "parallel"])


def drawn(T=20, dtype=torch.float32):
    return inputs(dtype=dtype, T=T)[0]


def outputs(module, *arguments):
    with torch.no_grad():
        return module(*arguments)


def assert_exact(ours, exact, x, *arguments):
    right = outputs(exact, x.double(), *arguments)
    assert_near({"y": outputs(ours, x, *arguments)}, {"y": right}, BUDGET[x.dtype])


def reload(exact, ours):
    exact.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_same_output(case):
    options = dict(case)
    dtype, masked, T = (options.pop(name) for name in ("dtype", "masked", "T"))
    ours, exact = layers(dtype=dtype, max_length=N, **SMALL, **options)
    x = drawn(T, dtype)
    mask = torch.arange(T, device=DEVICE) < torch.tensor([[T], [T // 2]], device=DEVICE)
    mask = mask if masked else None
    ours.reparameterize()
    assert_exact(ours, exact, x, mask)


@both_ways
def test_parameters_and_state_dict_stay(causal):
    ours, exact = layers(causal=causal, **SMALL)
    before = dict(ours.state_dict(keep_vars=True))
    values = copy.deepcopy(ours.state_dict())
    ours.reparameterize()
    y = outputs(ours, drawn())
    ours.reparameterize()  # again is the same
    assert torch.equal(outputs(ours, drawn()), y)
    after = ours.state_dict(keep_vars=True)
    assert list(after) == list(before) == list(exact.state_dict())
    assert all(after[name] is before[name] for name in after)
    assert all(torch.equal(after[name], values[name]) for name in after)
    assert len(list(ours.parameters())) == len(list(exact.parameters()))
    assert not list(ours.buffers())


@both_ways
@both_orders
def test_a_forward_merges_and_transforms_nothing_again(order, causal, monkeypatch):
    ours, _ = layers(order=order, causal=causal, max_length=N, **SMALL)
    ours.reparameterize()
    x = drawn(130)
    y = outputs(ours, x)

    def never(*_, **__):
        raise AssertionError("work that is to be done already")

    for module, name in [
        (chela_merged, "MergedKernels"),
        (chela_merged, "kernel_spectrum"),
        (short_long_conv, "spectrum_of"),
        (short_long_conv, "added"),
        (short_long_conv_ops, "merge_taps"),
    ]:
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(chela, "MergedKernels", never)
    assert torch.equal(outputs(ours, x), y)


@both_ways
def test_spectra_of_the_last_two_lengths_are_kept(causal, monkeypatch):
    lengths = []

    def counting(kernel, T, **options):
        lengths.append(T)
        return kernel_spectrum(kernel, T, **options)

    monkeypatch.setattr(chela_merged, "kernel_spectrum", counting)
    ours, _ = layers(causal=causal, **SMALL)
    ours.reparameterize()
    for T in (20, 30, 20, 30, 20, 10, 20, 30):  # 10 takes the place of 30
        pair = ours._merged.spectra(T, torch.float32)
        assert pair["spectrum"].T == T and (pair["spectrum_future"] is None) == causal
    assert lengths[:: 1 if causal else 2] == [20, 30, 10, 30]
    ours._merged.spectra(30, torch.float16)
    assert len(lengths) == (5 if causal else 10)


def change_in_place(layer):
    with torch.no_grad():
        layer.long_kernel.mul_(1.5)
        layer.short_kernels[0].add_(0.25)


def train(layer):
    optimizer = torch.optim.SGD([*layer.short_kernels, layer.long_kernel], lr=1.0)
    for parameter in (*layer.short_kernels, layer.long_kernel):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def load(layer):
    state = {name: x + 0.1 for name, x in layer.state_dict().items()}
    layer.load_state_dict(state)


def load_others(layer):
    state = {name: x + 0.1 for name, x in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def replace(layer):
    layer.long_kernel = torch.nn.Parameter(layer.long_kernel.detach() * 1.5)


def go_through_data(layer):
    layer.long_kernel.data.mul_(1.5)
    layer.reparameterize()


@pytest.mark.parametrize(
    "change", [change_in_place, train, load, load_others, replace, go_through_data]
)
def test_it_follows_the_parameters(change):
    ours, exact = layers(order="parallel", **SMALL)
    ours.reparameterize()
    x = drawn()
    y = outputs(ours, x)
    change(ours)
    reload(exact, ours)
    assert not torch.allclose(outputs(ours, x), y, atol=1e-3)
    assert_exact(ours, exact, x)


@both_ways
def test_it_follows_conversions(causal):
    ours, exact = layers(causal=causal, **SMALL)
    ours.reparameterize()
    x = drawn()
    outputs(ours, x)
    ours.half().float()  # rounds
    reload(exact, ours)
    assert torch.equal(ours._merged.long[:, -1].half().float(), ours._merged.long[:, -1])
    assert_exact(ours, exact, x)
    ours.half()
    assert_exact(ours, exact, x.half())


def test_it_follows_a_container():
    ours, exact = layers(**SMALL)
    ours.reparameterize()
    outputs(ours, drawn())
    both = torch.nn.ModuleList([ours])
    both.load_state_dict({name: 1.1 * x for name, x in both.state_dict().items()})
    both.half()
    reload(exact, ours)
    assert_exact(ours, exact, drawn(dtype=torch.float16))


def test_a_copy_follows_its_own():
    ours, exact = layers(**SMALL)
    ours.reparameterize()
    x = drawn()
    y = outputs(ours, x)
    other = copy.deepcopy(ours)
    change_in_place(other)
    load(other)
    assert torch.equal(outputs(ours, x), y)
    reload(exact, other)
    assert_exact(other, exact, x)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_it_has_no_gradients_for_its_convolution(implementation):
    layer = ChelaLayer(8, d_key=4, max_length=40, implementation=implementation).to(DEVICE)
    layer.reparameterize()
    x = drawn()
    for module in (layer, layer.eval()):
        with pytest.raises(ArgumentError, match=r"restore\(\) it for training, use torch.no_grad"):
            module(x)
    y = outputs(layer, x)
    layer.restore()
    torch.testing.assert_close(layer(x).detach(), y, rtol=0, atol=1e-2 if DEVICE != "cpu" else 1e-5)
    assert layer(x).requires_grad


@both_ways
@both_orders
def test_other_gradients_are_right(order, causal):
    """Of a frozen convolution, also after inference mode has made what is kept."""
    ours, exact = layers(order=order, causal=causal, **SMALL)
    ours.reparameterize()
    x, dy = inputs(T=20)
    with torch.inference_mode():
        ours(x)
    for module in (ours, exact):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("kernel" not in name)

    def found(module, dtype):
        rows = x.to(dtype).requires_grad_()
        others = {name: p for name, p in module.named_parameters() if p.requires_grad}
        y = module(rows)
        gradients = torch.autograd.grad(y, [rows, *others.values()], dy.to(dtype))
        return dict(zip(["x", *others], gradients, strict=True))

    assert_near(found(ours, torch.float32), found(exact, torch.float64), BUDGET[torch.float32])


def test_restored_it_trains():
    ours, exact = layers(**SMALL)
    ours.reparameterize()
    outputs(ours, drawn())
    ours.restore()
    x, dy = inputs(T=20)
    right = results(exact, x.double(), dy.double())
    assert_near(results(ours, x, dy), right, BUDGET[torch.float32])


@pytest.mark.parametrize(("order", "causal"), [("serial", True), ("parallel", False)])
def test_compiled_whole_it_gives_the_same_bits(order, causal):
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    ours, _ = layers(order=order, causal=causal, max_length=N, **SMALL)
    ours.reparameterize()
    compiled = torch.compile(ours, fullgraph=True, backend=counting)
    x = drawn(150)
    for change in (None, load):
        if change is not None:
            change(ours)
        found = outputs(compiled, x)  # with nothing kept yet
        y = outputs(ours, x)
        assert torch.equal(found, y)
        assert torch.equal(outputs(compiled, x), y)
        assert torch.equal(outputs(compiled, x[:, :20]), outputs(ours, x[:, :20]))
        known = len(graphs)
        assert torch.equal(outputs(compiled, x), y)
        assert len(graphs) == known


def test_it_decodes():
    ours, exact = layers(**SMALL)
    ours.reparameterize()
    x = drawn(20)
    y, cache = ours.prefill(x[:, :18])
    y = torch.cat([y, *(ours.step(x[:, t], cache)[:, None] for t in (18, 19))], dim=1)
    assert_near({"y": y}, {"y": outputs(exact, x.double())}, BUDGET[torch.float32])


def test_a_block_asks_its_layer():
    ours, exact = layers(made=ChelaBlock, like=reference.ChelaBlock, **SMALL)
    x = drawn()
    y = outputs(ours, x)
    assert "reparameterized" not in repr(ours)
    ours.reparameterize()
    assert "reparameterized" in repr(ours)
    assert_exact(ours, exact, x)
    ours.restore()
    assert torch.equal(outputs(ours, x), y)


def test_where_the_reference_computes_nothing_is_merged():
    layer = ChelaLayer(8, d_key=4, max_length=40, implementation="reference").double()
    x = torch.randn(2, 37, 8, dtype=torch.float64)
    y = outputs(layer, x)
    layer.reparameterize()
    assert torch.equal(outputs(layer, x), y) and layer._merged is None
