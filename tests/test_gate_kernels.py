"""`gate` of compiled kernels, from `atlas --json`: exact figures, budgets, nothing lost."""

from __future__ import annotations

import pytest

from tests.records import atlas_json, atlas_row, timed, write_run
from tests.running import ROOT
from tests.test_gate import BUDGETS, gated

STATIC = [
    ({"spill_store_bytes": 16}, "spill_store_bytes was 0 and is 16"),
    ({"smem_bytes": 98304}, "smem_bytes was 65536 and is 98304"),
    ({"fits": False, "smem_bytes": 132000, "reason": "132000 of 101376 bytes"},
     "no longer fits sm_86: 132000 of 101376 bytes"),
    ({"regs": 255}, "regs was 168 and is 255"),
    ({"ctas_per_sm": 0}, "ctas_per_sm was 1 and is 0"),
    ({"tensor_core": None}, "tensor_core was HMMA and is none"),
    ({"tensor_core": "FFMA"}, "tensor_core was HMMA and is FFMA"),
    ({"regs": None}, "regs was 168 and is not known now"),
    ({"outcome": "compile_error", "fits": False, "reason": "ptxas said no"},
     "newly compile_error: ptxas said no"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), STATIC, ids=[words for _, words in STATIC])
def test_a_kernel_that_got_fatter_fails_by_name(tmp_path, change, words):
    then = atlas_json(tmp_path / "then.json", atlas_row(), atlas_row(arch="sm_90"))
    now = atlas_json(tmp_path / "now.json", atlas_row(**change), atlas_row(arch="sm_90"))
    done, loud = gated(tmp_path, now, "--baseline", then)
    assert done.returncode == 1
    assert words in [check["reason"] for check in loud]
    [name] = {check["name"] for check in loud}
    first, last = "linear_attention/triton_chunked/_linear_attention_fwd/bf16/", "/sm_86"
    assert name.startswith(f"{first}BLOCK_T=64,num_warps=4/K128-V128#") and name.endswith(last)


def test_rows_that_differ_in_a_constant_alone_are_two(tmp_path):
    state = atlas_row(constants={**atlas_row()["constants"], "HAS_STATE": True}, regs=200)
    rows = atlas_json(tmp_path / "rows.json", atlas_row(), state)
    done, loud = gated(tmp_path, rows, "--baseline", rows)
    assert done.returncode == 0 and loud == []
    again = atlas_json(tmp_path / "again.json", atlas_row(), atlas_row(regs=200))
    done, _ = gated(tmp_path, again, "--baseline", rows)
    assert done.returncode == 2 and "stands there twice" in done.stderr


def test_a_kernel_that_got_leaner_passes(tmp_path):
    then = atlas_json(tmp_path / "then.json", atlas_row())
    now = atlas_json(tmp_path / "now.json", atlas_row(regs=128, ctas_per_sm=2, compile_ms=9000))
    done, loud = gated(tmp_path, now, "--baseline", then)
    assert done.returncode == 0 and [c["outcome"] for c in loud] == ["better", "better"]


def test_a_baseline_that_does_not_say_whether_a_kernel_fits_is_named(tmp_path):
    unsaid = {**CRASHED, "outcome": "ok"}
    for row in (atlas_row(fits=None), atlas_row(**unsaid)):
        then = atlas_json(tmp_path / "then.json", row, atlas_row(arch="sm_90"))
        now = atlas_json(tmp_path / "now.json", atlas_row(), atlas_row(arch="sm_90"))
        done, [check] = gated(tmp_path, now, "--baseline", then)
        assert done.returncode == 0 and (check["figure"], check["outcome"]) == ("fits", "unchecked")
        assert check["reason"] == "the baseline does not say whether it fits sm_86"
        assert check["name"].endswith("/sm_86")


def test_a_kernel_that_was_resident_did_fit(tmp_path):
    then = atlas_json(tmp_path / "then.json", atlas_row(fits=None))
    gone = atlas_row(fits=False, outcome="out_of_resources", ctas_per_sm=None)
    now = atlas_json(tmp_path / "now.json", gone)
    done, [check] = gated(tmp_path, now, "--baseline", then)
    assert done.returncode == 1 and check["reason"].startswith("no longer fits sm_86")


@pytest.mark.parametrize(
    ("then", "now", "code"),
    [
        (True, "HMMA", 0), (True, True, 0), (True, None, 1), (True, False, 1), ("HMMA", True, 0),
        ("HMMA", None, 1), (None, True, 0), ("HMMA", "FFMA", 1),
    ],
)  # fmt: skip
def test_a_side_may_say_no_more_than_that_there_are_matrix_products(tmp_path, then, now, code):
    then = atlas_json(tmp_path / "then.json", atlas_row(tensor_core=then))
    rows = atlas_json(tmp_path / "now.json", atlas_row(tensor_core=now))
    done, loud = gated(tmp_path, rows, "--baseline", then)
    assert done.returncode == code and len(loud) == code, loud


