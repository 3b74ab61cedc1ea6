"""reference/chela.py: shapes, dtypes, causality, scale, and each line of the layer's definition."""

import pytest
import torch
import torch.nn.functional as F

from chela_bench.errors import ArgumentError
from chela_bench.reference.chela import ChelaLayer, norm_rms
from chela_bench.reference.linear_attention import recurrent
from chela_bench.reference.short_long_conv import short_long_conv


def layer(D=6, **options):
    torch.manual_seed(0)
    return ChelaLayer(D, **{"d_key": 4, "max_length": 70, **options}).double()


def x_like(layer, B=2, T=70):
    generator = torch.Generator().manual_seed(T)
    return torch.randn(B, T, layer.d_model, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize("order", ["serial", "parallel"])
@pytest.mark.parametrize("gate_activation", ["sigmoid", "silu"])
def test_is_its_definition(causal, order, gate_activation):
    """The class docstring, with weights as matrices and the parts in other forms."""
    m = layer(causal=causal, order=order, gate_activation=gate_activation)
    for parameter in m.parameters():  # so that no a is 1, no m or bias 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = x_like(m)

    def linear(u, w):
        return u @ w.weight.T + w.bias

    normed = F.layer_norm(x, (6,), m.norm.weight, m.norm.bias)
    z = short_long_conv(
        normed,
        list(m.short_kernels),
        m.long_kernel,
        order=order,
        causal=causal,
        long_kernel_future=m.long_kernel_future,
        method="direct",
    )
    shared = F.silu(linear(z, m.w_z))
    q, k = m.a_q * shared + m.m_q, m.a_k * shared + m.m_k
    v = F.silu(linear(normed, m.w_v))
    o, _ = recurrent(*(u[:, :, None] for u in (q, k, v)), causal=causal)
    o = o[:, :, 0] / (o[:, :, 0].square().mean(-1, keepdim=True) + 1e-5).sqrt()
    act = {"sigmoid": torch.sigmoid, "silu": F.silu}[gate_activation]
    h = F.silu(linear(z, m.w_h) + (o * act(linear(z, m.w_a))) @ m.u_h.weight.T)
    gate = torch.sigmoid(linear(z, m.w_o))
    torch.testing.assert_close(m(x), gate * h + (1 - gate) * x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_is_finite_and_near_float64_on_many_tokens(dtype):
    """Un-normalised attention over 2048 coherent tokens passes float16's 65504."""
    m = layer(32, d_key=16, max_length=2048)
    m.a_k.data += 20
    m.a_q.data += 20
    x = x_like(m, 1, 2048) + 1
    x = x.to(dtype)
    low = layer(32, d_key=16, max_length=2048)
    low.load_state_dict(m.state_dict())
    y = low.to(dtype)(x)
    assert y.dtype == dtype and y.shape == x.shape and y.isfinite().all()
    exact = m(x.double())
    # The weights round too, and about ten roundings follow one another: four spacings' worth.
    assert (y - exact).norm() / exact.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("order", ["serial", "parallel"])
@pytest.mark.parametrize("t", [1, 35, 69])
def test_the_past_is_blind_to_the_future(order, t):
    m = layer(order=order)
    x = x_like(m)
    y = m(x)
    x[:, t:] += torch.randn_like(x[:, t:])
    changed = m(x)
    assert (y - changed)[:, :t].abs().max() <= 1e-12
    assert not torch.allclose(y[:, t], changed[:, t])


def test_two_sided_sees_the_future():
    m = layer(causal=False)
    x = x_like(m)
    y = m(x)
    x[:, -1] += torch.randn_like(x[:, -1])
    assert not torch.allclose(y[:, 0], m(x)[:, 0])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize("T", [0, 1, 69])
def test_fewer_tokens_than_max_length(T, causal):
    m = layer(causal=causal)
    x = x_like(m, 2, T)
    assert m(x).shape == x.shape
    if causal and T:  # a prefix of a longer sequence is treated alike
        longer = torch.cat([x, x_like(m, 2, 70 - T)], dim=1)
        torch.testing.assert_close(m(longer)[:, :T], m(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
def test_gradients_reach_every_parameter(causal):
    m = layer(2, d_key=2, d_value=3, max_length=5, causal=causal)
    x = x_like(m, 1, 5).requires_grad_()
    m(x).square().sum().backward()
    silent = [name for name, p in m.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert torch.autograd.gradcheck(m, x)


@pytest.mark.parametrize("order", ["serial", "parallel"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
def test_convolution_starts_near_its_inputs_variance(order, causal):
    m = layer(64, max_length=512, order=order, causal=causal)
    x = x_like(m, 8, 512)
    future = m.long_kernel_future
    options = {"order": order, "causal": causal, "long_kernel_future": future}
    z = short_long_conv(x, list(m.short_kernels), m.long_kernel, **options)
    for tokens in (slice(0, 16), slice(200, 300)):
        assert 0.4 < z[:, tokens].std() < 2.5


def test_the_state_dict_names():
    names = set(layer(causal=False).state_dict())
    assert names == {
        *(f"{name}.{part}" for name in ("norm", "w_z", "w_v", "w_a", "w_h", "w_o")
          for part in ("weight", "bias")),
        "u_h.weight", "a_q", "a_k", "m_q", "m_k",
        "short_kernels.0", "short_kernels.1", "long_kernel", "long_kernel_future",
    }  # fmt: skip
    assert names - set(layer().state_dict()) == {"long_kernel_future"}


def test_norm_rms():
    x = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(norm_rms(x, eps=0.5), x / 13**0.5)


def test_rejects_what_does_not_fit():
    m = layer()
    for bad in [x_like(m, 2, 71), x_like(m)[..., :5], x_like(m)[0]]:
        with pytest.raises(ArgumentError, match=r"wanted x .* got .* max_length"):
            m(bad)
    with pytest.raises(ArgumentError, match="no order"):
        layer(order="both")
    with pytest.raises(ArgumentError, match="no gate_activation"):
        layer(gate_activation="relu")
