"""Linear attention for PyTorch: the operators that torch.compile and others see, and autograd.

`chela_bench::linear_attention_forward` and `_backward` take checked tensors and launch walks
(linear_attention_walk.py), or for all gradients one sweep (linear_attention_sweep.py). `eager` does
the same without the dispatcher, which costs the host as much as the launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels.dispatch import is_plain
from chela_bench.kernels.launching import cdiv, has_wgmma, on_device_of, processors
from chela_bench.kernels.linear_attention_config import (
    MAX_K,
    OPTIONS,
    SWEPT,
    WINDOW,
    swept_segments,
)
from chela_bench.kernels.linear_attention_kept import gradients_of_kept
from chela_bench.kernels.linear_attention_sweep import blocks, sweep
from chela_bench.kernels.linear_attention_walk import Gate, Walk, segment_states, walk

_library = torch.library.Library("chela_bench", "FRAGMENT")
_library.define(
    "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? initial_state, "
    "Tensor? cu_seqlens, float scale, bool output_final_state, bool causal, bool precise, "
    "int segments, int pieces, int[] options) -> (Tensor o, Tensor final_state, Tensor states)"
)
_library.define(
    "linear_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? initial_state, "
    "Tensor? cu_seqlens, Tensor? states, Tensor do, Tensor? d_final_state, float scale, "
    "bool causal, bool precise, int segments, int pieces, int[] options) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor d_initial_state)"
)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    call: Walk,
    *,
    output_final_state: bool,
    keep_states: bool,
    gate: Gate | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """o; the final state, if wanted; if gradients are to come (`keep_states`), what states there
    are of these: windows', where the call keeps them; those between segments; two-sided the one
    that all read. A `gate` is for calls whose walk is by hand."""
    _, _, H, K = q.shape
    V = v.shape[-1]
    o = torch.empty_like(v) if v.is_contiguous() else v.new_empty(v.shape)  # the faster first
    final = q.new_empty(call.N, H, K, V, dtype=torch.float32) if output_final_state else None
    states = None
    if call.segments > 1 or not call.causal:
        states = q.new_empty(states_shape(call, H, K, V), dtype=torch.float32)
    kept = None
    if keep_states and call.keeps:
        kept = q.new_empty(kept_shape(q, V))
    if call.N * H * V > 0:
        plan = call.forward
        if gate is not None:
            plan = None
        if plan is None or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 != 0:
            (q, k, v), plan = rows_contiguous(q, k, v), None
        with on_device_of(q):
            if states is None:
                walk(
                    q, k, v, o, call, initial=initial, final=final, kept=kept, plan=plan, gate=gate
                )
            else:
                every_piece = keep_states and kept is None
                segment_states(
                    k, v, states, call, initial=initial, final=final, every_piece=every_piece
                )
                walk(q, k, v, o, call, initial=states, kept=kept, plan=plan, gate=gate)
    if not keep_states:
        states = None
    return o, final, states if kept is None else kept


def states_shape(call: Walk, H: int, K: int, V: int) -> tuple[int, ...]:
    """Of the states that are summed: one before each piece, or two-sided one for all."""
    return (call.N, H, call.segments * call.pieces, K, V) if call.causal else (call.N, H, K, V)


def kept_shape(q: Tensor, V: int) -> tuple[int, ...]:
    """Of the states of all windows, in the dtype of q."""
    B, T, H, K = q.shape
    return B, H, cdiv(T, WINDOW), K, V


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
    pieces: int,
    options: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward`, with empty tensors for what there is none of."""
    N = _sequences(q, cu_seqlens)
    call = Walk(scale, causal, cu_seqlens, N, segments, pieces, precise, tuple(options))
    o, final, states = forward(
        q, k, v, initial_state, call, output_final_state=output_final_state, keep_states=True
    )
    final, states = (
        q.new_empty(0, dtype=torch.float32) if x is None else x for x in (final, states)
    )
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
    pieces: int,
    options: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    del k, initial_state
    N = _sequences(q, cu_seqlens)
    call = Walk(scale, causal, cu_seqlens, N, segments, pieces, precise, tuple(options))
    H, K = q.shape[2:]
    V = v.shape[-1]
    has_states = segments > 1 or not causal
    final = q.new_empty((call.N, H, K, V) if output_final_state else (0,), dtype=torch.float32)
    states = q.new_empty(states_shape(call, H, K, V) if has_states else (0,), dtype=torch.float32)
    if call.keeps:
        states = q.new_empty(kept_shape(q, V))
    return q.new_empty(v.shape), final, states


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor | None,
    do: Tensor,
    d_final_state: Tensor | None,
    scale: float,
    causal: bool,
    precise: bool,
    segments: int,
    pieces: int,
    options: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv as q, k, v; the initial state's gradient, empty where there is none."""
    dq, dk, dv, d_initial = _backward_outputs(
        q, k, v, initial_state, cu_seqlens, states, do, d_final_state, scale, causal, precise,
        segments, pieces, options,
    )  # fmt: skip
    N, H, V = _sequences(q, cu_seqlens), q.shape[2], v.shape[-1]
    if N * H * V == 0:
        return dq, dk, dv, d_initial
    q, k, v, do = rows_contiguous(q, k, v, do.to(q.dtype))
    zero = scale == 0.0  # R cannot hold d(final state) / scale: let q and do's part be 0 instead
    factor = 1.0 if zero else scale
    call = Walk(factor, causal, cu_seqlens, N, segments, pieces, precise, tuple(options))
    if zero:
        q, do = torch.zeros_like(q), torch.zeros_like(do)
    ways = _by_kept if call.keeps else _by_sweep if _swept(q, V, call) else _by_walks
    behind = None if d_final_state is None else d_final_state.contiguous() / factor
    first = None if initial_state is None else d_initial
    with on_device_of(q):
        ways((q, k, v, do), (dq, dk, dv), call, Ends(initial_state, states, behind, first))
        if first is not None:
            first *= factor
    return dq, dk, dv, d_initial


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, do
Gradients = tuple[Tensor, Tensor, Tensor]  # dq, dk, dv, to be written


