"""Functions in processes that may die: what becomes of each is told, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from chela_bench.profiles.forks import Died, Hung, Raised, Returned, each_in_a_fork
from tests.running import environment, gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux has them")


def ended(*functions, parallel=2, limit_s=30.0):
    found = dict(each_in_a_fork(functions, parallel=parallel, limit_s=limit_s))
    return [found[i] for i in range(len(functions))]


def raising():
    raise ValueError("three\nlines")


def dying():
    os.write(2, b"the last words")
    os.kill(os.getpid(), signal.SIGTERM)


def leaving():
    os._exit(7)


def test_each_ending_is_told_apart():
    large = "x" * 300_000  # more than a pipe holds
    seen = ended(lambda: {"a": [1, None]}, raising, dying, leaving, lambda: large)
    assert seen[0] == Returned({"a": [1, None]})
    assert seen[1] == Raised("ValueError", "three\nlines")
    assert seen[2] == Died("killed by SIGTERM; last output: the last words")
    assert seen[3] == Died("ended with exit code 7")
    assert seen[4] == Returned(large)


def test_one_that_hangs_is_killed_with_what_it_started(tmp_path):
    def hanging():
        child = subprocess.Popen(["sleep", "600"])
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(600)

    begin = time.monotonic()
    assert ended(hanging, lambda: 1, limit_s=1.0) == [Hung(1.0), Returned(1)]
    assert time.monotonic() - begin < 20
    assert gone(int((tmp_path / "pid").read_text()))


def test_no_functions_take_no_time():
    assert ended() == []


def test_children_die_with_whoever_stops_listening():
    running = each_in_a_fork([lambda: 1, lambda: time.sleep(600)], parallel=2, limit_s=600)
    assert next(running)[1] == Returned(1)
    begin = time.monotonic()
    running.close()
    assert time.monotonic() - begin < 10


def test_children_die_with_their_parent(tmp_path):
    code = f"""
import os, time
from pathlib import Path
from chela_bench.profiles.forks import each_in_a_fork

def child():
    Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
    time.sleep(600)

list(each_in_a_fork([child], parallel=1, limit_s=600))
"""
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment())
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    child = int((tmp_path / "pid").read_text())
    while not gone(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)
