"""The page in a real browser: Debian's Chromium, headless, driven by Playwright."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chela_bench.records import AtlasRow, Point
from chela_bench.reports.html import Atlas, Reported, pages
from chela_bench.verdicts import Change, Comparison, Side
from tests.factories import HOSTILE, h100_sweep, make_failure, make_point, make_run
from tests.running import ROOT
from tests.test_benchmarks import script

if not os.environ.get("CI"):  # there nothing is left out
    pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: see `make`")
from playwright.sync_api import Browser, Page, Route, sync_playwright

H100_PAGE = ROOT / "docs" / "results" / "h100" / "report" / "index.html"
SCREENSHOTS = script("screenshots", folder="docs")
ATTACK = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>'
POINTS = "table.points:not(.grid):not(.counted)"
FORWARD = "section:has(> #linear_attention-fwd-bf16-B1-H16-K128-V128)"


def executable() -> str:
    found: str | None = SCREENSHOTS.chromium()
    if found is None:
        missing = "no Chromium on PATH, so the page was not opened in one: `make browser` gets one"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium, options = executable(), SCREENSHOTS.launch_options()
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=options)
        yield opened
        opened.close()


class Opened:
    """A page, and what went wrong in it."""

    def __init__(self, browser: Browser, path: Path, **context: object) -> None:
        self.context = browser.new_context(**context)  # type: ignore[arg-type]
        self.page: Page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append("alert") or dialog.dismiss())

        def refuse(route: Route) -> None:
            self.wrong.append(route.request.url)
            route.abort()

        self.page.route(lambda url: not url.startswith(("data:", path.as_uri())), refuse)
        self.page.goto(path.as_uri())

    def unfold(self) -> Page:
        """Opens every table."""
        for summary in self.page.locator(".fold > summary").all():
            summary.click()
        return self.page

    def close(self) -> None:
        """Fails if anything was said, thrown, alerted or fetched."""
        self.context.close()
        assert self.wrong == []


def test_without_a_browser_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="`make browser` gets one"):
        executable()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="`make browser` gets one"):
        executable()


def written(folder: Path, *reported: Reported, **more: Any) -> Path:
    path = folder / "index.html"
    path.write_text(pages(reported, **more), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def opened(browser: Browser) -> Iterator[Page]:
    """The page of the sweep on an H100, its tables open. Tests leave it as they like, but with the
    dialog closed."""
    it = Opened(browser, H100_PAGE, viewport={"width": 1280, "height": 900})
    yield it.unfold()
    it.close()


def column(page: Page, table: str, index: int) -> list[str]:
    """The cells of a table's column that are shown."""
    script = """(table, index) => [...table.tBodies[0].rows]
        .filter((row) => row.offsetParent !== null).map((row) => row.cells[index].textContent)"""
    return page.locator(table).first.evaluate(script, index)  # type: ignore[no-any-return]


def test_the_committed_page_is_small_and_of_todays_script() -> None:
    text = H100_PAGE.read_text(encoding="utf-8")
    assert H100_PAGE.stat().st_size < 3_000_000
    templates = ROOT / "chela_bench" / "reports" / "templates"
    for name in ("report.css", "report.js"):
        assert (templates / name).read_text(encoding="utf-8") in text, "write the page again"


def test_the_summary_stands_first(opened: Page) -> None:
    words = opened.locator("main").inner_text()
    assert words.index("Fastest") < words.index("Provenance") < words.index("Crossovers")
    top = opened.locator(".findings").inner_text()
    assert "triton_chunked for linear_attention" in top
    assert re.search(r"linear_attention 1\.\d+ to 1\.\d+", top)
    assert "linear_attention/triton_chunked against softmax_attention/sdpa_flash: fwd faster" in top


