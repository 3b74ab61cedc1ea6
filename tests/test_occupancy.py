"""Blocks on an SM against known cases, each with its source."""

from __future__ import annotations

import csv

import pytest

from chela_bench.errors import UsageError
from chela_bench.profiles.occupancy import ARCHS, Needs, find_arch, occupancy
from tests.running import ROOT

CAPTURE = ROOT / "tests/fixtures/ncu-2025.3.1-h100-raw.csv"
KB = 1024


def found(arch, warps, smem_bytes, regs, tmem_columns=0):
    return occupancy(ARCHS[arch], Needs(warps, smem_bytes, regs, tmem_columns))


def captured():
    """Kernel by kernel what Nsight Compute 2025.3.1 says on an H100."""
    with CAPTURE.open() as file:
        lines = [line for line in file if not line.startswith("==")]
    header, _, *rows = csv.reader(lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def number(row, name):
    return int(row[name].replace(",", ""))


@pytest.mark.parametrize("row", captured(), ids=lambda row: row["Kernel Name"])
def test_the_limits_that_nsight_compute_measured(row):
    """launch__occupancy_limit_*: blocks that each resource allows, and the least of them."""
    threads = int(row["Block Size"].strip("()").split(",")[0])
    limits = {
        resource: number(row, f"launch__occupancy_limit_{column}")
        for resource, column in (
            ("shared memory", "shared_mem"), ("registers", "registers"), ("warps", "warps"),
            ("blocks", "blocks"),
        )
    }  # fmt: skip
    seen = found(
        "sm_90",
        threads // 32,
        number(row, "launch__shared_mem_per_block_dynamic"),
        number(row, "launch__registers_per_thread"),
    )
    assert seen.ctas_per_sm == min(limits.values())
    assert limits[seen.limiter] == min(limits.values())


@pytest.mark.parametrize(
    ("arch", "warps", "smem_bytes", "regs", "blocks", "limiter"),
    [
        # CUDA C++ programming guide, "Multiprocessor Level": 64 registers and 512 threads let two
        # blocks reside on a multiprocessor of 65536 registers, one register more lets one.
        ("sm_80", 16, 0, 64, 2, "registers"),
        ("sm_80", 16, 0, 65, 1, "registers"),
        # The same guide, technical specifications: threads a multiprocessor 2048, 1536, 1024.
        ("sm_80", 32, 0, 32, 2, "registers"),
        ("sm_86", 32, 0, 32, 1, "warps"),
        ("sm_75", 32, 0, 32, 1, "warps"),
        # The same table: blocks a multiprocessor 32, 16, 24.
        ("sm_80", 1, 0, 8, 32, "blocks"),
        ("sm_86", 1, 0, 16, 16, "blocks"),
        ("sm_89", 1, 0, 16, 24, "blocks"),
        ("sm_120", 2, 0, 16, 24, "warps"),
        # NVIDIA Ampere tuning guide, "Unified Shared Memory": of 164 KB a block can have 163, since
        # 1 KB is the system's own: two of 81 KB fit, two of 82 do not.
        ("sm_80", 4, 163 * KB, 32, 1, "shared memory"),
        ("sm_80", 4, 81 * KB, 32, 2, "shared memory"),
        ("sm_80", 4, 82 * KB, 32, 1, "shared memory"),
        # Turing tuning guide: 64 KB, all of it a block's.
        ("sm_75", 4, 64 * KB, 32, 1, "shared memory"),
        ("sm_75", 4, 32 * KB, 32, 2, "shared memory"),
        # cuda_occupancy.h: warps are given out in fours: five count as eight.
        ("sm_90", 4, 0, 255, 2, "registers"),
        ("sm_90", 5, 0, 255, 1, "registers"),
        ("sm_90", 5, 0, 128, 2, "registers"),
    ],
)  # fmt: skip
def test_published_cases(arch, warps, smem_bytes, regs, blocks, limiter):
    seen = found(arch, warps, smem_bytes, regs)
    assert (seen.ctas_per_sm, seen.limiter, seen.fits) == (blocks, limiter, True)


@pytest.mark.parametrize("arch", ["sm_100", "sm_103"])
def test_tensor_memory_is_shared_by_the_blocks_of_an_sm(arch):
    """PTX ISA, tensor memory: 512 columns."""
    assert found(arch, 4, 0, 32, 512).ctas_per_sm == 1
    assert found(arch, 4, 0, 32, 256).ctas_per_sm == 2
    assert found(arch, 4, 0, 32, 128).limiter == "tensor memory"


@pytest.mark.parametrize(
    ("arch", "needs", "words"),
    [
        ("sm_86", Needs(4, 100 * KB, 32), ["100 KB", "sm_86 has 99 KB"]),
        ("sm_90", Needs(4, 300 * KB, 32), ["300 KB", "sm_90 has 227 KB"]),
        ("sm_100", Needs(4, 0, 32, 800), ["800 columns", "512"]),
        ("sm_90", Needs(4, 0, 32, 64), ["64 columns", "sm_90 has 0"]),
        ("sm_90", Needs(64, 0, 32), ["2048 threads", "1024"]),
        ("sm_90", Needs(16, 0, 255), ["131072 registers", "65536"]),
        ("gfx942", Needs(4, 72 * KB, 200), ["72 KB", "gfx942 has 64 KB"]),
    ],
)
def test_what_does_not_fit_says_what_it_needs_and_what_there_is(arch, needs, words):
    seen = occupancy(ARCHS[arch], needs)
    assert not seen.fits
    assert seen.ctas_per_sm == 0
    assert all(word in seen.problem for word in words)


def test_another_maker_is_told_shared_memory_alone():
    seen = found("gfx942", 4, 64 * KB, 512)
    assert (seen.fits, seen.ctas_per_sm, seen.limiter) == (True, None, None)


def test_an_unknown_architecture_is_answered_with_the_known_ones():
    with pytest.raises(UsageError, match=r"no architecture 'sm_99'.*sm_90.*gfx942"):
        find_arch("sm_99")
