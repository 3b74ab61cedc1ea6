"""reference/chela.py: shapes, dtypes, causality, scale, and each line of the layer's definition."""

import pytest
import torch
import torch.nn.functional as F

from chela_bench.errors import ArgumentError
from chela_bench.reference.chela import ChelaBlock, ChelaLayer, norm_rms
from chela_bench.reference.linear_attention import recurrent
from chela_bench.reference.long_kernels import MultiscaleKernel, taps_of
from chela_bench.reference.short_long_conv import short_long_conv
from tests.layers import SWITCHES
from tests.pairwise import pairwise

EVERY_SWITCH = pytest.mark.parametrize(
    "switches",
    pairwise(SWITCHES),
    ids=lambda switches: "-".join(str(value) for value in switches.values()),
)
SIDES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
ORDERS = pytest.mark.parametrize("order", ["serial", "parallel"])
KINDS = pytest.mark.parametrize("kind", [ChelaLayer, ChelaBlock])


def layer(D=6, *, kind=ChelaLayer, seed=0, **options):
    torch.manual_seed(seed)
    if options.get("projection") != "none":
        options = {"d_key": 4, **options}
    return kind(D, **{"max_length": 70, **options}).double()


def shaken(module):
    """With no a or weight of a norm at 1, no m or bias at 0."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def x_like(layer, B=2, T=70):
    generator = torch.Generator().manual_seed(T)
    D = layer.w_1.in_features if isinstance(layer, ChelaBlock) else layer.d_model
    return torch.randn(B, T, D, generator=generator, dtype=torch.float64)


def normalized(norm, u):
    if isinstance(norm, torch.nn.LayerNorm):
        u = u - u.mean(-1, keepdim=True)
    u = u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    return u + norm.bias if isinstance(norm, torch.nn.LayerNorm) else u


def written_out(
    m, x, *, causal=True, order="serial", projection="shared", num_heads=1,
    gate_activation="sigmoid", attention_gate=True, output_gate=True, norm="layer",
    norm_position="before", short_sizes=None, long_kernel="explicit",
):  # fmt: skip
    """The class docstring, with weights as matrices, head by head, and the parts in other forms."""

    def linear(u, w):
        return u @ w.weight.T + w.bias

    assert isinstance(m.norm, {"layer": torch.nn.LayerNorm, "rms": torch.nn.RMSNorm}[norm])
    widths = (3, 5) if short_sizes is None else short_sizes  # 2 round(log10(70)) + 1 = 5
    assert tuple(kernel.shape[1] for kernel in m.short_kernels) == widths
    assert isinstance(m.long_kernel, MultiscaleKernel) == (long_kernel == "multiscale")
    normed = normalized(m.norm, x) if norm_position == "before" else x
    z = short_long_conv(
        normed,
        list(m.short_kernels),
        taps_of(m.long_kernel),
        order=order,
        causal=causal,
        long_kernel_future=None if causal else taps_of(m.long_kernel_future),
        method="direct",
    )
    shared = F.silu(linear(z, m.w_z)) if projection == "shared" else z
    q, k = m.a_q * shared + m.m_q, m.a_k * shared + m.m_k
    v = F.silu(linear(normed, m.w_v))
    heads = [
        recurrent(*(u[:, :, None] for u in head), causal=causal)[0][:, :, 0]
        for head in zip(*(u.chunk(num_heads, dim=-1) for u in (q, k, v)), strict=True)
    ]
    o = torch.cat(heads, dim=-1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if attention_gate:
        o = o * {"sigmoid": torch.sigmoid, "silu": F.silu}[gate_activation](linear(z, m.w_a))
    h = F.silu(linear(z, m.w_h) + o @ m.u_h.weight.T)
    gate = torch.sigmoid(linear(z, m.w_o)) if output_gate else None
    y = h + x if gate is None else gate * h + (1 - gate) * x
    return y if norm_position == "before" else normalized(m.norm, y)


@SIDES
@ORDERS
@pytest.mark.parametrize("gate_activation", ["sigmoid", "silu"])
def test_is_its_definition(causal, order, gate_activation):
    options = {"causal": causal, "order": order, "gate_activation": gate_activation}
    m = shaken(layer(**options))
    x = x_like(m)
    torch.testing.assert_close(m(x), written_out(m, x, **options), rtol=1e-11, atol=1e-11)


@EVERY_SWITCH
def test_every_switch_is_its_definition(switches):
    m = shaken(layer(**switches))
    x = x_like(m)
    torch.testing.assert_close(m(x), written_out(m, x, **switches), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("norm_position", ["before", "after"])
@pytest.mark.parametrize("ff_activation", ["silu", "gelu"])
def test_a_block_is_its_definition(norm, norm_position, ff_activation):
    options = {"norm": norm, "norm_position": norm_position}
    m = shaken(layer(kind=ChelaBlock, d_ff=5, ff_activation=ff_activation, **options))
    x = x_like(m)
    u = written_out(m.layer, x, **options)
    act = {"silu": F.silu, "gelu": F.gelu}[ff_activation]
    hidden = act(
        (normalized(m.norm, u) if norm_position == "before" else u) @ m.w_1.weight.T + m.w_1.bias
    )
    y = u + hidden @ m.w_2.weight.T + m.w_2.bias
    y = y if norm_position == "before" else normalized(m.norm, y)
    torch.testing.assert_close(m(x), y, rtol=1e-11, atol=1e-11)


@KINDS
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_post_norm_leaves_tokens_of_unit_size(kind, norm):
    m = layer(kind=kind, norm=norm, norm_position="after")
    y = m(5 * x_like(m) + 3)
    torch.testing.assert_close(y.square().mean(-1), torch.ones_like(y[..., 0]), rtol=1e-3, atol=0)
    assert (y.mean(-1).abs().max() < 1e-12) == (norm == "layer")


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


@ORDERS
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


@SIDES
@pytest.mark.parametrize("T", [0, 1, 69])
def test_fewer_tokens_than_max_length(T, causal):
    m = layer(causal=causal)
    x = x_like(m, 2, T)
    assert m(x).shape == x.shape
    if causal and T:  # a prefix of a longer sequence is treated alike
        longer = torch.cat([x, x_like(m, 2, 70 - T)], dim=1)
        torch.testing.assert_close(m(longer)[:, :T], m(x), rtol=1e-12, atol=1e-12)


@SIDES
def test_gradients_reach_every_parameter(causal):
    m = layer(2, d_key=2, d_value=3, max_length=5, causal=causal)
    x = x_like(m, 1, 5).requires_grad_()
    m(x).square().sum().backward()
    silent = [name for name, p in m.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert torch.autograd.gradcheck(m, x)


@pytest.mark.parametrize("long_kernel", ["explicit", "multiscale"])
@ORDERS
@SIDES
def test_convolution_starts_near_its_inputs_variance(order, causal, long_kernel):
    m = layer(64, max_length=512, order=order, causal=causal, long_kernel=long_kernel)
    x = x_like(m, 8, 512)
    future = None if causal else taps_of(m.long_kernel_future)
    options = {"order": order, "causal": causal, "long_kernel_future": future}
    z = short_long_conv(x, list(m.short_kernels), taps_of(m.long_kernel), **options)
    for tokens in (slice(0, 16), slice(200, 300)):
        assert 0.4 < z[:, tokens].std() < 2.5


@EVERY_SWITCH
@KINDS
def test_gradients_reach_every_parameter_at_every_switch(kind, switches):
    m = layer(kind=kind, **switches)
    x = x_like(m)
    (m(x) * torch.randn_like(x)).sum().backward()
    silent = [name for name, p in m.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_position": "after", "norm": "rms"},
        {"causal": False, "order": "parallel"},
        {"long_kernel": "multiscale", "num_heads": 4},
        {"output_gate": False, "attention_gate": False},
        {"projection": "none", "short_sizes": ()},
    ],
    ids=str,
)
def test_a_stack_starts_well_scaled(options):
    """Twelve blocks, pre-norm ones without a norm at their end, over 4096 tokens."""
    torch.manual_seed(0)
    d_key = None if "projection" in options else 16
    options = {"d_key": d_key, "max_length": 4096, **options}
    stack = torch.nn.Sequential(*(ChelaBlock(64, **options) for _ in range(12)))
    y = torch.randn(1, 4096, 64)
    most = 3 if options.get("output_gate", True) else 4  # H + x: a residual sums up its blocks
    for block in stack:
        y = block(y)
        assert y.isfinite().all()
        for tokens in (slice(None), slice(0, 16)):
            assert 0.3 < y[:, tokens].square().mean().sqrt() < most
    (y * torch.randn_like(y)).sum().backward()
    sizes = {name: p.grad.norm() for name, p in stack.named_parameters()}
    assert all(size.isfinite() for size in sizes.values())
    largest = max(sizes.values())
    assert not [name for name, size in sizes.items() if size < 1e-6 * largest]


SPANS = [(0, 40), (0, 23), (9, 40), (5, 31), (0, 1), (0, 0)]  # tokens of each row of 40


@KINDS
@SIDES
@ORDERS
@pytest.mark.parametrize("norm_position", ["before", "after"])
def test_padding_is_as_if_cut_off(kind, causal, order, norm_position):
    options = {"causal": causal, "order": order, "norm_position": norm_position, "num_heads": 2}
    m = shaken(layer(kind=kind, **options))
    x = x_like(m, len(SPANS), 40)
    mask = torch.zeros(len(SPANS), 40, dtype=torch.bool)
    for row, (start, stop) in enumerate(SPANS):
        mask[row, start:stop] = True
    x[~mask] = torch.nan  # whatever lies there, it reaches neither outputs nor gradients
    x.requires_grad_()
    y = m(x, mask)
    assert not y[~mask].any() and not y[~mask].isnan().any()
    for row, (start, stop) in enumerate(SPANS):
        cut = m(x[row : row + 1, start:stop])
        torch.testing.assert_close(y[row : row + 1, start:stop], cut, rtol=1e-11, atol=1e-11)
    (y * torch.randn_like(y)).sum().backward()
    assert not x.grad[~mask].any()
    assert all(p.grad.isfinite().all() for p in (x, *m.parameters()))


@KINDS
def test_a_full_mask_changes_nothing(kind):
    m = layer(kind=kind)
    x = x_like(m)
    assert torch.equal(m(x, torch.ones(2, 70, dtype=torch.bool)), m(x))


@KINDS
def test_dropout_is_identity_in_eval_mode(kind):
    m, plain = layer(kind=kind, dropout=0.5), layer(kind=kind)
    x = x_like(m)
    assert torch.equal(m.eval()(x), plain(x))
    assert not torch.allclose(m.train()(x), m(x))


def test_dropout_falls_on_h_before_the_output_gate():
    for m in (layer(dropout=0.5, output_gate=False), layer(dropout=0.5)):
        x = x_like(m)
        gate = 1.0
        if m.w_o is not None:
            m.w_o.weight.data.zero_()
            gate = torch.sigmoid(m.w_o.bias)
        kept = m.eval()(x) - (x if m.w_o is None else (1 - gate) * x)  # G * H
        dropped = m.train()(x) - (x if m.w_o is None else (1 - gate) * x)
        ratio = dropped / kept
        assert 0.4 < (ratio.abs() < 1e-6).double().mean() < 0.6
        torch.testing.assert_close(ratio[ratio > 1e-6], torch.full_like(ratio[ratio > 1e-6], 2))


def test_dropout_falls_on_the_feed_forwards_hidden_and_output():
    m = layer(kind=ChelaBlock, d_ff=6, dropout=0.5)
    m.w_2.weight.data.copy_(torch.eye(6))
    m.layer.eval()
    x = x_like(m)
    u = m.layer(x)
    twice = m.train(False)(x) - u
    m.dropout.train()
    ratio = (m(x) - u) / twice
    assert 0.65 < (ratio.abs() < 1e-6).double().mean() < 0.85  # a quarter survives both
    torch.testing.assert_close(ratio[ratio > 1e-6], torch.full_like(ratio[ratio > 1e-6], 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"norm": "rms", "long_kernel": "multiscale", "num_heads": 2},
        {"norm_position": "after", "causal": False, "projection": "none"},
    ],
    ids=str,
)
def test_a_block_in_few_bits_is_near_float64(dtype, options):
    m, low = (layer(16, kind=ChelaBlock, max_length=512, **options) for _ in range(2))
    x = x_like(m, 1, 512).to(dtype)
    y = low.to(dtype)(x)
    assert y.dtype == dtype
    exact = m(x.double())
    # As for a layer, with twice the roundings.
    assert (y - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", ["serial", "parallel"])
@KINDS
def test_autocast_rounds_projections_alone(kind, order, dtype):
    """The first tokens' attention is so small that in float16 its norm's gradient is not finite."""
    exact = layer(64, kind=kind, order=order, max_length=512)
    m = layer(64, kind=kind, order=order, max_length=512).float()
    x = x_like(m, 1, 512).float().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = m(x)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *m.parameters()], dy)
    right = torch.autograd.grad(exact(x.double()), [x, *exact.parameters()], dy.double())
    assert y.dtype == torch.float32 and all(g.isfinite().all() for g in found)
    distance = torch.stack([(f - r).norm() for f, r in zip(found, right, strict=True)]).norm()
    assert distance < 2 * torch.finfo(dtype).eps * torch.stack([r.norm() for r in right]).norm()


@EVERY_SWITCH
@KINDS
def test_a_state_dict_makes_another_module_the_same(kind, switches):
    m, other = layer(kind=kind, **switches), layer(kind=kind, seed=1, **switches)
    x = x_like(m)
    assert not torch.allclose(m(x), other(x))
    other.load_state_dict(m.state_dict())
    assert torch.equal(m(x), other(x))


@pytest.mark.parametrize(
    ("options", "gone", "new"),
    [
        ({"projection": "none"}, {"w_z.weight", "w_z.bias"}, set()),
        ({"attention_gate": False}, {"w_a.weight", "w_a.bias"}, set()),
        ({"output_gate": False}, {"w_o.weight", "w_o.bias"}, set()),
        ({"norm": "rms"}, {"norm.bias"}, set()),
        ({"short_sizes": ()}, {"short_kernels.0", "short_kernels.1"}, set()),
        ({"short_sizes": (3, 1, 2)}, set(), {"short_kernels.2"}),
        ({"long_kernel": "multiscale"}, {"long_kernel"}, {"long_kernel.sub_kernels"}),
        ({"num_heads": 2, "norm_position": "after", "dropout": 0.5}, set(), set()),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # sets have no order
)
def test_a_switch_takes_its_parameters_along(options, gone, new):
    before, after = set(layer().state_dict()), set(layer(**options).state_dict())
    assert (before - after, after - before) == (gone, new)


def test_a_blocks_parameters():
    m = layer(kind=ChelaBlock)
    own = {name for name in m.state_dict() if not name.startswith("layer.")}
    assert own == {
        f"{name}.{part}" for name in ("norm", "w_1", "w_2") for part in ("weight", "bias")
    }
    assert set(m.layer.state_dict()) == set(layer().state_dict())
    assert m.w_1.weight.shape == (12, 6)
    assert "norm.bias" not in layer(kind=ChelaBlock, norm="rms").state_dict()


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


@pytest.mark.parametrize(
    ("taps", "size", "scales"),
    [
        (1, 4, 1),
        (4, 4, 1),
        (5, 4, 2),
        (8, 4, 2),
        (9, 4, 3),
        (16, 4, 3),
        (17, 4, 4),
        (1 << 20, 32, 16),
    ],
)
def test_multiscale_parameters_grow_with_the_logarithm(taps, size, scales):
    kernel = MultiscaleKernel(1, taps, size=size)
    assert kernel().shape == (1, taps)
    assert sum(p.numel() for p in kernel.parameters()) == min(size, taps) * scales


@pytest.mark.parametrize("taps", [4, 7, 32, 61])
def test_multiscale_is_sub_kernels_end_to_end(taps):
    """Each is read at the centres of twice as many taps as the last, between its own centres."""
    kernel = MultiscaleKernel(3, taps, size=4).double()
    torch.nn.init.normal_(kernel.sub_kernels)
    expected, factor, decay = [], 1, 1.0
    for i, w in enumerate(kernel.sub_kernels.detach()):
        at = ((torch.arange(4 * factor) + 0.5) / factor - 0.5).clamp(0, 3)
        left = at.long().clamp(max=2)
        expected.append(decay * torch.lerp(w[:, left], w[:, left + 1], (at - left).double()))
        factor, decay = 2**i, decay / 2
    expected = torch.cat(expected, dim=1)[:, :taps]
    torch.testing.assert_close(kernel(), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(kernel, {"sub_kernels": w}, ()), kernel.sub_kernels
    )


def test_multiscale_starts_with_unit_energy_that_falls():
    for causal in (True, False):
        m = layer(64, max_length=1024, long_kernel="multiscale", causal=causal)
        halves = [taps_of(m.long_kernel)] + ([] if causal else [taps_of(m.long_kernel_future)])
        energy = sum(half.square().sum(dim=1) for half in halves)
        assert energy.min() > 0.7 and energy.max() < 1.001
        torch.testing.assert_close(halves[0][:, 0].square(), torch.full((64,), 0.5).double())
        near, far = (
            halves[-1][:, taps].square().mean() for taps in (slice(1, 32), slice(512, None))
        )
        assert far < near / 100
    assert MultiscaleKernel(2, 9).half()().dtype == torch.float32


def test_rejects_what_does_not_fit():
    m = layer()
    for bad in [x_like(m, 2, 71), x_like(m)[..., :5], x_like(m)[0]]:
        with pytest.raises(ArgumentError, match=r"wanted x .* got .* max_length"):
            m(bad)
    with pytest.raises(ArgumentError, match="no order"):
        layer(order="both")
    with pytest.raises(ArgumentError, match="no gate_activation"):
        layer(gate_activation="relu")
    for mask in (torch.ones(2, 69, dtype=torch.bool), torch.ones(2, 70)):
        with pytest.raises(ArgumentError, match=r"wanted mask \[B, T\] = \[2, 70\] .* True where"):
            m(x_like(m), mask)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"projection": "both"}, "no projection 'both'; it is one of 'shared', 'none'"),
        ({"norm": "batch"}, "no norm 'batch'"),
        ({"norm_position": "between"}, "no norm_position 'between'"),
        ({"long_kernel": "implicit"}, "no long_kernel 'implicit'"),
        ({"max_length": 0}, "max_length is a number of tokens, got 0"),
        ({"max_length": 0, "short_sizes": ()}, "max_length is a number of tokens, got 0"),
        ({"projection": "none", "d_key": 4}, "d_key is d_model = 6, got 4"),
        ({"num_heads": 3}, r"d_key = 4, d_value = 12 and num_heads = 3; pass multiples"),
        ({"num_heads": 4, "d_value": 6}, "num_heads = 4"),
        ({"num_heads": 0}, "num_heads = 0"),
        ({"d_key": 0}, "d_key = 0"),
        ({"short_sizes": (3, 0)}, r"widths of 1 or more, got \[3, 0\]"),
        ({"short_sizes": (3, 4), "causal": False}, r"odd if causal=False, got \[3, 4\]"),
        ({"dropout": 1.0}, "wanted 0 <= dropout < 1, got 1.0"),
        ({"kind": ChelaBlock, "ff_activation": "relu"}, "no ff_activation 'relu'"),
        ({"kind": ChelaBlock, "d_ff": 0}, "d_ff is a width, got 0"),
        ({"kind": ChelaBlock, "norm": "batch"}, "no norm 'batch'"),
    ],
    ids=str,
)
def test_rejects_options_that_do_not_fit(options, match):
    with pytest.raises(ArgumentError, match=match):
        layer(**options)


def test_rejects_sizes_of_no_taps():
    with pytest.raises(ArgumentError, match="got taps = 0 and size = 32"):
        MultiscaleKernel(2, 0)
