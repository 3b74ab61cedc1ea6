"""One sweep's records: what its header says, when it is finished, what it refuses to go on with."""

from __future__ import annotations

import json
import sys

import pytest

from chela_bench.bench import plan, runner, store
from chela_bench.bench.config import load_config
from chela_bench.bench.sweep import git_state, sweep
from chela_bench.errors import EnvironmentProblem, RecordError
from tests.running import STUB_WORKER, tiny_config


class Heard:
    """A listener; `stop_after` points it interrupts, as Ctrl-C does."""

    def __init__(self, stop_after=None):
        self.stop_after, self.points, self.left, self.header = stop_after, [], None, None

    def started(self, run, folder, left, warnings):
        self.left, self.header = left, json.loads((folder / store.RUN).read_text())

    def case(self, case):
        pass

    def phase(self, phase):
        pass

    def said(self, line):
        pass

    def finished(self, point):
        self.points.append(point)
        if len(self.points) == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_WORKER", STUB_WORKER.read_text())
    flags = plan.Flags(ops=["linear_attention"], impls=["chunked", "quadratic"], lens="64,128")
    return plan.resolve(load_config(tiny_config(tmp_path)), flags, ["cpu"])


def test_finished_stays_as_it_was_when_nothing_is_left_to_do(settings, tmp_path):
    first = sweep(settings, tmp_path / "run", Heard())
    heard = Heard()
    again = sweep(settings, tmp_path / "run", heard, resumed=first.run)
    assert heard.left == 0
    assert again.run == first.run == store.load_header(tmp_path / "run")
    assert first.run.finished_utc is not None


def test_finished_is_taken_back_while_something_is_measured_again(settings, tmp_path):
    first = sweep(settings, tmp_path / "run", Heard())
    heard = Heard()
    again = sweep(
        settings, tmp_path / "run", heard, resumed=first.run, retry=frozenset({"ok"})
    )  # fmt: skip
    assert heard.left == len(heard.points) == 4
    assert heard.header["finished_utc"] is None
    assert first.run.finished_utc < again.run.finished_utc
    assert again.run.started_utc == first.run.started_utc


def test_an_interrupted_sweep_keeps_its_points_and_goes_on_with_the_others(settings, tmp_path):
    heard, rest = Heard(stop_after=3), Heard()
    with pytest.raises(KeyboardInterrupt):
        sweep(settings, tmp_path / "run", heard)
    run, points = store.load_run(tmp_path / "run")
    assert run.finished_utc is None and points == heard.points
    result = sweep(settings, tmp_path / "run", rest, resumed=run)
    assert result.points == heard.points + rest.points
    assert len({point.key for point in result.points}) == run.planned_points == 4


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"source_sha256": "0"}, "source_sha256 was '0' and is now '"),
        ({"versions": {"torch": "1.0"}}, r"versions.torch was '1.0' and is now None"),
    ],
)
def test_other_code_is_refused_with_the_difference(settings, tmp_path, changes, difference):
    run = sweep(settings, tmp_path / "run", Heard()).run
    with pytest.raises(RecordError) as error:
        sweep(settings, tmp_path / "run", Heard(), resumed=run.model_copy(update=changes))
    assert str(error.value).startswith(f"{tmp_path / 'run'} cannot be resumed: {difference}")


def test_a_command_line_that_is_no_unicode_is_recorded(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/chela-bench", "sweep", "--out", "caf\udce9"])
    run = sweep(settings, tmp_path / "run", Heard()).run
    assert run.argv == ["chela-bench", "sweep", "--out", "caf?"]
    assert store.load_header(tmp_path / "run") == run


def test_a_sweep_that_cannot_start_leaves_no_folder(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_WORKER", "raise SystemExit(5)")
    with pytest.raises(EnvironmentProblem, match="does not start: worker ended with exit code 5"):
        sweep(settings, tmp_path / "run", Heard())
    assert not (tmp_path / "run").exists()


def test_git_is_asked_about_the_packages_own_checkout(monkeypatch):
    before = git_state()
    monkeypatch.setenv("GIT_DIR", "/nonexistent")  # as in a hook of some other repository
    monkeypatch.setenv("GIT_INDEX_FILE", "/nonexistent/index")
    assert git_state() == before
