"""Byte models by launch: what L2 keeps, what is launched, and what ncu counted on an H100.

tests/fixtures/hbm-h100.csv: linear attention, B1 H16 K128 V128 in bf16, `sweep --hbm ncu` from a
cold L2 on one H100 80GB; what docs/results has was counted kernel by kernel, each from a cold L2.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from chela_bench.bench import modelled, profiled, profiling
from chela_bench.bench.cases import Case
from chela_bench.bench.matching import with_model
from chela_bench.bench.ops import OPS
from chela_bench.bench.registry import get_op
from chela_bench.kernels.traffic import OTHER, PRODUCT, Again, Moved, Step, moved, renamed, total
from chela_bench.profiles import ncu
from chela_bench.profiles.ncu_csv import Capture, Launch, merged
from chela_bench.records import Hbm, Kernel
from chela_bench.reports.groups import groups
from chela_bench.reports.sheets import sheets
from tests.factories import h100_sweep, make_point, make_run
from tests.factories import profiled as with_counts
from tests.running import ROOT, environment

ATTENTION = {"B": 1, "H": 16, "K": 128, "V": 128}
LAYER = {"B": 1, "T": 16384, "D": 1024, "K": 128, "V": 2048}
ROWS = {"B": 1, "T": 16384, "D": 1024}
ORDERS = ({"order": "serial"}, {"order": "parallel"})
LEFT_OUT = {"_merged_taps_kernel"}  # a few numbers of each channel
BEFORE = {
    "_kernel_spectrum_wgmma_kernel",
    "_spectrum_of_rows_wgmma_kernel",
    "_spectrum_rows_wgmma_kernel",
}  # launched once, before the call that is measured


def case(op, impl, shape, config=None, direction="fwd"):
    return Case(op=op, impl=impl, direction=direction, dtype="bf16", shape=shape,
                config=config or {})  # fmt: skip


CASES = [
    *(case("linear_attention", "triton_chunked", {**ATTENTION, "T": T})
      for T in (1024, 4096, 16384, 65536)),
    case("linear_attention", "triton_chunked", {**ATTENTION, "T": 16384}, {"wgmma": 0}),
    case("linear_attention", "triton_recurrent", {**ATTENTION, "T": 16384}),
    *(case(op, impl, {**ROWS, "T": T}, order)
      for op, impl in (("short_long_conv", "triton"), ("reparameterization", "triton_unmerged"),
                       ("reparameterization", "triton_merged"))
      for order in ORDERS for T in (100, 4096, 16384, 65536)),
    *(case("short_long_conv", "triton", {**ROWS, "B": 8, "T": T}, ORDERS[0])
      for T in (4096, 16384, 65536)),
    *(case("long_conv", "triton", ROWS, {"spectrum": way}) for way in ("kept", "made")),
    case("chela_layer", "chela", LAYER),
    case("chela_layer", "chela_merged", LAYER),
    case("chela_layer", "chela", {**LAYER, "T": 1024}),
]  # fmt: skip


@pytest.fixture(scope="module")
def h100():
    """By a case's key, what models and host functions say on it."""
    lines = "\n".join(each.model_dump_json() for each in CASES)
    done = subprocess.run(
        [sys.executable, "-m", "tests.standing_in"], cwd=ROOT, env=environment(), input=lines,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    return {each.key: one for each, one in zip(CASES, said, strict=True)}


def counts(path, **where):
    with (ROOT / path).open() as file:
        return [row for row in csv.DictReader(file)
                if all(row[column] == value for column, value in where.items())]  # fmt: skip


def test_every_triton_implementation_has_a_model_by_launch():
    ours = [(op, impl) for op in OPS for impl in op.impls if impl.triton]
    assert {(op.name, impl.name) for op, impl in ours} == {(c.op, c.impl) for c in CASES}
    for op, impl in ours:
        sizes = {"B": 1, "T": 256, "H": 2, "K": 32, "V": 32, "D": 64}
        one = case(op.name, impl.name, {dim: sizes[dim] for dim in op.dims})
        launches = modelled.modelled_launches(one, impl, None)
        assert launches, f"{op.name}/{impl.name} has no model by launch"
        assert all(launch.size > 0 for launch in launches)


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.key)
def test_models_name_what_is_launched(h100, one):
    """As Triton is given it: a kernel that is renamed, added or dropped is noticed."""
    said = h100[one.key]
    named = {kernel for kernel, _, _ in said["launches"]} - {PRODUCT, OTHER}
    kept = one.impl in ("triton_merged", "chela_merged") or one.config.get("spectrum") == "kept"
    assert named <= set(said["launched"])
    assert said["products"] == [size for kernel, size in said["reads"] if kernel == PRODUCT]
    assert set(said["launched"]) - named <= (LEFT_OUT | BEFORE if kept else LEFT_OUT)


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.key)
def test_launches_sum_up_to_the_call(h100, one):
    said = h100[one.key]
    assert sum(size for _, size, _ in said["launches"]) == said["total"] > 0
    held = sum(sum(in_l2.values()) for _, _, in_l2 in said["launches"])
    assert sum(size for _, size, _ in said["without"]) <= said["total"] + held


