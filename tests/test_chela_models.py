"""Models of CHELA blocks: their configs, outputs, losses, gradients and files."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
import math
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F

from chela_bench.errors import ArgumentError, EnvironmentProblem
from chela_bench.kernels import chela
from chela_bench.kernels.chela_models import (
    ChelaConfig,
    ChelaForCausalLM,
    ChelaForSequenceClassification,
)
from chela_bench.reference import chela as reference
from tests.attention import DEVICE
from tests.running import environment

SMALL = {"vocab_size": 11, "d_model": 8, "num_layers": 2, "max_length": 40, "d_key": 4}
MODELS = pytest.mark.parametrize("kind", [ChelaForCausalLM, ChelaForSequenceClassification])
SPANS = [(0, 40), (0, 23), (9, 40), (5, 31), (0, 1)]  # tokens of each row of 40


pytestmark = pytest.mark.usefixtures("one_thread")


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


def padded(rows=SPANS):
    mask = torch.zeros(len(rows), 40, dtype=torch.bool)
    for row, (start, stop) in enumerate(rows):
        mask[row, start:stop] = True
    return mask


def gradients(m, ids, **inputs):
    m.zero_grad()
    m(ids, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in m.named_parameters()}


def assert_equal(found, wanted, tolerance=1e-11):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance)


# --- the config -----------------------------------------------------------------------------------


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


# --- outputs and losses ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm_position", ["before", "after"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_models_equations(tied, norm_position):
    m = model(tie_embeddings=tied, norm_position=norm_position)
    ids = tokens()
    x = m.embedding.weight[ids] * 8**0.5
    for block in m.blocks:
        x = block(x)
    if norm_position == "before":
        x = F.layer_norm(x, (8,), m.norm.weight, m.norm.bias, 1e-5)
    output = m.embedding.weight if tied else m.lm_head.weight
    logits, loss = m(ids)
    torch.testing.assert_close(logits, x @ output.T, rtol=1e-12, atol=1e-12)
    assert loss is None and ("lm_head.weight" in m.state_dict()) == (not tied)


def test_a_classifiers_equations():
    m = model(ChelaForSequenceClassification)
    assert not any(block.layer.causal for block in m.blocks)
    x = m.embedding.weight[tokens()] * 8**0.5
    for block in m.blocks:
        x = block(x)
    logits = m.classifier(m.norm(x).mean(dim=1))
    torch.testing.assert_close(m(tokens()).logits, logits, rtol=1e-12, atol=1e-12)
    one_sided = model(ChelaForSequenceClassification, causal=True)
    assert all(block.layer.causal for block in one_sided.blocks)


def test_the_loss_is_of_the_following_token():
    m, ids = model(), tokens()
    labels = ids.clone()
    labels[0, 7] = labels[2] = -100
    logits, loss = m(ids, labels=labels)
    losses = [
        -logits[b, t - 1].log_softmax(-1)[ids[b, t]]
        for b in (0, 1) for t in range(1, 40) if (b, t) != (0, 7)
    ]  # fmt: skip
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    torch.testing.assert_close(m(ids.int(), labels=labels.int()).loss, loss)


def test_a_language_model_sees_no_later_token():
    m, ids = model(), tokens()
    other = ids.clone()
    other[:, 20:] = (other[:, 20:] + 1) % 11
    change = m(ids).logits - m(other).logits
    assert change[:, :20].abs().max() < 1e-12 < change[:, 20].abs().max()


@MODELS
def test_padding_is_as_if_cut_off(kind):
    m, mask = model(kind), padded()
    ids = tokens(len(SPANS))
    labels = labels_for(kind, ids)
    logits, loss = m(ids.masked_fill(~mask, 10), mask, labels)
    total, count = 0.0, 0
    for row, (start, stop) in enumerate(SPANS):
        cut = ids[row : row + 1, start:stop]
        alone = m(cut).logits
        if kind is ChelaForCausalLM:
            torch.testing.assert_close(logits[row, start:stop], alone[0], rtol=1e-10, atol=1e-10)
            total += m(cut, labels=cut).loss * (stop - start - 1)
            count += stop - start - 1
        else:
            torch.testing.assert_close(logits[row], alone[0], rtol=1e-10, atol=1e-10)
            total += m(cut, labels=labels[row : row + 1]).loss
            count += 1
    torch.testing.assert_close(loss, total / count, rtol=1e-10, atol=1e-10)


@MODELS
def test_pad_token_id_makes_the_mask(kind):
    m, plain, mask = model(kind, pad_token_id=10), model(kind), padded()
    ids = tokens(len(SPANS), below=10).masked_fill(~mask, 10)
    labels = labels_for(kind, ids)
    for mine, given in zip(m(ids, labels=labels), plain(ids, mask, labels), strict=True):
        assert torch.equal(mine, given)
    everything = torch.ones_like(mask)
    assert torch.equal(m(ids, everything).logits, plain(ids).logits)


@MODELS
def test_rows_without_tokens_or_labels_count_for_nothing(kind):
    m, ids = model(kind), tokens(2)
    labels = labels_for(kind, ids)
    nothing = torch.full_like(labels, -100)
    for inputs in (
        {"labels": nothing},
        {"mask": torch.zeros_like(ids).bool(), "labels": nothing},
    ):
        assert m(ids, **inputs).loss == 0
        assert not any(g.any() for g in gradients(m, ids, **inputs).values())
    logits, loss = m(ids, torch.zeros_like(ids).bool(), labels)
    assert logits.isfinite().all()
    if kind is ChelaForCausalLM:
        assert loss == 0
    else:
        assert torch.equal(logits, m.classifier.bias.expand(2, 3))
    mask = padded([(0, 40), (0, 0)])
    labels = labels.clone()
    labels[1] = -100
    torch.testing.assert_close(m(ids, mask, labels).loss, m(ids[:1], labels=labels[:1]).loss)


@MODELS
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (2, 0), (2, 1)])
def test_empty_and_tiny_batches(kind, shape):
    m, ids = model(kind), tokens(*shape)
    labels = labels_for(kind, ids)
    logits, loss = m(ids, labels=labels)
    assert logits.shape == ((*shape, 11) if kind is ChelaForCausalLM else (shape[0], 3))
    assert loss.isfinite() and all(
        g.isfinite().all() for g in gradients(m, ids, labels=labels).values()
    )


def test_ids_may_lie_anywhere_in_memory():
    m, ids = model(), tokens(40, 3)
    assert torch.equal(m(ids.T, labels=ids.T).loss, m(ids.T.contiguous(), labels=ids.T).loss)


@MODELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_few_bits_are_near_float64(kind, dtype):
    m, low = model(kind), model(kind).to(dtype)
    ids = tokens()
    labels = labels_for(kind, ids)
    logits, loss = low(ids, labels=labels)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    exact = m(ids, labels=labels)
    # Weights round, and in each of two blocks about twenty steps: as blocks alone, twice.
    assert (logits - exact.logits).norm() / exact.logits.norm() < 16 * torch.finfo(dtype).eps
    assert (loss - exact.loss).abs() < 16 * torch.finfo(dtype).eps


@MODELS
def test_autocast_leaves_weights_and_gradients_in_float32(kind):
    m, ids = model(kind).float(), tokens()
    exact = model(kind)(ids, labels=labels_for(kind, ids)).loss
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = m(ids, labels=labels_for(kind, ids))
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (loss - exact).abs() < 16 * 2.0**-7
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in m.parameters())


@MODELS
@pytest.mark.parametrize("norm_position", ["before", "after"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)  # the interpreter cannot multiply bfloat16
def test_autocast_by_triton_is_near_float64(kind, norm_position, dtype):
    exact = model(kind, norm_position=norm_position).to(DEVICE)
    m = model(kind, norm_position=norm_position, implementation="triton").float().to(DEVICE)
    ids = tokens().to(DEVICE)
    inputs = {"mask": ids > 0, "labels": labels_for(kind, ids)}
    with torch.autocast(DEVICE, dtype):
        loss = m(ids, **inputs).loss
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in m.parameters())
    found = torch.cat([p.grad.flatten() for p in m.parameters()]).double()
    right = torch.cat([g.flatten() for g in gradients(exact, ids, **inputs).values()])
    eps = torch.finfo(dtype).eps
    assert (loss - exact(ids, **inputs).loss).abs() < 16 * eps
    assert (found - right).norm() < 16 * eps * right.norm()


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"input_ids": tokens(2, 41)}, r"wanted input_ids \[B, T <= 40\] .* got \[2, 41\]"),
        ({"input_ids": tokens(2, 4)[0]}, r"wanted input_ids .* got \[4\]"),
        ({"input_ids": tokens(2, 4).float()}, "in torch.float32; cut longer"),
        ({"input_ids": tokens(2, 4) + 1}, "wanted input_ids of 0 to 10, got 1 to 11|got . to 11"),
        ({"input_ids": tokens(2, 4) - 20}, "wanted input_ids of 0 to 10, got -"),
        ({"mask": torch.ones(2, 4)}, r"wanted mask \[B, T\] = \[2, 4\] in torch.bool"),
        ({"mask": torch.ones(2, 3).bool()}, r"wanted mask .* got \[2, 3\]"),
        ({"labels": tokens(2, 3)}, r"wanted labels \[2, 4\] .* got \[2, 3\]"),
        ({"labels": tokens(2, 4).float()}, "in torch.float32; -100 marks"),
        ({"labels": tokens(2, 4) - 100}, "wanted labels of 0 to 10, got -"),
    ],
    ids=str,
)
def test_a_language_model_refuses(inputs, match):
    ids = torch.tensor([[1, 10, 3, 4], [2, 3, 4, 5]])
    if "input_ids" in inputs and "11" in match:
        inputs = {"input_ids": ids + 1}
    with pytest.raises(ArgumentError, match=match):
        model()(**{"input_ids": ids, **inputs})


def test_a_classifier_refuses_labels_of_other_classes():
    m = model(ChelaForSequenceClassification)
    with pytest.raises(ArgumentError, match="wanted labels of 0 to 2, got 0 to 3"):
        m(tokens(2), labels=torch.tensor([0, 3]))
    with pytest.raises(ArgumentError, match=r"wanted labels \[2\] .* got \[2, 1\]"):
        m(tokens(2), labels=torch.tensor([[0], [1]]))


# --- gradients ------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_embeddings": False, "long_kernel": "multiscale", "norm": "rms"},
        {"norm_position": "after", "order": "parallel", "pad_token_id": 0},
        {"output_gate": False, "attention_gate": False, "short_sizes": ()},
        {"projection": "none", "d_key": None, "num_heads": 2},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(kind, options):
    m, ids = model(kind, **options), tokens()
    assert all(g.any() for g in gradients(m, ids, labels=labels_for(kind, ids)).values())


@MODELS
def test_checkpointing_keeps_gradients_and_dropout(kind):
    m, ids = model(kind, dropout=0.3), tokens()
    found = []
    for m.gradient_checkpointing in (False, True):
        torch.manual_seed(5)
        found.append(gradients(m, ids, mask=ids > 0, labels=labels_for(kind, ids)))
    assert_equal(*found)


def test_checkpointing_keeps_less():
    """Bytes that the graph holds on to: with checkpoints, hardly more than each block's input."""
    kept = {}
    m, ids = model(num_layers=6), tokens()
    for m.gradient_checkpointing in (False, True):
        storages = {}

        def pack(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            m(ids, labels=ids)
        kept[m.gradient_checkpointing] = sum(storages.values())
    assert kept[True] < 0.2 * kept[False]


@MODELS
def test_a_deep_model_starts_well_scaled(kind):
    """Twelve blocks over 4096 tokens, in float32."""
    torch.manual_seed(0)
    m = kind(config(d_model=32, num_layers=12, max_length=4096, d_key=16))
    ids = tokens(1, 4096)
    logits, loss = m(ids, labels=labels_for(kind, ids))
    classes = logits.shape[-1]
    assert logits.isfinite().all() and loss < math.log(classes) + 1.5
    if kind is ChelaForCausalLM:
        assert 0.5 < logits.std() < 2
    sizes = {name: g.norm() for name, g in gradients(m, ids, labels=labels_for(kind, ids)).items()}
    assert all(size.isfinite() for size in sizes.values())
    assert not [name for name, size in sizes.items() if size < 1e-6 * max(sizes.values())]


def train_in_a_group(rank, folder):
    """One of two processes: the gradients of its half of the batch, averaged with the other's."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    for kind in (ChelaForCausalLM, ChelaForSequenceClassification):
        m = model(kind, seed=rank)  # the group starts from rank 0's
        group = torch.nn.parallel.DistributedDataParallel(m, find_unused_parameters=False)
        ids = tokens(4)
        half = slice(2 * rank, 2 * rank + 2)
        for m.gradient_checkpointing in (False, True):  # the second step waits for stragglers
            found = gradients(group, ids[half], labels=labels_for(kind, ids)[half])
        torch.save(found, folder / f"{kind.__name__}-{rank}.pt")
    del group
    gc.collect()  # it holds on to the process group's threads
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Forks of a process of its own, which has imported all that they need."""
    code = (
        "import sys; from pathlib import Path; from tests.test_chela_models import *; model(); "
        "torch.multiprocessing.start_processes("
        "train_in_a_group, (Path(sys.argv[1]),), nprocs=2, start_method='fork')"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], env=environment(), check=True)
    for kind in (ChelaForCausalLM, ChelaForSequenceClassification):
        ids = tokens(4)
        whole = gradients(model(kind), ids, labels=labels_for(kind, ids))
        for rank in range(2):
            found = torch.load(tmp_path / f"{kind.__name__}-{rank}.pt")
            assert_equal({name.removeprefix("module."): g for name, g in found.items()}, whole)


