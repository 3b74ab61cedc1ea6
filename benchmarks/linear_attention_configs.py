"""Times linear attention's configurations on this GPU: the data behind its defaults.

    python benchmarks/linear_attention_configs.py tiles --out tiles.jsonl
    python benchmarks/linear_attention_configs.py segments --points 80 --out segments.jsonl

`tiles`: block sizes, warps and stages of the forward at shapes that fill the card. `segments`: into
how many a sequence is cut, forward and with the backward, at random shapes. One line a trial: what
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
        config = {**dict(zip(axes, values, strict=True)), "segments": 1}
        if config["BLOCK_V"] <= d:
            yield {"B": B, "T": T, "H": H, "K": d, "V": d, "direction": "fwd", "config": config}


def segments(points: int, seed: int) -> Iterator[Trial]:
    """Log-uniform: 1 to 128 programs of a head, 1k to 256k tokens, at most 2^21 rows."""
    generator = random.Random(seed)
    shapes: dict[tuple[int, int, int], None] = {}
    while len(shapes) < points:
        H, T = round(2 ** generator.uniform(0, 7)), 2 ** generator.randint(10, 18)
        if H * T <= 1 << 21:
            shapes[H, T, generator.choice((64, 128))] = None
    for H, T, d in shapes:
        for direction, count in itertools.product(
            ("fwd", "fwdbwd"), (1, 2, 3, 4, 6, 8, 12, 16, 32)
        ):
            if count == 1 or T // count >= 256:
                config = {"segments": count}
                yield {
                    "B": 1, "T": T, "H": H, "K": d, "V": d, "direction": direction,
                    "config": config,
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
    parser.add_argument("what", choices=("tiles", "segments"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", type=int, default=80, help="shapes of `segments`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    arguments = parser.parse_args()
    trials = list(
        tiles() if arguments.what == "tiles" else segments(arguments.points, arguments.seed)
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
