"""A gate's checks for a terminal, as JUnit XML, and as Markdown for a job's summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from chela_bench.reports.markdown import escaped, table
from chela_bench.reports.text import duration, memory, plain
from chela_bench.verdicts import Check, Gating, Outcome

TITLE = "chela-bench gate"
STATIC = "static"  # a Gating's machine where nothing ran
_SAID: tuple[Outcome, ...] = ("wrong", "failed", "unclear", "unchecked", "new", "better")
_STYLES = {"wrong": "bold red", "failed": "red", "unclear": "yellow", "better": "green"}
_ENDINGS = {
    0: "passed",
    1: "FAILED",
    3: "FAILED: a result is wrong",
    5: "UNCLEAR: some times cannot be decided",
}


def terminal(gating: Gating) -> RenderableType:
    """Everything but what passed, worst first; then counts and the decision."""
    return _Terminal(gating)


class _Terminal:
    def __init__(self, gating: Gating) -> None:
        self.gating = gating

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in about(self.gating):
            yield Text(line, "dim", overflow="fold")
        yield Text()
        for check in _loud(self.gating.points):
            head = Text(overflow="fold")
            head.append(f"{check.outcome:<10}", _STYLES.get(check.outcome, ""))
            head.append(check.figure)
            yield head
            yield Text(f"  {plain(check.name)}", overflow="fold")
            yield Text(f"  {plain(check.reason or '')}", "dim", overflow="fold")
        for note in self.gating.notes:
            yield Text(plain(note), "dim", overflow="fold")
        yield Text(decision(self.gating), "bold", overflow="fold")


def about(gating: Gating) -> list[str]:
    lines = [f"baseline: {gating.baseline}"]
    if gating.machine == STATIC:
        lines += [f"candidate: {gating.candidate}, compiled; nothing ran", "allowed: no change"]
    else:
        noise = f"noise {gating.noise * 100:.2g} % ({gating.noise_source})"
        lines += [
            f"candidate: {gating.candidate} on {gating.machine}",
            f"allowed: {gating.limit}; {noise}",
        ]
    return [plain(line) for line in lines]


def decision(gating: Gating) -> str:
    """`FAILED: 41 checks of 12 benchmarks: 1 failed, 40 passed`."""
    counts = Counter(check.outcome for check in gating.points)
    names = {check.name for check in gating.points}
    each = ", ".join(f"{counts[o]} {o}" for o in (*_SAID, "passed") if counts[o])
    ending = _ENDINGS[gating.exit_code]
    if set(counts) <= {"unchecked"}:
        ending = "UNCLEAR: nothing could be checked"
    checks, benchmarks = _count(len(gating.points), "check"), _count(len(names), "benchmark")
    return f"{ending}: {checks} of {benchmarks}" + (f": {each}" if each else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def markdown(gating: Gating) -> str:
    """For a job's summary page."""
    rows = [
        [
            f"**{check.outcome}**" if check.outcome in ("wrong", "failed") else check.outcome,
            escaped(check.name),
            escaped(check.figure),
            escaped(check.reason or ""),
            escaped(shown(check, check.before)),
            escaped(shown(check, check.after)),
        ]
        for check in _loud(gating.points)
    ]
    parts = [f"## chela-bench gate: {escaped(decision(gating))}"]
    parts.append("\n".join(f"- {escaped(line)}" for line in about(gating)))
    if rows:
        header = ["", "benchmark", "figure", "why", "before", "now"]
        parts.append(table(header, rows, left=4))
    if gating.notes:
        parts.append("\n".join(f"- {escaped(note)}" for note in gating.notes))
    return "\n\n".join(parts) + "\n"


def junit(gating: Gating) -> str:
    """JUnit XML: a test case a check. What failed or is wrong is a failure, what is unclear an
    error, what is new or could not be checked skipped."""
    counts = Counter(check.outcome for check in gating.points)
    skipped = counts["new"] + counts["unchecked"]
    numbers = {
        "tests": str(len(gating.points)),
        "failures": str(counts["failed"] + counts["wrong"]),
        "errors": str(counts["unclear"]),
        "skipped": str(skipped),
    }
    suites = ElementTree.Element("testsuites", {"name": TITLE, **numbers})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": TITLE, **numbers})
    properties = ElementTree.SubElement(suite, "properties")
    for name in ("baseline", "candidate", "machine", "limit", "noise_source"):
        ElementTree.SubElement(
            properties, "property", name=name, value=plain(str(getattr(gating, name)))
        )
    for check in gating.points:
        case = ElementTree.SubElement(
            suite, "testcase", classname=plain(check.name), name=plain(check.figure)
        )
        for tag in _junit_tags(check):
            reason = plain(check.reason or check.outcome)
            about_it = {"message": reason} | ({} if tag == "skipped" else {"type": check.outcome})
            ElementTree.SubElement(case, tag, about_it)
    ElementTree.indent(suites)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        + ElementTree.tostring(suites, encoding="unicode")
        + "\n"
    )


def _junit_tags(check: Check) -> Iterator[str]:
    if check.outcome in ("failed", "wrong"):
        yield "failure"
    elif check.outcome == "unclear":
        yield "error"
    elif check.outcome in ("new", "unchecked"):
        yield "skipped"


def shown(check: Check, value: float | str | bool | None) -> str:
    """A figure with its unit."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if check.figure == "time":
        return duration(value)
    if check.figure.endswith("bytes"):
        return memory(value)
    return f"{value:.6g}"


def _loud(checks: Sequence[Check]) -> list[Check]:
    return [check for check in checks if check.outcome != "passed"]
