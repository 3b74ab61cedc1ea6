"""Two sides measured in turns, as `compare --live` and `gate --live` choose them."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chela_bench.bench import live, plan
from chela_bench.bench.cases import Case
from chela_bench.bench.comparing import Noise
from chela_bench.bench.config import Config, find_config, load_config
from chela_bench.bench.live import Pair, Seat
from chela_bench.bench.noise import noise_of
from chela_bench.bench.plan import Flags, Settings
from chela_bench.bench.registry import all_ops
from chela_bench.errors import UsageError
from chela_bench.profiles.machine import choose_device
from chela_bench.records import shape_label


@dataclass(frozen=True)
class TwoSides:
    """Both seats taken, and the points that they are to measure."""

    before: Seat
    after: Seat
    pairs: list[Pair]
    noise: Noise


@contextlib.contextmanager
def two_sides(given: dict[str, Any], flags: Flags, labels: tuple[str, str]) -> Iterator[TwoSides]:
    """Two implementations, or two revisions of the package. `given` are the command's options."""
    config = load_config(find_config(given["config"]))
    device = choose_device(given["device"])
    revisions = labels
    if all(map(_is_implementation, labels)):
        if flags.impls:
            raise UsageError(f"--live {' '.join(labels)} are the implementations: no --impl")
        settings, pairs = _pairs_of_impls(config, flags, device, labels)
        revisions = (".", ".")
    else:
        settings = plan.resolve(config, flags, [device])
        pairs = [Pair(case.key, case, case) for case in plan.runnable(settings)]
    if not pairs:
        raise UsageError("nothing of what is selected can run here on both sides")
    with tempfile.TemporaryDirectory(prefix="chela-bench-") as folder:
        with live.checkouts(revisions) as (first, second):
            session = settings.sessions()[0]
            with live.seats(session, Path(folder), (first, second)) as (before, after):
                noise = noise_of(given["baselines"], after.machine, live=True)
                yield TwoSides(before, after, pairs, noise)


def _is_implementation(name: str) -> bool:
    return ".py:" in name or any(name == impl.name for op in all_ops() for impl in op.impls)


def _pairs_of_impls(
    config: Config, flags: Flags, device: str, labels: tuple[str, str]
) -> tuple[Settings, list[Pair]]:
    settings = plan.resolve(config, dataclasses.replace(flags, impls=labels), [device])
    names = [_resolved(settings, label) for label in labels]
    sides: list[dict[tuple[str, ...], Case]] = [{}, {}]
    for case in plan.runnable(settings):
        point = (case.op, case.direction, case.dtype, shape_label(case.shape))
        for side, name in zip(sides, names, strict=True):
            if case.impl == name:
                config_words = [f"{k}={v}" for k, v in sorted(case.config.items())]
                side[*point, *config_words] = case
    return settings, [
        Pair("/".join(point), case, sides[1][point])
        for point, case in sides[0].items()
        if point in sides[1]
    ]


def _resolved(settings: Settings, label: str) -> str:
    """The name that a user's file has in the plan."""
    if ".py:" not in label:
        return label
    target = plan.user_target(label)
    return next(name for name, each in settings.user_impls.items() if each == target)
