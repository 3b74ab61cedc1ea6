"""The judge itself: what the error metrics see, and what the budgets let pass."""

import math

import pytest
import torch

from chela_bench.bench import check
from chela_bench.bench.check import (
    EPS,
    error_budget,
    error_of,
    relative_error,
    worst_block_error,
)
from chela_bench.bench.inputs import DTYPES, Draw
from chela_bench.bench.job import first
from chela_bench.bench.load import load
from chela_bench.bench.ops import OPS
from chela_bench.errors import ArgumentError


def _rounded(exact, dtype):
    return exact.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype])


@pytest.fixture
def growing():
    """Outputs as linear attention's: early tokens are small, [B, T, H, V]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1000, 3, 16, generator=generator, dtype=torch.float64)
    return noise * torch.arange(1, 1001)[:, None, None]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_one_rounding_stays_within_one_rounding(growing, dtype):
    error = worst_block_error(_rounded(growing, dtype), growing)
    assert 0.1 * EPS[dtype] < error <= error_budget(dtype, roundings=1, tokens=1)


@pytest.mark.parametrize("part", [slice(0, 64), slice(-64, None), slice(-1, None)])
def test_zeroed_tokens_are_seen(growing, part):
    planted = growing.clone()
    planted[:, part] = 0
    assert worst_block_error(planted, growing) > error_budget("bf16", roundings=4, tokens=1000)


def test_one_head_is_seen_where_a_whole_norm_is_blind(growing):
    planted = growing.clone()
    planted[0, :64, 1] = 0
    assert relative_error(planted, growing) < error_budget("bf16", roundings=4, tokens=1000)
    assert worst_block_error(planted, growing) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_wrong(growing, value):
    planted = growing.clone()
    planted[1, 3, 2, 5] = value
    assert worst_block_error(planted, growing) == math.inf
    assert relative_error(planted, growing) == math.inf


def test_row_rms_judges_a_block_against_its_row():
    """An error of a hundredth of the row's rms in a block of tiny tokens is a hundredth."""
    exact = torch.ones(1, 256, 2, dtype=torch.float64)
    exact[:, :64] = 1e-6
    actual = exact.clone()
    actual[0, :64, 1] += 0.01 * exact[0, :, 1].square().mean().sqrt()
    assert worst_block_error(actual, exact, row_rms=True) == pytest.approx(0.01)
    assert worst_block_error(actual, exact) > 1


@pytest.mark.parametrize(
    ("tokens", "own_block"), [(96, 32), (95, 64 + 31), (65, 65), (64, 64), (1, 1)]
)
def test_a_short_last_block_joins_the_one_before(tokens, own_block):
    """One token off by a half of it, in rows of ones."""
    exact = torch.ones(1, tokens, 1, dtype=torch.float64)
    actual = exact.clone()
    actual[0, -1] = 1.5
    for row_rms in (True, False):
        error = worst_block_error(actual, exact, row_rms=row_rms)
        assert error == pytest.approx(0.5 / own_block**0.5)


@pytest.mark.parametrize("tokens", [1, 63, 64, 96, 97, 160, 192, 1000])
def test_large_tensors_are_compared_in_parts_as_whole_ones(monkeypatch, tokens):
    exact = torch.randn(3, tokens, 5, generator=torch.Generator().manual_seed(tokens)).double()
    actual = exact.float() + 0.01 * exact.flip(1).float()
    whole = [worst_block_error(actual, exact, row_rms=row_rms) for row_rms in (True, False)]
    for at_once in (1, 15 * 130):  # a block, two blocks
        monkeypatch.setattr(check, "_AT_ONCE", at_once)
        parts = [worst_block_error(actual, exact, row_rms=row_rms) for row_rms in (True, False)]
        assert parts == pytest.approx(whole, rel=1e-12)


def test_a_row_that_cancels_is_measured_by_the_others():
    exact = torch.ones(1, 2, 100, dtype=torch.float64)
    exact[..., 7] = 1e-9
    actual = exact + 0.001
    assert worst_block_error(actual, exact, row_rms=True) == pytest.approx(0.001, rel=0.01)
    by_head = exact.mT.reshape(1, 1, 100, 2)  # [B, T, H, V]
    assert worst_block_error(by_head + 0.001, by_head) == pytest.approx(0.001, rel=0.01)


def test_a_zeroed_row_among_others_is_seen():
    exact = torch.ones(1, 100, 50, dtype=torch.float64)
    planted = exact.clone()
    planted[..., 7] = 0
    assert worst_block_error(planted, exact, row_rms=True) == pytest.approx(1.0)


def test_the_budget_is_wider_for_few_tokens_alone():
    budgets = [error_budget("bf16", roundings=3, tokens=n) for n in (1, 4, 16, 63, 64, 1024)]
    assert budgets[:5] == sorted(budgets[:5], reverse=True)
    assert budgets[0] < 3 * budgets[4]
    assert budgets[4] == pytest.approx(budgets[5], rel=1e-3)


@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 65])
@pytest.mark.parametrize("op", OPS[:3], ids=lambda op: op.name)
def test_what_is_right_is_right_at_any_length(op, tokens):
    """Thousands of rows at odd lengths: none of them may cry wolf."""
    shape = {"B": 4, "T": tokens, "H": 16, "K": 64, "V": 64, "D": 1024}
    options = {name: values[0] for name, values in op.options.items()}
    for name, dtype in DTYPES.items():
        draw = Draw({dim: shape[dim] for dim in op.dims}, dtype, torch.device("cpu"), 0, "randn")
        inputs = load(op.inputs)(draw)
        doubled = inputs.to(torch.float64)
        exact = first(load(op.oracle)(*doubled.arguments(doubled.tensors), **options))
        budget = error_budget(name, roundings=op.roundings["fwd"], tokens=tokens)
        for impl in op.impls:
            if "cpu" in impl.devices and not impl.compiled:
                actual = first(load(impl.target)(*inputs.arguments(inputs.tensors), **options))
                assert error_of(actual, exact, op.output_kind) <= budget, (impl.name, name)


def test_taps_are_judged_in_blocks():
    exact = torch.ones(3, 256, dtype=torch.float64)
    actual = exact.clone()
    actual[1, -64:] = 0
    assert error_of(actual, exact, "taps") == pytest.approx(1.0)
    assert error_of(actual, exact, "whole") == pytest.approx((64 / 768) ** 0.5)


def test_zero_for_zero_is_no_error_and_something_for_zero_is():
    zero = torch.zeros(1, 64, 1, 4, dtype=torch.float64)
    assert worst_block_error(zero, zero) == 0.0
    assert worst_block_error(zero + 1e-9, zero) == math.inf
    assert worst_block_error(zero[:, :0], zero[:, :0]) == 0.0


def test_shapes_must_agree(growing):
    with pytest.raises(ArgumentError, match=r"\[2, 999, 3, 16\]"):
        worst_block_error(growing[:, 1:], growing)
    with pytest.raises(ArgumentError, match="a result of shape"):
        error_of(growing[:, 1:], growing, "whole")
