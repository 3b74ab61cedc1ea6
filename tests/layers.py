"""What tests of the CHELA layer share, reference and Triton: every switch, and its values."""

from __future__ import annotations

from typing import Any

SWITCHES: dict[str, list[Any]] = {
    "causal": [True, False],
    "order": ["serial", "parallel"],
    "projection": ["shared", "none"],
    "num_heads": [1, 2],
    "gate_activation": ["sigmoid", "silu"],
    "attention_gate": [True, False],
    "output_gate": [True, False],
    "norm": ["layer", "rms"],
    "norm_position": ["before", "after"],
    "short_sizes": [None, (), (5, 1, 3)],
    "long_kernel": ["explicit", "multiscale"],
}
