"""Unclear times measured again: only by the code, the versions and the card that measured them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from chela_bench.bench import again, sources
from chela_bench.bench.cases import Limits
from chela_bench.bench.sources import Code
from chela_bench.errors import EnvironmentProblem, UsageError
from tests.factories import make_run
from tests.records import pytest_json, samples, timed, write_run
from tests.running import in_this_process

HERE = Code("a" * 64, "c" * 40, False)


class Steady:
    """Stands in for a Runner on the card that records are of; every point takes 2 ms."""

    device = "GPU-0"
    environment, versions = make_run().environment, make_run().versions

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, case):
        return timed(case.shape["T"], ns=2e6, device=self.device)


@pytest.fixture
def measured_again(tmp_path, monkeypatch):
    """The only point of a candidate, after one more round here."""
    monkeypatch.setattr(again, "Runner", Steady)
    monkeypatch.setattr(again, "code_here", lambda: HERE)

    def measured(run=None, path=None, **point):
        if path is None:
            path = write_run(tmp_path / "now", [timed(**point)], run)
        candidate = sources.read(path)
        [name] = candidate.entries
        session = again.session_of(dataclasses.replace(candidate, settings=None), "cuda", Limits())
        return again.again(candidate, [name], session, heard=str).entries[name]

    return measured


def of(**changes):
    return make_run(
        **{"source_sha256": HERE.source_sha256, "git_sha": HERE.commit, "git_dirty": False}
        | changes
    )


def test_rounds_of_the_same_code_count_together(measured_again):
    assert len(measured_again(of()).samples_ns) == 180


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (of(source_sha256="b" * 64), "commit ccccccc, source bbbbbbb; this tree is of commit ccc"),
        (of(source_sha256=None, git_sha="d" * 40), r"the candidate is of commit ddddddd; this"),
        (of(source_sha256=None, git_dirty=True), r"of commit ccccccc\+; this tree"),
        (of(source_sha256=None, git_sha=None), "of unknown source; this tree"),
        (of(versions={"torch": "2.11.0", "triton": "3.7.1"}), r"triton 3\.7\.1.*; here are .*3\.6"),
    ],
)
def test_other_code_and_versions_are_not_measured_as_the_candidate(measured_again, run, words):
    with pytest.raises(EnvironmentProblem, match=words):
        measured_again(run)


def test_a_commit_tells_where_a_record_does_not_say_its_source(measured_again):
    assert len(measured_again(of(source_sha256=None)).samples_ns) == 180


def test_pytests_json_says_its_source_beside_the_commit(tmp_path, measured_again):
    path = pytest_json(tmp_path / "now.json", [timed()])
    found = json.loads(path.read_text())
    for source, same in ((HERE.source_sha256, True), ("b" * 64, False)):
        commit = {"id": "e" * 40, "dirty": True, sources.SOURCE: source}
        path.write_text(json.dumps({**found, "commit_info": commit}))
        if same:
            assert len(measured_again(path=path).samples_ns) == 180
        else:
            with pytest.raises(EnvironmentProblem, match=r"commit eeeeeee\+, source bbbbbbb; this"):
                measured_again(path=path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"impls": [1]}, "settings.impls: Input should be a valid dictionary"),
        ({"impls": {"linear_attention": 5}}, "settings.impls.linear_attention: Input should be a"),
        ({"shapes": [1]}, "settings.shapes: Input should be a valid dictionary"),
        ({"user_impls": 5}, "settings.user_impls: Input should be a valid dictionary"),
    ],
)
def test_settings_that_were_edited_are_refused_by_name(tmp_path, settings, words):
    run = write_run(tmp_path / "run", [timed()], make_run(settings=settings))
    with pytest.raises(UsageError, match=words):
        again.settings_of(sources.read(run), "cpu")


def test_another_suites_benchmarks_are_for_it_to_measure(tmp_path):
    """Unclear, with what to do: they are no points, and we cannot call them."""
    for name, seed in (("then", 0), ("now", 1)):
        data = [ns / 1e9 for ns in samples(1e6 * (1 + seed / 20), seed=seed)]
        document = {"benchmarks": [{"fullname": "test_sum", "stats": {"data": data}}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    done = in_this_process("gate", "now.json", "--baseline", "then.json", cwd=tmp_path)
    said = " ".join(done.stdout.split())
    assert done.returncode == 5 and "now.json holds no points of ours; measure it again" in said


def test_samples_of_another_card_are_not_mixed_in(measured_again):
    found = measured_again(of(), device="GPU-1")
    assert found.device == "GPU-0" and len(found.samples_ns) == 90
    assert found.point.time_ns.median == pytest.approx(2e6, rel=0.01)
