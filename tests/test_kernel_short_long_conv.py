"""kernels/short_long_conv.py against the float64 reference: interpreted, or on a GPU.

Tensors with a time axis are judged in blocks of 64 tokens against the rms of their row (b, d). The
budget: a long convolution alone, with float16 operands, is off by 6e-4 of rms(z) and rounds z; in
float32, pairs of float16 numbers lose 2^-22 a product. Then half a spacing of the dtype for each
rounding in a row besides: u between the convolutions, a product with the gate that has a pass of
its own, a sum of two halves. A gradient passes the same steps backwards. The interpreter truncates
to bfloat16, which costs a whole spacing each time.
"""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from chela_bench.bench.check import error_of, relative_error, worst_block_error
from chela_bench.bench.models import short_long_conv_bytes
from chela_bench.errors import ArgumentError
from chela_bench.kernels import short_long_conv as module
from chela_bench.kernels import short_long_conv_checks as checks
from chela_bench.kernels.long_conv_factors import Transform
from chela_bench.kernels.long_conv_plan import TABLE, WIDTHS, Plan, plan_for
from chela_bench.kernels.reparameterization import added
from chela_bench.kernels.short_long_conv import (
    hbm_bytes,
    kernel_spectrum,
    long_conv,
    reparameterize,
    reparameterize_two_sided,
    short_conv,
    short_long_conv,
)
from chela_bench.reference import short_long_conv as reference
from tests.attention import DEVICE, new_memory_is_nan
from tests.pairwise import pairwise

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALONE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 2.5e-3}
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
if DEVICE == "cpu":
    ALONE[torch.bfloat16] = ROUNDING[torch.bfloat16] = 2.0**-7

WAYS = {
    "planned": None,
    "direct": {"method": "direct"},
    "monarch": {"method": "monarch", "N2": 16},
    "factors": {"method": "factors", "N2": 16},
}
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
DEFAULTS = {
    "way": "planned", "order": "parallel", "activation": None, "identity": True, "causal": True,
    "layout": "btd", "gate": None, "taps": "as many", "widths": (3,), "known": False,
}  # fmt: skip


def label(case):
    return "-".join(
        "x".join(map(str, value)) if isinstance(value, tuple) else f"{name}={value}"
        for name, value in case.items()
    )


def drawn(*size, seed, scale=1.0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(size))
    return (torch.randn(size, generator=generator) * scale).to(DEVICE)


def laid_out(x, layout):
    return x.mT if layout == "bdt" else x


