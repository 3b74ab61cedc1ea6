"""Linear attention without decay, forward and backward, in Triton.

    S_t = S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t          scale = K**-0.5 unless given

q, k [B, T, H, K]; v, o [B, T, H, V]; states S [N, H, K, V] float32, N sequences (B, or as many as
are packed into one row). Two-sided, every o_t reads the last S. Gradients, with
R_t = R_{t+1} + q_t do_t^T and R beyond the end = d(final state) / scale:

    dq_t = scale * S_t do_t        dk_t = scale * R_t v_t        dv_t = scale * R_t^T k_t
    d(initial state) = scale * R_1

All are walks over chunks of tokens (linear_attention_walk.py); one sweep gives all three gradients
at once (linear_attention_sweep.py), and for a wide V dq and dk come from states that the walks of o
and dv keep (linear_attention_kept.py). On Hopper, in bfloat16, walks and the sweep are scheduled by
hand (linear_attention_hopper.py). Schedules: *fused*, one program walks a head and slice of V from
end to end and HBM sees every tensor once; *split*, segments of the sequence run side by side, after
a first pass over k and v (and q and do) for the states between them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels.dispatch import autocast, is_plain
from chela_bench.kernels.launching import (
    MODELLED,
    cdiv,
    has_wgmma,
    modelled_device,
    on_device_of,
    processors,
)
from chela_bench.kernels.linear_attention_config import (
    MAX_K,
    MAX_V,
    Schedule,
    checked,
    choose_segments,
    keeps,
    options_of,
    suits_kept,
    suits_wgmma,
    walk_config,
)
from chela_bench.kernels.linear_attention_model import (
    Shape,
    best_segments,
    best_training,
    filling_segments,
    sum_pieces,
    swept_pieces,
)
from chela_bench.kernels.linear_attention_ops import (
    eager,
    is_trained,
    rows_contiguous,
)
from chela_bench.kernels.linear_attention_recurrent import _recurrent, recurrent_walk, step
from chela_bench.kernels.linear_attention_walk import (
    Strides,
    Walk,
    _scan,
    _sum,
    _walk,
    walk_plan,
)
from chela_bench.kernels.traffic import Step, name_of, total
from chela_bench.kernels.tuned import tuned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    precise: bool = False,
    schedule: Schedule = "auto",
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = S_{t-1} + k_t v_t^T;  o_t = scale * S_t^T q_t.  Two-sided, every o_t reads the last S.

    q, k [B, T, H, K], K <= 256; v [B, T, H, V], V <= 4096; one dtype of float32, bfloat16, float16
    (under autocast, converted to its dtype). Strides are free but for the last axis: a tensor that
    is strided there is copied first. o [B, T, H, V] in that dtype; states [N, H, K, V] float32, the
    final one only if output_final_state. Differentiable once in q, k, v and initial_state, also
    through the final state.

    Packed sequences (B = 1) lie between the positions in cu_seqlens [N + 1], int32 or int64, from 0
    to T, never falling; N = B without it. On the CPU its values are checked; on the GPU they are
    not read back, and tokens outside all sequences are left unwritten.

    The state is float32. As an operand it rounds to bfloat16 or, for float32 and float16, to TF32:
    blocks of float32 o and gradients are off by 1.7e-3 at most (H100, 65536 tokens). precise=True
    makes every product three TF32 products, 6e-7 there, before o rounds. float16 holds up to 65504:
    where o or a gradient is larger it becomes infinite, and a smaller scale helps. schedule:
    "fused", "split" or "auto". config overrides, in part or whole, the block sizes of all walks
    (BLOCK_T, BLOCK_V, num_warps, num_stages), into how many "segments" the sequence is cut,
    whether the gradients are one "sweep", which has block sizes of its own, or a walk each, whether
    dq and dk come from states that the other walks "keep" (bfloat16 or float32, causal, not packed
    nor precise, K <= 128, V a multiple of 64; elsewhere it says nothing), and whether kernels
    scheduled by hand may run ("wgmma": Hopper, bfloat16, causal, not precise, K, V and strides
    multiples of 16).

    Few kernels serve all sizes: a new T compiles nothing, a new B or H at most another tile of the
    same K and V.

    Source: arXiv 2406.08128, section 3; the schedules and the backward are ours. Raises
    ArgumentError.
    """
    q, k, v = autocast(q, k, v)
    trained = is_trained(q, k, v, initial_state)
    plain = is_plain(q, k, v) and (initial_state is None or is_plain(initial_state))
    resolve = _resolved if plain or not torch.compiler.is_compiling() else _resolved.__wrapped__
    call = resolve(
        (q.shape, q.dtype, q.device), (k.shape, k.dtype, k.device), (v.shape, v.dtype, v.device),
        (q.stride(), k.stride(), v.stride()) if plain else None,
        initial_state is not None, output_final_state,
        None if cu_seqlens is None else max(1, cu_seqlens.numel() - 1),
        None if scale is None else float(scale), causal, precise, schedule,
        None if config is None else tuple(checked(config).items()),
        trained,
    )  # fmt: skip
    if cu_seqlens is not None:
        cu_seqlens = _check_cu_seqlens(cu_seqlens, q)
        call = call._replace(cu_seqlens=cu_seqlens)
    if initial_state is not None:
        initial_state = _check_state(initial_state, (call.N, *q.shape[2:], v.shape[-1]), q)
    if plain:
        return eager(
            q, k, v, initial_state, call, output_final_state=output_final_state, trained=trained
        )
    o, final, _ = torch.ops.chela_bench.linear_attention_forward(
        q, k, v, initial_state, cu_seqlens, call.scale, output_final_state, causal, precise,
        call.segments, call.pieces, call.options,
    )  # fmt: skip
    return o, final if output_final_state else None


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, scale: float | None = None
) -> Tensor:
    """One token: state += k v^T in place, then o = scale * state^T q.

    q, k [B, H, K], K <= 256; v, o [B, H, V], V <= 4096, in one dtype of float32, bfloat16, float16;
    state [B, H, K, V] float32, contiguous. Not differentiable. Raises ArgumentError.
    """
    if q.ndim != 3 or q.shape != k.shape or v.shape[:-1] != q.shape[:-1]:
        raise ArgumentError(
            "wanted q, k [B, H, K] and v [B, H, V], got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; a token has no T axis"
        )
    _check(*(x.unsqueeze(1) for x in (q, k, v)))
    wanted = (*q.shape, v.shape[-1])
    if (
        state.shape != wanted
        or state.dtype != torch.float32
        or state.device != q.device
        or not state.is_contiguous()
    ):
        raise ArgumentError(
            f"state is updated in place: wanted {list(wanted)} in float32, contiguous, on "
            f"{q.device}, got {list(state.shape)} in {state.dtype} on {state.device}, strides "
            f"{list(state.stride())}; keep it as final_state returned it"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, state)):
        raise ArgumentError(
            "a step has no gradient, and an input requires one; use torch.no_grad(), or "
            "linear_attention for training"
        )
    q, k, v = rows_contiguous(q, k, v)
    with on_device_of(q):
        return step(q, k, v, state, q.shape[-1] ** -0.5 if scale is None else float(scale))


