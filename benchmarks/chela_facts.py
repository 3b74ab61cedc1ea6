"""Where the time and the memory of the CHELA layer go, kernel by kernel; a sweep gives the sums.

    python benchmarks/chela_facts.py times [--shape 1,16384]
    python benchmarks/chela_facts.py memory [--shape 8,2048]
    ncu --metrics dram__bytes_read.sum,dram__bytes_write.sum --csv \
        python benchmarks/chela_facts.py once [--shape 1,16384]

Shapes are B,T; D = 1024, K = 128, V = 2048, one head, serial, causal, bfloat16. Times, in
microseconds a call: kernel spans by the profiler, ten calls, warm L2; their number a call in front.
Memory: the peak of a forward and a backward beyond what there was before, in units of B T D * 2
bytes. `once`: one of each, for a profiler to look at.
"""

from __future__ import annotations

import argparse
import re

import torch
from kernel_spans import spans
from torch import Tensor

from chela_bench.kernels.chela import ChelaLayer

SHAPES = ("1,16384", "8,2048")


def layer_and_input(shape: str) -> tuple[ChelaLayer, Tensor]:
    B, T = map(int, shape.split(","))
    layer = ChelaLayer(1024, max_length=T, implementation="triton").to("cuda", torch.bfloat16)
    return layer, torch.randn(B, T, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def times(shape: str) -> None:
    layer, x = layer_and_input(shape)
    with torch.no_grad():
        report(f"{shape} forward", spans(lambda: layer(x)))
    y = layer(x)
    dy = torch.randn_like(y)
    leaves = [x, *layer.parameters()]
    report(
        f"{shape} backward",
        spans(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)),
    )
    report(f"{shape} forward + backward", spans(lambda: torch.autograd.grad(layer(x), leaves, dy)))


def memory(shape: str) -> None:
    layer, x = layer_and_input(shape)
    dy = torch.randn_like(x)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = layer(x)
        kept = torch.cuda.memory_allocated() - before
        torch.autograd.grad(y, [x, *layer.parameters()], dy)
        peak = torch.cuda.max_memory_allocated() - before
    print(f"{shape} kept {kept / x.nbytes:.2f}  peak {peak / x.nbytes:.2f}", flush=True)


def once(shape: str) -> None:
    layer, x = layer_and_input(shape)
    y = layer(x)
    torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))
    torch.cuda.synchronize()


def report(name: str, found: dict[str, tuple[float, float]]) -> None:
    print(f"{name}: {sum(us for _, us in found.values()):.1f} us", flush=True)
    for kernel, (count, us) in sorted(found.items(), key=lambda item: -item[1][1]):
        short = re.sub(r"^void |at::native::|<unnamed>::|\(anonymous namespace\)::", "", kernel)
        print(f"  {us:8.1f}  {count:4.0f} x  {short[:90]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["times", "memory", "once"])
    parser.add_argument("--shape", action="append", metavar="B,T")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for shape in arguments.shape or SHAPES:
        {"times": times, "memory": memory, "once": once}[arguments.what](shape)


if __name__ == "__main__":
    main()
