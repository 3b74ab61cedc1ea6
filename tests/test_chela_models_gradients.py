"""Gradients of models of CHELA blocks: whole, with checkpoints, deep, and of two processes."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from chela_bench.kernels.chela_models import (
    ChelaForCausalLM,
    ChelaForSequenceClassification,
)
from tests.chela_models import (
    MODELS,
    config,
    gradients,
    labels_for,
    model,
    tokens,
)
from tests.running import environment

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_equal(found, wanted, tolerance=1e-11):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance)


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
        "import sys; from pathlib import Path; "
        "from tests.test_chela_models_gradients import *; model(); "
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
