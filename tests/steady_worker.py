"""Speaks the worker's protocol without torch or GPU: a card on which every call takes 40 us, always
right. Its UUID is its parent's alone, so that tests side by side do not share its lock."""

import json
import os
import sys

UUID = f"GPU-steady-{os.getppid()}"
NS = [39_000.0, 40_000.0, 40_000.0, 40_000.0, 41_000.0] * 20
MACHINE = {
    "device": "cuda", "uuid": UUID, "name": "Steady", "compute_capability": "9.0", "sm_count": 132,
    "driver": "580.95", "cpu": "stub", "cpu_threads": 1, "os": "none", "python": "3",
}  # fmt: skip
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0"}
POINT = {
    "device": UUID, "outcome": "ok", "wall_ns": 50_000, "host_ns": 9_000, "launches": 2,
    "peak_bytes": 4096, "l2": "cold", "floor_ns": 20_000, "compulsory_bytes": 67_108_864,
    "flops": 2_000_000_000, "hbm": {"model_bytes": 88_538_112, "source": "model"},
    "time_ns": {"median": 40_000, "q1": 40_000, "q3": 40_000, "min": 39_000, "n": len(NS)},
    "telemetry": {"sm_clock_mhz": 1980, "mem_clock_mhz": 2619},
}  # fmt: skip


def answer(message):
    os.write(int(sys.argv[1]), (json.dumps(message) + "\n").encode())


def key(case):
    from chela_bench.bench.cases import Case

    return Case.model_validate(case).key


def planned(wanted):
    from chela_bench.bench.plan import planned_here

    return [(case.model_dump(mode="json"), why_not) for case, why_not in planned_here(**wanted)]


def main():
    for line in sys.stdin:
        command = json.loads(line)
        if "session" in command:
            answer({"hello": {"environment": MACHINE, "versions": VERSIONS}})
        elif "begin" in command:
            ceilings = {"copy_gb_per_s": 3000.0, "matmul_tflop_per_s": {"fp32": 400.0}}
            answer({"ready": {"ceilings": ceilings}})
        elif "interleave" in command:
            samples = {key(case): NS for case in command["interleave"]["cases"]}
            answer({"samples_ns": samples, "rounds": len(NS), "spoilt": False})
        elif "plan" in command:
            answer({"planned": planned(command["plan"])})
        elif "hold" in command:
            answer({"held": {}})
        elif "take" in command:
            answer({"taken": {"samples_ns": NS, "clock": "event"}})
        elif "release" in command:
            answer({"released": {}})
        else:
            point = {**command["case"], **POINT}
            answer({"point": point, "samples_ns": NS, "spoilt": False})


if __name__ == "__main__":
    main()
