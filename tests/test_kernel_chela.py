"""kernels/chela.py against the reference layer in float64: interpreted, or on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from chela_bench.bench.check import error_of
from chela_bench.errors import ArgumentError
from chela_bench.kernels import chela, gated_attention
from chela_bench.kernels.chela import ChelaBlock, ChelaLayer
from chela_bench.kernels.chela_decode import StateCache
from chela_bench.reference import chela as reference
from tests.attention import DEVICE
from tests.layers import SWITCHES
from tests.pairwise import pairwise

BFLOAT16 = [] if DEVICE == "cpu" else [torch.bfloat16]  # the interpreter cannot multiply it
FACTORS = {
    "dtype": [torch.float32, torch.float16, *BFLOAT16],
    **SWITCHES,
    "masked": [False, True],
}
# Roundings in a row, forward and back, of the layer's steps, at half a spacing each.
BUDGET = {torch.float32: 2e-4, torch.float16: 24 * 2.0**-11, torch.bfloat16: 24 * 2.0**-8}
if DEVICE != "cpu":  # products of float32 are rounded to tf32
    BUDGET[torch.float32] = BUDGET[torch.float16]


def layers(
    D=8, dtype=torch.float32, made=ChelaLayer, like=reference.ChelaLayer, max_length=40, **options
):
    """One of ours and the reference in float64, with the same parameters, rounded to dtype."""
    torch.manual_seed(0)
    ours = made(D, max_length=max_length, implementation="triton", **options)
    for parameter in ours.parameters():  # so that no a is 1, no m or bias 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    for layer in (module for module in ours.modules() if isinstance(module, ChelaLayer)):
        layer.m_q.data -= (
            0.2  # SiLU's mean: else the state is nearly of rank one, see the docstring
        )
        layer.m_k.data -= 0.2
    ours = ours.to(dtype).to(DEVICE)
    exact = like(D, max_length=max_length, **options).to(DEVICE)
    exact.load_state_dict(ours.state_dict())
    return ours, exact.double()


def inputs(D=8, dtype=torch.float32, T=37):
    x, dy = torch.randn(2, 2, T, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.to(DEVICE), dy.to(DEVICE)


def results(module, x, dy, mask=None):
    x = x.clone().requires_grad_()
    y = module(x, mask)
    names = [name for name, _ in module.named_parameters()]
    gradients = torch.autograd.grad(y, [x, *module.parameters()], dy, allow_unused=True)
    return {"y": y.detach(), **dict(zip(["x", *names], gradients, strict=True))}


def assert_near(found, exact, budget):
    errors = {}
    for name, right in exact.items():
        if right is None or right.norm() == 0:
            assert found[name] is None or found[name].norm() == 0
            continue
        kind = "tokens" if name in ("y", "x") else "whole"
        errors[name] = error_of(found[name], right, kind)
    assert max(errors.values()) <= budget, errors


@pytest.mark.parametrize(
    "case", pairwise(FACTORS), ids=lambda case: "-".join(map(str, case.values()))
)
def test_matches_the_reference_with_all_gradients(case):
    options = dict(case)
    dtype, masked = options.pop("dtype"), options.pop("masked")
    key = {"d_key": 4} if options["projection"] == "shared" else {}
    ours, exact = layers(dtype=dtype, d_value=12, **key, **options)
    x, dy = inputs(dtype=dtype)
    mask = None
    if masked:
        mask = torch.arange(37, device=DEVICE) < torch.tensor([[37], [29]], device=DEVICE)
        dy = dy * mask[:, :, None]
    found = results(ours, x, dy, mask)
    assert all(g is None or g.dtype == dtype for g in found.values())
    assert_near(found, results(exact, x.double(), dy.double(), mask), BUDGET[dtype])


WIDE = {  # sizes that are for the kernels scheduled by hand, D = 64
    "a head": {"d_key": 128, "d_value": 256},
    "heads": {"d_key": 128, "d_value": 320, "num_heads": 2},
    "silu": {"d_key": 64, "d_value": 128, "gate_activation": "silu"},
    "no attention gate": {"d_key": 128, "d_value": 256, "attention_gate": False},
    "no output gate": {"d_key": 64, "d_value": 96, "output_gate": False},
    "norm after": {"d_key": 128, "d_value": 256, "norm_position": "after", "eps": 0.1},
    "no projection": {"d_value": 128, "projection": "none"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", WIDE)
def test_kernels_for_hopper_match_the_reference(monkeypatch, name, masked):
    """With all gradients, and without, where the attention is gated on its way out."""
    ours, exact = layers(64, torch.bfloat16, max_length=700, **WIDE[name])
    x, dy = inputs(64, torch.bfloat16, T=700)
    mask = None
    if masked:
        mask = torch.arange(700, device=DEVICE) < torch.tensor([[700], [333]], device=DEVICE)
        dy = dy * mask[:, :, None]
    right = results(exact, x.double(), dy.double(), mask)
    assert_near(results(ours, x, dy, mask), right, BUDGET[torch.bfloat16])
    gated = []
    monkeypatch.setattr(gated_attention, "LEAST", 0)
    plain = chela.gated_attention
    monkeypatch.setattr(chela, "gated_attention", lambda *a, **o: gated.append(a) or plain(*a, **o))
    with torch.no_grad():
        y = ours(x, mask)
    assert error_of(y, right["y"], "tokens") <= BUDGET[torch.bfloat16]
    assert len(gated) == (torch.cuda.get_device_capability()[0] == 9)


@pytest.mark.parametrize("norm_position", ["before", "after"])
def test_a_block_matches_the_reference(norm_position):
    ours, exact = layers(
        made=ChelaBlock, like=reference.ChelaBlock, d_key=4, d_ff=20, norm_position=norm_position
    )
    assert isinstance(ours.layer, ChelaLayer)
    x, dy = inputs()
    assert_near(
        results(ours, x, dy), results(exact, x.double(), dy.double()), BUDGET[torch.float32]
    )


def test_one_state_dict_loads_into_the_other():
    ours, exact = layers(d_key=4)
    assert list(ours.state_dict()) == list(exact.state_dict())
    ours.load_state_dict(exact.state_dict())


def test_a_longer_past_leaves_the_output_as_it_is():
    """Bits too: a token sees nothing that comes after it."""
    ours, _ = layers(d_key=4, d_value=12)
    x, _ = inputs()
    y = ours(x)
    x[:, 20:] = 1e3
    torch.testing.assert_close(ours(x)[:, :20], y[:, :20], rtol=0, atol=2e-3)


def test_float16_stays_finite_where_the_attention_would_not():
    ours, exact = layers(dtype=torch.float16, d_key=4, d_value=12)
    for module in (ours, exact):
        module.m_q.data.fill_(60.0)
        module.m_k.data.fill_(60.0)
    x, dy = inputs(dtype=torch.float16)
    found = results(ours, x, dy)
    assert all(g.isfinite().all() for g in found.values())
    right = exact(x.double()).detach()
    assert error_of(found["y"], right, "tokens") <= BUDGET[torch.float16]


@pytest.mark.parametrize("causal", [True, False])
def test_float16_has_the_eps_that_it_was_given(causal):
    """Not a larger one where the attention is kept in range; its gradients would show it first."""
    ours, exact = layers(dtype=torch.float16, d_key=4, d_value=12, causal=causal, eps=0.3)
    x, dy = inputs(dtype=torch.float16)
    right = results(exact, x.double(), dy.double())
    assert_near(results(ours, x, dy), right, BUDGET[torch.float16])
    if causal:
        y, cache = ours.prefill(x[:, :20])
        y = torch.cat([y, *(ours.step(x[:, t], cache)[:, None] for t in (20, 21))], dim=1)
        assert error_of(y, right["y"][:, :22], "tokens") <= BUDGET[torch.float16]


def test_same_inputs_same_bits():
    ours, _ = layers(d_key=4, d_value=12)
    x, dy = inputs()
    first, second = results(ours, x, dy), results(ours, x, dy)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_is_in_training_alone():
    ours, _ = layers(d_key=4, dropout=0.5)
    x, _ = inputs()
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_auto_shows_what_it_chose():
    layer = ChelaLayer(8, d_key=4, max_length=40)
    assert "implementation='auto: reference'" in repr(layer)
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(layer(x), reference.ChelaLayer.forward(layer, x))
    assert "implementation='triton'" in repr(
        ChelaLayer(8, d_key=4, max_length=40, implementation="triton")
    )


BEYOND = pytest.mark.parametrize(  # the kernels' last size, and the next
    ("last", "beyond", "message"),
    [
        ({"d_key": 256}, {"d_key": 257}, r"d_key / num_heads <= 256, got 257 / 1: take more heads"),
        ({"d_key": 512, "num_heads": 2}, {"d_key": 514, "num_heads": 2}, "got 514 / 2"),
        ({"d_value": 4096}, {"d_value": 4097}, r"d_value <= 4096, got 4097: take a smaller one"),
        ({"max_length": 2**23}, {"max_length": 2**23 + 1}, "max_length <= 8388608, got 8388609"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)


@BEYOND
def test_triton_beyond_its_kernels_is_refused_when_it_is_made(last, beyond, message):
    sizes = {"d_key": 1, "max_length": 9}
    ChelaLayer(1, implementation="triton", **{**sizes, **last})
    with pytest.raises(ArgumentError, match=message):
        ChelaLayer(1, implementation="triton", **{**sizes, **beyond})


@pytest.mark.gpu
@BEYOND
def test_auto_is_the_reference_beyond_the_kernels(last, beyond, message):
    for options, chosen in ((last, "triton"), (beyond, "reference")):
        layer = ChelaLayer(1, **{"d_key": 1, "max_length": 9, **options})
        assert "implementation='auto: reference'" in repr(layer)
        layer = layer.cuda()
        assert f"implementation='auto: {chosen}'" in repr(layer)
        assert "implementation='auto: reference'" in repr(layer.double())
        x = torch.randn(1, 9, 1, device="cuda")
        with torch.no_grad():
            y = layer.float()(x)
            right = reference.ChelaLayer.forward(layer, x)
        assert error_of(y, right.double(), "tokens") <= 1e-2
        y, cache = layer.prefill(x[:, :8])
        assert isinstance(cache, StateCache) == (chosen == "triton")
        layer.step(x[:, 8], cache)


@pytest.mark.parametrize(
    ("options", "dtype", "device", "chosen"),
    [
        ({}, torch.bfloat16, "cuda", "triton"),
        ({}, torch.float16, "cuda", "triton"),
        ({}, torch.float32, "cuda", "triton"),
        ({}, torch.float64, "cuda", "reference"),
        ({}, torch.float32, "cpu", "reference"),
        ({"d_key": 257}, torch.bfloat16, "cuda", "reference"),
        ({"d_key": 514, "num_heads": 2}, torch.bfloat16, "cuda", "reference"),
        ({"d_key": 514, "num_heads": 257, "d_value": 257}, torch.bfloat16, "cuda", "triton"),
        ({"d_value": 4097}, torch.bfloat16, "cuda", "reference"),
        ({"max_length": 2**23 + 1}, torch.bfloat16, "cuda", "reference"),
    ],
    ids=str,
)
def test_what_auto_chooses(options, dtype, device, chosen):
    layer = ChelaLayer(1, **{"d_key": 1, "max_length": 9, **options})
    device = torch.device(device)  # no GPU is needed to choose
    x = SimpleNamespace(is_cuda=device.type == "cuda", device=device, dtype=dtype)
    assert layer._chosen(x) == chosen


def test_rejects_what_cannot_be():
    with pytest.raises(ArgumentError, match="no implementation 'cuda'; it is one of 'auto'"):
        ChelaLayer(8, max_length=40, implementation="cuda")
    with pytest.raises(ArgumentError, match=r"wanted x \[B, T <= 40, 8\]"):
        ChelaLayer(8, max_length=40, implementation="triton")(torch.randn(1, 41, 8))
