"""`chela-bench runs`: the run folders of a folder, newest first."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from chela_bench.bench import paths
from chela_bench.bench.store import POINTS, RUN, SAMPLES, being_written, load_run
from chela_bench.cli.lines import say
from chela_bench.cli.options import json_option
from chela_bench.errors import RecordError, UsageError
from chela_bench.records import Point, Run
from chela_bench.reports.text import device_name, plain, tally


@dataclass(frozen=True)
class _Whole:
    folder: Path
    run: Run
    points: list[Point]
    state: str  # "finished", "running" or "interrupted"


@dataclass(frozen=True)
class _Damaged:
    folder: Path
    reason: str


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"), metavar="[DIR]")
@json_option
def runs(folder: Path, as_json: bool) -> None:
    """Run folders in DIR (./runs unless given), newest first, damaged ones last.

    \b
    Example:  chela-bench runs
    """
    found = [_look(path) for path in _candidates(folder)]
    whole = [one for one in found if isinstance(one, _Whole)]
    whole.sort(key=lambda one: (one.run.started_utc, one.folder.name), reverse=True)
    damaged = [one for one in found if isinstance(one, _Damaged)]
    if as_json:
        rows = [*map(_row, whole), *map(_damaged_row, damaged)]
        click.echo(json.dumps({"folder": str(folder), "runs": rows}, indent=2))
        return
    if not found:
        say(f"no runs in {folder}")
    for one in whole:
        started = plain(one.run.started_utc)[:16].replace("T", " ")
        say(f"{one.folder}  {started} UTC  {one.state}")
        say(tally(one.run, one.points), indent=2)
        say(f"{', '.join(_ops(one))} on {device_name(one.run)}, {_commit(one.run)}", indent=2)
    for broken in damaged:
        say(f"{broken.folder}  damaged")
        say(plain(broken.reason), indent=2)


def _candidates(folder: Path) -> list[Path]:
    """Folders that hold records, by name."""
    if not paths.is_dir(folder):
        raise UsageError(f"no folder {folder}; give the one that `sweep --out` wrote into")
    if paths.exists(folder / RUN):
        raise UsageError(f"{folder} is a run itself: chela-bench show {folder}")
    return [path for path in paths.folders(folder) if _may_hold_records(path)]


def _may_hold_records(folder: Path) -> bool:
    """What is closed may: it is listed with the reason."""
    try:
        return any(paths.exists(folder / name) for name in (RUN, POINTS, SAMPLES))
    except RecordError:
        return True


def _look(folder: Path) -> _Whole | _Damaged:
    try:
        run, points = load_run(folder)
    except RecordError as error:
        return _Damaged(folder, str(error))
    if run.finished_utc is not None:
        state = "finished"
    else:
        state = "running" if being_written(folder) else "interrupted"
    return _Whole(folder, run, points, state)


def _ops(one: _Whole) -> list[str]:
    """As planned; by the points where the settings do not say."""
    planned = one.run.settings.get("impls")
    names = planned if isinstance(planned, dict) else {point.op: None for point in one.points}
    return [plain(str(name)) for name in names] or ["nothing"]


def _commit(run: Run) -> str:
    """`commit 0123456`, and a + where the checkout was changed."""
    if run.git_sha is None:
        return "commit not recorded"
    return f"commit {plain(run.git_sha)[:7]}" + ("+" if run.git_dirty else "")


def _row(one: _Whole) -> dict[str, Any]:
    return {
        "folder": str(one.folder),
        "run_id": one.run.run_id,
        "state": one.state,
        "started_utc": one.run.started_utc,
        "finished_utc": one.run.finished_utc,
        "card": device_name(one.run),
        "git_sha": one.run.git_sha,
        "git_dirty": one.run.git_dirty,
        "ops": _ops(one),
        "planned_points": one.run.planned_points,
        "outcomes": dict(Counter(point.outcome for point in one.points)),
    }


def _damaged_row(one: _Damaged) -> dict[str, Any]:
    return {"folder": str(one.folder), "state": "damaged", "reason": one.reason}
