"""Two sides measured in turns, as `compare --live` and `gate --live` choose them."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chela_bench.bench import live, plan
from chela_bench.bench.cases import Case
from chela_bench.bench.comparing import Noise
from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.live import Failed, Lack, Pair, Seat
from chela_bench.bench.load import sha256_of_files
from chela_bench.bench.noise import noise_of
from chela_bench.bench.plan import Flags, Settings
from chela_bench.bench.registry import all_ops
from chela_bench.bench.runner import PACKAGE_ROOT
from chela_bench.errors import UsageError
from chela_bench.profiles.machine import choose_device
from chela_bench.records import shape_label

Points = dict[str, tuple[Case, str | None]]  # by name; and why one cannot run here


@dataclass(frozen=True)
class TwoSides:
    """Both seats taken, and the points that they are to measure."""

    before: Seat
    after: Seat
    pairs: list[Pair]
    noise: Noise
    notes: list[str]
    gone: list[str]

    @property
    def timed(self) -> list[Pair]:
        """Those that both sides can run."""
        return [pair for pair in self.pairs if pair.lacks == (None, None)]


@contextlib.contextmanager
def two_sides(given: dict[str, Any], flags: Flags, labels: tuple[str, str]) -> Iterator[TwoSides]:
    """Two implementations, or two revisions of the package. `given` are the command's options."""
    path = find_config(given["config"])
    config = load_config(path)
    device = choose_device(given["device"])
    impls = all(map(_is_implementation, labels))
    if impls and flags.impls:
        raise UsageError(f"--live {' '.join(labels)} are the implementations: no --impl")
    chosen = dataclasses.replace(flags, impls=labels) if impls else flags
    settings = plan.resolve(config, chosen, [device])
    with tempfile.TemporaryDirectory(prefix="chela-bench-") as folder:
        with live.checkouts((".", ".") if impls else labels) as roots:
            theirs = [_as_in(root, settings) for root in roots]
            sessions = [each.sessions()[0] for each in theirs]
            with live.seats(sessions, Path(folder), roots) as (before, after):
                notes: list[str] = []
                if impls:
                    points = [_points_of(settings, label) for label in labels]
                else:
                    points = [
                        _asked(seat, each, label, notes, every_impl=not flags.impls)
                        for seat, each, label in zip((before, after), theirs, labels, strict=True)
                    ]
                pairs = _paired(points, labels)
                if all(None not in pair.lacks for pair in pairs):
                    raise UsageError("nothing of what is selected can run here")
                noise = noise_of(given["baselines"], after.machine, live=True)
                gone = [] if impls else _gone(path, roots, flags, settings, notes)
                yield TwoSides(before, after, pairs, noise, notes, gone)


def _is_implementation(name: str) -> bool:
    return ".py:" in name or any(name == impl.name for op in all_ops() for impl in op.impls)


def _as_in(root: str, settings: Settings) -> Settings:
    """With a user's files as the checkout in `root` has them, those that it has."""
    if root == PACKAGE_ROOT:
        return settings
    targets = {name: live.there(target, root) for name, target in settings.user_impls.items()}
    kept = {name: target for name, target in targets.items() if target is not None}
    lost = targets.keys() - kept.keys()
    impls = {op: [n for n in names if n not in lost] for op, names in settings.impls.items()}
    changes = {"impls": impls, "user_impls": kept, "user_files_sha256": sha256_of_files(kept)}
    return settings.model_copy(update=changes)


def _asked(
    seat: Seat, settings: Settings, label: str, notes: list[str], *, every_impl: bool
) -> Points:
    """What a side's own revision has; of one that cannot say, what this one would have, and a
    note."""
    try:
        found = seat.planned(settings, every_impl=every_impl)
    except Failed:
        if label == ".":
            raise
        notes.append(f"{label} is too old to say what it has: what is gone since is not looked for")
        found = plan.planned(settings)
    return {case.key: (case, why_not) for case, why_not in found}


def _points_of(settings: Settings, label: str) -> Points:
    """Those of an implementation, by what is common to several."""
    name = label
    if ".py:" in label:  # what a user's file is called in the plan
        target = plan.user_target(label)
        name = next(name for name, each in settings.user_impls.items() if each == target)
    points: Points = {}
    for case, why_not in plan.planned(settings):
        if case.impl == name:
            words = [f"{k}={v}" for k, v in sorted(case.config.items())]
            point = [case.op, case.direction, case.dtype, shape_label(case.shape), *words]
            points["/".join(point)] = case, why_not
    return points


def _gone(
    path: Path, roots: Sequence[str], flags: Flags, settings: Settings, notes: list[str]
) -> list[str]:
    """Ops, and shapes of ops, that the first side's bench.toml sweeps by itself and the second's no
    more: of them no point is planned. None where the file is no revision's own."""
    files = [path if root == PACKAGE_ROOT else live.inside(path.resolve(), root) for root in roots]
    try:
        (old_ops, old), (ops, now) = (
            _swept(file, settings.preset) if file else ([], {}) for file in files
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # of another schema
        notes.append(f"{path.name} of a revision cannot be read: ops gone since are not looked for")
        return []
    lost = [] if flags.ops or flags.impls else [op for op in old_ops if op not in ops]
    for op in [] if flags.shapes else settings.impls:
        shapes = old.get(op, [])
        lost += [f"{op}/{shape}" for shape in shapes if shape not in now.get(op, [])]
    return lost


def _swept(file: Path, preset: str | None) -> tuple[list[str], dict[str, list[str]]]:
    """The ops that a bench.toml sweeps, and which of its shapes of each op: unchecked, since of
    another revision's ops nothing is known here."""
    found = tomllib.loads(file.read_text())
    sweep = found["sweep"] | found.get("presets", {}).get(preset, {}).get("sweep", {})
    shapes = {
        op: [x for x in sweep["shapes"] if x in known] for op, known in found["shapes"].items()
    }
    return sweep["ops"], shapes


def _paired(sides: Sequence[Points], labels: Sequence[str]) -> list[Pair]:
    """What either side has, in the first one's order."""
    pairs = []
    sides = [sides[0], _named_as(*sides)]
    for name in dict.fromkeys(name for side in sides for name in side):
        cases = [side[name][0] for side in sides if name in side]
        before, after = (
            _lack(side.get(name), label) for side, label in zip(sides, labels, strict=True)
        )
        pairs.append(Pair(name, cases[0], cases[-1], (before, after)))
    return pairs


def _named_as(before: Points, after: Points) -> Points:
    """`after`, with a point named as in `before` where only an option that one side does not know
    tells them apart."""
    loose = [name for name in before if name not in after]
    matches = {
        name: [one for one in loose if _one_point(before[one][0], case)]
        for name, (case, _) in after.items() if name not in before
    }  # fmt: skip
    told = [one for found in matches.values() for one in found]
    names = {
        name: found[0] for name, found in matches.items()
        if len(found) == 1 and told.count(found[0]) == 1
    }  # fmt: skip
    return {names.get(name, name): found for name, found in after.items()}


def _one_point(one: Case, other: Case) -> bool:
    """Whether they differ in nothing but options that one of them does not know."""
    a, b = one.config, other.config
    shared = a.keys() & b.keys()
    known = shared in (a.keys(), b.keys()) and all(a[name] == b[name] for name in shared)
    return known and one.model_copy(update={"config": b}) == other


def _lack(found: tuple[Case, str | None] | None, label: str) -> Lack:
    if found is None:
        return "missing", f"{'the tree as it stands' if label == '.' else label} has no such point"
    return None if found[1] is None else ("skipped", found[1])
