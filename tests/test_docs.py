"""The generated pages are the code's: nothing left out, nothing out of date."""

from __future__ import annotations

import json
import re
import runpy

import pytest
import results_table

from chela_bench.bench.config import find_config, load_config
from tests.running import ROOT

DOCS = ROOT / "docs"
_OURS = ("triton_chunked",)
GENERATE = runpy.run_path(str(DOCS / "generate.py"))
PAGES = GENERATE["pages"]()


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_current(name):
    assert (DOCS / name).read_text() == PAGES[name], "run `make docs`"


@pytest.mark.parametrize("path", results_table.FILES, ids=lambda path: path.name)
def test_a_table_of_results_is_the_records(path):
    assert path.read_text() == results_table.marked()[path], "run `make docs`"


def test_a_row_of_results_is_two_medians_of_one_run():
    """The first one, by hand from the file."""
    lines = (DOCS / "results/h100-attention/peers/points.jsonl").read_text().splitlines()
    shape = {"B": 1, "T": 16384, "H": 16, "K": 128, "V": 128}
    medians = {
        (point["impl"], point["direction"]): point["time_ns"]["median"]
        for point in map(json.loads, lines)
        if point["shape"] == shape
    }
    first = next(x for x in (ROOT / "README.md").read_text().splitlines() if "T16384 H16" in x)
    for direction in ("fwd", "fwdbwd"):
        ours = medians["triton_chunked", direction]
        peer = min(medians[name, direction] for name in ("fla_chunk", "fla_fused_chunk"))
        assert f"{ours / 1e6:.3f}, {peer / 1e6:#.3g} | **{peer / ours:.2f} x**" in first


def _layer_at(folder, T, direction):
    lines = (DOCS / "results" / folder / "points.jsonl").read_text().splitlines()
    return {
        point["impl"]: point
        for point in map(json.loads, lines)
        if point["shape"]["T"] == T and point["direction"] == direction
    }


def test_the_layers_rows_are_of_one_run():
    """At 16384 tokens, by hand."""
    text = (ROOT / "README.md").read_text()
    row = next(x for x in text.splitlines() if x.startswith("| CHELA layer") and "cuDNN" in x)
    for direction in ("fwd", "fwdbwd"):
        found = _layer_at("h100-layer", 16384, direction)
        ours, peer = (found[name]["time_ns"]["median"] for name in ("chela", "sdpa_cudnn"))
        times = ", ".join(f"{time / 1e6:#.3g}" for time in (ours, peer))
        assert f"| {times} | **{peer / ours:.2f} x**" in row
    composed = next(x for x in text.splitlines() if "the same of torch and fla" in x)
    assert "| 0.857, 3.28 | **3.83 x** |" in composed


def test_ratios_across_clocks_are_told_with_both_clocks():
    """Softmax's, slowed at the power limit, by hand; and no row whose clocks are near."""
    found = _layer_at("h100-layer", 16384, "fwdbwd")
    ours, peer = found["chela"], found["sdpa_cudnn"]
    mine, theirs = (point["telemetry"]["sm_clock_mhz"] for point in (ours, peer))
    assert peer["throttle"] == ["power_cap"] and not ours["throttle"] and mine > 1.02 * theirs
    ratio = peer["time_ns"]["median"] / ours["time_ns"]["median"]
    table = (ROOT / "README.md").read_text().partition(results_table.LAST)[0]
    clocks = table.partition("**Clocks.**")[2].splitlines()
    told = [line for line in clocks if "T16384 D1024 | forward + backward" in line]
    assert told == [
        f"| CHELA layer, B1 T16384 D1024 | forward + backward | {mine} | {theirs}* "
        f"| {ratio:.2f} x | {ratio * theirs / mine:.2f} x |"
    ]
    assert not any("T2048" in line or "linear attention" in line for line in clocks)


def test_a_ratio_without_clocks_is_not_shown(monkeypatch):
    load = results_table.load_run

    def blind(folder):
        run, points = load(folder)
        gone = {"sm_clock_mhz": None}
        return run, [
            point.model_copy(update={"telemetry": point.telemetry.model_copy(update=gone)})
            for point in points
        ]

    monkeypatch.setattr(results_table, "load_run", blind)
    with pytest.raises(ValueError, match="no clock beside"):
        results_table.marked()


def test_a_table_mixes_no_conventions(monkeypatch):
    cold = results_table.COMPARED[0]._replace(records="h100-attention/cold", peers=_OURS)
    monkeypatch.setattr(results_table, "COMPARED", (*results_table.COMPARED, cold))
    with pytest.raises(ValueError, match=r"runs of one table differ.*cold L2.*warm L2"):
        results_table.marked()


def test_a_time_that_is_not_there_is_not_shown(monkeypatch):
    decoding = results_table.COMPARED[-1]._replace(records="h100-layer-backends")
    monkeypatch.setattr(results_table, "COMPARED", (decoding,))
    with pytest.raises(ValueError, match="skipped, so it has no time to show"):
        results_table.marked()


def test_a_file_without_marks_is_named(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{results_table.FIRST}\n")
    monkeypatch.setattr(results_table, "FILES", {page: "results"})
    with pytest.raises(ValueError, match=r"page\.md: wanted the lines"):
        results_table.marked()


def _named(page):
    return set(re.findall(r"^\| `(\w+)` \|", PAGES[page], re.MULTILINE))


def _keys(record):
    """Keys of a record and of its parts; maps have names of their own as keys."""
    maps = {"settings", "versions", "shape", "config", "errors", "null_reasons"}
    for key, value in record.items():
        yield key
        if isinstance(value, dict) and key not in maps | {"matmul_tflop_per_s"}:
            yield from _keys(value)


@pytest.mark.parametrize("file", ["run.json", "points.jsonl", "samples.jsonl"])
def test_every_field_on_disk_is_described(file):
    text = (DOCS / "results" / "h100" / file).read_text()
    records = [json.loads(text)] if file == "run.json" else map(json.loads, text.splitlines())
    assert {key for record in records for key in _keys(record)} <= _named("records.md")


def test_every_key_of_bench_toml_is_described():
    config = load_config(find_config(ROOT / "bench.toml"))
    keys = {"schema", "limits", "sweep", "shapes", "presets"}
    keys |= set(config.sweep.model_dump()) | set(config.limits.model_dump()) | set(config.shapes)
    assert keys <= _named("bench-toml.md")


def test_a_nullable_field_says_when_it_is_null():
    section = about = ""
    for line in PAGES["records.md"].splitlines():
        if line.startswith("#"):
            section, about = line.strip("# "), ""
        elif not line.startswith("|"):
            about += line
        elif " or null | " in line and section != "Environment":
            derived = "recomputed on reading" in about
            assert "Null: " in line or "Null: " in about or derived, line


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (str | None, "string or null"),
        (list[int], "list of integers"),
        (dict[str, dict[str, float]], "map of maps of numbers"),
        (GENERATE["config"].Size, "integer ≥ 1 and ≤ 2^30"),
        (GENERATE["records"].DType, '`"fp32"`, `"bf16"` or `"fp16"`'),
        (GENERATE["records"].Hbm, "[Hbm](#hbm)"),
    ],
)
def test_types_in_words(annotation, words):
    assert GENERATE["kind"](annotation) == words


def test_a_field_without_words_is_refused():
    with pytest.raises(ValueError, match="docstring"):
        GENERATE["_one_line"](None)
