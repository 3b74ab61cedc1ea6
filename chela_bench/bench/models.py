"""What each function must move and compute, counted. Pure arithmetic: no torch, no device.

`shape` maps dimension names to sizes, `itemsize` is the bytes of one element of the inputs and
outputs. Compulsory bytes are a pair (read, written): every input once, every output once, nothing
else. FLOPs: of the leanest algorithm in use for the function at these sizes, a multiply-add counted
as two. `fwdbwd` is the sum of `fwd` and `bwd`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

Shape = Mapping[str, int]
Bytes = tuple[int, int]  # read, written


def linear_attention_bytes(shape: Shape, itemsize: int, direction: str) -> Bytes:
    row = shape["B"] * shape["T"] * shape["H"] * itemsize
    q_k_v = 2 * shape["K"] + shape["V"]
    forward = row * q_k_v, row * shape["V"]  # q, k, v; o
    backward = row * (q_k_v + shape["V"]), row * q_k_v  # q, k, v, do; dq, dk, dv
    return _bytes(direction, forward, backward)


def linear_attention_flops(shape: Shape, direction: str) -> int:
    rows = shape["B"] * shape["T"] * shape["H"]
    product = 2 * shape["K"] * shape["V"]  # recurrent: one K x V multiply-add per token
    forward = 2 * product  # S += k v^T; o = S^T q
    backward = 4 * product  # dS += q do^T; dq = S do; dk = dS v; dv = dS^T k (S is kept)
    recurrent = rows * _by_direction(direction, forward, backward)
    return min(recurrent, softmax_attention_flops(shape, direction))  # quadratic, if that is less


def softmax_attention_flops(shape: Shape, direction: str) -> int:
    pairs = shape["B"] * shape["H"] * shape["T"] * (shape["T"] + 1) // 2  # causal
    scores, values = 2 * shape["K"], 2 * shape["V"]
    forward = scores + values  # q k^T; p v
    backward = 2 * values + 2 * scores  # dp, dv; dq, dk (p is kept)
    return pairs * _by_direction(direction, forward, backward)


def short_long_conv_bytes(shape: Shape, itemsize: int, direction: str) -> Bytes:
    x = shape["B"] * shape["T"] * shape["D"] * itemsize
    taps = shape["D"] * (shape["T"] + sum(short_sizes(shape["T"]))) * itemsize
    forward = x + taps, x  # x, kernels; z
    backward = 2 * x + taps, x + taps  # x, dz, kernels; dx and the kernels' gradients
    return _bytes(direction, forward, backward)


def short_long_conv_flops(shape: Shape, direction: str) -> int:
    """A causal convolution of length T takes complex FFTs of length T (the right-angle form), each
    about 5 T log2(T) FLOPs (Cooley-Tukey, radix 2). The short branches are taken as merged."""
    rows, tokens = shape["B"] * shape["D"], shape["T"]
    transform = round(5 * tokens * math.log2(tokens)) if tokens else 0
    product = 6 * tokens  # complex multiply per frequency
    short = 2 * tokens * max(short_sizes(tokens))
    forward = rows * (2 * transform + product + short) + shape["D"] * transform
    # dz transformed, a product for dx and one for dk, dx back, dk back once a channel; taps twice
    backward = rows * (2 * transform + 2 * product + 2 * short) + shape["D"] * transform
    return _by_direction(direction, forward, backward)


def long_conv_bytes(shape: Shape, itemsize: int, direction: str) -> Bytes:
    x = shape["B"] * shape["T"] * shape["D"] * itemsize
    taps = shape["D"] * shape["T"] * itemsize
    return _bytes(direction, (x + taps, x), (2 * x + taps, x + taps))


def long_conv_flops(shape: Shape, direction: str) -> int:
    """As of short_long_conv, without the short kernels."""
    short = 2 * shape["T"] * max(short_sizes(shape["T"])) * shape["B"] * shape["D"]
    return short_long_conv_flops(shape, direction) - _by_direction(direction, short, 2 * short)


def chela_layer_bytes(shape: Shape, itemsize: int, direction: str) -> Bytes:
    x = shape["B"] * shape["T"] * shape["D"] * itemsize
    parameters = chela_layer_parameters(shape) * itemsize
    forward = x + parameters, x  # x, parameters; y
    backward = 2 * x + parameters, x + parameters  # x, dy, parameters; dx and the gradients
    return _bytes(direction, forward, backward)


def chela_layer_flops(shape: Shape, direction: str) -> int:
    width, key, value = shape["D"], shape["K"], shape["V"]
    rows = shape["B"] * shape["T"]
    # W_z [D, z]; W_v, W_a [D, v]; W_h, W_o [D, D]; U_h [v, D]
    weights = width * key + 2 * width * value + 2 * width * width + value * width
    forward = rows * 2 * weights
    backward = 2 * forward  # one product for the inputs' gradient, one for the weights'
    attention = {**shape, "H": 1}
    return (
        _by_direction(direction, forward, backward)
        + linear_attention_flops(attention, direction)
        + short_long_conv_flops(shape, direction)
    )


def chela_layer_parameters(shape: Shape) -> int:
    width, key, value = shape["D"], shape["K"], shape["V"]
    taps = width * (shape["T"] + sum(short_sizes(shape["T"])))
    weights = width * key + 2 * width * value + 2 * width * width + value * width
    biases = key + 2 * value + 2 * width  # b_z; b_v, b_a; b_h, b_o
    scale_and_shift = 4 * key  # a_q, m_q, a_k, m_k
    return taps + weights + biases + scale_and_shift + 2 * width  # LayerNorm's weight and bias


def softmax_layer_bytes(shape: Shape, itemsize: int, direction: str) -> Bytes:
    x = shape["B"] * shape["T"] * shape["D"] * itemsize
    parameters = softmax_layer_parameters(shape) * itemsize
    return _bytes(direction, (x + parameters, x), (2 * x + parameters, x + parameters))


def softmax_layer_flops(shape: Shape, direction: str) -> int:
    forward = shape["B"] * shape["T"] * 2 * 4 * shape["D"] ** 2  # W_qkv [D, 3 D], W_o [D, D]
    heads = softmax_heads(shape["D"])
    head = shape["D"] // heads
    attention = {**shape, "H": heads, "K": head, "V": head}
    return _by_direction(direction, forward, 2 * forward) + softmax_attention_flops(
        attention, direction
    )


def softmax_layer_parameters(shape: Shape) -> int:
    width = shape["D"]
    return 4 * width * width + 4 * width + 2 * width  # with biases, and LayerNorm's two


def softmax_heads(width: int) -> int:
    """Heads of 128 numbers, as softmax attention of these widths has, or one smaller head."""
    return max(1, width // 128)


def short_sizes(max_length: int) -> tuple[int, int]:
    """The two short kernels' sizes, 3 and 2 round(log10 T_max) + 1 (arXiv 2406.08128, §3)."""
    return 3, 2 * round(math.log10(max(max_length, 1))) + 1


