"""Points in the order that people read: a group is one table or figure, a series one line in it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from chela_bench.records import DIRECTIONS, DTYPES, ConfigValue, Outcome, Point
from chela_bench.reports.text import plain

# Drawn beside an op for comparison, and always named as another function.
OTHER_FUNCTIONS = {"linear_attention": "softmax_attention", "chela_layer": "softmax_layer"}
# Configuration that chooses the function, not how it is computed: never in one table or figure.
FUNCTION_OPTIONS = frozenset({"order"})

_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Series:
    """One implementation over length; of several configurations, one of them."""

    impl: str
    config: Mapping[str, ConfigValue]  # only what tells it from its siblings
    points: tuple[Point, ...]  # one a length, ascending

    @property
    def label(self) -> str:
        values = [f"{name}={value}" for name, value in sorted(self.config.items())]
        return plain(" ".join([self.impl, *values]))

    @property
    def ok(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.outcome == "ok")

    @property
    def failed(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.outcome != "ok")

    def at(self, tokens: int) -> Point | None:
        return next((point for point in self.points if point.shape["T"] == tokens), None)

    @property
    def standing(self) -> tuple[int, float, str]:
        """Sorts the one that reaches furthest first, then the fastest there."""
        if not self.ok:
            return (0, 0.0, self.label)
        last = self.ok[-1]
        return (-last.shape["T"], last.seconds or 0.0, self.label)


@dataclass(frozen=True)
class Group:
    """Everything that belongs into one table or figure: it differs in T and implementation only."""

    op: str
    direction: str
    dtype: str
    dims: Mapping[str, ConfigValue]  # the shape without T, and the function's options
    series: tuple[Series, ...]  # in order of standing

    @property
    def title(self) -> str:
        return plain(" ".join([self.op, self.direction, self.dtype, _dims_label(self.dims)]))

    @property
    def slug(self) -> str:
        """Safe as a file name: `linear_attention-fwd-bf16-B1-H16-K128-V128`."""
        label = "-".join([self.op, self.direction, self.dtype, _dims_label(self.dims)])
        return re.sub(r"[^A-Za-z0-9._-]+", "_", label).strip("._-")[:180]

    def is_like(self, other: Group) -> bool:
        """Same op, direction, dtype and dims, whatever was measured."""
        mine = (self.op, self.direction, self.dtype, dict(self.dims))
        return mine == (other.op, other.direction, other.dtype, dict(other.dims))

    @cached_property
    def points(self) -> tuple[Point, ...]:
        return tuple(point for series in self.series for point in series.points)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sorted({point.shape["T"] for point in self.points}))

    @cached_property
    def _by_length(self) -> Mapping[int, list[Point]]:
        rows: dict[int, list[Point]] = defaultdict(list)
        for point in self.points:
            rows[point.shape["T"]].append(point)
        return rows

    @cached_property
    def is_layer(self) -> bool:
        return any(point.parameters is not None for point in self.points)

    def parameters(self, tokens: int) -> int | None:
        """That the layer learns: its own, as the floor."""
        return next((n for p in self._by_length[tokens] if (n := p.parameters) is not None), None)

    def flops(self, tokens: int) -> int | None:
        return next((n for p in self._by_length[tokens] if (n := p.flops) is not None), None)

    def floor_ns(self, tokens: int) -> int | None:
        """The floor belongs to the function and its shape: any implementation's record has it."""
        floors = [p.floor_ns for p in self._by_length[tokens] if p.floor_ns is not None]
        return min(floors, default=None)

    def compulsory_bytes(self, tokens: int) -> int | None:
        """Every input read once, every output written once: as the floor, the function's own."""
        sizes = [p.compulsory_bytes for p in self._by_length[tokens]]
        return min((size for size in sizes if size is not None), default=None)

    def fastest(self, tokens: int) -> Point | None:
        """The fastest correct one at this length, by kernel time where any has one."""
        ok = [point for point in self._by_length[tokens] if point.outcome == "ok"]
        timed = [p for p in ok if p.time_ns is not None] or ok
        return min(timed, key=lambda point: point.seconds or 0.0, default=None)


@dataclass(frozen=True)
class Failure:
    """Points that failed alike: same outcome, and reasons that differ in their numbers only."""

    outcome: Outcome
    reason: str
    where: tuple[tuple[str, tuple[int, ...]], ...]  # series label, lengths


def dims_of(point: Point) -> dict[str, ConfigValue]:
    """The shape without T, in one order for every report, and the function's options."""
    shape = {name: size for name, size in sorted(point.shape.items()) if name != "T"}
    options = {n: value for n, value in sorted(point.config.items()) if n in FUNCTION_OPTIONS}
    return {**shape, **options}


