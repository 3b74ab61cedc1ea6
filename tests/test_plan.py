"""Flags become cases: what is planned, and what every mistake is answered with."""

from __future__ import annotations

import pytest

from chela_bench.bench import plan
from chela_bench.bench.config import load_config
from chela_bench.bench.lengths import parse_lengths
from chela_bench.bench.load import refuse_changed_files
from chela_bench.bench.registry import get_op
from chela_bench.cli.choices import Names
from chela_bench.errors import RecordError, UsageError
from tests.running import ROOT


@pytest.fixture(scope="module")
def config():
    return load_config(ROOT / "bench.toml")


def _cases(config, device="cuda", **flags):
    return plan.cases(plan.resolve(config, plan.Flags(**flags), [device]))


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("1k..8k", [1024, 2048, 4096, 8192]),
        ("1k", [1024]),
        ("1k..1k", [1024]),
        ("1,2,64", [1, 2, 64]),
        ("1k,3k,8k", [1024, 3072, 8192]),
        ("3k..24k", [3072, 6144, 12288, 24576]),
        ("1K, 1k ,1024", [1024]),
        ("1m", [1 << 20]),
        ("1k..3k", [1024, 2048]),
    ],
)
def test_lengths(text, lengths):
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    "text",
    ["0", "-1", "64k..1k", "1k..", "..1k", "1e9k", "abc", "", "1k,", "1k...4k", "1.5k", "0..4k",
     "1k..2k..4k", "99999999999999999999k", "\u0661k", " "],
)  # fmt: skip
def test_bad_lengths_say_what_came_and_the_way_out(text):
    with pytest.raises(UsageError, match="--lens") as error:
        parse_lengths(text)
    assert "1k..64k" in str(error.value) or "runs backwards" in str(error.value)


def test_the_default_plan_has_every_implementation_at_every_length(config):
    cases = _cases(config)
    assert len({case.key for case in cases}) == len(cases) == 7 * (2 * (10 + 1 + 4 + 3 + 4 + 2) + 4)
    assert {case.shape["T"] for case in cases} == {1 << n for n in range(10, 17)}


def test_the_cpu_preset_is_taken_where_there_is_no_gpu(config):
    settings = plan.resolve(config, plan.Flags(), ["cpu"])
    assert settings.preset == "cpu"
    assert settings.limits.call_s == config.presets["cpu"].limits["call_s"]
    assert max(settings.lens) == 16384
    assert plan.resolve(config, plan.Flags(lens="1k..64k"), ["cpu"]).lens[-1] == 65536


def test_flags_narrow_the_plan(config):
    cases = _cases(config, ops=["linear_attention"], impls=["fla_chunk"], lens="1k,2k",
                   dtypes=["fp16"], directions=["fwd"], sizes={"H": 4})  # fmt: skip
    assert [case.key for case in cases] == [
        "linear_attention/fla_chunk/fwd/fp16/B1-T1024-H4-K128-V128",
        "linear_attention/fla_chunk/fwd/fp16/B1-T2048-H4-K128-V128",
    ]


def test_an_implementation_brings_its_op(config):
    assert {case.op for case in _cases(config, impls=["sdpa_flash"])} == {
        "softmax_attention",
        "softmax_layer",
    }


def test_a_presets_shapes_of_other_ops_are_left_out(config):
    cases = _cases(config, preset="published", impls=["fla_chunk"], directions=["fwd"])
    assert sorted(case.shape["T"] for case in cases) == [2048, 8192, 16384, 16384, 65536]


def test_axes_multiply_only_where_they_are_taken(config):
    cases = _cases(config, impls=["triton_chunked", "chunked"], lens="1k", directions=["fwd"],
                   axes={"BLOCK_T": [32, 64], "num_warps": [4]})  # fmt: skip
    configs = [case.config for case in cases]
    assert configs == [
        {},
        {"BLOCK_T": 32, "num_warps": 4},
        {"BLOCK_T": 64, "num_warps": 4},
    ]


def test_an_op_without_gradients_is_not_planned_backward_unless_that_is_all(config):
    def directions(*asked):
        cases = _cases(config, ops=["reparameterization"], lens="1k", directions=asked)
        return {case.direction for case in cases}

    assert directions("fwd", "fwdbwd") == {"fwd"}
    assert directions("fwdbwd") == {"fwdbwd"}  # and every row says why not


