"""bench/adapters.py: what is kept between calls, and when it is made again."""

from __future__ import annotations

import copy

import pytest
import torch

from chela_bench.bench import adapters
from chela_bench.bench.adapters import kept, merged_layer, reference_layer
from chela_bench.kernels import chela
from chela_bench.reference.chela import ChelaLayer
from tests.test_peers import parameters_of


def test_what_is_kept_is_made_once_and_again_for_another_number():
    tensor, other, made = torch.zeros(2), torch.zeros(3), []

    def make():
        assert not torch.is_grad_enabled()
        made.append(None)
        return len(made)

    def call(other=other):
        return kept(tensor, "sum", make, other)

    assert [call(), call(), kept(tensor, "another", make)] == [1, 1, 2]
    tensor.add_(1)
    assert [call(), call()] == [3, 3]
    other.add_(1)
    assert [call(), call()] == [4, 4]
    assert call(other.clone()) == 5


class Merging(ChelaLayer):
    """The reference with a merge that counts, where the kernels' layer would stand."""

    merges = 0

    def __init__(self, *sizes, implementation, **options):
        assert implementation == "triton"
        super().__init__(*sizes, **options)

    def reparameterize(self):
        assert not self.training
        Merging.merges += 1
        [width] = {kernel.shape[1] for kernel in list(self.short_kernels)[1:]}
        first, last = (kernel.data for kernel in self.short_kernels)
        merged = last.clone()
        merged[:, : first.shape[1]] += first
        assert width == merged.shape[1]
        self.short_kernels = torch.nn.ParameterList([merged])


@pytest.fixture
def merging(monkeypatch):
    monkeypatch.setattr(chela, "ChelaLayer", Merging)
    Merging.merges = 0
    adapters._chela_module.cache_clear()
    yield
    adapters._chela_module.cache_clear()


def inputs():
    torch.manual_seed(0)
    layer = ChelaLayer(16, d_key=4, d_value=32, max_length=50)
    return torch.randn(2, 50, 16).double(), parameters_of(layer.double())


@torch.no_grad()
def test_the_merge_is_made_once_and_again_for_new_parameters(merging):
    x, parameters = inputs()
    for _ in range(3):
        torch.testing.assert_close(merged_layer(x, parameters), reference_layer(x, parameters))
    assert Merging.merges == 1
    for name, parameter in parameters.items():
        parameter.copy_(torch.randn_like(parameter))
        exact = reference_layer(x, parameters)
        torch.testing.assert_close(merged_layer(x, parameters), exact, msg=name)
    assert Merging.merges == 1 + len(parameters)
    others = copy.deepcopy(parameters)
    torch.testing.assert_close(merged_layer(x, others), reference_layer(x, others))


@torch.no_grad()
def test_merging_leaves_the_parameters_as_they_are(merging):
    x, parameters = inputs()
    before = copy.deepcopy(parameters)
    merged_layer(x, parameters)
    assert parameters.keys() == before.keys()
    assert all(torch.equal(parameters[name], before[name]) for name in before)
