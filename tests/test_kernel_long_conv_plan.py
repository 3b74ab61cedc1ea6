"""Which kernels a long convolution takes, at every length, and what they move."""

from __future__ import annotations

import pytest

from chela_bench.bench.check import relative_error, worst_block_error
from chela_bench.bench.models import short_long_conv_bytes
from chela_bench.errors import ArgumentError
from chela_bench.kernels.long_conv_plan import TABLE, WIDTHS, Plan, plan_for
from chela_bench.kernels.short_long_conv import (
    hbm_bytes,
    long_conv,
)
from chela_bench.reference import short_long_conv as reference
from tests.convolutions import (
    drawn,
)

LASTS = [4 * 64 * 64 if x.last is None else x.last for x in TABLE]


@pytest.mark.parametrize("T", [1, *LASTS, *[last + 1 for last in LASTS[:-1]]])
def test_every_plan_is_right_at_both_ends_of_its_range(T):
    x, kernel = drawn(1, T, 1, seed=1).half(), drawn(1, T, seed=2, scale=T**-0.5).half()
    z = long_conv(x, kernel)
    exact = reference.long_conv(x.double(), kernel.double())
    assert worst_block_error(z, exact, row_rms=True) <= 1e-3
    assert relative_error(z, exact) <= 8e-4


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_plan_covers_any_length(by_hand):
    assert plan_for(0).method == "direct"
    steps = [T + off for n in range(21) for T in (2**n, 3 * 2**n) for off in (-1, 0, 1)]
    for T in [*range(1, 9000), *steps, 1_000_000]:
        method, N2, blocks = plan_for(T, by_hand=by_hand)
        assert method == "direct" or T <= 64 * N2 * blocks < T + 64 * N2
        assert method != "monarch" or blocks == 1
        assert method != "blocks" or (by_hand and blocks <= 4)


def test_the_table_is_in_order_and_of_known_kernels():
    lasts = [x.last for x in TABLE]
    assert lasts[-1] is None and lasts[:-1] == sorted(set(lasts[:-1]))
    assert all(x.N2 in (WIDTHS if x.method != "direct" else (0,)) for x in TABLE)


def test_a_config_asks_for_another_plan():
    assert plan_for(1000, {"method": "direct"}) == Plan("direct", 0, 1)
    assert plan_for(1000, {"method": "monarch"}) == Plan("monarch", 16, 1)
    assert plan_for(1025, {"method": "monarch"}) == Plan("monarch", 32, 1)
    assert plan_for(1025, {"N2": 16}) == Plan("factors", 16, 2)
    assert plan_for(1000, {"N2": 64}) == Plan("monarch", 64, 1)
    assert plan_for(5000, {"method": "factors"}) == Plan("factors", 64, 2)
    assert plan_for(5000, {"method": "blocks"}, by_hand=True) == Plan("blocks", 32, 3)
    assert plan_for(1000, {"method": "blocks"}, by_hand=True) == Plan("monarch", 16, 1)
    assert plan_for(5000, by_hand=True) == Plan("blocks", 32, 3)
    assert plan_for(5000, {}) == plan_for(5000) == Plan("factors", 32, 3)
    for match, bad in {
        "no option 'N1' .*: method, N2": {"N1": 64},
        "no method 'fft'; it is one of direct, monarch, blocks, factors": {"method": "fft"},
        "no N2 8; it is one of 16, 32, 64": {"N2": 8},
        "no N2, got N2 = 16": {"method": "direct", "N2": 16},
        "T <= 1024 for method monarch with N2 = 16": {"method": "monarch", "N2": 16},
        "T <= 4096 for method monarch, .*method factors": {"method": "monarch"},
        "wanted a Hopper GPU .*method factors": {"method": "blocks"},
    }.items():
        with pytest.raises(ArgumentError, match=match):
            plan_for(5000, bad)
    with pytest.raises(ArgumentError, match=r"T <= 16384 for method blocks, 4 of .*T = 16385"):
        plan_for(16385, {"method": "blocks"}, by_hand=True)
    with pytest.raises(ArgumentError, match=r"T <= 8388608, .*got T = 8388609; cut"):
        plan_for(2**23 + 1)


def test_hbm_bytes_count_what_kernels_read_and_write():
    B, T, D = 8, 1024, 256
    shape, element, tap = {"B": B, "T": T, "D": D}, B * T * D, D * T
    assert hbm_bytes(shape, {}) == 2 * (6 * element + tap) + 2 * 4 * tap
    assert hbm_bytes(shape, {}, itemsize=4) == 4 * (6 * element + tap) + 2 * 8 * tap
    direct = {"method": "direct"}
    assert hbm_bytes(shape, direct) == 2 * (4 * element + tap) + 32 * (tap + 64 * D)
    factors = {"method": "factors", "N2": 16}
    taps = 2 * tap + 8 * tap  # of the kernel: norms read them; between factors, written and read
    assert hbm_bytes(shape, factors) == hbm_bytes(shape, {}) + 18 * element + taps
    for T in (100, 1000, 100_000):
        shape = {"B": 4, "T": T, "D": 64}
        assert hbm_bytes(shape, {}) > sum(short_long_conv_bytes(shape, 2, "fwd"))