def test_an_implementation_without_a_direction_asked_for_is_planned_only_by_name(config):
    def planned(**asked):
        cases = _cases(config, ops=["softmax_layer", "chela_layer"], lens="1k", **asked)
        return {f"{case.op}/{case.impl}/{case.direction}" for case in cases}

    stepping = ["reference", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "products"]
    steps = {f"softmax_layer/{name}/decode" for name in stepping}
    assert planned(directions=["decode"]) == {
        *steps, "chela_layer/reference/decode", "chela_layer/chela/decode",
    }  # fmt: skip
    forward = planned(directions=["fwd"])
    assert "softmax_layer/products/fwd" not in forward
    assert "chela_layer/chela_merged/fwd" in forward
    assert planned(directions=["fwd"], impls=["products", "chela"]) == {
        "softmax_layer/products/fwd", "chela_layer/chela/fwd",
    }  # fmt: skip


def test_where_none_has_the_direction_every_row_says_so(config):
    cases = _cases(config, ops=["softmax_attention"], lens="1k", directions=["decode"])
    assert [case.impl for case in cases] == ["sdpa_flash"]


def test_the_crossover_compares_two_layers_over_length(config):
    flags = {"preset": "crossover", "impls": ["chela", "sdpa_cudnn"]}
    cases = _cases(config, **flags)
    assert {(c.op, c.impl) for c in cases} == {
        ("chela_layer", "chela"), ("softmax_layer", "sdpa_cudnn"),
    }  # fmt: skip
    assert {c.direction for c in cases} == {"fwd", "fwdbwd"}
    assert {c.shape["B"] for c in cases} == {1} and {c.shape["D"] for c in cases} == {1024}
    wanted = [1024 * k for k in (1, 2, 4, 6, 8, 10, 12, 16, 32, 64, 128, 256)]
    assert sorted({c.shape["T"] for c in cases}) == wanted
    settings = plan.resolve(config, plan.Flags(**flags), ["cuda"])
    assert (settings.timer, settings.l2) == ("profiler", "warm")
    assert settings.limits.call_s == 2.0 and settings.limits.phase_s == 300.0


def test_the_decode_preset_is_one_step_of_many_sequences(config):
    cases = _cases(config, preset="decode")
    assert {c.op for c in cases} == {"chela_layer", "softmax_layer"}
    assert {c.direction for c in cases} == {"decode"}
    assert {(c.shape["B"], c.shape["T"], c.shape["D"]) for c in cases} == {(64, 16384, 1024)}
    assert all("decode" in get_op(c.op).impl(c.impl).directions for c in cases)


def test_options_have_a_default_and_can_be_swept(config):
    selected = {"ops": ["short_long_conv"], "impls": ["fft"], "directions": ["fwd"]}
    default = _cases(config, lens="1k", **selected)
    both = _cases(config, lens="1k", **selected,
                  axes={"order": ["serial", "parallel"]})  # fmt: skip
    assert [case.config for case in default] == [{"order": "serial"}]
    assert [case.config for case in both] == [{"order": "serial"}, {"order": "parallel"}]


def test_a_shape_with_a_length_is_one_point_unless_lens_says_otherwise(config):
    shapes = ["b1-t16k-h16-d128"]
    flags = {"impls": ["chunked"], "shapes": shapes, "directions": ["fwd"]}
    assert [case.shape["T"] for case in _cases(config, **flags)] == [16384]
    assert [case.shape["T"] for case in _cases(config, lens="1k,2k", **flags)] == [1024, 2048]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ops": ["lin"]}, "no op 'lin'; there are: linear_attention"),
        ({"impls": ["fla"]}, "no implementation 'fla'; there are: naive_cumsum"),
        ({"dtypes": ["fp8"]}, "no dtype 'fp8'; there are: fp32, bf16, fp16"),
        ({"directions": ["back"]}, "no direction 'back'; there are: fwd, bwd, fwdbwd"),
        ({"shapes": ["huge"], "ops": ["linear_attention"]}, "no shape 'huge' for linear_attention"),
        ({"shapes": ["huge"]}, "no shape 'huge'"),
        ({"shapes": ["medium", "huge"]}, "no shape 'huge'"),
        ({"preset": "fast"}, "no preset 'fast'; there are: cpu"),
        ({"axes": {"BLOCK": [1]}}, "--axis BLOCK: nothing selected has such an axis"),
        ({"axes": {"order": ["both"]}}, "no order 'both'; there are: serial, parallel"),
        ({"sizes": {"Q": 1}}, "--set Q=1: no such dimension here; there are: B, H, K, V, D"),
        ({"sizes": {"T": 1}}, "lengths are --lens"),
        ({"impls": ["x.py"], "ops": ["linear_attention"]}, "name the function too, as in x.py:"),
        ({"impls": ["no/x.py:f"], "ops": ["linear_attention"]}, "no such file no/x.py"),
        ({"impls": ["examples/my_kernel.py:attention"]}, "say which with --op"),
        ({"impls": ["fft"], "ops": ["linear_attention"]}, "no implementation 'fft'"),
        ({"impls": ["fft"], "ops": ["linear_attention", "short_long_conv"]},
         "no implementation of linear_attention among fft"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_the_way_out(config, flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError) as error:
        _cases(config, **flags)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["BLOCK_T", "BLOCK_T=", "=3", "BLOCK_T=1,,2", "a b=1", ""])
