"""What the compiler says of the layer's pointwise kernels for Hopper, which need not be there.

    python benchmarks/gates_static.py

A row a kernel and dtype, in the launcher's constants: registers a thread, stack (spills lie there)
in bytes, shared memory in KB, and counts of a few instructions, then of loads and stores by width:
a thread's 16 numbers are two of .v4.b32 a tensor in 16 bits, and four in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import triton
from compiling import compiled, facts

from chela_bench.kernels import gates, normalize, queries_keys, row_sums
from chela_bench.kernels.rows import tile


def type_of(types: dict[str, str]) -> Callable[[str], str]:
    """Of a kernel's arguments, by name; of pointers as `types` says, "all" of the rest."""

    def found(name: str) -> str:
        if name.endswith("_ptr"):
            return types.get(name, types["all"])
        return "fp32" if name in ("eps", "root_eps") else "i64"

    return found


def every(dtype: str) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str], int]]:
    """Name, kernel, constexprs and missing pointers, dtypes of pointers, warps."""
    alike = {"all": dtype, "parts_ptr": "fp32"}
    for V in (128, 1000, 2048, 4096):
        blocks = tile(V, gates.TILE, columns=gates.MAX_V)
        warps = gates.warps(blocks["BLOCK_N"])
        given = {"V": V, "ACTIVATION": "sigmoid", "UNIT": 8, "shrink_ptr": None, **blocks}
        forward, backward = gates._norm_gate_fwd_kernel, gates._norm_gate_bwd_kernel
        yield f"norm_gate V {V}", forward, given, alike, warps
        yield f"norm_gate' V {V}", backward, given, alike, warps
    given |= {"ACTIVATION": "silu"}
    wide = {**alike, "o_ptr": "fp32", "do_ptr": "fp32"}
    yield f"norm_gate V {V}, o fp32", forward, given, wide, warps
    yield f"norm_gate' V {V}, o fp32", backward, given, wide, warps
    shrunk = {x: y for x, y in given.items() if x != "shrink_ptr"}
    yield f"norm_gate' V {V}, shrunk", backward, shrunk, {**alike, "shrink_ptr": "fp32"}, warps
    given |= {"a_ptr": None, "da_ptr": None, "parts_ptr": None}
    yield f"norm_gate' V {V}, no a", backward, given, alike, warps
    for K in (128, 1000):
        given = {"K": K, "ACTIVATION": "silu", "UNIT": 8}
        forward, backward = (
            queries_keys._queries_keys_fwd_kernel,
            queries_keys._queries_keys_bwd_kernel,
        )
        yield f"queries_keys K {K}", forward, given | tile(K, queries_keys.TILE), alike, 4
        given |= {"S": 5, **tile(K, row_sums.WALKED)}
        types = {**alike, "a_q_ptr": "fp32", "a_k_ptr": "fp32"}
        yield f"queries_keys' K {K}", backward, given, types, 4
        yield f"queries_keys' K {K}, no sums", backward, given | {"parts_ptr": None}, types, 4
    summed = {"S": 5, "N": K, **row_sums.SUMMED}
    yield "sum of parts", row_sums._sum_parts_kernel, summed, {"all": "fp32"}, 4
    given = {"N": 1024, "UNIT": 8}
    forward, backward = gates._output_gate_fwd_kernel, gates._output_gate_bwd_kernel
    missing = {"g_ptr": None, "x_ptr": None}
    whole, walked = tile(1024, gates.TILE), tile(1024, row_sums.WALKED)
    sums = {"SUM_H": True, "SUM_G": True}
    yield "output_gate", forward, given | whole, alike, 4
    yield "output_gate'", backward, given | walked | sums, alike, 4
    yield "silu", forward, given | whole | missing, alike, 4
    missing |= {"dg_ptr": None, "dx_ptr": None, "SUM_H": True, "SUM_G": False}
    yield "silu'", backward, given | walked | missing, alike, 4
    for D in (1024, 4096):
        given = {"D": D, "UNIT": 8, **tile(D, row_sums.WALKED, columns=normalize.MAX_D)}
        types = {**alike, "mean_ptr": "fp32", "r_ptr": "fp32"}
        warps = normalize._warps(D)
        yield f"norm D {D}", normalize._normalize_fwd_kernel, given, types, warps
        yield f"norm' D {D}", normalize._normalize_bwd_kernel, given | {"S": 2}, types, warps


def main() -> None:
    print(f"Triton {triton.__version__}, sm_90, unit 8; ' is a backward")
    for dtype in ("bf16", "fp32"):
        for name, kernel, values, types, warps in every(dtype):
            found = compiled(kernel, values, type_of(types), num_warps=warps)
            vectors = re.findall(r"(?:ld|st)\.global((?:\.v\d)?\.b\d+)", found.asm["ptx"])
            counts = " ".join(f"{x} {vectors.count(x)}" for x in sorted(set(vectors)))
            print(f"{name:26} {dtype} {facts(found)}   {counts}", flush=True)


if __name__ == "__main__":
    main()
