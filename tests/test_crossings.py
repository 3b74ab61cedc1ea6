"""reports/crossings.py: where one function overtakes another, and how that is told and drawn."""

from __future__ import annotations

import json
import math

import pytest

from chela_bench.records import Point
from chela_bench.reports.crossings import comparison, crossings, slope_label
from chela_bench.reports.figures import figures
from chela_bench.reports.fit import Slope
from chela_bench.reports.groups import drawn_beside, groups
from chela_bench.reports.html import page
from chela_bench.reports.markdown import summary
from chela_bench.reports.pictures import sweeps, time_picture
from tests.factories import decode_sweep, layer_sweep, make_failure, make_point, make_run
from tests.running import ROOT
from tests.test_reports import printed

LAYER = {"op": "chela_layer", "direction": "fwd"}
SOFTMAX = {"op": "softmax_layer", "direction": "fwd"}


def points_of(times, *, impl, **fields):
    """times: tokens -> nanoseconds, None for no kernel time."""
    return [
        make_point(
            time_ns=ns, wall_ns=1 if ns is None else None, impl=impl,
            shape={"B": 1, "T": tokens, "D": 1024}, **fields,
        )
        for tokens, ns in times.items()
    ]  # fmt: skip


def two(ours, theirs):
    """The two groups of a line each."""
    found = groups([
        *points_of(ours, impl="chela", **LAYER), *points_of(theirs, impl="sdpa_cudnn", **SOFTMAX),
    ])  # fmt: skip
    return found[0], drawn_beside(found[0], found)


def power(c, p, lengths=(1024, 4096, 16384, 65536)):
    return {tokens: c * tokens**p for tokens in lengths}


@pytest.mark.parametrize("meet", [1500, 4097, 9318, 60_000])
def test_powers_of_t_cross_where_they_are_equal(meet):
    group, beside = two(power(100.0 * meet, 1), power(100.0, 2))
    [crossing] = crossings(group, beside)
    assert crossing.tokens == pytest.approx(meet, rel=1e-4)  # times are whole nanoseconds
    assert crossing.seconds == pytest.approx(100.0 * meet**2 / 1e9, rel=1e-4)
    assert (crossing.faster.label, crossing.slower.label) == ("chela", "sdpa_cudnn")


def test_who_is_overtaken_is_told_as_such():
    group, beside = two(power(100.0, 2), power(100.0 * 9318, 1))
    said = comparison(group, beside)
    assert said[0] == "sdpa_cudnn overtakes chela at T = 9.10k (between 4k and 16k)."


def test_lines_that_meet_at_a_measured_length_cross_there():
    group, beside = two({1024: 30, 4096: 40, 16384: 50}, {1024: 20, 4096: 40, 16384: 60})
    [crossing] = crossings(group, beside)
    assert crossing.tokens == 4096 and crossing.seconds == pytest.approx(40e-9)
    assert comparison(group, beside)[0] == "chela overtakes sdpa_cudnn at T = 4.00k."


def test_lines_that_touch_do_not_cross():
    group, beside = two({1024: 30, 4096: 40, 16384: 90}, {1024: 20, 4096: 40, 16384: 60})
    assert crossings(group, beside) == []


def test_lines_may_cross_twice():
    group, beside = two({1024: 30, 4096: 40, 16384: 90}, {1024: 20, 4096: 50, 16384: 60})
    assert [c.faster.label for c in crossings(group, beside)] == ["chela", "sdpa_cudnn"]


def test_only_lengths_that_both_have_are_compared():
    ours, theirs = power(100.0 * 9318, 1), power(100.0, 2)
    del theirs[4096]
    group, beside = two(ours, theirs)
    assert crossings(group, beside)[0].between == (1024, 16384)
    group, beside = two({1024: 30}, {4096: 20})
    assert comparison(group, beside) == []


def test_wall_times_are_not_compared_with_kernel_times():
    group, beside = two({1024: 30, 4096: None, 16384: 60}, {1024: 20, 4096: 10, 16384: 90})
    assert crossings(group, beside)[0].between == (1024, 16384)


def test_failed_points_are_not_compared():
    points = [
        *points_of({1024: 30, 16384: 60}, impl="chela", **LAYER),
        make_failure("oom", "no room", 4096, impl="chela",
                     **LAYER | {"shape": {"B": 1, "T": 4096, "D": 1024}}),
        *points_of({1024: 20, 4096: 10, 16384: 90}, impl="sdpa_cudnn", **SOFTMAX),
    ]  # fmt: skip
    group, beside = groups(points)
    assert crossings(group, beside)[0].between == (1024, 16384)


def test_one_that_is_faster_throughout_is_told_so():
    group, beside = two(power(1.0, 1), power(10.0, 1))
    assert comparison(group, beside)[0] == "Faster than sdpa_cudnn at 1k..64k: chela."
    group, beside = two(power(10.0, 1), power(1.0, 1))
    assert comparison(group, beside)[0] == "Slower than sdpa_cudnn at 1k..64k: chela."


def test_without_another_function_nothing_is_compared():
    assert comparison(groups(layer_sweep())[0], None) == []


def test_slopes_are_told_with_their_interval():
    group, beside = two(power(1e5, 1), power(10.0, 2))
    said = comparison(group, beside)[-1]
    assert "chela T^1.00\N{NO-BREAK SPACE}±0.00, sdpa_cudnn T^2.00\N{NO-BREAK SPACE}±0.00" in said
    assert slope_label(Slope(1.234, 1.2, 1.268)) == "T^1.23\N{NO-BREAK SPACE}±0.03"


