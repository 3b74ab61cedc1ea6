"""What the compiler says of one kernel: shared memory, registers, spills, instructions.

The kernel comes as arguments of Triton's own compiler; the card need not be there. Registers come
from the cubin by cuobjdump, instructions by nvdisasm, spills from the log of ptxas: the tools that
Triton brings along. Of a kernel for AMD, from its assembly.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chela_bench.errors import EnvironmentProblem
from chela_bench.profiles.occupancy import Arch, Needs, occupancy

TOOLS = ("ptxas", "ptxas-blackwell", "cuobjdump", "nvdisasm")
# Matrix instructions by the family that a reader knows them by: wgmma, tcgen05, mma.
MATRIX = ("UTCHMMA", "UTCQMMA", "UTCIMMA", "HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA",
          "DMMA", "v_mfma")  # fmt: skip
COUNTED = (*MATRIX, "LDGSTS", "UTMALDG", "LDL", "STL", "BAR", "SHFL")
_TOOL_LIMIT_S = 120.0
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.M)
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


def bin_folder() -> Path:
    """Of the NVIDIA tools that come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_kernel(source: Any, target: Any, options: dict[str, Any], arch: Arch) -> dict[str, Any]:
    """What the compiler decides, under an atlas row's names. Raises what Triton does.

    Compiles whether or not Triton has it cached: the time is one of compiling, and ptxas tells the
    spills.
    """
    import triton

    with _environment(TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1"):
        begin = time.perf_counter()
        log = io.StringIO()
        with contextlib.redirect_stdout(log):  # Python's alone: what a crash says goes its way
            compiled = triton.compile(source, target=target, options=options)
        compile_ms = round((time.perf_counter() - begin) * 1e3)
    facts = (
        _of_cubin(compiled, log.getvalue(), arch)
        if "cubin" in compiled.asm
        else _of_amdgcn(compiled)
    )
    return {**facts, "num_warps": compiled.metadata.num_warps, "compile_ms": compile_ms}


def judged(facts: dict[str, Any], arch: Arch) -> dict[str, Any]:
    """What `compile_kernel` found, and whether it runs on that architecture."""
    needs = Needs(facts["num_warps"], facts["smem_bytes"], facts["regs"], facts["tmem_columns"])
    found = occupancy(arch, needs)
    return {
        **{name: value for name, value in facts.items() if name != "num_warps"},
        "outcome": "ok" if found.fits else "out_of_resources",
        "fits": found.fits,
        "ctas_per_sm": found.ctas_per_sm,
        "limiter": found.limiter,
        "reason": found.problem,
    }


def _of_cubin(compiled: Any, log: str, arch: Arch) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = run_tool("cuobjdump", "--dump-resource-usage", str(path))
        listing = run_tool("nvdisasm", "-c", str(path))
    found = _USAGE.findall(usage)
    if not found:
        raise EnvironmentProblem(f"cuobjdump tells no registers: {usage.strip()[:200]!r}")
    regs, stack, shared = (max(int(row[i]) for row in found) for i in range(3))
    spills = [[int(n) for n in row] for row in _SPILLS.findall(log)]
    counts = Counter(_INSTRUCTION.findall(listing))
    static = max(0, shared - arch.smem_reserved)  # cuobjdump counts the system's own
    return {
        "smem_bytes": compiled.metadata.shared + static,
        "regs": regs,
        "stack_bytes": stack,
        "spill_store_bytes": sum(row[1] for row in spills) if spills else None,
        "spill_load_bytes": sum(row[2] for row in spills) if spills else None,
        "tmem_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
        **_instructions(counts),
        "cubin_sha256": _sha256(compiled.asm["cubin"]),
    }


def _of_amdgcn(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int | None:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else None

    words = re.findall(r"^\s+([a-z]+_[a-z0-9]+)", text, re.M)
    counts = Counter("v_mfma" if word.startswith("v_mfma") else word for word in words)
    spilled = number("vgpr_spill_count")
    return {
        "smem_bytes": compiled.metadata.shared,
        "regs": number("vgpr_count"),
        "stack_bytes": number("private_segment_fixed_size"),
        "spill_store_bytes": None if spilled is None else 4 * spilled,
        "spill_load_bytes": None if spilled is None else 4 * spilled,
        "tmem_columns": 0,
        **_instructions(counts),
        "cubin_sha256": _sha256(compiled.asm["hsaco"]),
    }


def _instructions(counts: Counter[str]) -> dict[str, Any]:
    return {
        "tensor_core": next((name for name in MATRIX if counts[name]), None),
        "instructions": counts.total(),
        "instruction_counts": {name: counts[name] for name in COUNTED if counts[name]},
    }


def run_tool(name: str, *arguments: str) -> str:
    """Standard output of one of Triton's NVIDIA tools."""
    path = bin_folder() / name
    try:
        done = subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=_TOOL_LIMIT_S
        )
    except OSError as error:
        raise EnvironmentProblem(
            f"{path} does not run: {error.strerror}; install Triton again: "
            "pip install --force-reinstall triton"
        ) from error
    if done.returncode != 0:
        raise EnvironmentProblem(f"{name} fails: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout


def _sha256(binary: bytes) -> str:
    return hashlib.sha256(binary).hexdigest()


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
