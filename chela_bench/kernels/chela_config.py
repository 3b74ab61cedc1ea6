"""What a whole model of CHELA blocks is built from, as one value: ChelaConfig."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import torch

from chela_bench.errors import ArgumentError
from chela_bench.kernels.chela import ChelaBlock, Implementation
from chela_bench.reference.chela import (
    FeedForwardActivation,
    GateActivation,
    Norm,
    NormPosition,
    Projection,
)
from chela_bench.reference.long_kernels import LongKernelForm
from chela_bench.reference.short_long_conv import Order


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChelaConfig:
    """What a model is built from; every field is a JSON value or a tuple of them.

    vocab_size, num_layers    ids are 0 to vocab_size - 1; num_layers blocks
    num_classes               of a ChelaForSequenceClassification, 2 or more
    tie_embeddings            ChelaForCausalLM's output matrix is its embedding
    pad_token_id              where no mask is given, tokens of this id are padding
    causal                    None: True in ChelaForCausalLM, which knows no other, False in
                              ChelaForSequenceClassification

    All others are ChelaBlock's and ChelaLayer's, with their defaults. Raises ArgumentError for a
    value of another type, or one that no block can be built with.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    max_length: int
    num_classes: int | None = None
    tie_embeddings: bool = True
    pad_token_id: int | None = None
    causal: bool | None = None
    d_ff: int | None = None
    ff_activation: FeedForwardActivation = "silu"
    d_key: int | None = None
    d_value: int | None = None
    order: Order = "serial"
    projection: Projection = "shared"
    num_heads: int = 1
    gate_activation: GateActivation = "sigmoid"
    attention_gate: bool = True
    output_gate: bool = True
    norm: Norm = "layer"
    norm_position: NormPosition = "before"
    short_sizes: Sequence[int] | None = None
    long_kernel: LongKernelForm = "explicit"
    dropout: float = 0.0
    eps: float = 1e-5
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.short_sizes, list):  # as JSON has it
            object.__setattr__(self, "short_sizes", tuple(self.short_sizes))
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _fits(value, hints[field.name]):
                raise ArgumentError(
                    f"wanted {field.name}: {field.type}, got {value!r} of type "
                    f"{type(value).__name__}; pass a value of that type"
                )
        for name, least in (
            ("vocab_size", 1),
            ("d_model", 1),
            ("num_layers", 1),
            ("num_classes", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ArgumentError(f"wanted {name} of {least} or more, got {value}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ArgumentError(
                f"wanted 0 <= pad_token_id < vocab_size = {self.vocab_size}, got "
                f"{self.pad_token_id}; padding takes an id of its own, so raise vocab_size"
            )
        if not 0 < self.eps < math.inf:
            raise ArgumentError(f"wanted a finite eps above 0, got {self.eps}; 1e-5 is the default")
        with torch.device("meta"):  # the block checks its options itself, and takes no memory
            self.new_block(causal=self.causal is not False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config of these fields, as `to_dict` or JSON gives them. Raises ArgumentError for a
        field that there is not, and for one that is missing."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := [name for name in values if name not in fields]:
            raise ArgumentError(
                f"no {', '.join(map(repr, unknown))} in ChelaConfig; it has {', '.join(fields)}"
            )
        needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        if missing := [name for name in needed if name not in values]:
            raise ArgumentError(f"ChelaConfig needs {', '.join(missing)} too; add what is missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field under its name, for json.dumps."""
        return dataclasses.asdict(self)

    def new_block(self, *, causal: bool) -> ChelaBlock:
        """One of the blocks."""
        own = {"vocab_size", "num_layers", "num_classes", "tie_embeddings", "pad_token_id"}
        options = {name: value for name, value in self.to_dict().items() if name not in own}
        return ChelaBlock(**{**options, "causal": causal})


def _fits(value: object, hint: Any) -> bool:
    """A field's value is of its type; which of a Literal's values, the block checks."""
    kind = get_origin(hint)
    if kind is Literal:
        return True
    if kind is UnionType:
        return any(_fits(value, one) for one in get_args(hint))
    if kind is Sequence:
        return isinstance(value, tuple) and all(_fits(x, get_args(hint)[0]) for x in value)
    if hint is float:
        return type(value) in (float, int)
    return type(value) is hint
