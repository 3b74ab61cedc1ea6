"""bench/peers.py: what is composed of other people's parts is the same function."""

import pytest
import torch

from chela_bench.bench import peers
from chela_bench.bench.adapters import reference_layer, reference_softmax_layer
from chela_bench.reference.chela import ChelaLayer
from chela_bench.reference.linear_attention import chunked
from chela_bench.reference.softmax_attention import softmax_attention
from chela_bench.reference.softmax_layer import SoftmaxLayer


def parameters_of(module):
    torch.manual_seed(0)
    return {
        name: parameter.detach() + 0.1 * torch.randn_like(parameter)
        for name, parameter in module.named_parameters()
    }


def test_the_composed_layer_is_the_layer(monkeypatch):
    monkeypatch.setattr(peers, "fla_chunk", lambda q, k, v: chunked(q, k, v)[0])
    layer = ChelaLayer(16, d_key=4, d_value=32, max_length=50)
    parameters, x = parameters_of(layer), torch.randn(2, 50, 16)
    exact = reference_layer(x.double(), {name: p.double() for name, p in parameters.items()})
    torch.testing.assert_close(
        peers.composed_layer(x, parameters).double(), exact, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn"])
def test_softmax_layers_are_the_reference(name, monkeypatch):
    monkeypatch.setattr(peers, name, lambda q, k, v: softmax_attention(q, k, v))
    parameters, x = parameters_of(SoftmaxLayer(256, 2)), torch.randn(2, 20, 256)
    exact = reference_softmax_layer(
        x.double(), {name: p.double() for name, p in parameters.items()}
    )
    y = getattr(peers, f"{name}_layer")(x, parameters)
    torch.testing.assert_close(y.double(), exact, atol=1e-4, rtol=0)
