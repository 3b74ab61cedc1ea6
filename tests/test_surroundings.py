"""What a machine and a user's code do around a sweep: disks, signals, clocks, leftovers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import tracemalloc
from itertools import count

import pytest

from chela_bench.bench import plan, runner, store, sweep
from chela_bench.bench.config import load_config
from chela_bench.cli.derived import write_report
from chela_bench.errors import EnvironmentProblem
from tests.factories import make_point, make_run
from tests.records import timed, write_run
from tests.running import (
    FAULTS,
    ROOT,
    STUB_WORKER,
    Silent,
    command,
    environment,
    gone,
    hear_signals,
    in_this_process,
    played,
    tiny_config,
    wait_for_points,
    workers_of,
)

PLAN = ("--impl", "chunked,quadratic", "--lens", "16,32,64,128")


def _in_mount(options, script, tmp_path):
    """Runs a shell script in a mount namespace of its own, $DISK a small file system in it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = f"mount -t tmpfs -o {options} tmpfs {disk} && {script}"
    return subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mounted],
        env=environment(DISK=str(disk), SWEEP=" ".join(command("sweep"))),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def mounts(tmp_path_factory):
    """Skips where the system allows no mount namespaces to this user."""
    done = _in_mount("size=64k", "true", tmp_path_factory.mktemp("mounts"))
    if done.returncode != 0:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")


def test_a_full_disk_loses_nothing_and_resume_goes_on(mounts, tmp_path):
    config = tiny_config(tmp_path, sample_s=0.1)
    script = (
        f"$SWEEP --config {config} --out $DISK {' '.join(PLAN)} > $DISK/../first.out; echo $?; "
        "run=$(ls -d $DISK/*/); wc -l < $run/points.jsonl; mount -o remount,size=16m $DISK; "
        f"$SWEEP --resume $run --json > {tmp_path}/second.json; echo $?"
    )
    done = _in_mount("size=20k", script, tmp_path)
    first, written, second = map(int, done.stdout.split())
    assert first == 6 and second == 0, done.stderr
    assert "No space left on device" in done.stderr and "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    points = json.loads((tmp_path / "second.json").read_text())["points"]
    assert 0 < written < len(points) == len({point["key"] for point in points}) == 8


def test_a_read_only_folder_is_refused_before_anything_runs(mounts, tmp_path):
    config = tiny_config(tmp_path)
    script = f"$SWEEP --config {config} --out $DISK/runs {' '.join(PLAN)}"
    done = _in_mount("ro", script, tmp_path)
    assert done.returncode == 6
    assert "cannot write the run folder" in done.stderr and "give another --out" in done.stderr
    assert "Traceback" not in done.stderr


def _started(config, first=lambda: None, case_s=0.3, **kwargs):
    """A sweep in a process that does `first` before."""
    words = ("sweep", "--config", config, "--out", config.parent / "runs", *PLAN)
    return subprocess.Popen(
        played(*words),
        env=environment(STUB_CASE_S=str(case_s)), cwd=config.parent, text=True,
        preexec_fn=lambda: (hear_signals(), first()), **kwargs,
    )  # fmt: skip


