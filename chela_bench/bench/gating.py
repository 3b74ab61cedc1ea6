"""Held against a baseline: times within a limit, exact figures exactly, budgets, nothing lost.

A time fails if its interval excludes the limit, the change is above it in percent and in time, and
above the machine's own noise. What is not known well enough is unclear, never passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chela_bench.bench import verdict
from chela_bench.bench.comparing import Noise, assumed_noise, look, row_of, time_of
from chela_bench.bench.config import Config
from chela_bench.bench.live import LOOKS, Pair, Refusal
from chela_bench.bench.modelled import modelled_now
from chela_bench.bench.sources import Entry, Machine, Measured, StaticRow
from chela_bench.bench.verdict import Evidence, Limit
from chela_bench.records import Point
from chela_bench.verdicts import Check, Outcome

DEFAULT_LIMIT = Limit(0.05, 2000)
HBM_LIMIT = 0.02
HBM_FEWEST_BYTES = 100_000_000  # below, counters tell too little
_ORDER: tuple[Outcome, ...] = (
    "wrong", "failed", "unclear", "unchecked", "new", "better", "passed"
)  # fmt: skip
_MOST_IS_BEST = {"ctas_per_sm", "fits"}
_STATIC = (
    "fits", "smem_bytes", "regs", "spill_store_bytes", "spill_load_bytes", "ctas_per_sm",
    "tensor_core",
)  # fmt: skip
# Of these the code is the cause; a crash, a timeout, a full memory and an estimate of too long a
# call may be the machine's doing.
_THE_CODES_OWN = ("wrong", "compile_error", "out_of_resources")
_POINT = ("launches", "peak_bytes")
_POINT_STATIC = ("smem_bytes", "regs", "spill_store_bytes", "spill_load_bytes", "ctas_per_sm")


@dataclass(frozen=True)
class Rules:
    """What is allowed."""

    limit: Limit
    noise: Noise
    same_card: bool = True


def gate(baseline: Measured, candidate: Measured, rules: Rules, config: Config) -> list[Check]:
    """Every check, worst first."""
    return worst_first(
        [
            *_outcomes(baseline.entries, candidate.entries),
            *_times(baseline.entries, candidate.entries, rules),
            *_figures(baseline.entries, candidate.entries, rules),
            *_static(baseline.static, candidate.static),
            *_models(baseline),
            *_budgets(candidate, config),
        ]
    )


def unclear_times(checks: Sequence[Check]) -> list[str]:
    """Names of the benchmarks that more rounds may settle."""
    return [check.name for check in checks if check.outcome == "unclear" and check.figure == "time"]


def _outcomes(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> Iterator[Check]:
    """Whether each has a result, as it had before: none is lost, none newly fails."""
    for name, then in before.items():
        now = after.get(name)
        if now is None:
            yield Check(
                name=name,
                figure="outcome",
                outcome="failed",
                before=then.outcome,
                reason="missing: it is in the baseline and was not measured"
                + _renamed(then, before, after),
            )
            continue
        outcome, reason = _outcome(then, now)
        yield Check(
            name=name,
            figure="outcome",
            outcome=outcome,
            before=then.outcome,
            after=now.outcome,
            reason=reason,
        )
    for name, now in after.items():
        if name not in before:
            yield Check(
                name=name,
                figure="outcome",
                outcome="wrong" if now.outcome == "wrong" else "new",
                after=now.outcome,
                reason=_reason(now) if now.outcome != "ok" else "not in the baseline",
            )


def _outcome(then: Entry, now: Entry) -> tuple[Outcome, str | None]:
    return _changed(then.outcome, now.outcome, _reason(now))


def _changed(then: str, now: str, reason: str) -> tuple[Outcome, str | None]:
    """From one outcome to another. Two failures alike say nothing of either's figures."""
    if now == "wrong":
        return "wrong", reason
    if now == "ok":
        return ("passed", None) if then == "ok" else ("better", f"it was {then}")
    if now == then:
        return "unchecked", f"{now}, as in the baseline: {reason}"
    return "failed", f"newly {now}: {reason}"


def _reason(entry: Entry) -> str:
    return (entry.point.reason if entry.point else None) or entry.outcome


def _renamed(then: Entry, before: Mapping[str, Entry], after: Mapping[str, Entry]) -> str:
    """A hint at the new name of a test that measures the same point."""
    if then.point is None:
        return ""
    for name, now in after.items():
        if name not in before and now.point is not None and now.point.key == then.point.key:
            return f"; {name} measures the same: if it was renamed, promote a new baseline"
    return ""


