"""Other people's implementations under the bench's calling convention (see adapters.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chela_bench.bench.adapters import Decoder, kept, softmax_decoder, softmax_layer
from chela_bench.reference.linear_attention import chunked
from chela_bench.reference.short_long_conv import Order, reparameterize


def fla_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fla's chunk_linear_attn without its softmax-like denominator, which is the same function."""
    from fla.ops.linear_attn import chunk_linear_attn

    output: Tensor = chunk_linear_attn(q, k, v, normalize=False)[0]
    return output


def fla_fused_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fla's fused_chunk_linear_attn: one kernel, the state in registers."""
    from fla.ops.linear_attn import fused_chunk_linear_attn

    output: Tensor = fused_chunk_linear_attn(q, k, v, normalize=False)[0]
    return output


def fla_recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fla's fused_recurrent_linear_attn: token by token in one kernel."""
    from fla.ops.linear_attn import fused_recurrent_linear_attn

    output: Tensor = fused_recurrent_linear_attn(q, k, v, normalize=False)[0]
    return output


def compiled_chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch.compile of the reference, compiled anew for every shape: nothing is left dynamic."""
    output: Tensor = _compiled()(q, k, v)
    return output


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    torch._dynamo.config.recompile_limit = 256  # every length compiles once; by default 8 may

    def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunked(q, k, v)[0].to(q.dtype)

    return torch.compile(rounded, fullgraph=True, dynamic=False)


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal flash attention on [B, H, T, K] views of the [B, T, H, K] inputs, no copies."""
    return _causal(q, k, v, SDPBackend.FLASH_ATTENTION)


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by cuDNN's attention."""
    return _causal(q, k, v, SDPBackend.CUDNN_ATTENTION)


def sdpa_flash_layer(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    return softmax_layer(x, parameters, sdpa_flash)


def sdpa_cudnn_layer(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    return softmax_layer(x, parameters, sdpa_cudnn)


def sdpa_flash_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One token's q [B, H, K], all of a cache's k, v [B, H, L, K]: nothing is masked."""
    return _step(q, k, v, SDPBackend.FLASH_ATTENTION)


def sdpa_cudnn_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _step(q, k, v, SDPBackend.CUDNN_ATTENTION)


def sdpa_efficient_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _step(q, k, v, SDPBackend.EFFICIENT_ATTENTION)


def products_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same without a kernel of its own: scores and weights are rounded to q's dtype."""
    scores = (q * q.shape[-1] ** -0.5)[:, :, None] @ k.mT
    return (torch.softmax(scores, dim=-1) @ v).squeeze(2)


def sdpa_flash_decoder(x: Tensor, max_length: int, parameters: dict[str, Tensor]) -> Decoder:
    return softmax_decoder(x, max_length, parameters, sdpa_flash_step)


def sdpa_cudnn_decoder(x: Tensor, max_length: int, parameters: dict[str, Tensor]) -> Decoder:
    return softmax_decoder(x, max_length, parameters, sdpa_cudnn_step)


def sdpa_efficient_decoder(x: Tensor, max_length: int, parameters: dict[str, Tensor]) -> Decoder:
    return softmax_decoder(x, max_length, parameters, sdpa_efficient_step)


def products_decoder(x: Tensor, max_length: int, parameters: dict[str, Tensor]) -> Decoder:
    return softmax_decoder(x, max_length, parameters, products_step)


def _causal(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        output = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
    return output.transpose(1, 2)


def _step(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q[:, :, None], k, v).squeeze(2)


def composed_layer(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """The CHELA layer of what there is: torch's rfft and conv1d, fla's chunk_linear_attn, torch's
    matrix products and pointwise operators, eager."""
    p = parameters
    shorts = [p[name] for name in sorted(p) if name.startswith("short_kernels.")]

    def linear(u: Tensor, name: str) -> Tensor:
        return F.linear(u, p[f"{name}.weight"], p.get(f"{name}.bias"))

    normed = F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"])
    z = torch_rfft(normed, shorts, p["long_kernel"], order="serial")
    shared = F.silu(linear(z, "w_z"))
    q, k = p["a_q"] * shared + p["m_q"], p["a_k"] * shared + p["m_k"]
    v = F.silu(linear(normed, "w_v"))
    o = fla_chunk(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]
    m = F.rms_norm(o.float(), o.shape[-1:], eps=1e-5).to(x.dtype)
    m = m * torch.sigmoid(linear(z, "w_a"))
    h = F.silu(linear(z, "w_h") + linear(m, "u_h"))
    gate = torch.sigmoid(linear(z, "w_o"))
    return gate * h + (1 - gate) * x


def torch_rfft(
    x: Tensor, short_kernels: Sequence[Tensor], long_kernel: Tensor, *, order: str
) -> Tensor:
    """Depthwise conv1d, SiLU, then rfft of length 2T in float32, all channel-major [B, D, T]."""
    tokens = x.shape[1]
    u = x.mT.contiguous()  # [B, D, T]
    short = u
    for kernel in short_kernels:
        taps = kernel.flip(-1).unsqueeze(1)  # conv1d correlates: tap 0 comes last
        padded = F.pad(u, (kernel.shape[-1] - 1, 0))
        short = short + F.conv1d(padded, taps, groups=x.shape[-1])
    if order == "serial":
        z = _rfft_conv(F.silu(short), long_kernel, tokens)
    else:
        z = short + _rfft_conv(u, long_kernel, tokens)
    return z.to(x.dtype).mT.contiguous()


def torch_merged(
    x: Tensor, short_kernels: Sequence[Tensor], long_kernel: Tensor, *, order: Order
) -> Tensor:
    """torch_rfft with its branches merged before the first call."""

    def merge() -> tuple[Tensor | None, Tensor]:
        return reparameterize(list(short_kernels), long_kernel.float(), order=order)

    short, long = kept(long_kernel, ("torch", order), merge, *short_kernels)
    tokens = x.shape[1]
    u = x.mT.contiguous()
    if short is not None:
        taps = short.to(x.dtype).flip(-1).unsqueeze(1)
        u = F.silu(F.conv1d(F.pad(u, (short.shape[-1] - 1, 0)), taps, groups=x.shape[-1]))
    return _rfft_conv(u, long, tokens).to(x.dtype).mT.contiguous()


def rfft_long_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """rfft of length 2T in float32, channel-major."""
    return _rfft_conv(x, kernel, x.shape[-1]).to(x.dtype)


def _rfft_conv(u: Tensor, kernel: Tensor, tokens: int) -> Tensor:
    spectrum = torch.fft.rfft(kernel.float(), n=2 * tokens)
    product = torch.fft.rfft(u.float(), n=2 * tokens) * spectrum
    z: Tensor = torch.fft.irfft(product, n=2 * tokens)
    return z[..., :tokens]
