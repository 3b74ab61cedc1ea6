"""The ops and their implementations: what is measured, by what, against which oracle.

Data only: functions are named ("module:function") and imported by the worker, so that listing
and planning need no torch. Adding an op touches five places: kernels/x.py, reference/x.py,
tests/test_x.py, one Op(...) here, its shapes in bench.toml. Other distributions add theirs through
an entry point: see registry.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from chela_bench.bench import models
from chela_bench.errors import UsageError
from chela_bench.records import DTYPES, Direction, DType

FEWEST_FOR_GRADIENTS = 16  # tokens
AUTOGRAD: tuple[Direction, ...] = ("fwd", "bwd", "fwdbwd")


@dataclass(frozen=True)
class Impl:
    """One implementation of an op, called as `function(*inputs, **options, **config)`."""

    name: str
    target: str  # "package.module:function", or "/path/to/file.py:function"
    summary: str
    directions: tuple[Direction, ...] = AUTOGRAD
    devices: tuple[str, ...] = ("cpu", "cuda")
    cuda_dtypes: tuple[DType, ...] = DTYPES
    axes: tuple[str, ...] | None = ()  # configuration it takes; None: any (a user's function)
    growth: float = 1.0  # time ~ T**growth, to estimate a call before it is tried
    fp32_operands: Literal["fp32", "tf32"] = "fp32"  # what its matrix products round fp32 to
    requires: str | None = None  # an importable module beyond the core dependencies
    install: str | None = None  # the command that brings it
    compiled: bool = False  # torch.compile: recompiles when deterministic mode is toggled
    triton: bool = False  # by Triton kernels alone: an atlas can tell what it launches
    # Forward: a formula of the shape and an element's bytes; or "module:function" of
    # kernels/traffic.py's steps, called as function(shape, options and config, itemsize=).
    hbm_bytes: Callable[[models.Shape, int], int] | str | None = None
    # Direction decode: "module:function", called as function(prompt [B, P, D], max_length, *inputs
    # but x, **config); returns step and a cache that copy.deepcopy copies; step(x [B, D], cache)
    # -> y [B, D].
    decoder: str | None = None
    step_hbm_bytes: Callable[[models.Shape, int], int] | None = None

    def missing(self) -> str | None:
        """What is not installed and the command that brings it, or None."""
        if self.requires is not None and importlib.util.find_spec(self.requires) is None:
            return f"{self.requires} is not installed: {self.install}"
        return None

    def unavailable(
        self,
        device: str,
        *,
        dtype: DType | None = None,
        direction: Direction | None = None,
        tokens: int | None = None,
    ) -> str | None:
        """Why it cannot run, or not be judged, on this kind of device ("cpu", "cuda"); or None."""
        if device not in self.devices:
            return "needs a GPU" if device == "cpu" else "runs on the CPU alone"
        if direction is not None and direction not in self.directions:
            return f"{self.name} has no {direction}; it has: {', '.join(self.directions)}"
        if device == "cuda" and dtype is not None and dtype not in self.cuda_dtypes:
            return f"{self.name} takes no {dtype} on a GPU; it takes: {', '.join(self.cuda_dtypes)}"
        if direction == "decode":
            return "T < 2: no token comes after another" if tokens == 1 else self.missing()
        if direction not in (None, "fwd") and tokens is not None and tokens < FEWEST_FOR_GRADIENTS:
            return f"T < {FEWEST_FOR_GRADIENTS}: gradients of so few tokens cancel, no budget holds"
        return self.missing()


@dataclass(frozen=True)
class Op:
    """One function: its shapes, its inputs, its oracle, its lower bounds, who computes it."""

    name: str
    summary: str
    dims: tuple[str, ...]
    inputs: str  # "module:function" that draws the inputs
    oracle: str  # "module:function", given float64 inputs
    output_kind: Literal["tokens", "channels", "rows"]
    roundings: Mapping[str, int]  # operand and output roundings in a row, per direction
    compulsory_bytes: Callable[[models.Shape, int, str], models.Bytes]
    flops: Callable[[models.Shape, str], int]
    impls: tuple[Impl, ...]
    parameters: Callable[[models.Shape], int] | None = None  # of a layer
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # first is the default
    shapes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # beside bench.toml's

    @property
    def decodes(self) -> bool:
        """Whether it has a step: bytes and FLOPs of one, and inputs that begin with x [B, T, D]."""
        return "decode" in self.roundings

    def impl(self, name: str) -> Impl:
        for impl in self.impls:
            if impl.name == name:
                return impl
        raise UsageError(
            f"no implementation {name!r} of {self.name}; it has: "
            f"{', '.join(impl.name for impl in self.impls)} (or path/to/file.py:function)"
        )


_KERNELS = "chela_bench.kernels"
_REFERENCE = "chela_bench.reference"
_ADAPTERS = "chela_bench.bench.adapters"
_ORACLES = "chela_bench.bench.oracles"
_PEERS = "chela_bench.bench.peers"
_INPUTS = "chela_bench.bench.inputs"

# Roundings in a row: forward rounds the chunk's scores, the state operand and the output; backward
# adds do's products. Each costs at most half a spacing (bench/check.py).
_ATTENTION_ROUNDINGS = {"fwd": 3, "bwd": 4, "fwdbwd": 4}


def _fla(
    name: str,
    function: str,
    hbm_bytes: Callable[[models.Shape, int], int],
    fp32_operands: Literal["fp32", "tf32"],
) -> Impl:
    return Impl(
        name,
        f"{_PEERS}:{name}",
        f"flash-linear-attention's {function}",
        devices=("cuda",),
        fp32_operands=fp32_operands,
        requires="fla",
        install="pip install -e '.[peers]' in the checkout",
        hbm_bytes=hbm_bytes,
    )


def _softmax_layer(name: str, summary: str, *, decodes_alone: bool = False, **more: Any) -> Impl:
    """One whose step keeps keys and values; what decodes alone names the reference as its layer."""
    layer = f"{_ADAPTERS}:reference_softmax_layer" if decodes_alone else f"{_PEERS}:{name}_layer"
    return Impl(
        name,
        layer,
        summary,
        directions=("decode",) if decodes_alone else (*AUTOGRAD, "decode"),
        decoder=f"{_PEERS}:{name}_decoder",
        step_hbm_bytes=models.softmax_step_hbm_bytes,
        **more,
    )


OPS: tuple[Op, ...] = (
    Op(
        name="linear_attention",
        summary="S_t = S_{t-1} + k_t v_t^T;  o_t = scale * S_t^T q_t",
        dims=("B", "T", "H", "K", "V"),
        inputs=f"{_INPUTS}:attention",
        oracle=f"{_REFERENCE}.linear_attention:chunked",
        output_kind="tokens",
        roundings=_ATTENTION_ROUNDINGS,
        compulsory_bytes=models.linear_attention_bytes,
        flops=models.linear_attention_flops,
        impls=(
            Impl(
                "naive_cumsum",
                f"{_ADAPTERS}:naive_cumsum",
                "reference: cumulative sum of k v^T, materialised",
                hbm_bytes=models.naive_cumsum_hbm_bytes,
            ),
            Impl(
                "quadratic",
                f"{_ADAPTERS}:quadratic",
                "reference: ((q k^T) * mask) v",
                growth=2.0,
                hbm_bytes=models.quadratic_hbm_bytes,
            ),
            Impl("recurrent", f"{_ADAPTERS}:recurrent", "reference: a loop over tokens"),
            Impl("chunked", f"{_ADAPTERS}:chunked", "reference: chunks of 64 tokens, vectorised"),
            Impl(
                "triton_chunked",
                f"{_ADAPTERS}:triton_chunked",
                "Triton: walks over chunks, the state in registers; schedule fused or split",
                triton=True,
                devices=("cuda",),
                axes=(
                    "schedule",
                    "segments",
                    "sweep",
                    "wgmma",
                    "keep",
                    "BLOCK_T",
                    "BLOCK_V",
                    "num_warps",
                    "num_stages",
                ),
                fp32_operands="tf32",
                hbm_bytes=f"{_KERNELS}.linear_attention:hbm_steps",
            ),
            Impl(
                "triton_recurrent",
                f"{_ADAPTERS}:triton_recurrent",
                "Triton, token by token, in float32",
                triton=True,
                directions=("fwd",),
                devices=("cuda",),
                hbm_bytes=f"{_KERNELS}.linear_attention:recurrent_hbm_steps",
            ),
            _fla("fla_chunk", "chunk_linear_attn", models.fla_chunk_hbm_bytes, "tf32"),
            _fla(
                "fla_fused_chunk",
                "fused_chunk_linear_attn",
                models.fla_fused_chunk_hbm_bytes,
                "tf32",
            ),
            _fla(
                "fla_recurrent",
                "fused_recurrent_linear_attn",
                models.fla_recurrent_hbm_bytes,
                "fp32",
            ),
            Impl(
                "compiled_chunked",
                f"{_PEERS}:compiled_chunked",
                "torch.compile of the reference's chunked",
                directions=("fwd", "fwdbwd"),  # compiled graphs free what a second bwd would read
                compiled=True,
            ),
        ),
    ),
    Op(
        name="softmax_attention",
        summary="o = softmax(scale * q k^T, causal) v: another function, for comparison",
        dims=("B", "T", "H", "K", "V"),
        inputs=f"{_INPUTS}:softmax_attention",
        oracle=f"{_REFERENCE}.softmax_attention:softmax_attention",
        output_kind="tokens",
        roundings=_ATTENTION_ROUNDINGS,
        compulsory_bytes=models.linear_attention_bytes,  # the same tensors in and out
        flops=models.softmax_attention_flops,
        impls=(
            Impl(
                "sdpa_flash",
                f"{_PEERS}:sdpa_flash",
                "torch's scaled_dot_product_attention, flash backend",
                growth=2.0,
                cuda_dtypes=("bf16", "fp16"),
                hbm_bytes=models.flash_hbm_bytes,
            ),
        ),
    ),
    Op(
        name="short_long_conv",
        summary="Z = K_long * SiLU((sum K_short) * X), or (sum K_short + K_long) * X",
        dims=("B", "T", "D"),
        inputs=f"{_INPUTS}:short_long_conv",
        oracle=f"{_REFERENCE}.short_long_conv:short_long_conv",
        output_kind="channels",
        # Two short branches and their two sums, the activation, the output; backward, dz's and
        # the activation's derivative besides.
        roundings={"fwd": 6, "bwd": 8, "fwdbwd": 8},
        compulsory_bytes=models.short_long_conv_bytes,
        flops=models.short_long_conv_flops,
        options={"order": ("serial", "parallel")},
        impls=(
            Impl(
                "direct",
                f"{_ADAPTERS}:direct_conv",
                "reference: depthwise conv1d, T^2 work",
                growth=2.0,
            ),
            Impl("fft", f"{_ADAPTERS}:fft_conv", "reference: zero-padded FFT in float32"),
            Impl(
                "torch_rfft",
                f"{_PEERS}:torch_rfft",
                "what a user writes today: conv1d, SiLU, rfft of length 2T, channel-major",
            ),
            Impl(
                "triton",
                f"{_ADAPTERS}:triton_conv",
                "Triton: short kernels and transpose in one pass, the long one by matrix products",
                triton=True,
                devices=("cuda",),
                axes=("method", "N2"),
                hbm_bytes=f"{_KERNELS}.short_long_conv_traffic:short_long_conv_steps",
            ),
        ),
    ),
    Op(
        name="long_conv",
        summary="Z = K_long * X, channel-major: the long convolution alone",
        dims=("B", "T", "D"),
        inputs=f"{_INPUTS}:long_conv",
        oracle=f"{_ORACLES}:long_conv",
        output_kind="rows",
        # The operands of four products and the output.
        roundings={"fwd": 2, "bwd": 2, "fwdbwd": 2},
        compulsory_bytes=models.long_conv_bytes,
        flops=models.long_conv_flops,
        impls=(
            Impl("fft", f"{_ADAPTERS}:fft_long_conv", "reference: zero-padded FFT in float32"),
            Impl(
                "torch_rfft",
                f"{_PEERS}:rfft_long_conv",
                "what a user writes today: rfft of length 2T",
            ),
            Impl(
                "triton",
                f"{_ADAPTERS}:triton_long_conv",
                "Triton: transforms as matrix products; without gradients the spectrum is kept",
                triton=True,
                devices=("cuda",),
                axes=("spectrum", "method", "N2"),
                hbm_bytes=f"{_KERNELS}.short_long_conv_traffic:long_conv_steps",
            ),
        ),
    ),
    Op(
        name="reparameterization",
        summary="short_long_conv with its short branches apart, and merged before the first call",
        dims=("B", "T", "D"),
        inputs=f"{_INPUTS}:short_long_conv",
        oracle=f"{_REFERENCE}.short_long_conv:short_long_conv",
        output_kind="channels",
        roundings={"fwd": 8, "bwd": 8, "fwdbwd": 8},  # every branch and every sum of two
        compulsory_bytes=models.short_long_conv_bytes,
        flops=models.short_long_conv_flops,
        options={"order": ("serial", "parallel")},
        impls=(
            Impl(
                "torch_unmerged",
                f"{_PEERS}:torch_rfft",
                "conv1d for each branch, then rfft",
                directions=("fwd",),
            ),
            Impl(
                "torch_merged",
                f"{_PEERS}:torch_merged",
                "one conv1d, or none, then rfft",
                directions=("fwd",),
            ),
            Impl(
                "triton_unmerged",
                f"{_ADAPTERS}:triton_unmerged",
                "Triton: a kernel for each branch, and sums",
                triton=True,
                directions=("fwd",),
                devices=("cuda",),
                hbm_bytes=f"{_KERNELS}.short_long_conv_traffic:unmerged_steps",
            ),
            Impl(
                "triton_merged",
                f"{_ADAPTERS}:triton_merged",
                "Triton: one short kernel, or none; the spectrum kept",
                triton=True,
                directions=("fwd",),
                devices=("cuda",),
                hbm_bytes=f"{_KERNELS}.short_long_conv_traffic:merged_steps",
            ),
        ),
    ),
    Op(
        name="chela_layer",
        summary="the CHELA layer: short-long convolution, linear attention, gates, residual",
        dims=("B", "T", "D", "K", "V"),
        inputs=f"{_INPUTS}:chela_layer",
        oracle=f"{_ORACLES}:chela_layer",  # for `reference` itself, this checks rounding alone
        output_kind="tokens",
        # norm, conv, Z', Q/K, V, G_a, M, its gated product, two sums of H, its SiLU, G_o, Y; the
        # way back passes the same steps again.
        roundings={"fwd": 12, "bwd": 24, "fwdbwd": 24, "decode": 12},
        compulsory_bytes=models.chela_layer_bytes,
        flops=models.chela_layer_flops,
        parameters=models.chela_layer_parameters,
        impls=(
            Impl(
                "reference",
                f"{_ADAPTERS}:reference_layer",
                "reference module, default switches; a step computes all tokens anew",
                directions=(*AUTOGRAD, "decode"),
                decoder=f"{_ADAPTERS}:reference_chela_decoder",
            ),
            Impl(
                "chela",
                f"{_ADAPTERS}:fused_layer",
                "Triton: convolution, attention and gates fused; matrix products by cuBLAS",
                triton=True,
                directions=(*AUTOGRAD, "decode"),
                devices=("cuda",),
                fp32_operands="tf32",
                hbm_bytes=f"{_KERNELS}.chela_traffic:layer_steps",
                decoder=f"{_ADAPTERS}:chela_decoder",
                step_hbm_bytes=models.chela_step_hbm_bytes,
            ),
            Impl(
                "chela_merged",
                f"{_ADAPTERS}:merged_layer",
                "Triton, to infer with: short kernels merged, they and the spectrum kept",
                triton=True,
                directions=("fwd",),  # a step always merges
                devices=("cuda",),
                fp32_operands="tf32",
                hbm_bytes=f"{_KERNELS}.chela_traffic:merged_layer_steps",
            ),
            Impl(
                "composed",
                f"{_PEERS}:composed_layer",
                "what a user writes today: torch's rfft and fla's chunk_linear_attn",
                devices=("cuda",),
                fp32_operands="tf32",
                requires="fla",
                install="pip install -e '.[peers]' in the checkout",
            ),
        ),
    ),
    Op(
        name="softmax_layer",
        summary="a layer of softmax attention with heads of 128: another function, for comparison",
        dims=("B", "T", "D"),
        inputs=f"{_INPUTS}:softmax_layer",
        oracle=f"{_ADAPTERS}:reference_softmax_layer",
        output_kind="tokens",
        # norm, q, k, v, p, o, its product, y; the way back passes the same steps again.
        roundings={"fwd": 8, "bwd": 16, "fwdbwd": 16, "decode": 8},
        compulsory_bytes=models.softmax_layer_bytes,
        flops=models.softmax_layer_flops,
        parameters=models.softmax_layer_parameters,
        impls=(
            Impl(
                "reference",
                f"{_ADAPTERS}:reference_softmax_layer",
                "reference module, a step with a cache of keys and values",
                directions=("decode",),
                decoder=f"{_ADAPTERS}:softmax_decoder",
            ),
            _softmax_layer(
                "sdpa_flash",
                "torch's matrix products and scaled_dot_product_attention, flash backend",
                growth=2.0,
                cuda_dtypes=("bf16", "fp16"),
            ),
            _softmax_layer(
                "sdpa_cudnn",
                "the same, cuDNN backend",
                devices=("cuda",),
                growth=2.0,
                cuda_dtypes=("bf16", "fp16"),
            ),
            _softmax_layer(
                "sdpa_efficient",
                "the same, memory-efficient backend",
                decodes_alone=True,
                devices=("cuda",),
                fp32_operands="tf32",
            ),
            _softmax_layer(
                "products",
                "one query's two products and softmax in the inputs' dtype, by torch.matmul",
                decodes_alone=True,
            ),
        ),
    ),
)


def user_impl(name: str, target: str) -> Impl:
    """A user's function as an implementation: nothing is assumed of it but the call."""
    return Impl(
        name, target, f"user's function {target}", axes=None, fp32_operands="tf32", triton=True
    )
