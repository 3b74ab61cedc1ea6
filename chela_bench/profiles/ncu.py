"""Nsight Compute around a process of ours: which command, running it, and reading what it prints.

`build_command` and `ncu_csv.parse` are pure; `collect` alone needs the tool. Two lists of metrics,
two runs: BYTES are counted in one pass, of kernels as they come, so that what one kernel leaves in
L2 is there for the next. DETAIL takes several passes, between which the tool writes back what a
kernel changed: instructions and shared memory do not mind, bytes would.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from chela_bench.errors import EnvironmentProblem
from chela_bench.profiles.inventory import (
    COUNTERS_REMEDY,
    NCU_PAGE,
    at_least,
    counters_admin_only,
    find_ncu,
    is_admin,
    ncu_version,
)

MINIMUM = "2022.3"  # the first that knows Hopper
# Of NVTX, around all that is counted. Inside are `chela-N`, point N's call, and `chela-late-N`,
# what evicts from L2 what the call has written there; `chela-begin` does that for what the tool
# itself writes at the first kernel that it sees.
RANGE = "chela"
TIME = "gpu__time_duration.sum"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
L2_BYTES, L2_HITS = "lts__t_bytes.sum", "lts__t_sector_hit_rate.pct"
LOCAL_LOADS, LOCAL_STORES = (f"smsp__inst_executed_op_local_{way}.sum" for way in ("ld", "st"))
TENSOR = "sm__inst_executed_pipe_tensor.sum"
CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu.sum"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
BYTES = (TIME, READ, WRITTEN)
DETAIL = (TIME, L2_BYTES, L2_HITS, LOCAL_LOADS, LOCAL_STORES, TENSOR, CONFLICTS, OCCUPANCY)
LAUNCH = (  # known without counting, so in no pass
    "launch__registers_per_thread",
    "launch__shared_mem_per_block_static",
    "launch__shared_mem_per_block_dynamic",
    "launch__block_size",
    "launch__waves_per_multiprocessor",
    "launch__occupancy_limit_barriers",
    "launch__occupancy_limit_blocks",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
    "launch__occupancy_limit_warps",
    "sm__maximum_warps_per_active_cycle_pct",
)

_LOOK_S = 0.2
_LAST_WORDS_S = 30.0  # for the tool to print what it has, once its application is gone
_QUERY_LIMIT_S = 60.0
_METRIC = re.compile(r"^\W*([a-z0-9]+__\w+)", re.MULTILINE)
_OTHER_TOOL = "driver resource was unavailable"


@dataclass(frozen=True)
class Tool:
    path: str
    version: str


@dataclass(frozen=True)
class Collected:
    """What the tool left when it ended."""

    code: int
    output: str  # its own, not its application's
    stalled: bool = False  # it had to be ended


def find() -> Tool:
    """The machine's ncu. EnvironmentProblem with the remedy if there is none that can count."""
    path = find_ncu()
    if path is None:
        raise EnvironmentProblem(
            f"Nsight Compute (ncu) is not installed: install it from {NCU_PAGE} and put it on "
            "PATH, or take --hbm gpm or --hbm model"
        )
    version = ncu_version(path)
    if version is None:
        raise EnvironmentProblem(
            f"{path} does not tell its version, so it is no working Nsight Compute: install "
            f"{MINIMUM} or later from {NCU_PAGE}"
        )
    if not at_least(version, MINIMUM):
        raise EnvironmentProblem(
            f"{path} is Nsight Compute {version}; {MINIMUM} or later is needed: {NCU_PAGE}"
        )
    return Tool(path, version)


def forbidden() -> str | None:
    """What the driver says against counters for this user, with the remedy, untried; or None."""
    if counters_admin_only() and not is_admin():
        return f"the driver keeps performance counters for administrators: {COUNTERS_REMEDY}"
    return None


def build_command(
    tool: str,
    metrics: Sequence[str],
    application: Sequence[str],
    *,
    log: Path,
    report: Path | None = None,
) -> list[str]:
    """ncu around `application`: CSV into `log`, and the full report into `report` if named.

    Clocks and caches are left as they are: the application evicts L2 itself, before what it counts.
    """
    export = ["--export", str(report), "--force-overwrite"] if report is not None else []
    return [
        tool,
        *("--config-file", "off"),
        *("--target-processes", "application-only"),
        *("--nvtx", "--nvtx-include", f"{RANGE}/"),
        *("--replay-mode", "kernel"),
        *("--cache-control", "none"),
        *("--clock-control", "none"),
        *("--metrics", ",".join(metrics)),
        *("--csv", "--page", "raw", "--print-units", "base"),
        *("--log-file", str(log)),
        *export,
        *application,
    ]


