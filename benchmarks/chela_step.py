"""A step of decoding, called eagerly and as a CUDA graph: wall and host time. On a GPU.

    python benchmarks/chela_step.py [--batch 64] [--width 1024] [--prompt 16000] [--dtype bfloat16]

Microseconds a step over a block of 64 steps, squares of the convolution included: wall, from the
first call to the synchronised end; host, until the last call returns. The best of a few blocks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from chela_bench.kernels.chela import ChelaLayer
from chela_bench.kernels.chela_graph import StepGraph

STEPS = 64


def block(step: Callable[[Tensor], Tensor], tokens: Tensor) -> tuple[float, float]:
    """Wall and host time a step of tokens [STEPS, B, D], in us."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for x in tokens:
        step(x)
    issued = time.perf_counter()
    torch.cuda.synchronize()
    ended = time.perf_counter()
    return (ended - start) / len(tokens) * 1e6, (issued - start) / len(tokens) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=16000)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    asked = parser.parse_args()
    B, D, T, dtype = asked.batch, asked.width, asked.prompt, getattr(torch, asked.dtype)
    torch.manual_seed(0)
    most = T + (2 * asked.blocks + 1) * STEPS  # a block is left, for two steps to warm up
    layer = ChelaLayer(D, max_length=most, implementation="triton")
    layer = layer.to("cuda", dtype).eval()
    cache = layer.prefill(torch.randn(B, 1, D, device="cuda", dtype=dtype).expand(B, T, D))[1]
    tokens = torch.randn(STEPS, B, D, device="cuda", dtype=dtype)
    graph = StepGraph(lambda x: layer.step(x, cache), tokens[0], [cache])
    ways = {"eager": lambda x: layer.step(x, cache), "graph": graph}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, B {B}, D {D}, {asked.dtype}")
    for name, step in ways.items():
        step(tokens[0])
        times = [block(step, tokens) for _ in range(asked.blocks)]
        wall, host = (min(column) for column in zip(*times, strict=True))
        print(f"{name}: wall {wall:.0f} us, host {host:.0f} us a step", flush=True)


if __name__ == "__main__":
    main()
