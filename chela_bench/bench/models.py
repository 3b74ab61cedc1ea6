"""What each function must move and compute, counted. Pure arithmetic: no torch, no device.

`shape` maps dimension names to sizes, `itemsize` is the bytes of one element of the inputs and
outputs. Compulsory bytes are a pair (read, written): every input once, every output once, nothing
else. FLOPs: of the leanest algorithm in use for the function at these sizes, a multiply-add counted
as two. `fwdbwd` is the sum of `fwd` and `bwd`. `decode` is a step of one token of each sequence,
after as many as `decode_window` says; what of the layer's state it needs is an input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

Shape = Mapping[str, int]
Bytes = tuple[int, int]  # read, written


STEPS = 64  # timed together: a block of the streaming convolution


class Window(NamedTuple):
    """Which steps of a sequence are timed: tokens `start` up to, and not with, `stop`."""

    start: int
    stop: int

    @property
    def tokens(self) -> float:
        """That a step finds in the cache, itself among them, on average."""
        return (self.start + 1 + self.stop) / 2


def decode_window(tokens: int) -> Window:
    """A block of STEPS near the end of `tokens`, chosen for what the streaming convolution owes.

    Its step n * STEPS owes a square of U = STEPS * (the largest power of two that divides n), which
    costs about U times as much as one of a token. So over a long sequence each of the log2(T /
    STEPS) sizes costs alike, and a block's share of all of them is a square of STEPS *
    log2(T / STEPS) / 2 tokens. That, up to a power of two, is owed at the end of the window, which
    lies as far back as that takes (1.6 % of 16k tokens).
    """
    sizes = tokens.bit_length() - STEPS.bit_length()  # whole part of log2(T / STEPS)
    square = STEPS << max(0, math.ceil(math.log2(max(sizes, 2) / 2)))
    stop = square * (((tokens - 1) // square - 1) // 2 * 2 + 1)  # the last odd multiple below T
    if stop <= STEPS:  # too short for a block behind another
        return Window(tokens - min(STEPS, (tokens + 1) // 2), tokens)
    return Window(stop - STEPS, stop)


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
    if direction == "decode":
        return _chela_step_bytes(shape, itemsize)
    x = shape["B"] * shape["T"] * shape["D"] * itemsize
    parameters = chela_layer_parameters(shape) * itemsize
    forward = x + parameters, x  # x, parameters; y
    backward = 2 * x + parameters, x + parameters  # x, dy, parameters; dx and the gradients
    return _bytes(direction, forward, backward)


def _chela_step_bytes(shape: Shape, itemsize: int) -> Bytes:
    """The long kernel's taps are not counted: the most are needed once in many tokens."""
    rows, width = shape["B"], shape["D"]
    parameters = chela_layer_parameters(shape) - width * shape["T"]
    state = 4 * rows * shape["K"] * shape["V"]  # float32, as the sums of the convolution are
    token = rows * width * itemsize
    earlier = max(short_sizes(shape["T"])) - 1  # tokens that the short kernels reach back to
    read = parameters * itemsize + token + 4 * rows * width * (1 + earlier) + state
    return read, token + 4 * rows * width * 2 + state  # y; the inputs of both convolutions


def chela_layer_flops(shape: Shape, direction: str) -> int:
    width, key, value = shape["D"], shape["K"], shape["V"]
    rows = shape["B"] * shape["T"]
    # W_z [D, z]; W_v, W_a [D, v]; W_h, W_o [D, D]; U_h [v, D]
    weights = width * key + 2 * width * value + 2 * width * width + value * width
    if direction == "decode":
        return shape["B"] * (2 * weights + 4 * key * value + _stepped_conv_flops(shape))
    forward = rows * 2 * weights
    backward = 2 * forward  # one product for the inputs' gradient, one for the weights'
    attention = {**shape, "H": 1}
    return (
        _by_direction(direction, forward, backward)
        + linear_attention_flops(attention, direction)
        + short_long_conv_flops(shape, direction)
    )


