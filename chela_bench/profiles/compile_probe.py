"""A program of its own: compiles a small kernel for each architecture in its arguments, and says in
JSON what went wrong, by architecture; null where nothing did."""

from __future__ import annotations

import json
import sys
import tempfile

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _probe_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * 2.0)


def main() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "SIZE": "constexpr"}
    found: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder  # compiled, not found
        for name in sys.argv[1:]:
            nvidia = name.startswith("sm_")
            target = GPUTarget(
                "cuda" if nvidia else "hip",
                int(name.removeprefix("sm_")) if nvidia else name,
                32 if nvidia else 64,
            )
            try:
                triton.compile(ASTSource(_probe_kernel, signature, {(2,): 128}), target=target)
            except Exception as error:  # whatever it is, it is the finding
                found[name] = f"{type(error).__name__}: {error}"
            else:
                found[name] = None
    print(json.dumps({"triton": triton.__version__, "problems": found}))


if __name__ == "__main__":
    main()
