"""Running the command line as a user does, in a process of its own or in this one, on a small
plan."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from chela_bench import cli

ROOT = Path(__file__).resolve().parent.parent
FAULTS = Path(__file__).resolve().parent / "faults.py"
STUB_WORKER = Path(__file__).resolve().parent / "stub_worker.py"

TINY = """
schema = 1

[limits]
call_s = 0.5
sample_s = 0.1
build_s = 20.0
phase_s = 20.0

[sweep]
ops = ["linear_attention"]
shapes = ["tiny"]
lens = "256"
dtypes = ["fp32"]
directions = ["fwd"]
timer = "event"
l2 = "cold"
inputs = "randn"
seed = 3

[shapes.linear_attention]
tiny = { B = 1, H = 2, K = 16, V = 16 }

[shapes.short_long_conv]
tiny = { B = 2, D = 8 }

[shapes.long_conv]
tiny = { B = 2, D = 8 }

[shapes.reparameterization]
tiny = { B = 2, D = 8 }

[shapes.softmax_attention]
tiny = { B = 1, H = 2, K = 16, V = 16 }

[shapes.softmax_layer]
tiny = { B = 2, D = 16 }

[shapes.chela_layer]
tiny = { B = 1, D = 16, K = 8, V = 32 }
"""


def environment(**changes: str) -> dict[str, str]:
    """As a user's shell: the interpreter that tests switch on is not passed down, nor that they run
    side by side."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ours = ("TRITON_INTERPRET", "PYTEST_XDIST")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return {**inherited, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **changes}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "chela_bench", *map(str, arguments)]


def prepared(code: str, *arguments: object) -> list[str]:
    """As `command`, after some code."""
    code = f"{code}; from chela_bench import cli; cli.main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def played(*arguments: object) -> list[str]:
    """As `command`, with workers that answer a case after STUB_CASE_S; workers_of() knows them."""
    code = (
        "from pathlib import Path; from chela_bench.bench import runner; "
        f"text = Path({str(STUB_WORKER)!r}).read_text(); "
        "runner._WORKER = '# chela_bench.bench.worker\\n' + text"
    )
    return prepared(code, *arguments)


def chela_bench(
    *arguments: object, cwd: Path | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd or ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=240,
    )


def in_this_process(
    *arguments: object, cwd: Path | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    """What `chela_bench` returns, without the seconds that another process takes to start."""
    return ran_here(cli.main, "chela-bench", *arguments, cwd=cwd, **changes)


def ran_here(
    main: Callable[[], object], *arguments: object, cwd: Path | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    """How a command's `main` ends, and what it prints."""
    words = list(map(str, arguments))
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.dict(os.environ, environment(**changes), clear=True),
        contextlib.chdir(cwd or ROOT),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            code = main()
        except SystemExit as end:
            code = end.code
    for stream in (stdout, stderr):
        stream.seek(0)
    return subprocess.CompletedProcess(words, code, stdout.read(), stderr.read())


def tiny_config(folder: Path, **limits: float) -> Path:
    text = TINY
    for name, seconds in limits.items():
        old = next(line for line in TINY.splitlines() if line.startswith(name))
        text = text.replace(old, f"{name} = {seconds}")
    path = folder / "bench.toml"
    path.write_text(text)
    return path


def swept(*arguments: object, config: Path) -> tuple[subprocess.CompletedProcess[str], Any]:
    """A finished `sweep --json` and its document."""
    out = config.parent / "runs"
    done = in_this_process("sweep", "--json", "--config", config, "--out", out, *arguments)
    assert done.stdout, done.stderr
    return done, json.loads(done.stdout)


def run_folder(config: Path) -> Path:
    [folder] = [path for path in (config.parent / "runs").iterdir() if path.is_dir()]
    return folder


def hear_signals() -> None:
    """In a process before it starts: not to ignore what a shell ignores, in the background or under
    nohup, since a sweep would keep to that."""
    for one in (signal.SIGINT, signal.SIGHUP):
        signal.signal(one, signal.SIG_DFL)


def wait_for_points(config: Path, count: int) -> Path:
    """The run folder, once it holds `count` points."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in (config.parent / "runs").glob("*/points.jsonl"):
            if path.read_bytes().count(b"\n") >= count:
                return path.parent
        time.sleep(0.05)
    raise AssertionError("the sweep measured nothing within a minute")


def workers_of(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[-2:] == [str(parent).encode(), b""] and b"chela_bench.bench.worker" in words[-4]:
            found.append(int(path.parent.name))
    return found


def gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


class Silent:
    """A Listener that keeps what it hears."""

    def __init__(self):
        self.heard, self.run = [], None

    def started(self, run, folder, left, warnings):
        self.run = run

    def case(self, case):
        self.heard.append(("case", case.key))

    def phase(self, phase):
        pass

    def finished(self, point):
        self.heard.append(("finished", point.key))

    def said(self, line):
        self.heard.append(("said", line))
