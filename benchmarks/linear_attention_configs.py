"""Times linear attention's configurations on this GPU, and makes the table that chooses from it.

    python benchmarks/linear_attention_configs.py choices --points 70 --out choices.csv
    python benchmarks/linear_attention_configs.py fit choices.csv
    python benchmarks/linear_attention_configs.py tiles --out tiles.csv

`choices`: which tile for Hopper, and into how many segments a sequence is cut, at random shapes.
`fit`: writes chela_bench/kernels/linear_attention_sm90.json from that, on any machine: the times
of the tiles that stand there and the rates, anew. `tiles`: block sizes, warps and stages of a
forward at shapes that fill the card, in Triton's own schedule.

One line a trial: what was asked and the median in microseconds, or why it failed. Warm L2, event to
event, a few milliseconds each: for choosing, not for claims (those come from `chela-bench sweep`).
Kernels compile first, in processes side by side; nothing is checked here, tests/ does.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chela_bench.kernels.linear_attention_model import (
    COUNTS,
    SM90,
    TABLE,
    Rates,
    Shape,
    Sweep,
    Tile,
    best_segments,
    best_training,
    forward_time,
    tiles_of,
    training_time,
)

Trial = dict[str, Any]  # B, T, H, K, V, direction, config
PROCESSORS = 132
SIZES = ("BLOCK_T", "BLOCK_V", "num_warps", "num_stages", "segments", "sweep", "wgmma")
COLUMNS = ("direction", *"BTHKV", *SIZES, "median_us", "reason")


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


USUAL = (  # heads of all sequences, T, K, V: where the project says what it takes
    (96, 8192, 128, 128), (256, 4096, 128, 128), (32, 16384, 128, 128), (16, 16384, 128, 128),
    (16, 65536, 128, 128), (256, 2048, 256, 256), (128, 16384, 64, 64), (1, 1 << 20, 128, 128),
)  # fmt: skip


def choices(points: int, seed: int, usual: bool = False) -> Iterator[Trial]:
    """Log-uniform: 1 to 256 heads, 1k to 256k tokens, at most 2^20 rows; forward by each tile for
    sm_90, with the backward by sweep and by walks; what is thrice as long as another count of
    segments by the model itself is left out."""
    generator = random.Random(seed)
    shapes: dict[tuple[int, int, int, int], None] = dict.fromkeys(USUAL) if usual else {}
    points += len(shapes)
    while len(shapes) < points:
        H, T = round(2 ** generator.uniform(0, 8)), round(2 ** generator.uniform(10, 18))
        K, V = generator.choice([(64, 64), (128, 128), (128, 128), (128, 256), (256, 256)])
        if H * T * V <= 1 << 27:
            shapes[H, T, K, V] = None
    for H, T, K, V in shapes:
        shape = Shape(H, T, K, V, PROCESSORS)
        chosen = {best_segments("auto", shape), best_training("auto", shape)[0]}
        times = {
            n: forward_time(shape, n, SM90.rates)
            for n in sorted({*COUNTS, *chosen})
            if n == 1 or T // n >= 512
        }
        counts = [n for n, time in times.items() if time <= 3 * min(times.values())]
        ways = [("fwd", tile) for tile in tiles_of(K, V)] + [("fwdbwd", x) for x in (0, 1)]
        for (direction, way), count in itertools.product(ways, counts):
            config = {"segments": count}
            if isinstance(way, Tile):
                names = ("BLOCK_V", "num_warps", "num_stages")
                config |= {name: getattr(way, name) for name in names}
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


def measure(trials: list[Trial], out: Path, jobs: int) -> None:
    distinct = {kernels_of(trial): trial for trial in trials}
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(distinct))) as pool:
        failures = dict(zip(distinct, pool.map(compile_one, distinct.values(), 1), strict=True))

    from chela_bench.bench import timing

    timer = timing.EventTimer(l2_bytes=0, cold=False)
    with out.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for trial in trials:
            reason = failures[kernels_of(trial)]
            median_us = None
            if reason is None:
                call = call_of(trial)
                call()
                samples = timing.event_samples(call, timer, timing.Budget(0.01, 0.2))
                median_us = round(statistics.median(samples) / 1e3, 2)
            row = {name: trial[name] for name in ("direction", *"BTHKV")} | trial["config"]
            writer.writerow({**row, "median_us": median_us, "reason": reason})
            lines.flush()
    print(f"{len(trials)} trials, {len(distinct)} sets of kernels: {out}")


Way = tuple[int, ...]  # segments, BLOCK_V, num_warps, num_stages; with the backward segments, sweep
FORWARD = ("segments", "BLOCK_V", "num_warps", "num_stages")


def measured(path: Path, direction: str) -> dict[Shape, dict[Way, float]]:
    """Microseconds of each way at each shape."""
    names = FORWARD if direction == "fwd" else ("segments", "sweep")
    times: dict[Shape, dict[Way, float]] = {}
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["direction"] == direction and row["median_us"]:
                shape = Shape(*(int(row[dim]) for dim in "HTKV"), PROCESSORS)
                way = tuple(int(row[name]) for name in names)
                times.setdefault(shape, {})[way] = float(row["median_us"])
    return times


def modelled(shape: Shape, way: Way, table: dict[str, Any]) -> float:
    rates = Rates(**table["rates"])
    if len(way) == 2:
        sweeps = {int(size): Sweep(**x) for size, x in table["sweeps"].items()}
        return training_time(shape, way[0], bool(way[1]), rates, sweeps)
    tiles = [Tile(**x) for x in table["walks"][str(max(64, shape.K))]]
    sizes = [(x.BLOCK_V, x.num_warps, x.num_stages) for x in tiles]
    return forward_time(shape, way[0], rates, tiles[sizes.index(way[1:])])


BACK = ("chunk_us", "sum_us", "sweep_tb", "parts_tb", "back_us")


def fit(path: Path, table: Path) -> None:
    """First what forwards take, then what the backward adds. Least squares of the logarithm of
    modelled over measured, then figure by figure what chooses better. Ways that nobody would
    choose, 1.3 times as long as the best at their shape, count a tenth, usual shapes eight times
    in the choices. No figure moves by more than half before the second step."""
    known = json.loads(table.read_text())
    for direction in ("fwd", "fwdbwd"):
        times = measured(path, direction)
        sections = [*itertools.chain(*known["walks"].values()), *known["sweeps"].values()]
        figures = [
            (section, name)
            for section in (*sections, known["rates"])
            for name in section
            if name.endswith(("_us", "_tb"))
            and (name in BACK) == (direction == "fwdbwd")
            and not (name == "alone_us" and section["programs"] == 1)
            and name != "copy_tb"  # the bench measures it
        ]
        if times:
            improve(known, figures, times)
        print(f"{direction}: {sum(map(len, times.values()))} ways at {len(times)} shapes")
    table.write_text(json.dumps(known, indent=1) + "\n")


def improve(
    known: dict[str, Any],
    figures: list[tuple[dict[str, Any], str]],
    times: dict[Shape, dict[Way, float]],
) -> None:
    """Changes the figures in `known`."""
    import numpy as np
    from scipy.optimize import least_squares

    rows = [
        (shape, way, time, 1.0 if time <= 1.3 * min(ways.values()) else 0.1)
        for shape, ways in times.items()
        for way, time in ways.items()
    ]
    roots = np.sqrt([weight for *_, weight in rows])

    def ratios(logarithms: Any) -> Any:
        """Of each row, the logarithm of modelled over measured."""
        for (section, name), value in zip(figures, np.exp(logarithms).tolist(), strict=True):
            section[name] = round(value, 3)
            if name == "full_us" and section["programs"] == 1:
                section["alone_us"] = section["full_us"]
        off = [modelled(shape, way, known) / time for shape, way, time, _ in rows]
        return np.log(off)

    def loss(logarithms: Any) -> float:
        """How much longer the chosen ways take than the best, and a little of the errors."""
        off = ratios(logarithms)
        chosen: dict[Shape, tuple[float, float]] = {}
        for (shape, _, time, _), ratio in zip(rows, off, strict=True):
            chosen[shape] = min(chosen.get(shape, (math.inf, 0.0)), (time * math.exp(ratio), time))
        late = {
            shape: math.log(time / min(times[shape].values()))
            for shape, (_, time) in chosen.items()
        }
        weights = [8 if shape[:4] in USUAL else 1 for shape in late]
        return statistics.fmean(late.values(), weights) + 0.2 * float(np.mean((off * roots) ** 2))

    start = np.log([section[name] for section, name in figures])
    near = start - np.log(1.5), start + np.log(1.5)
    found = least_squares(
        lambda x: ratios(x) * roots, start, bounds=near, loss="soft_l1", f_scale=0.1, diff_step=0.02
    ).x
    least = loss(found)
    for step in (0.2, 0.1, 0.05):
        for i, sign in itertools.product(range(len(figures)), (1, -1)):
            moved = found.copy()
            moved[i] += sign * step
            if loss(moved) < least:
                found, least = moved, loss(moved)
    ratios(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("choices", "tiles"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--jobs", type=int, default=os.cpu_count(), help="that compile")
    commands.choices["choices"].add_argument("--points", type=int, default=70, help="shapes")
    commands.choices["choices"].add_argument("--seed", type=int, default=0)
    commands.choices["choices"].add_argument(
        "--usual", action="store_true", help="the shapes of the tables, too"
    )
    command = commands.add_parser("fit")
    command.add_argument("measured", type=Path, help="what `choices` wrote")
    command.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    if arguments.what == "fit":
        fit(arguments.measured, arguments.table)
    elif arguments.what == "tiles":
        measure(list(tiles()), arguments.out, arguments.jobs)
    else:
        trials = choices(arguments.points, arguments.seed, arguments.usual)
        measure(list(trials), arguments.out, arguments.jobs)


if __name__ == "__main__":
    main()
