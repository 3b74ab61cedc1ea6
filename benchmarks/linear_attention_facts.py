"""Figures of linear attention that a sweep does not give: errors, host time, memory beyond tensors.

    python benchmarks/linear_attention_facts.py [--tokens 65536]

Errors: the worst over blocks of 64 tokens, against the float64 reference, of o and the gradients,
d = 128, two heads. Host time: a call's at 64 tokens over 1000 calls that nothing waits for, the
least of five times. Memory: the peak of forward and backward beyond inputs, outputs and gradients,
as a fraction of all of these. Where there is no GPU, kernels are interpreted, and only errors are
shown (start with TRITON_INTERPRET=1 and few tokens).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from chela_bench.bench.check import worst_block_error
from chela_bench.kernels.linear_attention import linear_attention
from chela_bench.reference.linear_attention import linear_attention as reference

NAMES = ("o", "dq", "dk", "dv")


def errors(
    tokens: int, heads: int, dtype: torch.dtype, *, mean: float, precise: bool, device: str
) -> dict[str, float]:
    torch.manual_seed(0)
    shape = (1, tokens, heads, 128)
    inputs = [(torch.randn(shape, device=device) + mean).to(dtype) for _ in range(3)]
    do = torch.randn(shape, device=device).to(dtype)
    leaves = [x.clone().requires_grad_() for x in inputs]
    o, _ = linear_attention(*leaves, precise=precise)
    found = (o, *torch.autograd.grad(o, leaves, do))
    exact_leaves = [x.double().requires_grad_() for x in inputs]
    exact_o, _ = reference(*exact_leaves)
    exact = (exact_o, *torch.autograd.grad(exact_o, exact_leaves, do.double()))
    pairs = zip(NAMES, found, exact, strict=True)
    return {name: worst_block_error(x.detach(), y.detach()) for name, x, y in pairs}


def host_us(call: Callable[[], object], calls: int = 1000) -> float:
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begun) / calls * 1e6)
    return min(times)


def memory_beyond(tokens: int, heads: int, K: int, V: int) -> float:
    q, k, v, do = (_random(tokens, heads, size) for size in (K, K, V, V))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run() -> tuple[Tensor, ...]:
        o, _ = linear_attention(*leaves)
        return (o, *torch.autograd.grad(o, leaves, do))

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = sum(x.nbytes for x in run())
    beyond = torch.cuda.max_memory_allocated() - before - outputs
    return beyond / (outputs + sum(x.nbytes for x in (q, k, v, do)))


def _random(tokens: int, heads: int, size: int) -> Tensor:
    return torch.randn(1, tokens, heads, size, device="cuda", dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    tokens: int = parser.parse_args().tokens
    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    kinds = [(torch.float32, False), (torch.float32, True), (torch.float16, False)]
    if has_gpu:  # NumPy, which interprets kernels, has no bfloat16
        kinds.append((torch.bfloat16, False))
    for mean in (0.0, 1.0):
        for dtype, precise in kinds:
            found = errors(tokens, 2, dtype, mean=mean, precise=precise, device=device)
            shown = "  ".join(f"{name} {error:.2e}" for name, error in found.items())
            print(f"errors  mean {mean:.0f}  {dtype}  precise {precise!s:<5}  {shown}", flush=True)
    if not has_gpu:
        return
    q, k, v, do = (_random(64, 16, 128) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        print(f"host  without gradients  {host_us(lambda: linear_attention(q, k, v)):.1f} us")
    print(f"host  gradients to come  {host_us(lambda: linear_attention(*leaves)):.1f} us")
    both = host_us(lambda: torch.autograd.grad(linear_attention(*leaves)[0], leaves, do))
    print(f"host  with the backward  {both:.1f} us")
    for heads, K, V in [(16, 128, 128), (8, 256, 256), (16, 64, 64), (1, 128, 2048)]:
        print(
            f"memory  H {heads} K {K} V {V}  {memory_beyond(tokens, heads, K, V):.4f}", flush=True
        )


if __name__ == "__main__":
    main()
