"""What the launches of a CHELA layer read and write, modelled: forward, without gradients, one
head, causal, serial, every gate, bfloat16 or float32.

Left out beside what its parts leave out: whatever has D, K or V numbers in all, and a few of each
token for its norms. cuBLAS's products are taken to read once what they are given.
"""

from __future__ import annotations

from collections.abc import Mapping

from chela_bench.kernels.gated_attention import LEAST
from chela_bench.kernels.gates import _norm_gate_fwd, _output_gate_fwd
from chela_bench.kernels.linear_attention import hbm_steps
from chela_bench.kernels.linear_attention_walk import _walk
from chela_bench.kernels.normalize import _normalize_fwd
from chela_bench.kernels.queries_keys import _queries_keys_fwd
from chela_bench.kernels.short_long_conv_traffic import short_long_conv_steps
from chela_bench.kernels.traffic import PRODUCT, Step, name_of, renamed

Sizes = Mapping[str, int]
Config = Mapping[str, int | str]


def layer_steps(
    shape: Sizes, config: Config, *, itemsize: int = 2, merged: bool = False
) -> list[Step]:
    """At {B, T, D, K, V}; `merged`: after `reparameterize`."""
    del config  # it has none
    B, T, D, K, V = (shape[dim] for dim in "BTDKV")
    wide = {"x": D, "normed": D, "z": D, "p": K, "q": K, "k": K, "values": V, "v": V, "a": V,
            "o": V, "m": V, "h": D, "u": D, "g": D, "y": D}  # fmt: skip

    def tensors(*names: str) -> dict[str, int]:
        return {name: B * T * wide[name] * itemsize for name in names}

    def step(kernel: str, reads: tuple[str, ...], *writes: str) -> Step:
        return Step(kernel, tensors(*reads), tensors(*writes))

    def product(x: str, y: str, *added: str) -> Step:
        weight = {f"{x} to {y}": wide[x] * wide[y] * itemsize}
        return Step(PRODUCT, {**tensors(x, *added), **weight}, tensors(y))

    gate = name_of(_output_gate_fwd)
    convolution = short_long_conv_steps({"B": B, "T": T, "D": D}, itemsize=itemsize, kept=merged)
    attention = hbm_steps({"B": B, "T": T, "H": 1, "K": K, "V": V}, {}, itemsize=itemsize)
    *sums, walk = attention
    steps = [
        step(name_of(_normalize_fwd), ("x",), "normed"),
        product("normed", "values"),
        *renamed(convolution, x="normed"),
        product("z", "p"),
        step(name_of(_queries_keys_fwd), ("p",), "q", "k"),
        step(gate, ("values",), "v"),
    ]
    if B * T >= LEAST and walk.kernel != name_of(_walk):  # gated_attention.py
        gated = walk._replace(reads={**walk.reads, **tensors("a")}, writes=tensors("m"))
        return [
            *steps, product("z", "a"), *sums, gated, product("z", "g"), product("m", "u"),
            product("z", "h"), step(gate, ("h", "u", "g", "x"), "y"),
        ]  # fmt: skip
    return [
        *steps, *attention, product("z", "a"), step(name_of(_norm_gate_fwd), ("o", "a"), "m"),
        product("z", "h"), product("m", "h", "h"), product("z", "g"),
        step(gate, ("h", "g", "x"), "y"),
    ]  # fmt: skip


def merged_layer_steps(shape: Sizes, config: Config, *, itemsize: int = 2) -> list[Step]:
    return layer_steps(shape, config, itemsize=itemsize, merged=True)
