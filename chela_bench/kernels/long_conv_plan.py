"""Which kernels carry out a long convolution of T tokens: one table, in steps of T.

    direct    sums of taps on tensor cores (long_conv_direct.py): T^2 work, no transform
    monarch   one transform of N = 64 * N2 tokens a row (long_conv_monarch.py)
    parts     as many blocks of N as cover T, whose spectra go to memory (long_conv_parts.py)

A config asks for another way than the table's: {"method": "monarch", "N2": 32}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from chela_bench.errors import ArgumentError
from chela_bench.kernels.launching import cdiv
from chela_bench.kernels.long_conv_monarch import N1

Method = Literal["direct", "monarch", "parts"]

METHODS: tuple[Method, ...] = get_args(Method)
WIDTHS = (16, 32, 64)  # N2; what the kernels are compiled for


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
    Range(96 * N1, "parts", 32),  # three blocks of 2048 pad less than two of 4096
    Range(None, "parts", 64),
)


def plan_for(T: int, config: Mapping[str, int | str] | None = None) -> Plan:
    """How to convolve T tokens: as `config` says, in part or whole, or else as the table does.

    config: "method", and "N2" where it has one. Raises ArgumentError.
    """
    if config is None:
        for last, method, N2 in TABLE:
            if last is None or last >= T:
                return _plan(T, method, N2)
    return _asked(T, checked(config or {}))


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
            "method monarch or parts"
        )
    return config


def _asked(T: int, config: Mapping[str, int | str]) -> Plan:
    method, N2 = config.get("method"), config.get("N2")
    if method is None:
        if N2 is None:
            return plan_for(T)
        method = "monarch" if int(N2) * N1 >= T else "parts"
    if method == "direct":
        return _plan(T, "direct", 0)
    if method == "parts":
        return _plan(T, "parts", WIDTHS[-1] if N2 is None else int(N2))
    for width in WIDTHS if N2 is None else (int(N2),):
        if width * N1 >= T:
            return _plan(T, "monarch", width)
    widest = WIDTHS[-1] if N2 is None else int(N2)
    raise ArgumentError(
        f"wanted T <= {widest * N1} for method monarch"
        f"{'' if N2 is None else f' with N2 = {N2}'}, one transform of 64 * N2 tokens, got T = {T};"
        " take a larger N2, or method parts"
    )


def _plan(T: int, method: Method, N2: int) -> Plan:
    return Plan(method, N2, 1 if method == "direct" else cdiv(T, N1 * N2))
