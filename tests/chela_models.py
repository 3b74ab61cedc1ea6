"""Small models of CHELA blocks, what goes into them, and their gradients."""

from __future__ import annotations

import pytest
import torch

from chela_bench.kernels.chela_models import (
    ChelaConfig,
    ChelaForCausalLM,
    ChelaForSequenceClassification,
)

SMALL = {"vocab_size": 11, "d_model": 8, "num_layers": 2, "max_length": 40, "d_key": 4}
MODELS = pytest.mark.parametrize("kind", [ChelaForCausalLM, ChelaForSequenceClassification])


def config(**changes):
    return ChelaConfig(**{**SMALL, "num_classes": 3, **changes})


def model(kind=ChelaForCausalLM, seed=0, **changes):
    torch.manual_seed(seed)
    made = kind(config(**changes)).double()
    for parameter in made.parameters():  # so that no scale is 1, no bias 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    for block in made.blocks:  # SiLU's mean: else states are nearly of rank one, see ChelaLayer
        block.layer.m_q.data -= 0.2
        block.layer.m_k.data -= 0.2
    return made


def tokens(B=3, T=40, below=11, seed=1):
    return torch.randint(below, (B, T), generator=torch.Generator().manual_seed(seed))


def labels_for(kind, ids):
    return ids if kind is ChelaForCausalLM else ids.new_tensor(range(len(ids))) % 3


def gradients(m, ids, **inputs):
    m.zero_grad()
    m(ids, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in m.named_parameters()}