# --- generation -----------------------------------------------------------------------------------

DECODERS = [
    {"implementation": "reference"},
    {"implementation": "triton", "order": "parallel", "num_heads": 2},
    {"implementation": "triton", "norm_position": "after"},
]


def sharp(**options):
    """A model whose likeliest tokens are far apart, and another one after each."""
    m = model(pad_token_id=10, tie_embeddings=False, **options).float().to(DEVICE)
    m.lm_head.weight.data *= 5
    return m.eval()


@pytest.mark.parametrize("options", DECODERS, ids=str)
@pytest.mark.parametrize("T", [1, 33])
def test_greedy_generation_is_the_argmax_of_whole_forwards(options, T):
    m, ids = sharp(**options), tokens(3, T, below=10).to(DEVICE)
    found = m.generate(ids, 5, temperature=0)
    assert found.shape == (3, T + 5) and found.dtype == ids.dtype
    for _ in range(5):
        logits = m(ids).logits[:, -1, :10]
        most = logits.topk(2).values
        assert (most[:, 0] - most[:, 1]).min() > 1e-3  # rounding decides nothing
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(found, ids)
    assert len(found[:, T:].unique()) > 2


@pytest.mark.gpu
def test_generation_by_a_graph_is_the_same():
    m, ids = sharp(max_length=200), tokens(T=50, below=10).to(DEVICE)
    assert torch.equal(
        m.generate(ids, 100, temperature=0, graph=True), m.generate(ids, 100, temperature=0)
    )
    assert m.generate(ids, 1, graph=True).shape == (3, 51)


