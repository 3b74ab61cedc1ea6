"""The table of results in README.md and index.md, from the records in results/. See generate.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from chela_bench.bench.comparing import OTHER_CLOCK
from chela_bench.bench.store import load_run
from chela_bench.records import Direction, Point, Run
from chela_bench.reports.text import three_digits

HERE = Path(__file__).resolve().parent
FIRST = "<!-- results: written by `make docs` from the records in docs/results -->"
LAST = "<!-- results end -->"
FILES = {HERE.parent / "README.md": "docs/results", HERE / "index.md": "results"}  # -> its links


class Compared(NamedTuple):
    """A row of the results: who is timed, at one shape; both sides of a ratio in one run."""

    what: str
    records: str  # run folder in results/
    log: str  # page in results/ with the words
    ours: str
    peers: tuple[str, ...]  # the fastest counts
    name: str  # what they are called together
    shape: dict[str, int]
    direction: Direction | None = None  # forward, and forward with backward

    def directions(self) -> tuple[Direction, ...]:
        return ("fwd", "fwdbwd") if self.direction is None else (self.direction,)


_FLA = ("fla_chunk", "fla_fused_chunk")
_ATTENTION = "linear attention", "linear-attention.md", "triton_chunked", _FLA, "fla-core"
_CONVOLUTION = "long convolution", "h100-convolution", "short-long-conv.md", "triton"
_RFFT = ("torch_rfft",), "torch's rfft"
_LAYER = "CHELA layer", "h100-layer", "chela-layer.md", "chela"
_COMPOSED = ("composed",), "the same of torch and fla"
_SOFTMAX = ("sdpa_cudnn",), "softmax layer (another function), cuDNN"


def _attention(records: str, **shape: int) -> Compared:
    what, log, ours, peers, name = _ATTENTION
    return Compared(what, f"h100-attention/{records}", log, ours, peers, name, shape)


COMPARED = (
    _attention("peers", B=1, T=16384, H=16, K=128, V=128),
    _attention("peers", B=1, T=65536, H=16, K=128, V=128),
    _attention("peers", B=1, T=8192, H=96, K=128, V=128),
    _attention("many-heads", B=8, T=16384, H=16, K=64, V=64),
    Compared(*_CONVOLUTION, *_RFFT, {"B": 8, "T": 4096, "D": 1024}),
    Compared(*_CONVOLUTION, *_RFFT, {"B": 1, "T": 16384, "D": 1024}),
    Compared(*_CONVOLUTION, *_RFFT, {"B": 8, "T": 65536, "D": 1024}),
    Compared(*_LAYER, *_COMPOSED, {"B": 1, "T": 16384, "D": 1024}),
    Compared(*_LAYER, *_SOFTMAX, {"B": 1, "T": 16384, "D": 1024}),
    Compared(*_LAYER, *_SOFTMAX, {"B": 1, "T": 65536, "D": 1024}),
    Compared(*_LAYER, *_SOFTMAX, {"B": 8, "T": 2048, "D": 1024}),
    Compared(
        "one step of decoding", "h100-layer-decode", "chela-layer.md", "chela", *_SOFTMAX,
        {"B": 64, "T": 16384, "D": 1024}, "decode",
    ),
)  # fmt: skip


WORDS = {"fwd": "forward", "fwdbwd": "forward + backward", "decode": "decoding"}
Runs = dict[str, tuple[Run, list[Point]]]


def marked() -> dict[Path, str]:
    """Each file with a table of results -> its text, the table written anew."""
    runs = {row.records: load_run(HERE / "results" / row.records) for row in COMPARED}
    texts = {}
    for path, folder in FILES.items():
        before, found, rest = path.read_text().partition(FIRST)
        _, ended, after = rest.partition(LAST)
        if not found or not ended:
            raise ValueError(f"{path}: wanted the lines {FIRST} and {LAST}; put them back")
        table = results_table(runs, folder)
        texts[path] = f"{before}{FIRST}\n\n{table}\n\n{LAST}{after}"
    return texts


def results_table(runs: Runs, folder: str) -> str:
    """Ours beside peers, milliseconds of kernel time; where and when it was measured, and where
    clocks differed."""
    rows = []
    for row in COMPARED:
        cells = []
        for one in row.directions():
            ours, peer = _sides(row, runs, one)
            times = ", ".join(three_digits(_median(point) / 1e6) for point in (ours, peer))
            cells += [times, f"**{three_digits(_median(peer) / _median(ours))} x**"]
        what = f"{row.what}, {_shape(row)}"
        rows.append(
            (what, row.name, *cells, *[""] * (4 - len(cells)), f"[log]({folder}/{row.log})")
        )
    header = ("what", "peer", "forward: ours, peer", "", "forward + backward", "", "")
    lines = [header, ["---", "---", *["---:"] * 4, "---"], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    parts = (table, _provenance([run for run, _ in runs.values()]), _clocks(runs))
    return "\n\n".join(part for part in parts if part)


def _shape(row: Compared) -> str:
    return " ".join(f"{dim}{size}" for dim, size in row.shape.items())


def _sides(row: Compared, runs: Runs, direction: Direction) -> tuple[Point, Point]:
    """The fastest point of ours and of the peers."""
    points = runs[row.records][1]
    ours, peer = (
        min(_timed(points, impls, row.shape, direction), key=_median)
        for impls in ((row.ours,), row.peers)
    )
    return ours, peer


def _timed(
    points: list[Point], impls: Sequence[str], shape: dict[str, int], direction: Direction
) -> Iterator[Point]:
    for point in points:
        here = shape.items() <= point.shape.items()
        if point.impl in impls and point.direction == direction and here:
            if point.time_ns is None:
                raise ValueError(f"{point.key}: {point.outcome}, so it has no time to show")
            yield point


def _median(point: Point) -> int:
    assert point.time_ns is not None  # of what _timed gives
    return point.time_ns.median


def _provenance(runs: list[Run]) -> str:
    """Card, versions, convention and days, which all runs must share but for the days."""
    conventions = {
        (
            run.environment.name,
            *(f"{name} {run.versions[name]}" for name in ("torch", "triton")),
            f"timer {run.settings['timer']}",
            f"{run.settings['l2']} L2",
        )
        for run in runs
    }
    if len(conventions) != 1:
        raise ValueError(f"runs of one table differ: {sorted(conventions)}; take some out")
    days = sorted({run.started_utc[:10] for run in runs})
    fla = {run.versions.get("fla-core") for run in runs} - {None}
    return (
        f"Milliseconds of kernel time, bf16: {', '.join(conventions.pop())}, fla-core "
        f"{', '.join(sorted(map(str, fla)))}; {days[0]} to {days[-1]}. Both sides of a ratio in "
        "one run on one card; of several forms of a peer the faster; every result checked against "
        "float64 before its time counts."
    )


def _clocks(runs: Runs) -> str:
    """The ratios whose sides ran at clocks that differ by more than `compare` allows."""
    told = []
    for row in COMPARED:
        for one in row.directions():
            ours, peer = _sides(row, runs, one)
            mine, theirs = ours.telemetry.sm_clock_mhz, peer.telemetry.sm_clock_mhz
            if not mine or not theirs:
                raise ValueError(f"{ours.key}: no clock beside {peer.key}; take the row out")
            if max(mine, theirs) > (1 + OTHER_CLOCK) * min(mine, theirs):
                ratio = _median(peer) / _median(ours)
                told.append(
                    f"| {row.what}, {_shape(row)} | {WORDS[one]} | {_clock(ours)} | {_clock(peer)} "
                    f"| {three_digits(ratio)} x | {three_digits(ratio * theirs / mine)} x |"
                )
    if not told:
        return ""
    head = (
        "| what | | ours, MHz | peer, MHz | as measured | if time followed the clock |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    )
    limits = {run.environment.power_limit_mw for run, _ in runs.values()} - {None}
    watts = " or ".join(f"{limit // 1000} W" for limit in sorted(limits))
    words = (
        "**Clocks.** In these rows the SM clocks of the two sides, read as timing ended, differ "
        f"by more than {OTHER_CLOCK * 100:.0f} %, where `compare` gives no verdict. A star: the "
        f"card lowered its clock at its power limit ({watts}). Last column: the ratio at equal "
        "clocks if all of a time followed the clock as read, so the most that it explains."
    )
    return "\n".join((words, "", *head, *told))


def _clock(point: Point) -> str:
    """`1740*`: the SM clock read when timing ended; a star at the power limit."""
    star = "*" if point.throttle and "power_cap" in point.throttle else ""
    return f"{point.telemetry.sm_clock_mhz}{star}"
