"""What `compare` and `gate` write and the reports read: changes of time, and checks of figures."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["faster", "slower", "same", "unclear"]
Outcome = Literal["passed", "failed", "wrong", "unclear", "better", "new", "unchecked"]
Mode = Literal["stored", "live"]


class _Record(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Change(_Record):
    """One point's time before and after."""

    name: str
    """The benchmark: a point's key, or a pytest test's full name."""
    before_ns: float | None = None
    """Median before, nanoseconds. Null: it has no time on that side."""
    after_ns: float | None = None
    """Median after, nanoseconds. Null: it has no time on that side."""
    ratio: float | None = None
    """After over before; live, the median over paired rounds; across machines, of multiples of the
    floor. Null: not compared."""
    low: float | None = None
    """Lower end of the ratio's 95 % interval. Null: not compared, or too few samples."""
    high: float | None = None
    """Upper end of the ratio's 95 % interval. Null: as low."""
    p: float | None = None
    """Chance of a change as clear as this one were there none, corrected for the number of points
    (Benjamini-Hochberg). Null: not compared, or too few samples."""
    samples: int = 0
    """Live: paired rounds; stored: time samples of the side that has fewer, of more than 31 their
    31 blocks of neighbours."""
    verdict: Verdict
    """faster, slower, same (within noise), or unclear."""
    reason: str | None = None
    """Why the verdict is unclear, or what it leaves out. Null: nothing to add."""
    wrong: bool = False
    """Whether a side's result was not right; then it has no time."""


class Side(_Record):
    """What one side of a comparison is."""

    label: str
    """As the command line named it."""
    machine: str
    """GPU's name and UUID, or the CPU's name."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of torch, triton and driver, by name."""


class Comparison(_Record):
    """Two sets of times, point by point."""

    mode: Mode
    """stored: two records; live: measured now, in turns."""
    before: Side
    """The first side."""
    after: Side
    """The second side."""
    across_machines: bool = False
    """Whether ratios are of multiples of each machine's own floor."""
    noise: float
    """Relative change that the machine shows between runs of the same code."""
    points: list[Change]
    """A row a benchmark that both sides have."""
    missing: list[str] = Field(default_factory=list)
    """Benchmarks that only the first side has."""
    added: list[str] = Field(default_factory=list)
    """Benchmarks that only the second side has."""
    notes: list[str] = Field(default_factory=list)
    """What else differs between the sides, one sentence each."""


class Check(_Record):
    """One figure of one benchmark, held against the baseline or a budget."""

    name: str
    """The benchmark: a point's key, a pytest test's full name, or kernel, config and arch."""
    figure: str
    """`time`, `outcome`, or the name of an exact figure (`smem_bytes`) or budget (`max_ms`)."""
    outcome: Outcome
    """passed; failed; wrong (a result that is not right); unclear; better (an exact figure that
    improved); new (not in the baseline); unchecked (it has no figure: as before it has no
    result, or a budget's figure was not measured)."""
    before: float | str | bool | None = None
    """The baseline's figure, or the budget's limit; times in nanoseconds. Null: it has none."""
    after: float | str | bool | None = None
    """The figure now. Null: there is none."""
    change: Change | None = None
    """Of times, ratio and interval. Null: another figure."""
    reason: str | None = None
    """What is wrong, or why it is unclear. Null: passed."""


class Gating(_Record):
    """All checks of one gate."""

    baseline: str
    """Which baseline."""
    candidate: str
    """What was held against it."""
    machine: str
    """GPU's name and UUID, the CPU's name, or `static` where nothing ran."""
    limit: str
    """Change of time that is allowed, as `5%,2us`."""
    noise: float
    """Relative change between runs of the same code that is allowed besides."""
    noise_source: str
    """Where the noise was measured, or that it was not."""
    points: list[Check]
    """A row a check, worst first."""
    notes: list[str] = Field(default_factory=list)
    """One sentence each."""

    @property
    def exit_code(self) -> int:
        """3 if a result is wrong, 1 if a check failed, 5 if one is unclear or none could be made,
        else 0."""
        outcomes = {check.outcome for check in self.points}
        if "wrong" in outcomes:
            return 3
        if "failed" in outcomes:
            return 1
        return 5 if "unclear" in outcomes or outcomes <= {"unchecked"} else 0


def document(record: Comparison | Gating) -> str:
    """The `--json` document."""
    return json.dumps(record.model_dump(mode="json"), indent=2)