def _times(
    before: Mapping[str, Entry], after: Mapping[str, Entry], rules: Rules
) -> Iterator[Check]:
    pairs = [(then, after[name]) for name, then in before.items()
             if name in after and then.outcome == after[name].outcome == "ok"]  # fmt: skip
    looked = [look(then, now, same_card=rules.same_card) for then, now in pairs]
    found = [
        (now, one) for (_, now), one in zip(pairs, looked, strict=True) if isinstance(one, Evidence)
    ]
    thresholds = [rules.limit.threshold(e.before_ns, rules.noise.of(now)) for now, e in found]
    judged = iter(verdict.gated([e for _, e in found], thresholds))
    limits = iter(thresholds)
    for (then, now), evidence in zip(pairs, looked, strict=True):
        if isinstance(evidence, str):
            yield Check(
                name=then.name, figure="time", outcome="unclear", before=time_of(then),
                after=time_of(now), reason=evidence,
            )  # fmt: skip
            continue
        (within, p), threshold = next(judged), next(limits)
        yield _time_check(
            then.name, evidence, within, p, threshold, rules.limit, rules.noise.of(now)
        )


def undecidable(measured: Measured) -> dict[str, str]:
    """Benchmarks whose times could not be decided even against themselves, at the limit that is
    allowed unless another is said: and why."""
    rules = Rules(DEFAULT_LIMIT, assumed_noise(measured.machine))
    found = {}
    for check in _times(measured.entries, measured.entries, rules):
        if check.outcome != "passed":
            strays = verdict.unrest(measured.entries[check.name].samples_ns)
            why = ", ".join(f"{what} {size:.1%}" for what, size in strays)
            found[check.name] = f"its samples {why}" if why else str(check.reason)
    return found


def live_checks(
    names: Sequence[str], taken: Sequence[Evidence | Refusal], rules: Rules
) -> list[Check]:
    """Of two sides measured in turns, worst first."""
    found = [one for one in taken if isinstance(one, Evidence)]
    thresholds = [rules.limit.threshold(e.before_ns, rules.noise.typical) for e in found]
    alpha = verdict.GATE_ALPHA / len(LOOKS)
    judged = iter(zip(verdict.gated(found, thresholds, alpha=alpha), thresholds, strict=True))
    checks = []
    for name, one in zip(names, taken, strict=True):
        if isinstance(one, Refusal):
            checks.append(_without_time(name, one))
            continue
        (within, p), threshold = next(judged)
        p = min(1.0, p * len(LOOKS))
        checks.append(
            _time_check(name, one, within, p, threshold, rules.limit, rules.noise.typical)
        )
    return worst_first(checks)


def gone(name: str) -> Check:
    """What only the older side's bench.toml has, live."""
    return Check(
        name=name, figure="outcome", outcome="failed", before="planned", after="missing",
        reason="missing: the older revision's bench.toml has it, the tree's has not",
    )  # fmt: skip


def live_budgets(
    pairs: Sequence[Pair], taken: Sequence[Evidence | Refusal], config: Config, machine: Machine
) -> list[Check]:
    """Of the second side's times: live there is no other figure."""
    entries = {}
    for pair, one in zip(pairs, taken, strict=True):
        if one.after_ns is not None:
            point = Point(
                **pair.after.model_dump(), device=machine.uuid or "cpu", outcome="ok",
                wall_ns=max(1, round(one.after_ns)),
            )  # fmt: skip
            entries[pair.name] = Entry(pair.name, point, [])
    return list(_budgets(Measured("live", "run", (machine,), entries), config))


def worst_first(checks: Iterable[Check]) -> list[Check]:
    return sorted(checks, key=lambda one: (_ORDER.index(one.outcome), one.name, one.figure))


def _without_time(name: str, refusal: Refusal) -> Check:
    """What the first side did not have, the second cannot lose; but it counts as mended only where
    the first one's failure was the code's."""
    then, now = refusal.outcomes
    outcome: Outcome
    if now == "wrong":
        outcome = "wrong"
    elif now != "ok":
        outcome = "unchecked" if now == then else "failed"
    else:
        mended = then in _THE_CODES_OWN or not refusal.tried
        outcome = "better" if mended else "unclear"
    reason = refusal.reason
    if then == "ok" != now:
        reason = f"newly {reason.removeprefix('after: ')}"
    return Check(
        name=name, figure="outcome", outcome=outcome, before=then, after=now, reason=reason
    )


