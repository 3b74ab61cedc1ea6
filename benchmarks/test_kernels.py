"""Our own kernels, for CI: `pytest benchmarks --benchmark-json now.json`, then `chela-bench gate`.

On a GPU every implementation of ours at the shapes of the presets attention, convolution and layer,
forward and with the backward, and one step of decoding. Without one our references at small shapes,
so that the suite itself is tested in minutes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from chela_bench.bench import plan
from chela_bench.bench.cases import Case
from chela_bench.bench.config import load_config
from chela_bench.profiles.machine import no_gpu_reason

CONFIG = load_config(Path(__file__).resolve().parent.parent / "bench.toml")
OURS = {
    "linear_attention": ("triton_chunked",),
    "long_conv": ("triton",),
    "short_long_conv": ("triton",),
    "reparameterization": ("triton_unmerged", "triton_merged"),
    "chela_layer": ("chela", "chela_merged"),
}
REFERENCES = {
    "linear_attention": ("chunked", "quadratic"),
    "long_conv": ("fft",),
    "short_long_conv": ("fft",),
    "chela_layer": ("reference",),
}


def cases() -> list[Case]:
    """What is measured here; the names of tests are points' keys."""
    if no_gpu_reason() is not None:
        return _planned("cpu", {"small": "1k"}, REFERENCES, ("fwd", "fwdbwd"))
    found = _planned("cuda", {"medium": "4k,16k"}, OURS, ("fwd", "fwdbwd"))
    for preset in ("attention", "convolution", "layer"):
        sweep = CONFIG.presets[preset].sweep
        ops = {op: OURS[op] for op in sweep.ops or () if op in OURS}
        found += _planned("cuda", dict.fromkeys(sweep.shapes or ()), ops, ("fwd", "fwdbwd"))
    found += _planned("cuda", {"medium": "4k"}, {"chela_layer": ("chela",)}, ("decode",))
    return list({case.key: case for case in found}.values())


def _planned(
    device: str,
    shapes: dict[str, str | None],
    impls: dict[str, tuple[str, ...]],
    directions: tuple[str, ...],
) -> list[Case]:
    found = []
    for op, names in impls.items():
        for shape, lens in shapes.items():
            if shape not in CONFIG.shapes[op]:
                continue
            flags = plan.Flags(
                ops=(op,), impls=names, shapes=(shape,), lens=lens, directions=directions
            )
            settings = plan.resolve(CONFIG, flags, [device])
            found += [c for c in plan.cases(settings) if plan.unavailable(settings, c) is None]
    return found


CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=[case.key for case in CASES])
def test_kernel(chela_benchmark, case):
    point = chela_benchmark(
        case.op,
        case.impl,
        direction=case.direction,
        dtype=case.dtype,
        config=case.config,
        **case.shape,
    )
    assert point.error_rel <= point.error_budget
