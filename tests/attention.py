"""What tests of linear attention's kernels share: inputs, and a comparison with the reference.

The budget of one block's relative error counts roundings, each of its largest size and none
cancelling another. A gradient is a walk over chunks as the output is, with the same budget. EPS is
half a dtype's spacing; tensor cores truncate TF32 operands, which costs a whole one, 2^-10.

    float16    state or scores truncate to TF32, which q, k and v fit as they are; the output rounds
    bfloat16   operand (state and scores share the output between them) and output round
    float32    state and q truncate, or the scores' q and k, then the scores and v
    precise    the output rounds; products are float32's, as they are in the interpreter

Float32 sums add 1e-6; a tensor core's truncate, at worst by 2^-23 for every 8 tokens added to S.
"""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from chela_bench.bench.check import worst_block_error
from chela_bench.kernels.linear_attention import linear_attention
from chela_bench.reference.linear_attention import linear_attention as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TF32 = 2.0**-10
ON_GPU = {
    torch.float32: 4 * TF32,
    torch.float16: TF32 + EPS[torch.float16],
    torch.bfloat16: 2 * EPS[torch.bfloat16],
}
SHAPES = [  # B, T, H, K, V
    (1, 1, 1, 16, 16),
    (2, 5, 1, 3, 1),
    (1, 63, 3, 64, 32),
    (2, 65, 1, 60, 130),
    (1, 100, 2, 17, 40),
]
dtypes = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
both_ways = pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])


def label(shape):
    return "-".join(f"{name}{size}" for name, size in zip("BTHKV", shape, strict=True))


def budget(dtype, T, *, precise=False):
    if precise:
        return EPS[dtype] + sums(T)
    return (ON_GPU[dtype] if DEVICE == "cuda" else 2 * EPS[dtype]) + sums(T)


def sums(T):
    return 1e-6 + (T / 8 * 2.0**-23 if DEVICE == "cuda" else 0)


def inputs(B, T, H, K, V, dtype, *, N=None, mean=0.0):
    generator = torch.Generator().manual_seed(T + K)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    q, k, v = randn(B, T, H, K), randn(B, T, H, K) + mean, randn(B, T, H, V) + mean
    state = randn(B if N is None else N, H, K, V)
    return *(x.to(DEVICE, dtype) for x in (q, k, v)), state.to(DEVICE)


def randn_like(x, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)


@contextmanager
def new_memory_is_nan():
    """torch.empty returns NaN inside: what the kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(q, k, v, *, function=linear_attention, initial_state=None, gradients=True, **options):
    """Output, final state and all gradients are within the budget of the float64 reference."""
    shared = {n: x for n, x in options.items() if n in ("scale", "causal", "cu_seqlens")}
    shared["output_final_state"] = options.setdefault("output_final_state", False)
    given = [x.detach() for x in (q, k, v, initial_state) if x is not None]
    found, wanted = [], []
    for results, call, tensors in (
        (found, partial(function, **options), given),
        (wanted, partial(reference, **shared), [x.double() for x in given]),
    ):
        leaves = [x.requires_grad_(gradients) for x in tensors]
        state = leaves[3] if initial_state is not None else None
        with new_memory_is_nan():
            o, final = call(*leaves[:3], initial_state=state)
            assert (final is None) != shared["output_final_state"]
            outputs = [o] if final is None else [o, final]
            results += [x.detach() for x in outputs]
            if gradients:
                do = [randn_like(x, 7).to(q.dtype if x is o else torch.float32) for x in outputs]
                do = [x.to(y.dtype) for x, y in zip(do, outputs, strict=True)]
                results += torch.autograd.grad(outputs, leaves, do)
    assert [x.shape for x in found] == [x.shape for x in wanted]
    T, dtype, precise = q.shape[1], q.dtype, options.get("precise", False)
    truncated = DEVICE == "cuda" and dtype == torch.float32 and not precise
    for actual, exact in zip(found, wanted, strict=True):
        if actual.ndim == 4 and actual.shape[1] == T and actual.shape[:3] == q.shape[:3]:
            assert actual.dtype == dtype
            assert worst_block_error(actual, exact) <= budget(dtype, T, precise=precise)
        else:  # a state: fp32 inputs truncate to TF32, 16-bit ones are exact
            assert actual.dtype == torch.float32
            error = (actual - exact).norm()
            assert error <= (2 * TF32 * truncated + 2e-7 + sums(T)) * exact.norm()
