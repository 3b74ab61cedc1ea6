"""Colours that stay with a name and that everybody tells apart; figures for a printed column."""

from __future__ import annotations

from base64 import b64encode
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from chela_bench.bench import atlas
from chela_bench.bench.ops import OPS
from chela_bench.bench.store import load_run
from chela_bench.reports import changes
from chela_bench.reports.atlas_maps import atlas_maps
from chela_bench.reports.figures import figures, heat_maps, render
from chela_bench.reports.groups import OTHER_FUNCTIONS
from chela_bench.reports.heat import HeatMap, Panel, draw_heat_map
from chela_bench.reports.style import COLOURS, KNOWN, LOOKS, styles
from chela_bench.reports.tune import tune_maps
from chela_bench.verdicts import Change, Comparison, Side
from tests.factories import SWEEPS, contenders, h100_sweep, make_point, make_run
from tests.records import timed, write_run
from tests.running import ROOT, in_this_process
from tests.test_atlas_reports import ARCHS, ROWS
from tests.test_figures import drawn_labels, nothing_overlaps_or_leaves
from tests.test_tune import tuning

PAPER = LOOKS["paper"]
FWD = "linear_attention-fwd-bf16-B1-H16-K128-V128"

# Machado, Oliveira and Fernandes 2009, at full severity, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968],
         [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868],
         [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779],
         [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375],
     [0.2126729, 0.7151522, 0.0721750],
     [0.0193339, 0.1191920, 0.9503041]]
)  # fmt: skip


