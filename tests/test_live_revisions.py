"""Git revisions as sides: checkouts that leave nothing behind, and each side's own files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile

import pytest

from chela_bench.bench import live, plan
from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.plan import Flags
from chela_bench.cli import turns
from chela_bench.cli.turns import _as_in, _gone
from chela_bench.errors import UsageError
from tests.running import ROOT, in_this_process, tiny_config
from tests.test_live import gated


def test_no_such_revision():
    with pytest.raises(UsageError, match="no implementation of what is selected, and no revision"):
        with live.checkouts(["no-such-thing"]):
            pass


def test_a_revision_before_live_comparison_is_refused_and_nothing_stays():
    first = git("rev-list", "--max-parents=0", "HEAD").split()[0]
    before = git("worktree", "list")
    with pytest.raises(UsageError, match="older than live comparison"):
        with live.checkouts([".", first]):
            pass
    assert git("worktree", "list") == before


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """One that holds a package of ours, at `prefix`, and is taken for this one's."""

    def made(prefix=""):
        package = tmp_path / "repository" / prefix
        (package / "chela_bench" / "bench").mkdir(parents=True)
        (package / "chela_bench" / "bench" / "turns.py").touch()
        me = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
        for words in (["init", "-q"], ["add", "."], [*me, "commit", "-qm", "All"]):
            subprocess.run(["git", *words], cwd=tmp_path / "repository", check=True)
        monkeypatch.setattr(live, "PACKAGE_ROOT", str(package))
        return tmp_path / "repository"

    return made


def worktrees(repository):
    return subprocess.check_output(["git", "worktree", "list"], cwd=repository, text=True)


@pytest.fixture
def hears_interrupts():
    """Also in the background or under nohup, where a shell has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_interrupts")
def test_a_signal_while_git_checks_out_leaves_nothing(tmp_path, monkeypatch, repository):
    """git goes on to its end, and what it has made is removed."""
    before = worktrees(repository())
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text(
        '#!/bin/sh\ncase "$*" in *"worktree add"*) kill -INT $PPID; sleep 0.4;; esac\n'
        f'exec {shutil.which("git")} "$@"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(slow.parent), prepend=os.pathsep)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        with live.checkouts(["HEAD"]):
            pass
    assert worktrees(tmp_path / "repository") == before
    assert not list(tmp_path.glob("chela-bench-*"))


def test_a_package_in_a_folder_of_its_repository(repository):
    repository("python")
    with live.checkouts(["HEAD", "."]) as (root, here):
        assert root.endswith("/0/python") and here.endswith("/repository/python")


@pytest.mark.parametrize("revision", ["^HEAD", "no-such-thing"])
def test_what_is_no_revision_is_refused(repository, revision):
    repository()
    with pytest.raises(UsageError, match="no revision of"):
        with live.checkouts([revision]):
            pass


def test_there_are_no_revisions_outside_git(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "PACKAGE_ROOT", str(tmp_path))
    with pytest.raises(UsageError, match="is no git checkout"):
        with live.checkouts(["HEAD"]):
            pass


def git(*words):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout


def test_each_side_has_its_own_version_of_a_users_file(repository):
    """One that the revision does not have is no point of its own."""
    top = repository("python")
    new, old = (str(top / file) for file in ("mine.py", "python/chela_bench/bench/turns.py"))
    (top / "mine.py").touch()
    flags = Flags(ops=["linear_attention"], impls=[f"{new}:f", f"{old}:f"])
    settings = plan.resolve(load_config(find_config(None)), flags, ["cpu"])
    with live.checkouts(["HEAD"]) as [root]:
        theirs = _as_in(root, settings)
        then = f"{root}/chela_bench/bench/turns.py:f"
        assert theirs.user_impls == {"turns.py:f": then}
        assert theirs.impls == {"linear_attention": ["turns.py:f"]}
        assert theirs.user_files_sha256 == {"turns.py:f": settings.user_files_sha256["turns.py:f"]}


def test_an_op_or_a_shape_that_bench_toml_has_no_more_is_gone(tmp_path, monkeypatch, repository):
    top = repository()
    monkeypatch.setattr(turns, "PACKAGE_ROOT", str(top))
    path, text = top / "bench.toml", find_config(None).read_text()
    path.write_text(text)
    me = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
    for words in (["add", "."], [*me, "commit", "-qm", "More"]):
        subprocess.run(["git", *words], cwd=top, check=True)
    path.write_text(text.replace('"reparameterization",', "").replace(
        "[shapes.long_conv]\nsmall =", "[shapes.long_conv]\ntiny ="))  # fmt: skip

    notes = []

    def gone(**flags):
        chosen = Flags(**flags)
        settings = plan.resolve(load_config(find_config(None)), chosen, ["cpu"])
        with live.checkouts(["HEAD", "."]) as roots:
            return _gone(path, roots, chosen, settings, notes)

    assert gone() == ["reparameterization", "long_conv/small"]
    assert gone(ops=["long_conv"]) == ["long_conv/small"]
    assert gone(ops=["long_conv"], shapes=["medium"]) == gone(impls=["chunked"]) == []
    path.write_text("[sweep]\nops = 5\n")
    assert gone() == [] and notes == [
        "bench.toml of a revision cannot be read: ops gone since are not looked for"
    ]
    path = tmp_path / "bench.toml"  # nobody's revision
    path.write_text(text)
    assert gone() == [] and len(notes) == 1


def test_a_gate_holds_no_file_against_itself(tmp_path, repository):
    repository()
    tiny_config(tmp_path)
    (tmp_path / "mine.py").touch()
    done = gated(tmp_path, "--impl", "mine.py:chunked")
    assert done.returncode == 2 and "mine.py is the same on both sides" in done.stderr
    done = in_this_process("gate", "--live", ".")
    assert done.returncode == 2 and "against itself; give a git revision" in done.stderr
