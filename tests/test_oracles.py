"""bench/oracles.py: the references, in parts."""

from __future__ import annotations

import pytest
import torch

from chela_bench.bench import adapters, oracles
from chela_bench.reference.chela import ChelaLayer
from chela_bench.reference.short_long_conv import long_conv
from tests.test_peers import parameters_of


def results(function, *inputs, **options):
    """Output and every input's gradient."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves, **options)
    weight = torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, weight)]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(oracles, "_VALUES", 5)
    monkeypatch.setattr(oracles, "_CHANNELS", 3)


def test_the_layer_in_parts_is_the_reference(small_parts):
    torch.manual_seed(0)
    parameters = parameters_of(ChelaLayer(16, d_key=4, d_value=32, max_length=150).double())
    x = torch.randn(2, 130, 16, dtype=torch.float64)

    def of(layer):
        return lambda x, *values: layer(x, dict(zip(parameters, values, strict=True)))

    exact = results(of(adapters.reference_layer), x, *parameters.values())
    found = results(of(oracles.chela_layer), x, *parameters.values())
    names = ["o", "dx", *(f"d{name}" for name in parameters)]
    for name, one, other in zip(names, found, exact, strict=True):
        torch.testing.assert_close(one, other, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(oracles.chela_layer(x, parameters), exact[0])


def test_the_long_convolution_in_parts_is_the_reference(small_parts):
    x, kernel = torch.randn(2, 7, 60).double(), torch.randn(7, 60).double()
    exact = results(long_conv, x, kernel, layout="bdt")
    torch.testing.assert_close(results(oracles.long_conv, x, kernel), exact)


def test_what_a_part_computes_is_not_kept(small_parts):
    """For the way back of the layer: boundaries between parts, and parameters."""
    torch.manual_seed(0)
    parameters = parameters_of(ChelaLayer(16, d_key=4, d_value=32, max_length=150).double())
    x = torch.randn(2, 130, 16, dtype=torch.float64, requires_grad=True)
    parameters = {name: p.requires_grad_() for name, p in parameters.items()}
    kept = {}

    def bytes_kept(layer):
        kept.clear()

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x, parameters)
        return sum(kept.values())

    assert bytes_kept(oracles.chela_layer) < bytes_kept(adapters.reference_layer) / 3
