"""What docs/ shows is what today's code makes of the records beside it, to the byte."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import PurePosixPath

import pytest

from chela_bench.reports.figures import render
from tests.running import ROOT, environment
from tests.test_benchmarks import script

DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
FIGURES = script("figures", folder="docs")
TARGETS = FIGURES.targets()
SCREENSHOTS = script("screenshots", folder="docs")


@pytest.mark.parametrize("path", TARGETS, ids=lambda path: str(path.relative_to(DOCS)))
def test_a_committed_file_is_what_its_records_give(path):
    if path.suffix in (*FIGURES.DRAWN, ".html") and FIGURES.other_versions():
        pytest.skip(f"drawn with other versions: {', '.join(FIGURES.other_versions())}")
    assert FIGURES.same(path.read_bytes(), TARGETS[path]()), "run `make figures`"


def test_no_figure_or_report_is_left_out():
    """But logs in words, and tables of what needs a card to be counted."""
    kept = {path for path in DOCS.rglob("*") if path.suffix in (*FIGURES.DRAWN, ".pdf", ".html")}
    kept -= set(SCREENSHOTS.SHOTS.values())
    kept |= set(RESULTS.rglob("summary.md")) | set(RESULTS.rglob("table.md"))
    assert kept <= set(TARGETS)
    assert len(TARGETS) >= 20


def test_the_readme_has_the_simulations_table():
    rows = (RESULTS / "gate-simulation" / "table.md").read_text().splitlines()
    text = (RESULTS / "README.md").read_text()
    assert all(row in text for row in rows if not set(row) <= set("|-: "))


@pytest.mark.parametrize("theme", SCREENSHOTS.THEMES)
def test_readmes_picture_of_the_page_is_of_the_committed_one(theme):
    shot = SCREENSHOTS.SHOTS[theme]
    assert SCREENSHOTS.taken_of(shot) == SCREENSHOTS.page_sha256(), "run `make screenshots`"
    assert f"docs/{shot.name}" in (ROOT / "README.md").read_text()


_OF_SOURCE = re.findall(r"(?m)^\| (h100[^|]*) \| (\w{7}) \|$", (RESULTS / "README.md").read_text())


def test_every_run_is_in_the_table_of_sources():
    names = [name.split()[0] for runs, _ in _OF_SOURCE for name in runs.split(", ")]
    found = {path.parent.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("run.json")}
    assert sorted(names) == sorted(found - {"h100-hbm"})
    states = {folder: json.loads((RESULTS / folder / "run.json").read_text()) for folder in found}
    dirty = sum(run["git_dirty"] for run in states.values())
    words = f"Of {len(found)} runs {dirty} are dirty"
    assert words in " ".join((RESULTS / "README.md").read_text().split())


@pytest.mark.parametrize(("runs", "commit"), _OF_SOURCE)
def test_a_commit_has_the_source_that_its_runs_recorded(runs, commit):
    archive = subprocess.run(
        ["git", "archive", commit, "chela_bench"], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        pytest.skip("no checkout with this history")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        files = {
            PurePosixPath(member.name).relative_to("chela_bench"): tar.extractfile(member).read()
            for member in tar.getmembers()
            if member.name.endswith(".py")
        }
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path}\0".encode() + files[path])
    for name in runs.split(", "):
        run = json.loads((RESULTS / name.split()[0] / "run.json").read_text())
        assert run["source_sha256"] == digest.hexdigest(), name


def test_pictures_are_compared_by_what_they_show(tmp_path):
    from io import BytesIO

    from PIL import Image

    def png(colour, level):
        content = BytesIO()
        Image.new("RGB", (64, 64), colour).save(content, "png", compress_level=level)
        return content.getvalue()

    assert png("red", 1) != png("red", 9)
    assert FIGURES.same(png("red", 1), png("red", 9))
    assert not FIGURES.same(png("red", 1), png("#fe0000", 1))
    assert not FIGURES.same(b"", png("red", 1)) and not FIGURES.same(b"<svg/>", b"<svg />")


DRAW = """
import hashlib, sys
from chela_bench.reports.figures import figures, render
from chela_bench.reports.style import LOOKS
from tests.factories import conv_sweep, make_run
points, look = conv_sweep(), LOOKS["paper"]
name = "short_long_conv-fwd-bf16-B8-D1024-order_serial-time"
[figure] = figures(make_run(), points, look, only={name}).values()
for kind in sys.argv[1].split(","):
    print(kind, hashlib.sha256(render(figure, kind, look)).hexdigest())
"""


def test_another_process_and_another_order_draw_the_same_bytes():
    """Whatever hashes strings get, the date and the place are."""
    drawn = []
    for seed, kinds, when in (("1", "svg,png,pdf", "0"), ("2", "pdf,png,svg", "1700000000")):
        told = environment(PYTHONHASHSEED=seed, SOURCE_DATE_EPOCH=when, TZ=f"UTC+{seed}")
        done = subprocess.run(
            [sys.executable, "-c", DRAW, kinds], env=told, capture_output=True, text=True,
            timeout=240, check=True, cwd=ROOT,
        )  # fmt: skip
        drawn.append(sorted(done.stdout.splitlines()))
    assert len(drawn[0]) == 3
    assert drawn[0] == drawn[1]


def test_a_figure_laid_out_once_stays():
    simulation = FIGURES._simulation()
    figure, again = (simulation.figure(FIGURES._trials()) for _ in range(2))
    first = render(figure, "svg")
    render(again, "png")
    assert render(again, "svg") == first == render(figure, "svg")


def test_what_is_drawn_with_is_pinned():
    pins = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text()))
    expected = [n for n in ("matplotlib", "numpy", "pillow") if version(n) != pins[n]]
    assert [line.split()[0] for line in FIGURES.other_versions()] == expected
