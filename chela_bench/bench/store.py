"""Run folders: written line by line as points end, read back whole.

    run.json        the Run; rewritten whole (to a temporary name, then renamed) when it changes
    samples.jsonl   {"key", "samples_ns"}: appended before its point
    points.jsonl    one Point a line, appended and flushed to disk as it ends
    worker.log      whatever implementations printed

Beside them the command line derives results.csv, samples.parquet and report/.

A line is whole or it is not there: a torn last line, which a kill in mid-write leaves, is dropped
on reading and cut off before appending. A key measured twice (`--retry`) counts once, the last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from chela_bench.bench.runner import lock_file
from chela_bench.errors import EnvironmentProblem, RecordError
from chela_bench.records import SCHEMA_VERSION, Nanoseconds, Point, Run

RUN, POINTS, SAMPLES, LOG = "run.json", "points.jsonl", "samples.jsonl", "worker.log"
LOCK = ".lock"


class RunFolder:
    """A run folder held for writing by this process. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fresh = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(path / LOCK, f"{path} is being written by another sweep")
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot write the run folder {path}: {error.strerror}; give another --out"
            ) from error
        self._points: IO[bytes] | None = None
        self._samples: IO[bytes] | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """A folder that was made here and never came to hold a run is removed."""
        if self._fresh and self._in_place():
            shutil.rmtree(self.path, ignore_errors=True)
        for handle in (self._points, self._samples, self._lock):
            if handle is not None:
                with contextlib.suppress(OSError):  # what could not be written was said before
                    handle.close()

    @property
    def log(self) -> Path:
        return self.path / LOG

    def write_run(self, run: Run) -> None:
        with self._writing():
            self._refuse_if_removed()
            write_atomically(self.path / RUN, run.model_dump_json(indent=2).encode() + b"\n")
            self._fresh = False

    def append(self, point: Point, samples_ns: list[float]) -> None:
        """Samples first: a point that is on record always has its samples."""
        with self._writing():
            self._refuse_if_removed()
            if self._points is None or self._samples is None:
                self._samples = _open_for_appending(self.path / SAMPLES)
                self._points = _open_for_appending(self.path / POINTS)
            if samples_ns:
                line = json.dumps({"key": point.key, "samples_ns": [round(s) for s in samples_ns]})
                _append(self._samples, line)
            _append(self._points, point.model_dump_json())

    def _in_place(self) -> bool:
        """Whether the path still leads to the folder that this one locked."""
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), (self.path / LOCK).stat())
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot write to {self.path}: {error.strerror}; what was measured before is kept, "
                f"go on with --resume {self.path}"
            ) from error

    def _refuse_if_removed(self) -> None:
        """A file that is deleted while it is open takes everything written to it along."""
        if not self._in_place():
            raise EnvironmentProblem(
                f"{self.path} was removed or replaced while it was being written, and what was "
                "measured went with it; start a new run"
            )


def being_written(folder: Path) -> bool:
    """Whether a sweep holds the folder now."""
    try:
        with (folder / LOCK).open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or not ours to open
        return False
    return False


def load_run(folder: Path) -> tuple[Run, list[Point]]:
    """The run and its points, one per key. Raises RecordError naming file and line."""
    return load_header(folder), load_points(folder)


def load_header(folder: Path) -> Run:
    path = folder / RUN
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise RecordError(f"{folder} is no run folder: it has no {RUN}") from None
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    try:
        version = json.loads(text)["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RecordError(
            f"{path} is not a run record: it does not say its schema_version"
        ) from None
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"{path} has schema_version {version}; this chela-bench reads {SCHEMA_VERSION}"
        )
    try:
        return Run.model_validate_json(text)
    except ValidationError as error:
        raise RecordError(f"{path}: {first_problem(error)}") from None


def load_points(folder: Path) -> list[Point]:
    points: dict[str, Point] = {}
    path = folder / POINTS
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            point = Point.model_validate_json(line)
        except ValidationError as error:
            raise RecordError(f"{path}, line {number}: {first_problem(error)}") from None
        points[point.key] = point
    return list(points.values())


def cut_off(folder: Path, run: Run, points: Sequence[Point]) -> str | None:
    """What a run that was interrupted or torn lacks, and the way out; None if it is whole."""
    if run.finished_utc is None or len(points) < run.planned_points:
        unfinished = "" if run.finished_utc else "it did not finish, and "
        command = run.settings.get("command", "sweep")
        return (
            f"{unfinished}{len(points)} of {run.planned_points} points are there; finish the run "
            f"with chela-bench {command} --resume"
        )
    for name in (POINTS, SAMPLES):
        if _lines(folder / name)[-1]:
            return f"the last line of {name} is torn; measure it again"
    return None


def load_samples(folder: Path) -> dict[str, list[int]]:
    """Time samples in nanoseconds by point key."""
    path = folder / SAMPLES
    samples: dict[str, list[int]] = {}
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            row = SampleLine.model_validate_json(line)
        except ValidationError as error:
            raise RecordError(f"{path}, line {number}: {first_problem(error)}") from None
        samples[row.key] = row.samples_ns
    return samples


class SampleLine(BaseModel):
    """The time samples of a point: kernel time, or wall time where kernel time is null."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    key: str
    """The point's key."""
    samples_ns: list[Nanoseconds]
    """Nanoseconds per call, in the order taken."""

    @field_validator("samples_ns", mode="before")
    @classmethod
    def _are_times(cls, found: object) -> object:
        for ns in found if isinstance(found, list) else ():
            if isinstance(ns, int) and ns <= 0:
                raise ValueError(f"holds a time of {ns} ns; measure it again")
        return found


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name beside `path`, then renames: old or new, never half. A link stays,
    and what it leads to is replaced; a device, a pipe, and what standard output goes to are written
    into."""
    try:
        there = path.stat()
    except FileNotFoundError:
        there = None
    if there is not None:
        standard = next((stream for stream in (1, 2) if _is_open_at(stream, there)), None)
        if standard is not None:
            return _write_into(os.dup(standard), data)
        if not stat.S_ISREG(there.st_mode):
            return _write_into(os.open(path, os.O_WRONLY), data)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _is_open_at(descriptor: int, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file)
    except OSError:  # closed
        return False


def _write_into(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(data)


def _whole_lines(path: Path) -> Iterable[bytes]:
    return [line for line in _lines(path)[:-1] if line]


def _lines(path: Path) -> list[bytes]:
    """The last one is empty, or torn."""
    try:
        return path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [b""]
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error


def _open_for_appending(path: Path) -> IO[bytes]:
    """Opened at its end, after cutting off a torn last line."""
    handle = path.open("a+b")
    handle.seek(0)
    data = handle.read()
    handle.truncate(data.rfind(b"\n") + 1)
    handle.seek(0, os.SEEK_END)
    return handle


def _append(handle: IO[bytes], line: str) -> None:
    handle.write(line.encode() + b"\n")
    handle.flush()
    os.fsync(handle.fileno())


def first_problem(error: ValidationError, *above: str) -> str:
    """Where, within `above`, and what."""
    problem = error.errors()[0]
    where = ".".join(map(str, (*above, *problem["loc"]))) or "record"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}"
