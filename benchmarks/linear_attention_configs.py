"""Times linear attention's configurations on this GPU: the data behind its defaults.

    python benchmarks/linear_attention_configs.py tiles --out tiles.jsonl
    python benchmarks/linear_attention_configs.py choices --points 80 --out choices.jsonl

`tiles`: block sizes, warps and stages of the forward at shapes that fill the card, in Triton's own
schedule. `choices`: which tile for sm_90, and into how many segments a sequence is cut, at random
shapes; how well the defaults choose is tested on them. One line a trial: what
was asked and the median in microseconds, or why it failed. Warm L2, event to event, a few
milliseconds each: for choosing, not for claims (those come from `chela-bench sweep`). Kernels
compile first, in processes side by side; nothing is checked here, tests/ does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chela_bench.kernels.linear_attention_config import (
    COUNTS,
    SM90_WALKS,
    Tile,
    best_segments,
    forward_time,
)

Trial = dict[str, Any]  # B, T, H, K, V, direction, config


def tiles() -> Iterator[Trial]:
    axes = {
        "BLOCK_T": (32, 64, 128),
        "BLOCK_V": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    }
    shapes = [(1, 4096, 264, 64), (1, 4096, 132, 128), (1, 2048, 132, 256)]
    for (B, T, H, d), values in itertools.product(shapes, itertools.product(*axes.values())):
        config = {**dict(zip(axes, values, strict=True)), "segments": 1, "wgmma": 0}
        if config["BLOCK_V"] <= d:
            yield {"B": B, "T": T, "H": H, "K": d, "V": d, "direction": "fwd", "config": config}


def choices(points: int, seed: int) -> Iterator[Trial]:
    """Log-uniform: 1 to 256 heads, 1k to 256k tokens, at most 2^20 rows; forward by each tile for
    sm_90, with the backward by sweep and by walks; what is thrice as long as another count of
    segments by the model itself is left out."""
    generator = random.Random(seed)
    shapes: dict[tuple[int, int, int, int], None] = {}
    while len(shapes) < points:
        H, T = round(2 ** generator.uniform(0, 8)), round(2 ** generator.uniform(10, 18))
        K, V = generator.choice([(64, 64), (128, 128), (128, 128), (128, 256), (256, 256)])
        if H * T * V <= 1 << 27:
            shapes[H, T, K, V] = None
    for H, T, K, V in shapes:
        chosen = best_segments("auto", heads=H, tokens=T, K=K, V=V, processors=132)
        times = {
            n: forward_time(H, T, K, V, n, 132)
            for n in sorted({*COUNTS, chosen})
            if n == 1 or T // n >= 512
        }
        counts = [n for n, time in times.items() if time <= 3 * min(times.values())]
        ways = [("fwd", tile) for tile in SM90_WALKS[K]] + [("fwdbwd", sweep) for sweep in (0, 1)]
        for (direction, way), count in itertools.product(ways, counts):
            config = {"segments": count}
            if isinstance(way, Tile):
                names = ("BLOCK_V", "num_warps", "num_stages")
                config |= {name: getattr(way, name) for name in names}
                if V < way.BLOCK_V:
                    continue
            else:
                config["sweep"] = way
                if way == 1 and K > 128:  # twice as long, and known to be
                    continue
            yield {
                "B": 1, "T": T, "H": H, "K": K, "V": V, "direction": direction, "config": config,
            }  # fmt: skip


def call_of(trial: Trial, tokens: int | None = None) -> Any:
    import torch

    from chela_bench.kernels.linear_attention import linear_attention

    B, T, H, K, V = (trial[dim] for dim in "BTHKV")
    shapes = [(B, tokens or T, H, size) for size in (K, K, V)]
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    if trial["direction"] == "fwd":

        def forward() -> object:
            with torch.no_grad():
                return linear_attention(q, k, v, config=trial["config"])

        return forward
    leaves = [x.requires_grad_() for x in (q, k, v)]
    do = torch.randn_like(v)
    return lambda: torch.autograd.grad(
        linear_attention(q, k, v, config=trial["config"])[0], leaves, do
    )


def compile_one(trial: Trial) -> str | None:
    """At few tokens and heads: neither makes another kernel. Why it failed, or None."""
    try:
        call_of({**trial, "H": 1}, tokens=256)()
    except Exception as error:  # recorded with the trial
        return f"{type(error).__name__}: {error}"[:200]
    return None


def kernels_of(trial: Trial) -> str:
    """Equal for trials that need the same kernels."""
    config = {**trial["config"], "segments": min(trial["config"].get("segments", 1), 2)}
    return json.dumps([trial["K"], trial["V"], trial["direction"], config], sort_keys=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tiles", "choices"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", type=int, default=80, help="shapes of `choices`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    arguments = parser.parse_args()
    trials = list(
        tiles() if arguments.what == "tiles" else choices(arguments.points, arguments.seed)
    )
    distinct = {kernels_of(trial): trial for trial in trials}
    with multiprocessing.get_context("spawn").Pool(min(arguments.jobs, len(distinct))) as pool:
        failures = dict(zip(distinct, pool.map(compile_one, distinct.values(), 1), strict=True))

    from chela_bench.bench import timing

    timer = timing.EventTimer(l2_bytes=0, cold=False)
    with arguments.out.open("w") as lines:
        for trial in trials:
            reason = failures[kernels_of(trial)]
            median_us = None
            if reason is None:
                call = call_of(trial)
                call()
                samples = timing.event_samples(call, timer, timing.Budget(0.01, 0.2))
                median_us = round(statistics.median(samples) / 1e3, 2)
            lines.write(json.dumps({**trial, "median_us": median_us, "reason": reason}) + "\n")
            lines.flush()
    print(f"{len(trials)} trials, {len(distinct)} sets of kernels: {arguments.out}")


if __name__ == "__main__":
    main()
