"""Ground truth for kernels/linear_attention.py, four times over. Clear, differentiable, any device.

    S_t = S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t          scale = K**-0.5 unless given

q, k [B, T, H, K]; v, o [B, T, H, V]; state S [N, H, K, V]. Two-sided (causal=False), every o_t
reads the last state. `naive_cumsum`, `quadratic`, `recurrent` and `chunked` are one function:

    naive_cumsum   every S_t in memory             T*K*V numbers: the strawman of arXiv 2406.08128
    quadratic      ((q k^T) * mask) v              T*T numbers
    recurrent      one token at a time             K*V numbers, T steps; also the decode step
    chunked        both of the above, by chunks    T/C * K*V + T*C numbers, no loop

All compute in float32, or float64 if any tensor is float64, and return o and the state in that
dtype: the caller decides where to round. Packed sequences (B = 1) lie between the positions in
`cu_seqlens` [N + 1], with one state each; without it N = B.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from chela_bench.errors import ArgumentError

Output = tuple[Tensor, Tensor]  # o [B, T, H, V], final state [N, H, K, V]


def naive_cumsum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The cumulative sum of k v^T, written out as [B, T, H, K, V], then read by q."""
    return _run(
        _naive_cumsum, q, k, v, scale, initial_state, output_final_state, cu_seqlens, causal
    )


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """((q k^T) * mask) v, as softmax attention would, without the softmax."""
    return _run(_quadratic, q, k, v, scale, initial_state, output_final_state, cu_seqlens, causal)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The definition, token by token."""
    return _run(_recurrent, q, k, v, scale, initial_state, output_final_state, cu_seqlens, causal)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Quadratic within chunks of `chunk_size` tokens, a cumulative sum of states between them.

    Has no Python loop over tokens or chunks: torch.compile(fullgraph=True) takes it whole, unless
    cu_seqlens is given.
    """
    if chunk_size < 1:
        raise ArgumentError(f"chunk_size is a number of tokens, got {chunk_size}; pass 1 or more")
    form = partial(_chunked, chunk_size=chunk_size)
    return _run(form, q, k, v, scale, initial_state, output_final_state, cu_seqlens, causal)


linear_attention = chunked


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, scale: float | None = None
) -> Tensor:
    """One token: state += k v^T in place, then o = scale * state^T q.

    q, k [B, H, K]; v, o [B, H, V]; state [B, H, K, V] in the compute dtype (float32, or float64 if
    a tensor is float64). Raises ArgumentError if they do not fit each other.
    """
    if q.ndim != 3 or q.shape != k.shape or v.shape[:-1] != q.shape[:-1]:
        raise ArgumentError(
            "wanted q, k [B, H, K] and v [B, H, V], got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; a token has no T axis"
        )
    wanted = (*q.shape, v.shape[-1])
    dtype = compute_dtype(q, k, v, state)
    if state.shape != wanted or state.dtype != dtype:
        raise ArgumentError(
            f"state is updated in place: wanted {list(wanted)} in {dtype}, "
            f"got {list(state.shape)} in {state.dtype}; keep it as `final_state` returned it"
        )
    q, k, v = (x.to(dtype) for x in (q, k, v))
    state += k[..., :, None] * v[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q * _scale(scale, q), state)


# The forms: q (already scaled), k [B, T, H, K], v [B, T, H, V], S_0 [B, H, K, V] -> o, S_T.


def _naive_cumsum(q: Tensor, k: Tensor, v: Tensor, state: Tensor, causal: bool) -> Output:
    outer = k[..., :, None] * v[..., None, :]  # [B, T, H, K, V]
    outer[:, :1] += state[:, None]  # S_0 joins the first token
    states = outer.cumsum(dim=1)  # S_1 ... S_T
    final = states[:, -1] if q.shape[1] else state
    if causal:
        return torch.einsum("bthk,bthkv->bthv", q, states), final
    return torch.einsum("bthk,bhkv->bthv", q, final), final


def _quadratic(q: Tensor, k: Tensor, v: Tensor, state: Tensor, causal: bool) -> Output:
    scores = torch.einsum("bthk,bshk->bhts", q, k)
    if causal:
        scores = scores.tril()
    o = torch.einsum("bhts,bshv->bthv", scores, v) + torch.einsum("bthk,bhkv->bthv", q, state)
    return o, state + torch.einsum("bthk,bthv->bhkv", k, v)


