"""Calls of the convolutions and of their reference, and how far apart they may be.

Tensors with a time axis are judged in blocks of 64 tokens against the rms of their row (b, d). The
budget: a long convolution alone, with float16 operands, is off by 6e-4 of rms(z) and rounds z; in
float32, pairs of float16 numbers lose 2^-22 a product. Then half a spacing of the dtype for each
rounding in a row besides: u between the convolutions, a product with the gate that has a pass of
its own, a sum of two halves. A gradient passes the same steps backwards. The interpreter truncates
to bfloat16, which costs a whole spacing each time.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from chela_bench.bench.check import error_of
from chela_bench.kernels.short_long_conv import (
    kernel_spectrum,
    short_long_conv,
)
from chela_bench.reference import short_long_conv as reference
from tests.attention import DEVICE, new_memory_is_nan

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
DEFAULTS = {
    "way": "planned", "order": "parallel", "activation": None, "identity": True, "causal": True,
    "layout": "btd", "gate": None, "taps": "as many", "widths": (3,), "known": False,
}  # fmt: skip


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


all_ways = pytest.mark.parametrize("way", ["direct", "monarch", "factors"])
LENGTHS = {"direct": 100, "monarch": 1000, "factors": 1100}  # the last one in two blocks