def test_generation_by_a_graph_wants_a_gpu():
    m, ids = model(), tokens(T=5)
    with pytest.raises(ArgumentError, match="wanted x on a GPU for a CUDA graph, got cpu"):
        m.generate(ids, 2, graph=True)
    assert m.generate(ids, 1, graph=True).shape == (3, 6)  # the prompt's own, no step


def test_generation_draws_from_the_chances():
    """4000 sequences: a frequency's standard deviation is at most 0.008."""
    m = model(pad_token_id=10).eval()
    ids = tokens(1, 2, below=10)
    logits = m(ids).logits[0, -1, :10]
    many = ids.expand(4000, 2)
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 3), (1.0, 99)):
        kept = logits.topk(min(top_k or 10, 10)).indices
        wanted = torch.zeros(11, dtype=torch.double)
        wanted[kept] = (logits[kept] / temperature).softmax(-1).detach()
        drawn = m.generate(
            many, 1, temperature=temperature, top_k=top_k,
            generator=torch.Generator().manual_seed(0),
        )[:, -1]  # fmt: skip
        counts = torch.bincount(drawn, minlength=11) / 4000
        assert (counts - wanted).abs().max() < 0.03
        assert not counts[wanted == 0].any()


def test_a_temperature_near_zero_takes_the_likeliest():
    m, ids = sharp(), tokens(3, 5, below=10).to(DEVICE)
    greedy = m.generate(ids, 5, temperature=0)
    assert torch.equal(m.generate(ids, 5, temperature=1e-300), greedy)
    assert torch.equal(m.generate(ids, 5, top_k=1), greedy)