def test_bad_axes(text):
    with pytest.raises(UsageError, match="--axis takes NAME=VALUE"):
        plan.parse_axis(text)


@pytest.mark.parametrize("text", ["H", "H=", "H=x", "H=0", "H=-1", "=4", "H=4,", "H=²"])
def test_bad_sizes(text):
    with pytest.raises(UsageError, match="--set takes DIM=SIZE"):
        plan.parse_sizes(text)


def test_axis_values_are_numbers_where_they_look_like_one():
    assert plan.parse_axis("order=serial, 3") == ("order", ["serial", 3])


def test_what_cannot_run_is_known_without_trying(config):
    settings = plan.resolve(config, plan.Flags(dtypes=["fp32"]), ["cuda"])
    reasons = {
        (case.impl, case.direction): plan.unavailable(settings, case)
        for case in plan.cases(settings)
    }
    no_gradient = "triton_recurrent has no fwdbwd; it has: fwd"
    assert reasons["triton_recurrent", "fwdbwd"] == no_gradient
    assert reasons["sdpa_flash", "fwd"] == "sdpa_flash takes no fp32 on a GPU; it takes: bf16, fp16"
    assert reasons["chunked", "fwd"] is None
    on_cpu = plan.resolve(config, plan.Flags(), ["cpu"])
    assert {
        case.impl: plan.unavailable(on_cpu, case) for case in plan.cases(on_cpu)
    }["triton_chunked"] == "needs a GPU"  # fmt: skip


def _user_file(folder, name="mine.py"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("def f(q, k, v): return v\n")
    return path


def _with_files(config, *paths, functions="f"):
    impls = [f"{path}:{function}" for path in paths for function in functions]
    return plan.resolve(config, plan.Flags(ops=["linear_attention"], impls=impls), ["cuda"])


def test_users_functions_are_told_apart_by_as_many_folders_as_it_takes(config, tmp_path):
    paths = [_user_file(tmp_path / folder) for folder in ("a/x", "b/x", "c")]
    settings = _with_files(config, *paths, paths[0], _user_file(tmp_path, "other.py"))
    assert settings.user_impls == {
        "a/x/mine.py:f": f"{paths[0]}:f",
        "b/x/mine.py:f": f"{paths[1]}:f",
        "c/mine.py:f": f"{paths[2]}:f",
        "other.py:f": f"{tmp_path / 'other.py'}:f",
    }
    assert settings.impls == {"linear_attention": list(settings.user_impls)}
    assert list(_with_files(config, paths[0], functions="fg").user_impls) == [
        "mine.py:f",
        "mine.py:g",
    ]


def test_a_users_file_in_a_folder_that_is_no_unicode_is_refused(config, tmp_path):
    """Its path would stand in the records, which are UTF-8."""
    path = _user_file(tmp_path / "caf\udce9")
    with pytest.raises(UsageError, match="not valid UTF-8; give it another name"):
        _with_files(config, path)


def test_a_users_file_must_be_what_it_was_when_the_run_began(config, tmp_path):
    path = _user_file(tmp_path)
    settings = _with_files(config, path)
    refuse_changed_files(settings.user_impls, settings.user_files_sha256)
    path.write_text("def f(q, k, v): return q\n")
    with pytest.raises(RecordError, match=r"mine\.py:f has changed since the run began"):
        refuse_changed_files(settings.user_impls, settings.user_files_sha256)
    path.unlink()
    with pytest.raises(UsageError, match=r"cannot read .*mine\.py: No such file"):
        refuse_changed_files(settings.user_impls, settings.user_files_sha256)


@pytest.mark.parametrize("direction", ["bwd", "fwdbwd"])
def test_gradients_of_a_few_tokens_are_skipped_with_the_reason(config, direction):
    settings = plan.resolve(
        config, plan.Flags(impls=["chunked"], lens="15,16", directions=[direction, "fwd"]), ["cpu"]
    )
    reasons = {
        (case.direction, case.shape["T"]): plan.unavailable(settings, case)
        for case in plan.cases(settings)
    }
    few = reasons.pop((direction, 15))
    assert few == "T < 16: gradients of so few tokens cancel, no budget holds"
    assert set(reasons.values()) == {None}


def test_a_path_with_a_comma_is_one_path(tmp_path):
    path = _user_file(tmp_path / "a,b")
    names = Names()
    assert names.convert(f"{path}:f", None, None) == [f"{path}:f"]
    assert names.convert("a.py:f, b.py:g", None, None) == ["a.py:f", "b.py:g"]