@pytest.mark.parametrize("row", counts("tests/fixtures/hbm-h100.csv"), ids=lambda row: row["T"])
def test_linear_attention_moves_what_ncu_counted(h100, row):
    one = case("linear_attention", row["impl"], {**ATTENTION, "T": int(row["T"])})
    counted = int(row["read_bytes"]) + int(row["write_bytes"])
    assert h100[one.key]["total"] == pytest.approx(counted, rel=0.1)


def test_states_between_the_passes_stay_in_l2(h100):
    """Of 8 MiB: ncu sees the scan read 512 bytes, and all of them written once."""
    said = h100[case("linear_attention", "triton_chunked", {**ATTENTION, "T": 16384}).key]
    states = 16 * 8 * 128 * 128 * 4
    (_, _, of_sum), (_, scanned, of_scan), (_, _, of_walk) = said["launches"]
    assert of_sum == of_scan == of_walk == {"states": states} and scanned == states
    assert all(in_l2 == {} for _, _, in_l2 in said["without"])


SPECTRUM_NOW = "_spectrum_of_rows_wgmma_kernel"  # of 16-bit taps; both read them once
SPECTRUM_COUNTED = "_kernel_spectrum_wgmma_kernel"  # that the captures are of


@pytest.mark.parametrize("T", [4096, 16384, 65536])
def test_convolutions_read_what_ncu_counted(h100, T):
    """Kernel by kernel. Kernels were float32 there: twice the taps."""
    rows = counts("docs/results/short-long-conv-bytes.csv", run="once-whole", shape=f"8,1024,{T}")
    one = case("short_long_conv", "triton", {**ROWS, "B": 8, "T": T}, ORDERS[0])
    taps = 1024 * T * 2
    steps = as_counted(h100[one.key]["reads"])
    for n, (kernel, size) in enumerate(steps):
        before = sum(name == kernel for name, _ in steps[:n])
        found = [row for row in rows if row["kernel"] == kernel][before]
        read = int(found["dram__bytes_read.sum"])
        of_taps = SPECTRUM_COUNTED, "_norms_kernel", "_blocks_there_kernel"
        if kernel in of_taps and before == 0:
            size += taps
        if kernel == "_long_conv_wgmma_blocks_kernel":  # reads spectra again, as L2 is too small
            size = next(size for name, size, _ in h100[one.key]["launches"] if name == kernel)
            size -= 8 * taps
        assert read == pytest.approx(size, rel=0.1), kernel


def as_counted(reads):
    return [(SPECTRUM_COUNTED if name == SPECTRUM_NOW else name, size) for name, size in reads]


