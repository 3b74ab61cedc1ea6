"""The wrapper around ncu, against one that misbehaves."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chela_bench.errors import EnvironmentProblem
from chela_bench.profiles import inventory, ncu
from tests.running import ROOT, gone

FAKE = Path(__file__).resolve().parent / "fake_ncu.py"


def install(folder, monkeypatch, way=""):
    """The fake as the ncu on PATH."""
    folder.mkdir(exist_ok=True)
    script = folder / "ncu"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_NCU", way)
    return str(script)


def test_the_command_counts_one_range_and_leaves_clocks_and_caches_alone():
    command = ncu.build_command(
        "/opt/ncu", ncu.BYTES, ["python", "app.py"], log=Path("log.csv"), report=Path("a.ncu-rep")
    )
    assert command[0] == "/opt/ncu" and command[-2:] == ["python", "app.py"]
    pairs = dict(itertools.pairwise(command))
    assert pairs["--nvtx-include"] == "chela/"
    assert pairs["--cache-control"] == pairs["--clock-control"] == "none"
    assert pairs["--metrics"].split(",") == list(ncu.BYTES)
    assert pairs["--page"] == "raw" and pairs["--print-units"] == "base"
    assert pairs["--log-file"] == "log.csv" and pairs["--export"] == "a.ncu-rep"
    assert "--export" not in ncu.build_command("ncu", ncu.BYTES, ["x"], log=Path("l"))


def test_bytes_are_counted_in_metrics_that_fit_one_pass():
    """DRAM and time; what the SMs and L2 count needs passes of its own."""
    assert {name.partition("__")[0] for name in ncu.BYTES} == {"dram", "gpu"}
    assert not set(ncu.BYTES[1:]) & set(ncu.DETAIL)


def test_a_tool_that_is_recent_enough(tmp_path, monkeypatch):
    script = install(tmp_path, monkeypatch)
    assert ncu.find() == ncu.Tool(script, "2025.3.1.0")


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("old", r"is Nsight Compute 2021\.1\.0\.0; 2022\.3 or later is needed: https"),
        ("unsaid", "does not tell its version"),
    ],
)
def test_a_tool_that_will_not_do(tmp_path, monkeypatch, way, said):
    install(tmp_path, monkeypatch, way)
    with pytest.raises(EnvironmentProblem, match=said):
        ncu.find()


def test_no_tool(monkeypatch):
    monkeypatch.setattr(ncu, "find_ncu", lambda: None)
    with pytest.raises(EnvironmentProblem, match=r"not installed: .*--hbm gpm or --hbm model"):
        ncu.find()


def test_what_the_driver_forbids_is_said_with_the_remedy(monkeypatch):
    for only, admin, forbidden in ((True, False, True), (True, True, False), (None, False, False)):
        monkeypatch.setattr(ncu, "counters_admin_only", lambda only=only: only)
        monkeypatch.setattr(ncu, "is_admin", lambda admin=admin: admin)
        assert (ncu.forbidden() is not None) == forbidden
    monkeypatch.setattr(ncu, "counters_admin_only", lambda: True)
    assert inventory.COUNTERS_REMEDY in ncu.forbidden()


def test_metrics_that_the_tool_does_not_name(tmp_path, monkeypatch):
    metrics = [*ncu.BYTES, *ncu.DETAIL, *ncu.LAUNCH]
    script = install(tmp_path, monkeypatch)
    assert ncu.unknown_metrics(script, metrics) == []
    monkeypatch.setenv("FAKE_NCU", "no lts")
    assert ncu.unknown_metrics(script, metrics) == [ncu.L2_BYTES, ncu.L2_HITS]
    assert ncu.unknown_metrics("/bin/false", metrics) == []  # it does not answer: the capture tells
    assert ncu.unknown_metrics("/bin/true", metrics) == []
    assert ncu.unknown_metrics("/no/such/tool", metrics) == []


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("", None),
        ("denied", "ERR_NVGPUCTRPERM"),
        ("taken", "dcgmi profile --pause"),
        ("fails", "ncu says: Failed to prepare kernel for profiling"),
        ("silent", "ended with exit code 3 and counted nothing"),
        ("garbage", "ended with exit code 0 and counted nothing"),
    ],
)
def test_the_probe_tries_to_count(tmp_path, monkeypatch, way, said):
    problem = ncu.probe(install(tmp_path, monkeypatch, way))
    assert problem is None if said is None else said in str(problem)
    assert problem is None or problem.remedy


def _collect(folder, script, **changes):
    progress = folder / "progress"
    progress.write_text("")
    how = {
        "log": folder / "log.csv",
        "words": folder / "words.log",
        "environment": os.environ,
        "moving": lambda: progress.stat().st_size,
        "limit_s": 1.0,
    }
    path = folder / "tool.py"
    path.write_text(script)
    command = [sys.executable, str(path), str(folder)]
    return ncu.collect(command, **{**how, **changes})


def test_what_hangs_is_ended_with_all_its_children(tmp_path):
    begin = time.monotonic()
    done = _collect(
        tmp_path,
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "open(sys.argv[1] + '/pid', 'w').write(f'{os.getpid()} {child.pid}')\n"
        "time.sleep(600)\n",
    )
    assert done.stalled and done.output == ""
    assert time.monotonic() - begin < 20
    assert all(gone(int(pid)) for pid in (tmp_path / "pid").read_text().split())


def test_what_moves_is_not_ended(tmp_path):
    done = _collect(
        tmp_path,
        "import sys, time\n"
        "for _ in range(8):\n"
        "    open(sys.argv[1] + '/progress', 'a').write('x')\n"
        "    time.sleep(0.25)\n"
        "open(sys.argv[1] + '/log.csv', 'w').write('done')\n",
    )
    assert (done.code, done.stalled, done.output) == (0, False, "done")


def test_a_stalled_application_is_ended_first_so_that_the_tool_can_print(tmp_path):
    done = _collect(
        tmp_path,
        "import subprocess, sys\n"
        "app = subprocess.Popen(['sleep', '600'])\n"
        "open(sys.argv[1] + '/pid', 'w').write(str(app.pid))\n"
        "app.wait()\n"
        "open(sys.argv[1] + '/log.csv', 'w').write('what it has')\n"
        "print('words')\n",
        application_pid=lambda: int((tmp_path / "pid").read_text()),
    )
    assert done.stalled and done.output == "what it has"
    assert "words" in (tmp_path / "words.log").read_text()


def test_an_interrupt_ends_the_tool(tmp_path):
    """Ctrl-C, in a process of its own: the tool is gone when the bench is."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom chela_bench.profiles import ncu\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job behind has it off
        f"folder = Path({str(tmp_path)!r})\n"
        "ncu.collect(['sh', '-c', f'echo $$ > {folder}/pid; sleep 600'], log=folder / 'l',\n"
        "            words=folder / 'w', environment=os.environ, moving=lambda: 0, limit_s=60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_tool_that_does_not_start(tmp_path):
    with pytest.raises(EnvironmentProblem, match="cannot start /no/such/ncu: No such file"):
        ncu.collect(
            ["/no/such/ncu"], log=tmp_path / "l", words=tmp_path / "w", environment={},
            moving=lambda: 0, limit_s=1,
        )  # fmt: skip


def test_the_log_of_an_earlier_run_is_not_read_again(tmp_path):
    (tmp_path / "log.csv").write_text("old")
    assert _collect(tmp_path, "pass").output == ""
