"""Softmax attention, exact in float64 at any length: the memory is linear in T.

    s_ts = scale * q_t . k_s          p_t = softmax(s_t)          o_t = sum_s p_ts v_s

q, k [B, T, H, K]; v, o [B, T, H, V]. Forward and backward go through blocks of query rows. The
backward recomputes p from the saved log-sum-exp (Dao et al., arXiv 2205.14135, algorithm 4):

    delta_t = do_t . o_t     ds_ts = p_ts (do_t . v_s - delta_t)
    dq_t = scale * sum_s ds_ts k_s     dk_s = scale * sum_t ds_ts q_t     dv_s = sum_t p_ts do_t
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chela_bench.errors import ArgumentError
from chela_bench.reference.linear_attention import compute_dtype

SCORE_BYTES = 256 * 2**20  # of one block of scores, at most, unless a single row is larger


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True
) -> Tensor:
    """o_t = sum_s softmax_s(scale * q_t . k_s) v_s, over s <= t if causal, else over all s.

    q, k [B, T, H, K]; v [B, T, H, V]; scale = K**-0.5 unless given. Computes in float32, or float64
    if any tensor is float64, and returns o [B, T, H, V] in that dtype. Differentiable once.
    """
    if q.ndim != 4 or q.shape != k.shape or v.shape[:-1] != q.shape[:-1]:
        raise ArgumentError(
            "wanted q, k [B, T, H, K] and v [B, T, H, V], got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; repeat shared heads first"
        )
    dtype = compute_dtype(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # [B, H, T, K or V]
    o: Tensor = _SoftmaxAttention.apply(q, k, v, scale, causal)  # type: ignore[no-untyped-call]
    return o.transpose(1, 2)


def softmax_attention_step(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
) -> Tensor:
    """o = sum_s softmax_s(scale * q . k_s) v_s of one token, which sees all L of k and v.

    q [B, H, K]; k [B, H, L, K]; v [B, H, L, V]: a cache's layout. Scale, dtypes and o [B, H, V] as
    of softmax_attention.
    """
    if q.ndim != 3 or k.shape[:2] + k.shape[3:] != q.shape or k.shape[:3] != v.shape[:3]:
        raise ArgumentError(
            "wanted q [B, H, K], k [B, H, L, K] and v [B, H, L, V], got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; a token has no T axis"
        )
    dtype = compute_dtype(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.to(dtype) for x in (q, k, v))
    p = torch.softmax(scale * torch.einsum("bhk,bhlk->bhl", q, k), dim=-1)
    return torch.einsum("bhl,bhlv->bhv", p, v)


class _SoftmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        o = torch.empty_like(v)
        lse = torch.empty_like(q[..., 0])  # [B, H, T]
        for rows, seen in _blocks(q, causal):
            scores = _scores(q, k, rows, seen, scale, causal)
            lse[..., rows] = scores.logsumexp(dim=-1)
            o[..., rows, :] = scores.sub_(lse[..., rows, None]).exp_() @ v[..., seen, :]
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale, ctx.causal = scale, causal
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (do * o).sum(dim=-1, keepdim=True)  # [B, H, T, 1]
        for rows, seen in _blocks(q, ctx.causal):
            scores = _scores(q, k, rows, seen, ctx.scale, ctx.causal)
            p = scores.sub_(lse[..., rows, None]).exp_()  # [B, H, R, S]
            do_rows = do[..., rows, :]
            dv[..., seen, :] += p.mT @ do_rows
            ds = (do_rows @ v[..., seen, :].mT).sub_(delta[..., rows, :]).mul_(p).mul_(ctx.scale)
            dq[..., rows, :] = ds @ k[..., seen, :]
            dk[..., seen, :] += ds.mT @ q[..., rows, :]
        return dq, dk, dv, None, None


def _blocks(q: Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Query rows, and the keys that they see, block by block."""
    B, H, T, _ = q.shape
    block = max(1, SCORE_BYTES // max(1, B * H * T * q.element_size()))
    for start in range(0, T, block):
        end = min(start + block, T)
        yield slice(start, end), slice(0, end if causal else T)


def _scores(q: Tensor, k: Tensor, rows: slice, seen: slice, scale: float, causal: bool) -> Tensor:
    scores = (q[..., rows, :] @ k[..., seen, :].mT).mul_(scale)  # [B, H, R, S]
    if causal:
        token = torch.arange(seen.stop, device=q.device)
        scores.masked_fill_(token > token[rows, None], float("-inf"))
    return scores