def test_the_layer_reads_what_ncu_counted(h100):
    """Kernel by kernel, of those that training has too."""
    rows = counts("docs/results/chela-layer-bytes.csv")
    steps = as_counted(h100[case("chela_layer", "chela", LAYER).key]["reads"])
    for kernel in ("_normalize_fwd_kernel", "_short_conv_fwd_kernel", "_products_kernel",
                   SPECTRUM_COUNTED, "_long_conv_wgmma_blocks_kernel",
                   "_queries_keys_fwd_kernel", "_output_gate_fwd_kernel",
                   "_linear_attention_sum_kernel"):  # fmt: skip
        size = next(size for name, size in steps if name == kernel)
        row = next(row for row in rows if row["kernel"] == kernel)
        assert int(row["dram__bytes_read.sum"]) == pytest.approx(size, rel=0.1), kernel
    products = [size for name, size in steps if name == PRODUCT]
    counted = [int(row["dram__bytes_read.sum"]) for row in rows if "nvjet" in row["kernel"]]
    assert counted[0] == pytest.approx(products[0], rel=0.1)  # V
    assert counted[1] == pytest.approx(products[1], rel=0.1)  # Z W_z


# What L2 keeps.


def step(kernel, reads, writes, again=None):
    return Step(kernel, reads, writes, again)


def test_what_was_touched_last_is_not_read_again():
    steps = [step("a", {"x": 60}, {"y": 20}), step("b", {"y": 20, "x": 60}, {"z": 10})]
    assert [(m.size, m.in_l2) for m in moved(steps, 200)] == [(80, {}), (10, {"y": 20, "x": 60})]
    assert [(m.size, m.in_l2) for m in moved(steps, 158)] == [(80, {}), (70, {"y": 20})]
    assert [m.size for m in moved(steps, 38)] == [80, 90] == [m.size for m in moved(steps)]
    assert total(steps) == 170


def test_what_came_between_pushes_it_out():
    steps = [step("a", {}, {"y": 20}), step("b", {"w": 31}, {}), step("c", {"y": 20}, {})]
    assert [m.size for m in moved(steps, 102)] == [20, 31, 0]
    assert [m.size for m in moved(steps, 100)] == [20, 31, 20]


def test_what_is_overwritten_in_l2_is_written_once():
    steps = [step("a", {}, {"y": 20}), step("b", {"y": 20}, {"y": 20}), step("c", {"y": 20}, {})]
    assert moved(steps, 40) == [Moved("a", 0, {"y": 20}), Moved("b", 20, {"y": 20}),
                                Moved("c", 0, {"y": 20})]  # fmt: skip
    far = [steps[0], step("d", {"w": 30}, {}), *steps[1:]]
    assert [m.size for m in moved(far, 40)] == [20, 30, 40, 0]  # it had been written by then
    reread = [steps[0], step("d", {"w": 30}, {}), steps[2], step("b", {}, {"y": 20})]
    assert [m.size for m in moved(reread, 40)] == [20, 30, 20, 20]


def test_what_one_launch_reads_again_misses_as_far_as_it_does_not_fit():
    once = step("a", {"x": 10}, {}, Again(70, 40))
    assert [moved([once], room)[0].size for room in (80, 40, None)] == [10, 10 + 35, 10]


def test_tensors_take_other_names():
    assert renamed([step("a", {"x": 1, "k": 2}, {"x": 3})], x="y") == [
        step("a", {"y": 1, "k": 2}, {"y": 3})
    ]


# Beside what ncu counted.


def kernels(*names):
    return [Kernel(name=name, read_bytes=4, write_bytes=6) for name in names]


def sizes(found):
    return [kernel.model_bytes for kernel in found]


def test_launches_of_a_kind_are_matched_in_order():
    model = [("_a_kernel", 1, {"x": 5}), (PRODUCT, 2, {}), (OTHER, 3, {}), ("_a_kernel", 4, {}),
             (PRODUCT, 5, {})]  # fmt: skip
    names = ("nvjet_sm90_tst_256x128", "_a_kernel", "_b_kernel", "void at::elementwise_kernel<4>",
             "ampere_sgemm_128x64_tn", "_a_kernel")  # fmt: skip
    found = with_model(kernels(*names), model)
    assert sizes(found) == [2, 1, None, 3, 5, 4] and found[1].model_l2 == {"x": 5}
    assert found[1].measured_bytes == found[1].measured_over_model == 10
    assert [each.name for each in found] == list(names)