class Call:
    """One call of a case with tensors of its own: x and gate are [B, T, D] whatever the layout."""

    def __init__(self, case):
        self.case = case = SimpleNamespace(**{**DEFAULTS, **case})
        B, T, D = case.shape
        scale = max(T, 1) ** -0.5
        taps = {"fewer": max(1, T // 3), "as many": T, "more": T + 7}[case.taps]
        tensors = {"x": drawn(B, T, D, seed=1)}
        for i, width in enumerate(case.widths):
            tensors[f"short_{i}"] = drawn(D, width, seed=2 + i, scale=width**-0.5)
        tensors["long"] = drawn(D, taps, seed=8, scale=scale)
        if not case.causal:
            tensors["future"] = drawn(D, taps + 2, seed=9, scale=scale)
        if case.gate is not None:
            tensors["gate"] = drawn(B, T, D, seed=10)
        self.dtype = DTYPES[case.dtype]
        self.config = WAYS[case.way]
        self.tensors = {name: x.to(self.dtype) for name, x in tensors.items()}
        self.dz = drawn(B, T, D, seed=11).to(self.dtype)

    def __call__(self, function, tensors, **options):
        case = self.case
        z = function(
            laid_out(tensors["x"], case.layout),
            [x for name, x in tensors.items() if name.startswith("short")],
            tensors["long"],
            order=case.order,
            activation=case.activation,
            identity=case.identity,
            causal=case.causal,
            long_kernel_future=tensors.get("future"),
            gate=laid_out(tensors["gate"], case.layout) if "gate" in tensors else None,
            layout=case.layout,
            **options,
        )
        return laid_out(z, case.layout)

    def with_gradients(self, function, dtype, **options):
        tensors = {name: x.to(dtype).requires_grad_() for name, x in self.tensors.items()}
        if self.case.gate == "fixed":
            tensors["gate"].requires_grad_(False)
        z = self(function, tensors, **options)
        trained = [name for name, x in tensors.items() if x.requires_grad]
        gradients = torch.autograd.grad(z, [tensors[name] for name in trained], self.dz.to(dtype))
        return {"z": z.detach(), **dict(zip(trained, gradients, strict=True))}

    def run(self):
        options = {"config": self.config}
        if self.case.known:
            long, T = self.tensors["long"], self.case.shape[1]
            options["spectrum"] = kernel_spectrum(long, T, config=self.config)
            if not self.case.causal:
                shifted = F.pad(self.tensors["future"], (1, 0))
                options["spectrum_future"] = kernel_spectrum(shifted, T, config=self.config)
        with new_memory_is_nan():
            return self.with_gradients(short_long_conv, self.dtype, **options)

    def exact(self):
        return self.with_gradients(reference.short_long_conv, torch.float64)

    @property
    def budget(self):
        case = self.case
        roundings = (case.order == "serial") + (case.gate is not None) + (not case.causal)
        roundings += case.order == "parallel" and case.known  # the short one is added
        return ALONE[self.dtype] + roundings * ROUNDING[self.dtype]

    def beyond_rounding(self, errors, exact):
        """Which errors are over the budget and over what one more rounding of each input and
        output would cost: twice that in a block, three times in the few numbers of a short kernel.

        Where a sum cancels (the gradient of one short kernel) or a block is larger than its row,
        rounding alone costs more than the budget: a bfloat16 of the exact z is off by 3.3e-3.
        """
        rough = ROUNDING[self.dtype]
        noise = Call(vars(self.case))
        generator = torch.Generator().manual_seed(0)

        def stirred(x):
            off = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
            return x.double() * (1 + rough * off.to(x.device))

        noise.tensors = {name: stirred(x) for name, x in self.tensors.items()}
        noise.dz = stirred(self.dz)
        rounded = {name: x.to(self.dtype).double() for name, x in noise.exact().items()}
        costs = self.errors(rounded, exact)
        allowed = {
            name: max(self.budget, cost * (3 if name.startswith("short") else 2))
            for name, cost in costs.items()
        }
        return [
            f"{name} {errors[name]:.2e} > {allowed[name]:.2e} in {vars(self.case)}"
            for name in errors
            if not errors[name] <= allowed[name]
        ]

    def errors(self, found, exact):
        kinds = {"z": "channels", "x": "channels", "gate": "channels", "long": "taps"}
        return {
            name: error_of(found[name], exact[name], kinds.get(name, "whole")) for name in exact
        }


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


# --- the plan -------------------------------------------------------------------------------------


LASTS = [4 * 64 * 64 if x.last is None else x.last for x in TABLE]


@pytest.mark.parametrize("T", [1, *LASTS, *[last + 1 for last in LASTS[:-1]]])
def test_every_plan_is_right_at_both_ends_of_its_range(T):
    x, kernel = drawn(1, T, 1, seed=1).half(), drawn(1, T, seed=2, scale=T**-0.5).half()
    z = long_conv(x, kernel)
    exact = reference.long_conv(x.double(), kernel.double())
    assert worst_block_error(z, exact, row_rms=True) <= 1e-3
    assert relative_error(z, exact) <= 8e-4


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_plan_covers_any_length(by_hand):
    assert plan_for(0).method == "direct"
    steps = [T + off for n in range(21) for T in (2**n, 3 * 2**n) for off in (-1, 0, 1)]
    for T in [*range(1, 9000), *steps, 1_000_000]:
        method, N2, blocks = plan_for(T, by_hand=by_hand)
        assert method == "direct" or T <= 64 * N2 * blocks < T + 64 * N2
        assert method != "monarch" or blocks == 1
        assert method != "blocks" or (by_hand and blocks <= 4)


def test_the_table_is_in_order_and_of_known_kernels():
    lasts = [x.last for x in TABLE]
    assert lasts[-1] is None and lasts[:-1] == sorted(set(lasts[:-1]))
    assert all(x.N2 in (WIDTHS if x.method != "direct" else (0,)) for x in TABLE)


def test_a_config_asks_for_another_plan():
    assert plan_for(1000, {"method": "direct"}) == Plan("direct", 0, 1)
    assert plan_for(1000, {"method": "monarch"}) == Plan("monarch", 16, 1)
    assert plan_for(1025, {"method": "monarch"}) == Plan("monarch", 32, 1)
    assert plan_for(1025, {"N2": 16}) == Plan("factors", 16, 2)
    assert plan_for(1000, {"N2": 64}) == Plan("monarch", 64, 1)
    assert plan_for(5000, {"method": "factors"}) == Plan("factors", 64, 2)
    assert plan_for(5000, {"method": "blocks"}, by_hand=True) == Plan("blocks", 32, 3)
    assert plan_for(1000, {"method": "blocks"}, by_hand=True) == Plan("monarch", 16, 1)
    assert plan_for(5000, by_hand=True) == Plan("blocks", 32, 3)
    assert plan_for(5000, {}) == plan_for(5000) == Plan("factors", 32, 3)
    for match, bad in {
        "no option 'N1' .*: method, N2": {"N1": 64},
        "no method 'fft'; it is one of direct, monarch, blocks, factors": {"method": "fft"},
        "no N2 8; it is one of 16, 32, 64": {"N2": 8},
        "no N2, got N2 = 16": {"method": "direct", "N2": 16},
        "T <= 1024 for method monarch with N2 = 16": {"method": "monarch", "N2": 16},
        "T <= 4096 for method monarch, .*method factors": {"method": "monarch"},
        "wanted a Hopper GPU .*method factors": {"method": "blocks"},
    }.items():
        with pytest.raises(ArgumentError, match=match):
            plan_for(5000, bad)
    with pytest.raises(ArgumentError, match=r"T <= 16384 for method blocks, 4 of .*T = 16385"):
        plan_for(16385, {"method": "blocks"}, by_hand=True)
    with pytest.raises(ArgumentError, match=r"T <= 8388608, .*got T = 8388609; cut"):
        plan_for(2**23 + 1)


def test_hbm_bytes_count_what_kernels_read_and_write():
    B, T, D = 8, 1024, 256
    shape, element, tap = {"B": B, "T": T, "D": D}, B * T * D, D * T
    assert hbm_bytes(shape, {}) == 2 * (6 * element + tap) + 2 * 4 * tap
    assert hbm_bytes(shape, {}, itemsize=4) == 4 * (6 * element + tap) + 2 * 8 * tap
    direct = {"method": "direct"}
    assert hbm_bytes(shape, direct) == 2 * (4 * element + tap) + 32 * (tap + 64 * D)
    factors = {"method": "factors", "N2": 16}
    taps = 2 * tap + 8 * tap  # of the kernel: norms read them; between factors, written and read
    assert hbm_bytes(shape, factors) == hbm_bytes(shape, {}) + 18 * element + taps
    for T in (100, 1000, 100_000):
        shape = {"B": 4, "T": T, "D": 64}
        assert hbm_bytes(shape, {}) > sum(short_long_conv_bytes(shape, 2, "fwd"))


all_ways = pytest.mark.parametrize("way", ["direct", "monarch", "factors"])
LENGTHS = {"direct": 100, "monarch": 1000, "factors": 1100}  # the last one in two blocks


@all_ways
def test_impulses_come_out_as_the_kernel_and_sums_as_sums(way):
    T, config = LENGTHS[way], WAYS[way]
    kernel = drawn(1, T, seed=1, scale=T**-0.5)
    noise = drawn(1, T, 1, seed=2)
    impulses = torch.zeros(2, T, 1, device=DEVICE)
    impulses[0, 0], impulses[1, T // 3] = 1, -2
    x = torch.cat([impulses, noise, 3 * noise + impulses[1:]])
    z = long_conv(x, kernel, config=config)[..., 0]
    torch.testing.assert_close(z[0], kernel[0], rtol=0, atol=1e-6)
    late = -2 * kernel[0, : T - T // 3]
    torch.testing.assert_close(z[1, T // 3 :], late, rtol=0, atol=1e-6)
    torch.testing.assert_close(z[3], 3 * z[2] + z[1], rtol=0, atol=2e-5)


@all_ways
@pytest.mark.parametrize("order", ["serial", "parallel"])
def test_the_adjoint_is_the_gradient(way, order):
    """<A x, y> = <x, A^T y> and, of two long kernels, each is its own tap's derivative."""
    x, y = drawn(1, 40, 1, seed=1), drawn(1, 40, 1, seed=2)
    long, future = drawn(1, 40, seed=3), drawn(1, 30, seed=4)
    x, long, future = (tensor.requires_grad_() for tensor in (x, long, future))
    options = {"activation": None, "causal": False, "identity": order == "serial"}
    z = short_long_conv(
        x, [], long, order=order, long_kernel_future=future, config=WAYS[way], **options
    )
    dx, dlong, dfuture = torch.autograd.grad(z, [x, long, future], y)
    products = [(x, dx), (-z, y)], [(long, dlong), (future, dfuture), (-z, y)]
    size = float((z.norm() * y.norm()).detach())
    for pairs in products:
        difference = sum(float((a * b).sum().detach()) for a, b in pairs)
        assert abs(difference) < 1e-6 * size


@all_ways
def test_same_inputs_same_bits_whatever_the_neighbours(way):
    """In float32, too, but for the interpreter, whose products depend on a row's place in a tile"""
    case = {"shape": (3, 40, 2), "dtype": "float16", "gate": "fixed", "way": way}
    call = Call(case)
    first, again = call.run(), call.run()
    assert all(torch.equal(first[name], again[name]) for name in first)
    alone = Call(case)
    alone.tensors["x"], alone.tensors["gate"] = (call.tensors[n][1:2] for n in ("x", "gate"))
    alone.dz = call.dz[1:2]
    found = alone.run()
    assert all(torch.equal(found[name], first[name][1:2]) for name in ("z", "x"))


@all_ways
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scales", [(1e4, 1e-6), (1e-6, 1e4)], ids=str)
def test_any_scale(way, dtype, scales):
    T = 100
    x = (drawn(1, T, 2, seed=1) * scales[0]).to(DTYPES[dtype])
    kernel = drawn(2, T, seed=2, scale=T**-0.5) * scales[1]
    z = long_conv(x, kernel, config=WAYS[way])
    exact = reference.long_conv(x.double(), kernel.double())
    assert worst_block_error(z, exact, row_rms=True) <= ALONE[x.dtype]
    if x.dtype == torch.float32:
        for size in scales:  # 1e8, then 1e-12
            z = long_conv(x * (size / scales[0]), kernel * (size / scales[1]), config=WAYS[way])
            factor = size * size / (scales[0] * scales[1])
            assert worst_block_error(z, exact * factor, row_rms=True) <= 2e-5


@pytest.mark.parametrize("sizes", [(1e31, 1e-3), (1e-33, 1e3), (1e-9, 1.0)], ids=str)
def test_factors_at_the_ends_of_float32(sizes):
    """Squares of rows overflow and vanish; so does a product of x and dz, of which dk is a sum."""
    T = 2048
    x, dz = drawn(2, 2, T, seed=1), drawn(2, 2, T, seed=3)
    kernel = drawn(2, T, seed=2, scale=T**-0.5)
    leaves = (x * sizes[0]).requires_grad_(), (kernel * sizes[1]).requires_grad_()
    z = long_conv(*leaves, layout="bdt", config=WAYS["factors"])
    dx, dk = torch.autograd.grad(z, leaves, dz * 1e-30)
    exact = [y.detach().double().requires_grad_() for y in (x, kernel)]
    right = reference.long_conv(*exact, layout="bdt")
    (right_dk,) = torch.autograd.grad(right, exact[1:], dz.double())
    assert relative_error(z.detach() / sizes[0] / sizes[1], right.detach()) <= 2e-5
    if sizes[0] == 1e31:
        assert relative_error(dk.double() / sizes[0] * 1e30, right_dk) <= 2e-5
    assert dk.isfinite().all() and dx.isfinite().all()


def test_what_is_far_below_the_norm_still_counts_in_it():
    """A norm taken too small would let float16 overflow."""
    T = 8192
    x, kernel = torch.full((1, 1, T), 2.0**-107, device=DEVICE), drawn(1, T, seed=1)
    x[..., 0] = 2.0**-104
    z = long_conv(x, kernel, layout="bdt", config=WAYS["factors"])
    exact = reference.long_conv(x.double(), kernel.double(), layout="bdt")
    assert relative_error(z * 2.0**104, exact * 2.0**104) <= 2e-5


def test_a_scale_for_each_frequency_of_blocks():
    transform = Transform(3, 16, torch.float16, torch.device(DEVICE), exact=False)
    y, scale = transform.there(drawn(2, 2, 3000, seed=1).half())
    each = 2.0 ** torch.arange(12, device=DEVICE).reshape(4, 3).flip(0)
    one, several = torch.empty(2, 2, 2, 3000, device=DEVICE).unbind()
    transform.back(y, scale, None, None, one)
    transform.back(y / each[:, :, None, None, None], scale[:, None] * each, None, None, several)
    assert relative_error(several, one.double()) <= 1e-3


def test_weights_of_a_large_batch():
    """More rows than one step of the kernel that weighs them, one of them far above the rest."""
    T, B = 1030, 70
    x, dz = drawn(B, 1, T, seed=1), drawn(B, 1, T, seed=3)
    x[66] *= 1e3
    kernel = drawn(1, T, seed=2, scale=T**-0.5).requires_grad_()
    z = long_conv(x, kernel, layout="bdt", config=WAYS["factors"])
    (dk,) = torch.autograd.grad(z, kernel, dz)
    exact = kernel.detach().double().requires_grad_()
    right = reference.long_conv(x.double(), exact, layout="bdt")
    (right_dk,) = torch.autograd.grad(right, exact, dz.double())
    assert relative_error(dk, right_dk) <= 2e-5


@all_ways
def test_an_outlier_leaks_little_into_its_past(way):
    """An error is relative to rms(z) of the whole row, and a transform spreads it over the row."""
    T, t = LENGTHS[way], LENGTHS[way] * 2 // 3
    x, kernel = drawn(1, T, 1, seed=1).half(), drawn(1, T, seed=2, scale=T**-0.5).half()
    x[0, t] = 1e4
    z = long_conv(x, kernel, config=WAYS[way])
    leak = (z - reference.long_conv(x.double(), kernel.double()))[:, :t]
    size = 1e4 * float(kernel.float().norm()) / T**0.5
    assert float(leak.square().mean().sqrt()) <= 1e-3 * size
    assert float(leak.abs().max()) <= 4e-3 * size


@all_ways
@pytest.mark.parametrize("order", ["serial", "parallel"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_no_number_spoils_its_own_row_alone(way, order):
    x, short, long = drawn(2, 20, 2, seed=1), [drawn(2, 3, seed=2)], drawn(2, 20, seed=3)
    clean = short_long_conv(x, short, long, order=order, config=WAYS[way])
    for number in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[1, 7, 1] = number
        z = short_long_conv(spoiled, short, long, order=order, config=WAYS[way])
        assert z[1, 7:, 1].isnan().all()
        z[1, :, 1] = clean[1, :, 1]
        assert torch.equal(z, clean)


@all_ways
@pytest.mark.parametrize("layout", ["btd", "bdt"])
def test_exact_head(way, layout):
    """The first tokens are small, and so is their output: a transform's error is not."""
    T, config = LENGTHS[way], WAYS[way]
    x = drawn(1, T, 1, seed=1).half()
    x[:, :70] *= 2.0**-9
    kernel = drawn(1, T, seed=2, scale=T**-0.5).half()
    gate = drawn(1, T, 1, seed=3).half()
    options = {"gate": laid_out(gate, layout), "layout": layout, "config": config}
    plain = laid_out(long_conv(laid_out(x, layout), kernel, **options), layout)
    exact = reference.long_conv(x.double(), kernel.double(), gate=gate.double())

    def head_error(z):
        return worst_block_error(z[:, :64], exact[:, :64])

    assert way == "direct" or head_error(plain) > 2e-2
    for head in (64, T + 5):
        z = long_conv(laid_out(x, layout), kernel, exact_head=head, **options)
        z = laid_out(z, layout)
        assert head_error(z) <= 1e-3 + ROUNDING[torch.float16]
        assert torch.equal(z[:, head:], plain[:, head:])


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


# --- kernels added up -----------------------------------------------------------------------------

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def added_up(kernels, identity, causal, D):
    """What `_merged` returns, by PyTorch's own operators."""
    W = max([1, *[kernel.shape[1] for kernel in kernels]])
    ahead = 0 if causal else W // 2
    total = torch.zeros(D, W, device=DEVICE)
    for kernel in kernels:
        before = 0 if causal else (W - kernel.shape[1]) // 2
        after = W - kernel.shape[1] - before
        total = total + torch.nn.functional.pad(kernel.float(), (before, after))
    return total + torch.eye(W, device=DEVICE)[ahead] if identity else total, ahead


def strided(kernel, i):
    """The same kernel in one of four layouts, inside of memory that is NaN."""
    D, W = kernel.shape
    around = kernel.new_full((2 * D + 1, 2 * W + 1), torch.nan)
    tap_major = kernel.new_full((2 * W + 1, D + 3), torch.nan)
    view = (around[:D, :W], around[1::2, 1::2], tap_major[:W, 3:].mT, tap_major[1::2, :D].mT)[i % 4]
    view.copy_(kernel)
    return view


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize("identity", [True, False], ids=["identity", "bare"])
@pytest.mark.parametrize(
    ("D", "widths"),
    [
        (3, ()), (1, (1,)), (33, (9,)), (64, (3, 17)), (2, (5, 1, 5)), (1, (1, 1, 1, 1)),
        (40, (3, 1, 9, 5)), (3, (3, 7, 1, 5, 3)), (2, (3, 1, 1, 5, 3, 3, 11)), (0, (3, 5)),
    ],
    ids=str,
)  # fmt: skip
def test_short_kernels_are_added_up_with_their_gradients(D, widths, identity, causal):
    if not widths and not identity:
        pytest.skip("nothing to merge")
    kernels = [
        strided(drawn(D, width, seed=i).to(FLOATS[i % 3]), i).requires_grad_()
        for i, width in enumerate(widths)
    ]
    x = drawn(1, D, 1, seed=20)
    with new_memory_is_nan():
        taps, ahead = module._merged(kernels, identity, causal, D, x)
    exact, exact_ahead = added_up(kernels, identity, causal, D)
    assert torch.equal(taps, exact)
    assert ahead == exact_ahead
    assert taps.mT.is_contiguous()
    if not kernels:
        return
    for around in (drawn(D, 2 * taps.shape[1], seed=21), drawn(2 * taps.shape[1], D, seed=21).mT):
        dtaps = around[:, ::2]
        found = torch.autograd.grad(taps, kernels, dtaps, retain_graph=True)
        wanted = torch.autograd.grad(exact, kernels, dtaps, retain_graph=True)
        for one, other, kernel in zip(found, wanted, kernels, strict=True):
            assert one.dtype == kernel.dtype
            assert torch.equal(one, other)


def test_gradients_of_two_kernels_share_no_memory():
    kernels = [drawn(3, 1, seed=i).requires_grad_() for i in range(2)]
    for _ in range(2):  # the second time, .grad is added to in place
        taps, _ = module._merged(kernels, True, True, 3, kernels[0])
        taps.backward(torch.ones_like(taps))
    assert all(torch.equal(kernel.grad, torch.full_like(kernel, 2)) for kernel in kernels)


def test_a_kernel_that_is_merged_is_taken_as_it_is():
    kernels = [drawn(3, 5, seed=1), drawn(3, 2, seed=2)]
    merged, _ = reparameterize(kernels, kernels[0], order="serial")
    assert module._merged([merged], False, True, 3, merged)[0] is merged
    assert module._merged([merged], True, True, 3, merged)[0] is not merged


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("taps", [None, 7, 4, 2, 0])
def test_first_taps_are_added_to_a_long_kernel(taps, dtype):
    long = drawn(3, 6, seed=1).to(dtype).requires_grad_()
    for width in (4, 6, 9):
        first = drawn(width, 3, seed=2).mT.requires_grad_()
        total = added(long, first, taps)
        exact = added_up([long, first], False, True, 3)[0][:, :taps]
        assert total.dtype == torch.float32
        assert torch.equal(total, exact)
        dtotal = drawn(*exact.shape, seed=3)
        found = torch.autograd.grad(total, [long, first], dtotal)
        wanted = torch.autograd.grad(exact, [long, first], dtotal)
        assert [x.dtype for x in found] == [dtype, torch.float32]
        assert all(map(torch.equal, found, wanted))


# --- kernels known beforehand ---------------------------------------------------------------------


@all_ways
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_spectrum_replaces_the_kernels_transform(way, dtype):
    x, config = drawn(1, 30, 2, seed=1).to(DTYPES[dtype]), WAYS[way]
    short, long = [drawn(2, 3, seed=2)], drawn(2, 50, seed=3)
    spectrum = kernel_spectrum(long, 30, dtype=x.dtype, config=config)
    assert torch.equal(long_conv(x, long, spectrum=spectrum), long_conv(x, long, config=config))
    z = short_long_conv(x, short, long, spectrum=spectrum)
    assert torch.equal(z, short_long_conv(x, short, long, config=config))
    assert not spectrum.values.requires_grad


@all_ways
@pytest.mark.parametrize("T", [1, 30])
def test_two_spectra_replace_the_transforms_of_a_pair(way, T):
    x, config = drawn(1, T, 2, seed=1), WAYS[way]
    long, future = drawn(2, 50, seed=3), drawn(2, 29, seed=4)
    options = {"causal": False, "order": "parallel", "identity": False}
    pair = {
        "spectrum": kernel_spectrum(long, T, config=config),
        "spectrum_future": kernel_spectrum(F.pad(future, (1, 0)), T, config=config),
    }
    z = short_long_conv(x, [], long, long_kernel_future=future, config=config, **options)
    zeros = torch.zeros_like(long), torch.zeros_like(future)  # nothing is read of them
    found = short_long_conv(x, [], zeros[0], long_kernel_future=zeros[1], **options, **pair)
    assert torch.equal(found, z)


def test_rejects_half_a_pair_of_spectra():
    x, long = drawn(1, 30, 2, seed=1), drawn(2, 30, seed=2)
    spectrum = kernel_spectrum(long, 30)
    with pytest.raises(ArgumentError, match="got no spectrum and a long_kernel_future"):
        short_long_conv(
            x, [], long, causal=False, long_kernel_future=long, spectrum_future=spectrum
        )
    with pytest.raises(ArgumentError, match="got a spectrum and no long_kernel_future"):
        short_long_conv(x, [], long, spectrum=spectrum, spectrum_future=spectrum)
    other = kernel_spectrum(long, 30, config=WAYS["monarch"])
    with pytest.raises(ArgumentError, match=r"wanted a spectrum .* got .*monarch"):
        short_long_conv(
            x, [], long, causal=False, long_kernel_future=long,
            spectrum=spectrum, spectrum_future=other,
        )  # fmt: skip


def test_rejects_a_spectrum_of_another_call():
    x, long = drawn(2, 30, 3, seed=1), drawn(3, 50, seed=2)
    monarch = kernel_spectrum(long, 30, config=WAYS["monarch"])
    for other in [
        kernel_spectrum(long, 31),
        kernel_spectrum(long[:2], 30),
        kernel_spectrum(long.half(), 30),
        dataclasses.replace(monarch, N2=32),
        dataclasses.replace(monarch, method="direct", N2=0),
        dataclasses.replace(monarch, values=monarch.values.mT.contiguous().mT),
        dataclasses.replace(monarch, scale=None),
        dataclasses.replace(monarch, scale=monarch.scale[:1]),
    ]:
        with pytest.raises(
            ArgumentError, match=r"wanted a spectrum .*make it with kernel_spectrum"
        ):
            long_conv(x, long, spectrum=other)
    with pytest.raises(ArgumentError, match=r"factors with N2 = 16, got .*monarch with N2 = 16"):
        long_conv(x, long, spectrum=monarch, config=WAYS["factors"])
    assert torch.equal(
        long_conv(x, long, spectrum=monarch, config=WAYS["monarch"]),
        long_conv(x, long, spectrum=monarch),
    )


@pytest.mark.parametrize("order", ["serial", "parallel"])
@pytest.mark.parametrize("widths", [(), (1,), (3, 7), (30, 2)], ids=str)
@pytest.mark.parametrize("identity", [True, False], ids=["identity", "bare"])
def test_merged_equals_unmerged(order, widths, identity):
    if order == "serial" and not widths and not identity:
        pytest.skip("nothing to merge: an error, tested below")
    x, long = drawn(1, 20, 2, seed=1), drawn(2, 15, seed=2)
    short = [drawn(2, width, seed=3 + i) for i, width in enumerate(widths)]
    z = short_long_conv(x, short, long, order=order, identity=identity)
    merged, long_merged = reparameterize(short, long, order=order, identity=identity)
    exact = reference.reparameterize(short, long, order=order, identity=identity)
    for found, wanted in zip((merged, long_merged), exact, strict=True):
        assert found is wanted is None or torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
    kernels = [] if merged is None else [merged]
    again = short_long_conv(x, kernels, long_merged, identity=False, order=order)
    assert relative_error(again, z.double()) <= 2e-5


@pytest.mark.parametrize("order", ["serial", "parallel"])
@pytest.mark.parametrize(
    ("widths", "identity"), [((), True), ((3, 1, 7), True), ((5, 3), False), ((), False)]
)
def test_reparameterized_pairs_give_the_same_output(widths, identity, order):
    if order == "serial" and not widths and not identity:
        return  # nothing reaches the long kernels
    x, long, future = drawn(1, 20, 2, seed=1), drawn(2, 15, seed=2), drawn(2, 2, seed=3)
    short = [drawn(2, width, seed=4 + i) for i, width in enumerate(widths)]
    exact = reference.short_long_conv(
        x.double(), short, long, order=order, identity=identity, causal=False,
        long_kernel_future=future,
    )  # fmt: skip
    merged, past, ahead = reparameterize_two_sided(
        short, long, future, order=order, identity=identity
    )
    assert (merged is None) == (order == "parallel")
    z = short_long_conv(
        x, [] if merged is None else [merged], past, order=order, identity=False, causal=False,
        long_kernel_future=ahead,
    )  # fmt: skip
    assert relative_error(z, exact) <= 2e-5


# --- the short convolution alone ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "widths", "layout", "dtype"),
    [
        ("silu", (3, 6), "btd", "float16"),
        (None, (3, 6), "bdt", "float32"),
        ("silu", (1,), "bdt", "float32"),
        (None, (), "btd", "float16"),
    ],
)
def test_streaming_equals_the_whole(activation, widths, layout, dtype):
    B, T, D = 1, 20, 3
    x = drawn(B, T, D, seed=1).to(DTYPES[dtype])
    short = [drawn(D, width, seed=2) for width in widths]
    whole = short_conv(x, short, activation=activation)
    exact = reference.short_conv(x.double(), short, activation=activation)
    assert relative_error(whole, exact) <= ROUNDING[x.dtype] + 1e-6
    state = torch.zeros(B, D, max([1, *widths]) - 1, device=DEVICE)
    pieces = []
    bounds = [*range(6), 5, 8, T]  # token by token, none, three, the rest
    for start, end in itertools.pairwise(bounds):
        piece = laid_out(x[:, start:end], layout)
        y = short_conv(piece, short, activation=activation, layout=layout, state=state)
        pieces.append(laid_out(y, layout))
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(state, x.mT[..., T - state.shape[2] :].float())


@pytest.mark.parametrize("tokens", [1, 9])
def test_gradients_after_a_state(tokens):
    x, short, state = drawn(2, tokens, 3, seed=1), drawn(3, 5, seed=2), drawn(2, 3, 4, seed=3)
    before = state.clone()
    results = []
    for function, dtype, kept in (
        (short_conv, torch.float32, state),
        (reference.short_conv, torch.float64, before.double()),
    ):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, short)]
        y = function(leaves[0], [leaves[1]], state=kept)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for found, exact in zip(*results, strict=True):
        assert relative_error(found, exact) <= 2e-5
    assert torch.equal(state, torch.cat([before, x.mT], dim=2)[..., tokens:])


def test_a_failed_call_leaves_the_state_as_it_was(monkeypatch):
    x, short, state = drawn(1, 4, 2, seed=1), [drawn(2, 3, seed=2)], drawn(1, 2, 2, seed=3)
    before = state.clone()

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "short", fails)
    with pytest.raises(RuntimeError):
        short_conv(x, short, state=state)
    assert torch.equal(state, before)


# --- errors ---------------------------------------------------------------------------------------


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
