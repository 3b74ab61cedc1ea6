"""Two sides in turns: the order, when it ends, what a failing side leaves, git revisions."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter

import pytest

from chela_bench.bench import live, plan
from chela_bench.bench.cases import Case, Limits, Session
from chela_bench.bench.comparing import Noise
from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.gating import Rules, live_budgets, live_checks
from chela_bench.bench.live import Failed, Pair, Refusal
from chela_bench.bench.plan import Flags
from chela_bench.bench.sources import Machine
from chela_bench.bench.verdict import Limit
from chela_bench.cli.turns import _as_in, _paired, _points
from chela_bench.errors import UsageError
from tests.running import FAULTS, ROOT, in_this_process, tiny_config

pytestmark = pytest.mark.usefixtures("forked_workers")

CASE = Case(op="linear_attention", impl="chunked", direction="fwd", dtype="fp32",
            shape={"B": 1, "T": 64, "H": 1, "K": 16, "V": 16})  # fmt: skip
SESSION = Session(device="cpu", timer="event", l2="cold", seed=0, inputs="randn", limits=Limits())
PAIR = Pair("point", CASE, CASE)
NOISE = Noise(0.006, "assumed")


class Seat:
    """A side whose times are known; `diary` is shared by both."""

    def __init__(self, name, times, diary, clock="event", fails=None):
        self.name, self.diary, self.clock, self.fails = name, diary, clock, fails or {}
        self.times = itertools.cycle(times)

    def _do(self, what):
        self.diary.append((self.name, what))
        if what in self.fails:
            raise Failed(*self.fails[what])

    def hold(self, case):
        self._do("hold")

    def take(self, seconds):
        self._do("take")
        return next(self.times), self.clock

    def release(self):
        self._do("release")

    def let_go(self):
        self._do("let go")


def seats(before, after, **changes):
    diary = []
    return Seat("A", before, diary), Seat("B", after, diary, **changes), diary


def turns(diary):
    return "".join(name for name, what in diary if what == "take")


def test_the_order_is_flipped_each_round_and_both_are_judged_again():
    a, b, diary = seats([100.0], [108.0])
    [row] = live.compare(a, b, [PAIR], NOISE, budget_s=5)
    assert turns(diary).startswith("ABBAABBA")
    assert row.verdict == "slower" and row.ratio == pytest.approx(1.08)
    assert diary[:2] == [("A", "hold"), ("B", "hold")]
    assert diary[-2:] == [("A", "release"), ("B", "release")]


def test_it_ends_as_soon_as_it_is_clear():
    for change, word in ((1.0, "same"), (1.2, "slower"), (0.8, "faster")):
        a, b, diary = seats([100.0], [100.0 * change])
        [row] = live.compare(a, b, [PAIR], NOISE, budget_s=60)
        assert row.verdict == word and row.samples == live.LOOKS[0] == len(turns(diary)) / 2


def test_the_budget_ends_what_stays_unclear():
    a, b, _ = seats([100.0, 101.0], [99.0, 103.0, 102.0])
    [row] = live.compare(a, b, [PAIR], Noise(0.0, "none"), budget_s=0)
    assert row.verdict == "unclear" and "budget" in row.reason and row.low is not None


def test_drift_and_one_jump_of_the_clock_are_no_change():
    """Both sides slow down by 5 %, then by 12 % in the middle of a round."""
    drift = [100.0 * (1 + 0.05 * i / 8) * (1.12 if i > 3 else 1) for i in range(8)]
    a, b, _ = seats(drift, drift)
    [row] = live.compare(a, b, [PAIR], NOISE, budget_s=60)
    assert row.verdict == "same"


def test_two_clocks_are_not_mixed():
    a, b, _ = seats([100.0], [100.0], clock="wall")
    [row] = live.compare(a, b, [PAIR], NOISE, budget_s=5)
    assert row.verdict == "unclear" and "event and wall" in row.reason and row.ratio is None


@pytest.mark.parametrize("when", ["hold", "take", "release"])
@pytest.mark.parametrize("outcome", ["wrong", "crash"])
def test_a_side_that_fails_has_no_time_and_the_next_point_goes_on(when, outcome):
    a, b, diary = seats([100.0], [100.0], fails={when: (outcome, "off by 0.3")})
    other = Pair("other", CASE, CASE)
    rows = live.compare(a, b, [PAIR, other], NOISE, budget_s=5)
    assert [row.verdict for row in rows] == ["unclear", "unclear"]
    assert rows[0].reason == f"after: {outcome}: off by 0.3" and rows[0].ratio is None
    assert [row.wrong for row in rows] == [outcome == "wrong"] * 2
    assert Counter(what for _, what in diary)["let go"] == 4


def test_a_gate_in_turns():
    rules = Rules(Limit(0.05, 0.0), NOISE)
    for change, outcome in ((1.0, "passed"), (1.08, "failed")):
        a, b, _ = seats([100.0], [100.0 * change])
        clear = live.clear_of(lambda evidence: 1.05, 1)
        taken = live.in_turns(a, b, [PAIR], clear, budget_s=60)
        [check] = live_checks(["point"], taken, rules)
        assert check.outcome == outcome and check.name == "point"
    refused = [Refusal("after: wrong: no", ("ok", "wrong")),
               Refusal("after: crash: no", ("ok", "crash")), Refusal("two clocks")]  # fmt: skip
    found = [c.outcome for c in live_checks(["a", "b", "c"], refused, rules)]
    assert found == ["wrong", "failed", "unclear"]


@pytest.mark.parametrize(
    ("then", "now", "outcome", "reason"),
    [
        ("wrong", None, "better", "before: wrong: no"),
        ("compile_error", None, "better", "before: compile_error: no"),
        ("crash", None, "unclear", "before: crash: no"),
        ("timeout", None, "unclear", "before: timeout: no"),
        ("skipped", "skipped", "unchecked", "before: skipped: no; after: skipped: so"),
        ("crash", "crash", "unchecked", "before: crash: no; after: crash: so"),
        ("crash", "timeout", "failed", "before: crash: no; after: timeout: so"),
        ("skipped", "oom", "failed", "before: skipped: no; after: oom: so"),
        ("oom", "wrong", "wrong", "before: oom: no; after: wrong: so"),
        ("wrong", "wrong", "wrong", "before: wrong: no; after: wrong: so"),
    ],
)
def test_a_gate_in_turns_asks_the_second_side_where_the_first_fails(then, now, outcome, reason):
    a, b, diary = seats([100.0], [100.0])
    a.fails = {"take" if now is None else "hold": (then, "no")}
    b.fails = {} if now is None else {"hold": (now, "so")}
    taken = live.in_turns(a, b, [PAIR], live.clear_of(lambda evidence: 1.05, 1), budget_s=5)
    [check] = live_checks(["point"], taken, Rules(Limit(0.05, 0.0), NOISE))
    assert (check.outcome, check.reason) == (outcome, reason)
    assert check.figure == "outcome" and (check.before, check.after) == (then, now or "ok")
    assert diary[-1] == ("B", "let go")


@pytest.mark.parametrize("when", ["take", "release"])
def test_the_second_side_is_right_only_after_its_turn(when):
    a, b, _ = seats([100.0], [100.0], fails={when: ("wrong", "after timing")})
    a.fails = {"hold": ("wrong", "no")}
    [taken] = live.in_turns(a, b, [PAIR], live.clear_of(lambda evidence: 1.05, 1), budget_s=5)
    [check] = live_checks(["point"], [taken], Rules(Limit(0.05, 0.0), NOISE))
    assert taken.wrong and check.outcome == "wrong"
    assert check.reason == "before: wrong: no; after: wrong: after timing"


def test_to_let_go_of_nothing_costs_no_worker(tmp_path):
    with live.Seat(SESSION, tmp_path / "worker.log") as seat:
        worker = seat._worker
        seat.let_go()
        assert seat._worker is worker


MISSING, SKIPPED = ("missing", "HEAD has no such point"), ("skipped", "needs a GPU")


@pytest.mark.parametrize(
    ("lacks", "outcome", "reason"),
    [
        ((MISSING, None), "better", "before: missing: HEAD has no such point"),
        ((None, MISSING), "failed", "newly missing: HEAD has no such point"),
        ((None, SKIPPED), "failed", "newly skipped: needs a GPU"),
        ((SKIPPED, SKIPPED), "unchecked",
         "before: skipped: needs a GPU; after: skipped: needs a GPU"),
    ],
)  # fmt: skip
def test_a_side_that_lacks_a_point_is_not_asked_for_it(lacks, outcome, reason):
    a, b, diary = seats([100.0], [100.0])
    pair = Pair("point", CASE, CASE, lacks)
    taken = live.in_turns(a, b, [pair], live.clear_of(lambda evidence: 1.05, 1), budget_s=5)
    [check] = live_checks(["point"], taken, Rules(Limit(0.05, 0.0), NOISE))
    assert (check.outcome, check.reason) == (outcome, reason)
    asked = {(name, what) for name, what in diary if what != "let go"}
    right = {("B", "hold"), ("B", "take"), ("B", "release")}
    assert asked == (right if outcome == "better" else set())


LIMITS = """
[budgets.linear_attention.tiny]
max_ms = {}
max_peak_bytes = 4096
"""


@pytest.mark.parametrize("first_fails", [False, True])
def test_a_budget_holds_for_the_second_sides_time(tmp_path, first_fails):
    path = tiny_config(tmp_path)
    path.write_text(path.read_text() + LIMITS.format(0.00015))
    case = CASE.model_copy(update={"shape": {"B": 1, "T": 64, "H": 2, "K": 16, "V": 16}})
    a, b, _ = seats([100.0], [160.0])
    a.fails = {"hold": ("wrong", "no")} if first_fails else {}
    pair = Pair("point", case, case)
    taken = live.in_turns(a, b, [pair], live.clear_of(lambda evidence: 1.05, 1), budget_s=5)
    found = live_budgets([pair], taken, load_config(path), Machine("cpu", "a CPU"))
    checks = {check.figure: check for check in found}
    assert {name: check.outcome for name, check in checks.items()} == {
        "max_ms": "failed", "max_peak_bytes": "unchecked"
    }  # fmt: skip
    assert checks["max_ms"].reason == "0.00016, above the budget max_ms = 0.00015"


def test_a_live_gate_fails_above_a_budget(tmp_path):
    path = tiny_config(tmp_path)
    path.write_text(path.read_text() + LIMITS.format(0.00001))
    done = gated(tmp_path, "--impl", "chunked")
    assert done.returncode == 1, done.stderr
    assert "above the budget max_ms = 1e-05" in done.stdout


def gated(folder, *flags):
    return in_this_process(
        "gate", "--live", "HEAD", "--config", folder / "bench.toml", "--op", "linear_attention",
        "--device", "cpu", *flags, cwd=folder,
    )  # fmt: skip


def test_a_gate_that_could_check_nothing_does_not_pass(tmp_path):
    """Both sides fail alike."""
    tiny_config(tmp_path)
    done = gated(tmp_path, "--impl", f"{FAULTS}:raises")
    assert done.returncode == 5, done.stderr
    assert "before: crash: RuntimeError: no luck" in done.stdout
    assert "UNCLEAR: nothing could be checked: 1 check of 1 benchmark: 1 unchecked" in done.stdout


def test_a_gate_holds_no_file_against_itself(tmp_path):
    tiny_config(tmp_path)
    (tmp_path / "mine.py").write_text(SLOW.format(0.05))
    done = gated(tmp_path, "--impl", "mine.py:chunked")
    assert done.returncode == 2 and "mine.py is the same on both sides" in done.stderr
    done = in_this_process("gate", "--live", ".")
    assert done.returncode == 2 and "against itself; give a git revision" in done.stderr


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
        [lack] = {
            pair.lacks
            for pair in _paired([_points(theirs), _points(settings)], ("HEAD", "."))
            if "mine.py" in pair.name
        }
        assert lack == (("missing", "HEAD has no such point"), None)


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


def test_two_implementations_side_by_side(tmp_path):
    """Real workers: the token loop beside the chunked form, at a length where it is far slower."""
    config = tiny_config(tmp_path)
    done = in_this_process(
        "compare", "--live", "chunked", "recurrent", "--config", config, "--op",
        "linear_attention", "--device", "cpu", "--budget", 4, "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    [row] = found["points"]
    assert found["mode"] == "live" and row["verdict"] == "slower" and row["ratio"] > 5
    assert row["name"] == "linear_attention/fwd/fp32/B1-T256-H2-K16-V16"


SLOW = """
import time
from chela_bench.reference import linear_attention

