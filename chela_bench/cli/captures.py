"""A capture of ncu's, from a file that somebody else may have made."""

from __future__ import annotations

import subprocess
from pathlib import Path

from chela_bench.bench import paths
from chela_bench.cli.output import terminal
from chela_bench.errors import EnvironmentProblem, RecordError, UsageError
from chela_bench.profiles import ncu, ncu_csv
from chela_bench.reports.terminal import sheet_table

_IMPORT_LIMIT_S = 300.0


def read_capture(path: Path) -> ncu_csv.Capture:
    """CSV, or a report that ncu turns into it. RecordError naming the file and what is wrong."""
    try:
        text = _imported(path) if path.suffix == ".ncu-rep" else path.read_text("utf-8", "replace")
        return ncu_csv.parse(text)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def capture_sheet(capture: ncu_csv.Capture) -> str:
    """The capture's kernels as a table for the terminal."""
    from chela_bench.reports.sheets import kernel_sheet

    found = [
        ("" if point is None else str(point), kernel)
        for point, kernels in capture.by_point().items()
        for kernel in kernels
    ]
    console = terminal()
    with console.capture() as captured:
        console.print(sheet_table(kernel_sheet(found)))
        if capture.torn:
            console.print("the capture is cut off: its last point is left out", soft_wrap=True)
    return captured.get()


def _imported(path: Path) -> str:
    if not paths.is_file(path):
        raise UsageError(f"no such file: {path}")
    tool = ncu.find()
    try:
        done = subprocess.run(
            ncu.import_command(tool.path, path), capture_output=True, encoding="utf-8",
            errors="replace", timeout=_IMPORT_LIMIT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"{tool.path} cannot read {path}: {error}") from error
    return done.stdout + done.stderr
