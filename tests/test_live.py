"""Two sides in turns: the order, when it ends, what a side leaves that fails or lacks a point."""

from __future__ import annotations

import contextlib
import itertools
import json
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
from chela_bench.cli.turns import _paired
from tests.running import FAULTS, in_this_process, tiny_config

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
    a, b, diary = seats([100.0], [100.0], clock="wall")
    [row] = live.compare(a, b, [PAIR], NOISE, budget_s=5)
    assert row.verdict == "unclear" and "event and wall" in row.reason and row.ratio is None
    assert diary[-2:] == [("A", "release"), ("B", "release")]


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
        ("skipped", None, "unclear", "before: skipped: no"),  # estimated to take too long
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


def test_the_second_side_is_judged_where_the_first_one_ends_its_turns():
    """By what it held then: another turn need not show it."""
    a, b, _ = seats([100.0], [100.0])
    a.fails = {"take": ("wrong", "no")}
    b.let_go = lambda: Failed("wrong", "after timing")
    [taken] = live.in_turns(a, b, [PAIR], live.clear_of(lambda evidence: 1.05, 1), budget_s=5)
    assert taken.outcomes == ("wrong", "wrong")
    assert taken.reason == "before: wrong: no; after: wrong: after timing"


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


@pytest.fixture
def both_here(monkeypatch):
    """The revision is the tree as it stands, without a checkout of its own."""

    @contextlib.contextmanager
    def checkouts(revisions):
        yield [live.PACKAGE_ROOT for _ in revisions]

    monkeypatch.setattr(live, "checkouts", checkouts)


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


def test_a_live_gate_fails_above_a_budget(tmp_path, both_here):
    path = tiny_config(tmp_path)
    path.write_text(path.read_text() + LIMITS.format(0.00001))
    done = gated(tmp_path, "--impl", "chunked")
    assert done.returncode == 1, done.stderr
    assert "above the budget max_ms = 1e-05" in done.stdout


def asked(monkeypatch, answers):
    """`answers(seat, points)` are what a side says that it has."""
    honest = live.Seat.planned

    def planned(seat, settings, *, every_impl):
        return answers(seat._log.stem, honest(seat, settings, every_impl=every_impl))

    monkeypatch.setattr(live.Seat, "planned", planned)


def test_what_the_tree_has_no_more_fails_by_name(tmp_path, monkeypatch, both_here):
    """One was removed, one needs something now, and one is new."""

    def answers(side, points):
        for case, why_not in points:
            if (side, case.impl) == ("after", "recurrent"):
                yield case, "needs more"
            elif case.impl == {"before": "chunked", "after": "quadratic"}[side]:
                continue
            elif case.impl in ("chunked", "quadratic", "recurrent", "triton_chunked"):
                yield case, why_not

    asked(monkeypatch, answers)
    tiny_config(tmp_path)
    done = gated(tmp_path, "--json")
    found = {c["name"].split("/")[1]: (c["outcome"], c["reason"])
             for c in json.loads(done.stdout)["points"]}  # fmt: skip
    assert done.returncode == 1 and found == {
        "quadratic": ("failed", "newly missing: the tree as it stands has no such point"),
        "recurrent": ("failed", "newly skipped: needs more"),
        "triton_chunked": ("unchecked",
                           "before: skipped: needs a GPU; after: skipped: needs a GPU"),
        "chunked": ("better", "before: missing: HEAD has no such point"),
    }  # fmt: skip


def test_an_option_that_one_side_does_not_know_makes_no_other_point():
    """Those that both know tell points apart."""

    def points(*configs):
        found = [CASE.model_copy(update={"config": config}) for config in configs]
        return {case.key: (case, None) for case in found}

    def timed(before, after):
        both = [pair for pair in _paired((before, after), "AB") if pair.lacks == (None, None)]
        return [(pair.before.config, pair.after.config) for pair in both]

    plain, one, other = {}, {"order": "serial"}, {"order": "parallel"}
    assert timed(points(plain), points(one)) == [(plain, one)]
    assert timed(points(one), points(plain)) == [(one, plain)]
    assert timed(points(one), points(other)) == []
    assert timed(points(plain), points(one, other)) == []
    wider = [{**config, "BLOCK_T": 64} for config in (one, other)]
    assert timed(points(one, other), points(*wider)) == [(one, wider[0]), (other, wider[1])]


