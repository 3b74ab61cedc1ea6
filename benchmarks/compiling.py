"""Kernels compiled for a GPU that need not be there, and what the compiler says of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("HGMMA", "HMMA", "LDGSTS", "LDL", "STL", "BAR", "SHFL")


def compiled(
    kernel: Any,
    constants: Mapping[str, Any],
    type_of: Callable[[str], str],
    *,
    num_warps: int,
    num_stages: int = 1,
    arch: int = 90,
) -> Any:
    """As the launcher would have it: 16-byte aligned pointers, scalars not specialised.

    constants: constexprs, and None for pointers that are missing. type_of: of any other argument,
    by its name; of a pointer, what it points to.
    """
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + type_of(name)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = type_of(name)
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return triton.compile(
        source(kernel, signature, values, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )


def facts(kernel: Any) -> str:
    """Registers a thread, stack in bytes, shared memory, counts of INSTRUCTIONS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run([BIN / tool, *flags, file.name], capture_output=True, text=True).stdout
            for tool, *flags in (
                ("cuobjdump", "--dump-resource-usage"),
                ("nvdisasm", "--print-code", "--no-dataflow"),  # which labels nothing that we count
            )
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    words = re.findall(r"\b[A-Z]+", listing)
    counts = " ".join(f"{name} {words.count(name)}" for name in INSTRUCTIONS)
    shared = kernel.metadata.shared / 1024
    return f"{found[1]:>4} registers {found[2]:>5} stack {shared:>4.0f} KB   {counts}"
