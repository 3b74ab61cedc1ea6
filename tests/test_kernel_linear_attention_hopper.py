"""kernels/linear_attention_hopper.py: compiled without a GPU, and on one every tile checked."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch

from chela_bench.kernels import linear_attention as module
from chela_bench.kernels import linear_attention_sweep, linear_attention_walk
from chela_bench.kernels.launching import cdiv
from chela_bench.kernels.linear_attention import linear_attention
from chela_bench.kernels.linear_attention_config import OPTIONS
from chela_bench.kernels.linear_attention_model import (
    SM90,
    Shape,
    best_segments,
    best_tile,
    best_training,
)
from tests.attention import DEVICE, check, inputs, label
from tests.running import ROOT

TILES = [(K, tile) for K, tiles in SM90.walks.items() for tile in tiles]
on_tiles = pytest.mark.parametrize(
    ("K", "tile"), TILES, ids=[f"K{K}-{x.BLOCK_V}-{x.num_warps}-{x.num_stages}" for K, x in TILES]
)
hopper = pytest.mark.skipif(
    DEVICE != "cuda" or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def config_of(tile, **more):
    return {name: getattr(tile, name) for name in ("BLOCK_V", "num_warps", "num_stages")} | more


def test_every_kernel_compiles_for_hopper():
    """Gluon has no interpreter: without a GPU, what the compiler says is all there is. Accumulators
    that spill cost a third of the time."""
    script = ROOT / "benchmarks" / "linear_attention_static.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    ended = subprocess.run(
        [sys.executable, script, "--only", "hopper"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    rows = re.findall(
        r"^(walk|sweep|kept) +K (\d+) +V (\d+) (.*?) +warps.* (\d+) stack +(\d+) KB .* HMMA (\d+)",
        ended.stdout, re.MULTILINE,
    )  # fmt: skip
    assert len(rows) == len(TILES) + 6 + 5 + 1, ended.stdout
    for kind, _, _, what, stack, shared, old_products in rows:
        assert int(shared) <= 227 and old_products == "0", ended.stdout
        if kind == "walk":
            assert stack == "0", ended.stdout
        elif kind == "sweep" and "apart" not in what:
            assert int(stack) <= 16, ended.stdout


@pytest.mark.parametrize(
    ("heads", "V", "best"),
    [
        (16 * 4, 128, (64, 4, 3)),
        (96, 128, (128, 8, 3)),
        (8, 2048, (128, 8, 3)),
        (3, 64, (64, 4, 3)),
    ],
)
def test_few_heads_get_small_tiles(heads, V, best):
    tile = best_tile(128, V, heads, 132)
    assert (tile.BLOCK_V, tile.num_warps, tile.num_stages) == best


@pytest.mark.parametrize("schedule", ["fused", "split"])
def test_a_schedule_is_kept(schedule):
    for heads, tokens in itertools.product((0, 1, 33, 300), (1, 600, 70_000)):
        shape = Shape(heads, tokens, 128, 128, 132)
        for segments in (best_segments(schedule, shape), best_training(schedule, shape)[0]):
            assert (segments == 1) == (schedule == "fused")
    assert best_training(schedule, shape, segments=7)[0] == 7


@pytest.mark.gpu
@hopper
@on_tiles
@pytest.mark.parametrize("segments", [1, 3])
def test_every_tile(K, tile, segments):
    """Not the winner alone. Walks of the gradients have the tensors in other roles, back in time
    and with states transposed."""
    for T in (1, 63, 64, 65, 1000):
        q, k, v, state = inputs(2, T, 3, K, K, torch.bfloat16)
        config = config_of(tile, segments=segments, wgmma=1, sweep=0)
        check(q, k, v, config=config, gradients=T >= 15)
        check(q, k, v, config=config, initial_state=state, output_final_state=True, scale=0.5,
              gradients=T >= 15)  # fmt: skip


ODD = [(1, 257, 2, 96, 80), (2, 130, 1, 48, 112), (1, 300, 1, 112, 320), (1, 190, 2, 208, 176)]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("shape", ODD, ids=label)
def test_tiles_that_are_not_whole(shape, segments):
    q, k, v, state = inputs(*shape, torch.bfloat16)
    for tile in SM90.walks[128 if shape[3] <= 128 else 256]:
        check(q, k, v, config=config_of(tile, segments=segments, wgmma=1), initial_state=state,
              output_final_state=True)  # fmt: skip


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_one_sweep(d, segments):
    config = {"segments": segments, "sweep": 1}
    for T in (1, 63, 64, 65, 1000):
        q, k, v, state = inputs(2, T, 3, d, d, torch.bfloat16)
        check(q, k, v, config=config)
        check(q, k, v, config=config, initial_state=state, output_final_state=True, scale=0.5)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("shape", [(1, 300, 1, 112, 320), (2, 600, 1, 128, 1280)], ids=label)
def test_a_sweep_in_blocks_of_v(shape, segments):
    """Parts of dq and dk, in one round and in two."""
    q, k, v, state = inputs(*shape, torch.bfloat16)
    config = {"segments": segments, "sweep": 1}
    check(q, k, v, config=config, initial_state=state, output_final_state=True)


@pytest.mark.gpu
@hopper
@on_tiles
def test_every_tile_keeps_states(K, tile):
    """The walks that write o and dv; with windows that are whole, and one that is not."""
    for T, V, segments in [(1, 64, 1), (256, 128, 1), (1000, 320, 1), (2049, 128, 3)]:
        q, k, v, state = inputs(2, T, 3, min(K, 128), V, torch.bfloat16)
        config = config_of(tile, segments=segments, wgmma=1, keep=1)
        check(q, k, v, config=config)
        check(q, k, v, config=config, initial_state=state, output_final_state=True, scale=0.5)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("sweep", [0, 1])
def test_packed_and_strided(sweep):
    """Strides that differ, and a token axis that is not the slowest."""
    lengths = [0, 1, 63, 64, 129, 300]
    qkv, _, _, state = inputs(1, sum(lengths), 2, 3 * 64, 64, torch.bfloat16, N=len(lengths))
    state = state[:, :, :64].contiguous()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    options = {"initial_state": state, "output_final_state": True, "cu_seqlens": cu_seqlens}
    check(*qkv.split(64, dim=-1), config={"sweep": sweep, "segments": 2}, **options)
    q, k, v, state = inputs(2, 200, 2, 128, 128, torch.bfloat16)
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    check(q, k, v, config={"sweep": sweep}, initial_state=state, output_final_state=True)
    check(q, k, v, config={"keep": 1}, initial_state=state, output_final_state=True)


@pytest.mark.gpu
@hopper
def test_tokens_that_lie_far_apart_are_walked_by_triton():
    """Offsets within a tile are 32 bits wide. One row of 4M elements for each token."""
    q, k, v, _ = inputs(1, 70, 1, 64, 64, torch.bfloat16)
    room = torch.empty(70, 1 << 22, device=DEVICE, dtype=torch.bfloat16)
    far = room[None, :, None, :64].copy_(k)
    walks = linear_attention_walk.walk_by_hand()._variants
    before = len(walks)
    with torch.no_grad():
        o, _ = linear_attention(q, far, v, config={"num_stages": 4})
        assert len(walks) == before
        assert torch.allclose(o, linear_attention(q, k, v)[0], atol=0.1, rtol=0.02)


@pytest.mark.gpu
@hopper
def test_gradients_at_many_heads_come_from_the_sweep_by_hand():
    before = sum(len(x._forms) for x in linear_attention_sweep.sweep_by_hand()._variants.values())
    q, k, v, _ = inputs(1, 130, cdiv(132, 2), 32, 80, torch.bfloat16)
    check(q, k, v)
    after = sum(len(x._forms) for x in linear_attention_sweep.sweep_by_hand()._variants.values())
    assert after == before + 1


@pytest.fixture
def on_hopper(monkeypatch):
    """As the plan sees it."""
    monkeypatch.setattr(module, "has_wgmma", lambda _: True)
    monkeypatch.setattr(module, "processors", lambda _: 132)
    return lambda N, H, T, K, V, *, config=(), dtype=torch.bfloat16, schedule="auto", **how: (
        module._plan(
            schedule, config, N, H, T, K, V, dtype, torch.device("cuda", 0),
            how.pop("trained", False), **how,
        )
    )  # fmt: skip


def test_any_call_has_a_plan(on_hopper):
    for H, T, (K, V), trained in itertools.product(
        (0, 1, 3, 16, 96, 500), (0, 1, 100, 5000, 1 << 20),
        ((40, 16), (64, 64), (128, 2048), (256, 4096), (200, 8)), (False, True),
    ):  # fmt: skip
        segments, pieces, options = on_hopper(1, H, T, K, V, trained=trained)
        assert segments == pieces == 1 or T // (segments * pieces) >= 512 / 2
        sweep, keep = (options[OPTIONS.index(name)] for name in ("sweep", "keep"))
        if not trained or not H:
            assert (sweep, keep) == (-1, -1)
        elif V > 256 and K <= 128:
            assert (sweep, keep) == (-1, 1)
        else:
            assert sweep in (0, 1) and keep == -1 and not (V > 256 and sweep == 0)


def test_states_are_kept_only_where_that_is_right(on_hopper):
    def keep(*config, V=2048, **how):
        return on_hopper(1, 1, 16384, 128, V, config=config, **{"trained": True, **how})[2][-1]

    assert keep() == keep(V=64) + 2 == keep(("keep", 1), V=64) == 1
    assert keep(("keep", 0)) == keep(("sweep", 1)) == keep(V=2000) == keep(trained=False) == -1
    for how in ({"packed": True}, {"precise": True}, {"causal": False}, {"dtype": torch.float16}):
        assert keep(**how) == keep(("keep", 1), **how) == -1


def test_a_plan_keeps_what_was_asked(on_hopper):
    asked = (("segments", 5), ("sweep", 0), ("BLOCK_V", 32))
    segments, _, options = on_hopper(1, 16, 16384, 128, 128, config=asked, trained=True)
    assert segments == 5 and options == (-1, 32, -1, -1, 0, -1, -1)
    for how in ({"packed": True}, {"precise": True}, {"causal": False}, {"dtype": torch.float16}):
        *_, options = on_hopper(1, 16, 16384, 128, 128, trained=True, **how)
        assert options == (-1,) * len(OPTIONS)
    assert on_hopper(1, 16, 16384, 128, 128, schedule="fused", trained=True)[0] == 1
    assert on_hopper(1, 96, 16384, 128, 128, schedule="split")[0] > 1


def test_the_layers_and_the_usual_shapes(on_hopper):
    """Segments and pieces: 16 heads fill 132 SMs in four, and their sweep wants eight states."""
    assert on_hopper(1, 16, 16384, 128, 128)[:2] == (4, 2)
    assert on_hopper(1, 16, 16384, 128, 128, trained=True)[:2] == (4, 2)
    assert on_hopper(1, 96, 8192, 128, 128)[:2] == (1, 1)
    assert on_hopper(1, 1, 16384, 128, 2048)[:2] == (8, 1)
    assert on_hopper(1, 1, 16384, 128, 2048, trained=True)[:2] == (8, 1)
    assert on_hopper(1, 1, 1 << 20, 128, 128)[:2] == (66, 1)
