"""Two stored records, point by point: ratio, interval, verdict, and what speaks against one.

A stored time is of one process on one day: two of the same code differ by the machine's noise, and
by its clock. What a side's own samples say of its unrest, and what the clocks explain, goes into
the interval that the verdict is taken from; where clocks differ plainly there is no verdict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chela_bench.bench import verdict
from chela_bench.bench.sources import Entry, Machine, Measured, alike
from chela_bench.bench.verdict import Evidence
from chela_bench.errors import BaselineProblem, RecordError
from chela_bench.verdicts import Change, Comparison

# Of stored runs where nobody measured it. fla-core 0.6.0's kernels, the same code, in 51 pairs of
# runs on different H100s (docs/results, 2026-11-25): half within 0.3 %, all within 1.4 %.
STORED_NOISE = 0.015
# Of rounds side by side. The same kernel against itself on one H100: 0.994 to 1.005.
LIVE_NOISE = 0.006
CPU_NOISE = 0.05  # a CPU that others use too
OTHER_CLOCK = 0.02  # SM or memory clocks that differ by more do not compare


@dataclass(frozen=True)
class Noise:
    """Relative change between runs of the same code: of a point where it was measured, else of
    any."""

    typical: float
    source: str
    by_key: Mapping[str, float] = dataclasses.field(default_factory=dict)
    hbm_by_key: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def of(self, entry: Entry) -> float:
        return self.by_key.get(_key(entry), self.typical)

    def of_bytes(self, entry: Entry) -> float:
        """Of bytes counted through HBM; 0 where that was not measured."""
        return self.hbm_by_key.get(_key(entry), 0.0)


def _key(entry: Entry) -> str:
    return entry.point.key if entry.point else entry.name


def assumed_noise(machine: Machine, *, live: bool = False) -> Noise:
    """Where `noise` was not run."""
    on_gpu = LIVE_NOISE if live else STORED_NOISE
    size = on_gpu if machine.device == "cuda" else CPU_NOISE
    return Noise(size, f"assumed {size * 100:g} %: not measured here, see `chela-bench noise`")


def compare(
    before: Measured, after: Measured, noise: Noise, *, across_machines: bool = False
) -> Comparison:
    """Raises BaselineProblem if the machines differ and `across_machines` is not given."""
    for side in (before, after):
        if side.kind == "static":
            raise RecordError(f"{side.label} holds no times; `gate` compares compiled kernels")
    refuse_other_machine(before, after, across_machines=across_machines)
    before, after = alike(before, after)
    shared = [name for name in before.entries if name in after.entries]
    rows = changes(
        [(before.entries[name], after.entries[name]) for name in shared],
        noise,
        relative_to_floor=across_machines,
        one_model=not {m.name for m in before.machines}.isdisjoint(m.name for m in after.machines),
    )
    return Comparison(
        mode="stored",
        before=before.side(),
        after=after.side(),
        across_machines=across_machines,
        noise=noise.typical,
        points=rows,
        missing=[name for name in before.entries if name not in after.entries],
        added=[name for name in after.entries if name not in before.entries],
        notes=[f"noise: {noise.source}", *differences(before, after)],
    )


def refuse_other_machine(before: Measured, after: Measured, *, across_machines: bool) -> None:
    then = {machine.identity for machine in before.machines}
    now = {machine.identity for machine in after.machines}
    if not across_machines and then.isdisjoint(now):
        raise BaselineProblem(
            f"times of one machine wanted; {before.label} is of {before.machine} and {after.label} "
            f"of {after.machine}; --across-machines compares multiples of each one's floor"
        )


def differences(before: Measured, after: Measured) -> list[str]:
    """What besides the code may have changed the times, a sentence each."""
    then, now = before.machine.versions(), after.machine.versions()
    found = [
        f"{name} was {then.get(name, 'unknown')} and is {now.get(name, 'unknown')}"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]
    sides = before.seed_and_inputs, after.seed_and_inputs
    if None not in sides and sides[0] != sides[1]:
        found.append(f"seed and inputs were {sides[0]} and are {sides[1]}")
    return found


def changes(
    pairs: Sequence[tuple[Entry, Entry]],
    noise: Noise,
    *,
    relative_to_floor: bool = False,
    one_model: bool = True,
) -> list[Change]:
    """A row a pair, in their order; verdicts corrected for the number of pairs. Another model of
    GPU has clocks of its own."""
    looked = [
        look(a, b, relative_to_floor=relative_to_floor, one_model=one_model) for a, b in pairs
    ]
    found = [evidence for evidence in looked if isinstance(evidence, Evidence)]
    sizes = [
        noise.of(b) for (_, b), one in zip(pairs, looked, strict=True) if isinstance(one, Evidence)
    ]
    judged = iter(zip(verdict.verdicts(found, noise=sizes), found, strict=True))
    rows = []
    for (a, b), one in zip(pairs, looked, strict=True):
        if isinstance(one, str):
            rows.append(
                Change(
                    name=a.name,
                    before_ns=time_of(a),
                    after_ns=time_of(b),
                    verdict="unclear",
                    reason=one,
                    wrong="wrong" in (a.outcome, b.outcome),
                )
            )
            continue
        (word, p), evidence = next(judged)
        row = row_of(a.name, evidence, p)
        refused = list(evidence.doubts)
        if row.low is None:
            refused.append(f"{row.samples} samples; {verdict.FEWEST} wanted")
        if one_model and _other_clocks(a, b):
            word = "unclear"
        if word == "unclear" and not refused:
            refused.append(f"between a change and noise of {noise.of(b):.1%}")
        reason = "; ".join(refused) or None
        rows.append(row.model_copy(update={"verdict": word, "reason": reason}))
    return rows


def row_of(name: str, evidence: Evidence, p: float) -> Change:
    """The figures of a row; its verdict is the caller's to set."""
    enough = evidence.count >= verdict.FEWEST
    return Change(
        name=name,
        before_ns=evidence.before_ns,
        after_ns=evidence.after_ns,
        ratio=evidence.ratio,
        low=evidence.low if enough else None,
        high=evidence.high if enough else None,
        p=p if enough else None,
        samples=evidence.count,
        verdict="unclear",
    )


