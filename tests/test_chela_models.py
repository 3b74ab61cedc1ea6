"""Models of CHELA blocks: their outputs and losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chela_bench.errors import ArgumentError
from chela_bench.kernels.chela_models import (
    ChelaForCausalLM,
    ChelaForSequenceClassification,
)
from tests.attention import DEVICE
from tests.chela_models import (
    MODELS,
    gradients,
    labels_for,
    model,
    tokens,
)

SPANS = [(0, 40), (0, 23), (9, 40), (5, 31), (0, 1)]  # tokens of each row of 40


pytestmark = pytest.mark.usefixtures("one_thread")


def padded(rows=SPANS):
    mask = torch.zeros(len(rows), 40, dtype=torch.bool)
    for row, (start, stop) in enumerate(rows):
        mask[row, start:stop] = True
    return mask


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