def lab(colour, sight):
    """CIELAB of an sRGB colour as somebody sees it."""
    value = np.array(to_rgb(colour))
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    seen = XYZ @ np.clip(SIGHT[sight] @ linear, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(seen > (6 / 29) ** 3, np.cbrt(seen), seen / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(one, other, sight):
    return float(np.linalg.norm(lab(one, sight) - lab(other, sight)))


def test_the_distance_knows_what_a_deuteranope_confuses():
    assert distance("#ffffff", "#000000", "normal") == pytest.approx(100, abs=0.1)
    red, green = "#a05000", "#607000"
    assert distance(red, green, "normal") > 40 > 10 > distance(red, green, "deuteranopia")


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_are_told_apart_by_everybody(sight):
    """A difference of 2.3 is just seen in two fields side by side, of 15 in thin lines apart."""
    for one, other in combinations(COLOURS, 2):
        assert distance(one, other, sight) > 15, (one, other)
    assert all(distance(colour, "#ffffff", sight) > 30 for colour in COLOURS)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_no_two_implementations_of_an_op_share_a_colour(op):
    """Nor one of the function that is drawn beside it; one of the same name is the same."""
    beside = {other.name: other for other in OPS}.get(OTHER_FUNCTIONS.get(op.name, ""))
    names = {impl.name for each in (op, beside) if each is not None for impl in each.impls}
    assert names <= set(KNOWN)
    chosen = styles(names)
    assert len({style.colour for style in chosen.values()}) == len(names)
    assert len({style.marker for style in chosen.values()}) == len(names)


def test_a_colour_follows_from_the_name_alone():
    crowd = [*KNOWN, *{point.impl for point in contenders(16)}, "mine.py:attention"]
    together = styles(crowd)
    for name in crowd:
        assert together[name].colour == styles([name])[name].colour
        assert together[name].colour in COLOURS
    assert together == styles(reversed(crowd))


def _colours(run, points, impl):
    """Of its lines, in every figure that has one; our hands know them by their values."""
    found = {}
    for name, figure in figures(run, points).items():
        lines = figure.axes[0].lines
        times = {p.shape["T"]: (p.seconds or 0) * 1e9 for p in points if p.impl == impl}
        if name.endswith("-time"):
            found["time"] = [
                to_hex(line.get_color())
                for line in lines
                if dict(zip(*line.get_data(), strict=True)) == times
            ]
        else:
            kind = name.rpartition("-")[2]
            found[kind] = [to_hex(line.get_color()) for line in lines]
    return found


@pytest.mark.parametrize("impl", ["fla_chunk", "mine.py:attention"])
def test_an_implementation_has_its_colour_in_every_figure_of_every_run(impl):
    mine = [p.model_copy(update={"impl": impl}) for p in h100_sweep() if p.impl == "fla_chunk"]
    others = [point for point in h100_sweep() if point.impl not in ("fla_chunk", "recurrent")]
    alone, among = _colours(make_run(), mine, impl), _colours(make_run(), [*others, *mine], impl)
    [colour] = alone["time"]
    assert among["time"] == [colour] == [styles([impl])[impl].colour.lower()]
    assert {"floor", "hbm", "memory", "roofline"} <= set(alone)
    assert all(colour in kind for found in (alone, among) for kind in found.values())


# --- on paper -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["profiled", "layers", "many", "long names", "all failed", "one point", "hostile"]
)
def test_a_paper_figure_is_a_column_wide_and_nothing_overlaps(name, monkeypatch):
    run, points = SWEEPS[name]
    for slug, figure in figures(run, points, PAPER).items():
        text_fits_a_column(slug, figure, monkeypatch)


def text_fits_a_column(slug, figure, monkeypatch):
    """Returns the words."""
    assert figure.get_size_inches()[0] == 3.35
    labels = drawn_labels(figure, monkeypatch)
    assert {label.get_fontsize() for label in labels} == {7.0}
    nothing_overlaps_or_leaves(slug, figure, labels)
    return [label.get_text() for label in labels]


def test_a_paper_figure_names_lines_and_failures_and_leaves_titles_to_the_caption(monkeypatch):
    [figure] = figures(make_run(), h100_sweep(), PAPER, only={f"{FWD}-time"}).values()
    text = " ".join(label.get_text() for label in drawn_labels(figure, monkeypatch)).split()
    assert {"triton_chunked", "naive_cumsum", "softmax_attention/", "sdpa_flash"} <= set(text)
    assert "naive_cumsum: oom at 32k..64k;" in " ".join(text)
    assert not {"H100", "linear_attention"} & set(text)


@pytest.fixture(scope="module")
def paper_figure():
    [figure] = figures(make_run(), h100_sweep(), PAPER, only={f"{FWD}-time"}).values()
    return figure


HEATS = {
    **tune_maps(make_run(), [*tuning(), *tuning(16384)]),
    **atlas_maps(ROWS, ARCHS),
    "measured": next(iter(tune_maps(*load_run(ROOT / "docs/results/h100-tune")).values())),
}


@pytest.mark.parametrize("heat", HEATS.values(), ids=HEATS)
def test_a_paper_heat_map_is_a_column_wide_and_says_every_value(heat, monkeypatch):
    figure = draw_heat_map(heat, PAPER)
    words = text_fits_a_column(heat.title, figure, monkeypatch)
    for panel in heat.panels:
        assert panel.name in words
        assert {heat.label(value) for value in panel.values.values()} <= set(words)
        assert set(panel.under.values()) <= set(words)
        for why in panel.missing.values():
            assert why.split() in [text.split() for text in words]
    assert heat.title not in " ".join(words) and heat.subtitle not in " ".join(words)
    title = f"{heat.title}; {heat.subtitle}"
    assert figure.get_label() == title
    assert b"/FontFile2" in (content := render(figure, "pdf", PAPER))
    assert b"/Type3" not in content and b"/CreationDate" not in content
    assert b"<text" not in render(figure, "svg", PAPER)


def test_lines_of_a_paper_heat_map_are_told_apart_in_words(monkeypatch):
    panel = Panel(
        "p", {(x, 1): 1.0 for x in (1, 2, 3)}, levels={(x, 1): 10.0 * x for x in (1, 2, 3)}
    )
    limits = {"15 KB (small)": 15.0, "25 KB (large)": 25.0, "40 KB (none)": 40.0}
    figure = draw_heat_map(HeatMap("t", "s", "x", "y", (panel,), str, contours=limits), PAPER)
    words = " ".join(" ".join(text_fits_a_column("lines", figure, monkeypatch)).split())
    assert "passes 15 KB (small): solid, 25 KB (large): dashed" in words and "40 KB" not in words
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "--"]


def test_a_heat_map_of_many_columns_has_smaller_letters_and_one_of_short_words_is_flatter():
    def of(columns, panels, label):
        values = {(x, y): float(x) for x in range(columns) for y in (1, 2)}
        panels = tuple(Panel(f"p{i}", values) for i in range(panels))
        return draw_heat_map(HeatMap("t", "s", "x", "y", panels, label), PAPER)

    def sizes(figure):
        return {text.get_fontsize() for axes in figure.axes for text in axes.texts}

    assert sizes(of(3, 2, lambda value: "59.4 us")) == {7.0}
    [small] = sizes(of(12, 1, lambda value: "59.4 us"))
    assert 2.5 < small < 5
    tall = [
        of(3, 4, lambda value, word=word: word).get_size_inches()[1] for word in ("1", "59.4 us")
    ]
    assert tall[0] < 0.7 * tall[1]  # two or more side by side, or one above the other


