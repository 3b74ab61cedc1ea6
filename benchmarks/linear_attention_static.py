"""What Triton's compiler says of linear attention's kernels, for a GPU that need not be there.

    python benchmarks/linear_attention_static.py [--arch 90] [--only hopper]

Registers a thread, stack (spills lie there) in bytes, dynamic shared memory in KB, and counts of a
few instructions, at K = V = 64 and 128 in bfloat16. The tables in docs/results/linear-attention.md
come from here; figures move with Triton's version, which is printed. `--only hopper`: the kernels
scheduled by hand, with the constants that the launcher gives them; the only test of them without a
GPU, since Gluon has no interpreter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from compiling import compiled, facts

from chela_bench.kernels import linear_attention_kept as kept
from chela_bench.kernels import linear_attention_sweep as sweeps
from chela_bench.kernels import linear_attention_walk as walks
from chela_bench.kernels.linear_attention_model import SM90


def type_of(kernel: Any) -> Callable[[str], str]:
    """Of the kernel's arguments, by name."""
    states = (
        "states_ptr",
        "sums_ptr",
        "squares_ptr",
        "initial_ptr",
        "final_ptr",
        "before_ptr",
        "behind_ptr",
    )

    def found(name: str) -> str:
        if name.endswith("_ptr"):
            wide = name in states and kernel is not kept._linear_attention_kept_kernel
            return "fp32" if wide else "bf16"
        if name == "scale":
            return "fp32"
        return "i64" if name == "T" or name.startswith("stride") else "i32"

    return found


def by_hand() -> Iterator[tuple[str, Any, dict[str, Any], int, int]]:
    """Each tile, and with all that a walk can be asked for at once; sweeps likewise."""
    on_hopper(walks)
    on_hopper(sweeps)
    on_hopper(kept)
    device = torch.device("cuda", 0)
    for K, V, columns, warps, stages, what in [
        *((K, K, x.BLOCK_V, x.num_warps, x.num_stages, "")
          for K, tiles in SM90.walks.items() for x in tiles),
        (128, 128, 64, 4, 3, "everything"), (96, 80, 128, 8, 3, "everything"),
        (128, 2048, 128, 8, 3, "keeps"), (128, 2048, 128, 8, 3, "keeps, reversed"),
        (128, 2048, 128, 8, 3, "gated"), (128, 2048, 64, 4, 3, "gated"),
    ]:  # fmt: skip
        everything, keeps = what == "everything", what.startswith("keeps")
        options = (64, columns, warps, stages, -1, 1, int(keeps))
        keys, slots = (torch.empty(1, 64, 16, size, device="meta") for size in (K, V))
        rows = [x.stride() for x in (keys, keys, slots, slots)]
        packed = torch.int64 if everything else None
        variant, _, _ = walks.walk_plan(
            keys.shape, V, *rows, torch.bfloat16, device, 1.0, 1, 1, 1, options, False, True,
            what in ("everything", "keeps, reversed"), packed, *[everything] * 3, keeps,
            what == "gated", "sigmoid" if what == "gated" else None,
        )  # fmt: skip
        kernel = variant.launcher.kernel
        assert variant.launcher is walks.walk_by_hand()
        constants = named(kernel, variant.constants)
        if not everything:
            constants |= {"initial_ptr": None, "final_ptr": None, "cu_seqlens_ptr": None}
        if not keeps:
            constants["kept_ptr"] = None
        if what != "gated":
            constants |= {"a_ptr": None, "squares_ptr": None}
        name = f"walk  K {K:<3} V {V:<4} BLOCK_V {columns:<3} {what}"
        yield name, kernel, constants, warps, stages
    for K, V, what in [
        (128, 128, "alike"), (64, 64, "alike"), (128, 2048, "paired"), (128, 128, "apart"),
        (96, 320, "apart, everything"),
    ]:  # fmt: skip
        everything = what.endswith("everything")
        keys, slots = (torch.empty(1, 64, 16, size, device="meta") for size in (K, V))
        apart = torch.empty(1, 64, 16, 2 * V, device="meta")[..., :V]
        rows = [
            x.stride() for x in (keys, keys, slots, apart if what.startswith("apart") else slots)
        ]
        packed = torch.int64 if everything else None
        plan = sweeps._sweep_plan(
            keys.shape, V, *rows, torch.bfloat16, device, 1.0, 1, 1, False, True, packed,
            (-1,) * 5 + (1, -1), True, True, everything, 4,
        )  # fmt: skip
        variant = plan.rounds[0][1]
        assert variant.launcher is sweeps.sweep_by_hand()
        constants = named(variant.launcher.kernel, variant.constants)
        if not everything:
            constants |= {"first_ptr": None, "cu_seqlens_ptr": None}
        name = f"sweep K {K:<3} V {V:<4} {what}"
        yield name, variant.launcher.kernel, constants, variant.num_warps, variant.num_stages
    keys, slots = (torch.empty(1, 64, 1, size, device="meta") for size in (128, 2048))
    rows = [x.stride() for x in (keys, keys, slots, slots)]
    variant, _, _ = kept.kept_plan(keys.shape, 2048, *rows, torch.bfloat16, device, 1.0)
    constants = named(variant.launcher.kernel, variant.constants)
    name = "kept  K 128 V 2048"
    yield name, variant.launcher.kernel, constants, variant.num_warps, variant.num_stages