def test_what_does_not_fit_is_left_empty():
    """More launches than the formula knows: none of that kind is right for sure."""
    model = [("_a_kernel", 1, {}), (PRODUCT, 2, {})]
    names = ("_a_kernel", "nvjet_1", "nvjet_2", "void cublasLt::splitKreduce_kernel<32>")
    assert sizes(with_model(kernels(*names), model)) == [1, None, None, None]
    assert sizes(with_model(kernels("_a_kernel", "_a_kernel"), model)) == [None, None]
    assert with_model(kernels("_a_kernel"), ()) == kernels("_a_kernel")


def test_launches_that_are_one_row_sum_their_models():
    model = [("_a_kernel", 1, {"x": 5}), ("_a_kernel", 4, {"x": 2, "y": 1})]
    [row] = merged(with_model(kernels("_a_kernel", "_a_kernel"), model))
    assert (row.launches, row.model_bytes, row.model_l2) == (2, 5, {"x": 7, "y": 1})
    assert row.measured_over_model == 4.0
    [row] = merged(
        [*with_model(kernels("_a_kernel"), [("_a_kernel", 1, {})]), *kernels("_a_kernel")]
    )
    assert row.model_bytes is None


def test_the_application_tells_the_model_and_the_count_takes_it(monkeypatch):
    """From the process under ncu to the record's kernels."""
    shape = {**ATTENTION, "T": 256}
    one = case("linear_attention", "triton_recurrent", shape)
    steps = []

    class FakeBench:
        cuda, evictor, l2_bytes = False, None, 50 << 20

    class FakeWorker:
        bench, user_impls = FakeBench, {}

    monkeypatch.setattr(profiled, "run", lambda *_: None)
    profiled.run_all(FakeWorker, [(3, one)], lambda **told: steps.append(told), None)
    name, size = "_linear_attention_recurrent_kernel", 4 * 256 * 16 * 128 * 2
    told = json.loads(json.dumps(steps))
    assert told[1] == {"ended": 3, "problem": None, "model": [[name, size, {}]]}
    counts_ = profiling.Counts()
    capture = Capture((Launch(3, Kernel(name=name, read_bytes=9, write_bytes=1)),))
    assert profiling._settle(counts_, ncu.Collected(0, "", False), told, capture) == {3}
    [kernel] = counts_.kernels[3]
    assert (kernel.name, kernel.model_bytes) == (name, size)
    point = make_point(hbm=Hbm(model_bytes=size, source="model"))
    counted = profiling.with_bytes(point, [kernel], 0)
    assert sum(each.model_bytes for each in counted.kernels) == counted.hbm.model_bytes


def test_an_older_record_has_no_model():
    old = Kernel(name="_a_kernel", read_bytes=4, write_bytes=6).model_dump(mode="json")
    for name in ("model_bytes", "model_l2", "measured_bytes", "measured_over_model"):
        del old[name]
    read = Kernel.model_validate_json(json.dumps(old))
    assert read.model_bytes is None and read.model_l2 == {} and read.measured_over_model is None


def test_reports_show_each_kernel_beside_its_model():
    point = with_counts(h100_sweep()[0], 1.0)
    update = {"read_bytes": 3 << 20, "write_bytes": 1 << 20, "model_bytes": 5 << 20,
              "model_l2": {"states": 1 << 20, "v": 2 << 20}}  # fmt: skip
    first, *rest = point.kernels
    point = point.model_copy(update={"kernels": [first.model_copy(update=update), *rest]})
    sheet = next(each for each in sheets(make_run(), groups([point])[0]) if each.name == "Kernels")
    row, *others = [dict(zip(sheet.header, cells, strict=True)) for cells in sheet.rows]
    assert (row["both MiB"], row["model MiB"], row["x model"]) == ("4.00", "5.00", "0.800")
    assert row["model: in L2"] == "states 1.00, v 2.00"
    assert all(other["model MiB"] == other["model: in L2"] == "" for other in others)


def test_a_configuration_that_is_refused_has_no_model():
    op = get_op("short_long_conv")
    one = case(op.name, "triton", ROWS, {"method": "direct", "N2": 16})
    assert modelled.modelled_bytes(one, op, op.impl("triton")) == Hbm()
    assert modelled.modelled_now(one) is None