def linear_attention_recurrent(
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
    """The same function token by token, without tensor cores: float32 throughout. Forward only.

    For sequences of a few tokens, and as the yardstick that chunks are measured against.
    """
    q, k, v, initial_state, cu_seqlens, N = _prepared(q, k, v, initial_state, cu_seqlens)
    H, K = q.shape[2:]
    if is_trained(q, k, v, initial_state):
        raise ArgumentError(
            "the recurrent form has no gradient, and an input requires one; use "
            "torch.no_grad(), or linear_attention"
        )
    q, k, v = rows_contiguous(q, k, v)
    o = q.new_empty(v.shape)
    final = q.new_empty(N, H, K, v.shape[-1], dtype=torch.float32) if output_final_state else None
    if N * H * v.shape[-1] > 0:
        scale = K**-0.5 if scale is None else float(scale)
        call = Walk(scale, causal, cu_seqlens, N, 1, 1, False, ())
        with on_device_of(q):
            recurrent_walk(q, k, v, o, call, initial=initial_state, final=final)
    return o, final


def hbm_bytes(
    shape: Mapping[str, int], config: Mapping[str, int | str], *, itemsize: int = 2
) -> int:
    """Bytes that a forward's launches move, none of which finds in L2 what another left there."""
    return total(hbm_steps(shape, config, itemsize=itemsize))


def hbm_steps(
    shape: Mapping[str, int], config: Mapping[str, int | str], *, itemsize: int = 2
) -> list[Step]:
    """What each launch of a forward at shape {B, T, H, K, V} reads and writes, modelled.

    One segment: every tensor once. A program reads q and k once per V-slice, but the slices of one
    head run side by side, so all but the first read hit L2. More segments: k and v once more, but
    for the last segment, and a float32 state each, written, read, written again and read. An
    initial or final state would add 4 * N * H * K * V each.
    """
    B, T, H, K, V = (shape[dim] for dim in "BTHKV")
    schedule = str(config.get("schedule", "auto"))
    chosen = tuple((name, int(x)) for name, x in config.items() if name != "schedule")
    dtype, device = MODELLED[itemsize], modelled_device()
    segments, pieces, options = _plan(schedule, chosen, B, H, T, K, V, dtype, device, False)
    keys, values = ((T * H * width, H * width, width, 1) for width in (K, V))
    variant, _, _ = walk_plan(
        torch.Size((B, T, H, K)), V, keys, keys, values, values, dtype, device, 1.0, B, segments,
        pieces, options, False, True, False, None, segments > 1, False, False, False,
    )  # fmt: skip
    row = B * T * H * itemsize
    inputs = {"q": row * K, "k": row * K, "v": row * V}
    output = {"o": row * V}
    walk = name_of(variant.launcher)
    if segments == 1:
        return [Step(walk, inputs, output)]
    states = {"states": 4 * B * H * segments * pieces * K * V}
    again = row * (K + V) * (segments - 1) // segments  # k and v, for the states
    summed = {"k": again * K // (K + V), "v": again - again * K // (K + V)}
    return [
        Step(name_of(_sum), summed, states),
        Step(name_of(_scan), states, states),
        Step(walk, {**inputs, **states}, output),
    ]


def recurrent_hbm_steps(
    shape: Mapping[str, int], config: Mapping[str, int | str], *, itemsize: int = 2
) -> list[Step]:
    """The same of `linear_attention_recurrent`: every tensor once; q and k, read again by each
    slice of columns of V, come from L2."""
    B, T, H, K, V = (shape[dim] for dim in "BTHKV")
    row = B * T * H * itemsize
    inputs = {"q": row * K, "k": row * K, "v": row * V}
    return [Step(name_of(_recurrent), inputs, {"o": row * V})]


def walk_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    trained: bool,
    config: tuple[tuple[str, int], ...] | None = None,
) -> Walk:
    """How `linear_attention` would go about these, which need not be written yet. Raises
    ArgumentError."""
    facts = [(x.shape, x.dtype, x.device) for x in (q, k, v)]
    strides = q.stride(), k.stride(), v.stride()
    call: Walk = _resolved(
        *facts, strides, False, False, None, None, causal, False, "auto", config, trained
    )
    return call


Facts = tuple[torch.Size, torch.dtype, torch.device]


@functools.lru_cache(maxsize=4096)
def _resolved(
    q: Facts,
    k: Facts,
    v: Facts,
    strides: tuple[Strides, Strides, Strides] | None,
    has_initial: bool,
    has_final: bool,
    sequences: int | None,
    scale: float | None,
    causal: bool,
    precise: bool,
    schedule: str,
    config: tuple[tuple[str, int], ...] | None,
    trained: bool,
) -> Walk:
    """A call whose arguments are checked and whose schedule is chosen; remembered, since that takes
    the host longer than a launch. Packed `sequences` are added to it. Where `strides` need no copy,
    it knows how to launch the walk, too."""
    _check_facts(q, k, v)
    (B, T, H, K), dtype, device = q
    N = B if sequences is None else sequences
    tokens = T if sequences is None else T // N
    segments, pieces, options = _plan(
        schedule, config or (), N, H, tokens, K, v[0][-1], dtype, device, trained,
        causal, precise, sequences is not None,
    )  # fmt: skip
    scale = K**-0.5 if scale is None else scale
    call = Walk(scale, causal, None, N, segments, pieces, precise, options)
    V = v[0][-1]
    if strides is None or any(x[-1] != 1 for x in strides):
        return call
    if sequences is not None or N * H * V == 0:
        return call
    has_states = segments > 1 or not causal
    plan = walk_plan(
        q[0], V, *strides, (T * H * V, H * V, V, 1), dtype, device, scale, N, segments, pieces,
        options, precise, causal, False, None, has_initial or has_states,
        has_final and not has_states, False, call.keeps,
    )  # fmt: skip
    return call._replace(forward=plan)


def _plan(
    schedule: str,
    config: tuple[tuple[str, int], ...],
    N: int,
    H: int,
    tokens: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    device: torch.device,
    trained: bool,
    causal: bool = True,
    precise: bool = False,
    packed: bool = False,
) -> tuple[int, int, tuple[int, ...]]:
    """Segments of each sequence, as the config says, or else by the schedule; pieces of them for
    the sums; other options, and on Hopper, where gradients are to come, which way back."""
    asked: dict[str, Any] = dict(config)
    usual = causal and not precise and not packed and schedule == "auto"
    if usual and not asked and not torch.compiler.is_compiling():  # which knows no sizes
        what = {"heads": N * H, "tokens": tokens, "K": K, "V": V, "trained": trained}
        asked = dict(tuned("linear_attention", device, dtype, **what) or {})
        schedule = str(asked.pop("schedule", schedule))
    asked = dict(checked(asked))
    if V > MAX_K and asked.get("sweep") == 0:
        raise ArgumentError(
            f"wanted V <= {MAX_K} for sweep=0, since a walk for dq takes V as its keys, got "
            f"V = {V}; leave sweep out"
        )
    suits = has_wgmma(device) and causal and not precise and N * H * V > 0
    suits = suits and suits_wgmma(options_of(asked), K, dtype)
    wanted = asked.pop("keep", int(suits and V > MAX_K and "sweep" not in asked))
    keep = wanted == 1 and trained and causal and not precise and not packed
    if keep and suits_kept(K, V, dtype):
        asked["keep"] = 1
    options = options_of(asked)
    available = processors(device)
    slices = cdiv(V, walk_config(options, K, V, dtype)["BLOCK_V"])
    segments = choose_segments(
        schedule, sequences=N, heads=H, tokens=tokens, slices=slices, processors=available
    )
    segments = asked.get("segments", segments)
    if not suits:
        return segments, 1, options
    x = Shape(N * H, tokens, K, V, available)
    if torch.compiler.is_compiling():
        if schedule == "auto":
            segments = asked.get("segments", filling_segments(N * H, tokens, V, available))
    elif not trained or packed or keeps(options):
        segments = asked.get("segments", best_segments(schedule, x))
    else:
        segments, sweep = best_training(schedule, x, segments=asked.get("segments"))
        options = options_of({"sweep": int(sweep), **asked})
    pieces = swept_pieces if trained and not keeps(options) else sum_pieces
    return segments, pieces(x, segments), options


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int]:
    """The arguments, checked and in the dtype of autocast, and the number of sequences."""
    q, k, v = autocast(q, k, v)
    _check(q, k, v)
    if cu_seqlens is not None:
        cu_seqlens = _check_cu_seqlens(cu_seqlens, q)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        initial_state = _check_state(initial_state, (N, *q.shape[2:], v.shape[-1]), q)
    return q, k, v, initial_state, cu_seqlens, N


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check_facts(*[(x.shape, x.dtype, x.device) for x in (q, k, v)])


