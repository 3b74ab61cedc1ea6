"""The command line in this process, on run folders made up for the purpose."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from click.testing import CliRunner

from chela_bench.bench import plan, runner, store
from chela_bench.bench.config import load_config
from chela_bench.cli import cli
from chela_bench.cli.progress import SweepProgress
from chela_bench.errors import EnvironmentProblem, RecordError, UsageError
from tests.factories import make_cpu_run, make_failure, make_point
from tests.running import STUB_WORKER, command, environment, tiny_config

FLAGS = plan.Flags(ops=["linear_attention"], impls=["chunked"], lens="64,128,256")


def _invoke(*arguments):
    """The result; its return_value is the exit code of a command that ran."""
    return CliRunner().invoke(cli, [*map(str, arguments)], standalone_mode=False)


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path)


@pytest.fixture
def folder(config, tmp_path):
    """Three points planned: one ok, one that ran out of memory, one not measured yet."""
    settings = plan.resolve(load_config(config), FLAGS, ["cpu"])
    cases = [case.model_dump() for case in plan.cases(settings)]
    points = [
        make_point(64, device="cpu", l2=None, **{**cases[0]}),
        make_failure("oom", "no room", 128, device="cpu", l2=None, **{**cases[1]}),
    ]
    with store.RunFolder(tmp_path / "runs" / "one") as writer:
        writer.write_run(make_cpu_run(settings=settings.model_dump(mode="json"), planned_points=3))
        writer.append(points[0], [1e6, 1e6])
        writer.append(points[1], [])
    return tmp_path / "runs" / "one"


@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [
        ([], ["done: ok", "done: oom", None]),
        (["--retry", "oom"], ["done: ok", None, None]),
        (["--retry", "oom", "--retry", "ok"], [None, None, None]),
    ],
)
def test_a_dry_run_of_a_resume_says_what_is_done(folder, arguments, reasons):
    result = _invoke("sweep", "--resume", folder, "--dry-run", "--json", *arguments)
    points = json.loads(result.stdout)["points"]
    assert [point["not_tried"] for point in points] == reasons
    text = _invoke("sweep", "--resume", folder, "--dry-run", *arguments)
    assert [line.partition("  ")[2] or None for line in text.stdout.splitlines()] == reasons
    assert text.stderr == f"3 points, {reasons.count(None)} to be tried\n"


def test_a_dry_run_prints_no_control_characters(config, tmp_path):
    file = tmp_path / "mine\x1b[31m\n.py"
    file.write_text("def f(q, k, v): return v\n")
    result = _invoke(
        "sweep", "--dry-run", "--config", config, "--op", "linear_attention", "--impl", f"{file}:f"
    )
    assert result.stdout == "linear_attention/mine .py:f/fwd/fp32/B1-T256-H2-K16-V16\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lens": ["long"]}, "settings.lens.0: Input should be a valid integer"),
        ({"lens": [0]}, "settings.lens.0: Input should be greater than or equal to 1"),
        ({"devices": None}, "settings.devices: Input should be a valid list"),
        ({"new": 1}, "settings.new: Extra inputs are not permitted"),
        ({"impls": {}}, "settings: linear_attention lacks implementations, or a dimension"),
        (
            {"shapes": {"linear_attention": {"tiny": {"B": 1}}}},
            "settings: linear_attention lacks implementations, or a dimension",
        ),
    ],
)
def test_damaged_settings_cannot_be_resumed(folder, changes, message):
    run = json.loads((folder / store.RUN).read_text())
    run["settings"] |= changes
    (folder / store.RUN).write_text(json.dumps(run))
    error = _invoke("sweep", "--resume", folder, "--dry-run").exception
    assert isinstance(error, RecordError)
    assert str(error).startswith(f"{folder} cannot be resumed: {message}")


def test_two_run_folders_of_one_name_are_not_reported_into_one(folder, tmp_path):
    other = tmp_path / "others" / "one"
    error = _invoke("report", folder, other, "-o", tmp_path / "out").exception
    assert isinstance(error, UsageError)
    assert str(error).startswith("two run folders of one name would share a folder in")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stop", "code"),
    [(KeyboardInterrupt(), 130), (EnvironmentProblem("lost"), None), (UsageError("no"), None)],
)
def test_a_sweep_that_is_stopped_still_prints_one_document(
    config, tmp_path, monkeypatch, stop, code
):
    def stopped(self, point):
        raise stop

    monkeypatch.setattr(runner, "_WORKER", STUB_WORKER.read_text())
    monkeypatch.setattr(SweepProgress, "finished", stopped)
    result = _invoke(
        "sweep", "--json", "--config", config, "--out", tmp_path / "new", "--device", "cpu",
        "--op", "linear_attention", "--impl", "chunked", "--lens", "64,128",
    )  # fmt: skip
    document = json.loads(result.stdout)
    assert len(document["points"]) == 1 and document["run"]["finished_utc"] is None
    [run] = (tmp_path / "new").iterdir()
    assert f"go on with: chela-bench sweep --resume {run}" in result.stderr
    assert (run / "report" / "summary.md").exists()
    if code is None:
        assert result.exception is stop
    else:
        assert result.return_value == code


def test_a_folder_that_another_sweep_writes_is_left_alone(folder, monkeypatch):
    before = sorted(folder.iterdir())
    with store.RunFolder(folder):
        result = _invoke("sweep", "--resume", folder)
    assert isinstance(result.exception, EnvironmentProblem)
    assert result.stdout == ""
    assert sorted(folder.iterdir()) == before


LONG = "a" * 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", f"{LONG}.py:f", "--op", "linear_attention"], "no such file"),
        (["--impl", "\udcff.py:f", "--op", "linear_attention"], "no such file"),
        (["--impl", "chunked", "--axis", "X=\udcff"], "not valid UTF-8; give it another name"),
        (["--impl", "chunked", "--set", f"H={1 << 31}"], "sizes up to 2^30"),
        (["--config", LONG], "File name too long"),
        (["--resume", LONG], "File name too long"),
        (["--out", LONG, "--impl", "chunked"], "File name too long"),
    ],
)
def test_names_and_sizes_that_nothing_can_have_are_answered(config, arguments, message):
    where = [] if "--config" in arguments else ["--config", config]
    result = _invoke("sweep", *where, *arguments)
    assert isinstance(result.exception, UsageError | RecordError | EnvironmentProblem)
    assert message in str(result.exception)


def _streams(*arguments, **streams):
    """Exit code and standard error of a process whose standard output is no good."""
    done = subprocess.run(
        command(*arguments), env=environment(), text=True, stderr=subprocess.PIPE, **streams
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "--json"], ["--help"], ["list", "--help"]]
)
def test_a_full_disk_behind_standard_output_is_one_sentence(arguments):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        code, stderr = _streams(*arguments, stdout=full)
    assert code == 6
    assert stderr == "chela-bench: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize("way", [[], ["--json"]])
def test_a_closed_pipe_behind_standard_output_is_one_sentence(folder, way):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as closed:
        code, stderr = _streams("report", folder, *way, stdout=closed)
    assert code == 6
    assert stderr == "chela-bench: cannot write to standard output: Broken pipe\n"


def test_no_standard_output_at_all_is_no_mistake(config):
    shell = f"{' '.join(command('sweep', '--dry-run', '--config', config))} >&-"
    done = subprocess.run(["sh", "-c", shell], env=environment(), stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert done.stderr.endswith(" to be tried\n")
