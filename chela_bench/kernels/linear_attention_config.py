"""Block sizes and schedules of linear attention: what may be asked for, and the defaults."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from chela_bench.errors import ArgumentError

MAX_K = 256  # of a walk's keys: S [K, BLOCK_V] has to stay in registers
MAX_V = 4096
TILES = ("BLOCK_T", "BLOCK_V", "num_warps", "num_stages")  # of a walk
OPTIONS = (*TILES, "sweep", "wgmma")
NEAR = 1 << 22  # elements from token to token, below which 256 tokens need but 32 bits
SEGMENT_ALIGN = 64  # tokens; a segment is a multiple of it
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
}
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


@dataclass(frozen=True)
class Tile:
    """A way to walk on sm_90, and microseconds for a chunk of 64 tokens: where every SM walks as
    many programs as fit, and where it walks one."""

    BLOCK_V: int
    num_warps: int
    num_stages: int
    programs: int  # on an SM
    full_us: float
    alone_us: float


# By the tile of K. Two programs an SM hide each other's waits, three stages those of one. Times and
# rates here and below: fitted to 1263 forwards timed on an H100 (docs/results/linear-attention.md).
SM90_WALKS = {
    64: (Tile(64, 4, 3, programs=2, full_us=1.58, alone_us=0.88),),
    128: (
        Tile(64, 4, 3, programs=1, full_us=1.15, alone_us=1.15),
        Tile(64, 4, 2, programs=2, full_us=2.21, alone_us=1.26),
        Tile(128, 8, 3, programs=1, full_us=1.79, alone_us=1.79),
    ),
    256: (
        Tile(128, 8, 2, programs=1, full_us=3.55, alone_us=3.55),
        Tile(64, 8, 2, programs=1, full_us=2.3, alone_us=2.3),
    ),
}
COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 66, 132)  # of segments, beside others
COPY_TB = 2.98  # terabytes a second of HBM
SUM_TB = 2.09  # as the sum over segments reads it
STATES_TB = 1.78  # as states are written and read
SUM_CHUNK_US = 0.41  # of the sum, where it waits for loads
FILL_US = 1.5  # before a kernel's first chunk
LAUNCH_US = 2.3  # from kernel to kernel
SCAN_US = 0.04  # a state


def tile_time(tile: Tile, V: int, heads: int, processors: int) -> float:
    """Microseconds a chunk of all heads' walks; `heads` counts each segment."""
    programs = heads * cdiv(V, tile.BLOCK_V)
    full, rest = divmod(programs, tile.programs * processors)
    last = 0.0 if rest == 0 else tile.alone_us if rest <= processors else tile.full_us
    return full * tile.full_us + last


@functools.lru_cache(maxsize=4096)
def best_tile(K: int, V: int, heads: int, processors: int) -> Tile:
    """Of SM90_WALKS the one whose waves take least."""
    tiles = SM90_WALKS[max(64, tile(K))]
    widest = max(64, tile(V))
    fitting = [x for x in tiles if widest >= x.BLOCK_V]
    return min(fitting, key=lambda x: tile_time(x, V, heads, processors))


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


def wgmma_config(
    options: Sequence[int], K: int, V: int, dtype: torch.dtype, heads: int, processors: int
) -> dict[str, int] | None:
    """Of a walk for sm_90, if that is to walk it; `heads` counts each segment."""
    if not suits_wgmma(options, K, dtype):
        return None
    best = best_tile(K, V, heads, processors)
    config = {
        "BLOCK_T": 64,
        "BLOCK_V": min(best.BLOCK_V, tile(V)),
        "num_warps": best.num_warps,
        "num_stages": best.num_stages,
    }
    asked = zip(OPTIONS, options, strict=True)
    config |= {name: size for name, size in asked if size >= 0 and name in TILES}
    wide = config["num_warps"] == 8 and tile(K) >= 128 and config["BLOCK_V"] >= 64
    narrow = config["num_warps"] == 4 and config["BLOCK_V"] <= 64
    return config if wide or narrow else None


@functools.lru_cache(maxsize=1024)
def wgmma_sweep_config(K: int, V: int) -> dict[str, int]:
    """Of the gradients' sweep on sm_90."""
    size = max(64, min(128, tile(max(K, V))))
    return {
        "BLOCK_T": 64,
        "BLOCK_K": size,
        "BLOCK_V": size,
        "num_warps": 8,
        "num_stages": 2 if size == 128 else 3,
    }


