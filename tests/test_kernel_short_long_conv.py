"""kernels/short_long_conv.py against the float64 reference: interpreted, or on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from chela_bench.bench.check import error_of, relative_error
from chela_bench.errors import ArgumentError
from chela_bench.kernels import short_long_conv_checks as checks
from chela_bench.kernels.short_long_conv import (
    kernel_spectrum,
    long_conv,
    reparameterize,
    reparameterize_two_sided,
    short_conv,
    short_long_conv,
)
from chela_bench.reference import short_long_conv as reference
from tests.attention import DEVICE
from tests.convolutions import (
    ALONE,
    DTYPES,
    WAYS,
    Call,
    drawn,
    laid_out,
)
from tests.pairwise import pairwise

FACTORS = {  # shape: B, T, D
    "shape": [(1, 1, 1), (3, 2, 2), (1, 3, 4), (3, 63, 1), (1, 64, 1), (1, 100, 1)],
    "dtype": list(DTYPES),
    "way": ["planned", "monarch", "factors"],
    "order": ["serial", "parallel"],
    "activation": ["silu", None],
    "identity": [True, False],
    "causal": [True, False],
    "layout": ["btd", "bdt"],
    "gate": [None, "fixed", "trained"],
    "taps": ["fewer", "as many", "more"],
    "widths": [(3,), (1, 3)],
    "known": [False, True],  # the spectrum
}
LARGER = [  # mostly parallel: the walk of the short convolution's backward is slow, interpreted
    {"shape": (1, 3, 64), "dtype": "float32", "order": "serial", "gate": "trained"},
    {"shape": (1, 40, 64), "dtype": "float16", "way": "monarch"},
    {"shape": (1, 1000, 1), "dtype": "float32", "layout": "btd", "gate": "fixed"},
    {"shape": (3, 1024, 1), "dtype": "float16", "layout": "bdt", "gate": "trained"},
    {"shape": (1, 1500, 1), "dtype": "bfloat16", "layout": "btd", "causal": False},
    {"shape": (1, 600, 3), "dtype": "float16", "layout": "bdt", "gate": "fixed"},
    {"shape": (1, 2500, 1), "dtype": "float32", "way": "factors", "taps": "fewer"},
    {"shape": (1, 70_000, 1), "dtype": "float32", "way": "factors", "layout": "bdt"},
]


def label(case):
    return "-".join(
        "x".join(map(str, value)) if isinstance(value, tuple) else f"{name}={value}"
        for name, value in case.items()
    )


@pytest.mark.parametrize("case", [*pairwise(FACTORS), *LARGER], ids=label)
def test_matches_the_reference_with_all_gradients(case):
    call = Call(case)
    found, exact = call.run(), call.exact()
    assert {name: x.dtype for name, x in found.items()} == dict.fromkeys(exact, call.dtype)
    errors = call.errors(found, exact)
    assert max(errors.values()) <= call.budget, errors


LENGTHS_ASKED = (1, 2, 3, 63, 64, 100, 1000, 1024, 4095, 4096, 5000, 12000, 16000, 16384, 65536)


def sizes(T):
    """B, D and options: all of them on a GPU, few and without the slow walk where interpreted."""
    if DEVICE == "cpu":
        wide = [(3, 3)] if T <= 1024 else []
        return [((B, D), {"dtype": "float32"}) for B, D in [(1, 1), *wide]]
    return [
        ((B, D), {"dtype": dtype, "order": order, "gate": gate, "layout": layout})
        for B, D in itertools.product((1, 3), (1, 3, 64))
        for dtype in DTYPES
        for order, gate, layout in (("serial", "trained", "btd"), ("parallel", None, "bdt"))
    ]


@pytest.mark.parametrize("T", LENGTHS_ASKED)
def test_every_length_asked_for_with_all_gradients(T):
    missed = []
    for (B, D), options in sizes(T):
        call = Call({"shape": (B, T, D), **options})
        exact = call.exact()
        errors = call.errors(call.run(), exact)
        if not max(errors.values()) <= call.budget:
            missed += call.beyond_rounding(errors, exact)
    assert not missed, "\n".join(missed)


def test_the_comparison_sees_what_is_missing():
    call = Call({"shape": (1, 200, 2), "dtype": "float16", "order": "serial"})
    exact = call(reference.short_long_conv, {n: x.double() for n, x in call.tensors.items()})
    z = call(short_long_conv, call.tensors)
    assert error_of(z, exact, "channels") <= call.budget
    for missing in (slice(None), slice(0, 64), slice(128, None), slice(199, None)):
        broken = z.clone()
        broken[:, missing] = 0
        assert error_of(broken, exact, "channels") > 10 * call.budget
    assert error_of(z.roll(1, dims=1), exact, "channels") > 10 * call.budget


def test_exact_head_in_series_with_its_gradients():
    case = {"shape": (1, 100, 2), "dtype": "float32", "way": "monarch", "order": "serial"}
    call = Call(case)
    found = call.with_gradients(short_long_conv, torch.float32, config=call.config, exact_head=16)
    assert max(call.errors(found, call.exact()).values()) <= call.budget


@pytest.mark.parametrize(("way", "order"), [("planned", "serial"), ("monarch", "parallel")])
@pytest.mark.parametrize("layout", ["btd", "bdt"])
def test_strides_are_free(way, order, layout):
    B, T, D = 2, 12, 2
    x = drawn(B, T + 3, 2 * D, seed=1)[:, 2:-1, ::2]
    gate = drawn(1, 1, D, seed=2).expand(B, T, D)
    short, long = drawn(1, 5, seed=3).expand(D, 5), drawn(T, D, seed=4).mT
    flipped = drawn(B, D, T, seed=5).mT  # laid out as the other layout
    config = WAYS[way]
    row = drawn(1, T, D, seed=6).expand(B, T, D)
    for u, g in ((x, gate), (flipped, flipped), (row, gate)):
        leaves = [tensor.detach().requires_grad_() for tensor in (u, short, long, g)]
        exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
        results = []
        for function, given, options in (
            (short_long_conv, leaves, {"config": config}),
            (reference.short_long_conv, exact, {}),
        ):
            options = {"gate": laid_out(given[3], layout), "layout": layout, **options}
            z = function(laid_out(given[0], layout), given[1:2], given[2], order=order, **options)
            results.append([z, *torch.autograd.grad(z.sum(), given)])
        for found, wanted in zip(*results, strict=True):
            assert relative_error(found.detach(), wanted.detach()) <= 2e-5


@pytest.mark.parametrize("shape", [(0, 20, 3), (2, 0, 3), (2, 20, 0)], ids=str)
@pytest.mark.parametrize("order", ["serial", "parallel"])
@pytest.mark.parametrize("way", ["planned", "monarch", "factors"])
def test_nothing_in_nothing_out(shape, order, way):
    for causal in (True, False):
        for layout in ("btd", "bdt"):
            case = {"shape": shape, "dtype": "float32", "order": order, "way": way}
            call = Call({**case, "causal": causal, "layout": layout, "gate": "trained"})
            call.tensors["long"] = torch.ones(shape[2], 4, device=DEVICE)
            for name, x in call.run().items():
                assert x.shape == (shape if name == "z" else call.tensors[name].shape)
                assert not x.any()
    x = torch.zeros(shape, device=DEVICE)
    assert short_conv(x, [torch.ones(shape[2], 3, device=DEVICE)]).shape == shape


def test_kernels_of_another_dtype_than_x():
    call = Call({"shape": (1, 50, 2), "dtype": "float16", "order": "serial", "gate": "trained"})
    others = {"short_0": torch.float32, "long": torch.bfloat16, "gate": torch.float32}
    for name, dtype in others.items():
        call.tensors[name] = call.tensors[name].to(dtype)
    leaves = {name: x.clone().requires_grad_() for name, x in call.tensors.items()}
    z = call(short_long_conv, leaves)
    gradients = torch.autograd.grad(z, list(leaves.values()), call.dz)
    found = {"z": z.detach(), **dict(zip(leaves, gradients, strict=True))}
    assert {name: x.dtype for name, x in found.items()} == {
        "z": torch.float16, "x": torch.float16, **others
    }  # fmt: skip
    errors = call.errors(found, call.exact())
    assert errors.pop("long") <= ALONE[torch.bfloat16]
    assert max(errors.values()) <= call.budget, errors


@pytest.mark.parametrize(
    ("widths", "causal"), [((17,), True), ((2, 4), True), ((7, 1, 5), False)], ids=str
)
@pytest.mark.parametrize("order", ["serial", "parallel"])
def test_wide_and_even_short_kernels(widths, causal, order):
    case = {"shape": (1, 20, 2), "dtype": "float32", "widths": widths, "activation": "silu"}
    call = Call({**case, "causal": causal, "order": order})
    assert max(call.errors(call.run(), call.exact()).values()) <= call.budget


def test_rejects_tensors_that_triton_cannot_reach(monkeypatch):
    x, long = torch.randn(1, 4, 2), torch.randn(2, 4)
    monkeypatch.setattr(checks._long_conv, "interpreted", False)
    for call in (
        lambda: long_conv(x, long),
        lambda: short_conv(x, []),
        lambda: kernel_spectrum(long, 4),
    ):
        with pytest.raises(ArgumentError, match=r"on a GPU, got cpu; .*TRITON_INTERPRET=1"):
            call()


def test_rejects_what_does_not_fit():
    x, short, long = drawn(2, 9, 3, seed=1), [drawn(3, 3, seed=2)], drawn(3, 9, seed=3)
    elsewhere = long.to("meta")
    for match, bad in {
        "no order": lambda: short_long_conv(x, short, long, order="both"),
        "no activation": lambda: short_long_conv(x, short, long, activation="relu"),
        "no layout": lambda: short_long_conv(x, short, long, layout="tbd"),
        "no method": lambda: short_long_conv(x, short, long, config={"method": "slow"}),
        "wanted x": lambda: short_long_conv(x[0], short, long),
        "short kernels .* at 1": lambda: short_long_conv(x, [*short, long[:2]], long),
        "wanted long_kernel ": lambda: short_long_conv(x, short, long[:2]),
        "wanted long_kernel_future": lambda: short_long_conv(
            x, short, long, causal=False, long_kernel_future=long[:2]
        ),
        "wanted gate": lambda: short_long_conv(x, short, long, gate=x[:1]),
        "the half that": lambda: short_long_conv(x, short, long, causal=False),
        "no place": lambda: short_long_conv(x, short, long, long_kernel_future=long),
        "odd": lambda: short_long_conv(
            x, [drawn(3, 4, seed=2)], long, causal=False, long_kernel_future=long
        ),
        "nothing reaches": lambda: short_long_conv(x, [], long, identity=False),
        "no short kernel": lambda: short_conv(x, [], identity=False),
        "wanted state": lambda: short_conv(x, short, state=torch.zeros(2, 3, 3, device=DEVICE)),
        "wanted kernel ": lambda: kernel_spectrum(long[0], 9),
        "T = -1": lambda: kernel_spectrum(long, -1),
        "wanted dtype float32, .*got torch.float64": lambda: kernel_spectrum(
            long, 9, dtype=torch.float64
        ),
        "identity=False": lambda: reparameterize([], long, order="serial", identity=False),
        "no order '": lambda: reparameterize(short, long, order="both"),
        "at 0": lambda: reparameterize([long[:2]], long, order="serial"),
        "wanted long_kernel .D": lambda: reparameterize(short, long[0], order="serial"),
        "so widths are odd, got .2.": lambda: reparameterize_two_sided(
            [long[:, :2]], long, long, order="serial"
        ),
        "wanted long_kernel_future .D, taps": lambda: reparameterize_two_sided(
            short, long, long[:1], order="serial"
        ),
        "exact_head .* got -1": lambda: long_conv(x, long, exact_head=-1),
        "causal=True for exact_head": lambda: short_long_conv(
            x, short, long, causal=False, long_kernel_future=long, exact_head=1
        ),
        "wanted x in .*float64; .*reference": lambda: long_conv(x.double(), long),
        "wanted long_kernel in .*int64": lambda: long_conv(x, long.long()),
        r"wanted short_kernels\[0\] in .*float64": lambda: short_long_conv(
            x, [short[0].double()], long
        ),
        "wanted state in .*float64": lambda: short_conv(
            x, short, state=torch.zeros(2, 3, 2, dtype=torch.float64, device=DEVICE)
        ),
        "one device, got x on .*long_kernel on meta": lambda: long_conv(x, elsewhere),
    }.items():
        with pytest.raises(ArgumentError, match=match):
            bad()
