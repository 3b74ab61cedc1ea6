"""Whole models of CHELA blocks: a causal language model, and a classifier of sequences.

    x = sqrt(D) * E[ids]                            [B, T, D]      E [vocab_size, D]
    x = block(x), num_layers times                  [B, T, D]      chela.py
    h = norm(x)                                     [B, T, D]      h = x if norm_position="after"

    ChelaForCausalLM                 logits = h W^T                 [B, T, vocab_size]; tied: W = E
    ChelaForSequenceClassification   logits = mean_t(h) W^T + b     [B, num_classes]

Positions are not encoded: the convolutions tell tokens apart by their distance. Initialisation: E
and an untied W normal of variance 1 / D, so that x starts with rms 1 (arXiv 1706.03762, 3.4, for
the factor sqrt(D)) and tied and untied logits with variance 1; the classifier's W as torch's; the
blocks as theirs. A model on disk is chela_files.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chela_bench.errors import ArgumentError
from chela_bench.kernels.chela_config import ChelaConfig
from chela_bench.kernels.chela_files import load_model, save_model
from chela_bench.kernels.chela_graph import StepGraph
from chela_bench.reference.chela import zero_padding

__all__ = ["ChelaConfig", "ChelaForCausalLM", "ChelaForSequenceClassification", "ModelOutput"]

IGNORE_INDEX = -100  # a label that counts for nothing, as torch's cross_entropy has it


class ModelOutput(NamedTuple):
    """What a model returns: its logits, and its loss where labels were given."""

    logits: Tensor
    loss: Tensor | None


class _ChelaModel(nn.Module):
    """Embedding, blocks and the last norm.

    gradient_checkpointing = True keeps of each block its input alone for the backward pass, which
    computes the block again: less memory, a third more time, the same gradients.
    """

    causal: bool

    def __init__(self, config: ChelaConfig) -> None:
        """Raises ArgumentError for a config that this model cannot have."""
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        causal = type(self).causal if config.causal is None else config.causal
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            config.new_block(causal=causal) for _ in range(config.num_layers)
        )
        norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
        before = config.norm_position == "before"
        self.norm = norms[config.norm](config.d_model, eps=config.eps) if before else nn.Identity()
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into the folder, which is made if need be.

        Both are complete before they take the place of older ones, so a save that fails or is
        killed leaves the old model. One process saves: in a group of them, rank 0. Raises
        EnvironmentProblem if the folder cannot be written or safetensors is missing.
        """
        document = {"architecture": type(self).__name__, **self.config.to_dict()}
        save_model(folder, document, self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The model of a folder that `save_pretrained` wrote, in eval mode.

        dtype: a floating-point one for all parameters; None leaves each as it was saved. Raises
        ArgumentError if a file is missing, damaged, of another class or does not fit the other one,
        and EnvironmentProblem if safetensors is missing. config.json may be edited where that
        keeps the function: implementation and dropout.
        """

        model = load_model(
            folder,
            cls.__name__,
            lambda options: cls(ChelaConfig.from_dict(options)),
            dtype=dtype,
            device=device,
        )
        return model.eval()

    def _encode(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """h [B, T, D]."""
        x = self.embedding(input_ids) * self.config.d_model**0.5
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        h: Tensor = self.norm(x)
        return h

    def _mask_of(self, input_ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask given, or that of pad_token_id, after a look at the ids."""
        longest = self.config.max_length
        if (
            input_ids.ndim != 2
            or input_ids.dtype not in (torch.int64, torch.int32)
            or input_ids.shape[1] > longest
        ):
            raise ArgumentError(
                f"wanted input_ids [B, T <= {longest}] in torch.int64 or int32, got "
                f"{list(input_ids.shape)} in {input_ids.dtype}; cut longer sequences, or build the "
                "model with a larger max_length"
            )
        _check_range("input_ids", input_ids, self.config.vocab_size)
        if mask is None and self.config.pad_token_id is not None:
            return input_ids != self.config.pad_token_id
        return mask


class ChelaForCausalLM(_ChelaModel):
    """Predicts token t + 1 from tokens 0 to t. See the module for its equations."""

    causal = True

    def __init__(self, config: ChelaConfig) -> None:
        """Raises ArgumentError for causal=False."""
        if config.causal is False:
            raise ArgumentError(
                "wanted causal=True or None for ChelaForCausalLM, got False: it would see the "
                "token that it predicts; leave causal out"
            )
        super().__init__(config)
        self.lm_head: nn.Linear | None = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=config.d_model**-0.5)

    def forward(
        self, input_ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ModelOutput:
        """logits [B, T, vocab_size] in the model's dtype; loss in float32, or float64 of float64.

        input_ids [B, T] are int64 or int32, mask [B, T] bool is True where there is a token, as in
        ChelaLayer.forward. Logits at padding mean nothing.

        labels [B, T] are the input_ids themselves: the shift is made here, logits of token t
        against labels of token t + 1. The loss is the mean cross-entropy in nats over the labels
        that are not -100 and whose two tokens are not padding, 0 if there are none.

        Raises ArgumentError for a T beyond max_length, and on a CPU, where looking costs nothing,
        for ids out of range; a GPU's are torch's to find.
        """
        mask = self._mask_of(input_ids, mask)
        h = self._encode(input_ids, mask)
        logits = self._head(h)
        if labels is None:
            return ModelOutput(logits, None)
        _check_labels(labels, input_ids.shape, self.config.vocab_size)
        following = labels[:, 1:]
        if mask is not None:
            following = following.masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORE_INDEX)
        return ModelOutput(logits, _mean_cross_entropy(logits[:, :-1], following))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        graph: bool = False,
    ) -> Tensor:
        """input_ids [B, T >= 1] and max_new_tokens more: ids [B, T + max_new_tokens].

        Each is drawn from softmax(logits / temperature) among the top_k likeliest (all of them
        unless given) by generator, torch's global one unless given; temperature 0 takes the
        likeliest. pad_token_id is never drawn, and the prompts have none: they are of one length.
        Dropout is off. One pass over the prompts, then a step of every block a token: see
        ChelaLayer.prefill for what it costs and keeps. graph: all blocks' steps are one CUDA graph
        (StepGraph), captured after the prompts; that pays after some tens of tokens. Raises
        ArgumentError, before any of that if the result would be longer than max_length.
        """
        self._check_request(input_ids, max_new_tokens, temperature, top_k)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            found = [input_ids]
            for logits in self._next_logits(found, max_new_tokens, graph):
                drawn = self._draw(logits, temperature, top_k, generator)
                found.append(drawn.to(input_ids.dtype)[:, None])
            return torch.cat(found, dim=1)
        finally:
            for module, training in modes:
                module.training = training

    def _next_logits(self, found: list[Tensor], count: int, graph: bool) -> Iterator[Tensor]:
        """logits [B, vocab_size] after the ids in found, which grows in between, count times."""
        blocks: list[Any] = list(self.blocks)
        caches: list[Any] = []

        def step(x: Tensor) -> Tensor:
            for block, cache in zip(blocks, caches, strict=True):
                x = block.step(x, cache)
            return x

        call: Callable[[Tensor], Tensor] = step
        for i in range(count):
            x = self.embedding(found[-1]) * self.config.d_model**0.5  # [B, T or 1, D]
            if i == 0:
                for block in blocks:
                    x, cache = block.prefill(x)
                    caches.append(cache)
                x = x[:, -1]
            else:
                if i == 1 and graph:
                    call = StepGraph(step, x[:, 0], caches)
                x = call(x[:, 0])
            yield self._head(self.norm(x))

    def _head(self, h: Tensor) -> Tensor:
        return F.linear(h, (self.embedding if self.lm_head is None else self.lm_head).weight)

    def _draw(
        self,
        logits: Tensor,
        temperature: float,
        top_k: int | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Ids [B]."""
        if self.config.pad_token_id is not None:
            logits[:, self.config.pad_token_id] = -math.inf
        if temperature == 0:
            return logits.argmax(dim=-1)
        most, ids = logits.double().topk(min(top_k or logits.shape[1], logits.shape[1]))
        chances = ((most - most[:, :1]) / temperature).softmax(dim=-1)
        return ids.gather(1, torch.multinomial(chances, 1, generator=generator))[:, 0]

    def _check_request(
        self, input_ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None
    ) -> None:
        mask = self._mask_of(input_ids, None)
        T, longest = input_ids.shape[1], self.config.max_length
        if T == 0 or (mask is not None and not mask.all()):
            raise ArgumentError(
                "wanted prompts [B, T >= 1] without padding, got "
                f"{'no tokens' if T == 0 else f'pad_token_id {self.config.pad_token_id} in them'}; "
                "generate for prompts of one length at a time"
            )
        if max_new_tokens < 0 or T + max_new_tokens > longest:
            raise ArgumentError(
                f"wanted 0 to {longest - T} new tokens after a prompt of {T}, for a max_length of "
                f"{longest}, got {max_new_tokens}; shorten the prompt or ask for fewer"
            )
        if not 0 <= temperature < math.inf:
            raise ArgumentError(
                f"wanted a finite temperature of 0 or more, got {temperature}; 0 is the likeliest"
            )
        if top_k is not None and top_k < 1:
            raise ArgumentError(f"wanted top_k of 1 or more, got {top_k}; None is all of them")


class ChelaForSequenceClassification(_ChelaModel):
    """One of num_classes for each sequence, two-sided by default. See the module's equations."""

    causal = False

    def __init__(self, config: ChelaConfig) -> None:
        """Raises ArgumentError if the config has no num_classes."""
        if config.num_classes is None:
            raise ArgumentError(
                "wanted num_classes for ChelaForSequenceClassification, got None; set it in the "
                "config"
            )
        super().__init__(config)
        self.classifier = nn.Linear(config.d_model, config.num_classes)

    def forward(
        self, input_ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ModelOutput:
        """logits [B, num_classes] in the model's dtype; loss in float32, or float64 of float64.

        input_ids and mask are as ChelaForCausalLM's, and so are the errors. The mean is over a
        row's tokens; a row without any has the classifier's bias for logits. labels [B] are
        classes, or -100 for a row that does not count; the loss is the mean cross-entropy in nats
        over those that do, 0 if there are none.
        """
        mask = self._mask_of(input_ids, mask)
        h = _wide(zero_padding(self._encode(input_ids, mask), mask))
        if mask is None:
            pooled = h.sum(dim=1) / max(1, h.shape[1])
        else:
            pooled = h.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        logits = self.classifier(pooled.to(self.classifier.weight.dtype))
        if labels is None:
            return ModelOutput(logits, None)
        _check_labels(labels, input_ids.shape[:1], self.classifier.out_features)
        return ModelOutput(logits, _mean_cross_entropy(logits, labels))


def _wide(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [..., C], labels [...] -> the mean over labels that are not ignored, 0 without any."""
    total = F.cross_entropy(
        _wide(logits).flatten(0, -2),
        labels.flatten().long(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def _check_labels(labels: Tensor, shape: Sequence[int], classes: int) -> None:
    if labels.shape != shape or labels.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(
            f"wanted labels {list(shape)} in torch.int64 or int32, got {list(labels.shape)} in "
            f"{labels.dtype}; {IGNORE_INDEX} marks what does not count"
        )
    _check_range("labels", labels[labels != IGNORE_INDEX] if _is_cheap(labels) else labels, classes)


def _check_range(name: str, ids: Tensor, size: int) -> None:
    if not _is_cheap(ids) or ids.numel() == 0:
        return
    least, most = (int(x) for x in ids.aminmax())
    if least < 0 or most >= size:
        raise ArgumentError(
            f"wanted {name} of 0 to {size - 1}, got {least} to {most}; check the tokenizer, or "
            "build the model for more"
        )


def _is_cheap(ids: Tensor) -> bool:
    """Looking at the numbers costs no wait for a GPU and breaks no graph."""
    return ids.device.type == "cpu" and not torch.compiler.is_compiling()