class Ends(NamedTuple):
    """Of a backward: S before the first token, states that the forward saved, R behind the last
    token, and what R at the first one is to be written into."""

    initial: Tensor | None
    saved: Tensor | None
    behind: Tensor | None
    first: Tensor | None


def _swept(q: Tensor, V: int, call: Walk) -> bool:
    """Whether one sweep computes all gradients: always of a v too wide for a walk's keys. Else in
    bfloat16 where a block of states is a whole one, and not of packed sequences that may be long:
    how long a segment gets is known on the device alone."""
    if V > MAX_K:
        return True
    asked = call.options[OPTIONS.index("sweep")]
    if asked >= 0:
        return asked == 1
    short = call.cu_seqlens is None or q.shape[1] <= SWEPT
    fits = max(q.shape[-1], V) <= 128 and q.dtype == torch.bfloat16 and not call.precise
    return fits and short and call.causal


def _by_sweep(tensors: Inputs, gradients: Gradients, call: Walk, ends: Ends) -> None:
    q, k, v, do = tensors
    if call.causal:
        segments = _swept_segments(q, v.shape[-1], call)
        call = call._replace(segments=segments, pieces=1)
    before = _states_before(k, v, call, ends)
    behind, first = ends.behind, ends.first
    if call.segments > 1 or not call.causal:
        behind = _states(q, do, call, behind, final=first, reverse=True, inclusive=call.causal)
        first = None
    sweep(*tensors, *gradients, call, before=before, behind=behind, first=first)


