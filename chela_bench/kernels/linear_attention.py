"""Linear attention without decay, forward, chunked, in one pass over HBM (schedule "fused").

    S_t = S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t          scale = K**-0.5 unless given

q, k [B, T, H, K]; v, o [B, T, H, V]; states [N, H, K, V] float32. For a chunk of tokens Q, K, V and
the state S before it, causal:

    O = (scale * tril(Q K^T)) V + scale * Q S          then          S <- S + K^T V

Two-sided, a first loop sums S over all chunks and a second one reads O = scale * Q S.
Grid (N * H * cdiv(V, BLOCK_V)): a program owns BLOCK_V columns of one head's state, keeps them in
float32 registers, and walks the chunks. The slices of one head are neighbours in the grid: they run
at the same time and find each other's q and k in L2.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.errors import ArgumentError

MAX_K = 256  # S [BLOCK_K, BLOCK_V] has to stay in registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALLOWED_CONFIG = {
    "BLOCK_T": (16, 32, 64, 128, 256),
    "BLOCK_V": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
}


def default_config(K: int, V: int, dtype: torch.dtype) -> dict[str, int]:
    """No spills when compiled for sm_90, but precise=True spills from K = 128 on."""
    wide = K > 128
    upcast = dtype == torch.float32 or (wide and dtype == torch.float16)  # S is a TF32 operand
    return {
        "BLOCK_T": 32 if upcast else 64,
        "BLOCK_V": min(32 if wide else 64, max(16, triton.next_power_of_2(V))),
        "num_warps": 8 if wide and dtype != torch.bfloat16 else 4,
        "num_stages": 2,
    }


def hbm_bytes(shape: Mapping[str, int], config: Mapping[str, int], *, itemsize: int = 2) -> int:
    """Bytes that a forward at shape {B, T, H, K, V} moves between HBM and L2, modelled: the floor.

    No config changes them: a program reads q and k once per V-slice, but the slices of one head run
    side by side, so all but the first read hit L2. Two-sided is the same: q is read in the second
    loop, k and v in the first. An initial or final state would add 4 * N * H * K * V each.
    """
    tokens = shape["B"] * shape["T"] * shape["H"]
    elements = (
        tokens * shape["K"]  # read q
        + tokens * shape["K"]  # read k
        + tokens * shape["V"]  # read v
        + tokens * shape["V"]  # write o
    )
    return elements * itemsize


@triton.jit(do_not_specialize=["T"])
def _linear_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, initial_ptr, final_ptr, cu_seqlens_ptr,  # pointers
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,  # o is contiguous
    scale, T,  # runtime scalars
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,  # dimensions
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,  # tile
    IS_CAUSAL: tl.constexpr, IS_PACKED: tl.constexpr,
    USE_INITIAL_STATE: tl.constexpr, STORE_FINAL_STATE: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,  # of the dots
):  # fmt: skip
    NV: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0).to(tl.int64)
    pid_nh, pid_v = pid // NV, pid % NV
    n, h = pid_nh // H, pid_nh % H
    if IS_PACKED:  # clamped, so that wrong bounds cannot reach outside the tensors
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n + 1).to(tl.int64), 0), T)
        length = (end - start).to(tl.int32)
        b = 0
    else:
        start, length, b = 0, T, n
    q_ptr += b * stride_qb + start * stride_qt + h * stride_qh
    k_ptr += b * stride_kb + start * stride_kt + h * stride_kh
    v_ptr += b * stride_vb + start * stride_vt + h * stride_vh
    o_ptr += ((b * T + start) * H + h) * V

    offs_t = tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = pid_v.to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_k, mask_v = offs_k < K, offs_v < V
    state_offs = pid_nh * K * V + offs_k[:, None] * V + offs_v[None, :]
    state_mask = mask_k[:, None] & mask_v[None, :]
    if USE_INITIAL_STATE:
        state = tl.load(initial_ptr + state_offs, mask=state_mask, other=0.0)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)

    if not IS_CAUSAL:
        for t in range(0, length, BLOCK_T):
            rows, mask_t = (t + offs_t).to(tl.int64), t + offs_t < length
            k_t, v = _load_kv(
                k_ptr, v_ptr, stride_kt, stride_vt, rows, offs_k, offs_v, mask_t, mask_k, mask_v,
                UPCAST,
            )  # fmt: skip
            state += tl.dot(k_t, v, input_precision=PRECISION)

    for t in range(0, length, BLOCK_T):
        rows, mask_t = (t + offs_t).to(tl.int64), t + offs_t < length
        q = tl.load(
            q_ptr + rows[:, None] * stride_qt + offs_k[None, :],
            mask=mask_t[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_T, BLOCK_K]
        if UPCAST:
            q = q.to(tl.float32)
        o = tl.zeros([BLOCK_T, BLOCK_V], dtype=tl.float32)
        if IS_CAUSAL:
            k_t, v = _load_kv(
                k_ptr, v_ptr, stride_kt, stride_vt, rows, offs_k, offs_v, mask_t, mask_k, mask_v,
                UPCAST,
            )  # fmt: skip
            scores = tl.dot(q, k_t, input_precision=PRECISION) * scale  # [BLOCK_T, BLOCK_T]
            scores = tl.where(offs_t[:, None] >= offs_t[None, :], scores, 0.0)
            # Before Q S: in the other order ptxas 12.8, which Triton 3.6 to 3.7.1 bring along,
            # reads a 16-bit v at wrong addresses where it is not pipelined and BLOCK_V < 64 (H100,
            # 2026-11-24; ptxas 13.0 does not).
            o += tl.dot(scores.to(v.dtype), v, input_precision=PRECISION)
        if q.dtype == tl.float16:  # tf32 keeps float16's ten bits; S would overflow float16
            o += tl.dot(q.to(tl.float32), state, input_precision=PRECISION) * scale
        else:
            o += tl.dot(q, state.to(q.dtype), input_precision=PRECISION) * scale
        if IS_CAUSAL:
            state += tl.dot(k_t, v, input_precision=PRECISION)
        tl.store(
            o_ptr + rows[:, None] * (H * V) + offs_v[None, :],
            o.to(o_ptr.dtype.element_ty),
            mask=mask_t[:, None] & mask_v[None, :],
        )

    if STORE_FINAL_STATE:
        tl.store(final_ptr + state_offs, state, mask=state_mask)


@triton.jit
def _load_kv(
    k_ptr, v_ptr, stride_kt, stride_vt, rows, offs_k, offs_v, mask_t, mask_k, mask_v,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """K^T [BLOCK_K, BLOCK_T], read in that shape: it serves Q K^T and K^T V without a tl.trans."""
    k_t = tl.load(
        k_ptr + rows[None, :] * stride_kt + offs_k[:, None],
        mask=mask_k[:, None] & mask_t[None, :],
        other=0.0,
    )
    v = tl.load(
        v_ptr + rows[:, None] * stride_vt + offs_v[None, :],
        mask=mask_t[:, None] & mask_v[None, :],
        other=0.0,
    )  # [BLOCK_T, BLOCK_V]
    if UPCAST:
        k_t, v = k_t.to(tl.float32), v.to(tl.float32)
    return k_t, v


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
    schedule: Literal["auto", "fused"] = "auto",
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = S_{t-1} + k_t v_t^T;  o_t = scale * S_t^T q_t.  Two-sided, every o_t reads the last S.

    q, k [B, T, H, K], K <= 256; v [B, T, H, V]; one dtype of float32, bfloat16, float16. Strides
    are free but for the last axis: a tensor that is strided there is copied first. o [B, T, H, V]
    in that dtype; states [N, H, K, V] float32, the final one only if output_final_state.

    Packed sequences (B = 1) lie between the positions in cu_seqlens [N + 1], int32 or int64, from 0
    to T, never falling; N = B without it. On the CPU its values are checked; on the GPU they are
    not read back, and tokens outside all sequences are left unwritten.

    The state is float32. As an operand it rounds to bfloat16 or, for float32 and float16, to TF32.
    precise=True makes every product three TF32 products: about float32, before o rounds. config
    overrides `default_config` in part or whole. Forward only. Raises ArgumentError.
    """
    _check(q, k, v, initial_state, schedule)
    B, T, H, K = q.shape
    V = v.shape[-1]
    chosen = _config(config, K, V, q.dtype)
    if cu_seqlens is not None:
        cu_seqlens = _check_cu_seqlens(cu_seqlens, q)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is not None:
        initial_state = _check_state(initial_state, (N, H, K, V), q)
    o = q.new_empty(B, T, H, V)
    final = q.new_empty(N, H, K, V, dtype=torch.float32) if output_final_state else None
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    programs = N * H * triton.cdiv(V, chosen["BLOCK_V"])
    if programs == 0 or (T == 0 and final is None):
        return o, final
    with torch.cuda.device_of(q):
        _linear_attention_fwd_kernel[(programs,)](
            q, k, v, o, initial_state, final, cu_seqlens,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            K**-0.5 if scale is None else scale, T,
            H=H, K=K, V=V, BLOCK_K=max(16, triton.next_power_of_2(K)),
            IS_CAUSAL=causal, IS_PACKED=cu_seqlens is not None,
            USE_INITIAL_STATE=initial_state is not None, STORE_FINAL_STATE=final is not None,
            UPCAST=precise, PRECISION="tf32x3" if precise else "tf32",
            **chosen,
        )  # fmt: skip
    return o, final