def test_generation_repeats_with_its_generator():
    m, ids = model().eval(), tokens(3, 5)
    first, second, third = (
        m.generate(ids, 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    m.generate(ids, 2, generator=torch.Generator())
    assert torch.equal(state, torch.get_rng_state())
    m.generate(ids, 2)
    assert not torch.equal(state, torch.get_rng_state())


def test_generation_leaves_the_model_as_it_was():
    m, ids = model(dropout=0.5), tokens(2, 5)
    m.blocks[0].eval()
    before = [module.training for module in m.modules()]
    assert torch.equal(m.generate(ids, 4, temperature=0), m.generate(ids, 4, temperature=0))
    assert [module.training for module in m.modules()] == before
    assert m(ids, labels=ids).loss.requires_grad


@pytest.mark.parametrize("shape", [(2, 5), (0, 5)])
def test_generation_of_nothing(shape):
    ids = tokens(*shape).int()
    found = model().generate(ids, 0)
    assert torch.equal(found, ids) and found.dtype == torch.int32
    assert model().generate(tokens(0, 5), 3).shape == (0, 8)


def test_generation_reaches_max_length_and_no_further(monkeypatch):
    m, ids = model(), tokens(2, 30)
    assert m.generate(ids, 10).shape == (2, 40)
    monkeypatch.setattr(chela.ChelaBlock, "prefill", None)  # nothing is computed first
    with pytest.raises(
        ArgumentError, match=r"wanted 0 to 10 new tokens after a prompt of 30, .* 40, got 11"
    ):
        m.generate(ids, 11)


@pytest.mark.parametrize(
    ("ids", "options", "match"),
    [
        (tokens(2, 0), {}, "wanted prompts .* without padding, got no tokens"),
        (tokens(2, 4) * 0 + 10, {}, "got pad_token_id 10 in them; generate for prompts of one"),
        (tokens(2, 4)[0], {}, "wanted input_ids"),
        (tokens(2, 4, 9), {"max_new_tokens": -1}, "got -1; shorten"),
        (tokens(2, 4, 9), {"temperature": -0.1}, "wanted a finite temperature .* got -0.1"),
        (tokens(2, 4, 9), {"temperature": math.nan}, "got nan; 0 is the likeliest"),
        (tokens(2, 4, 9), {"top_k": 0}, "wanted top_k of 1 or more, got 0; None is all of them"),
    ],
    ids=str,
)
def test_generation_refuses(ids, options, match):
    with pytest.raises(ArgumentError, match=match):
        model(pad_token_id=10).generate(ids, **{"max_new_tokens": 3, **options})


def test_generation_under_autocast():
    m, ids = sharp(), tokens(3, 5, below=10).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = m.generate(ids, 5)
    assert found.shape == (3, 10)


# --- files ----------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize(
    "options",
    [{}, {"tie_embeddings": False, "long_kernel": "multiscale", "short_sizes": (3, 5)}],
    ids=str,
)
def test_a_saved_model_comes_back(kind, options, tmp_path):
    m, ids = model(kind, **options), tokens()
    m.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    again = kind.from_pretrained(str(tmp_path / "new" / "folder"))
    assert torch.equal(state, torch.get_rng_state())
    assert again.config == m.config and not again.training
    path = tmp_path / "new" / "folder" / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))  # nothing reads it any more
    assert torch.equal(again(ids).logits, m(ids).logits)
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())


