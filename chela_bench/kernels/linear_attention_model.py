"""What linear attention's kernels for Hopper take, modelled: block sizes and schedules by it.

The tiles that may be chosen, and what was fitted to measurements of them, stand in
linear_attention_sm90.json, which `benchmarks/linear_attention_configs.py fit` writes. Of a kernel
the model takes the longer of its bytes over the bandwidth and of its waves of programs, each of
which walks chunk after chunk; of a walk, wave by wave. `heads` are those of all sequences.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from chela_bench.kernels.launching import cdiv
from chela_bench.kernels.linear_attention_config import (
    ADDED,
    MAX_K,
    OPTIONS,
    SHORTEST_SEGMENT,
    TILES,
    suits_wgmma,
    swept_segments,
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
class Sweep:
    """The sweep over the gradients, one program an SM: microseconds for a chunk of 64 tokens, and
    for a chunk of the sum over q and do before it, where there is one segment."""

    num_warps: int
    num_stages: int
    chunk_us: float
    sum_us: float


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
    sweep_tb: float  # as a sweep reads and writes HBM
    parts_tb: float  # as parts of gradients are written and added up
    back_us: float  # more for a kernel of the backward
    share: float  # of the bandwidth that one SM can draw, in 1 / SMs


@dataclass(frozen=True)
class Table:
    walks: dict[int, tuple[Tile, ...]]  # by the tile of K
    sweeps: dict[int, Sweep]  # by the block of K and V
    rates: Rates


def read_table(path: Path = TABLE) -> Table:
    table = json.loads(path.read_text())
    return Table(
        {int(K): tuple(Tile(**x) for x in tiles) for K, tiles in table["walks"].items()},
        {int(size): Sweep(**x) for size, x in table["sweeps"].items()},
        Rates(**table["rates"]),
    )


SM90 = read_table()


class Shape(NamedTuple):
    """Of a call, causal and in bfloat16; `heads` are those of all sequences."""

    heads: int
    tokens: int
    K: int
    V: int
    processors: int


def tiles_of(K: int, V: int) -> list[Tile]:
    """No wider than V, where there is a choice."""
    return [x for x in SM90.walks[max(64, tile(K))] if max(64, tile(V)) >= x.BLOCK_V]


def chunk_time(
    tile: Tile, K: int, V: int, heads: int, processors: int, rates: Rates = SM90.rates
) -> float:
    """Microseconds for a chunk of all heads, wave by wave: what its programs take, or their bytes;
    few programs cannot draw the whole bandwidth. `heads` counts each segment."""
    slices = cdiv(V, tile.BLOCK_V)
    program_us = 64 * 2 * (2 * K + 2 * V) / slices / rates.copy_tb / 1e6  # to move its bytes
    wave = tile.programs * processors
    full, rest = divmod(heads * slices, wave)
    rest_us = tile.alone_us if rest <= processors else tile.full_us
    drawn = max(rest, processors / rates.share)
    last = 0.0 if rest == 0 else max(rest_us, drawn * program_us)
    return full * max(tile.full_us, wave * program_us) + last


@functools.lru_cache(maxsize=4096)
def best_tile(K: int, V: int, heads: int, processors: int) -> Tile:
    """The one whose waves take least, of equals (to 1 %) the widest, which reads q and k least
    often; `heads` counts each segment."""
    times = {x: chunk_time(x, K, V, heads, processors) for x in tiles_of(K, V)}
    near = [x for x in times if times[x] <= 1.01 * min(times.values())]
    return max(near, key=lambda x: (x.BLOCK_V, -times[x]))


def walk_time(
    x: Shape, segments: int, rates: Rates, tile: Tile | None = None, *, swapped: bool = False
) -> float:
    """Microseconds of one walk, by the best tile or the given one; swapped, V are the keys."""
    K, V = (x.V, x.K) if swapped else (x.K, x.V)
    heads = x.heads * segments
    tile = tile or best_tile(K, V, heads, x.processors)
    chunks = cdiv(cdiv(x.tokens, segments), 64)
    return chunk_time(tile, K, V, heads, x.processors, rates) * chunks + rates.fill_us


def sums_time(x: Shape, pieces: int, skipped: int, rates: Rates) -> float:
    """Microseconds of the sums over all pieces but those skipped, and of their scan."""
    if pieces == 1:
        return 0.0
    summed = pieces - skipped
    programs = x.heads * summed * cdiv(x.K, 128) * cdiv(x.V, 64)
    chunks = cdiv(cdiv(x.tokens, pieces), 64)
    waves = cdiv(programs, 2 * x.processors) * chunks * rates.sum_chunk_us + rates.fill_us
    read = 2 * x.heads * x.tokens * (x.K + x.V) * summed / pieces / rates.sum_tb / 1e6
    states = 2 * 4 * x.heads * pieces * x.K * x.V / rates.states_tb / 1e6
    return max(waves, read) + states + 2 * rates.launch_us + rates.scan_us * pieces


def forward_time(x: Shape, segments: int, rates: Rates, tile: Tile | None = None) -> float:
    """Microseconds, without gradients to come."""
    pieces = sum_pieces(x, segments)
    return walk_time(x, segments, rates, tile) + sums_time(x, segments * pieces, pieces, rates)


def training_time(
    x: Shape, segments: int, sweep: bool, rates: Rates, sweeps: Mapping[int, Sweep]
) -> float:
    """Microseconds of forward and backward, by a sweep or by a walk for each gradient."""
    pieces = segments * swept_pieces(x, segments)
    time = walk_time(x, segments, rates) + sums_time(x, pieces, 1, rates)
    if not sweep:
        time += sums_time(x, pieces, pieces // segments, rates)
        walks = 2 * walk_time(x, segments, rates, swapped=True) + walk_time(x, segments, rates)
        return time + walks + 3 * rates.back_us
    size = _block(x.K, x.V)
    found, blocks = sweeps[size], cdiv(x.V, size)
    programs = x.heads * cdiv(x.K, size) * min(blocks, ADDED)
    swept = swept_segments(pieces, programs, x.tokens, x.processors)
    chunks = cdiv(cdiv(x.tokens, swept), 64) * cdiv(blocks, ADDED)
    waves = cdiv(programs * swept, x.processors) * chunks
    elements = x.heads * x.tokens * (4 * x.K + 3 * x.V)
    if swept == 1:
        waves_us = waves * (found.chunk_us + found.sum_us)
        elements += x.heads * x.tokens * (x.K + x.V)
    else:
        waves_us = waves * found.chunk_us
        time += sums_time(x, swept, 0, rates)
        time += sums_time(x, swept, 1, rates) if swept != pieces else 0.0
    if blocks > 1:  # dq and dk in parts, written and read
        time += 2 * 2 * x.heads * x.tokens * 2 * x.K * blocks / rates.parts_tb / 1e6
    return time + max(waves_us, 2 * elements / rates.sweep_tb / 1e6) + rates.back_us


def best_segments(schedule: str, x: Shape) -> int:
    """Of each sequence: one if "fused", at least two if "split"; else what takes least."""
    return min(_counts(schedule, x), key=lambda n: forward_time(x, n, SM90.rates))


def best_training(schedule: str, x: Shape, *, segments: int | None = None) -> tuple[int, bool]:
    """Segments, unless they are given, and whether a sweep gives the gradients. A K of two blocks
    makes parts of dv too: where walks can do it, they take half as long."""
    counts = _counts(schedule, x) if segments is None else [segments]
    is_whole = _block(x.K, x.V) >= x.K
    sweeps = (True,) if x.V > MAX_K else (True, False) if is_whole else (False,)
    ways = itertools.product(counts, sweeps)
    return min(ways, key=lambda way: training_time(x, way[0], way[1], SM90.rates, SM90.sweeps))


def _counts(schedule: str, x: Shape) -> list[int]:
    """Of segments, that are worth a look."""
    if schedule == "fused":
        return [1]
    least = 2 if schedule == "split" else 1
    most = max(least, x.tokens // SHORTEST_SEGMENT)
    slices = {cdiv(x.V, tile.BLOCK_V) for tile in tiles_of(x.K, x.V)}
    filling = {wave * x.processors // max(1, x.heads * n) for n in slices for wave in (1, 2)}
    return sorted({max(least, min(n, most)) for n in (*COUNTS, *filling)})


def filling_segments(heads: int, tokens: int, V: int, processors: int) -> int:
    """As many as give every SM a program: near `best_segments`, and a rule that torch.compile can
    follow for any T."""
    most = tokens // SHORTEST_SEGMENT
    filling = processors // max(1, heads * cdiv(V, 64))
    return 1 if most < 2 or filling < 2 else min(filling, most)


def sum_pieces(x: Shape, segments: int) -> int:
    """Into how many a segment is cut for its sum, which alone may not fill the SMs."""
    if segments == 1:
        return 1
    programs = max(1, x.heads * (segments - 1) * cdiv(x.K, 128) * cdiv(x.V, 64))
    filling = cdiv(9 * x.processors, 10 * programs)
    return max(1, min(filling, x.tokens // segments // SHORTEST_SEGMENT))


def swept_pieces(x: Shape, segments: int) -> int:
    """The same, where a sweep is to find a state kept for each of its programs: it has one for all
    of V."""
    if segments == 1:
        return 1
    swept = x.processors // max(1, x.heads * cdiv(x.K, 128) * min(cdiv(x.V, 128), ADDED))
    return max(1, min(swept // segments, x.tokens // segments // SHORTEST_SEGMENT))


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
    size = _block(K, V)
    found = SM90.sweeps[size]
    return {
        "BLOCK_T": 64,
        "BLOCK_K": size,
        "BLOCK_V": size,
        "num_warps": found.num_warps,
        "num_stages": found.num_stages,
    }


def _block(K: int, V: int) -> int:
    """Of K and V, that a sweep takes at once."""
    return max(64, min(128, tile(max(K, V))))
