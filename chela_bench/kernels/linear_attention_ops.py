"""Linear attention as PyTorch operators: what torch.compile, autograd and CUDA graphs see.

`chela_bench::linear_attention_forward` and `_backward` take checked tensors and launch walks (see
linear_attention_walk.py, and linear_attention_wide.py for dq and dk of a wide v). They call each
other nowhere: autograd joins them here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels.linear_attention_config import (
    MAX_K,
    OPTIONS,
    TILES,
    default_config,
    sum_config,
    sweep_config,
    wide_config,
)
from chela_bench.kernels.linear_attention_sweep import MAX_SWEPT, SWEPT, sweep
from chela_bench.kernels.linear_attention_walk import Walk, segment_states, walk
from chela_bench.kernels.linear_attention_wide import wide_segments, wide_walk

_library = torch.library.Library("chela_bench", "FRAGMENT")
_library.define(
    "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? initial_state, "
    "Tensor? cu_seqlens, float scale, bool output_final_state, bool causal, bool precise, "
    "int segments, int[] options) -> (Tensor o, Tensor final_state, Tensor states)"
)
_library.define(
    "linear_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? initial_state, "
    "Tensor? cu_seqlens, Tensor states, Tensor do, Tensor? d_final_state, float scale, "
    "bool causal, bool precise, int segments, int[] options) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor d_initial_state)"
)


def options_of(config: Mapping[str, int]) -> list[int]:
    """What the caller asked for, by OPTIONS; -1 where the default holds."""
    return [config.get(name, -1) for name in OPTIONS]


def _tiles(options: Sequence[int], K: int, V: int, dtype: torch.dtype) -> dict[str, int]:
    asked = zip(OPTIONS, options, strict=True)
    given = {name: size for name, size in asked if size >= 0 and name in TILES}
    return {**default_config(K, V, dtype), **given}


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    causal: bool,
    precise: bool,
    segments: int,
    options: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """o; the final state; the states between segments, or two-sided the state that all read. The
    last two are empty where there are none."""
    o, final, states = _forward_outputs(
        q, k, v, initial_state, cu_seqlens, scale, output_final_state, causal, precise, segments,
        options,
    )  # fmt: skip
    N, (H, K), V = _sequences(q, cu_seqlens), q.shape[2:], v.shape[-1]
    if N * H * V == 0:
        return o, final, states
    q, k, v = rows_contiguous(q, k, v)
    call = Walk(scale, causal, cu_seqlens, N, segments, precise)
    config = _tiles(options, K, V, q.dtype)
    with torch.cuda.device_of(q):
        if segments == 1 and causal:
            last = final if output_final_state else None
            walk(q, k, v, o, call, config, initial=initial_state, final=last)
        else:
            segment_states(
                k, v, states, call, sum_config(K, V, q.dtype),
                initial=initial_state, final=final if output_final_state else None,
            )  # fmt: skip
            walk(q, k, v, o, call, config, initial=states)
    return o, final, states


def _forward_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    causal: bool,
    precise: bool,
    segments: int,
    options: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    del k, initial_state, scale, precise, options
    N, (H, K), V = _sequences(q, cu_seqlens), q.shape[2:], v.shape[-1]
    o = q.new_empty(v.shape)
    final = q.new_empty((N, H, K, V) if output_final_state else (0,), dtype=torch.float32)
    states = q.new_empty(states_shape(N, H, K, V, segments, causal), dtype=torch.float32)
    return o, final, states


def states_shape(N: int, H: int, K: int, V: int, segments: int, causal: bool) -> tuple[int, ...]:
    """Of the states that walks of one call begin with: none that are not given by the caller, one
    before each of several segments, or two-sided one for all."""
    if not causal:
        return (N, H, K, V)
    return (N, H, segments, K, V) if segments > 1 else (0,)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    do: Tensor,
    d_final_state: Tensor | None,
    scale: float,
    causal: bool,
    precise: bool,
    segments: int,
    options: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv as q, k, v; the initial state's gradient, empty where there is none."""
    dq, dk, dv, d_initial = _backward_outputs(
        q, k, v, initial_state, cu_seqlens, states, do, d_final_state, scale, causal, precise,
        segments, options,
    )  # fmt: skip
    N, H, V = _sequences(q, cu_seqlens), q.shape[2], v.shape[-1]
    if N * H * V == 0:
        return dq, dk, dv, d_initial
    q, k, v, do = rows_contiguous(q, k, v, do)
    call = Walk(scale, causal, cu_seqlens, N, segments, precise)
    ways = _by_sweep if _swept(q, V, call, options) else _by_walks
    last = None if initial_state is None else d_initial
    with torch.cuda.device_of(q):
        ways(
            (q, k, v, do), (dq, dk, dv), call, options,
            initial=initial_state, states=states, d_final=d_final_state, d_initial=last,
        )  # fmt: skip
    return dq, dk, dv, d_initial


def _swept(q: Tensor, V: int, call: Walk, options: Sequence[int]) -> bool:
    """Whether one sweep computes all gradients. Not of packed sequences that may be long: how long
    a segment gets is then known on the device alone. R holds d(final state) / scale."""
    asked = dict(zip(OPTIONS, options, strict=True))["sweep"]
    fits = max(q.shape[-1], V) <= MAX_SWEPT and call.causal and call.scale != 0.0
    short = call.cu_seqlens is None or q.shape[1] <= SWEPT
    return fits and short and (asked == 1 or (asked < 0 and q.dtype == torch.bfloat16))


