"""Configurations that were measured to be best, for calls of that very shape on such a card.

tuned.json holds them, with the card, the versions and the date that they were measured with;
`chela-bench tune --write-table` writes it. What is not in it is chosen by rule: by
linear_attention_model.py and long_conv_plan.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from chela_bench.errors import ArgumentError
from chela_bench.kernels.launching import capability, processors

TABLE = Path(__file__).with_name("tuned.json")
SCHEMA = 1
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Config = Mapping[str, int | str]


@functools.lru_cache(maxsize=4096)
def tuned(op: str, device: torch.device, dtype: torch.dtype, **when: int | bool) -> Config | None:
    """The configuration measured for such a call on such a device, if there is one."""
    entries = _entries(TABLE)
    if not entries:
        return None
    found = capability(device)
    if found is None:
        return None
    conditions = {"dtype": DTYPES[dtype], **when}
    return entries.get(_key(op, found, processors(device), conditions))


@functools.cache
def _entries(path: Path) -> dict[Any, Config]:
    try:
        held = json.loads(path.read_text())
        if held["schema"] != SCHEMA:
            raise ValueError(f"schema {held['schema']}, this version reads {SCHEMA}")
        return {
            _key(x["op"], x["capability"], x["processors"], x["when"]): x["config"]
            for x in held["entries"]
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            f"{path} is no table of configurations: {error!r}; write it again with chela-bench "
            "tune --write-table, or remove it"
        ) from error


def _key(op: str, capability: str, processors: int, when: Mapping[str, object]) -> object:
    return op, capability, processors, tuple(sorted(when.items()))
