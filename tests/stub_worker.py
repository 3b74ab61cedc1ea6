"""Speaks the worker's protocol without torch; an implementation's name says how it misbehaves."""

import json
import os
import signal
import sys
import time


def answer(message):
    os.write(int(sys.argv[1]), (json.dumps(message) + "\n").encode())


def garbage():
    os.write(int(sys.argv[1]), b"Hello, world\n")


def number():
    answer(7)


def deep():
    os.write(int(sys.argv[1]), b"[" * 100_000 + b"\n")


def nothing():
    answer({"point": None, "samples_ns": [], "spoilt": False})


def half_a_point():
    answer({"point": {"op": "x"}, "samples_ns": [], "spoilt": False})


def floods():
    while True:
        os.write(int(sys.argv[1]), b"x" * 4096)


def forks():
    if os.fork() == 0:
        time.sleep(60)
    os._exit(9)


def silent():
    os._exit(9)


def prints():
    print("words of another")


def closes_its_pipe():
    os.close(int(sys.argv[1]))
    time.sleep(60)


def hangs():
    answer({"phase": "check"})
    time.sleep(60)


def real_time_signal():
    os.kill(os.getpid(), signal.SIGRTMIN + 3)


def main():
    for line in sys.stdin:
        command = json.loads(line)
        if "session" in command:
            machine = {
                "device": "cpu",
                "name": "stub",
                "cpu": "stub",
                "cpu_threads": 1,
                "os": "none",
                "python": "3",
            }
            answer({"hello": {"environment": machine, "versions": {}}})
        elif "begin" in command:
            answer({"ready": {"ceilings": {}}})
        else:
            case = command["case"]
            time.sleep(float(os.environ.get("STUB_CASE_S", "0")))
            globals().get(case["impl"], lambda: None)()
            point = {**case, "device": "cpu", "outcome": "ok", "wall_ns": os.getpid()}
            answer({"point": point, "samples_ns": [1.0], "spoilt": case["impl"] == "spoils"})


if __name__ == "__main__":
    main()
