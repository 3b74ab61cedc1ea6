"""Figures of synthetic runs: nothing overlaps, every line and failure is named."""

from __future__ import annotations

import functools
import re
from itertools import combinations

import matplotlib
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text as Label

from chela_bench.records import Hbm, Point, Run
from chela_bench.reports.figures import figures, render
from chela_bench.reports.style import INK, styles
from chela_bench.reports.text import length
from tests.factories import (
    LENGTHS,
    SWEEPS,
    all_failed,
    contenders,
    cpu_sweep,
    h100_sweep,
    make_cpu_run,
    make_failure,
    make_point,
    make_run,
    sweeps,
)

FWD = "linear_attention-fwd-bf16-B1-H16-K128-V128"


def drawn_labels(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[Label]:
    """The texts that a reader sees, as they were drawn."""
    seen: list[Label] = []
    draw = Label.draw

    def noting(self: Label, renderer: object) -> None:
        if self.get_visible() and self.get_text():
            seen.append(self)
        draw(self, renderer)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Label, "draw", noting)
        figure.canvas.draw()
    return seen


def nothing_overlaps_or_leaves(name: str, figure: Figure, labels: list[Label]) -> None:
    boxes = [(label.get_text(), label.get_window_extent()) for label in labels]
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{name}: {text!r} leaves the figure"
    for (one, a), (other, b) in combinations(boxes, 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 2 or b.y1 <= a.y0 + 2
        assert apart, f"{name}: {one!r} overlaps {other!r}"


def words(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> str:
    return "\n".join(label.get_text() for label in drawn_labels(figure, monkeypatch))


@functools.cache
def h100_figures() -> dict[str, Figure]:
    return figures(make_run(), h100_sweep())


@sweeps
def test_no_text_overlaps_or_leaves_the_figure(
    run: Run, points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, figure in figures(run, points).items():
        labels = drawn_labels(figure, monkeypatch)
        assert min(float(label.get_fontsize()) for label in labels) >= 9
        assert figure.canvas.get_width_height()[0] == 900
        nothing_overlaps_or_leaves(name, figure, labels)


@pytest.mark.parametrize("ns", [111, 3_000, 4_999, 77_777_777])
def test_a_single_point_has_a_scale(ns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [make_point(time_ns=ns, peak_bytes=3 * ns)]
    for figure in figures(make_run(), points).values():
        ticks = re.findall(r"^\d+ \S+$", words(figure, monkeypatch), flags=re.MULTILINE)
        assert len(ticks) >= 2


def test_dollars_are_not_mathematics(monkeypatch: pytest.MonkeyPatch) -> None:
    (figure,) = figures(make_run(), [make_point(impl="a$x^2$b")]).values()
    assert r"a\$x^2\$b" in words(figure, monkeypatch)


def test_a_name_is_drawn_whatever_it_begins_with(monkeypatch: pytest.MonkeyPatch) -> None:
    (figure,) = figures(make_run(), [make_point(impl="_mine")]).values()
    assert "_mine" in words(figure, monkeypatch)


def test_figure_names_are_slugs() -> None:
    same = [make_failure("crash", "x", op=op) for op in ("../a b", "a b")]
    assert list(figures(make_run(), [*h100_sweep(), *same])) == [
        "a_b-fwd-bf16-B1-H16-K128-V128-time",
        "a_b-fwd-bf16-B1-H16-K128-V128_-time",
        "linear_attention-fwd-bf16-B1-H16-K128-V128-time",
        "linear_attention-fwd-bf16-B1-H16-K128-V128-floor",
        "linear_attention-fwd-bf16-B1-H16-K128-V128-hbm",
        "linear_attention-fwd-bf16-B1-H16-K128-V128-memory",
        "linear_attention-fwd-bf16-B1-H16-K128-V128-roofline",
        "linear_attention-fwd-bf16-B1-H16-K128-V128-error",
    ]


def test_time_figure_names_lines_slopes_floor_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    text = words(h100_figures()[f"{FWD}-time"], monkeypatch)
    assert re.search(r"^quadratic +T\^2\.00\s±0\.02$", text, flags=re.MULTILINE)
    assert "softmax_attention/sdpa_flash\n(another function)" in text
    assert "HBM floor at 3020 GB/s" in text
    assert {"quadratic: oom", "naive_cumsum: oom", "recurrent: skipped"} <= set(text.splitlines())
    assert "hollow: wall time" in text
    assert [length(T) for T in LENGTHS] == re.findall(r"^\d+k$", text, flags=re.MULTILINE)
    for fact in ("H100", "torch 2.11.0", "triton 3.6.0", "event timer, cold L2", "2026-01-02"):
        assert fact in text


def test_only_another_function_is_dashed() -> None:
    axes = h100_figures()[f"{FWD}-time"].axes[0]
    dashed = {to_hex(line.get_color()) for line in axes.lines if line.get_linestyle() == "--"}
    assert dashed == {styles(["sdpa_flash"])["sdpa_flash"].colour}


def test_a_floor_that_is_not_copying_is_not_called_hbm(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [make_point(T, floor_ns=T, compulsory_bytes=T) for T in LENGTHS]
    text = words(figures(make_run(), points)[f"{FWD}-time"], monkeypatch)
    assert "HBM floor" not in text
    assert "matmul rate" in text


def test_a_figure_of_failures_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figures(make_run(), all_failed())[f"{FWD}-time"]
    assert len(figure.axes[0].lines) == 1  # the floor
    assert "nothing in this sweep succeeded" in words(figure, monkeypatch)
    assert f"{FWD}-memory" not in figures(make_run(), all_failed())


def test_no_points_make_no_figure() -> None:
    assert figures(make_run(), []) == {}


def test_a_cpu_run_has_no_floor_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = (made := figures(make_cpu_run(), cpu_sweep()))
    text = words(made[name], monkeypatch)
    assert name.endswith("-time")
    assert "floor" not in text
    assert "wall clock" in text


def test_no_memory_beyond_the_inputs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    run, points = SWEEPS["no memory used"]
    figure = figures(run, points)[f"{FWD}-memory"]
    assert figure is not None
    assert "chunked: 0 B" in words(figure, monkeypatch)


def figure_of(kind: str, points: list[Point]) -> Figure:
    (figure,) = (f for name, f in figures(make_run(), points).items() if name.endswith(kind))
    return figure


def drawn_values(figure: Figure) -> dict[str, dict[float, float]]:
    """Lines by colour: values by length."""
    return {
        to_hex(line.get_color()): dict(zip(*line.get_data(), strict=True))
        for line in figure.axes[0].lines
        if len(line.get_xdata()) > 1 and line.get_linestyle() != "None"
    }


def test_floor_figure_shows_multiples_and_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [*h100_sweep(), make_failure("crash", "no", 1024, impl="direct")]
    figure = figure_of("-floor", points)
    lines = drawn_values(figure)
    assert lines[styles(["fla_chunk"])["fla_chunk"].colour.lower()] == {
        p.shape["T"]: p.x_floor for p in points if p.impl == "fla_chunk"
    }
    assert lines[INK] == dict.fromkeys(LENGTHS, 1.0)
    assert len(lines) == 8  # six with a kernel time, softmax, the floor
    text = words(figure, monkeypatch)
    assert "HBM floor at 3020 GB/s" in text
    assert "no kernel time: recurrent" in text
    assert "each function over its own floor" in text
    assert {"quadratic: oom", "direct: crash"} <= set(text.splitlines())
    assert {"1x", "10x", "100x"} <= set(text.splitlines())


def test_hbm_figure_shows_the_model_and_the_compulsory_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = h100_sweep()
    figure = h100_figures()[f"{FWD}-hbm"]
    lines = drawn_values(figure)
    assert lines[styles(["chunked"])["chunked"].colour.lower()] == {
        p.shape["T"]: p.hbm.model_bytes for p in points if p.impl == "chunked"
    }
    assert lines[INK] == {p.shape["T"]: p.compulsory_bytes for p in points if p.impl == "chunked"}
    text = words(figure, monkeypatch)
    assert "HBM bytes per call, modelled" in text
    assert "compulsory bytes" in text
    assert re.search(r"neither measured nor modelled:\srecurrent,", text)
    assert "quadratic: oom" in text


def test_hbm_figure_prefers_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Hbm(read_bytes=2**24, write_bytes=2**23, model_bytes=2**20, source="ncu")
    modelled = Hbm(model_bytes=2**20, source="model")
    points = [make_point(T, hbm=measured) for T in LENGTHS]
    figure = figure_of("-hbm", points)
    assert "HBM bytes per call, measured (ncu)" in words(figure, monkeypatch)
    assert set(*(line.values() for line in drawn_values(figure).values())) == {2**24 + 2**23}
    figure = figure_of("-hbm", [*points, *(make_point(T, hbm=modelled) for T in LENGTHS[3:])])
    text = words(figure, monkeypatch)
    assert "HBM bytes per call, modelled or measured (ncu)" in text
    assert {"chunked (model)", "chunked (ncu)"} <= set(text.splitlines())
    faces = [to_hex(line.get_markerfacecolor()) for line in figure.axes[0].lines[:2]]
    assert sorted(face == "#ffffff" for face in faces) == [False, True]


def errors(dtype: str = "bf16", **by_impl: tuple[float | None, float]) -> list[Point]:
    """Of each implementation its error at 1k, growing with T, and its budget."""
    return [
        make_point(
            T, impl=impl, dtype=dtype, error_budget=budget * (T / 1024) ** 0.01,
            error_rel=None if error is None else error * (T / 1024) ** 0.25,
        )
        for impl, (error, budget) in by_impl.items()
        for T in LENGTHS
    ]  # fmt: skip


def test_error_figure_shows_errors_below_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        *errors(chunked=(1e-3, 8e-3), fla_chunk=(2e-3, 8e-3), direct=(None, 8e-3)),
        make_failure("wrong", "o is off", impl="quadratic", error_rel=0.5, error_budget=8e-3),
    ]
    figure = figure_of("-error", points)
    axes, lines = figure.axes[0], drawn_values(figure)
    for impl in ("chunked", "fla_chunk"):
        expected = {p.shape["T"]: p.error_rel for p in points if p.impl == impl}
        assert lines[styles([impl])[impl].colour.lower()] == expected
    assert lines[INK] == {p.shape["T"]: p.error_budget for p in points if p.impl == "chunked"}
    assert len(lines) == 3
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    [grey] = [path for area in axes.collections for path in area.get_paths() if len(path) > 4]
    assert grey.vertices[:, 1].min() == pytest.approx(8e-3)  # above the budget alone
    text = words(figure, monkeypatch)
    assert {"error budget", "quadratic: wrong", "0.001", "0.002"} <= set(text.splitlines())
    assert "relative error, against float64" in text
    assert "error not recorded: direct" in text


def test_an_error_of_zero_is_said_and_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    points = errors(chunked=(1e-3, 8e-3), direct=(0.0, 8e-3))
    points[2] = points[2].model_copy(update={"error_rel": 0.0})
    figure = figure_of("-error", points)
    lines = drawn_values(figure)
    assert set(lines[styles(["chunked"])["chunked"].colour.lower()]) == {
        T for T in LENGTHS if points[2].shape["T"] != T
    }
    assert len(lines) == 2
    assert {"chunked: error 0", "direct: error 0"} <= set(words(figure, monkeypatch).splitlines())
    for budget in (8e-3, None):
        point = make_point(error_rel=0.0, error_budget=budget)
        figure = figure_of("-error", [point])
        assert "every error is 0" in words(figure, monkeypatch)
        render(figure, "svg")


def test_budgets_that_differ_say_whose_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, rounded = (1e-7, 1e-6), (3e-4, 2e-3)
    points = errors("fp32", chunked=exact, quadratic=exact, fla_chunk=rounded)
    figure = figure_of("-error", points)
    text = " ".join(words(figure, monkeypatch).split())
    assert "error budget of chunked, quadratic" in text
    assert "error budget of fla_chunk" in text
    starts = [float(line.get_ydata()[0]) for line in figure.axes[0].lines if not line.get_marker()]
    assert starts == [1e-6, 2e-3]
    softmax = [
        p.model_copy(update={"op": "softmax_attention", "impl": "sdpa_flash"})
        for p in errors(chunked=(1e-3, 5e-3))
    ]
    figure = figure_of("-error", [*errors(chunked=(1e-3, 8e-3)), *softmax])
    lines = words(figure, monkeypatch).splitlines()
    assert "error budget of linear_attention" in " ".join(lines)
    [dashed] = [
        line
        for line in figure.axes[0].lines
        if not line.get_marker() and line.get_linestyle() == "--"
    ]
    assert dashed.get_ydata()[0] == 5e-3


def test_many_equal_lines_are_not_wider_than_three() -> None:
    points = [make_point(T, impl=f"contender_{i}", time_ns=T) for i in range(9) for T in LENGTHS]
    lines = [
        line for line in figure_of("-time", points).axes[0].lines if line.get_linestyle() != "None"
    ]
    widths = [line.get_linewidth() for line in lines]
    assert widths == sorted(widths, reverse=True)  # the lower, the wider
    assert len(set(widths)) == 9 and max(widths) == pytest.approx(4 * min(widths))


@pytest.mark.parametrize(("apart", "wider"), [(1.0, True), (1.008, True), (1.03, False)])
def test_a_line_under_a_nearly_equal_one_is_wider(apart: float, wider: bool) -> None:
    points = [
        make_point(T, impl=impl, time_ns=1000 * T * times)
        for impl, times in (("chunked", 1.0), ("quadratic", apart))
        for T in LENGTHS
    ]
    lines = figure_of("-time", points).axes[0].lines
    widths = {line.get_linewidth() for line in lines if line.get_linestyle() != "None"}
    assert len(widths) == 1 + wider


def test_no_figure_without_its_value() -> None:
    assert [name.rpartition("-")[2] for name in figures(make_run(), [make_point()])] == ["time"]
    wall = make_point(time_ns=None, wall_ns=1000, floor_ns=10)
    assert [name.rpartition("-")[2] for name in figures(make_run(), [wall])] == ["time"]


def test_styles_tell_sixteen_implementations_apart_and_stay() -> None:
    names = [point.impl for point in contenders(16)]
    chosen = styles([*names, "fla_chunk"])
    assert len(set(chosen.values())) == 17
    assert chosen == styles([*names[::-1], "fla_chunk"])
    assert chosen["fla_chunk"] == styles(["fla_chunk"])["fla_chunk"]
    assert len({style.colour for style in styles(names[::7][:7]).values()}) == 7


def test_one_implementation_looks_the_same_in_every_figure() -> None:
    made = figures(make_run(), [*h100_sweep(), *h100_sweep("fwdbwd")]).values()
    looks = [
        {to_hex(line.get_color()) + str(line.get_marker()) for line in figure.axes[0].lines}
        for figure in made
    ]
    ours = styles(["triton_chunked"])["triton_chunked"]
    assert len(looks) == 12
    assert all((ours.colour + ours.marker).lower() in look for look in looks)


@functools.cache
def drawn_twice() -> tuple[Figure, Figure]:
    once, again = (next(iter(figures(*SWEEPS["h100"]).values())) for _ in range(2))
    return once, again


@pytest.mark.parametrize("format", ["svg", "png", "pdf"])
def test_rendering_is_stable(format: str) -> None:
    once, again = drawn_twice()
    content = render(once, format)  # type: ignore[arg-type]
    assert content == render(once, format) == render(again, format)  # type: ignore[arg-type]
    assert b"<dc:date>" not in content


def test_the_users_settings_neither_matter_nor_change() -> None:
    plain_settings = render(next(iter(figures(*SWEEPS["cpu"]).values())), "svg")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert render(next(iter(figures(*SWEEPS["cpu"]).values())), "svg") == plain_settings
        assert dict(matplotlib.rcParams) == before
