"""Block sizes and schedules of linear attention: what may be asked for, and the defaults."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch

from chela_bench.errors import ArgumentError
from chela_bench.kernels.launching import cdiv

MAX_K = 256  # of a walk's keys: S [K, BLOCK_V] has to stay in registers
MAX_V = 4096
TILES = ("BLOCK_T", "BLOCK_V", "num_warps", "num_stages")  # of a walk
OPTIONS = (*TILES, "sweep", "wgmma", "keep")
NEAR = 1 << 22  # elements from token to token, below which 256 tokens need but 32 bits
SEGMENT_ALIGN = 64  # tokens; a segment is a multiple of it
WINDOW = 256  # tokens, of which a walk may keep a state
RUNTIME = [  # never specialised: a new B, T, H or layout of rows compiles nothing
    "T", "H", "segments", "pieces", "skip_from", "skip_to", "summed", "first_v", "scale",
    *(f"stride_{x}{axis}" for x in "qkvo" for axis in "bth"),
]  # fmt: skip
Schedule = Literal["auto", "fused", "split"]
ALLOWED_CONFIG: dict[str, tuple[int, ...]] = {
    "BLOCK_T": (16, 32, 64, 128, 256),
    "BLOCK_V": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
    "segments": tuple(range(1, 1025)),
    "sweep": (0, 1),  # 1: gradients in one sweep; 0: a walk for each, where V <= MAX_K
    "wgmma": (0, 1),  # 1: walks scheduled by hand for sm_90, where they can be; 0: by Triton
    "keep": (0, 1),  # 1: dq and dk from states that the walks of o and dv keep, where they can be
}
SWEPT = 16384  # tokens in a segment of a sweep at most
ADDED = 8  # parts of a gradient in memory at once
SHORTEST_SEGMENT = 512  # tokens; below, the states cost as much as what they save


def default_config(K: int, V: int, dtype: torch.dtype) -> dict[str, int]:
    """Of a walk. No spills when compiled for sm_90, but precise=True spills from K = 128 on."""
    wide = K > 128
    upcast = dtype == torch.float32 or (wide and dtype == torch.float16)  # S is a TF32 operand
    return {
        "BLOCK_T": 32 if upcast else 64,
        "BLOCK_V": min(32 if wide else 64, tile(V)),
        "num_warps": 8 if wide and dtype != torch.bfloat16 else 4,
        "num_stages": 2,
    }


def walk_config(options: Sequence[int], K: int, V: int, dtype: torch.dtype) -> dict[str, int]:
    """The defaults, and what the caller asked for, by OPTIONS; -1 where the default holds."""
    asked = zip(OPTIONS, options, strict=True)
    given = {name: size for name, size in asked if size >= 0 and name in TILES}
    return {**default_config(K, V, dtype), **given}


def suits_wgmma(options: Sequence[int], K: int, dtype: torch.dtype) -> bool:
    """Whether the walks for sm_90 do what the caller asked for."""
    asked = dict(zip(OPTIONS, options, strict=True))
    return (
        dtype == torch.bfloat16
        and K > 32
        and asked["wgmma"] != 0
        and asked["BLOCK_T"] in (-1, 64)
        and asked["num_stages"] != 1
    )


def keeps(options: Sequence[int]) -> bool:
    """Whether walks keep states for the gradients: only where the call was found to suit that."""
    return len(options) > 0 and options[OPTIONS.index("keep")] == 1


def suits_kept(K: int, V: int, dtype: torch.dtype) -> bool:
    """Whether dq and dk can come from kept states, of a causal call that is not packed: a whole
    row of K in a program, and states that do not overflow."""
    return K <= 128 and V % 64 == 0 and dtype != torch.float16


@functools.lru_cache(maxsize=1024)
def sum_config(K: int, V: int, dtype: torch.dtype, roomy: bool) -> dict[str, int]:
    """Of the sum over a segment. `roomy`: with the shared memory of a Hopper SM, which one program
    of 128 columns fills sooner than two of 64 do."""
    wide = roomy and dtype != torch.float32 and min(K, V) > 64
    return {
        "BLOCK_T": 32 if dtype == torch.float32 else 64,
        "BLOCK_K": min(128, tile(K)),
        "BLOCK_V": min(128 if wide else 64, tile(V)),
        "num_warps": 8 if wide else 4,
        "num_stages": 4,
    }


@functools.lru_cache(maxsize=1024)
def sweep_config(K: int, V: int, dtype: torch.dtype, precise: bool, roomy: bool) -> dict[str, int]:
    """Of the gradients' sweep. Two blocks of states of 128 x 128 fill the registers of 8 warps: in
    bfloat16 200 bytes a thread spill (sm_90, static). `roomy`: where wgmma reads operands from
    shared memory; in registers, as mma wants them, those of 128 columns make ptxas spill all."""
    half = dtype == torch.bfloat16 and not precise  # operands of two bytes
    wide = half and roomy
    block_k, block_v = (min(128 if wide else 64, tile(size)) for size in (K, V))
    return {
        "BLOCK_T": 64 if wide else 32,
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "num_warps": 8 if block_k * block_v > 64 * 64 or not half else 4,
        "num_stages": 2,
    }


def checked(config: Mapping[str, int]) -> Mapping[str, int]:
    """What the caller asked for, if it is allowed."""
    for key, value in config.items():
        if value not in ALLOWED_CONFIG.get(key, ()):
            allowed = "; ".join(f"{key} {_range(values)}" for key, values in ALLOWED_CONFIG.items())
            raise ArgumentError(f"no config {key}={value!r}; allowed: {allowed}")
    return config


def choose_segments(
    schedule: str, *, sequences: int, heads: int, tokens: int, slices: int, processors: int
) -> int:
    """Segments of each sequence. "fused" is one; "split" as many as give every SM two programs in
    one wave, of at least 512 tokens, but at least two; "auto" splits where fewer programs than SMs
    would run.
    """
    if schedule not in get_args(Schedule):
        raise ArgumentError(f"no schedule {schedule!r}; there are: {', '.join(get_args(Schedule))}")
    programs = max(1, sequences * heads * slices)
    most = tokens // SHORTEST_SEGMENT
    if schedule == "fused" or (schedule == "auto" and (4 * programs > 3 * processors or most < 2)):
        return 1
    return max(2, min(2 * processors // programs, most))


def swept_segments(segments: int, programs: int, tokens: int, processors: int) -> int:
    """Of a sweep, `programs` to a segment: as many as there are, whose states are kept; more where
    one would be too long for the subtraction, or where less than half of the SMs had a program."""
    segments = max(segments, cdiv(tokens, SWEPT))
    if 2 * programs * segments <= processors:
        filling = processors // max(1, programs)
        segments = max(segments, min(filling, tokens // SHORTEST_SEGMENT))
    return segments


def options_of(config: Mapping[str, int]) -> tuple[int, ...]:
    """What the caller asked for, by OPTIONS; -1 where the default holds."""
    return tuple([config.get(name, -1) for name in OPTIONS])


def tile(size: int) -> int:
    """The power of two that holds it, at least 16: what a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())


def _range(values: tuple[int, ...]) -> str:
    return str(values) if len(values) < 10 else f"{values[0]} to {values[-1]}"