def comparison(count):
    verdicts = ("slower", "unclear", "faster", "same")
    name = "linear_attention/triton_chunked/fwd/bf16/B=1,T={},H=16,K=128,V=128/BLOCK_T=64"
    side = {"machine": "H100", "versions": {}}
    return Comparison(
        mode="stored", noise=0.01, before=Side(label="runs/old", **side),
        after=Side(label="runs/new", **side),
        points=[
            Change(
                name=name.format(2**i), verdict=verdicts[i % 4], ratio=1.3 - i / 100,
                low=1.28 - i / 100, high=1.33 - i / 100,
            )
            for i in range(count)
        ],
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 4, 30])
def test_a_paper_comparison_is_a_column_wide_and_names_each_benchmark(count, monkeypatch):
    compared = comparison(count)
    figure = changes.figure(compared, PAPER)
    words = text_fits_a_column("comparison", figure, monkeypatch)
    named = {text.replace("\n", "") for text in words}
    shown = changes.reading_order(compared.points)[:16]
    assert {change.name for change in shown} <= named
    assert ("the largest 16 of 30" in " ".join(" ".join(words).split())) is (count == 30)
    assert "runs/old" not in " ".join(words) and figure.get_label() == "runs/old to runs/new"
    drawn = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() != "None"]
    assert drawn == [change.ratio for change in shown]
    places = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_marker() != "None"]
    heads = [text.get_position()[1] for text in figure.axes[0].texts]
    assert all(name < place for name, place in zip(heads, places, strict=True))  # downwards
    assert figure.get_size_inches()[1] < 9.5  # a page
    assert b"/FontFile2" in render(figure, "pdf", PAPER)


def test_a_pdf_holds_its_fonts_as_outlines_and_no_date(paper_figure):
    content = render(paper_figure, "pdf", PAPER)
    assert b"/FontFile2" in content and b"/Subtype /Type3" not in content
    assert b"/CreationDate" not in content
    assert b"/Title" in content
    assert content == render(paper_figure, "pdf", PAPER)


def test_an_svg_for_paper_needs_no_font(paper_figure):
    content = render(paper_figure, "svg", PAPER)
    assert b"<text" not in content and b"font-family" not in content and b"<dc:date>" not in content
    assert b"linear_attention" in content  # its title, in the metadata
    assert b"<text" in render(next(iter(figures(*SWEEPS["cpu"]).values())), "svg")


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    points = [timed(T, ns=T * 20.0, peak_bytes=None) for T in (1024, 4096)]
    return write_run(tmp_path_factory.mktemp("runs") / "run", points)


def test_report_writes_a_file_a_figure_and_format(run, tmp_path):
    done = in_this_process(
        "report", run, "-o", tmp_path, "--format", "pdf,svg,png,pdf", "--style", "paper"
    )
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    kinds = ("pdf", "svg", "png")
    drawn = figures(*load_run(run), PAPER)
    assert names == {
        "index.html", "summary.md", "results.csv", *(f"{n}.{k}" for n in drawn for k in kinds),
    }  # fmt: skip
    for name, figure in drawn.items():
        for kind in kinds:
            assert (tmp_path / f"{name}.{kind}").read_bytes() == render(figure, kind, PAPER)
    [figure] = figures(*load_run(run)).values()
    in_page = b64encode(render(figure, "svg")).decode()  # set for a screen, whatever the files are
    assert in_page in (tmp_path / "index.html").read_text()


def test_report_writes_heat_maps_for_paper(tmp_path, monkeypatch):
    monkeypatch.setattr("chela_bench.cli.derived.figures", lambda *_, **__: {})
    sizes = [(block_t, block_v) for block_t in (32, 64) for block_v in (64, 128)]
    config = [{"BLOCK_T": block_t, "BLOCK_V": block_v} for block_t, block_v in sizes]
    run, out = (
        write_run(tmp_path / "run", [timed(config=each) for each in config]),
        tmp_path / "out",
    )
    done = in_this_process("report", run, "-o", out, "--format", "pdf", "--style", "paper")
    assert done.returncode == 0, done.stderr
    [(name, figure)] = heat_maps(*load_run(run), PAPER).items()
    assert name.endswith("-blocks-1")
    assert (out / f"{name}.pdf").read_bytes() == render(figure, "pdf", PAPER)
    [figure] = heat_maps(*load_run(run)).values()
    assert b64encode(render(figure, "svg")).decode() in (out / "index.html").read_text()


