"""Files derived from a run: results.csv, samples.parquet, and the report folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import pandas as pd

from chela_bench.bench.store import load_samples
from chela_bench.cli.output import write_files
from chela_bench.errors import RecordError, UsageError
from chela_bench.records import Point, Run
from chela_bench.reports.figures import Format, figures, heat_maps, render
from chela_bench.reports.html import Atlas, Reported, pages
from chela_bench.reports.markdown import summary
from chela_bench.reports.style import SCREEN, Look
from chela_bench.reports.tables import kernels_frame, points_frame

PAGE, SUMMARY = "index.html", "summary.md"
FORMATS: tuple[Format, ...] = ("png", "svg")


def write_tables(folder: Path, run: Run, points: list[Point]) -> None:
    """results.csv (a row a point), samples.parquet (a row a time sample), and kernels.csv (a row a
    kernel) where Nsight Compute was run."""
    samples = load_samples(folder)
    lost = [point.key for point in points if point.seconds is not None and point.key not in samples]
    if lost:
        raise RecordError(f"{folder} holds no samples for {lost[0]} ({len(lost)} such points)")
    rows = [
        (point.key, "wall" if point.time_ns is None else point.timer, number, nanoseconds)
        for point in points
        if point.seconds is not None
        for number, nanoseconds in enumerate(samples.get(point.key, []))
    ]
    table = pd.DataFrame(rows, columns=["key", "clock", "sample", "time_ns"])
    table = table.astype({"key": "str", "clock": "str", "sample": "int64", "time_ns": "int64"})
    files = {**_csv(run, points), "samples.parquet": table.to_parquet(index=False)}
    write_files({folder / name: data for name, data in files.items()})


def write_report(
    out: Path,
    run: Run,
    points: list[Point],
    samples: Mapping[str, Sequence[int]] | None = None,
    atlas: Atlas | None = None,
) -> list[Path]:
    """index.html, summary.md, the CSVs and every figure as PNG and SVG; returns the paths."""
    _, files = report_files(run, points, samples, atlas)
    write_files({out / name: data for name, data in files.items()})
    return [out / name for name in files]


def report_files(
    run: Run,
    points: list[Point],
    samples: Mapping[str, Sequence[int]] | None = None,
    atlas: Atlas | None = None,
    *,
    formats: Sequence[Format] = FORMATS,
    look: Look = SCREEN,
) -> tuple[Reported, dict[str, bytes]]:
    """What a page is made of, and the folder's files by name: a file a figure and format. The page
    shows distributions of the samples, by a point's key, and the atlas; its own figures are set for
    a screen whatever the files are."""
    drawn = {**figures(run, points), **heat_maps(run, points)}
    svgs = {name: render(figure, "svg") for name, figure in drawn.items()}
    reported = Reported(run, points, svgs, samples, atlas)
    files = {
        PAGE: pages([reported]).encode(),
        SUMMARY: summary(run, points).encode(),
        **_csv(run, points),
    }
    kept = drawn
    if look is not SCREEN:
        kept = {**figures(run, points, look), **heat_maps(run, points, look)}
    for name, figure in kept.items():
        for kind in formats:
            same = kind == "svg" and look is SCREEN
            files[f"{name}.{kind}"] = svgs[name] if same else render(figure, kind, look)
    return reported, files


def formats_of(names: Sequence[str]) -> tuple[Format, ...]:
    """The kinds of files that `--format` names."""
    known: dict[str, Format] = {kind: kind for kind in get_args(Format)}
    for name in names:
        if name not in known:
            raise UsageError(f"no format {name!r} for a figure; there are: {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def _csv(run: Run, points: list[Point]) -> dict[str, bytes]:
    """results.csv, and kernels.csv if any were profiled."""
    files = {"results.csv": points_frame(run, points).to_csv(index=False).encode()}
    if any(point.kernels for point in points):
        files["kernels.csv"] = kernels_frame(points).to_csv(index=False).encode()
    return files
