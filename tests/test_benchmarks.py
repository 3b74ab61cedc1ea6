"""The scripts in benchmarks/ as far as no GPU is needed: what they would try."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from chela_bench.kernels.linear_attention_config import checked
from chela_bench.kernels.linear_attention_model import (
    SM90,
    TABLE,
    Shape,
    best_segments,
    best_tile,
    best_training,
    forward_time,
    read_table,
)
from tests.running import ROOT


@pytest.fixture(scope="module")
def configs():
    return script("linear_attention_configs")


def script(name, folder="benchmarks"):
    path = ROOT / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_tried_is_allowed_and_tried_once(configs):
    tiles, choices = list(configs.tiles()), list(configs.choices(80, seed=0))
    for trials in (tiles, choices):
        assert all(checked(trial["config"]) for trial in trials)
        assert len({repr(trial) for trial in trials}) == len(trials)
    assert {trial["K"] for trial in tiles} == {64, 128, 256}
    shapes = {tuple(trial[dim] for dim in "BTHKV") for trial in choices}
    assert len(shapes) >= 60 and max(B * T * H * V for B, T, H, _, V in shapes) <= 1 << 27
    assert choices == list(configs.choices(80, seed=0)) != list(configs.choices(80, seed=1))


def test_trials_of_the_same_kernels_compile_once(configs):
    choices = list(configs.choices(80, seed=0))
    sets = {configs.kernels_of(trial) for trial in choices}
    # One segment or several, of 1, 3, 3 and 2 tiles at the four pairs of K and V, then of 2, 2, 2
    # and 1 ways back.
    assert len(sets) == 2 * (1 + 3 + 3 + 2 + 2 + 2 + 2 + 1)


def test_a_table_is_fitted_to_what_was_measured(configs, tmp_path):
    """A dozen forwards a tenth faster than modelled: the table follows, and keeps its tiles."""
    lines = [",".join(configs.COLUMNS)]
    for heads, tokens, segments in itertools.product((8, 16, 66), (4096, 8192), (1, 2)):
        shape = Shape(heads, tokens, 128, 128, 132)
        tile = best_tile(128, 128, heads * segments, 132)
        time = 0.9 * forward_time(shape, segments, SM90.rates)
        sizes = f"{tile.BLOCK_V},{tile.num_warps},{tile.num_stages},{segments}"
        lines.append(f"fwd,1,{tokens},{heads},128,128,,{sizes},,,{time:.2f},")
    (tmp_path / "choices.csv").write_text("\n".join(lines))
    table = tmp_path / "table.json"
    table.write_text(TABLE.read_text())
    configs.fit(tmp_path / "choices.csv", table)
    fitted = read_table(table)
    assert fitted.sweeps == SM90.sweeps and fitted.rates != SM90.rates
    for K, tiles in SM90.walks.items():
        assert [x.BLOCK_V for x in fitted.walks[K]] == [x.BLOCK_V for x in tiles]
    small = fitted.walks[128][0]
    assert small.full_us == small.alone_us < SM90.walks[128][0].full_us


@pytest.mark.parametrize("name", ["held-out", "choices"])
@pytest.mark.parametrize("direction", ["fwd", "fwdbwd"])
def test_the_model_chooses_near_the_best_that_was_measured(configs, direction, name):
    """The tile and the number of segments of a forward, the segments and the way back of both: at
    random shapes on an H100, those that the table was fitted to and others."""
    losses = []
    path = ROOT / "docs" / "results" / f"linear-attention-{name}.csv"
    for shape, times in configs.measured(path, direction).items():
        if direction == "fwd":
            segments = best_segments("auto", shape)
            tile = best_tile(shape.K, shape.V, shape.heads * segments, shape.processors)
            way = (segments, tile.BLOCK_V, tile.num_warps, tile.num_stages)
        else:
            way = best_training("auto", shape)
        if way in times:
            losses.append(times[way] / min(times.values()))
    assert len(losses) >= 60
    assert sum(loss <= 1.05 for loss in losses) >= 0.9 * len(losses)
    assert max(losses) <= 1.3


def test_errors_are_those_of_o_and_the_gradients():
    facts = script("linear_attention_facts")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = facts.errors(70, 1, torch.float16, mean=1.0, precise=False, device=device)
    assert list(found) == ["o", "dq", "dk", "dv"]
    assert all(1e-5 < error < 1e-3 for error in found.values())