def test_atlas_and_compare_write_theirs_for_paper(tmp_path, monkeypatch):
    """Only the compiling is played."""
    found = atlas.Found("3.7.1", ROWS)
    monkeypatch.setattr("chela_bench.bench.atlas.compile_all", lambda *_, **__: found)
    sides = [write_run(tmp_path / s, [timed(ns=ns)]) for s, ns in (("a", 20.0), ("b", 10.0))]
    for name, command in (
        ("atlas", ("atlas", "linear_attention", "--arch", ",".join(ARCHS), "--out")),
        ("comparison", ("compare", *sides, "--out")),
    ):
        out = tmp_path / name
        done = in_this_process(*command, out, "--format", "svg,pdf", "--style", "paper")
        assert done.returncode == 0, done.stderr
        pictures = [path for path in out.iterdir() if path.suffix not in (".md", ".json", ".csv")]
        assert {path.suffix for path in pictures} == {".svg", ".pdf"}
        assert len(pictures) == {"atlas": 6, "comparison": 2}[name]
        for path in pictures:
            content = path.read_bytes()
            assert b"<text" not in content and b"/Type3" not in content
            if path.suffix == ".svg":
                assert b'width="241.2pt"' in content


@pytest.mark.parametrize("command", [["atlas", "linear_attention"], ["compare", "a", "b"]])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--style", "paper"], "--format and --style go with --out DIR"),
        (["--format", "pdf"], "--format and --style go with --out DIR"),
        (["--format", "tiff", "--out", "out"], "no format 'tiff' for a figure; there are: svg"),
        (["--style", "poster", "--out", "out"], "'poster' is not one of 'screen', 'paper'"),
    ],
)
def test_figures_of_a_command_that_cannot_be_are_one_message(command, given, message, monkeypatch):
    """Before anything is compiled or read."""
    monkeypatch.setattr("chela_bench.bench.atlas.compile_all", None)
    done = in_this_process(*command, *given)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--format", "tiff"], "no format 'tiff' for a figure; there are: svg, png, pdf"),
        (["--format", "pdf,"], "empty name in 'pdf,'"),
        (["--style", "poster"], "'poster' is not one of 'screen', 'paper'"),
        (["--json", "--markdown"], "both write to stdout: give one of them"),
    ],
)
def test_what_a_figure_cannot_be_is_one_message(run, tmp_path, given, message):
    done = in_this_process("report", run, "-o", tmp_path / "out", *given)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_summary_for_a_pull_request_is_on_stdout_alone(run, tmp_path):
    done = in_this_process("report", run, "-o", tmp_path, "--markdown", "--format", "svg")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "summary.md").read_text()
    assert "index.html" in done.stderr
    assert "| fastest at the longest T | T | implementation | time ms | x floor |" in done.stdout
    assert done.stdout.count("<details>") == done.stdout.count("</details>") >= 1


def test_the_largest_summary_fits_into_a_comment():
    """Code hosts take 65536 characters."""
    from chela_bench.reports.markdown import summary

    assert len(summary(*load_run(ROOT / "docs/results/h100"))) < 65536


def test_a_second_implementation_of_one_style_keeps_its_colour_and_changes_its_marker():
    names = [f"kernel_{number}" for number in range(400)]
    twins = [n for n in names if styles([n])[n] == styles([names[0]])[names[0]]][:2]
    first, second = styles(twins)[twins[0]], styles(twins)[twins[1]]
    assert first.colour == second.colour and first.marker != second.marker
    points = [make_point(T, impl=impl, time_ns=T) for impl in twins for T in (1024, 2048)]
    assert len(figures(make_run(), points)) >= 1


# --- other figures --------------------------------------------------------------------------------


def test_limits_that_begin_with_one_line_are_named_together(monkeypatch):
    panel = Panel("p", {(x, 1): 1.0 for x in (1, 2)}, levels={(1, 1): 10.0, (2, 1): 30.0})
    limits = {"12 KB (small)": 12.0, "20 KB (large)": 20.0, "40 KB (none)": 40.0}
    heat = HeatMap("t", "s", "x", "y", (panel,), str, contours=limits)
    labels = [label.get_text() for label in drawn_labels(draw_heat_map(heat), monkeypatch)]
    assert [text for text in labels if "KB" in text][:1] == ["12 KB, 20 KB"]
    [note] = [text for text in labels if "shared memory passes" in text]
    assert "12 KB (small), 20 KB (large)" in " ".join(note.split()) and "none" not in note


def test_long_names_of_a_comparison_are_not_cut_off(tmp_path):
    """Nor a title of long paths."""
    out, sides = tmp_path / "out", [tmp_path / f"{side * 60}" for side in "ab"]
    for side, ns in zip(sides, (20.0, 10.0), strict=True):
        write_run(side, [timed(T, ns=T * ns, impl="x" * 40) for T in (1024, 4096)])
    done = in_this_process("compare", *sides, "-o", out)
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(out / "comparison.png").convert("L"))
    assert (pixels[:, :2] == 255).all() and (pixels[:, -2:] == 255).all()