def _by_sweep(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
    call: Walk,
    options: Sequence[int],
    *,
    initial: Tensor | None,
    states: Tensor,
    d_final: Tensor | None,
    d_initial: Tensor | None,
) -> None:
    q, k, v, do = tensors
    call = dataclasses.replace(call, segments=max(call.segments, -(-q.shape[1] // SWEPT)))
    before = _states_before(k, v, call, initial, states)
    behind = None if d_final is None else d_final.contiguous() / call.scale
    behind = _states(q, do, call, behind, final=d_initial, reverse=True, inclusive=True)
    config = sweep_config(q.shape[-1], v.shape[-1])
    sweep(*tensors, *gradients, call, config, before=before, behind=behind)
    if d_initial is not None:
        d_initial *= call.scale


def _by_walks(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
    call: Walk,
    options: Sequence[int],
    *,
    initial: Tensor | None,
    states: Tensor,
    d_final: Tensor | None,
    d_initial: Tensor | None,
) -> None:
    (q, k, v, do), (dq, dk, dv) = tensors, gradients
    K, V = q.shape[-1], v.shape[-1]
    walks: Callable[..., None] = walk
    config = _tiles(options, V, K, q.dtype)
    if V > MAX_K:
        tokens = q.shape[1] if call.cu_seqlens is None else q.shape[1] // call.N
        call = dataclasses.replace(call, segments=wide_segments(tokens))
        walks, config = wide_walk, wide_config(q.dtype)
    before = _states_before(k, v, call, initial, states)
    walks(do, v, k, dq, call, config, initial=before, transposed=True)
    del before  # large, where V is
    if call.scale == 0.0:  # R cannot hold d(final state) / scale: let q be 0 instead
        q, call = torch.zeros_like(q), dataclasses.replace(call, scale=1.0)
    behind = None if d_final is None else d_final.contiguous() / call.scale
    last = d_initial
    if call.segments > 1 or not call.causal:
        behind, last = _states(q, do, call, behind, final=d_initial, reverse=True), None
    walks(v, do, q, dk, call, config, initial=behind, transposed=True, reverse=True)
    config = _tiles(options, K, V, q.dtype)
    walk(k, q, do, dv, call, config, initial=behind, final=last, reverse=True)
    if d_initial is not None:
        d_initial *= call.scale


def _states_before(
    k: Tensor, v: Tensor, call: Walk, initial: Tensor | None, saved: Tensor
) -> Tensor | None:
    """S before each segment: the forward's, if it was cut into as many."""
    if call.segments == 1 and call.causal:
        return initial
    H, K = k.shape[2:]
    wanted = states_shape(call.N, H, K, v.shape[-1], call.segments, call.causal)
    return saved if saved.shape == wanted else _states(k, v, call, initial)


def _states(a: Tensor, b: Tensor, call: Walk, initial: Tensor | None, **options: Any) -> Tensor:
    K, V = a.shape[-1], b.shape[-1]
    shape = (call.N, a.shape[2], *([call.segments] if call.causal else []), K, V)
    found = a.new_empty(shape, dtype=torch.float32)
    segment_states(a, b, found, call, sum_config(K, V, a.dtype), initial=initial, **options)
    return found


def _backward_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    do: Tensor,
    d_final_state: Tensor | None,
    scale: float,
    causal: bool,
    precise: bool,
    segments: int,
    options: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del cu_seqlens, states, do, d_final_state, scale, causal, precise, segments, options
    d_initial = q.new_empty(
        (0,) if initial_state is None else initial_state.shape, dtype=torch.float32
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_initial


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, initial_state, cu_seqlens, scale, has_final, causal, precise, segments, options = (
        inputs
    )
    o, _, states = output
    ctx.save_for_backward(q, k, v, initial_state, cu_seqlens, states)
    ctx.options = scale, causal, precise, segments, options
    ctx.o_like, ctx.has_final = (o.shape, o.dtype), has_final
    ctx.mark_non_differentiable(states)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, do: Tensor | None, d_final: Tensor | None, d_states: None
) -> tuple[Tensor | None, ...]:
    q, k, v, initial_state, cu_seqlens, states = ctx.saved_tensors
    nothing = (None,) * 7
    d_final = d_final if ctx.has_final else None
    if do is None and d_final is None:
        return None, None, None, None, *nothing
    if do is None:
        do = q.new_zeros(ctx.o_like[0], dtype=ctx.o_like[1])
    dq, dk, dv, d_initial = torch.ops.chela_bench.linear_attention_backward(
        q, k, v, initial_state, cu_seqlens, states, do, d_final, *ctx.options
    )
    return dq, dk, dv, None if initial_state is None else d_initial, *nothing


def _differentiate_twice(ctx: Any, *gradients: Tensor | None) -> None:
    raise ArgumentError(
        "wanted first derivatives of linear_attention, got a second one: its backward has no "
        "gradient; use chela_bench.reference.linear_attention, or drop create_graph=True"
    )


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def rows_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


_FORWARD, _BACKWARD = (f"chela_bench::linear_attention_{way}" for way in ("forward", "backward"))
_library.impl("linear_attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("linear_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(_FORWARD, _forward_outputs, lib=_library)
torch.library.register_fake(_BACKWARD, _backward_outputs, lib=_library)
torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd(_BACKWARD, _differentiate_twice, lib=_library)