def test_what_was_asked_for_by_name_is_not_dropped(tmp_path, both_here):
    tiny_config(tmp_path)
    done = gated(tmp_path, "--impl", "chunked,triton_chunked", "--json")
    found = {c["name"].split("/")[1]: c["outcome"] for c in json.loads(done.stdout)["points"]}
    assert done.returncode == 0, done.stderr
    assert found == {"chunked": "passed", "triton_chunked": "unchecked"}


def test_a_revision_that_cannot_say_what_it_has_is_asked_for_what_the_tree_has(
    tmp_path, monkeypatch, both_here
):
    def answers(side, points):
        if side == "before":
            raise Failed("crash", "AttributeError")
        return points

    asked(monkeypatch, answers)
    tiny_config(tmp_path)
    done = gated(tmp_path, "--impl", "chunked", "--json")
    found = json.loads(done.stdout)
    assert [check["outcome"] for check in found["points"]] == ["passed"]
    assert found["notes"] == [
        "HEAD is too old to say what it has: what is gone since is not looked for"
    ]


def test_a_side_says_what_it_has_of_anothers_settings(tmp_path):
    flags = Flags(ops=["linear_attention"], impls=["chunked"], lens="64", dtypes=["fp32"])
    settings = plan.resolve(load_config(find_config(None)), flags, ["cpu"])
    others = {"linear_attention": ["chunked", "gone"], "no_op": ["chunked"]}
    shapes = {**settings.shapes, "no_op": {}}
    other = settings.model_copy(update={"impls": others, "shapes": shapes})
    with live.Seat(SESSION, tmp_path / "worker.log") as seat:
        assert seat.planned(other, every_impl=False) == plan.planned(settings)
        every = {case.impl for case, _ in seat.planned(other, every_impl=True)}
        assert {"chunked", "quadratic", "triton_chunked"} <= every and "gone" not in every
        with pytest.raises(Failed):
            seat.planned(settings.model_copy(update={"lens": [0]}), every_impl=False)


@pytest.mark.parametrize(
    ("sides", "missing", "added"),
    [(("chunked", "quadratic"), 1, 0), (("quadratic", "chunked"), 0, 1)],
)
def test_a_point_that_one_of_two_has_is_listed(tmp_path, monkeypatch, sides, missing, added):
    honest = plan.planned

    def planned(settings):
        for case, why_not in honest(settings):
            lacks = (case.impl, case.direction) == ("quadratic", "bwd")
            yield case, "it has no bwd" if lacks else why_not

    monkeypatch.setattr(plan, "planned", planned)
    done = in_this_process(
        "compare", "--live", *sides, "--config", tiny_config(tmp_path), "--op",
        "linear_attention", "--direction", "fwd,bwd", "--device", "cpu", "--budget", 1, "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    [row], point = found["points"], "linear_attention/{}/fp32/B1-T256-H2-K16-V16"
    assert row["name"] == point.format("fwd")
    assert found["missing"] == [point.format("bwd")] * missing
    assert found["added"] == [point.format("bwd")] * added


def gated(folder, *flags):
    return in_this_process(
        "gate", "--live", "HEAD", "--config", folder / "bench.toml", "--op", "linear_attention",
        "--device", "cpu", *flags, cwd=folder,
    )  # fmt: skip


def test_a_gate_that_could_check_nothing_does_not_pass(tmp_path, both_here):
    """Both sides fail alike."""
    tiny_config(tmp_path)
    done = gated(tmp_path, "--impl", f"{FAULTS}:raises")
    assert done.returncode == 5, done.stderr
    assert "before: crash: RuntimeError: no luck" in done.stdout
    assert "UNCLEAR: nothing could be checked: 1 check of 1 benchmark: 1 unchecked" in done.stdout


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