# --- HBM bytes of single implementations, forward -------------------------------------------------


def naive_cumsum_hbm_bytes(shape: Shape, itemsize: int) -> int:
    states = 4 * shape["B"] * shape["T"] * shape["H"] * shape["K"] * shape["V"]  # float32
    traffic = 4 * states  # k v^T written; read and written by cumsum; read by the product with q
    return traffic + sum(linear_attention_bytes(shape, itemsize, "fwd"))


def quadratic_hbm_bytes(shape: Shape, itemsize: int) -> int:
    scores = 4 * shape["B"] * shape["H"] * shape["T"] ** 2  # float32
    traffic = 4 * scores  # q k^T written; read and written by the mask; read by the product with v
    return traffic + sum(linear_attention_bytes(shape, itemsize, "fwd"))


def recurrent_hbm_bytes(shape: Shape, itemsize: int) -> int:
    """Every tensor once; q and k, read again by each slice of 32 columns of V, come from L2."""
    return sum(linear_attention_bytes(shape, itemsize, "fwd"))


def fla_chunk_hbm_bytes(shape: Shape, itemsize: int) -> int:
    """Counted from fla 0.6.0's kernels: the state goes to memory once per 64 tokens."""
    rows = shape["B"] * shape["T"] * shape["H"]
    state = shape["K"] * shape["V"] / 64  # elements per token, in the inputs' dtype
    first = shape["K"] + shape["V"] + state  # k, v in; h out
    second = 2 * shape["K"] + shape["V"] + state + shape["V"]  # q, k, v, h in; o out
    return round(rows * itemsize * (first + second))


def fla_fused_chunk_hbm_bytes(shape: Shape, itemsize: int) -> int:
    """Counted from fla 0.6.0's kernel: K is cut in slices of 64, each with an output of its own."""
    slices = math.ceil(shape["K"] / 64)
    parts = _summed_parts_bytes(shape, itemsize, slices) if slices > 1 else 0
    return sum(linear_attention_bytes(shape, itemsize, "fwd")) + parts


def fla_recurrent_hbm_bytes(shape: Shape, itemsize: int) -> int:
    """Counted from fla 0.6.0's kernel: as fla_fused_chunk, but float32 even in one slice."""
    parts = _summed_parts_bytes(shape, itemsize, math.ceil(shape["K"] / 64))
    return sum(linear_attention_bytes(shape, itemsize, "fwd")) + parts


def _summed_parts_bytes(shape: Shape, itemsize: int, slices: int) -> int:
    """Beyond inputs and output: float32 partial outputs, their sum, and its conversion."""
    output = 4 * shape["B"] * shape["T"] * shape["H"] * shape["V"]
    if slices == 1:  # nothing to sum; written and read again by the conversion
        return 2 * output if itemsize != 4 else 0
    summed = 2 * slices * output  # the parts, written by the kernel and read by the sum
    # The sum is the output in float32; else it is written, and read by the conversion.
    return summed + (2 * output if itemsize != 4 else 0)


def flash_hbm_bytes(shape: Shape, itemsize: int) -> int:
    """k and v are read again by every block of queries, from L2; the log-sum-exp is float32."""
    return (
        sum(linear_attention_bytes(shape, itemsize, "fwd"))
        + 4 * shape["B"] * shape["T"] * shape["H"]
    )


def _bytes(direction: str, forward: Bytes, backward: Bytes) -> Bytes:
    read, written = (_by_direction(direction, f, b) for f, b in zip(forward, backward, strict=True))
    return read, written


def _by_direction(direction: str, forward: int, backward: int) -> int:
    return {"fwd": forward, "bwd": backward, "fwdbwd": forward + backward}[direction]
