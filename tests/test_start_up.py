"""How long the command line takes to start, with nothing else running."""

from __future__ import annotations

import time

import pytest

from tests.running import chela_bench


@pytest.mark.parametrize(("arguments", "limit_s"), [(["--help"], 0.3), (["list"], 1.0)])
def test_start_up_is_quick(arguments, limit_s):
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        done = chela_bench(*arguments)
        times.append(time.perf_counter() - begin)
        assert done.returncode == 0
        if times[-1] < limit_s:
            break
    assert min(times) < limit_s
