"""On a card: what is compiled without one is what the driver loads, and what tuning finds is what
kernels take."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from chela_bench.bench import atlas
from chela_bench.bench.cases import Case
from chela_bench.kernels import tuned
from chela_bench.profiles.occupancy import ARCHS
from tests.running import chela_bench, environment

pytestmark = pytest.mark.gpu

ATTENTION = {"B": 1, "T": 4096, "H": 4, "K": 128, "V": 128}
CASES = [
    ("linear_attention", "triton_chunked", "fwdbwd", "bf16", ATTENTION, {}),
    ("linear_attention", "triton_chunked", "fwdbwd", "bf16", ATTENTION, {"wgmma": 0}),
    ("linear_attention", "triton_chunked", "fwd", "fp32", ATTENTION, {"BLOCK_V": 32}),
    ("linear_attention", "triton_chunked", "fwd", "bf16", {**ATTENTION, "K": 100, "V": 60}, {}),
    ("long_conv", "triton", "fwdbwd", "bf16", {"B": 2, "T": 4096, "D": 64}, {}),
    ("long_conv", "triton", "fwd", "bf16", {"B": 2, "T": 16384, "D": 64}, {"method": "factors"}),
]
GPU = {"CUDA_VISIBLE_DEVICES": "0"}


def arch():
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


ONLINE = """
import ctypes, hashlib, json, sys
import torch
from triton.runtime.jit import JITFunction
from chela_bench.bench.adapters import triton_chunked, triton_long_conv
from chela_bench.bench.inputs import DTYPES, Draw, attention, long_conv

driver = ctypes.CDLL("libcuda.so.1")
compile_it, loaded = JITFunction._do_compile, {}

def noting(self, *arguments):
    kernel = compile_it(self, *arguments)
    kernel._init_handles()
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    blocks = ctypes.c_int()
    status = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
        ctypes.byref(blocks), ctypes.c_void_p(kernel.function), ctypes.c_int(32 * warps),
        ctypes.c_size_t(shared))
    assert status == 0, status
    loaded[hashlib.sha256(kernel.asm["cubin"]).hexdigest()] = {
        "kernel": kernel.name, "regs": kernel.n_regs, "smem_bytes": shared, "num_warps": warps,
        "ctas_per_sm": blocks.value}
    return kernel

JITFunction._do_compile = noting
case = json.load(sys.stdin)
draw = Draw(case["shape"], DTYPES[case["dtype"]], torch.device("cuda", 0), 0, "randn")
make, run = {"linear_attention": (attention, triton_chunked),
             "long_conv": (long_conv, triton_long_conv)}[case["op"]]
inputs = make(draw)
inputs.requires_grad_(case["direction"] != "fwd")
with torch.set_grad_enabled(case["direction"] != "fwd"):
    output = run(*inputs.arguments(inputs.tensors), **case["config"])
    if case["direction"] != "fwd":
        torch.autograd.grad(output, list(inputs.tensors.values()), torch.ones_like(output))
torch.cuda.synchronize()
print(json.dumps(loaded))
"""


def loaded_by_the_driver(case):
    """Kernels that Triton compiles while the call runs, by the binary's hash, in a process that has
    compiled nothing before; blocks by cuOccupancyMaxActiveBlocksPerMultiprocessor."""
    done = subprocess.run(
        [sys.executable, "-c", ONLINE], input=case.model_dump_json(), env=environment(**GPU),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "given", CASES, ids=lambda x: "-".join([x[0], x[2], x[3], f"T{x[4]['T']}", *map(str, x[5])])
)
def test_registers_shared_memory_and_binaries_are_what_the_driver_loads(given):
    """Triton 3.6 may give one of several binaries of a kernel that is compiled again in another
    process: compiling here goes on until every binary that the driver has loaded has come up, or
    is of a kernel of which several have, alike in all figures."""
    op, impl, direction, dtype, shape, config = given
    case = Case(op=op, impl=impl, direction=direction, dtype=dtype, shape=shape, config=config)
    properties = torch.cuda.get_device_properties(0)
    options = atlas.Options(cache=None, processors=properties.multi_processor_count)
    online = loaded_by_the_driver(case)
    assert online
    offline = {}
    for _ in range(6):
        found = atlas.compile_all([case], [arch()], options)
        assert not found.refused
        offline |= {row.cubin_sha256: row for row in found.rows}
        if set(online) <= set(offline):
            break
    for digest, kernel in online.items():
        rows = [offline[digest]] if digest in offline else of_kernel(kernel, offline)
        assert len(rows) == 1 or len({row.cubin_sha256 for row in rows}) > 1
        for row in rows:
            assert (row.regs, row.smem_bytes) == (kernel["regs"], kernel["smem_bytes"])
            assert row.config["num_warps"] == kernel["num_warps"]
            assert row.fits
            assert row.ctas_per_sm == kernel["ctas_per_sm"]


def of_kernel(kernel, offline):
    """Every binary of a kernel that compiles to several. Where the case launches the kernel with
    one specialisation, they are told apart by nothing else."""
    name = kernel["kernel"].removeprefix("_").removesuffix("_kernel")
    rows = [row for row in offline.values() if row.kernel == name]
    assert len(rows) > 1, f"{name}: another binary offline"
    assert len({(str(row.constants), str(row.types)) for row in rows}) == 1
    return rows


def test_the_table_of_limits_is_the_cards():
    properties = torch.cuda.get_device_properties(0)
    known = ARCHS[arch()]
    assert known.smem_per_block == properties.shared_memory_per_block_optin
    assert known.smem_per_sm == properties.shared_memory_per_multiprocessor
    assert known.warps * 32 == properties.max_threads_per_multi_processor


def test_what_tuning_writes_is_what_the_kernels_take(tmp_path, monkeypatch):
    table = tmp_path / "tuned.json"
    done = chela_bench(
        "tune", "linear_attention", "--lens", "2k", "--set", "H=4", "--axis", "BLOCK_V=32,64,128",
        "--axis", "segments=1,4", "--json", "--write-table", "--table", table, "--out", tmp_path,
        **GPU,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    points = document["points"]
    assert len(points) == 7
    assert {p["outcome"] for p in points} == {"ok"}
    assert all(p["rounds"] and p["static"]["smem_bytes"] and p["static"]["regs"] for p in points)
    [call] = document["calls"]
    entries = json.loads(table.read_text())["entries"]
    assert len(entries) == (call["default"] not in call["ties"])
    monkeypatch.setattr(tuned, "TABLE", table)
    tuned.tuned.cache_clear()
    device = torch.device("cuda", 0)
    taken = tuned.tuned(
        "linear_attention", device, torch.bfloat16, heads=4, tokens=2048, K=128, V=128,
        trained=False,
    )  # fmt: skip
    best = next(p for p in points if p["key"] == call["best"])
    assert (taken or {}) == (best["config"] if entries else {})
    tuned.tuned.cache_clear()