def _time_check(
    name: str,
    evidence: Evidence,
    within: bool | None,
    p: float,
    threshold: float,
    limit: Limit,
    noise: float,
) -> Check:
    outcome: Outcome = "unclear" if within is None else "passed" if within else "failed"
    change = row_of(name, evidence, p)
    slower = f"{evidence.ratio - 1:+.1%}, {(evidence.after_ns - evidence.before_ns) / 1000:+.3g} us"
    doubts = "; ".join(("", *evidence.doubts))
    if change.low is None:
        reason = f"{evidence.count} samples; {verdict.FEWEST} wanted"
    elif within is None:
        reason = (
            f"{slower}: between {evidence.surest_low - 1:+.1%} and "
            f"{evidence.surest_high - 1:+.1%}, where {threshold - 1:.1%} is allowed{doubts}"
        )
    else:
        reason = (
            f"{slower}: slower, where {limit} and noise of {noise:.1%} allow {threshold - 1:.1%}"
        )
    return Check(
        name=name,
        figure="time",
        outcome=outcome,
        before=evidence.before_ns,
        after=evidence.after_ns,
        change=change.model_copy(
            update={"verdict": {"passed": "same", "failed": "slower"}.get(outcome, "unclear")}
        ),
        reason=None if within else reason,
    )


def _figures(
    before: Mapping[str, Entry], after: Mapping[str, Entry], rules: Rules
) -> Iterator[Check]:
    """Exact figures of points; measured bytes within a limit."""
    for name, then in before.items():
        now = after.get(name)
        if now is None or then.point is None or now.point is None:
            continue
        if not then.outcome == now.outcome == "ok":
            continue
        for figure in _POINT:
            yield from _exact(name, figure, getattr(then.point, figure), getattr(now.point, figure))
        for figure in _POINT_STATIC:
            yield from _exact(
                name, figure, getattr(then.point.static, figure), getattr(now.point.static, figure)
            )
        yield from _exact(
            name, "hbm.model_bytes", then.point.hbm.model_bytes, now.point.hbm.model_bytes
        )
        yield from _bytes(name, then.point, now.point, rules.noise.of_bytes(then))


def _bytes(name: str, then: Point, now: Point, noise: float) -> Iterator[Check]:
    """HBM bytes by counters: not more than 2 %, and noise, above the baseline's."""
    before, after = counted_bytes(then), counted_bytes(now)
    if before is None or before < HBM_FEWEST_BYTES:
        return
    allowed = max(HBM_LIMIT, noise)
    reason = None
    outcome: Outcome = "passed"
    if after is None:
        outcome, reason = "failed", "counted in the baseline, not counted now"
    elif after > before * (1 + allowed):
        outcome = "failed"
        reason = f"{after / before - 1:+.1%} bytes through HBM, where {allowed:.1%} is allowed"
    elif after < before / (1 + allowed):
        outcome, reason = "better", f"{after / before - 1:+.1%} bytes through HBM"
    yield Check(
        name=name, figure="hbm.bytes", outcome=outcome, before=before, after=after, reason=reason
    )


def counted_bytes(point: Point) -> int | None:
    """HBM bytes by counters; None if they were not counted (GPM is too coarse to gate), or in
    several passes, which find in L2 what the one before has left there."""
    hbm = point.hbm
    if hbm.source != "ncu" or hbm.read_bytes is None or hbm.write_bytes is None:
        return None
    if any(kernel.passes is not None and kernel.passes > 1 for kernel in point.kernels):
        return None
    return hbm.read_bytes + hbm.write_bytes


def _exact(name: str, figure: str, before: Any, after: Any) -> Iterator[Check]:
    """One figure that is the same every time: worse fails, better is said."""
    if before is None:
        return
    outcome: Outcome = "passed"
    reason = None
    if after is None:
        outcome, reason = "failed", f"{figure} was {_said(before)} and is not known now"
    elif before != after:
        outcome = "failed" if _worse(figure, before, after) else "better"
        reason = f"{figure} was {_said(before)} and is {_said(after)}"
    yield Check(
        name=name, figure=figure, outcome=outcome, before=before, after=after, reason=reason
    )


