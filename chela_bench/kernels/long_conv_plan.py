"""Which kernels carry out a long convolution of T tokens: one table, in steps of T.

    direct    sums of taps on tensor cores (long_conv_direct.py): T^2 work, no transform
    monarch   one transform of N = 64 * N2 tokens a row (long_conv_monarch.py)
    blocks    two to four blocks of N in one kernel (long_conv_hopper_blocks.py)
    factors   one transform over as many blocks of N as cover T (long_conv_factors.py)

Blocks take a Hopper GPU and 16-bit rows; elsewhere factors take their place. A config asks for
another way than the table's: {"method": "monarch", "N2": 32}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from chela_bench.errors import ArgumentError
from chela_bench.kernels.launching import cdiv
from chela_bench.kernels.long_conv_factors import LONGEST
from chela_bench.kernels.long_conv_monarch import BLOCKS, N1

Method = Literal["direct", "monarch", "blocks", "factors"]

METHODS: tuple[Method, ...] = get_args(Method)
WIDTHS = (16, 32, 64)  # N2; what the kernels are compiled for
MAX_T = LONGEST * N1 * WIDTHS[-1]


class Plan(NamedTuple):
    method: Method
    N2: int  # 0 where there is no transform
    blocks: int  # of 64 * N2 tokens; 1 where there is no transform


class Range(NamedTuple):
    """Sequences of `last` tokens or fewer, down to the range before; None: of any length."""

    last: int | None
    method: Method
    N2: int


TABLE = (
    Range(128, "direct", 0),  # of 256 tokens the gradients take as long as one transform
    Range(16 * N1, "monarch", 16),
    Range(32 * N1, "monarch", 32),
    Range(64 * N1, "monarch", 64),
    Range(96 * N1, "blocks", 32),  # three blocks of 2048 pad less than two of 4096
    Range(BLOCKS * 64 * N1, "blocks", 64),
    Range(None, "factors", 64),
)


def plan_for(
    T: int, config: Mapping[str, int | str] | None = None, *, by_hand: bool = False
) -> Plan:
    """How to convolve T tokens: as `config` says, in part or whole, or else as the table does.

    config: "method", and "N2" where it has one. by_hand: whether there are the kernels for Hopper.
    Raises ArgumentError.
    """
    if config is None:
        for last, method, N2 in TABLE:
            if last is None or last >= T:
                return _plan(T, method if by_hand or method != "blocks" else "factors", N2)
    return _asked(T, checked(config or {}), by_hand)


def checked(config: Mapping[str, int | str]) -> Mapping[str, int | str]:
    """The config, if its names and values are known. Raises ArgumentError."""
    unknown = [name for name in config if name not in ("method", "N2")]
    if unknown:
        raise ArgumentError(
            f"no option {', '.join(map(repr, unknown))} of a long convolution; a config has: "
            "method, N2"
        )
    method, N2 = config.get("method"), config.get("N2")
    if method is not None and method not in METHODS:
        raise ArgumentError(f"no method {method!r}; it is one of {', '.join(METHODS)}")
    if N2 is not None and N2 not in WIDTHS:
        raise ArgumentError(f"no N2 {N2!r}; it is one of {', '.join(map(str, WIDTHS))}")
    if method == "direct" and N2 is not None:
        raise ArgumentError(
            f"direct sums have no transform, so no N2, got N2 = {N2}; leave it out, or take "
            "method monarch or factors"
        )
    return config


def _asked(T: int, config: Mapping[str, int | str], by_hand: bool) -> Plan:
    method, N2 = config.get("method"), config.get("N2")
    if method is None:
        if N2 is None:
            return plan_for(T, by_hand=by_hand)
        method = "monarch" if int(N2) * N1 >= T else "factors"
    if method == "direct":
        return _plan(T, "direct", 0)
    widest = WIDTHS[-1] if N2 is None else int(N2)
    if method == "factors":
        return _plan(T, "factors", widest)
    if method == "blocks" and not by_hand:
        raise ArgumentError(
            "wanted a Hopper GPU and bfloat16 or float16 for method blocks, got neither or one of "
            "them; take method factors, or leave it out"
        )
    most = BLOCKS if method == "blocks" else 1
    for width in WIDTHS if N2 is None else (widest,):
        if most * width * N1 >= T:
            return _plan(T, "monarch" if width * N1 >= T else "blocks", width)
    raise ArgumentError(
        f"wanted T <= {most * widest * N1} for method {method}"
        f"{'' if N2 is None else f' with N2 = {N2}'}, {most} of 64 * N2 tokens at most, got T = "
        f"{T}; take a larger N2, or method factors"
    )


def _plan(T: int, method: Method, N2: int) -> Plan:
    if method == "direct":
        return Plan(method, N2, 1)
    blocks = cdiv(T, N1 * N2)
    if blocks > LONGEST:
        raise ArgumentError(
            f"wanted T <= {LONGEST * N1 * N2}, {LONGEST} blocks of 64 * N2 = {N1 * N2} tokens, got "
            f"T = {T}; cut the sequence, or take a larger N2 up to {WIDTHS[-1]}"
        )
    return Plan(method, N2, blocks)
