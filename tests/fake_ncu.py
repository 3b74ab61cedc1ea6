"""Stands in for ncu: takes its command line, and plays back a real capture for every point of the
plan that its application would have run. FAKE_NCU says how it misbehaves."""

import csv
import io
import json
import os
import sys
import time
from pathlib import Path

CAPTURE = Path(__file__).resolve().parent / "fixtures" / "ncu-2025.3.1-h100-raw.csv"
COLUMN = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
KNOWN = """\
Device NVIDIA H100 80GB HBM3 (GH100)
------------------------------------------ --------- -----------------------------
Metric Name                                Metric Unit Metric Description
------------------------------------------ --------- -----------------------------
dram__bytes_read                           byte      # of bytes read from DRAM
dram__bytes_write                          byte      # of bytes written to DRAM
gpu__time_duration                         ns        incremental duration
lts__t_bytes                               byte      # of bytes requested
lts__t_sector_hit_rate                               proportion of hits
smsp__inst_executed_op_local_ld            inst      # of local loads
smsp__inst_executed_op_local_st            inst      # of local stores
sm__inst_executed_pipe_tensor              inst      # of tensor instructions
l1tex__data_bank_conflicts_pipe_lsu                  # of conflicts
sm__warps_active                           warp      # of warps resident
"""


def rows():
    lines = [line for line in CAPTURE.read_text().splitlines() if line.startswith('"')]
    return list(csv.reader(io.StringIO("\n".join(lines))))


def table(ranges):
    """Two kernels for each range; of one that evicts, one that writes a MiB."""
    header, units, *kernels = rows()
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([header, units])
    number = 0
    for name in ranges:
        evicts = "late" in name or "begin" in name
        for kernel in kernels[2:] if not evicts else kernels[:1]:
            row = dict(zip(header, kernel, strict=True))
            stack = f'753  "<default domain>:chela:none"  "<default domain>:{name}:none:none" '
            row |= {"ID": str(number), COLUMN: stack, "profiler__replayer_passes": "1"}
            if evicts:
                row |= {"dram__bytes_write.sum": "1,048,576", "Kernel Name": "reduce_kernel"}
            writer.writerow([row[column] for column in header])
            number += 1
    return out.getvalue()


def profile(arguments, way):
    log = Path(arguments[arguments.index("--log-file") + 1])
    if way == "denied":
        log.write_text(
            "==PROF== Connected to process 7 (python)\n==ERROR== ERR_NVGPUCTRPERM - The "
            "user does not have permission to access NVIDIA GPU Performance Counters\n"
        )
        return 1
    if way == "taken":
        log.write_text(
            "==ERROR== Profiling failed because a driver resource was unavailable. "
            "Ensure that no other tool (like DCGM) is concurrently collecting\n"
        )
        return 1
    if way == "garbage":
        log.write_bytes(b'\x00\xff\xfe once upon a time, "ID\n')
        return 0
    if way == "fails":
        log.write_text("==ERROR== Failed to prepare kernel for profiling\n")
        return 11
    if way == "silent":
        return 3
    if "--export" in arguments:
        Path(arguments[arguments.index("--export") + 1]).write_bytes(b"a report")
    if not arguments[-2].endswith(".progress"):  # the probe of one kernel
        log.write_text("==PROF== Connected\n" + table(["chela-0"]))
        return 0
    plan, progress = json.loads(Path(arguments[-3]).read_text()), Path(arguments[-2])
    numbers = [number for number, _ in plan["cases"]]
    ranges = ["chela-begin"]
    with progress.open("a") as steps:

        def tell(**step):
            steps.write(json.dumps(step) + "\n")
            steps.flush()

        for number in numbers:
            tell(begins=number)
            if way == "hangs":
                time.sleep(60)
            if way == f"dies at {number}":
                break
            if way == f"refuses {number}":
                tell(ended=number, problem="oom: CUDA out of memory")
                continue
            ranges += [f"chela-{number}", f"chela-late-{number}"]
            tell(ended=number, problem=None)
    text = "==PROF== Connected to process 7 (python)\n" + table(ranges)
    once = progress.parent / "torn-once"
    if way == "torn" and not once.exists():
        once.write_text("")
        text = text[: -len(text) // 8]
    log.write_text(text)
    return 0


def main():
    way, arguments = os.environ.get("FAKE_NCU", ""), sys.argv[1:]
    if "--version" in arguments:
        version = {"old": "Version 2021.1.0.0", "unsaid": "no such thing"}.get(way)
        print(f"NVIDIA (R) Nsight Compute Command Line Profiler\n{version or 'Version 2025.3.1.0'}")
        return 0
    if "--query-metrics" in arguments:
        gone = {"no lts": "lts__t", "no dram": "dram__bytes_read"}.get(way, "-")
        print("\n".join(line for line in KNOWN.splitlines() if not line.startswith(gone)))
        return 0
    if "--import" in arguments:
        print(CAPTURE.read_text(), end="")
        return 0
    return profile(arguments, way)


if __name__ == "__main__":
    sys.exit(main())
