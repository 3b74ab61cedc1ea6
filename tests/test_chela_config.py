"""Configs of models of CHELA blocks."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math

import pytest
import torch

from chela_bench.errors import ArgumentError
from chela_bench.kernels import chela
from chela_bench.kernels.chela_models import (
    ChelaConfig,
    ChelaForCausalLM,
    ChelaForSequenceClassification,
)
from chela_bench.reference import chela as reference
from tests.chela_models import (
    SMALL,
    config,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("owner", [reference.ChelaLayer, reference.ChelaBlock, chela.ChelaLayer])
def test_a_config_has_every_option_of_a_block(owner):
    fields = {field.name: field.default for field in dataclasses.fields(ChelaConfig)}
    for name, option in inspect.signature(owner).parameters.items():
        if option.kind is not inspect.Parameter.VAR_KEYWORD:
            missing = option.default is inspect.Parameter.empty
            default = dataclasses.MISSING if missing else option.default
            assert fields[name] == (None if name == "causal" else default), name


def test_a_config_goes_through_json():
    before = config(short_sizes=[3, 5], dropout=0, causal=True, eps=1e-6)
    after = ChelaConfig.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after == before and hash(after) == hash(before) and after.short_sizes == (3, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.d_model = 3


def test_a_config_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    config()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"d_model": "8"}, "wanted d_model: int, got '8' of type str; pass a value of that type"),
        ({"d_model": 8.0}, "wanted d_model: int, got 8.0 of type float"),
        ({"num_heads": True}, "wanted num_heads: int, got True of type bool"),
        ({"tie_embeddings": 1}, "wanted tie_embeddings: bool, got 1"),
        ({"short_sizes": 3}, "wanted short_sizes: .*, got 3"),
        ({"short_sizes": [3, "5"]}, r"wanted short_sizes: .*, got \(3, '5'\)"),
        ({"dropout": None}, "wanted dropout: float, got None"),
        ({"order": 1}, "no order 1; it is one of 'serial', 'parallel'"),
        ({"order": ["serial"]}, "no order"),
        ({"implementation": "cuda"}, "no implementation 'cuda'"),
        ({"vocab_size": 0}, "wanted vocab_size of 1 or more, got 0"),
        ({"d_model": -1}, "wanted d_model of 1 or more, got -1"),
        ({"num_layers": 0}, "wanted num_layers of 1 or more, got 0"),
        ({"num_classes": 1}, "wanted num_classes of 2 or more, got 1"),
        ({"pad_token_id": 11}, "wanted 0 <= pad_token_id < vocab_size = 11, got 11"),
        ({"pad_token_id": -1}, "got -1; padding takes an id of its own"),
        ({"eps": math.nan}, "wanted a finite eps above 0, got nan"),
        ({"dropout": math.nan}, "wanted 0 <= dropout < 1, got nan"),
        ({"num_heads": 3}, "pass multiples of num_heads"),
        ({"width": 8, "depth": 2}, "no 'width', 'depth' in ChelaConfig; it has vocab_size, d_mod"),
    ],
    ids=str,
)
def test_a_config_refuses(changes, match):
    with pytest.raises(ArgumentError, match=match):
        ChelaConfig.from_dict({**SMALL, **changes})


def test_a_config_says_what_is_missing():
    with pytest.raises(ArgumentError, match="ChelaConfig needs d_model, num_layers, max_length"):
        ChelaConfig.from_dict({"vocab_size": 3})


def test_a_model_refuses_a_config_of_another():
    with pytest.raises(ArgumentError, match="it would see the token that it predicts"):
        ChelaForCausalLM(config(causal=False))
    with pytest.raises(ArgumentError, match=r"wanted num_classes for .*, got None"):
        ChelaForSequenceClassification(config(num_classes=None))
