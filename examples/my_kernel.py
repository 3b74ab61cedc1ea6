"""Your own kernel in the bench: a function of the op's inputs that returns its output.

chela-bench sweep --op linear_attention --impl triton_chunked --impl examples/my_kernel.py:attention
"""

import torch


def attention(q, k, v):  # q, k [B, T, H, K]; v [B, T, H, V] -> o [B, T, H, V]
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril() * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshv->bthv", scores, v)
