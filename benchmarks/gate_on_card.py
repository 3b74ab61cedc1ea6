"""The gate on a real card: does it stay silent on the same code, and does it hear what is planted?

    python benchmarks/gate_on_card.py OUT [--part slower,bytes,same] [--times 20]

A baseline of linear attention's forward is measured, saved and promoted in OUT. Then, each in a
copy of the package with one line more:

    slower  the call holds the card for 8 % of its time: `time` must fail
    bytes   the call copies its output once more: `hbm.bytes` must fail where a limit of 100 % lets
            the time pass (wants HBM bytes by counters in the records: --profiled)
    same    nothing is planted: so many gates must all pass

Prints a line a gate, and ends with 1 if one did not do what it must.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
POINTS = ("--op", "linear_attention", "--impl", "triton_chunked", "--direction", "fwd",
          "--shape", "b1-t64k-h16-d128,b4-t4k-h64-d128")  # fmt: skip
TARGET = "chela_bench/kernels/linear_attention.py"
PLANTED = {
    "slower": """
_unplanted = linear_attention


def linear_attention(q, *args, **kwargs):
    result = _unplanted(q, *args, **kwargs)
    torch.cuda._sleep({cycles}[q.shape[1]])
    return result
""",
    "bytes": """
_unplanted = linear_attention


def linear_attention(*args, **kwargs):
    o, state = _unplanted(*args, **kwargs)
    return o + 0, state  # a kernel: the driver's copies are not counted
""",
}


def chela_bench(root: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The command line of the package in `root`."""
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-P", "-m", "chela_bench", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def checked(root: Path, *words: object) -> subprocess.CompletedProcess[str]:
    done = chela_bench(root, *words)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, words))}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done


def planted(out: Path, name: str, text: str) -> Path:
    """A copy of the package with `text` behind the kernel's file."""
    copy = out / name
    shutil.copytree(ROOT / "chela_bench", copy / "chela_bench", dirs_exist_ok=True)
    shutil.copyfile(ROOT / "bench.toml", copy / "bench.toml")
    with (copy / TARGET).open("a") as handle:
        handle.write(text)
    return copy


def gated(root: Path, out: Path, *more: object) -> tuple[int, list[dict[str, Any]]]:
    """Exit code, and the checks that did not pass."""
    words = ("gate", "--baseline", out / "baselines", "--out", out / "runs", "--json", *more)
    done = chela_bench(root, *words, "--config", ROOT / "bench.toml")
    if not done.stdout:
        sys.exit(f"gate: exit {done.returncode}\n{done.stderr[-2000:]}")
    checks = json.loads(done.stdout)["points"]
    return done.returncode, [check for check in checks if check["outcome"] != "passed"]


def say(what: str, code: int, loud: list[dict[str, Any]]) -> None:
    found = "; ".join(f"{c['outcome']} {c['figure']} {c['name']}: {c['reason']}" for c in loud)
    print(f"{what}: exit {code}; {found or 'all passed'}", flush=True)


def failed(loud: list[dict[str, Any]], figure: str) -> set[str]:
    return {c["name"] for c in loud if c["outcome"] == "failed" and c["figure"] == figure}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", default="slower,same")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument(
        "--profiled", type=Path, help="A run folder whose records have ncu's bytes."
    )
    given = parser.parse_args()
    out, parts = given.out.resolve(), given.part.split(",")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "baselines").exists():
        source = given.profiled
        if source is None:
            checked(ROOT, "sweep", *POINTS, "--out", out / "runs")
            [source] = (out / "runs").iterdir()
        baselines = ("--baselines", out / "baselines")
        checked(ROOT, "baseline", "save", source, "--name", "card", *baselines)
        checked(ROOT, "baseline", "promote", "card", *baselines)
    [records] = (out / "baselines").glob("*/card/points.jsonl")
    points = [json.loads(line) for line in records.read_text().splitlines()]
    good = True
    if "slower" in parts:
        cycles = {
            point["shape"]["T"]: round(0.08 * point["time_ns"]["median"]
                                       * point["telemetry"]["sm_clock_mhz"] / 1000)
            for point in points
        }  # fmt: skip
        text = PLANTED["slower"].format(cycles=cycles)
        code, loud = gated(planted(out, "slower", text), out)
        say("planted 8 %", code, loud)
        good &= code == 1 and len(failed(loud, "time")) == len(points)
    if "bytes" in parts:
        code, loud = gated(planted(out, "bytes", PLANTED["bytes"]), out, "--limit", "100%")
        say("planted pass over HBM", code, loud)
        good &= code == 1 and bool(failed(loud, "hbm.bytes")) and not failed(loud, "time")
    if "same" in parts:
        codes = []
        for number in range(given.times):
            code, loud = gated(ROOT, out)
            say(f"A/A {number + 1} of {given.times}", code, loud)
            codes.append(code)
        print(f"A/A: {codes.count(0)} of {len(codes)} passed", flush=True)
        good &= set(codes) == {0}
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
