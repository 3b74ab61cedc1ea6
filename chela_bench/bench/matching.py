"""What a formula says of each launch, put beside what Nsight Compute counted of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from chela_bench.kernels.traffic import OTHER, PRODUCT
from chela_bench.records import Kernel

_OURS = re.compile(r"_\w+_kernel")
_PRODUCT = re.compile(r"nvjet|gemm|xmma|cutlass")
_Launch = tuple[str, int, Mapping[str, int]]  # kernel, bytes through memory, and in L2 by tensor


def with_model(kernels: Sequence[Kernel], model: Sequence[_Launch | Sequence[Any]]) -> list[Kernel]:
    """Launches of a call, in order, with the formula's bytes.

    Those of one name are matched in order, and so are cuBLAS's, and all others that are not ours.
    Where the formula has more or fewer of a kind than there were, nothing is said of that kind.
    """
    names = {name for name, _, _ in model}
    kinds = [_kind(kernel.name, names) for kernel in kernels]
    found = list(kernels)
    for kind in names:
        said = [launch for launch in model if launch[0] == kind]
        places = [n for n, other in enumerate(kinds) if other == kind]
        if len(said) != len(places):
            continue
        for n, (_, size, in_l2) in zip(places, said, strict=True):
            update = {"model_bytes": size, "model_l2": dict(in_l2)}
            found[n] = kernels[n].model_copy(update=update)
    return found


def _kind(name: str, known: set[str]) -> str | None:
    """What a formula calls it."""
    if name in known:
        return name
    if _OURS.fullmatch(name):
        return None
    is_product = _PRODUCT.search(name) and "splitK" not in name
    return PRODUCT if is_product else OTHER