def _swept_segments(q: Tensor, V: int, call: Walk) -> int:
    _, T, H, K = q.shape
    programs = call.N * H * blocks(K, V, q.dtype, call.precise, q.device)
    segments = call.segments * call.pieces
    if call.cu_seqlens is not None:
        return max(segments, cdiv(T, SWEPT))
    return swept_segments(segments, programs, T, processors(q.device))


def _by_walks(tensors: Inputs, gradients: Gradients, call: Walk, ends: Ends) -> None:
    (q, k, v, do), (dq, dk, dv) = tensors, gradients
    before = _states_before(k, v, call, ends)
    walk(do, v, k, dq, call, initial=before, transposed=True)
    behind, last = _states_behind(q, do, call, ends)
    walk(v, do, q, dk, call, initial=behind, transposed=True, reverse=True)
    walk(k, q, do, dv, call, initial=behind, final=last, reverse=True)


def _by_kept(
    tensors: Inputs,
    gradients: Gradients,
    call: Walk,
    ends: Ends,
    *,
    make_values: Callable[[], None] | None = None,
) -> None:
    """make_values: called when dv is there, writes v, which nobody reads before."""
    (q, k, v, do), (dq, dk, dv) = tensors, gradients
    shape, states = kept_shape(q, v.shape[-1]), ends.saved
    if states is None or states.shape != shape:
        states = forward(q, k, v, ends.initial, call, output_final_state=False, keep_states=True)[2]
        assert states is not None
    kept = q.new_empty(shape)
    behind, last = _states_behind(q, do, call, ends)
    walk(k, q, do, dv, call, initial=behind, final=last, kept=kept, reverse=True)
    if make_values is not None:
        make_values()
    gradients_of_kept(q, k, v, do, dq, dk, call, states, kept)


def gradients_of_activated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor | None,
    do: Tensor,
    call: Walk,
    make_values: Callable[[Tensor | None], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, where v [B, T, H, V] is room for what make_values writes into it: called with
    None, or else with dv, to be overwritten by the gradient of what v is made of."""
    if call.keeps and call.N * q.shape[2] * v.shape[-1] > 0:
        gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        q, k, do = rows_contiguous(q, k, do.to(q.dtype))
        ends = Ends(None, states, None, None)
        with on_device_of(q):
            _by_kept(
                (q, k, v, do), gradients, call, ends, make_values=lambda: make_values(gradients[2])
            )
        return gradients
    make_values(None)
    options = call.scale, call.causal, call.precise, call.segments, call.pieces, [*call.options]
    dq, dk, dv, _ = _backward(q, k, v, None, None, states, do, None, *options)
    make_values(dv)
    return dq, dk, dv


def _states_behind(
    q: Tensor, do: Tensor, call: Walk, ends: Ends
) -> tuple[Tensor | None, Tensor | None]:
    """R behind each segment, and what the walk over a single one still has to write R at the first
    token into; of several it is written."""
    if call.segments == 1 and call.causal:
        return ends.behind, ends.first
    return _states(q, do, call, ends.behind, final=ends.first, reverse=True), None


def _states_before(k: Tensor, v: Tensor, call: Walk, ends: Ends) -> Tensor | None:
    """S before each segment: the forward's, if it was cut into as many."""
    if call.segments == 1 and call.causal:
        return ends.initial
    H, K = k.shape[2:]
    if ends.saved is not None and ends.saved.shape == states_shape(call, H, K, v.shape[-1]):
        return ends.saved
    return _states(k, v, call, ends.initial)


def _states(a: Tensor, b: Tensor, call: Walk, initial: Tensor | None, **options: Any) -> Tensor:
    H, K = a.shape[2:]
    found = a.new_empty(states_shape(call, H, K, b.shape[-1]), dtype=torch.float32)
    segment_states(a, b, found, call, initial=initial, **options)
    return found


def _backward_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor | None,
    do: Tensor,
    d_final_state: Tensor | None,
    scale: float,
    causal: bool,
    precise: bool,
    segments: int,
    pieces: int,
    options: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del cu_seqlens, states, do, d_final_state, scale, causal, precise, segments, pieces, options
    d_initial = q.new_empty(
        (0,) if initial_state is None else initial_state.shape, dtype=torch.float32
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_initial


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    call: Walk,
    *,
    output_final_state: bool,
    trained: bool,
) -> tuple[Tensor, Tensor | None]:
    """o and the final state, if wanted: the operator without the dispatcher."""
    if trained:
        unwrap = torch._C._functorch.unwrap_if_dead
        initial = None if initial is None else unwrap(initial)
        o, final = _apply(unwrap(q), unwrap(k), unwrap(v), initial, call, output_final_state)
        return o, final
    return forward(
        q, k, v, initial, call, output_final_state=output_final_state, keep_states=False
    )[:2]


def is_trained(q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (initial is not None and initial.requires_grad)
    )


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        initial: Tensor | None,
        call: Walk,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        o, final, states = forward(
            q, k, v, initial, call, output_final_state=output_final_state, keep_states=True
        )
        options = (
            call.scale, call.causal, call.precise, call.segments, call.pieces, call.options
        )  # fmt: skip
        _keep(ctx, (q, k, v, initial, call.cu_seqlens), states, options)
        return o, final

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> Any:
        return *_gradients(ctx, do, d_final), None, None


# Without the Python of Function.apply: is_plain has just looked for transforms.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Eager).apply


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, (scale, has_final, *options) = inputs[:5], inputs[5:]
    _keep(ctx, tensors, output[2], (scale, *options))
    ctx.has_final = has_final
    ctx.mark_non_differentiable(output[2])


def _keep(
    ctx: Any,
    tensors: tuple[Tensor | None, ...],
    states: Tensor | None,
    options: tuple[Any, ...],
) -> None:
    ctx.save_for_backward(*tensors, states)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, do: Tensor | None, d_final: Tensor | None, d_states: None
) -> tuple[Tensor | None, ...]:
    d_final = d_final if ctx.has_final else None  # it is empty, and so would its gradient be
    return *_gradients(ctx, do, d_final), *(None,) * 8


