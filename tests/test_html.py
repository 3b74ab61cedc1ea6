"""The HTML page: whole, self-contained, and safe whatever the records say."""

from __future__ import annotations

import itertools
import re
from base64 import b64decode, b64encode
from collections import defaultdict
from dataclasses import dataclass, field
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from chela_bench.cli import cli, derived
from chela_bench.records import Hbm, Point, Run
from chela_bench.reports.figures import figures, render
from chela_bench.reports.groups import named_groups
from chela_bench.reports.html import page
from chela_bench.reports.text import lengths
from tests.factories import (
    HOSTILE,
    LENGTHS,
    SWEEPS,
    all_failed,
    block_sizes,
    cpu_sweep,
    h100_sweep,
    make_cpu_run,
    make_failure,
    make_point,
    make_run,
    sweeps,
)
from tests.running import ROOT

BREAKS_OUT = "\"><img src=x onerror=alert(1)><!-- ' --></script></style></title>"
VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'

KINDS = ("time", "floor", "memory", "hbm", "roofline", "error")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    inside: list[Element] = field(default_factory=list)

    def all(self, *tags: str) -> list[Element]:
        """Descendants of these tags, in the order of the page."""
        own = [self] if self.tag in tags else []
        return own + [found for child in self.inside for found in child.all(*tags)]

    @property
    def words(self) -> str:
        return self.text + "".join(child.words for child in self.inside)

    @property
    def cells(self) -> list[str]:
        return [cell.words for cell in self.all("td", "th")]