def _said(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _worse(figure: str, before: Any, after: Any) -> bool:
    if figure == "tensor_core":  # an instruction's name, or whether there is one
        return bool(before)
    return bool(after < before if figure in _MOST_IS_BEST else after > before)


def _static(before: Mapping[str, StaticRow], after: Mapping[str, StaticRow]) -> Iterator[Check]:
    for name, then in before.items():
        now = after.get(name)
        if now is None:
            yield Check(
                name=name, figure="outcome", outcome="failed", before="compiled",
                reason="missing: it is in the baseline and was not compiled",
            )  # fmt: skip
            continue
        compiled, was_compiled = now.is_compiled, then.is_compiled
        if not (compiled and was_compiled):
            outcome, reason = _changed(
                "ok" if was_compiled else then.outcome, "ok" if compiled else now.outcome,
                now.reason or "no reason given",
            )  # fmt: skip
            yield Check(
                name=name, figure="outcome", outcome=outcome, before=then.outcome,
                after=now.outcome, reason=reason,
            )  # fmt: skip
        elif not now.fits and (then.fits or (then.fits is None and then.ctas_per_sm)):
            why = f": {now.reason}" if now.reason else ""
            yield Check(
                name=name, figure="fits", outcome="failed", before=True, after=False,
                reason=f"no longer fits {now.arch}{why}",
            )  # fmt: skip
        elif then.fits is None:
            yield Check(
                name=name, figure="fits", outcome="unchecked", after=now.fits,
                reason=f"the baseline does not say whether it fits {then.arch}",
            )  # fmt: skip
        for figure in _STATIC if compiled else ():
            was, is_now = getattr(then, figure), getattr(now, figure)
            if not now.fits and (figure in ("fits", "ctas_per_sm") or is_now is None):
                continue  # that it does not fit is said
            if figure == "tensor_core":
                was, is_now = was or None, is_now or "none"
                if True in (was, is_now) and was and is_now != "none":
                    was = is_now  # one of the two says no more than that there is one
            yield from _exact(name, figure, was, is_now)
    for name, now in after.items():
        if name not in before:
            yield Check(
                name=name, figure="outcome", outcome="new",
                after="compiled" if now.is_compiled else now.outcome,
                reason="not in the baseline" if now.is_compiled else now.reason or now.outcome,
            )  # fmt: skip


def _models(baseline: Measured) -> Iterator[Check]:
    for key, (case, before) in baseline.models.items():
        after = modelled_now(case)
        if after is None:
            yield Check(
                name=key, figure="hbm.model_bytes", outcome="failed", before=before,
                reason="missing: the implementation is gone, or has no byte model of this any more",
            )  # fmt: skip
        else:
            yield from _exact(key, "hbm.model_bytes", before, after)


def idle_budgets(candidate: Measured, config: Config) -> list[str]:
    """Names of those that no benchmark was held to."""
    return [f"{op}.{shape}" for op, budgets in config.budgets.items() for shape in budgets
            if not any(_held_to(candidate, config, op, shape))]  # fmt: skip


def _budgets(candidate: Measured, config: Config) -> Iterator[Check]:
    for op, budgets in config.budgets.items():
        for shape in budgets:
            yield from _held_to(candidate, config, op, shape)


def _held_to(candidate: Measured, config: Config, op: str, shape: str) -> Iterator[Check]:
    budget, sizes = config.budgets[op][shape], config.shapes[op][shape]
    for name, entry in candidate.entries.items():
        point = entry.point
        if point is None or point.op != op or point.outcome != "ok":
            continue
        if any(point.shape.get(dim) != size for dim, size in sizes.items()):
            continue
        if (
            point.impl in (budget.impls or [point.impl])
            and point.direction in (budget.directions or [point.direction])
            and point.dtype in (budget.dtypes or [point.dtype])
        ):
            for figure, value, why in _budgeted(point):
                yield from _within(name, figure, getattr(budget, figure), value, why)
    for name, row in candidate.static.items():
        if (
            row.op == op
            and (budget.impls is None or row.impl in (None, *budget.impls))
            and (budget.dtypes is None or row.dtype in (None, *budget.dtypes))
            and budget.max_spill_bytes is not None
            and row.fits is not False
        ):
            yield from _within(
                name, "max_spill_bytes", budget.max_spill_bytes,
                _sum(row.spill_store_bytes, row.spill_load_bytes), "the compiler told none",
            )  # fmt: skip


def _budgeted(point: Point) -> Iterator[tuple[str, float | None, str]]:
    """(budget, its figure, why it may be missing)."""
    seconds, counted, model = point.seconds, counted_bytes(point), point.hbm.model_bytes
    yield "max_ms", None if seconds is None else seconds * 1e3, "no time"
    yield "max_x_floor", point.x_floor, "no floor is known here"
    yield "max_peak_bytes", point.peak_bytes, "no peak memory is known here"
    measured = None if counted is None or not model else counted / model
    yield "max_hbm_x_model", measured, "HBM bytes were not counted, or have no model"
    static = point.static
    spilled = _sum(static.spill_store_bytes, static.spill_load_bytes)
    yield "max_spill_bytes", spilled, "the compiler was not asked"


def _within(
    name: str, figure: str, limit: float | None, value: float | None, why: str
) -> Iterator[Check]:
    if limit is None:
        return
    outcome: Outcome = "passed"
    reason = None
    if value is None:
        outcome, reason = "unchecked", f"budget {figure} = {limit:g} was not checked: {why}"
    elif value > limit:
        outcome, reason = "failed", f"{value:.6g}, above the budget {figure} = {limit:g}"
    yield Check(name=name, figure=figure, outcome=outcome, before=limit, after=value, reason=reason)


def _sum(*parts: int | None) -> int | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None