def test_dtypes_are_kept_or_chosen(tmp_path):
    m = model().bfloat16()
    m.norm.float()
    m.save_pretrained(tmp_path)
    kept = ChelaForCausalLM.from_pretrained(tmp_path)
    assert kept.norm.weight.dtype == torch.float32
    assert kept.embedding.weight.dtype == torch.bfloat16
    wide = ChelaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    with pytest.raises(ArgumentError, match=r"floating-point dtype, got torch\.int64"):
        ChelaForCausalLM.from_pretrained(tmp_path, dtype=torch.int64)


def test_parameters_that_do_not_lie_in_a_row_are_saved(tmp_path):
    m = model()
    m.embedding.weight.data = m.embedding.weight.data.T.contiguous().T
    m.save_pretrained(tmp_path)
    assert torch.equal(
        ChelaForCausalLM.from_pretrained(tmp_path).embedding.weight, m.embedding.weight
    )


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_config_may_be_edited_where_it_keeps_the_function(tmp_path):
    model().save_pretrained(tmp_path)
    edit(tmp_path, implementation="reference", dropout=0.5)
    again = ChelaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens()).logits, model()(tokens()).logits)
    edit(tmp_path, order="parallel", eps=1e-3)  # neither changes a shape
    with pytest.raises(ArgumentError, match=r'there eps = 1e-05, order = "serial"; set it so in'):
        ChelaForCausalLM.from_pretrained(tmp_path)


