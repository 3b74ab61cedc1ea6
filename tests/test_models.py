"""The counted bytes and FLOPs against counts made another way."""

import pytest
import torch

from chela_bench.bench import models
from chela_bench.bench.bounds import bounds, floor_ns
from chela_bench.bench.cases import Case
from chela_bench.bench.inputs import Draw
from chela_bench.bench.load import load
from chela_bench.bench.ops import OPS
from chela_bench.records import Ceilings
from chela_bench.reference.chela import ChelaLayer
from chela_bench.reference.short_long_conv import default_short_sizes
from chela_bench.reference.softmax_layer import SoftmaxLayer


def test_linear_attention_bytes_per_token_and_head():
    """8 d forward and 14 d backward in a 2-byte dtype, K = V = d."""
    shape = {"B": 1, "T": 1, "H": 1, "K": 128, "V": 128}
    assert sum(models.linear_attention_bytes(shape, 2, "fwd")) == 8 * 128
    assert sum(models.linear_attention_bytes(shape, 2, "bwd")) == 14 * 128
    assert sum(models.linear_attention_bytes(shape, 2, "fwdbwd")) == 22 * 128


@pytest.mark.parametrize(
    ("shape", "forward_ms", "both_ms"),
    [  # B, T, H, d; the floors at 3020 GB/s
        ((1, 16384, 16, 128), 0.089, 0.245),
        ((1, 65536, 16, 128), 0.356, 0.978),
        ((1, 8192, 96, 128), 0.267, 0.733),
        ((4, 2048, 16, 128), 0.044, 0.122),
    ],
)
def test_floors_of_published_shapes(shape, forward_ms, both_ms):
    sizes = dict(zip("BTHK", shape, strict=True)) | {"V": shape[3]}
    ceilings = Ceilings(copy_gb_per_s=3020, matmul_tflop_per_s={"bf16": 716})
    for direction, expected in (("fwd", forward_ms), ("fwdbwd", both_ms)):
        moved = sum(models.linear_attention_bytes(sizes, 2, direction))
        floor = floor_ns(ceilings, "bf16", moved, models.linear_attention_flops(sizes, direction))
        assert floor / 1e6 == pytest.approx(expected, abs=6e-4)


def test_the_floor_is_the_longer_of_both():
    ceilings = Ceilings(copy_gb_per_s=1000, matmul_tflop_per_s={"bf16": 100})
    assert floor_ns(ceilings, "bf16", 1e9, 0) == pytest.approx(1e6)
    assert floor_ns(ceilings, "bf16", 0, 1e12) == pytest.approx(1e7)
    assert floor_ns(Ceilings(), "bf16", 1e9, 1e12) == 0


def test_fla_moves_two_and_a_half_times_the_floor_at_128():
    shape = {"B": 1, "T": 4096, "H": 16, "K": 128, "V": 128}
    floor = sum(models.linear_attention_bytes(shape, 2, "fwd"))
    assert models.fla_chunk_hbm_bytes(shape, 2) == 2.5 * floor


def test_fla_fused_chunk_pays_for_cutting_the_key_dimension():
    """K = 128 in two slices: two float32 outputs written and read, their sum written and read."""
    shape = {"B": 1, "T": 1, "H": 1, "K": 128, "V": 128}
    floor = sum(models.linear_attention_bytes(shape, 2, "fwd"))
    parts = 2 * 2 * 4 * 128 + 2 * 4 * 128
    assert models.fla_fused_chunk_hbm_bytes(shape, 2) == floor + parts
    assert models.fla_fused_chunk_hbm_bytes({**shape, "K": 64}, 2) == floor - 2 * 2 * 64
    assert models.fla_recurrent_hbm_bytes(shape, 2) == floor + parts
    assert models.fla_recurrent_hbm_bytes({**shape, "K": 64}, 2) == floor - 2 * 2 * 64 + 2 * 4 * 128
    assert models.fla_recurrent_hbm_bytes({**shape, "K": 64}, 4) == 2 * (floor - 2 * 2 * 64)


def test_the_layers_parameters_are_counted_as_the_module_has_them():
    shape = {"B": 2, "T": 300, "D": 24, "K": 8, "V": 48}
    module = ChelaLayer(24, d_key=8, d_value=48, max_length=300)
    assert models.chela_layer_parameters(shape) == sum(p.numel() for p in module.parameters())


def test_the_softmax_layers_parameters_are_counted_as_the_module_has_them():
    for width, heads in ((24, 1), (512, 4)):
        assert models.softmax_heads(width) == heads
        parameters = SoftmaxLayer(width, heads).parameters()
        assert models.softmax_layer_parameters({"D": width}) == sum(p.numel() for p in parameters)


@pytest.mark.parametrize("direction", ["fwd", "fwdbwd", "decode"])
def test_a_layers_points_have_the_parameters_that_were_drawn(direction):
    for op in (op for op in OPS if op.parameters is not None):
        shape = {"B": 2, "T": 300, "D": 24} | {dim: 8 for dim in ("K", "V") if dim in op.dims}
        drawn = load(op.inputs)(Draw(shape, torch.bfloat16, torch.device("cpu"), 0, "randn"))
        numbers = sum(tensor.numel() for tensor in drawn.tensors.values()) - 2 * 300 * 24  # x
        case = Case(op=op.name, impl="x", direction=direction, dtype="bf16", shape=shape)
        assert bounds(Ceilings(), case)["parameters"] == numbers
        assert bounds(Ceilings(), case)["flops"] == op.flops(shape, direction) > 0
    assert [op.name for op in OPS if op.parameters] == ["chela_layer", "softmax_layer"]


def test_a_step_computes_about_its_share_of_a_forward():
    """All but attention and convolutions is of one token alone; softmax's grows with the cache."""
    shape = {"B": 2, "T": 65536, "D": 64, "K": 16, "V": 128}
    for flops in (models.chela_layer_flops, models.softmax_layer_flops):
        step, forward = flops(shape, "decode"), flops(shape, "fwd") / 65536
        softmax = flops is models.softmax_layer_flops
        assert (1.9 if softmax else 0.9) < step / forward < (2.1 if softmax else 4)


def test_the_layers_matmuls_at_the_papers_size():
    """0.39 ms at 716 TFLOP/s for D = 1024, z = 128, v = 2048, T = 16384."""
    shape = {"B": 1, "T": 16384, "D": 1024, "K": 128, "V": 2048}
    milliseconds = models.chela_layer_flops(shape, "fwd") / 716e12 * 1e3
    assert 0.39 < milliseconds < 0.45


def test_short_sizes_agree_with_the_reference():
    for length in (1, 2, 9, 10, 31, 32, 1000, 1024, 16384, 65536, 1 << 20):
        assert models.short_sizes(length) == tuple(default_short_sizes(length))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("tokens", [0, 1, 64, 4096])
def test_bounds_add_up_and_grow(op, tokens):
    shape = {**dict.fromkeys(op.dims, 16), "T": tokens}
    longer = {**shape, "T": 2 * tokens + 1}
    for count in (
        lambda s, d: sum(op.compulsory_bytes(s, 2, d)),
        lambda s, d: op.flops(s, d),
    ):
        forward, backward = count(shape, "fwd"), count(shape, "bwd")
        assert count(shape, "fwdbwd") == forward + backward
        assert count(longer, "fwd") > forward >= 0
        assert isinstance(forward, int)