class Tree(HTMLParser):
    """The page as elements; a tag that is not closed where it should be is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} names an attribute twice"
        element = Element(tag, dict(attrs))
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def tree(text: str) -> Element:
    parser = Tree()
    parser.feed(text)
    parser.close()
    assert parser.open == [parser.root], "a tag is left open"
    return parser.root


def made(run: Run, points: list[Point]) -> str:
    """The page with a stand-in for every figure that could be there."""
    kinds = ("time", "floor", "hbm", "memory", "error")
    return page(run, points, {f"{s}-{kind}": SVG for s in named_groups(points) for kind in kinds})


def rows_of(table: Element) -> list[list[str]]:
    return [row.cells for row in table.all("tbody")[0].all("tr")]


def tables(root: Element, kind: str) -> list[Element]:
    return [table for table in root.all("table") if table.attributes.get("class") == kind]


EVERYTHING = {**SWEEPS, "no points": (make_run(planned_points=9), [])}
pages = pytest.mark.parametrize(("run", "points"), EVERYTHING.values(), ids=EVERYTHING)


@pages
def test_the_page_is_well_formed(run: Run, points: list[Point]) -> None:
    root = tree(made(run, points))
    ids = [e.attributes["id"] for e in all_elements(root) if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for link in root.all("a"):
        target = link.attributes["href"] or ""
        assert target.startswith("#")
        assert target[1:] in ids
        assert link.words.strip()
    for labelled in root.all("section"):
        assert labelled.attributes["aria-labelledby"] in ids
    assert all(image.attributes["alt"] for image in root.all("img"))
    levels = [int(e.tag[1]) for e in root.all("h1", "h2", "h3")]
    assert levels.count(1) == 1 and all(b <= a + 1 for a, b in itertools.pairwise([0, *levels]))
    assert root.all("html")[0].attributes["lang"] == "en"
    for table in root.all("table"):
        assert table.inside[0].tag == "caption"
        assert all(head.attributes.get("scope") in ("row", "col") for head in table.all("th"))
        assert len({len(row.cells) for row in table.all("tr")}) == 1
    scrolled = [e for e in all_elements(root) if "tabindex" in e.attributes]
    assert all(e.attributes["aria-label"] for e in scrolled)


def all_elements(root: Element) -> list[Element]:
    return [root, *(found for child in root.inside for found in all_elements(child))]


@pages
def test_nothing_is_fetched(run: Run, points: list[Point]) -> None:
    text = made(run, points)
    root = tree(text)
    for element in all_elements(root):
        for name in ("src", "href", "srcset", "action", "data", "poster", "background"):
            value = element.attributes.get(name) or ""
            assert not value or value.startswith(("#", "data:")), f"{element.tag} {name}={value}"
    style, script = root.all("style")[0].words, root.all("script")[0].words
    assert not re.search(r"url\(|@import|//", style)
    assert not re.search(r"https?:|fetch|XMLHttp|import", script)
    (policy,) = [m for m in root.all("meta") if "http-equiv" in m.attributes]
    allowed = dict(
        part.strip().split(" ", 1) for part in str(policy.attributes["content"]).split(";")
    )
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert allowed == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


@pages
def test_the_page_depends_on_the_records_alone(run: Run, points: list[Point]) -> None:
    assert made(run, points) == made(run, points) == made(run, points[::-1])


@pytest.mark.parametrize("text", [HOSTILE, BREAKS_OUT])
def test_other_peoples_text_is_text(text: str) -> None:
    run = make_run(
        run_id=text, argv=["chela-bench", text], versions={"torch": text}, inputs=text, git_sha=text
    )
    points = [
        make_point(impl=text, op=text, null_reasons={text: text}, hbm=Hbm(model_bytes=1)),
        make_point(impl=text, config={text: text}),
        make_point(impl=text, config={text: 2}),
        make_failure("crash", text, 2048, impl=text),
    ]
    content = made(run, points)
    root = tree(content)
    assert "<script>alert" not in content
    assert content.count("<script") == content.count("<style") == content.count("<title") == 1
    for element in all_elements(root):
        assert not [name for name in element.attributes if name.startswith("on")]
    sources = [str(image.attributes["src"]) for image in root.all("img")]
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", content)
    (failure,) = rows_of(tables(root, "failures")[0])
    assert failure[3] == " ".join(re.sub(r"\x1b\[31m|\x1b\[0m|\x07|\u202e", "", text).split())


def test_the_figures_are_the_files() -> None:
    run, points = make_run(), h100_sweep()
    svgs = {name: render(figure, "svg") for name, figure in figures(run, points).items()}
    assert len(svgs) == 6
    text = page(run, points, svgs)
    images = tree(text).all("img")
    drawn = [b64decode(str(i.attributes["src"]).partition("base64,")[2]) for i in images]
    slug = "linear_attention-fwd-bf16-B1-H16-K128-V128"
    assert drawn == [svgs[f"{slug}-{kind}"] for kind in KINDS]
    assert all("triton_chunked" in str(image.attributes["alt"]) for image in images)
    roofline = len(b64encode(svgs[f"{slug}-roofline"]))
    assert len(text) - roofline < 300_000  # a full sweep has about ten times as many figures


def test_a_row_of_the_table() -> None:
    table = tables(tree(made(make_run(), h100_sweep())), "points")[0]
    assert table.all("thead")[0].cells == [
        "T", "implementation", "outcome", "time ms", "quartiles ms", "samples", "x floor",
        "tokens/s", "GB/s", "TFLOP/s", "peak MiB", "HBM MiB", "host us", "error / budget",
    ]  # fmt: skip
    (row,) = [r for r in rows_of(table) if r[:2] == ["64k", "triton_chunked"]]
    assert row == [
        "64k", "triton_chunked", "ok", "0.512", "0.506\N{EN DASH}0.522", "40", "1.44", "128M",
        "2099", "134", "256", "1024 (model)", "182", "1.7e-03 / 8.0e-03",
    ]  # fmt: skip
    bold = [cell.words for cell in table.all("strong")]
    assert len(bold) == 7
    assert bold[-1] == "0.512"


def test_the_summary_names_the_next_implementation_and_its_multiple() -> None:
    points = h100_sweep()
    ours, theirs = (
        next(p.seconds for p in points if (p.impl, p.shape["T"]) == (impl, 65536))
        for impl in ("triton_chunked", "fla_chunk")
    )
    row, _ = rows_of(tables(tree(made(make_run(), points)), "best")[0])
    assert row[5] == "fla_chunk" and float(row[6]) == pytest.approx(theirs / ours, rel=0.01)

    later = [p for p in points if p.impl != "fla_chunk" or p.shape["T"] < 65536]
    row, _ = rows_of(tables(tree(made(make_run(), later)), "best")[0])
    assert row[5] == "compiled_chunked" and float(row[6]) > theirs / ours


def test_what_to_sort_by_is_the_number() -> None:
    table = tables(tree(made(make_run(), h100_sweep())), "points")[0]
    for row in table.all("tbody")[0].all("tr"):
        for cell in row.all("td"):
            if "data-value" in cell.attributes:
                float(str(cell.attributes["data-value"]))
            else:
                assert cell.words in ("", "ok", "oom", "skipped")


def test_a_failure_has_a_row_and_a_reason_and_no_number() -> None:
    content = made(make_run(), all_failed())
    root = tree(content)
    for row in rows_of(tables(root, "points")[0]):
        assert row[2] in ("skipped", "oom", "wrong")
        assert row[3:] == [""] * 11
    failed = rows_of(tables(root, "failures")[0])
    title = "linear_attention fwd bf16 B1-H16-K128-V128"
    assert [row[:3] for row in failed] == [
        ["1k..64k", impl, outcome]
        for impl, outcome in (("chunked", "oom"), ("fla_chunk", "skipped"), ("quadratic", "wrong"))
    ]
    assert ["1k..64k", "chunked", "oom", "CUDA out of memory", title] in failed
    assert "0.75" not in content
    assert "777" not in content
    assert "<img" not in content
    assert "nothing succeeded" in content


def test_an_outcome_leads_to_its_reason() -> None:
    root = tree(made(make_run(), h100_sweep()))
    reasons = {row.attributes["id"]: row.cells for row in tables(root, "failures")[0].all("tr")[1:]}
    led: dict[str, list[int]] = defaultdict(list)
    for row in tables(root, "points")[0].all("tbody")[0].all("tr"):
        for link in row.all("a"):
            target = str(link.attributes["href"])[1:]
            assert row.cells[1:3] == reasons[target][1:3]
            led[target].append(int(str(row.all("td")[0].attributes["data-value"])))
    assert {id_: lengths(tokens, LENGTHS) for id_, tokens in led.items()} == {
        id_: row[0] for id_, row in reasons.items()
    }
    assert sum(map(len, led.values())) == 6
    assert ["16k..64k", "recurrent", "skipped"] in [row[:3] for row in reasons.values()]


def test_the_top_names_the_fastest_at_the_longest_length() -> None:
    root = tree(made(make_run(planned_points=60), h100_sweep()))
    assert "56 points of 60 planned: 50 ok, 3 oom, 3 skipped, on NVIDIA H100" in root.words
    assert rows_of(root.all("nav")[0].all("table")[0]) == [
        [
            "linear_attention fwd bf16 B1-H16-K128-V128",
            "64k",
            "triton_chunked",
            "512 us",
            "1.44",
            "fla_chunk",
            "2.05",
        ],
        [
            "softmax_attention fwd bf16 B1-H16-K128-V128",
            "64k",
            "sdpa_flash",
            "51.2 ms",
            "144",
            "",
            "",
        ],
    ]


def test_the_fastest_is_named_where_something_succeeded() -> None:
    points = [make_point(1024, floor_ns=10**6), make_failure("oom", "no memory", 2048)]
    nav = tree(made(make_run(), points)).all("nav")[0]
    assert rows_of(nav.all("table")[0])[0][1:] == ["1k", "chunked", "1.00 ms", "1.00", "", ""]


def test_provenance() -> None:
    run = make_run(source_sha256="ab" * 32)
    facts = dict(row for row in rows_of(tables(tree(made(run, h100_sweep())), "facts")[0]))
    assert facts == {
        "Machine": "NVIDIA H100 80GB HBM3",
        "System": "Linux 6.8, 16 CPU threads",
        "Versions": "torch 2.11.0, triton 3.6.0, python 3.11.9, driver 580.95, CUDA 13.0",
        "Copy bandwidth": "3020 GB/s",
        "Matmul rate": "bf16 716 TFLOP/s",
        "Clocks": "SM 1980 MHz while timing",
        "Throttling": "none at any of 39 points",
        "Power limit": "700 W",
        "Timing": "event timer, cold L2",
        "Inputs": "randn; k, v with mean 1, seed 0",
        "Started": "2026-01-02T03:04:05Z",
        "Finished": "2026-01-02T03:34:05Z",
        "Source": "0123456789ab",
        "Package": "sha256 abababababab",
        "Command": "chela-bench sweep --lens 1k..64k",
    }


def test_another_function_is_shown_where_it_is_drawn() -> None:
    run, points = make_run(), h100_sweep()
    svgs = dict.fromkeys(figures(run, points), SVG)
    softmax = tree(page(run, points, svgs)).all("section")[1]
    assert softmax.all("h2")[0].words.startswith("softmax_attention")
    assert not softmax.all("img")
    links = [link.attributes["href"] for link in softmax.all("a")]
    assert links[0] == "#linear_attention-fwd-bf16-B1-H16-K128-V128"
    assert "Another function than linear_attention" in softmax.words


@pytest.mark.parametrize(
    ("run", "ops", "heading"),
    [
        (make_run(), ["gate"], "gate on NVIDIA H100 80GB HBM3, 2026-01-02"),
        (make_run(), list("dcba"), "a, b, c and d on NVIDIA H100 80GB HBM3, 2026-01-02"),
        (make_run(), list("edcba"), "a, b, c and 2 more on NVIDIA H100 80GB HBM3, 2026-01-02"),
        (make_run(), [], "nothing on NVIDIA H100 80GB HBM3, 2026-01-02"),
        (make_cpu_run(), ["gate", "gate"], "gate on CPU, 2026-01-02"),
    ],
)
def test_the_heading_is_words_and_the_run_id_below(run: Run, ops: list[str], heading: str) -> None:
    root = tree(made(run, [make_point(1024 * i, op=op) for i, op in enumerate(ops, start=1)]))
    assert root.all("h1")[0].words == heading
    assert root.all("title")[0].words == f"{heading} - chela-bench"
    assert f"Run {run.run_id}" in [note.words for note in root.all("p")]


def test_tables_of_more_than_20_rows_are_folded() -> None:
    root = tree(made(make_run(), h100_sweep()))
    folded = [t for d in root.all("details") for t in d.all("table")]
    shown = [t for t in root.all("table") if t not in folded]
    assert len(folded) == 3 and all(len(rows_of(t)) > 20 for t in folded)
    assert len(shown) > 5 and all(len(rows_of(t)) <= 20 for t in shown)
    assert [d.all("summary")[0].words for d in root.all("details") if d.all("table")] == [
        f"Table of {len(rows_of(t))} rows" for t in folded
    ]


def test_a_matmul_rate_of_fp32_is_of_tf32() -> None:
    run = make_run(ceilings={"copy_gb_per_s": 3000.0, "matmul_tflop_per_s": {"fp32": 409.4}})
    facts = dict(row for row in rows_of(tables(tree(made(run, h100_sweep())), "facts")[0]))
    assert facts["Matmul rate"] == "fp32 (as TF32) 409 TFLOP/s"


def test_what_was_not_measured_says_why() -> None:
    points = [
        make_point(1024, null_reasons={"energy_j": "not asked for"}),
        make_point(1024, impl="quadratic", null_reasons={"energy_j": "not asked for"}),
        make_point(2048, null_reasons={"energy_j": "not asked for", "throttle": "no NVML"}),
    ]
    root = tree(made(make_run(), points))
    (section,) = [s for s in root.all("section") if s.all("h2")[0].words == "Not measured"]
    assert rows_of(section.all("table")[0]) == [
        ["energy_j", "not asked for", "every point"],
        ["throttle", "no NVML", "linear_attention/chunked"],
    ]


def test_a_cpu_run_has_no_floor() -> None:
    root = tree(made(make_cpu_run(), cpu_sweep()))
    rows = rows_of(tables(root, "points")[0])
    assert [row[6] for row in rows] == [""] * 6
    assert rows[0][3] == "0.115"
    assert "wall clock" in root.words


def test_no_points() -> None:
    content = made(make_run(planned_points=9), [])
    assert "No points: nothing was measured (9 planned)" in content
    assert "Points without a time" not in content
    assert not tables(tree(content), "points")


def test_configurations_of_one_implementation_are_rows_of_their_own() -> None:
    rows = rows_of(tables(tree(made(make_run(), block_sizes())), "points")[0])
    assert [row[1] for row in rows[:3]] == [f"triton_chunked BLOCK_T={b}" for b in (32, 64, 128)]


@sweeps
def test_every_point_has_its_row(run: Run, points: list[Point]) -> None:
    written = [row for table in tables(tree(made(run, points)), "points") for row in rows_of(table)]
    assert len(written) == len(points)


def test_report_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "FORMATS", ("svg",))  # the page has no PNG
    folder = ROOT / "docs" / "results" / "h100"
    done = CliRunner().invoke(cli, ["report", str(folder), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert f"report: {tmp_path / 'out' / 'index.html'}" in done.output
    root = tree((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    drawn = [b64decode(str(i.attributes["src"]).partition("base64,")[2]) for i in root.all("img")]
    assert sorted(drawn) == sorted(path.read_bytes() for path in (tmp_path / "out").glob("*.svg"))
    assert len(drawn) == 46
    assert "Points without a time (48)" in root.words
    assert len(rows_of(tables(root, "failures")[0])) == 14
