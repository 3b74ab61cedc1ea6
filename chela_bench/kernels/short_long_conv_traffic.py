"""What the launches of convolutions read and write, modelled: forward, causal, without a gate.

Tensors are "x" and "z", and what is between them. Left out: short kernels, scales, tables, and the
float32 copy of a long kernel's taps for direct sums. Without a GPU, 16-bit rows are counted as on
Hopper.
"""

from __future__ import annotations

from collections.abc import Mapping

from chela_bench.kernels.launching import (
    MODELLED,
    Launcher,
    cdiv,
    has_wgmma,
    modelled_device,
    processors,
)
from chela_bench.kernels.long_conv_direct import BLOCK, _direct, _shifted_taps
from chela_bench.kernels.long_conv_factors import (
    _blocks_back,
    _blocks_there,
    _convolve_rows,
    _norms,
    _spectrum_rows,
)
from chela_bench.kernels.long_conv_monarch import (
    N1,
    PROGRAMS,
    SPECTRUM,
    SPECTRUM_OF_ROWS,
    _long_conv,
    _spectrum,
)
from chela_bench.kernels.long_conv_plan import Plan, plan_for
from chela_bench.kernels.short_conv import _forward
from chela_bench.kernels.traffic import OTHER, Again, Step, name_of
from chela_bench.kernels.transposed_product import _products
from chela_bench.kernels.tuned import tuned

Sizes = Mapping[str, int]
Config = Mapping[str, int | str]


def short_long_conv_steps(
    shape: Sizes, config: Config | None = None, *, itemsize: int = 2, kept: bool = False
) -> list[Step]:
    """Of `short_long_conv` at {B, T, D} of token-major x; `kept`: after `reparameterize`, the
    spectrum known. config: "order", and the long convolution's own."""
    config = config or {}
    way = _Way(shape, config, itemsize)
    if config.get("order", "serial") == "serial":
        return [way.short("x", "u"), *way.long("u", "z", itemsize, kept=kept, tokens=True)]
    size = 4  # merged taps are float32
    steps = way.long("x", "z", size, kept=kept, tokens=True, transposes=True)
    if kept:
        return steps
    return [Step(OTHER, {"kernel": way.taps * itemsize}, {"taps": way.taps * size}), *steps]


def long_conv_steps(shape: Sizes, config: Config, *, itemsize: int = 2) -> list[Step]:
    """Of `long_conv` at {B, T, D} of channel-major x; config may say spectrum="made"."""
    kept = config.get("spectrum", "kept") == "kept"
    return _Way(shape, config, itemsize).long("x", "z", itemsize, kept=kept, tokens=False)


def unmerged_steps(shape: Sizes, config: Config, *, itemsize: int = 2) -> list[Step]:
    """Of two short branches by kernels of their own, their sum with x, and the long convolution, as
    the bench's triton_unmerged calls them."""
    way = _Way(shape, {}, itemsize)
    element = way.element

    def pointwise(read: tuple[str, ...], write: str) -> Step:
        return Step(OTHER, dict.fromkeys(read, element), {write: element})

    steps = [
        way.short("x", "branch 1"),
        way.short("x", "branch 2"),
        pointwise(("x", "branch 1"), "sum 1"),
        pointwise(("sum 1", "branch 2"), "sum 2"),
    ]
    if config.get("order", "serial") == "serial":
        steps.append(pointwise(("sum 2",), "u"))
        return [*steps, *way.long("u", "z", itemsize, kept=False, tokens=True)]
    steps += way.long("x", "long", itemsize, kept=False, tokens=True, transposes=True)
    return [*steps, pointwise(("sum 2", "long"), "z")]


def merged_steps(shape: Sizes, config: Config, *, itemsize: int = 2) -> list[Step]:
    """Of the same after `reparameterize`."""
    return short_long_conv_steps(shape, config, itemsize=itemsize, kept=True)


