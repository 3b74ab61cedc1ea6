"""What linear attention's kernels for Hopper take, modelled: block sizes and schedules by it.

The tiles that may be chosen, and what was fitted to measurements of them, stand in
linear_attention_sm90.json, which `benchmarks/linear_attention_configs.py fit` writes. Of a kernel
the model takes the longer of its bytes over the bandwidth and of its waves of programs, each of
which walks chunk after chunk. `heads` are those of all sequences.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chela_bench.kernels.linear_attention_config import (
    OPTIONS,
    SHORTEST_SEGMENT,
    TILES,
    cdiv,
    suits_wgmma,
    tile,
)

TABLE = Path(__file__).with_name("linear_attention_sm90.json")
COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 66, 132)  # of segments, beside what fills


@dataclass(frozen=True)
class Tile:
    """A way to walk, and microseconds for a chunk of 64 tokens: where every SM walks as many
    programs as fit, and where it walks one."""

    BLOCK_V: int
    num_warps: int
    num_stages: int
    programs: int  # on an SM
    full_us: float
    alone_us: float


@dataclass(frozen=True)
class Rates:
    """Of what all tiles share."""

    copy_tb: float  # terabytes a second of HBM, as a walk moves it
    sum_tb: float  # as the sum over segments reads it
    states_tb: float  # as states are written and read
    sum_chunk_us: float  # a chunk of the sum, where it waits for loads
    fill_us: float  # before a kernel's first chunk
    launch_us: float  # from kernel to kernel
    scan_us: float  # a state


def read_table(path: Path = TABLE) -> tuple[dict[int, tuple[Tile, ...]], dict[int, Any], Rates]:
    """Tiles of walks and configurations of sweeps, by the tile of K, and rates."""
    table = json.loads(path.read_text())
    walks = {int(K): tuple(Tile(**x) for x in tiles) for K, tiles in table["walks"].items()}
    return walks, {int(K): x for K, x in table["sweeps"].items()}, Rates(**table["rates"])


WALKS, SWEEPS, RATES = read_table()


def tiles_of(K: int, V: int) -> list[Tile]:
    """No wider than V, where there is a choice."""
    return [x for x in WALKS[max(64, tile(K))] if max(64, tile(V)) >= x.BLOCK_V]


def chunk_time(tile: Tile, V: int, heads: int, processors: int) -> float:
    """Microseconds for a chunk of all heads; `heads` counts each segment."""
    programs = heads * cdiv(V, tile.BLOCK_V)
    full, rest = divmod(programs, tile.programs * processors)
    last = 0.0 if rest == 0 else tile.alone_us if rest <= processors else tile.full_us
    return full * tile.full_us + last


@functools.lru_cache(maxsize=4096)
def best_tile(K: int, V: int, heads: int, processors: int) -> Tile:
    """The one whose waves take least; `heads` counts each segment."""
    return min(tiles_of(K, V), key=lambda x: chunk_time(x, V, heads, processors))


def forward_time(
    tile: Tile,
    rates: Rates,
    *,
    heads: int,
    tokens: int,
    K: int,
    V: int,
    segments: int,
    processors: int,
) -> float:
    """Microseconds of a forward in bfloat16, without gradients to come."""
    chunks = cdiv(cdiv(tokens, segments), 64)
    waves = chunk_time(tile, V, heads * segments, processors) * chunks + rates.fill_us
    walk = max(waves, 2 * heads * tokens * (2 * K + 2 * V) / rates.copy_tb / 1e6)
    if segments == 1:
        return walk
    pieces = sum_pieces(heads, segments, tokens, K, V, processors)
    programs = heads * (segments - 1) * pieces * cdiv(K, 128) * cdiv(V, 64)
    rounds = cdiv(programs, 2 * processors)
    waves = rounds * cdiv(chunks, pieces) * rates.sum_chunk_us + rates.fill_us
    read = 2 * heads * tokens * (K + V) * (segments - 1) / segments / rates.sum_tb / 1e6
    states = 2 * 4 * heads * segments * pieces * K * V / rates.states_tb / 1e6
    scan = 2 * rates.launch_us + rates.scan_us * segments * pieces
    return walk + max(waves, read) + states + scan


def best_segments(
    schedule: str, *, heads: int, tokens: int, K: int, V: int, processors: int
) -> int:
    """Of each sequence: one if "fused", at least two if "split"; else what takes least."""
    if schedule == "fused":
        return 1
    most = max(2, tokens // SHORTEST_SEGMENT)
    slices = {cdiv(V, x.BLOCK_V) for x in tiles_of(K, V)}
    filling = {wave * processors // max(1, heads * n) for n in slices for wave in (1, 2)}
    counts = sorted({max(1, min(x, most)) for x in (*COUNTS, *filling)})
    if schedule == "split":
        counts.remove(1)

    def time(segments: int) -> float:
        best = best_tile(K, V, heads * segments, processors)
        return forward_time(
            best, RATES, heads=heads, tokens=tokens, K=K, V=V, segments=segments,
            processors=processors,
        )  # fmt: skip

    return min(counts, key=time)


def filling_segments(heads: int, tokens: int, V: int, processors: int) -> int:
    """As many as give every SM a program: near `best_segments`, and a rule that torch.compile can
    follow for any T."""
    most = tokens // SHORTEST_SEGMENT
    filling = processors // max(1, heads * cdiv(V, 64))
    return 1 if most < 2 or filling < 2 else min(filling, most)


def sum_pieces(heads: int, segments: int, tokens: int, K: int, V: int, processors: int) -> int:
    """Into how many a segment is cut for its sum, which alone may not fill the SMs."""
    if segments == 1:
        return 1
    programs = max(1, heads * (segments - 1) * cdiv(K, 128) * cdiv(V, 64))
    filling = cdiv(9 * processors, 10 * programs)
    return max(1, min(filling, tokens // segments // SHORTEST_SEGMENT))


def wgmma_config(
    options: Sequence[int], K: int, V: int, dtype: torch.dtype, heads: int, processors: int
) -> dict[str, int] | None:
    """Of a walk for Hopper, if that is to walk it; `heads` counts each segment."""
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
    wide = config["num_warps"] == 8 and tile(K) >= 128 and config["BLOCK_V"] in (64, 128)
    narrow = config["num_warps"] == 4 and config["BLOCK_V"] <= 64
    return config if wide or narrow else None


def wgmma_sweep_config(K: int, V: int) -> dict[str, int]:
    """Of the gradients' sweep on Hopper."""
    size = max(64, min(128, tile(max(K, V))))
    return {"BLOCK_T": 64, "BLOCK_K": size, "BLOCK_V": size, **SWEEPS[size]}