@functools.lru_cache(maxsize=1024)
def sum_config(K: int, V: int, dtype: torch.dtype) -> dict[str, int]:
    """Of the sum over a segment."""
    return {
        "BLOCK_T": 32 if dtype == torch.float32 else 64,
        "BLOCK_K": min(128, tile(K)),
        "BLOCK_V": min(64, tile(V)),
        "num_warps": 4,
        "num_stages": 4,
    }


@functools.lru_cache(maxsize=1024)
def sweep_config(K: int, V: int, dtype: torch.dtype, precise: bool) -> dict[str, int]:
    """Of the gradients' sweep. Two blocks of states of 128 x 128 fill the registers of 8 warps: in
    bfloat16 200 bytes a thread spill (sm_90, static)."""
    half = dtype == torch.bfloat16 and not precise  # operands of two bytes
    block_k, block_v = (min(128 if half else 64, tile(size)) for size in (K, V))
    return {
        "BLOCK_T": 64 if half else 32,
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


def best_segments(
    schedule: str, *, heads: int, tokens: int, K: int, V: int, processors: int
) -> int:
    """The same where walks are for sm_90: what `forward_time` says takes least."""
    if schedule == "fused":
        return 1
    most = max(2, tokens // SHORTEST_SEGMENT)
    per_head = {cdiv(V, x.BLOCK_V) for x in SM90_WALKS[max(64, tile(K))]}
    filling = {wave * processors // max(1, heads * n) for n in per_head for wave in (1, 2)}
    counts = sorted({max(1, min(x, most)) for x in (*COUNTS, *filling)})
    if schedule == "split":
        counts.remove(1)
    return min(counts, key=lambda x: forward_time(heads, tokens, K, V, x, processors))


def filling_segments(heads: int, tokens: int, V: int, processors: int) -> int:
    """As many as give every SM a program: near `best_segments`, and a rule that torch.compile can
    follow for any T."""
    most = tokens // SHORTEST_SEGMENT
    filling = processors // max(1, heads * cdiv(V, 64))
    return 1 if most < 2 or filling < 2 else min(filling, most)


def forward_time(heads: int, tokens: int, K: int, V: int, segments: int, processors: int) -> float:
    """Microseconds of a forward for sm_90 in bfloat16, modelled: of each kernel the longer of the
    bytes and of the waves of chunks. `heads` are those of all sequences."""
    chunks = cdiv(cdiv(tokens, segments), 64)
    best = best_tile(K, V, heads * segments, processors)
    waves = tile_time(best, V, heads * segments, processors) * chunks + FILL_US
    walk = max(waves, 2 * heads * tokens * (2 * K + 2 * V) / COPY_TB / 1e6)
    if segments == 1:
        return walk
    pieces = sum_pieces(heads, segments, tokens, K, V, processors)
    programs = heads * (segments - 1) * pieces * cdiv(K, 128) * cdiv(V, 64)
    waves = cdiv(programs, 2 * processors) * cdiv(chunks, pieces) * SUM_CHUNK_US + FILL_US
    read = 2 * heads * tokens * (K + V) * (segments - 1) / segments / SUM_TB / 1e6
    states = 2 * 4 * heads * segments * pieces * K * V / STATES_TB / 1e6
    return walk + max(waves, read) + states + 2 * LAUNCH_US + SCAN_US * segments * pieces


def sum_pieces(heads: int, segments: int, tokens: int, K: int, V: int, processors: int) -> int:
    """Into how many a segment is cut for its sum, which alone may not fill the SMs."""
    if segments == 1:
        return 1
    programs = max(1, heads * (segments - 1) * cdiv(K, 128) * cdiv(V, 64))
    filling = cdiv(9 * processors, 10 * programs)
    return max(1, min(filling, tokens // segments // SHORTEST_SEGMENT))


def has_wgmma(device: torch.device) -> bool:
    """Hopper alone: neither older GPUs nor newer ones have these tensor core instructions."""
    if device.type != "cuda":
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.major == 9)


def processors(device: torch.device) -> int:
    """SMs of a GPU; a few where kernels are interpreted."""
    if device.type != "cuda":
        return 4
    count: Any = torch.cuda.get_device_properties(device).multi_processor_count
    return int(count)


def options_of(config: Mapping[str, int]) -> tuple[int, ...]:
    """What the caller asked for, by OPTIONS; -1 where the default holds."""
    return tuple([config.get(name, -1) for name in OPTIONS])


def tile(size: int) -> int:
    """The power of two that holds it, at least 16: what a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())


def cdiv(size: int, block: int) -> int:
    return -(-size // block)


def _range(values: tuple[int, ...]) -> str:
    return str(values) if len(values) < 10 else f"{values[0]} to {values[-1]}"
