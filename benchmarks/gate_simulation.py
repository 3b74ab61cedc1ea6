"""How often do `compare` and `gate` err? Planted changes on recorded noise of an H100.

    python benchmarks/gate_simulation.py [--trials 10000] [-o docs/results/gate-simulation]

Every trial draws one point with its recorded samples (docs/results/h100 and h100-attention/cold:
event timer, cold L2) and makes two sides of blocks of neighbouring samples, so that both are the
same code's noise as it was recorded. The second side is longer by the planted change. The decision
is the package's own.

Scenarios: clean; drift (5 % slower by the end of the session); bimodal (a clock of two states, 12 %
apart, 0.3 s in each on average); outliers (1 of 20 samples takes 3 times as long); processes: the
second side is longer or shorter also by what two runs of the same code differ, drawn from
fla-core's kernels, which are the same in several recorded runs on other cards and days. Stored
records are always of two runs: there, all scenarios have that too.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from chela_bench.bench import verdict
from chela_bench.bench.comparing import look
from chela_bench.bench.live import LOOKS, TURN_S
from chela_bench.bench.sources import Entry
from chela_bench.bench.verdict import Limit
from chela_bench.records import Point, Telemetry
from chela_bench.reports.figures import render

ROOT = Path(__file__).resolve().parent.parent / "docs" / "results"
SERIES = ("h100", "h100-attention/cold")
RUNS = ("h100-attention/layer", "h100-attention/peers", "h100-attention/many-heads",
        "h100-published")  # fmt: skip
CHANGES = (0.0, 0.01, 0.02, 0.05, 0.07, 0.10)
SCENARIOS = ("clean", "drift", "bimodal", "outliers", "processes")
LIMIT = Limit(0.05, 0.0)
FEWEST = 100  # samples of a recorded series
OVERHEAD_S = 0.0004  # of a sample: evicting the L2, holding the stream
DRIFT, DRIFT_ROUNDS = 0.05, 32
SLOW, DWELL_S = 1.12, 0.3
OUTLIERS, OUTLIER = 0.05, 3.0
CLOCK_MHZ = 1980
MOST_ROUNDS = 160
BLOCK = 20  # neighbouring samples that stay together
VERDICTS = ("passed", "failed", "unclear")


def recorded_series() -> list[np.ndarray]:
    """Samples in nanoseconds of every point that has enough of them."""
    lines = [line for name in SERIES
             for line in (ROOT / name / "samples.jsonl").read_text().splitlines()]  # fmt: skip
    taken = [np.array(json.loads(line)["samples_ns"], dtype=float) for line in lines]
    return [samples for samples in taken if len(samples) >= FEWEST]


def recorded_offsets() -> np.ndarray:
    """Logarithms of the ratio of two runs' medians, of kernels that did not change in between."""
    medians: dict[str, list[float]] = {}
    for name in RUNS:
        for line in (ROOT / name / "points.jsonl").read_text().splitlines():
            point = json.loads(line)
            if point["impl"].startswith("fla_") and point["time_ns"]:
                medians.setdefault(point["key"], []).append(point["time_ns"]["median"])
    pairs = [(a, b) for times in medians.values() for a, b in itertools.combinations(times, 2)]
    logs = np.log([b / a for a, b in pairs])
    return np.concatenate([logs, -logs])  # which run came first means nothing