class _Way:
    """How a convolution at one shape goes about it."""

    def __init__(self, shape: Sizes, config: Config, itemsize: int) -> None:
        self.B, self.D, T = (shape[dim] for dim in "BDT")
        self.device = modelled_device()
        self.by_hand = itemsize == 2 and (self.device.type == "cpu" or has_wgmma(self.device))
        chosen = {name: x for name, x in config.items() if name in ("method", "N2")}
        known = chosen or tuned("long_conv", self.device, MODELLED[itemsize], tokens=T)
        self.plan: Plan = plan_for(T, known or None, by_hand=self.by_hand)
        self.itemsize = itemsize
        self.taps = self.D * T  # of the long kernel
        self.element = self.B * self.taps * itemsize
        self.complex = 2 * itemsize  # bytes, of a spectrum and between factors
        self.padded = self.D * self.plan.blocks * N1 * self.plan.N2

    def short(self, x: str, y: str) -> Step:
        return Step(name_of(_forward), {x: self.element}, {y: self.element})

    def long(
        self,
        x: str,
        z: str,
        size: int,
        *,
        kept: bool,
        tokens: bool,
        transposes: bool = False,
    ) -> list[Step]:
        """x to z by taps of `size` bytes each; `tokens`: z is token-major, and if it `transposes`,
        x as well."""
        element = self.element
        if self.plan.method == "direct":
            aligned = {"aligned taps": (self.taps + 2 * BLOCK * self.D) * 16}
            return [
                Step(name_of(_shifted_taps), {"taps": self.taps * size}, aligned),
                Step(name_of(_direct), {x: element, **aligned}, {z: element}),
            ]
        steps = []
        rows, out = x, z
        if tokens and transposes:
            rows = f"{x} in rows"
            steps.append(Step(name_of(_products), {x: element}, {rows: element}))
        if not kept:
            steps += self._spectrum(size)
        if tokens:
            out = f"{z} in rows"
        steps += (
            self._factors(rows, out) if self.plan.method == "factors" else [self._one(rows, out)]
        )
        if tokens:
            steps.append(Step(name_of(_products), {out: element}, {z: element}))
        return steps

    def _spectrum(self, size: int) -> list[Step]:
        """Of the kernel."""
        taps = {"taps": self.taps * size}
        spectrum = {"spectrum": self.padded * self.complex}
        if self.plan.method != "factors":
            name = self._name(_spectrum, SPECTRUM_OF_ROWS if size == 2 else SPECTRUM)
            return [Step(name, taps, spectrum)]
        y = {"taps' factors": self.padded * (4 if self.by_hand and self.itemsize == 2 else 8)}
        rows = self._name(_spectrum_rows, "_spectrum_rows_wgmma_kernel")
        return [
            Step(name_of(_norms), taps, {}),
            Step(name_of(_blocks_there), taps, y),
            Step(rows, y, spectrum),
        ]

    def _one(self, x: str, z: str) -> Step:
        """One kernel for all blocks; rows of one channel read its spectrum one after the other."""
        name = self._name(_long_conv, "_long_conv_wgmma_kernel")
        if self.plan.method == "blocks":
            name = self._name(_long_conv, "_long_conv_wgmma_blocks_kernel")
        spectrum, rows = self.padded * self.complex, self.B * self.D
        each = cdiv(rows, PROGRAMS[self.plan.N2] * processors(self.device))
        round_of_programs = cdiv(rows, each) * (spectrum // self.D + 2 * self.element // rows)
        again = Again((self.B - 1) * spectrum, round_of_programs)
        return Step(name, {x: self.element, "spectrum": spectrum}, {z: self.element}, again)

    def _factors(self, x: str, z: str) -> list[Step]:
        element, y = {x: self.element}, {"factors": self.B * self.padded * self.complex}
        spectrum = {"spectrum": self.padded * self.complex}
        rows = self._name(_convolve_rows, "_convolve_rows_wgmma_kernel")
        return [
            Step(name_of(_norms), element, {}),
            Step(name_of(_blocks_there), element, y),
            Step(rows, {**y, **spectrum}, y),
            Step(name_of(_blocks_back), y, {z: self.element}),
        ]

    def _name(self, launcher: Launcher, for_hopper: str) -> str:
        """Gluon's kernels are named, not imported: that takes a GPU, or Triton not interpreting."""
        return for_hopper if self.by_hand else name_of(launcher)
