"""Which CHELA layers the Triton kernels compute: every limit of theirs that a layer can meet.

    d_key / num_heads <= 256        linear attention keeps a state of [K, V's slice] in registers
    d_value <= 4096                 norm and gate keep a whole row there
    max_length <= 8388608           the most tokens of a transform

Other sizes are free. Of tensors: on a GPU, in float32, bfloat16 or float16.
"""

from __future__ import annotations

from torch import Tensor

from chela_bench.kernels.gates import MAX_V
from chela_bench.kernels.gates_ops import DTYPES
from chela_bench.kernels.launching import is_on_gpu
from chela_bench.kernels.linear_attention_config import MAX_K
from chela_bench.kernels.long_conv_plan import MAX_T


def beyond_kernels(*, d_key: int, d_value: int, num_heads: int, max_length: int) -> str | None:
    """What the kernels want and a layer of these sizes has instead, or None."""
    if d_key // num_heads > MAX_K:
        return f"d_key / num_heads <= {MAX_K}, got {d_key} / {num_heads}: take more heads"
    if d_value > MAX_V:
        return f"d_value <= {MAX_V}, got {d_value}: take a smaller one"
    if max_length > MAX_T:
        return f"max_length <= {MAX_T}, got {max_length}: cut the sequence"
    return None


def takes(x: Tensor) -> bool:
    """Whether the kernels compute with such tensors."""
    return is_on_gpu(x) and x.dtype in DTYPES