def _recurrent(q: Tensor, k: Tensor, v: Tensor, state: Tensor, causal: bool) -> Output:
    o: list[Tensor] = []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):  # [B, H, K or V]
        state = state + k_t[..., :, None] * v_t[..., None, :]
        if causal:
            o.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
    if not causal:
        return torch.einsum("bthk,bhkv->bthv", q, state), state
    return (torch.stack(o, dim=1) if o else torch.zeros_like(v)), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, causal: bool, *, chunk_size: int
) -> Output:
    T = q.shape[1]
    NT = -(-T // chunk_size)
    pad = (0, 0, 0, 0, 0, NT * chunk_size - T)  # zeros at the end add nothing to a state
    q, k, v = (  # [B, NT, C, H, K or V]
        F.pad(x, pad).reshape(x.shape[0], NT, chunk_size, *x.shape[2:]) for x in (q, k, v)
    )
    added = torch.einsum("bnchk,bnchv->bnhkv", k, v)
    if not causal:
        final = state + added.sum(dim=1)
        return torch.einsum("bnchk,bhkv->bnchv", q, final).flatten(1, 2)[:, :T], final
    states = torch.cat([state[:, None], added], dim=1).cumsum(dim=1)  # [B, NT + 1, H, K, V]
    before = torch.einsum("bnchk,bnhkv->bnchv", q, states[:, :-1])
    scores = torch.einsum("bnchk,bnshk->bnhcs", q, k).tril()
    within = torch.einsum("bnhcs,bnshv->bnchv", scores, v)
    return (before + within).flatten(1, 2)[:, :T], states[:, -1]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: what every reference computes in."""
    if not all(x.is_floating_point() for x in tensors):
        dtypes = ", ".join(str(x.dtype) for x in tensors)
        raise ArgumentError(f"wanted floating-point tensors, got {dtypes}; convert with .float()")
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _run(
    form: Callable[[Tensor, Tensor, Tensor, Tensor, bool], Output],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Check, convert, and apply `form` to the batch, or to each packed sequence in turn."""
    if q.ndim != 4 or q.shape != k.shape or v.shape[:-1] != q.shape[:-1]:
        raise ArgumentError(
            "wanted q, k [B, T, H, K] and v [B, T, H, V], got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; repeat shared heads first"
        )
    B, T, H, K = q.shape
    bounds = None if cu_seqlens is None else _bounds(cu_seqlens, B, T)
    wanted = (B if bounds is None else len(bounds) - 1, H, K, v.shape[-1])
    if initial_state is None:
        dtype = compute_dtype(q, k, v)
        state = q.new_zeros(wanted, dtype=dtype)
    else:
        if initial_state.shape != wanted:
            raise ArgumentError(
                f"wanted initial_state [N, H, K, V] = {list(wanted)}, "
                f"got {list(initial_state.shape)}; N counts sequences"
            )
        dtype = compute_dtype(q, k, v, initial_state)
        state = initial_state.to(dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    q = q * _scale(scale, q)
    if bounds is None:
        o, final = form(q, k, v, state, causal)
        return o, final if output_final_state else None
    outputs = [
        form(q[:, start:end], k[:, start:end], v[:, start:end], state[n : n + 1], causal)
        for n, (start, end) in enumerate(pairwise(bounds))
    ]
    o = torch.cat([o for o, _ in outputs], dim=1)
    final = torch.cat([final for _, final in outputs])
    return o, final if output_final_state else None


def _scale(scale: float | None, q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else scale


def _bounds(cu_seqlens: Tensor, B: int, T: int) -> list[int]:
    if B != 1:
        raise ArgumentError(
            f"packed sequences share one row: wanted B = 1, got B = {B}; "
            "pass q.flatten(0, 1)[None] and so on"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            "wanted cu_seqlens [N + 1] in int32 or int64, got "
            f"{list(cu_seqlens.shape)} in {cu_seqlens.dtype}; pass [0, *cumsum(lengths)]"
        )
    bounds: list[int] = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
        raise ArgumentError(
            f"wanted cu_seqlens that start at 0, never fall and end at T = {T}, "
            f"got {bounds}; pass [0, *cumsum(lengths)]"
        )
    return bounds