def _gradients(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of q, k, v and the initial state."""
    q, k, v, initial_state, cu_seqlens, states = ctx.saved_tensors
    if do is None and d_final is None:
        return None, None, None, None
    if do is None:
        do = v.new_zeros(v.shape)
    backward: Callable[..., Any] = torch.ops.chela_bench.linear_attention_backward
    watched = [x for x in (q, k, v, do, d_final) if x is not None]
    if not torch.is_grad_enabled() and is_plain(*watched):
        backward = _backward
    *found, d_initial = backward(
        q, k, v, initial_state, cu_seqlens, states, do, d_final, *ctx.options
    )
    return *found, None if initial_state is None else d_initial


def _differentiate_twice(ctx: Any, *gradients: Tensor | None) -> None:
    raise ArgumentError(
        "wanted first derivatives of linear_attention, got a second one: its backward has no "
        "gradient; use chela_bench.reference.linear_attention, or drop create_graph=True"
    )


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def rows_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Strided as they may be, but for the last axis; and where kernels scheduled by hand copy 16
    bytes at once, from an address that is a multiple of that."""
    rows = [x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous() for x in tensors]
    return tuple(
        [x.clone(memory_format=torch.contiguous_format) if _is_off(x) else x for x in rows]
    )


def _is_off(x: Tensor) -> bool:
    return x.data_ptr() % 16 != 0 and x.dtype == torch.bfloat16 and has_wgmma(x.device)


_FORWARD, _BACKWARD = (f"chela_bench::linear_attention_{way}" for way in ("forward", "backward"))
_library.impl("linear_attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("linear_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(_FORWARD, _forward_outputs, lib=_library)
torch.library.register_fake(_BACKWARD, _backward_outputs, lib=_library)
torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd(_BACKWARD, _differentiate_twice, lib=_library)