def import_command(tool: str, report: Path) -> list[str]:
    """Prints a kept report as `build_command`'s tool does."""
    return [
        tool, "--config-file", "off", "--import", str(report),
        "--csv", "--page", "raw", "--print-units", "base",
    ]  # fmt: skip


def unknown_metrics(tool: str, metrics: Sequence[str]) -> list[str]:
    """Those of the metrics that this ncu, asked with --query-metrics, does not name.

    Empty if it does not answer: then the capture tells.
    """
    try:
        done = subprocess.run(
            [tool, "--config-file", "off", "--query-metrics"],
            capture_output=True, encoding="utf-8", errors="replace", timeout=_QUERY_LIMIT_S,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    known = set(_METRIC.findall(done.stdout))
    if done.returncode != 0 or not known:
        return []
    return [name for name in metrics if name not in LAUNCH and name.partition(".")[0] not in known]


def collect(
    command: Sequence[str],
    *,
    log: Path,
    words: Path,
    environment: Mapping[str, str],
    moving: Callable[[], object],
    limit_s: float,
    application_pid: Callable[[], int | None] = lambda: None,
) -> Collected:
    """Runs the command to its end, in a process group of its own, and reads its log.

    `words` takes what the application prints. `moving()` is any value that changes while it gets
    on; unchanged for `limit_s`, the application is ended, so that the tool prints what it has
    counted, and then the whole group. Whatever interrupts this ends the group as well.
    """
    log.unlink(missing_ok=True)
    with words.open("ab") as handle:
        try:
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=handle, stderr=handle,
                start_new_session=True, env=dict(environment),
            )  # fmt: skip
        except OSError as error:
            raise EnvironmentProblem(f"cannot start {command[0]}: {error.strerror}") from error
        try:
            stalled = not _ended(process, moving, limit_s)
            pid = application_pid()
            if stalled and pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LAST_WORDS_S)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    try:
        output = log.read_text("utf-8", "replace")
    except OSError:
        output = ""
    return Collected(process.returncode, output, stalled)


def _ended(process: subprocess.Popen[bytes], moving: Callable[[], object], limit_s: float) -> bool:
    """Waits; False if nothing moved for `limit_s`."""
    last, deadline = moving(), time.monotonic() + limit_s
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_S)
            return True
        now = moving()
        if now != last:
            last, deadline = now, time.monotonic() + limit_s
        elif time.monotonic() > deadline:
            return False


class Complaint(NamedTuple):
    """Why the tool counted nothing, and what helps."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def complaint(output: str) -> Complaint | None:
    """What the tool has against counting, from what it printed; None if it does not say."""
    if "ERR_NVGPUCTRPERM" in output:
        what = "ncu may not read performance counters (ERR_NVGPUCTRPERM)"
        return Complaint(what, COUNTERS_REMEDY)
    if _OTHER_TOOL in output:
        what = "another tool holds the card's performance counters"
        return Complaint(what, "pause it (DCGM: dcgmi profile --pause), then try again")
    said = [line.partition("==ERROR==")[2] for line in output.splitlines() if "==ERROR==" in line]
    if not said and "No kernels were profiled" in output:
        said = ["No kernels were profiled"]
    if said:
        return Complaint(
            f"ncu says: {' '.join(said[0].split())[:200]}", "run ncu by hand to see more"
        )
    return None


def probe(tool: str, limit_s: float = 90.0) -> Complaint | None:
    """Tries to count the bytes of one small kernel on the GPU; None if that works."""
    kernel = (
        f"import torch; torch.cuda.nvtx.range_push({RANGE!r}); torch.ones(8, device='cuda'); "
        "torch.cuda.synchronize()"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = collect(
            build_command(
                tool, BYTES, [sys.executable, "-P", "-c", kernel], log=Path(folder) / "ncu.csv"
            ),
            log=Path(folder) / "ncu.csv",
            words=Path(folder) / "words.log",
            environment=os.environ,
            moving=lambda: None,
            limit_s=limit_s,
        )
    if done.stalled:
        return Complaint(f"ncu did not end within {limit_s:g} s", "run it by hand")
    if READ in done.output and '"ID"' in done.output:
        return None
    return complaint(done.output) or Complaint(
        f"ncu ended with exit code {done.code} and counted nothing", "run it by hand"
    )