def _check(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, schedule: str) -> None:
    if schedule not in ("auto", "fused"):
        raise ArgumentError(f"no schedule {schedule!r}: only 'fused' exists so far (and 'auto')")
    inputs = (q, k, v) if initial_state is None else (q, k, v, initial_state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise ArgumentError(
            "wanted inputs without gradient, got one that requires it: the kernel is forward only "
            "so far; use torch.no_grad() or chela_bench.reference.linear_attention"
        )
    if q.ndim != 4 or q.shape != k.shape or v.shape[:-1] != q.shape[:-1]:
        raise ArgumentError(
            "wanted q, k [B, T, H, K] and v [B, T, H, V], got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; repeat shared heads first"
        )
    if not 1 <= q.shape[-1] <= MAX_K:
        raise ArgumentError(
            f"wanted 1 <= K <= {MAX_K}, got K = {q.shape[-1]}; use more heads, or "
            "chela_bench.reference.linear_attention"
        )
    if q.dtype not in DTYPES or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ArgumentError(
            "wanted q, k and v in one of float32, bfloat16, float16, got "
            f"{q.dtype}, {k.dtype}, {v.dtype}; convert them to one"
        )
    if q.device != k.device or q.device != v.device:
        raise ArgumentError(
            f"wanted q, k and v on one device, got {q.device}, {k.device}, {v.device}; move them"
        )
    interpreted = not isinstance(_linear_attention_fwd_kernel, triton.JITFunction)
    if not q.is_cuda and not interpreted:
        raise ArgumentError(
            f"wanted tensors on a GPU, got {q.device}; move them, use "
            "chela_bench.reference.linear_attention, or start Python with TRITON_INTERPRET=1"
        )


def _config(config: Mapping[str, int] | None, K: int, V: int, dtype: torch.dtype) -> dict[str, int]:
    config = {} if config is None else config
    for key, value in config.items():
        if value not in ALLOWED_CONFIG.get(key, ()):
            allowed = "; ".join(f"{key} {values}" for key, values in ALLOWED_CONFIG.items())
            raise ArgumentError(f"no config {key}={value!r}; allowed: {allowed}")
    return {**default_config(K, V, dtype), **config}


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
