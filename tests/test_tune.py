"""Tuning: every configuration a point, timed in turn; budgets, resuming, tables, what is shown."""

from __future__ import annotations

import io
import itertools
import json

import pytest
from rich.console import Console

from chela_bench.bench import atlas, tables, tune
from chela_bench.bench.config import load_config
from chela_bench.bench.plan import Flags
from chela_bench.errors import ArgumentError, EnvironmentProblem, RecordError, UsageError
from chela_bench.kernels import tuned
from chela_bench.records import Static
from chela_bench.reports.figures import render
from chela_bench.reports.heat import draw_heat_map
from chela_bench.reports.tune import (
    calls,
    rank_correlation,
    summaries,
    tune_maps,
    tune_table,
)
from tests.factories import make_cpu_run, make_failure, make_point, make_run
from tests.running import ROOT, Silent, in_this_process, tiny_config
from tests.test_atlas_reports import make_row

pytestmark = pytest.mark.usefixtures("forked_workers")

TUNED = f"{ROOT / 'tests/faults.py'}:chunks_of"


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path)


def tuned_run(config, *arguments, **variables):
    """A finished `tune --json` and its document."""
    done = in_this_process(
        "tune", *arguments, "--json", "--config", config, "--out", config.parent / "runs",
        "--device", "cpu", **variables,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done, json.loads(done.stdout)


# --- a whole one ----------------------------------------------------------------------------------


def test_every_configuration_is_checked_timed_in_turn_and_on_record(config):
    done, document = tuned_run(
        config, "linear_attention", "--impl", TUNED, "--axis", "CHUNK=16,32,64,-1", "--lens", "128"
    )
    assert done.returncode == 3  # a chunk of -1 is wrong, and says so
    points = {point["config"]["CHUNK"]: point for point in document["points"]}
    assert sorted(points) == [-1, 16, 32, 64]
    assert points[-1]["outcome"] == "wrong"
    assert points[-1]["time_ns"] is None
    for size in (16, 32, 64):
        assert points[size]["outcome"] == "ok"
        assert points[size]["rounds"] == points[size]["time_ns"]["n"] >= 3
        assert points[size]["error_rel"] <= points[size]["error_budget"]
    [call] = document["calls"]
    assert (call["configurations"], call["timed"]) == (4, 3)
    assert call["best"] in call["ties"]
    assert document["not_tried"] == []
    assert document["run"]["settings"]["command"] == "tune"
    folder = config.parent / "runs" / document["run"]["run_id"]
    samples = (folder / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 6  # each by itself, and in turn
    assert (folder / "results.csv").exists()

    again = in_this_process("tune", "--resume", folder)
    assert again.returncode == 3
    assert "0 points on" in again.stderr  # in turn they were timed already
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 6
    other = in_this_process("sweep", "--resume", folder)
    assert other.returncode == 2
    assert "is a run of tune" in other.stderr
    said = in_this_process("tune", "linear_attention", "--resume", folder)
    assert "leave the others out" in said.stderr


def test_a_budget_ends_it_and_a_resumed_one_goes_on(config):
    arguments = ("linear_attention", "--impl", TUNED, "--axis", "CHUNK=16,32,64", "--lens", "128")
    done, document = tuned_run(config, *arguments, "--budget", "0.001s")
    assert done.returncode == 0
    assert len(document["points"]) == 0
    assert len(document["not_tried"]) == 3
    folder = config.parent / "runs" / document["run"]["run_id"]
    assert "not tried for lack of time: 3 configurations" in done.stderr
    assert f"tune --resume {folder}" in done.stderr
    resumed = in_this_process("tune", "--resume", folder, "--json")
    assert resumed.returncode == 0, resumed.stderr
    whole = json.loads(resumed.stdout)
    assert {point["outcome"] for point in whole["points"]} == {"ok"}
    assert all(point["rounds"] for point in whole["points"])
    assert whole["run"]["finished_utc"]


def test_one_that_dies_in_turn_keeps_its_own_time(config):
    """The process dies when it meets the second configuration within one session of timing."""
    impl = f"{ROOT / 'tests/faults.py'}:dies_in_turn"
    done, document = tuned_run(
        config, "linear_attention", "--impl", impl, "--axis", "CHUNK=16,32", "--lens", "128"
    )
    assert {p["outcome"] for p in document["points"]} == {"ok"}, document["points"]
    assert {p["rounds"] for p in document["points"]} == {None}
    assert "not timed in turn, each by itself instead" in done.stderr


def test_ours_in_the_interpreter_with_what_the_compiler_says(config):
    """Times mean nothing there, and it says so; static columns are the architecture's."""
    done, document = tuned_run(
        config, "linear_attention", "--lens", "32", "--dtype", "fp32", "--arch", "sm_86",
        "--axis", "num_stages=1,6", TRITON_INTERPRET="1",
        XDG_CACHE_HOME=str(config.parent),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    points = document["points"]
    assert len(points) == 3  # two and the defaults
    refused = [p for p in points if p["config"].get("num_stages") == 6]
    assert {p["outcome"] for p in refused} == {"skipped"}
    assert all("no config num_stages=6" in p["reason"] for p in refused)
    for point in points:
        if point["outcome"] == "ok":
            assert point["static"]["kernel"] == "linear_attention_walk"
            assert point["static"]["smem_bytes"] >= 0
            assert point["static"]["regs"] > 0
            assert point["static"]["compile_ms"] > 0
    assert document["run"]["settings"]["interpreted"] is True
    folder = config.parent / "runs" / document["run"]["run_id"]
    shown = in_this_process("tune", "--resume", folder, "--write-table")
    assert "these were taken on a CPU" in shown.stderr


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "tune wants an OP"),
        (["linear_attention"], 2, "tune wants settings to try: --axis NAME=VALUE"),
        (["chela_layer", "--axis", "X=1"], 2, "chela_layer has no settings to tune; there are:"),
        (["linear_attention", "--axis", "BLOCKT=32"], 2, "nothing selected has such an axis"),
        (["linear_attention", "--axis", "BLOCK_T=32"], 6, "needs a GPU; compile its block sizes"),
        (["linear_attention", "--axis", "BLOCK_T=32", "--budget", "soon"], 2, "'soon' is no time"),
        (["linear_attention", "--axis", "BLOCK_T=32", "--budget", "0m"], 2, "is no time"),
        (["linear_attention", "--axis", "B=1", "--impl", "chunked"], 2, "has such an axis"),
        (["linear_attention", "--retry", "crash"], 2, "--retry goes with --resume"),
        (["--resume", "nowhere"], 2, "nowhere is no run folder"),
        (["long_conv", "--axis", "N2=16", "--direction", "decode"], 6, "needs a GPU"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_a_sentence(arguments, code, words, tmp_path):
    done = in_this_process("tune", *arguments, "--out", tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_defaults_are_among_what_is_tried(config, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    flags = Flags(
        ops=["linear_attention"], axes={"BLOCK_T": [16, 32], "segments": [1, 2]}, lens="1k,2k"
    )
    settings = tune.resolve(load_config(config), flags, "cpu", arch=None)
    wanted = tune.cases(settings)
    assert len(wanted) == 2 * (4 + 1)
    assert sum(case.config == {} for case in wanted) == 2
    assert {case.impl for case in wanted} == {"triton_chunked"}


# --- pruning --------------------------------------------------------------------------------------


def test_what_cannot_fit_is_not_tried(config, tmp_path, monkeypatch):
    """The atlas is played: one configuration is too large, one's compiler crashed, one is refused;
    the last one is measured."""
    flags = Flags(ops=["linear_attention"], impls=[TUNED], axes={"CHUNK": [16, 32, 64, 128]},
                  lens="128", directions=("fwd",))  # fmt: skip
    settings = tune.resolve(load_config(config), flags, "cpu", arch="sm_86")
    shared = make_row(kernel="scan", asked=[case.config for case in tune.cases(settings)])

    def compile_all(cases, archs, options, **_):
        assert archs == ["sm_86"]
        rows = [shared, *(make_row(asked=[case.config]) for case in cases)]
        changes = {
            32: {"outcome": "out_of_resources", "fits": False, "reason": "needs 128 KB"},
            64: {"outcome": "crash", "fits": False, "reason": "killed by SIGSEGV"},
        }
        found = atlas.Found("3.7.1", rows)
        for i, case in enumerate(cases, start=1):
            rows[i] = rows[i].model_copy(update=changes.get(case.config["CHUNK"], {}))
            found.by_case.setdefault("sm_86", {})[case.key] = [0, i]
        refused = {"op": "linear_attention", "impl": TUNED, "arch": "sm_86", "direction": "fwd",
                   "asked": {"CHUNK": 128}, "tokens": 128, "reason": "no such chunk"}  # fmt: skip
        found.refused.append(atlas.Refused.model_validate(refused))
        return found

    monkeypatch.setattr(atlas, "compile_all", compile_all)

    class Listener(Silent):
        def said(self, line):
            self.heard.append(("said", line))

    listener = Listener()
    done = tune.Tuning(settings, tmp_path / "run", listener).run()
    outcomes = {point.config["CHUNK"]: (point.outcome, point.reason) for point in done.points}
    assert outcomes == {
        16: ("ok", None),
        32: ("out_of_resources", "walk for sm_86: needs 128 KB"),
        64: ("crash", "walk for sm_86: killed by SIGSEGV"),
        128: ("skipped", "for sm_86: no such chunk"),
    }
    began = [key for kind, key in listener.heard if kind == "case"]
    assert len(began) == 1
    assert all(point.static.kernel == "walk" for point in done.points)  # not what all share


# --- what is shown --------------------------------------------------------------------------------


def static(smem_kb, regs=128, blocks=2, spills=0):
    return Static(
        kernel="walk", smem_bytes=smem_kb * 1024, regs=regs, spill_store_bytes=spills,
        spill_load_bytes=spills, ctas_per_sm=blocks, num_warps=4, compile_ms=900,
    )  # fmt: skip


def tuning(T=4096, impl="triton_chunked", **changes):
    """BLOCK_T x BLOCK_V x num_warps: a wide tile is faster until it does not fit."""
    points = [make_point(T, impl=impl, time_ns=1.6e5, static=static(96), rounds=40, error_rel=2e-3,
                         error_budget=1e-2, config={}, **changes)]  # fmt: skip
    for t, v, warps in itertools.product((32, 64, 128), (32, 64, 128), (4, 8)):
        config = {"BLOCK_T": t, "BLOCK_V": v, "num_warps": warps}
        if t * v >= 128 * 128:
            points.append(
                make_failure("out_of_resources", "walk for sm_90: needs 300 KB", T, impl=impl,
                             config=config, static=static(300), **changes)
            )  # fmt: skip
            continue
        time_ns = 2e5 - 6 * t * v + 100 * warps
        points.append(
            make_point(
                T,
                impl=impl,
                time_ns=time_ns,
                config=config,
                rounds=40,
                error_rel=1e-3 + t * 1e-6,
                error_budget=1e-2,
                static=static(t * v // 50, 64 + t, blocks=1 + 64 // t),
                **changes,
            )
        )
    return points


RUN = make_run(settings={"command": "tune"})


def drawn(what, width=100):
    console = Console(width=width, file=io.StringIO())
    console.print(what)
    return console.file.getvalue()


def test_ties_are_all_within_a_hundredth_of_the_fastest():
    [call] = calls(tuning())
    fastest = call.timed[0].time_ns.median
    assert len(call.ties) >= 2
    assert all(point.time_ns.median <= 1.01 * fastest for point in call.ties)
    others = [point for point in call.timed if point not in call.ties]
    assert all(point.time_ns.median > 1.01 * fastest for point in others)
    assert call.default.config == {}
    assert call.speedup == pytest.approx(1.6e5 / fastest)
    assert call.error_range == (1e-3 + 32e-6, 2e-3)


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_table_tells_time_and_static_figures_side_by_side(width):
    text = drawn(tune_table(RUN, [*tuning(), *tuning(16384)]), width)
    assert all(len(line) <= width for line in text.splitlines())
    joined = " ".join(text.split())
    for words in ("x best", "regs", "within 1 % of it", "rank correlation with time: score",
                  "errors from 1.03e-03 to 2.00e-03; 1.00e-02 allowed", "out_of_resources",
                  "needs 300 KB", "and 1 more"):  # fmt: skip
        assert words in joined
    assert "interpreter" not in text


def test_times_of_the_interpreter_are_named_as_such():
    run = make_cpu_run(settings={"command": "tune", "interpreted": True})
    points = [point.model_copy(update={"device": "cpu"}) for point in tuning()]
    assert "say nothing of a GPU" in drawn(tune_table(run, points))
    [heat] = tune_maps(run, points).values()
    assert "say nothing of a GPU" in heat.subtitle


def test_a_tuning_without_a_right_configuration_has_a_table_and_no_winner():
    points = [make_failure("wrong", "o is off", config={"BLOCK_T": t}) for t in (32, 64)]
    text = drawn(tune_table(RUN, points))
    assert "wrong: BLOCK_T=32, and 1 more" in text
    assert summaries(points)[0]["best"] is None
    assert summaries([]) == []
    assert "no points" in drawn(tune_table(RUN, []))


def test_heat_maps_show_time_shared_memory_and_what_failed():
    points = [*tuning(), *tuning(16384)]
    [(name, heat)] = tune_maps(RUN, points).items()
    assert name == "linear_attention-triton_chunked-fwd-bf16-B1-H16-K128-V128-tune"
    assert [panel.name for panel in heat.panels] == ["T = 4k", "T = 16k"]
    panel = heat.panels[0]
    assert panel.missing == {(128, 128): "out of resources"}
    assert panel.values[128, 64] == 2e5 - 6 * 128 * 64 + 400  # of two numbers of warps the best
    assert (128, 64) in panel.marked
    assert panel.under[128, 64] == "163 KB"
    figure = draw_heat_map(heat)
    words = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"151 µs", "163 KB", "99 KB (sm_86, 89, 120)"} <= words
    notes = figure._supxlabel.get_text().replace("\n", " ")
    assert "best of all num_warps" in notes
    assert "lines: where shared memory passes 99 KB" in notes
    assert "227 KB" not in notes  # nothing that was timed takes more
    assert render(figure, "png")[:4] == b"\x89PNG"
    assert tune_maps(RUN, [make_point(config={"segments": n}) for n in (1, 2)]) == {}


@pytest.mark.parametrize(
    ("pairs", "rank"),
    [
        ([(1, 10), (2, 20), (3, 30)], 1.0),
        ([(1, 30), (2, 20), (3, 10)], -1.0),
        ([(1, 1), (1, 2), (1, 3)], None),
        ([(1, 1), (2, 2)], None),
        # scipy.stats.spearmanr([1, 2, 2, 4, 5], [5, 6, 7, 8, 7]) = 0.7632
        ([(1, 5), (2, 6), (2, 7), (4, 8), (5, 7)], 0.7632),
    ],
)
def test_rank_correlation_is_spearmans(pairs, rank):
    assert rank_correlation(pairs) == rank


# --- tables ---------------------------------------------------------------------------------------


def convolutions(times, T=4096, direction="fwd"):
    return [
        make_point(T, op="long_conv", impl="triton", direction=direction, time_ns=time_ns,
                   shape={"B": 8, "T": T, "D": 1024}, config=config)
        for config, time_ns in times
    ]  # fmt: skip


MONARCH = {"method": "monarch", "N2": 64}
FACTORS = {"method": "factors", "N2": 32}


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tuned, "TABLE", path)
    monkeypatch.setattr(tuned, "capability", lambda device: "9.0")
    monkeypatch.setattr(tuned, "processors", lambda device: 132)

    def forget():
        tuned.tuned.cache_clear()
        tuned._entries.cache_clear()

    forget()
    yield path, forget
    forget()


def test_the_fastest_is_written_with_where_it_was_measured_and_is_what_kernels_take(table):
    import torch

    path, forget = table
    points = tuning()
    points[0] = points[0].model_copy(update={"time_ns": points[0].time_ns.model_copy(
        update={"median": 300_000})})  # fmt: skip
    written = tables.write_table(RUN, points, path)
    assert (written.added, written.kept_defaults) == (1, 0)
    [entry] = json.loads(path.read_text())["entries"]
    assert entry["measured"]["gpu"] == RUN.environment.name
    assert entry["measured"]["date"] == "2026-01-02"
    assert entry["measured"]["triton"] == "3.6.0"
    assert entry["measured"]["times_faster_than_defaults"] == pytest.approx(1.98, abs=0.01)
    cuda = torch.device("cuda", 0)
    when = {"heads": 16, "tokens": 4096, "K": 128, "V": 128, "trained": False}
    best = {"BLOCK_T": 64, "BLOCK_V": 128, "num_warps": 4}
    assert tuned.tuned("linear_attention", cuda, torch.bfloat16, **when) == entry["config"]
    assert entry["config"] in (best, {**best, "BLOCK_T": 128, "BLOCK_V": 64})
    for other in ({"tokens": 8192}, {"trained": True}, {"heads": 15}):
        assert tuned.tuned("linear_attention", cuda, torch.bfloat16, **{**when, **other}) is None
    assert tuned.tuned("linear_attention", cuda, torch.float16, **when) is None

    same = tuning()  # now the defaults are as fast: the entry goes
    same[0] = same[0].model_copy(
        update={"time_ns": same[0].time_ns.model_copy(update={"median": 152_000})}
    )
    assert tables.write_table(RUN, same, path).kept_defaults == 1
    assert json.loads(path.read_text())["entries"] == []
    forget()
    assert tuned.tuned("linear_attention", cuda, torch.bfloat16, **when) is None


def test_attention_plans_by_the_table_at_its_very_shape(table, monkeypatch):
    import torch

    from chela_bench.kernels import linear_attention as module

    path, _ = table
    slow = [p.model_copy(update={"time_ns": p.time_ns.model_copy(update={"median": 9_000_000})})
            if p.config == {} else p for p in tuning()]  # fmt: skip
    tables.write_table(RUN, slow, path)
    monkeypatch.setattr(module, "processors", lambda device: 132)
    monkeypatch.setattr(module, "has_wgmma", lambda device: False)

    def block_v(tokens, schedule="auto", config=(), **flags):
        device = torch.device("cuda", 0)
        arguments = (schedule, config, 1, 16, tokens, 128, 128, torch.bfloat16, device, False)
        options = module._plan(*arguments, **flags)[2]
        return dict(zip(module_options(), options, strict=True))["BLOCK_V"]

    def module_options():
        from chela_bench.kernels.linear_attention_config import OPTIONS

        return OPTIONS

    [entry] = json.loads(path.read_text())["entries"]
    assert block_v(4096) == entry["config"]["BLOCK_V"]
    assert block_v(4095) == -1
    assert block_v(4096, config=(("BLOCK_T", 64),)) == -1
    assert block_v(4096, schedule="split") == -1
    assert block_v(4096, causal=False) == -1
    assert block_v(4096, packed=True) == -1


def test_a_convolution_plans_by_the_table_at_its_very_length(table):
    import torch

    from chela_bench.kernels import short_long_conv as module

    path, _ = table
    times = [({}, 2e5), (MONARCH, 1e5), (FACTORS, 3e5)]
    assert tables.write_table(RUN, convolutions(times, 4096), path).added == 1
    device = torch.device("cpu")
    assert module._plan_for(4096, torch.bfloat16, device, None).N2 == 64
    usual = module._plan_for(4097, torch.bfloat16, device, None)
    assert usual == module.plan_for(4097)
    assert module._plan_for(4096, torch.bfloat16, device, FACTORS).method == "factors"


def test_one_length_in_two_directions_gets_what_is_best_over_both(table):
    path, _ = table
    points = convolutions([({}, 4e5), (MONARCH, 1e5), (FACTORS, 1.1e5)])
    points += convolutions([({}, 4e5), (MONARCH, 3e5), (FACTORS, 1.2e5)], direction="fwdbwd")
    tables.write_table(RUN, points, path)
    [entry] = json.loads(path.read_text())["entries"]
    assert entry["config"] == FACTORS


def test_entries_of_other_cards_and_calls_stay(table):
    path, _ = table
    times = [({}, 2e5), (MONARCH, 1e5)]
    tables.write_table(RUN, convolutions(times, 4096), path)
    tables.write_table(RUN, convolutions(times, 2048), path)
    small = RUN.environment.model_copy(update={"sm_count": 114})
    other = RUN.model_copy(update={"environment": small})
    tables.write_table(other, convolutions(times, 4096), path)
    tables.write_table(RUN, convolutions([({}, 2e5), (FACTORS, 1e5)], 4096), path)
    entries = json.loads(path.read_text())["entries"]
    assert len(entries) == 3
    [again] = [x for x in entries if x["processors"] == 132 and x["when"]["tokens"] == 4096]
    assert again["config"] == FACTORS


@pytest.mark.parametrize(
    ("run", "points", "words"),
    [
        (make_cpu_run(), tuning(), "these were taken on a CPU"),
        (RUN, tuning(impl="fla_chunk"), "linear_attention/fla_chunk has no table"),
        (RUN, [], "an empty run has no table"),
    ],
    ids=["cpu", "peer", "empty"],
)
def test_what_has_no_table_is_refused(run, points, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        tables.write_table(run, points, tmp_path / "tuned.json")
    assert not (tmp_path / "tuned.json").exists()


def test_a_damaged_table_is_told_and_left_alone(table):
    import torch

    path, forget = table
    for damage in ("", "[]", '{"schema": 2, "entries": []}', '{"schema": 1, "entries": [{}]}'):
        path.write_text(damage)
        forget()
        with pytest.raises(RecordError, match="is no table of configurations"):
            tables.write_table(RUN, convolutions([({}, 2e5), (MONARCH, 1e5)]), path)
        with pytest.raises(ArgumentError, match="is no table of configurations"):
            tuned.tuned("long_conv", torch.device("cuda"), torch.bfloat16, tokens=1)
        assert path.read_text() == damage
    path.unlink()
    forget()
    assert tuned.tuned("long_conv", torch.device("cuda"), torch.bfloat16, tokens=1) is None


def test_the_table_that_comes_along_can_be_read():
    assert tables.TABLE.resolve() == ROOT / "chela_bench/kernels/tuned.json"
    tuned._entries.cache_clear()
    tuned._entries(tables.TABLE)


def test_a_gpu_that_is_needed_is_told(config, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    flags = Flags(ops=["long_conv"], axes={"N2": [16]}, lens="1k")
    with pytest.raises(EnvironmentProblem, match="chela-bench atlas long_conv"):
        tune.resolve(load_config(config), flags, "cpu", arch=None)