def test_a_kernel_that_is_gone_fails_and_a_new_one_is_listed(tmp_path):
    then = atlas_json(tmp_path / "then.json", atlas_row(), atlas_row(kernel="_old"))
    now = atlas_json(tmp_path / "now.json", atlas_row(), atlas_row(kernel="_new"))
    done, loud = gated(tmp_path, now, "--baseline", then)
    assert done.returncode == 1 and [c["outcome"] for c in loud] == ["failed", "new"]
    assert "_old" in loud[0]["name"] and "was not compiled" in loud[0]["reason"]


def test_a_spill_budget_holds_for_compiled_kernels(tmp_path):
    rows = atlas_json(tmp_path / "rows.json", atlas_row(spill_store_bytes=8))
    config = tmp_path / "own.toml"
    text = (ROOT / "bench.toml").read_text() + BUDGETS.format("max_spill_bytes = 0")
    config.write_text(text)
    done, [check] = gated(tmp_path, rows, "--baseline", rows, "--config", config)
    assert done.returncode == 1 and check["figure"] == "max_spill_bytes"


@pytest.mark.parametrize(
    ("limits", "code"),
    [('impls = ["fla_chunk"]', 0), ('dtypes = ["fp16"]', 0), ('impls = ["triton_chunked"]', 1),
     ('dtypes = ["bf16"]', 1)],
)  # fmt: skip
def test_a_spill_budget_holds_for_the_kernels_that_it_names(tmp_path, limits, code):
    rows = atlas_json(tmp_path / "rows.json", atlas_row(spill_store_bytes=8))
    config = tmp_path / "own.toml"
    budget = BUDGETS.format(f"max_spill_bytes = 0\n{limits}")
    config.write_text((ROOT / "bench.toml").read_text() + budget)
    done, _ = gated(tmp_path, rows, "--baseline", rows, "--config", config)
    assert done.returncode == code, done.stdout


CRASHED = {"outcome": "crash", "fits": None, "reason": "ptxas died", "regs": None,
           "smem_bytes": None, "spill_store_bytes": None, "spill_load_bytes": None,
           "ctas_per_sm": None, "tensor_core": None}  # fmt: skip


def test_a_new_kernel_that_crashes_the_compiler_is_listed_as_that(tmp_path):
    then = atlas_json(tmp_path / "then.json", atlas_row())
    now = atlas_json(tmp_path / "now.json", atlas_row(), atlas_row(kernel="_new", **CRASHED))
    done, [check] = gated(tmp_path, now, "--baseline", then)
    assert done.returncode == 0 and check["outcome"] == "new"
    assert (check["after"], check["reason"]) == ("crash", "ptxas died")


def test_every_kernel_of_a_baseline_is_checked(tmp_path):
    other = atlas_row(kernel="_other")
    crashed = atlas_json(tmp_path / "crashed.json", atlas_row(**CRASHED), other)
    done, [check] = gated(tmp_path, crashed, "--baseline", crashed)
    assert done.returncode == 0 and check["outcome"] == "unchecked"
    assert check["reason"] == "crash, as in the baseline: ptxas died"
    assert (check["figure"], check["before"], check["after"]) == ("outcome", "crash", "crash")
    good = atlas_json(tmp_path / "good.json", atlas_row(), other)
    done, [check] = gated(tmp_path, good, "--baseline", crashed)
    assert done.returncode == 0 and check["outcome"] == "better"
    assert check["reason"] == "it was crash"
    alone = atlas_json(tmp_path / "alone.json", atlas_row(**CRASHED))
    done, _ = gated(tmp_path, alone, "--baseline", alone)
    assert done.returncode == 4 and "or all failed" in done.stderr


def test_a_gate_of_no_figures_does_not_pass(tmp_path):
    nothing = atlas_json(tmp_path / "a.json", atlas_row(**{**CRASHED, "outcome": "ok"}))
    done, _ = gated(tmp_path, nothing, "--baseline", nothing)
    assert done.returncode == 4 and "has no figure to hold" in done.stderr


def test_another_triton_asks_for_a_new_baseline(tmp_path):
    then = atlas_json(tmp_path / "then.json", atlas_row(triton="3.6.0"))
    now = atlas_json(tmp_path / "now.json", atlas_row())
    done, _ = gated(tmp_path, now, "--baseline", then)
    assert done.returncode == 4
    assert "Triton 3.6.0, here 3.7.1" in done.stderr and "--name" in done.stderr


def test_times_are_not_held_against_kernels(tmp_path):
    rows, run = atlas_json(tmp_path / "rows.json"), write_run(tmp_path / "run", [timed()])
    assert gated(tmp_path, rows, "--baseline", run)[0].returncode == 4
    assert gated(tmp_path, run, "--baseline", rows)[0].returncode == 4
    for one, other in ((rows, run), (run, rows)):
        done, _ = gated(tmp_path, one, "--baseline", other)
        assert f"the baseline {other} and what is held against it are not of one" in done.stderr
        assert "new baseline" not in done.stderr