def _dims_label(dims: Mapping[str, ConfigValue]) -> str:
    """`B8-D1024-order=serial`."""
    return "-".join(f"{n}={v}" if n in FUNCTION_OPTIONS else f"{n}{v}" for n, v in dims.items())


def reading_order(point: Point) -> tuple[object, ...]:
    """Sorts by op, direction, dtype, implementation, other dims, T, configuration."""
    return (
        *_group_order(point)[:3],
        point.impl,
        *_group_order(point)[3:],
        point.shape["T"],
        _ordered(point.config),
    )


def _group_order(point: Point) -> tuple[object, ...]:
    return (
        point.op,
        DIRECTIONS.index(point.direction),
        DTYPES.index(point.dtype),
        _ordered(dims_of(point)),
    )


def _ordered(values: Mapping[str, ConfigValue]) -> tuple[tuple[str, str, ConfigValue], ...]:
    """Numbers in their order, text in its own, never compared with each other."""
    return tuple((name, type(value).__name__, value) for name, value in sorted(values.items()))


def groups(points: Iterable[Point]) -> list[Group]:
    """Points by op, direction, dtype and dims; of two with equal keys the later one stands."""
    latest = {point.key: point for point in points}
    together: dict[tuple[object, ...], list[Point]] = defaultdict(list)
    for point in sorted(latest.values(), key=_group_order):
        together[_group_order(point)].append(point)
    return [_group(members) for members in together.values()]


def named_groups(points: Iterable[Point]) -> dict[str, Group]:
    """Groups by a name of their own: the slug, with an underscore more where two share one."""
    named: dict[str, Group] = {}
    for group in groups(points):
        slug = group.slug
        while slug in named:
            slug += "_"
        named[slug] = group
    return named


def drawn_beside(group: Group, among: Iterable[Group]) -> Group | None:
    """The group of another function that this one's figures show too: of the same sizes, as far as
    it has them, and without what was skipped at every length, if anything was not."""
    op = OTHER_FUNCTIONS.get(group.op)
    for other in among:
        sizes = {name: size for name, size in group.dims.items() if name in other.dims}
        if op == other.op and other.is_like(replace(group, op=op, dims=sizes)):
            tried = tuple(s for s in other.series if any(p.outcome != "skipped" for p in s.points))
            return replace(other, series=tried or other.series)
    return None


def drawn_with(group: Group, among: Iterable[Group]) -> Group | None:
    """The group whose figures show this one, as another function."""
    return next((each for each in among if drawn_beside(each, [group]) is not None), None)


def _group(members: list[Point]) -> Group:
    any_of = members[0]
    return Group(any_of.op, any_of.direction, any_of.dtype, dims_of(any_of), _series(members))


def _series(points: list[Point]) -> tuple[Series, ...]:
    """One series an implementation; one a configuration where a length was run with several."""
    by_impl: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(points, key=reading_order):
        by_impl[point.impl].append(point)
    found: list[Series] = []
    for impl, members in by_impl.items():
        lines: dict[str, list[Point]] = defaultdict(list)
        alone = len({point.shape["T"] for point in members}) == len(members)
        for point in members:
            lines["" if alone else repr(sorted(point.config.items()))].append(point)
        names = {name for point in members for name in point.config}
        telling = {n for n in names if len({repr(p.config.get(n)) for p in members}) > 1}
        for line in lines.values():
            config = {n: v for n, v in line[0].config.items() if n in telling and not alone}
            found.append(Series(impl, config, tuple(line)))
    return tuple(sorted(found, key=lambda series: series.standing))


def failures(group: Group) -> list[Failure]:
    """The group's failed points; `estimated 8 s` and `estimated 89 s` become `8 to 89 s`."""
    alike: dict[tuple[Outcome, str], list[tuple[str, Point]]] = defaultdict(list)
    for series in group.series:
        for point in series.failed:
            alike[(point.outcome, _NUMBER.sub("#", _bare_reason(point)))].append(
                (series.label, point)
            )
    result = []
    for (outcome, _), members in alike.items():
        where: dict[str, list[int]] = defaultdict(list)
        for label, point in members:
            where[label].append(point.shape["T"])
        result.append(
            Failure(
                outcome,
                _merged([_bare_reason(point) for _, point in members]),
                tuple((label, tuple(tokens)) for label, tokens in where.items()),
            )
        )
    return result


def _bare_reason(point: Point) -> str:
    return plain(point.reason or "").removeprefix(f"{point.outcome}: ")


def _merged(reasons: list[str]) -> str:
    """One sentence for reasons that differ in their numbers only: each number, or its range."""
    columns = iter(zip(*(_NUMBER.findall(reason) for reason in reasons), strict=True))

    def number(_: re.Match[str]) -> str:
        values = sorted(set(next(columns)), key=float)
        return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"

    return _NUMBER.sub(number, reasons[0])
