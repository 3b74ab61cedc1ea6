"""Figures of the long convolution that a sweep does not give: errors, and the time of each kernel.

    python benchmarks/long_conv_facts.py errors [--dtype float16]
    python benchmarks/long_conv_facts.py times [--shape 8,1024,65536] [--method parts --n2 64]
    python benchmarks/long_conv_facts.py whole [--shape 8,1024,4096]
    ncu --metrics dram__bytes_read.sum,dram__bytes_write.sum -k regex:_kernel --csv \
        python benchmarks/long_conv_facts.py once | once-whole [--shape 8,1024,65536]

Errors, against float64 FFTs: of z, dx and dk, ||error|| / ||exact|| over all, and the worst rms of
64 tokens over the rms of its row. Times, in microseconds, need a GPU: kernel spans by the profiler,
ten calls, warm L2, of the kernel's spectrum, of the forward pass with it and of the backward pass;
`whole`: of short_long_conv from and to [B, T, D], forward, with the two default widths. `once`: a
spectrum, a forward and a backward pass, for a profiler to look at; `once-whole`: the same of
short_long_conv from and to [B, T, D], without a gate and then with one that is trained.
"""

from __future__ import annotations

import argparse

import torch
from kernel_spans import spans
from torch import Tensor

from chela_bench.bench.check import relative_error, worst_block_error
from chela_bench.bench.models import short_sizes
from chela_bench.kernels.short_long_conv import kernel_spectrum, long_conv, short_long_conv

LENGTHS = (100, 1000, 3001, 4096, 9001, 12000, 16384, 20000, 70000)
SHAPES = ("8,1024,1024", "8,1024,4096", "1,1024,4096", "8,1024,8192", "1,1024,16384")


def exact(x: Tensor, kernel: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    T = x.shape[-1]
    u, k, d = (torch.fft.rfft(y.double(), n=2 * T) for y in (x, kernel, dz))
    products = u * k, d * k.conj(), (d * u.conj()).sum(0)
    z, dx, dk = (torch.fft.irfft(y, n=2 * T)[..., :T] for y in products)
    return z, dx, dk


def errors(dtype: torch.dtype, device: str) -> None:
    for T in LENGTHS:
        x, dz = torch.randn(2, 2, 16, T, device=device).to(dtype)
        kernel = torch.randn(16, T, device=device) / T**0.5
        leaves = x.clone().requires_grad_(), kernel.clone().requires_grad_()
        z = long_conv(*leaves, layout="bdt")
        found = (z, *torch.autograd.grad(z, leaves, dz))
        shown = []
        for name, actual, right in zip(("z", "dx", "dk"), found, exact(x, kernel, dz), strict=True):
            rows = (y.reshape(-1, 16, T).mT for y in (actual.detach(), right))
            block = worst_block_error(*rows, row_rms=True)
            shown.append(f"{name} {relative_error(actual.detach(), right):.2e} {block:.2e}")
        print(f"{str(dtype).removeprefix('torch.')} T {T:<6} {'   '.join(shown)}", flush=True)


def times(shape: str, config: dict[str, int | str] | None, dtype: torch.dtype) -> None:
    B, D, T = map(int, shape.split(","))
    x, dz = (torch.randn(B, D, T, device="cuda", dtype=dtype) for _ in range(2))
    kernel = torch.randn(D, T, device="cuda") / T**0.5
    spectrum = kernel_spectrum(kernel, T, dtype=dtype, config=config)
    leaves = x.clone().requires_grad_(), kernel.clone().requires_grad_()
    z = long_conv(*leaves, layout="bdt", spectrum=spectrum, config=config)
    given = {"layout": "bdt", "spectrum": spectrum, "config": config}
    with torch.no_grad():
        forward = spans(lambda: long_conv(x, kernel, **given))
    report(
        shape,
        ("spectrum", spans(lambda: kernel_spectrum(kernel, T, dtype=dtype, config=config))),
        ("forward", forward),
        ("backward", spans(lambda: torch.autograd.grad(z, leaves, dz, retain_graph=True))),
    )


def whole(shape: str, config: dict[str, int | str] | None, dtype: torch.dtype) -> None:
    B, D, T = map(int, shape.split(","))
    x = torch.randn(B, T, D, device="cuda", dtype=dtype)
    short = [torch.randn(D, width, device="cuda") / width**0.5 for width in short_sizes(T)]
    kernel = torch.randn(D, T, device="cuda") / T**0.5
    spectrum = kernel_spectrum(kernel, T, dtype=dtype, config=config)
    given = {"spectrum": spectrum, "config": config}
    with torch.no_grad():
        report(shape, ("whole", spans(lambda: short_long_conv(x, short, kernel, **given))))


def once(shape: str, config: dict[str, int | str] | None, dtype: torch.dtype) -> None:
    B, D, T = map(int, shape.split(","))
    x, dz = (torch.randn(B, D, T, device="cuda", dtype=dtype) for _ in range(2))
    leaves = x.requires_grad_(), torch.randn(D, T, device="cuda", requires_grad=True)
    torch.autograd.grad(long_conv(*leaves, layout="bdt", config=config), leaves, dz)
    torch.cuda.synchronize()


def once_whole(shape: str, config: dict[str, int | str] | None, dtype: torch.dtype) -> None:
    B, D, T = map(int, shape.split(","))
    x, gate, dz = (torch.randn(B, T, D, device="cuda", dtype=dtype) for _ in range(3))
    kernels = [torch.randn(D, width, device="cuda") for width in (*short_sizes(T), T)]
    for y in (x, gate, *kernels):
        y.requires_grad_()
    for given in (None, gate):
        z = short_long_conv(x, kernels[:-1], kernels[-1], gate=given, config=config)
        torch.autograd.grad(z, [x, *kernels] if given is None else [x, gate, *kernels], dz)
    torch.cuda.synchronize()


def report(shape: str, *rows: tuple[str, dict[str, tuple[float, float]]]) -> None:
    for name, found in rows:
        longest = sorted(found.items(), key=lambda item: -item[1][1])[:5]
        kernels = ", ".join(f"{of.strip('_')[:36]} {us:.1f}" for of, (_, us) in longest)
        total = sum(us for _, us in found.values())
        print(f"{shape} {name:8} {total:9.1f} us   {kernels}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["errors", "times", "whole", "once", "once-whole"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--shape", action="append", metavar="B,D,T")
    parser.add_argument("--method", choices=["direct", "monarch", "parts"])
    parser.add_argument("--n2", type=int, choices=[16, 32, 64])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    if arguments.what == "errors":
        errors(dtype, "cuda" if torch.cuda.is_available() else "cpu")
        return
    asked = {"method": arguments.method, "N2": arguments.n2}
    config = {name: value for name, value in asked.items() if value is not None}
    what = {"times": times, "whole": whole, "once": once, "once-whole": once_whole}[arguments.what]
    for shape in arguments.shape or SHAPES:
        what(shape, config or None, dtype)


if __name__ == "__main__":
    main()
