"""The scripts in benchmarks/ as far as no GPU is needed: what they would try."""

from __future__ import annotations

import importlib.util

import pytest

from chela_bench.kernels.linear_attention_config import checked
from tests.running import ROOT


@pytest.fixture(scope="module")
def configs():
    path = ROOT / "benchmarks" / "linear_attention_configs.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_tried_is_allowed_and_tried_once(configs):
    tiles, segments = list(configs.tiles()), list(configs.segments(80, seed=0))
    for trials in (tiles, segments):
        assert all(checked(trial["config"]) for trial in trials)
        assert len({repr(trial) for trial in trials}) == len(trials)
    assert {trial["K"] for trial in tiles} == {64, 128, 256}
    shapes = {tuple(trial[dim] for dim in "BTHKV") for trial in segments}
    assert len(shapes) >= 60 and max(B * T * H for B, T, H, _, _ in shapes) <= 1 << 21
    assert segments == list(configs.segments(80, seed=0)) != list(configs.segments(80, seed=1))


def test_trials_of_the_same_kernels_compile_once(configs):
    segments = list(configs.segments(80, seed=0))
    sets = {configs.kernels_of(trial) for trial in segments}
    assert len(sets) == 2 * 2 * 2  # K = V of 64 or 128, either direction, one segment or several
