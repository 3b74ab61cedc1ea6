"""What the compiler says of the long convolution's kernels for Hopper, which need not be there.

    python benchmarks/long_conv_static.py

A row a kernel, N2 and dtype of the rows, in the launcher's constants: registers a thread, stack
(spills lie there) in bytes, shared memory in KB, and counts of a few instructions. Gluon has no
interpreter, so this is the only test of them without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from compiling import compiled, facts

from chela_bench.kernels.launching import Launcher
from chela_bench.kernels.long_conv_factors import BY_HAND
from chela_bench.kernels.long_conv_monarch import (
    BLOCKS,
    BLOCKS_BY_HAND,
    SPECTRA_BY_HAND,
    SPECTRUM,
    SPECTRUM_OF_ROWS,
    WARPS,
    by_hand,
    constants,
)

ROWS = ("x_ptr", "z_ptr", "dz_ptr", "dx_ptr", "gate_ptr", "taps_ptr")
FLOAT32 = ("scale_ptr", "weight_ptr", "dk_ptr", "k_ptr")


def type_of(rows: str) -> Callable[[str], str]:
    """Of a kernel's arguments, by name; of rows, as given."""

    def found(name: str) -> str:
        if name.endswith("_ptr"):
            return rows if name in ROWS else "fp32" if name in FLOAT32 else "fp16"
        return "fp32" if name == "shrink" else "i64"

    return found


def every() -> Iterator[tuple[str, Launcher, int, torch.dtype, dict[str, Any]]]:
    """Name, kernel, N2, dtype of the rows, flags."""
    half, bf16 = torch.float16, torch.bfloat16
    for N2 in (16, 64):
        for dtype in (bf16, half):
            one_row = by_hand("_long_conv_wgmma_kernel")
            yield "row", one_row, N2, dtype, {"ADJOINT": False, "HAS_GATE": False}
            gradients = by_hand("_long_conv_wgmma_gradients_kernel")
            for is_one in (True, False):
                flags = {"HAS_GATE": False, "NEEDS_DX": True, "IS_ONE": is_one}
                yield f"gradients{', B 1' * is_one}", gradients, N2, dtype, flags
    one_row = by_hand("_long_conv_wgmma_kernel")
    yield "row, gate", one_row, 64, bf16, {"ADJOINT": True, "HAS_GATE": True}
    flags = {"HAS_GATE": True, "NEEDS_DX": True, "IS_ONE": False}
    yield "gradients, gate", gradients, 64, bf16, flags
    for dtype in (bf16, torch.float32):  # float32: in pairs, for float16 rows
        spectrum = by_hand(SPECTRUM, SPECTRA_BY_HAND)
        for blocks in (1, BLOCKS):
            yield "spectrum", spectrum, 64, dtype, {"BLOCKS": blocks}
    of_rows = by_hand(SPECTRUM_OF_ROWS, SPECTRA_BY_HAND)
    for blocks in range(1, BLOCKS + 1):
        yield f"spectrum of {blocks}", of_rows, 64, bf16, {"BLOCKS": blocks}
    for blocks in range(2, BLOCKS + 1):
        flags = {"BLOCKS": blocks, "SHRINK": 0.25, "ADJOINT": False, "HAS_GATE": False}
        together = by_hand("_long_conv_wgmma_blocks_kernel", BLOCKS_BY_HAND)
        yield f"{blocks} blocks", together, 64, half, flags
    for dtype in (bf16, half):
        yield "rows", by_hand("_convolve_rows_wgmma_kernel", BY_HAND), 64, dtype, {"ADJOINT": False}
        gradients = by_hand("_gradient_rows_wgmma_kernel", BY_HAND)
        for needs_dx in (True, False):
            name = "gradient rows" if needs_dx else "sum of rows"
            yield name, gradients, 64, dtype, {"NEEDS_DX": needs_dx}
    for blocks in range(2, BLOCKS + 1):
        flags = {"BLOCKS": blocks, "HAS_GATE": False}
        yield f"sum of {blocks}", by_hand("_sum_of_blocks_wgmma_kernel", BY_HAND), 64, bf16, flags
    yield "spectrum rows", by_hand("_spectrum_rows_wgmma_kernel", BY_HAND), 64, bf16, {}


def main() -> None:
    print(f"Triton {triton.__version__}, sm_90, unit 8")
    for name, launcher, N2, dtype, flags in every():
        values = constants(launcher, N2, dtype, True, 8, **flags)
        names = launcher.kernel.arg_names
        given = dict(zip(names[-len(values) :], values, strict=True))
        if flags.get("HAS_GATE") is False:
            given["gate_ptr"] = None
        rows = "fp16" if dtype == torch.float16 or name.endswith("rows") else "bf16"
        shown = facts(compiled(launcher.kernel, given, type_of(rows), num_warps=WARPS))
        print(f"{name:10} N2 {N2:<2} {str(dtype).removeprefix('torch.'):8} {shown}", flush=True)


if __name__ == "__main__":
    main()