def named(kernel: Any, values: tuple[object, ...]) -> dict[str, Any]:
    return dict(zip(kernel.arg_names[-len(values) :], values, strict=True))


def on_hopper(module: Any) -> None:
    """The plans ask the device."""
    module.has_wgmma = lambda _: True
    if hasattr(module, "processors"):
        module.processors = lambda _: 132


def by_triton() -> Iterator[tuple[str, Any, dict[str, Any], int, int]]:
    shared = {
        "UNIT": 16, "IS_CAUSAL": True, "IS_PACKED": False, "cu_seqlens_ptr": None,
        "ALIGN": walks.SEGMENT_ALIGN, **walks.precision(torch.bfloat16, False),
    }  # fmt: skip
    for d, tokens, columns, warps, stages in [
        (128, 64, 64, 4, 2), (128, 64, 64, 4, 3), (128, 64, 64, 8, 2), (128, 64, 128, 4, 2),
        (128, 64, 128, 8, 2), (128, 64, 128, 8, 3), (128, 128, 64, 8, 2), (128, 128, 128, 8, 2),
        (64, 64, 64, 4, 2), (64, 128, 64, 8, 2),
    ]:  # fmt: skip
        constants = {
            **shared, "K": d, "V": d, "BLOCK_T": tokens, "BLOCK_K": d, "BLOCK_V": columns,
            "IS_REVERSED": False, "STATE_IS_TRANSPOSED": False, "USE_INITIAL_STATE": False,
            "STORE_FINAL_STATE": False, "initial_ptr": None, "final_ptr": None, "kept_ptr": None,
            "KEEP": 0,
        }  # fmt: skip
        name = f"walk  d {d:<3} BLOCK_T {tokens:<3} BLOCK_V {columns:<3}"
        yield name, walks._linear_attention_walk_kernel, constants, warps, stages
    for d, tokens, warps, sums in [
        (128, 64, 8, False), (128, 64, 8, True), (128, 32, 8, False), (128, 64, 4, False),
        (64, 64, 4, True),
    ]:  # fmt: skip
        constants = {
            **shared, "K": d, "V": d, "BLOCK_T": tokens, "BLOCK_K": d, "BLOCK_V": d, "NV": 1,
            "USE_BEFORE": not sums, "USE_BEHIND": not sums, "SUM_BEHIND": sums,
            "STORE_FIRST": False, "first_ptr": None,
        }  # fmt: skip
        if sums:
            constants |= {"before_ptr": None, "behind_ptr": None}
        name = f"sweep d {d:<3} BLOCK_T {tokens:<3} {'sums R' if sums else ''}"
        yield name, sweeps._linear_attention_sweep_kernel, constants, warps, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--only", choices=("triton", "hopper"), help="half of the kernels")
    arguments = parser.parse_args()
    arch, only = arguments.arch, arguments.only
    cases = [*(by_triton() if only != "hopper" else ()), *(by_hand() if only != "triton" else ())]
    print(f"sm_{arch}, Triton {triton.__version__}")
    for name, kernel, constants, warps, stages in cases:
        made = compiled(
            kernel, constants, type_of(kernel), num_warps=warps, num_stages=stages, arch=arch
        )
        print(f"{name:<34} warps {warps} stages {stages} {facts(made)}", flush=True)


if __name__ == "__main__":
    main()