def rewritten(folder, change):
    """model.safetensors as another tool may have made it: without our config in its header."""
    import safetensors.torch

    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def test_weights_of_another_tool_load(tmp_path):
    model().save_pretrained(tmp_path)
    rewritten(tmp_path, lambda tensors: None)
    again = ChelaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens()).logits, model()(tokens()).logits)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.pop("norm.bias"), "does not fit .*config.json: norm.bias is missing; both"),
        (lambda x: x.update(extra=torch.ones(1)), "extra is too much"),
        (
            lambda x: x.update({"norm.bias": torch.ones(9)}),
            r"norm.bias is \[9\], wanted \[8\]",
        ),
        (lambda x: x.clear(), r"is missing, .* and \d+ more; both"),
        (
            lambda x: x.update({"norm.bias": torch.ones(8, dtype=torch.int64)}),
            "norm.bias is of I64, wanted floating-point numbers",
        ),
    ],
    ids=["missing", "extra", "shape", "empty", "dtype"],
)
def test_weights_that_do_not_fit_are_refused(change, match, tmp_path):
    model().save_pretrained(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(ArgumentError, match=rf"model.safetensors .*{match}"):
        ChelaForCausalLM.from_pretrained(tmp_path)


def damage(name, content):
    def damaged(folder):
        path = folder / name
        path.write_bytes(content(path.read_bytes()))

    return damaged


@pytest.mark.parametrize(
    ("damaged", "match"),
    [
        (lambda f: (f / "config.json").unlink(), "could not read .*config.json: .*No such file"),
        (lambda f: (f / "model.safetensors").unlink(), "could not read .*model.safetensors: "),
        (damage("config.json", lambda _: b""), "could not read .*config.json"),
        (damage("config.json", lambda x: x[:-9]), "could not read .*config.json"),
        (damage("config.json", lambda _: b"\xff\xfe"), "could not read .*config.json"),
        (damage("config.json", lambda _: b"[1]"), "config.json: wanted an object, got a list"),
        (damage("model.safetensors", lambda _: b""), "could not read .*model.safetensors"),
        (damage("model.safetensors", lambda x: x[:-1]), "could not read .*model.safetensors"),
        (damage("model.safetensors", lambda x: x[:99]), "could not read .*model.safetensors"),
        (damage("model.safetensors", lambda x: b"\xff" * 9 + x[9:]), "could not read .*model.sa"),
        (lambda f: edit(f, d_model="8"), "config.json: wanted d_model: int, got '8'"),
        (lambda f: edit(f, depth=2), "config.json: no 'depth' in ChelaConfig"),
        (lambda f: edit(f, architecture=None), "wanted the architecture ChelaForCausalLM in "),
    ],
)
def test_damaged_files_are_refused_by_name(damaged, match, tmp_path):
    model().save_pretrained(tmp_path)
    damaged(tmp_path)
    with pytest.raises(ArgumentError, match=match) as caught:
        ChelaForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_model_of_another_class_is_refused(tmp_path):
    model().save_pretrained(tmp_path)
    with pytest.raises(
        ArgumentError, match=r"architecture ChelaForSequenceCl.* in .*, got 'ChelaForCausalLM'"
    ):
        ChelaForSequenceClassification.from_pretrained(tmp_path)


SAVES = {  # what a save goes through, and the model that is there before
    "killed with the config aside": ("kill(1); save(order='parallel')", "serial"),
    "killed with both files aside": ("kill(2); save(order='parallel')", "serial"),
    "killed with both in their places": ("kill(3); save(order='parallel')", "parallel"),
    "a disk that fills up": ("fill_up(); save()", "serial"),
}
SAVING = """
import json, os, resource, signal, sys
import chela_bench.kernels.chela_files as files
from chela_bench.profiles.forks import each_in_a_fork
from tests.test_chela_models import *

def kill(left):
    flush = files._flush
    def killing(path):
        nonlocal left
        flush(path)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    files._flush = killing

def fill_up():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

def saving(code, folder):
    def save(**changes):
        model(seed=1, **changes).save_pretrained(folder)
    return lambda: exec(code, globals() | {"save": save})

model()  # the first one imports for seconds
jobs = [saving(*job) for job in json.load(sys.stdin)]
endings = dict(each_in_a_fork(jobs, parallel=1, limit_s=200))
print(json.dumps([str(endings[i]) for i in range(len(jobs))]))
"""


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """Folders, what was there before, and how saving there ended, each in a fork of one process."""
    folders = {}
    for name, (_, order) in SAVES.items():
        folders[name] = folder = tmp_path_factory.mktemp("save")
        model(order=order).save_pretrained(folder)
    before = {name: contents(folder) for name, folder in folders.items()}
    jobs = [(code, str(folders[name])) for name, (code, _) in SAVES.items()]
    done = subprocess.run(
        [sys.executable, "-c", SAVING], input=json.dumps(jobs), env=environment(), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    endings = dict(zip(SAVES, json.loads(done.stdout), strict=True))
    return {name: (folders[name], before[name], endings[name]) for name in SAVES}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("killed with the config aside", 0),
        ("killed with both files aside", 0),
        ("killed with both in their places", 1),
    ],
)
def test_a_killed_save_leaves_the_old_model(name, seed, saves):
    folder, _, ending = saves[name]
    assert "SIGKILL" in ending
    aside = [path.name[:8] for path in folder.iterdir() if path.is_dir()]
    assert aside == [".saving-"] or seed == 1  # on the same disk
    again = ChelaForCausalLM.from_pretrained(folder)
    wanted = model(seed=seed, order="parallel" if seed else "serial")
    assert torch.equal(again(tokens()).logits, wanted(tokens()).logits)


def test_a_disk_that_fills_up_leaves_the_old_model(saves):
    folder, before, ending = saves["a disk that fills up"]
    assert "EnvironmentProblem" in ending and "could not save the model in" in ending
    assert "File too large" in ending and "make room" in ending
    assert contents(folder) == before
    assert [path for path in folder.iterdir() if path.is_dir()] == []


def test_new_weights_beside_an_old_config_are_refused(tmp_path):
    """What a kill between both moves leaves."""
    model(order="parallel").save_pretrained(tmp_path)
    old = (tmp_path / "config.json").read_bytes()
    model(seed=1).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(old)
    with pytest.raises(ArgumentError, match=r'is not of the save .* there order = "serial"'):
        ChelaForCausalLM.from_pretrained(tmp_path)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EnvironmentProblem, match=r"could not save the model in .*file"):
        model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_safetensors_may_be_missing(tmp_path, monkeypatch):
    m = model()
    m.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: m.save_pretrained(tmp_path), lambda: type(m).from_pretrained(tmp_path)):
        with pytest.raises(EnvironmentProblem, match=r"pip install 'chela-bench\[models\]'"):
            call()