def _check_facts(*facts: Facts) -> None:
    """Of q, k and v: shape, dtype and device."""
    (q, k, v), dtypes, devices = zip(*facts, strict=True)
    if len(q) != 4 or q != k or v[:-1] != q[:-1]:
        raise ArgumentError(
            "wanted q, k [B, T, H, K] and v [B, T, H, V], got "
            f"q {list(q)}, k {list(k)}, v {list(v)}; repeat shared heads first"
        )
    if not 1 <= q[-1] <= MAX_K or v[-1] > MAX_V:
        raise ArgumentError(
            f"wanted 1 <= K <= {MAX_K} and V <= {MAX_V}, got K = {q[-1]}, V = {v[-1]}; use more "
            "heads, or chela_bench.reference.linear_attention"
        )
    if dtypes[0] not in DTYPES or len(set(dtypes)) > 1:
        raise ArgumentError(
            "wanted q, k and v in one of float32, bfloat16, float16, got "
            f"{', '.join(map(str, dtypes))}; convert them to one"
        )
    if len(set(devices)) > 1:
        raise ArgumentError(
            f"wanted q, k and v on one device, got {', '.join(map(str, devices))}; move them"
        )
    if not _walk.runs_on(devices[0]):
        raise ArgumentError(
            f"wanted tensors on a GPU, got {devices[0]}; move them, use "
            "chela_bench.reference.linear_attention, or start Python with TRITON_INTERPRET=1"
        )


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> Tensor:
    B, T = q.shape[:2]
    if B != 1:
        raise ArgumentError(
            f"packed sequences share one row: wanted B = 1, got B = {B}; "
            "pass q.flatten(0, 1)[None] and so on"
        )
    integer = cu_seqlens.dtype in (torch.int32, torch.int64)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or not integer:
        raise ArgumentError(
            "wanted cu_seqlens [N + 1], N >= 1, in int32 or int64, got "
            f"{list(cu_seqlens.shape)} in {cu_seqlens.dtype}; pass [0, *cumsum(lengths)]"
        )
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
            raise ArgumentError(
                f"wanted cu_seqlens that start at 0, never fall and end at T = {T}, "
                f"got {bounds}; pass [0, *cumsum(lengths)]"
            )
    return cu_seqlens.to(q.device).contiguous()


def _check_state(state: Tensor, wanted: tuple[int, ...], q: Tensor) -> Tensor:
    if state.shape != wanted or state.dtype != torch.float32 or state.device != q.device:
        raise ArgumentError(
            f"wanted initial_state [N, H, K, V] = {list(wanted)} in float32 on {q.device}, got "
            f"{list(state.shape)} in {state.dtype} on {state.device}; pass final_state as it came"
        )
    return state.contiguous()