def exact_crossing():
    """Of 100 + 60 k and 40 + 22 k + 3.5 k^2 microseconds, k = T / 1024."""
    return (38 + math.sqrt(38**2 + 4 * 3.5 * 60)) / 7


@pytest.mark.parametrize("direction", ["fwd", "fwdbwd"])
def test_every_report_tells_where_chela_overtakes(direction):
    run, points = make_run(), layer_sweep(direction)
    group, beside = groups(points)
    by_pair = {(c.faster.label, c.slower.label): c for c in crossings(group, beside)}
    crossing = by_pair["chela", "sdpa_cudnn"]
    assert crossing.tokens / 1024 == pytest.approx(exact_crossing(), rel=0.01)
    sentence = "chela overtakes sdpa_cudnn at T = 12.2k (between 12k and 16k)."
    assert printed(run, points, width=120).count(sentence) == 1
    assert summary(run, points).replace("\\", "").count(sentence) == 1
    svgs = dict.fromkeys(figures(run, points), b"<svg/>")
    assert page(run, points, svgs).count(sentence) == 1


def test_the_figure_rings_each_crossing_and_names_it():
    run, points = make_run(), layer_sweep()
    [sweep] = sweeps(run, points).values()
    picture = time_picture(sweep)
    met = crossings(sweep.group, sweep.beside)
    assert len(met) == 4
    assert [(m.tokens, m.value, m.name) for m in picture.marks] == [
        (c.tokens, c.seconds * 1e9, c.place) for c in met
    ]
    assert "chela overtakes sdpa_cudnn at 12.2k" in picture.notes
    [name] = [n for n in figures(run, points) if n.endswith("-time")]
    axes = figures(run, points)[name].axes[0]
    rings = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert sorted(float(line.get_xdata()[0]) for line in rings) == [c.tokens for c in met]
    shown = [text.get_text() for text in axes.texts if text.get_text().endswith("k")]
    assert shown == [met[0].place, met[1].place, met[2].place]  # the last would lie on the third


def test_only_a_figure_of_two_functions_has_marks():
    [sweep] = sweeps(make_run(), [p for p in layer_sweep() if p.op == "chela_layer"]).values()
    assert time_picture(sweep).marks == ()


# --- what a layer learns and computes, and what a token costs -------------------------------------


def test_layers_show_parameters_and_flops_in_every_table():
    run, points = make_run(), layer_sweep()
    row = next(line for line in printed(run, points, width=120).splitlines() if " 4k " in line)
    assert row.split()[:5] == ["4k", "92.0", "us", "12.7M", "76.0"]
    text = summary(run, points)
    assert "| tokens/s | parameters | GFLOP | TFLOP/s | peak MiB |" in text
    assert "| 4k | chela | 0.340 | 3.70 | 12.0M | 12.7M | 76.0 | 224 |" in text
    html = page(run, points, {})
    assert ">parameters</th>" in html and ">GFLOP</th>" in html and ">bytes/token</th>" not in html


def test_other_ops_have_no_such_columns():
    run, points = make_run(), [make_point(flops=10**9)]
    assert "parameters" not in summary(run, points) and "params" not in printed(run, points)
    assert ">parameters</th>" not in page(run, points, {})


def test_an_older_record_of_a_layer_has_a_dash():
    points = layer_sweep()
    points[0] = points[0].model_copy(update={"parameters": None})
    points = [p for p in points if p.impl != "chela_merged"]
    row = next(line for line in printed(make_run(), points, width=120).splitlines() if "1k" in line)
    assert row.split()[:5] == ["1k", "23.0", "us", "-", "19.0"]


def test_older_records_are_read():
    lines = (ROOT / "docs/results/h100-published/points.jsonl").read_text().splitlines()
    assert all("parameters" not in json.loads(line) for line in lines)
    points = [Point.model_validate_json(line) for line in lines]
    assert {point.parameters for point in points} == {None}
    assert any(point.hbm_bytes_per_token for point in points)
    assert "params" not in printed(make_run(), points, width=120)


def test_steps_show_tokens_a_second_and_bytes_a_token():
    run, points = make_run(), decode_sweep()
    text = printed(run, points, width=120)
    assert "16k: chela 800k tokens/s, 2.98 MiB HBM a token" in text
    assert "16k: sdpa_flash 40.0k tokens/s, 63.0 MiB HBM a token" in text
    assert "16k: products" not in text
    assert text.count("the mean over a block of 64 steps") == 2
    markdown = summary(run, points)
    assert "| 16k | chela | **0.0800** |  | 800k | 2.98 MiB | 25.3M | 1.19 |" in markdown
    assert "bytes/token" in page(run, points, {})


def test_tokens_of_a_step_are_the_batchs():
    point = decode_sweep()[0]
    assert point.tokens_per_s == pytest.approx(64 / 8e-5)
    assert point.hbm_bytes_per_token == pytest.approx(200e6 / 64)
    forward = make_point(T=1000, hbm={"read_bytes": 600, "write_bytes": 400, "model_bytes": 9})
    assert forward.hbm_bytes_per_token == 1.0
    assert make_point().hbm_bytes_per_token is None