def _stepped_conv_flops(shape: Shape) -> int:
    """A token's of D channels, in the long run: short kernels; the long one within a block of
    tokens; real FFTs of 2 U to and fro, and a product, every 2 U tokens for each U (see
    chela_bench.kernels.long_conv_stream)."""
    each, size = 2.0 * max(short_sizes(shape["T"])) + 2 * (STEPS + 1) / 2, STEPS
    while size < shape["T"]:
        each += 2 * 2.5 * math.log2(2 * size) + 3
        size *= 2
    return round(shape["D"] * each)


def chela_layer_parameters(shape: Shape) -> int:
    width, key, value = shape["D"], shape["K"], shape["V"]
    taps = width * (shape["T"] + sum(short_sizes(shape["T"])))
    weights = width * key + 2 * width * value + 2 * width * width + value * width
    biases = key + 2 * value + 2 * width  # b_z; b_v, b_a; b_h, b_o
    scale_and_shift = 4 * key  # a_q, m_q, a_k, m_k
    return taps + weights + biases + scale_and_shift + 2 * width  # LayerNorm's weight and bias


def softmax_layer_bytes(shape: Shape, itemsize: int, direction: str) -> Bytes:
    parameters = softmax_layer_parameters(shape) * itemsize
    if direction == "decode":
        token = shape["B"] * shape["D"] * itemsize
        earlier = decode_window(shape["T"]).tokens - 1
        return round(parameters + token + 2 * earlier * token), 3 * token  # x, k, v; y, k, v
    x = shape["B"] * shape["T"] * shape["D"] * itemsize
    return _bytes(direction, (x + parameters, x), (2 * x + parameters, x + parameters))


def softmax_layer_flops(shape: Shape, direction: str) -> int:
    products = 2 * 4 * shape["D"] ** 2  # W_qkv [D, 3 D], W_o [D, D]
    if direction == "decode":  # q k^T, p v
        attended = decode_window(shape["T"]).tokens
        return round(shape["B"] * (products + 4 * shape["D"] * attended))
    forward = shape["B"] * shape["T"] * products
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


# --- HBM bytes of single implementations, of a step -----------------------------------------------


def chela_step_hbm_bytes(shape: Shape, itemsize: int) -> int:
    """Beyond what any step moves, the streaming convolution's own, in the long run: of half a block
    the inputs and taps; for each size U of square, once in 2 U tokens, its inputs, padded, their
    transform, the product, the way back and the sums, 36 numbers of float32 for each of U, and the
    spectrum of a channel once a batch."""
    rows, width = shape["B"], shape["D"]
    strip = 4 * (rows + 1) * width * (STEPS + 1) / 2
    sizes = max(0, (shape["T"] - 1).bit_length() - (STEPS - 1).bit_length())
    squares = sizes * width * (rows * 36 * 4 + 8) / 2
    return round(sum(chela_layer_bytes(shape, itemsize, "decode")) + strip + squares)


def softmax_step_hbm_bytes(shape: Shape, itemsize: int) -> int:
    """Every tensor once, the cache with them."""
    return sum(softmax_layer_bytes(shape, itemsize, "decode"))


# --- HBM bytes of single implementations, forward -------------------------------------------------


def naive_cumsum_hbm_bytes(shape: Shape, itemsize: int) -> int:
    states = 4 * shape["B"] * shape["T"] * shape["H"] * shape["K"] * shape["V"]  # float32
    traffic = 4 * states  # k v^T written; read and written by cumsum; read by the product with q
    return traffic + sum(linear_attention_bytes(shape, itemsize, "fwd"))


def quadratic_hbm_bytes(shape: Shape, itemsize: int) -> int:
    scores = 4 * shape["B"] * shape["H"] * shape["T"] ** 2  # float32
    traffic = 4 * scores  # q k^T written; read and written by the mask; read by the product with v
    return traffic + sum(linear_attention_bytes(shape, itemsize, "fwd"))


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