def test_a_folder_that_is_removed_ends_the_sweep_with_the_loss_named(tmp_path):
    config = tiny_config(tmp_path)
    process = _started(config, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    shutil.rmtree(wait_for_points(config, 2))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 6
    assert "was removed or replaced while it was being written" in stderr
    assert "Traceback" not in stderr
    assert not any((tmp_path / "runs").iterdir())


def test_a_folder_put_in_its_place_is_left_alone(tmp_path):
    path = tmp_path / "run"
    with store.RunFolder(path) as folder:
        shutil.rmtree(path)
        path.mkdir()
        (path / "precious").write_text("kept")
        with pytest.raises(EnvironmentProblem, match="was removed or replaced"):
            folder.write_run(make_run())
    assert (path / "precious").read_text() == "kept"


def test_sigterm_saves_what_was_measured(tmp_path):
    config = tiny_config(tmp_path)
    process = _started(config, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    folder = wait_for_points(config, 2)
    workers = workers_of(process.pid)
    process.terminate()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert f"--resume {folder}" in stderr and "Traceback" not in stderr
    assert "records:" in stdout
    assert (folder / "report" / "summary.md").exists()
    _assert_gone(workers)


def test_a_closed_terminal_saves_what_was_measured(tmp_path):
    config = tiny_config(tmp_path)
    ours, theirs = pty.openpty()
    process = _started(
        config, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        first=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    reader = threading.Thread(target=_read_until_closed, args=(ours,), daemon=True)
    reader.start()  # a terminal that shows nothing would stop the sweep
    folder = wait_for_points(config, 2)
    workers = workers_of(process.pid)
    os.close(ours)  # the terminal hangs up
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert (folder / "report" / "summary.md").exists()
    assert (folder / "points.jsonl").read_bytes().endswith(b"}\n")
    _assert_gone(workers)


def _read_until_closed(terminal):
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass


def test_progress_that_nobody_reads_does_not_end_a_sweep(tmp_path):
    process = _started(
        tiny_config(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1,
        case_s=0.05,
    )  # fmt: skip
    assert "8 points" in process.stderr.readline()
    process.stderr.close()
    process.stderr = None
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "8 points: 8 ok" in stdout


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    config = tiny_config(tmp_path)
    process = _started(
        config, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        first=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    folder = wait_for_points(config, 1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    assert len(store.load_points(folder)) == 8


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("words", "measuring"),
    [
        (("compare", "--live", "main", "."), "compare._live"),
        (("gate", "--live", "main"), "gate._in_turns"),
        (("gate", "run", "--baseline", "run"), "gate._settled"),
        (("gate", "--baseline", "run"), "gate._measured_now"),
        (("noise", "--device", "cpu", "--impl", "chunked"), "noise.measure_noise"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_every_command_ends_by_a_signal_with_its_code(
    tmp_path, monkeypatch, words, measuring, signum
):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signum)
        time.sleep(10)

    write_run(tmp_path / "run", [timed()])
    monkeypatch.setattr(f"chela_bench.cli.{measuring}", interrupted)
    monkeypatch.setattr("os.isatty", lambda _: False)  # a terminal here stays ours
    ctrl_c = signum == signal.SIGINT
    before = signal.signal(signum, signal.default_int_handler if ctrl_c else signal.SIG_DFL)
    try:
        done = in_this_process(*words, cwd=tmp_path)
    finally:
        signal.signal(signum, before)
    assert (done.returncode, done.stdout) == (128 + signum, "")
    assert done.stderr.split("\n") == ["", "interrupted", ""]  # the first ends the line of a ^C


def _assert_gone(workers):
    deadline = time.monotonic() + 10
    while not all(map(gone, workers)):
        assert time.monotonic() < deadline, f"workers {workers} are still there"
        time.sleep(0.05)


def test_a_clock_that_is_set_back_changes_only_the_dates(tmp_path, monkeypatch):
    ticks = count()

    def utc_now():
        return f"2026-01-01T00:00:{59 - next(ticks) % 60:02d}.000Z"

    monkeypatch.setattr(runner, "_WORKER", STUB_WORKER.read_text())  # it knows no dates
    monkeypatch.setattr(runner, "utc_now", utc_now)
    monkeypatch.setattr(sweep, "utc_now", utc_now)
    settings = plan.resolve(
        load_config(tiny_config(tmp_path, sample_s=0.1)),
        plan.Flags(impls=("chunked",), lens="16,32"),
        ["cpu"],
    )
    result = sweep.sweep(settings, tmp_path / "run", Silent())
    assert result.run.finished_utc < result.run.started_utc
    assert all(point.outcome == "ok" and point.spent_s > 0 for point in result.points)
    assert result.run.cost.wall_s > 0
    again = sweep.sweep(settings, tmp_path / "run", Silent(), resumed=result.run)
    assert again.points == result.points
    assert write_report(tmp_path / "report", again.run, again.points)


def test_ten_thousand_points_are_planned_in_seconds_and_little_memory():
    flags = plan.Flags(
        ops=("linear_attention",), impls=("triton_chunked",), directions=("fwd",),
        lens=",".join(str(tokens) for tokens in range(1, 101)),
        axes={"BLOCK_T": list(range(10)), "BLOCK_V": list(range(10))},
    )  # fmt: skip
    config = load_config(ROOT / "bench.toml")
    begin = time.perf_counter()
    tracemalloc.start()
    settings = plan.resolve(config, flags, ["cuda"])
    cases = plan.cases(settings)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(plan.unavailable(settings, case) is None for case in cases)
    assert len(cases) == 10_000
    assert time.perf_counter() - begin < 10
    assert peak_bytes < 64 << 20


def test_two_processes_cannot_append_to_one_folder(tmp_path):
    """The second is refused while the first writes, and may go on after it."""
    path, point = tmp_path / "run", make_point()
    code = (
        "import sys; from pathlib import Path; from chela_bench.bench.store import RunFolder; "
        "from chela_bench.errors import EnvironmentProblem\n"
        "try: RunFolder(Path(sys.argv[1]))\n"
        "except EnvironmentProblem as error: print(error)"
    )
    attempt = [sys.executable, "-c", code, path]
    with store.RunFolder(path) as folder:
        folder.write_run(make_run())
        for _ in range(3):
            folder.append(point, [1.0])
        refused = subprocess.run(attempt, env=environment(), capture_output=True, text=True)
        folder.append(point, [1.0])
    assert f"is being written by another sweep (process {os.getpid()})" in refused.stdout
    assert (path / "points.jsonl").read_bytes().count(b"\n") == 4
    allowed = subprocess.run(attempt, env=environment(), capture_output=True, text=True)
    assert allowed.stdout == ""


CARELESS = {  # implementations that are right and leave something behind -> a new worker needed
    "right": False,
    "prints": False,
    "sets_the_default_dtype": True,
    "starts_an_idle_thread": False,
    "starts_a_busy_thread": True,
    "leaks_memory": True,
}


@pytest.fixture(scope="module")
def careless(forked_workers, tmp_path_factory):
    """Each one's point and whether its worker was replaced, by name; what they printed."""
    folder = tmp_path_factory.mktemp("careless")
    names = ("raises", "wants_no_compiler", *CARELESS, "exits_at_once")
    targets = tuple(f"{FAULTS}:{name}" for name in names)
    settings = plan.resolve(
        load_config(tiny_config(folder)),
        plan.Flags(ops=("linear_attention",), impls=targets, lens="16"),
        ["cpu"],
    )
    found = {}
    [session] = settings.sessions()
    with runner.Runner(session, folder / "worker.log", ceilings={}) as one:
        for case in plan.cases(settings):
            point, _ = one.measure(case)
            found[case.impl.partition(":")[2]] = point, one.worker_pid is None
    return found, (folder / "worker.log").read_text()


@pytest.mark.parametrize("name", CARELESS)
def test_a_worker_with_leftovers_is_replaced_and_the_point_counts(careless, name):
    point, replaced = careless[0][name]
    assert point.outcome == "ok", point.reason
    assert replaced == CARELESS[name]


def test_the_log_says_why_a_worker_was_replaced(careless):
    log = careless[1]
    assert "starts_a_busy_thread/fwd" in log and "it left threads running: polls; a new" in log
    assert "default dtype: torch.float32 before, torch.float64 now; a new worker follows" in log
    assert re.search(r"leaks_memory/.*: 1\.\d GiB more are held; a new worker follows", log)


def test_a_worker_imports_no_compiler_unless_an_implementation_does(careless):
    """It takes seconds. Neither judging nor an exception needs it."""
    assert careless[0]["raises"][0].outcome == "crash"
    point, _ = careless[0]["wants_no_compiler"]
    assert point.outcome == "ok", point.reason


def test_os_exit_is_a_crash(careless):
    point, _ = careless[0]["exits_at_once"]
    assert point.outcome == "crash"
    assert point.reason.startswith("worker ended with exit code 0")


def test_what_is_printed_goes_to_the_workers_log(careless, capfd):
    for words in ("an answer that is none", "on standard error", "past Python's buffer"):
        assert words in careless[1]
    assert capfd.readouterr().out == ""
