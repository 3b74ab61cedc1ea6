"""kernels/projections.py: the same values and gradients as nn.Linear's, on any device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chela_bench.errors import ArgumentError
from chela_bench.kernels.projections import add_product, called, can_project, projected


def drawn(*size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(dtype)


def new_maps(*widths, D=6, bias=True, dtype=torch.float64):
    maps = [nn.Linear(D, width, bias=bias, dtype=dtype) for width in widths]
    with torch.no_grad():
        for seed, linear in enumerate(maps):
            for parameter in linear.parameters():
                parameter.copy_(drawn(*parameter.shape, seed=seed + 3))
    return maps


def gradients(outputs, leaves):
    upstream = [drawn(*y.shape, seed=20 + i).to(y.dtype) for i, y in enumerate(outputs)]
    return torch.autograd.grad(outputs, leaves, upstream)


def test_several_products_of_one_x_match_pytorchs():
    """x goes through a chain; the bias's gradient is the sum of out's, made by whoever takes it."""
    maps, x = new_maps(4, 3, 5), drawn(2, 7, 6, seed=1).requires_grad_()
    outs, after = [], x
    for linear in maps:
        out, after, [bias] = projected(after, linear)
        assert bias is linear.bias
        outs.append(out)
    outs.append(after.sin())
    wanted = [linear(x) for linear in maps] + [x.sin()]
    for out, exact in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, exact)
    leaves = [x, *[linear.weight for linear in maps]]
    torch.testing.assert_close(gradients(outs, leaves), gradients(wanted, leaves))


def test_maps_side_by_side_are_one_product():
    maps, x = new_maps(4, 3), drawn(2, 7, 6, seed=1).requires_grad_()
    both = projected(x, *maps)
    wanted = torch.cat([linear(x) for linear in maps], dim=-1)
    torch.testing.assert_close(both.out, wanted)
    assert both.biases == (maps[0].bias, maps[1].bias)
    leaves = [x, *[linear.weight for linear in maps]]
    torch.testing.assert_close(gradients([both.out], leaves), gradients([wanted], leaves))


def test_a_bias_beside_none():
    [first], [second] = new_maps(4), new_maps(3, bias=False)
    x = drawn(5, 6)
    both = projected(x, second, first)
    torch.testing.assert_close(both.out, torch.cat([second(x), first(x)], dim=-1))
    assert both.biases == (None, first.bias)


def test_a_product_is_added_to_the_first_columns():
    maps, [U] = new_maps(4, 3), new_maps(4, D=9, bias=False)
    x, m = drawn(2, 7, 6, seed=1).requires_grad_(), drawn(2, 7, 9, seed=2).requires_grad_()
    out = projected(x, *maps).out
    at = out.data_ptr()
    out = add_product(out, m, U)
    assert out.data_ptr() == at
    wanted = torch.cat([maps[0](x) + U(m), maps[1](x)], dim=-1)
    torch.testing.assert_close(out, wanted)
    leaves = [x, m, U.weight, *[linear.weight for linear in maps]]
    torch.testing.assert_close(gradients([out], leaves), gradients([wanted], leaves))


@pytest.mark.parametrize("trained", ["x", "weight", "m", "U"])
def test_only_what_is_trained_gets_a_gradient(trained):
    [linear], [U] = new_maps(4), new_maps(4, D=9, bias=False)
    leaves = {"x": drawn(7, 6), "m": drawn(7, 9), "weight": linear.weight, "U": U.weight}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)
    linear.bias.requires_grad_(False)
    out, after, [bias] = projected(leaves["x"], linear)
    assert bias is None and after.requires_grad == (trained == "x")
    found = gradients([add_product(out, leaves["m"], U)], [leaves[trained]])
    wanted = gradients([linear(leaves["x"]) + U(leaves["m"])], [leaves[trained]])
    torch.testing.assert_close(found, wanted)


def test_gradients_that_nobody_asks_for_are_none():
    [linear], x = new_maps(4), drawn(7, 6).requires_grad_()
    out, after, _ = projected(x, linear)
    [dx] = torch.autograd.grad(after.sum(), x, retain_graph=True)
    assert torch.equal(dx, torch.ones_like(x))
    torch.testing.assert_close(gradients([out], [x]), gradients([linear(x)], [x]))


def test_a_backward_can_run_again():
    [linear], x = new_maps(4), drawn(7, 6).requires_grad_()
    out, after, _ = projected(x, linear)
    total = out.sum() + after.square().sum()
    first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_rows_strided_as_they_may_be():
    [linear] = new_maps(4)
    x = drawn(6, 7).requires_grad_()
    out, after, _ = projected(x.T, linear)
    wanted = linear(x.T)
    torch.testing.assert_close(out, wanted)
    found = gradients([out, after.T.sin()], [x, linear.weight])
    torch.testing.assert_close(found, gradients([wanted, x.sin()], [x, linear.weight]))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)], ids=str)
def test_no_rows(shape):
    [linear], x = new_maps(4), drawn(*shape).requires_grad_()
    out, _, _ = projected(x, linear)
    dx, dweight = torch.autograd.grad(out.sum(), [x, linear.weight])
    assert dx.shape == shape and not dweight.any()


def test_autocast_rounds_as_pytorchs_does():
    maps = new_maps(4, 3, dtype=torch.float32)
    x = drawn(5, 6, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        both = projected(x, *maps)
        wanted = torch.cat([linear(x) for linear in maps], dim=-1)
    assert both.out.dtype == both.x.dtype == torch.bfloat16
    torch.testing.assert_close(both.out, wanted)
    leaves = [x, *[linear.weight for linear in maps]]
    found = gradients([both.out], leaves)
    assert all(y.dtype == torch.float32 for y in found)
    torch.testing.assert_close(found, gradients([wanted], leaves), rtol=2e-2, atol=2e-2)


class Low(nn.Linear):
    """A map with an adapter: what has another forward than nn.Linear's."""

    def forward(self, x):
        return super().forward(x) + 1


def test_what_is_not_plain_is_called():
    x, [plain] = drawn(5, 6), new_maps(4)
    assert can_project(x, plain, None)
    assert not can_project(x, plain, Low(6, 4))
    assert not can_project(torch.nn.Buffer(x).as_subclass(type("Marked", (torch.Tensor,), {})))
    with torch.no_grad():
        assert not can_project(x, plain)
    for hook in (
        plain.register_forward_hook(lambda *_: None),
        plain.register_forward_pre_hook(lambda *_: None),
        plain.register_full_backward_hook(lambda *_: None),
        plain.register_full_backward_pre_hook(lambda *_: None),
    ):
        assert not can_project(x, plain)
        hook.remove()
    assert can_project(x, plain)
    out, after, biases = called(x, plain)
    assert torch.equal(out, plain(x)) and after is x and biases == (None,)


def test_has_first_derivatives_alone():
    [linear], [U] = new_maps(4), new_maps(4, D=6, bias=False)
    x = drawn(5, 6).requires_grad_()
    for y in (projected(x, linear).out, add_product(projected(x, linear).out, x, U)):
        with pytest.raises(ArgumentError, match="wanted first derivatives of a projection"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