def test_a_columns_name_sorts(opened: Page) -> None:
    table = f"{FORWARD} {POINTS}"
    before = column(opened, table, 3)
    button = opened.locator(f"{table} th button", has_text="time ms")
    head = opened.locator(f"{table} th", has_text="time ms")
    button.click()
    assert head.get_attribute("aria-sort") == "ascending"
    times = [float(cell.removesuffix(" (wall)")) for cell in column(opened, table, 3) if cell]
    assert times == sorted(times) and len(times) > 40
    button.press("Enter")  # by keyboard, the other way
    assert head.get_attribute("aria-sort") == "descending"
    after = column(opened, table, 3)
    assert after != before and sorted(after) == sorted(before)
    known = [cell for cell in after if cell]
    assert after == known + [""] * (len(after) - len(known)), "failed points stay last"
    opened.locator(f"{table} th button").first.click()
    assert head.get_attribute("aria-sort") is None
    lengths = column(opened, table, 0)
    order = ["1k", "2k", "4k", "8k", "16k", "32k", "64k"]
    assert lengths == sorted(lengths, key=order.index)


def test_every_table_with_rows_sorts_and_filters(opened: Page) -> None:
    tables = opened.locator(".scroll table")
    several = opened.locator(".scroll table:has(tbody tr + tr)")
    assert tables.count() > 50
    assert opened.locator(".filter").count() == several.count()
    heads = "(tables) => tables.every((t) => [...t.tHead.rows[0].cells].every((c) => c.firstChild.tagName === 'BUTTON'))"  # noqa: E501
    assert tables.evaluate_all(heads)
    # Each figure has its tables in its own section.
    bare = "(figures) => figures.filter((f) => !f.closest('section').querySelector('table')).length"
    assert opened.locator("figure").evaluate_all(bare) == 0


def test_the_field_above_a_table_filters(opened: Page) -> None:
    table = f"{FORWARD} {POINTS}"
    field = opened.locator(f"{FORWARD} .filter:has(+ .scroll > {POINTS}) input")
    said = opened.locator(f"{FORWARD} .filter:has(+ .scroll > {POINTS}) output")
    rows = len(column(opened, table, 1))
    field.fill("4k CHUNKED -compiled")
    assert set(column(opened, table, 0)) == {"4k"}
    assert set(column(opened, table, 1)) == {"chunked", "triton_chunked"}
    assert said.inner_text() == f"2 of {rows} rows"
    field.fill("(wall")  # no pattern: its characters alone
    assert all("(wall)" in cell for cell in column(opened, table, 3))
    field.fill("nothing has this")
    assert column(opened, table, 1) == []
    field.fill("")
    assert len(column(opened, table, 1)) == rows and said.inner_text() == ""


def test_samples_are_drawn_when_asked_for(opened: Page) -> None:
    assert opened.locator("dialog").is_hidden()
    button = opened.get_by_role("button", name="samples of triton_chunked at T = 64k").first
    button.focus()
    opened.keyboard.press("Enter")
    dialog = opened.get_by_role("dialog")
    assert dialog.get_by_role("heading").inner_text() == "triton_chunked at T = 64k"
    count = int(button.inner_text())
    assert opened.locator("dialog circle").count() == min(count, 512)
    words = opened.locator("dialog p").inner_text()
    assert re.search(r"\d time samples: 4\d\d\.\d us to \d+\.\d us, median 4\d\d\.\d us", words)
    boxes = opened.locator("dialog circle, dialog rect").evaluate_all(
        "(marks) => marks.map((mark) => mark.getBBox()).map((b) => [b.x, b.y, b.x + b.width, b.y + b.height])"  # noqa: E501
    )
    assert all(x >= 0 and y >= 0 and right <= 640 and low <= 260 for x, y, right, low in boxes)
    opened.keyboard.press("Escape")
    assert dialog.count() == 0
    assert button.evaluate("(button) => button === document.activeElement")


