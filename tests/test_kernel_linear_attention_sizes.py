"""linear_attention at sizes, lengths and block sizes that only a GPU gets through."""

import itertools

import pytest
import torch
import triton

from chela_bench.kernels.linear_attention import (
    linear_attention,
)
from tests.attention import (
    DEVICE,
    both_ways,
    check,
    dtypes,
    inputs,
    label,
)
from tests.pairwise import pairwise

LENGTHS = [0, 1, 15, 63, 64, 65, 127, 1000, 4097]
MEETING = pairwise(
    {
        "T": LENGTHS,
        "K": [16, 60, 64, 96, 128, 256],
        "V": [16, 60, 64, 96, 128, 256, 2048],
        "BH": [(1, 1), (3, 1), (1, 3)],
        "dtype": [torch.float32, torch.float16, torch.bfloat16],
        "schedule": ["fused", "split"],
        "causal": [True, False],
        "has_state": [True, False],
        "mean": [0.0, 1.0],
    }
)


def case_label(case):
    words = {**case, "dtype": str(case["dtype"]).removeprefix("torch.")}
    return "-".join(f"{name}{value}".replace(" ", "") for name, value in words.items())


@pytest.mark.gpu
@pytest.mark.parametrize("case", MEETING, ids=case_label)
def test_every_two_values_that_can_meet(case):
    (B, H), dtype = case["BH"], case["dtype"]
    q, k, v, state = inputs(B, case["T"], H, case["K"], case["V"], dtype, mean=case["mean"])
    options = {"initial_state": state, "output_final_state": True} if case["has_state"] else {}
    scale = case["K"] ** -0.5 / (1 + 63 * case["mean"])  # o of coherent inputs fits float16
    check(
        q, k, v, schedule=case["schedule"], causal=case["causal"], scale=scale,
        gradients=case["T"] >= 15 and not (case["mean"] and dtype == torch.float16), **options,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["fused", "split"])
@pytest.mark.parametrize("K", [60, 64, 96, 128])
def test_a_wide_v_by_kept_states(K, schedule):
    for T in (15, 257, 1000, 4097):
        q, k, v, state = inputs(1, T, 1, K, 2048, torch.bfloat16)
        options = {"initial_state": state, "output_final_state": True}
        check(q, k, v, schedule=schedule, config={"keep": 1}, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["fused", "split"])
@dtypes
@pytest.mark.parametrize("d", [64, 128])
def test_every_length_and_batch_of_the_usual_sizes(d, dtype, schedule):
    for T in LENGTHS:
        for B, H in [(1, 1), (1, 3), (3, 1)]:
            for has_state in (True, False):
                q, k, v, state = inputs(B, T, H, d, d, dtype)
                options = {"initial_state": state, "output_final_state": True} if has_state else {}
                check(q, k, v, schedule=schedule, gradients=T >= 15, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [1, 3])
@dtypes
@pytest.mark.parametrize("d", [64, 128])
def test_packed_lengths(d, dtype, segments):
    lengths = [0, 1, 63, 64, 129, 1000]
    q, k, v, state = inputs(1, sum(lengths), 2, d, d, dtype, N=len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    options = {"initial_state": state, "output_final_state": True, "cu_seqlens": cu_seqlens}
    check(q, k, v, config={"segments": segments}, gradients=False, **options)
    o, final = linear_attention(q, k, v, initial_state=state, output_final_state=True,
                                cu_seqlens=cu_seqlens, config={"segments": segments})  # fmt: skip
    for n, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        alone, alone_final = linear_attention(
            *(x[:, start:end] for x in (q, k, v)), initial_state=state[n : n + 1],
            output_final_state=True, config={"segments": segments},
        )  # fmt: skip
        assert torch.equal(o[:, start:end], alone)
        assert torch.equal(final[n : n + 1], alone_final)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [4096, 65536, 262144])
@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ["fused", "split"])
def test_the_error_is_flat_in_length(T, mean, schedule):
    q, k, v, _ = inputs(1, T, 1, 128, 128, torch.bfloat16, mean=mean)
    check(q, k, v, schedule=schedule, output_final_state=True)


@pytest.mark.gpu
def test_a_million_coherent_tokens():
    q, k, v, _ = inputs(1, 1 << 20, 1, 64, 64, torch.bfloat16, mean=1.0)
    check(q, k, v, output_final_state=True, gradients=False)


SQUARES = [(1, 300, 2, d, d) for d in (16, 64, 128, 256)]
ODD = [(2, 1, 3, 60, 130), (1, 257, 1, 100, 33), (1, 190, 2, 200, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("BLOCK_V", [32, 64, 128])
@pytest.mark.parametrize("BLOCK_T", [16, 32, 64, 128])
@dtypes
@pytest.mark.parametrize("shape", SQUARES + ODD, ids=label)
def test_every_config(shape, dtype, BLOCK_T, BLOCK_V):
    """Not the winner alone: Triton has miscompiled single configs of such kernels."""
    q, k, v, state = inputs(*shape, dtype)
    options = {"initial_state": state, "output_final_state": True}
    options["gradients"] = max(shape[3:]) <= 128  # kernels of wider ones take minutes to compile
    try:
        config = {"BLOCK_T": BLOCK_T, "BLOCK_V": BLOCK_V, "wgmma": 0}
        check(q, k, v, config=config, **options)
    except triton.runtime.errors.OutOfResources as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("num_warps", [4, 8])
@pytest.mark.parametrize("BLOCK_V", [16, 32])
@pytest.mark.parametrize("BLOCK_T", [64, 128])
@pytest.mark.parametrize("V", [33, 64])
@dtypes
def test_narrow_slices_that_are_not_pipelined(dtype, V, BLOCK_T, BLOCK_V, num_warps):
    """Read wrong addresses with ptxas 12.8 when S was read before the scores met v."""
    q, k, v, state = inputs(1, 257, 2, 60, V, dtype)
    config = {"BLOCK_T": BLOCK_T, "BLOCK_V": BLOCK_V, "num_warps": num_warps, "num_stages": 1}
    check(q, k, v, initial_state=state, output_final_state=True, config=config)


@pytest.mark.gpu
@both_ways
@dtypes
@pytest.mark.parametrize("d", [64, 128, 256])
def test_many_coherent_tokens(d, dtype, causal):
    """k and v with mean 1, as SiLU makes them: S grows with t, and float32 sums must not drift."""
    q, k, v, _ = inputs(1, 16384, 2, d, d, dtype, mean=1.0)
    check(q, k, v, scale=d**-0.5 / 64, output_final_state=True, causal=causal)