def look(
    before: Entry,
    after: Entry,
    *,
    relative_to_floor: bool = False,
    same_card: bool = True,
    one_model: bool = True,
) -> Evidence | str:
    """The evidence of two stored entries, with its doubts and their size; or why there is none."""
    for side, when in ((before, "before"), (after, "after")):
        if side.outcome != "ok":
            reason = side.point.reason if side.point else ""
            return f"{when}: {side.outcome}: {reason}"
        if not side.samples_ns:
            return f"{when}: no samples are on record"
    if before.clock != after.clock:
        return f"timed by other means: {before.clock}, then {after.clock}"
    if same_card and not relative_to_floor and before.device != after.device:
        return f"measured on other cards: {before.device}, then {after.device}"
    samples = [before.samples_ns, after.samples_ns]
    if relative_to_floor:
        floors = [side.point.floor_ns if side.point else None for side in (before, after)]
        if floors[0] is None or floors[1] is None:
            return "no floor is known, and across machines only multiples of it compare"
        samples = [
            [ns / floor for ns in side]
            for side, floor in zip(samples, floors, strict=True)
            if floor
        ]
    evidence = verdict.unpaired(*samples)
    if relative_to_floor:
        evidence = dataclasses.replace(
            evidence, before_ns=time_of(before) or 0.0, after_ns=time_of(after) or 0.0
        )
    return _doubted(evidence, before, after, clocks(before, after) if one_model else [])


def _doubted(
    evidence: Evidence, before: Entry, after: Entry, known_clocks: Sequence[tuple[str, int, int]]
) -> Evidence:
    """With the slack that unrest and clocks give the ratio."""
    slack, doubts = 1.0, []
    for side, when in ((before, "before"), (after, "after")):
        for what, size in verdict.unrest(side.samples_ns):
            slack *= 1 + size
            doubts.append(f"{when}: its samples {what} {size:.1%}")
    for name, then, now in known_clocks:
        slack *= max(then, now) / min(then, now)
        if then != now:
            doubts.append(f"{name} clock was {then} MHz and is {now} MHz")
    return dataclasses.replace(evidence, slack=slack - 1, doubts=tuple(doubts))


def clocks(before: Entry, after: Entry) -> list[tuple[str, int, int]]:
    """(name, then, now) of the clocks that both sides know, MHz."""
    if before.point is None or after.point is None:
        return []
    then, now = before.point.telemetry, after.point.telemetry
    both = [
        ("SM", then.sm_clock_mhz, now.sm_clock_mhz),
        ("memory", then.mem_clock_mhz, now.mem_clock_mhz),
    ]
    return [(name, a, b) for name, a, b in both if a and b]


def _other_clocks(before: Entry, after: Entry) -> bool:
    return any(max(a, b) > (1 + OTHER_CLOCK) * min(a, b) for _, a, b in clocks(before, after))


def time_of(entry: Entry) -> float | None:
    if entry.point is not None:
        return None if entry.point.seconds is None else entry.point.seconds * 1e9
    return verdict.median_of(entry.samples_ns)