class Session:
    """One trial: a point, two processes, and what disturbs them as time goes by."""

    def __init__(self, rng: np.random.Generator, series: np.ndarray, scenario: str) -> None:
        self.rng, self.series, self.scenario = rng, series, scenario
        self.sample_s = float(np.median(series)) * 1e-9 + OVERHEAD_S
        self.slow = bool(rng.integers(2))

    def samples(
        self, turns: int, count: int, progress: tuple[float, float], *, block: int
    ) -> np.ndarray:
        """[turns, count], one after another, from one time to another (1: the session's end); of
        blocks of so many neighbours."""
        blocks = -(-count // block)
        starts = self.rng.integers(0, len(self.series) - block + 1, (turns, blocks, 1))
        taken = self.series[(starts + np.arange(block)).reshape(turns, -1)[:, :count]]
        if self.scenario == "drift":
            taken *= 1 + DRIFT * np.linspace(*progress, taken.size).reshape(taken.shape)
        elif self.scenario == "bimodal":
            taken *= np.where(self._states(taken.size), SLOW, 1.0).reshape(taken.shape)
        elif self.scenario == "outliers":
            taken *= np.where(self.rng.random(taken.shape) < OUTLIERS, OUTLIER, 1.0)
        return taken

    def _states(self, count: int) -> np.ndarray:
        switches = self.rng.random(count) < self.sample_s / DWELL_S
        states = (np.cumsum(switches) + self.slow) % 2 == 1
        self.slow = bool(states[-1])
        return states

    def clock_mhz(self, progress: float) -> int:
        """As NVML would read it, in its steps of 15 MHz."""
        factor = 1.0
        if self.scenario == "drift":
            factor = 1 + DRIFT * progress
        elif self.scenario == "bimodal" and self.slow:
            factor = SLOW
        return round(CLOCK_MHZ / factor / 15) * 15


def live(session: Session, change: float, offset: float) -> tuple[str, int]:
    """The gate's verdict of two sides in turns, and the rounds it took."""
    count = int(np.clip(TURN_S / session.sample_s, 3, len(session.series) // 2))
    rounds: list[tuple[float, float]] = []
    alpha = verdict.GATE_ALPHA / len(LOOKS)
    for look_at in LOOKS:
        progress = (len(rounds) / DRIFT_ROUNDS, look_at / DRIFT_ROUNDS)
        taken = session.samples(2 * (look_at - len(rounds)), count, progress, block=count)
        turns = np.median(taken, axis=1).reshape(-1, 2)  # A B, B A, A B, ...
        turns[1::2] = turns[1::2, ::-1]
        rounds += [(float(a), float(b) * (1 + change) * offset) for a, b in turns]
        evidence = verdict.paired(rounds)
        [(within, _)] = verdict.gated([evidence], [1 + LIMIT.relative], alpha=alpha)
        if within is not None:
            return ("passed" if within else "failed"), len(rounds)
        if look_at >= MOST_ROUNDS:
            break
    return "unclear", len(rounds)


def stored(session: Session, change: float, offset: float, base: Point) -> str:
    """The gate's verdict of two records, one after the other."""
    sides = []
    for factor, progress in ((1.0, (0.0, 0.5)), ((1 + change) * offset, (0.5, 1.0))):
        [taken] = session.samples(1, len(session.series), progress, block=BLOCK) * factor
        telemetry = Telemetry(sm_clock_mhz=session.clock_mhz(progress[1]), mem_clock_mhz=2619)
        point = base.model_copy(update={"telemetry": telemetry})
        sides.append(Entry("point", point, taken.tolist(), point.device))
        session.slow = bool(session.rng.integers(2))  # the second record is of another time
    evidence = look(*sides)
    assert not isinstance(evidence, str)
    [(within, _)] = verdict.gated([evidence], [1 + LIMIT.relative])
    return "unclear" if within is None else "passed" if within else "failed"


def cell(mode: str, scenario: str, change: float, trials: int) -> dict[str, Any]:
    """Verdicts of so many trials; the same numbers at every call."""
    number = (SCENARIOS.index(scenario), round(change * 100), mode == "live")
    rng = np.random.default_rng([2026, *map(int, number)])
    series, offsets = recorded_series(), np.exp(recorded_offsets())
    base = Point.model_validate_json((ROOT / "h100" / "points.jsonl").read_text().splitlines()[0])
    base = base.model_copy(update={"outcome": "ok", "reason": None})
    found = dict.fromkeys(VERDICTS, 0)
    took = []
    for _ in range(trials):
        session = Session(rng, series[rng.integers(len(series))], scenario)
        offset = float(offsets[rng.integers(len(offsets))])
        if mode == "live":
            word, rounds = live(session, change, offset if scenario == "processes" else 1.0)
            took.append(rounds)
        else:
            word = stored(session, change, offset, base)
        found[word] += 1
    rounds_median = int(np.median(took)) if took else None
    return {"mode": mode, "scenario": scenario, "change": change, "trials": trials, **found,
            "rounds_median": rounds_median}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Shares in percent, a line a mode and scenario, passed / failed / unclear by change."""
    header = ["mode", "scenario", *(f"{100 * c:g} %" for c in CHANGES)]
    lines = [header, ["---", "---", *["---:"] * len(CHANGES)]]
    for mode, scenario in dict.fromkeys((r["mode"], r["scenario"]) for r in rows):
        line = [mode, scenario]
        for change in CHANGES:
            key = (mode, scenario, change)
            [row] = [r for r in rows if (r["mode"], r["scenario"], r["change"]) == key]
            shares = [f"{100 * row[word] / row['trials']:.4g}" for word in VERDICTS]
            line.append(" / ".join(shares))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Shares of failed (solid) and unclear (dashed) against the planted change."""
    from chela_bench.reports.style import settings

    colours = dict(
        zip(SCENARIOS, ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#000000"), strict=True)
    )
    with matplotlib.rc_context(settings()):
        drawn = Figure(figsize=(9.0, 3.6), layout="constrained")
        for axes, mode in zip(drawn.subplots(1, 2, sharey=True), ("live", "stored"), strict=True):
            for place, scenario in enumerate(SCENARIOS):
                width = 3.8 - 0.7 * place  # so that a line under another is seen
                mine = [r for r in rows if (r["mode"], r["scenario"]) == (mode, scenario)]
                if not mine:
                    continue
                for word, style in (("failed", "-"), ("unclear", "--")):
                    shares = [100 * r[word] / r["trials"] for r in mine]
                    label = scenario if word == "failed" else None
                    axes.plot([100 * r["change"] for r in mine], shares, style, marker="o",
                              color=colours[scenario], linewidth=width, markersize=2 + width,
                              label=label)  # fmt: skip
            axes.axvline(100 * LIMIT.relative, color="#5a5a5a", linewidth=0.8)
            axes.set_title(mode, loc="left")
            axes.set_xlabel("planted change, %; line: the limit")
        drawn.axes[0].set_ylabel("% of trials: failed solid, unclear dashed")
        drawn.axes[0].legend()
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "gate-simulation")
    given = parser.parse_args()
    cells = [
        one
        for one in itertools.product(("live", "stored"), SCENARIOS, CHANGES)
        if one[:2] != ("stored", "processes")  # as clean
    ]
    with concurrent.futures.ProcessPoolExecutor(given.processes) as pool:
        waiting = [pool.submit(cell, *one, given.trials) for one in cells]
        rows = []
        for one in waiting:
            rows.append(one.result())
            print(json.dumps(rows[-1]), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "trials.json").write_text(json.dumps(rows, indent=1) + "\n")
    (given.out / "table.md").write_text(table(rows))
    drawn = figure(rows)
    for kind in ("png", "svg"):
        (given.out / f"gate-simulation.{kind}").write_bytes(render(drawn, kind))
    print(table(rows))


if __name__ == "__main__":
    main()