@pytest.fixture(scope="module", params=["light", "dark"])
def themed(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    it = Opened(browser, H100_PAGE, color_scheme=request.param)
    yield it.page
    it.close()


@pytest.mark.parametrize("width", [380, 1280])
def test_nothing_scrolls_sideways(themed: Page, width: int) -> None:
    themed.set_viewport_size({"width": width, "height": 800})
    for opened in (False, True):
        themed.locator(".fold").evaluate_all(
            "(all, opened) => all.forEach((each) => (each.open = opened))", opened
        )
        assert themed.evaluate("document.documentElement.scrollWidth") == width
    assert themed.evaluate("document.documentElement.scrollWidth") == width
    themed.get_by_role("button", name="samples of").first.click()
    box = themed.get_by_role("dialog").bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width
    themed.keyboard.press("Escape")


def test_on_a_phone_a_figure_is_seen_whole_and_larger_when_tapped(themed: Page) -> None:
    themed.set_viewport_size({"width": 380, "height": 800})
    figure = themed.locator("figure").first
    inside = "(f) => f.scrollWidth - f.clientWidth"
    assert figure.evaluate(inside) == 0
    figure.click()
    assert figure.evaluate(inside) > 380
    assert themed.evaluate("document.documentElement.scrollWidth") == 380


def test_quantities_stand_side_by_side_where_there_is_room(browser: Browser) -> None:
    it = Opened(browser, H100_PAGE, viewport={"width": 1440, "height": 900})
    places = it.page.locator(f"{FORWARD} h3").evaluate_all(
        "(heads) => heads.map((h) => [h.textContent, h.getBoundingClientRect().top])"
    )
    top = dict(places)
    assert top["Time"] < top["Memory"] == top["HBM"] < top["Roofline"] == top["Error"]
    it.page.set_viewport_size({"width": 768, "height": 900})
    tops = it.page.locator(f"{FORWARD} h3").evaluate_all(
        "(heads) => heads.map((h) => h.getBoundingClientRect().top)"
    )
    assert tops == sorted(set(tops))
    it.close()


def test_a_long_tables_head_stays_in_sight(opened: Page) -> None:
    table = opened.locator(f"{FORWARD} {POINTS}")
    scroller = opened.locator(f"{FORWARD} .scroll:has(> {POINTS})")
    scroller.evaluate("(s) => s.scrollTo(0, 400)")
    head, around = table.locator("thead th").first.bounding_box(), scroller.bounding_box()
    assert head is not None and around is not None
    assert scroller.evaluate("(s) => s.scrollTop") > 0
    assert head["y"] == pytest.approx(around["y"], abs=1)
    scroller.evaluate("(s) => s.scrollTo(0, 0)")


def test_text_stands_out_from_its_paper(themed: Page) -> None:
    for selector in ("p", ".note", "a", "thead th", "td button", ".filter input"):
        colours = themed.locator(f"main {selector}").first.evaluate(
            "(e) => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
        )
        ink, paper = (_luminance(colour) for colour in colours)
        ratio = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert ratio >= 4.5, f"{selector}: {ratio:.1f}"


def _luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_themes_differ_and_paper_is_light(themed: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = themed.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    image = themed.locator("figure img").first
    turned = "(image) => getComputedStyle(image).filter !== 'none'"
    assert (themed.evaluate(paper) == "rgb(255, 255, 255)") is not dark
    assert image.evaluate(turned) is dark
    themed.emulate_media(media="print")
    assert themed.evaluate(paper) == "rgb(255, 255, 255)"
    assert not image.evaluate(turned)
    assert themed.locator(".filter input").first.is_hidden()
    themed.locator(".fold").evaluate_all("(all) => all.forEach((each) => (each.open = false))")
    assert themed.locator(".fold td").first.bounding_box(), "what is folded is printed"
    themed.emulate_media(media="screen")


def test_the_first_tab_skips_to_the_results(browser: Browser, tmp_path: Path) -> None:
    it = Opened(browser, written(tmp_path, Reported(make_run(), h100_sweep(), {})))
    it.page.keyboard.press("Tab")
    link = it.page.locator(":focus")
    assert link.inner_text() == "Skip to the results"
    box = link.bounding_box()
    assert box is not None and box["x"] >= 0
    it.page.keyboard.press("Enter")
    assert it.page.locator("h2:target").count() == 1
    it.close()


def test_a_screen_reader_finds_names(opened: Page) -> None:
    """Everything that takes the focus has a name, every image words, every table a caption."""
    unnamed = """(elements) => elements.filter((e) => !(e.getAttribute("aria-label")
        || e.textContent.trim() || e.getAttribute("alt"))).map((e) => e.outerHTML.slice(0, 80))"""
    focusable = "a, button, input, [tabindex], img, [role], caption, summary, svg[role=img]"
    found = opened.locator(f"main :is({focusable}), dialog button").evaluate_all(unnamed)
    assert found == []
    tree = opened.locator("nav").first.aria_snapshot()
    assert "navigation" in tree and "table" in tree and "columnheader" in tree


def _attacked() -> list[Point]:
    points = [
        make_point(T, impl=f"/tmp/{ATTACK}.py:{text}", op=text, config={text: T})
        for text in (ATTACK, HOSTILE)
        for T in (1024, 2048)
    ]
    return [*points, make_failure("crash", ATTACK, 4096, impl=ATTACK, op=ATTACK)]


def test_other_peoples_text_stays_text(browser: Browser, tmp_path: Path) -> None:
    points = _attacked()
    run = make_run(run_id=ATTACK, argv=["chela-bench", ATTACK], versions={ATTACK: ATTACK})
    row = AtlasRow(
        op=ATTACK, impl=ATTACK, kernel=ATTACK, language="triton", dtype="bf16",
        config={ATTACK: ATTACK}, constants={}, asked=[{}], directions=["fwd"], lens=[1024],
        arch=ATTACK, triton=ATTACK, outcome="crash", fits=False, reason=ATTACK,
    )  # fmt: skip
    side = Side(label=ATTACK, machine=ATTACK)
    comparison = Comparison(
        mode="stored", before=side, after=side, noise=0.01, notes=[ATTACK], missing=[ATTACK],
        points=[Change(name=ATTACK, verdict="unclear", reason=ATTACK)],
    )  # fmt: skip
    samples = {point.key: [1000, 1001] for point in points}
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><text>{"x" * 9}</text></svg>'.encode()
    each = Reported(run, points, {}, samples, Atlas([row], [], [ATTACK], {ATTACK: svg}))
    it = Opened(browser, written(tmp_path, each, each, comparisons=[(comparison, None)]))
    assert it.page.locator("script").count() == 1
    assert it.page.locator("img[src=x], [onerror]").count() == 0
    assert it.page.locator("h1").inner_text().count("onerror=alert(1)") == 2
    for field in it.page.locator(".filter input").all():
        field.fill(ATTACK)
    it.page.locator("td button").first.click()
    assert ".py:" in it.page.locator("dialog h2").inner_text()
    it.close()


def test_a_heading_of_other_peoples_words_stays_text(browser: Browser, tmp_path: Path) -> None:
    run = make_run(run_id=ATTACK)
    environment = run.environment.model_copy(update={"name": ATTACK})
    run = run.model_copy(update={"environment": environment})
    it = Opened(browser, written(tmp_path, Reported(run, _attacked(), {})))
    assert it.page.locator("h1").inner_text().count("onerror=alert(1)") == 2  # op and card
    assert it.page.locator("h1 + .note").inner_text() == f"Run {ATTACK}"
    assert it.page.title().count("onerror=alert(1)") == 2
    assert it.page.locator("script").count() == 1
    assert it.page.locator("img[src=x], [onerror]").count() == 0
    it.close()


def test_a_page_without_samples_says_so(browser: Browser, tmp_path: Path) -> None:
    it = Opened(browser, written(tmp_path, Reported(make_run(), h100_sweep(), {})))
    assert it.page.locator("td button").count() == 0
    assert "distributions cannot be shown" in it.page.locator("main").inner_text()
    it.close()


def test_many_samples_are_thinned_and_equal_ones_drawn(browser: Browser, tmp_path: Path) -> None:
    points = [make_point(1024), make_point(2048)]
    many = [random.Random(0).randrange(10**6, 2 * 10**6) for _ in range(5000)]
    samples = {points[0].key: many, points[1].key: [7] * 40}
    points[0] = make_point(1024, time_ns=None, wall_ns=10**6, wall_n=5000)
    it = Opened(browser, written(tmp_path, Reported(make_run(), points, {}, samples)))
    buttons = it.page.locator("td button")
    buttons.nth(0).click()
    assert it.page.locator("dialog circle").count() == 512
    assert it.page.locator("dialog p").inner_text().startswith("512 of 5000 time samples")
    it.page.keyboard.press("Escape")
    buttons.nth(1).click()
    assert it.page.locator("dialog circle").count() == 40
    assert "7.000 ns to 7.000 ns, median 7.000 ns" in it.page.locator("dialog p").inner_text()
    it.close()