def chunked(q, k, v):
    time.sleep({})
    return linear_attention.chunked(q, k, v)[0]
"""


@pytest.mark.parametrize(
    "sides",
    [("mine.py:chunked", "chunked"), ("mine.py:chunked", "sub/mine.py:chunked"),
     ("sub/mine.py:chunked", "mine.py:chunked")],
)  # fmt: skip
def test_a_file_is_not_taken_for_what_ends_like_it(tmp_path, sides):
    """Each side is measured as itself: names that end alike are not one."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "mine.py").write_text(SLOW.format(0.05))
    (tmp_path / "sub" / "mine.py").write_text(SLOW.format(0.2))
    done = in_this_process(
        "compare", "--live", *sides, "--config", tiny_config(tmp_path), "--op",
        "linear_attention", "--device", "cpu", "--budget", 2, "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)["points"]
    times = {"mine.py:chunked": (0.05, 0.2), "sub/mine.py:chunked": (0.2, 60.0)}
    for side, figure in zip(sides, ("before_ns", "after_ns"), strict=True):
        low, high = times.get(side, (0.0, 0.05))
        assert low <= row[figure] * 1e-9 < high, (side, row)


def test_a_wrong_side_is_found_before_it_is_timed(tmp_path):
    config = tiny_config(tmp_path)
    (tmp_path / "mine.py").write_text("def attention(q, k, v):\n    return v * 2\n")
    done = in_this_process(
        "compare", "--live", "chunked", "mine.py:attention", "--config", config, "--op",
        "linear_attention", "--device", "cpu", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    [row] = json.loads(done.stdout)["points"]
    assert row["ratio"] is None and row["reason"].startswith("after: wrong: o is off by")
