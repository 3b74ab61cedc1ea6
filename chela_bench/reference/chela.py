"""The CHELA layer (arXiv 2406.08128) in plain PyTorch: convolution, linear attention, gates."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chela_bench.errors import ArgumentError
from chela_bench.reference.linear_attention import compute_dtype, linear_attention
from chela_bench.reference.short_long_conv import Order, default_short_sizes, short_long_conv

GateActivation = Literal["sigmoid", "silu"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu}


class ChelaLayer(nn.Module):
    """x [B, T, D] -> y [B, T, D], T <= max_length. K = d_key, V = d_value (2 D unless given).

        X~ = layer_norm(x)                                      [B, T, D]
        Z  = short_long_conv(X~)                                [B, T, D]
        Z' = SiLU(Z W_z + b_z)                                  [B, T, K]
        Q  = a_q * Z' + m_q        K = a_k * Z' + m_k           [B, T, K]
        Vv = SiLU(X~ W_v + b_v)                                 [B, T, V]
        A  = act(Z W_a + b_a)                                   [B, T, V]   act = gate_activation
        M  = norm_rms(linear_attention(Q, K, Vv)) * A           [B, T, V]   one head
        H  = SiLU(Z W_h + M U_h + b_h)                          [B, T, D]
        G  = sigmoid(Z W_o + b_o)                               [B, T, D]
        y  = G * H + (1 - G) * x                                [B, T, D]

    Products with W run in the module's dtype; norms, convolution and attention in float32 (float64
    in a float64 module), then round. norm_rms(h) = h / sqrt(mean(h^2) + eps) has no parameters and
    comes before that rounding, because the attention grows with t and would overflow float16.

    Initialisation, our choice, the paper gives none: each channel sees z of about its input's
    variance (`_init_kernels`); a_q = a_k = 1 and m_q = m_k = 0, since norm_rms cancels their size
    as long as it is far above eps; linears as torch's.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_key: int = 128,
        d_value: int | None = None,
        max_length: int,
        causal: bool = True,
        order: Order = "serial",
        gate_activation: GateActivation = "sigmoid",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if order not in ("serial", "parallel"):
            raise ArgumentError(f"no order {order!r}; it is one of 'serial', 'parallel'")
        if gate_activation not in _ACTIVATIONS:
            raise ArgumentError(
                f"no gate_activation {gate_activation!r}; it is one of 'sigmoid', 'silu'"
            )
        d_value = 2 * d_model if d_value is None else d_value
        self.d_model, self.max_length = d_model, max_length
        self.causal, self.order = causal, order
        self.gate_activation, self.eps = gate_activation, eps
        self.norm = nn.LayerNorm(d_model, eps=eps)
        self.short_kernels = nn.ParameterList(
            nn.Parameter(torch.empty(d_model, width)) for width in default_short_sizes(max_length)
        )
        self.long_kernel = nn.Parameter(torch.empty(d_model, max_length))
        self.long_kernel_future = (
            None if causal else nn.Parameter(torch.empty(d_model, max(1, max_length - 1)))
        )
        self.w_z = nn.Linear(d_model, d_key)
        self.a_q, self.a_k = nn.Parameter(torch.ones(d_key)), nn.Parameter(torch.ones(d_key))
        self.m_q, self.m_k = nn.Parameter(torch.zeros(d_key)), nn.Parameter(torch.zeros(d_key))
        self.w_v = nn.Linear(d_model, d_value)
        self.w_a = nn.Linear(d_model, d_value)
        self.w_h = nn.Linear(d_model, d_model)  # its bias is b_h
        self.u_h = nn.Linear(d_value, d_model, bias=False)
        self.w_o = nn.Linear(d_model, d_model)
        self._init_kernels()

    @torch.no_grad()
    def _init_kernels(self) -> None:
        """Unit energy for the short branches together, and for the long kernel.

        Short taps are white. A long kernel has half its energy in the current token, so that early
        tokens are not starved, and half in white noise under exp(-n / tau): tau runs over the
        channels from 1 to max_length / 4, evenly in log. Two-sided, past and future share the half.
        """
        for kernel in self.short_kernels:
            nn.init.normal_(kernel, std=(len(self.short_kernels) * kernel.shape[1]) ** -0.5)
        D, taps = self.long_kernel.shape
        tau = torch.logspace(0, 1, D, base=max(1.0, taps / 4))[:, None]
        envelope = torch.exp(-torch.arange(taps) / tau)  # [D, max_length]
        for half in (self.long_kernel, self.long_kernel_future):
            if half is not None:
                noise = torch.randn(half.shape) * envelope[:, : half.shape[1]]
                energy = 0.5 if self.causal else 0.25
                half.copy_(F.normalize(noise, dim=1) * energy**0.5)
        self.long_kernel[:, 0] = 0.5**0.5

    def forward(self, x: Tensor) -> Tensor:
        """y [B, T, D] in x's dtype, which is the module's. Raises ArgumentError for a longer T."""
        if x.ndim != 3 or x.shape[2] != self.d_model or x.shape[1] > self.max_length:
            raise ArgumentError(
                f"wanted x [B, T <= {self.max_length}, {self.d_model}], got "
                f"{list(x.shape)}; build the layer with a larger max_length for more tokens"
            )
        dtype = compute_dtype(x)
        weight, bias = self.norm.weight.to(dtype), self.norm.bias.to(dtype)
        normed = F.layer_norm(x.to(dtype), (self.d_model,), weight, bias, self.norm.eps).to(x.dtype)
        z = short_long_conv(
            normed,
            list(self.short_kernels),
            self.long_kernel,
            order=self.order,
            causal=self.causal,
            long_kernel_future=self.long_kernel_future,
        ).to(x.dtype)  # [B, T, D]
        shared = F.silu(self.w_z(z))
        q, k = self.a_q * shared + self.m_q, self.a_k * shared + self.m_k  # [B, T, K]
        v = F.silu(self.w_v(normed))  # [B, T, V]
        o, _ = linear_attention(q[:, :, None], k[:, :, None], v[:, :, None], causal=self.causal)
        m = norm_rms(o[:, :, 0], eps=self.eps).to(x.dtype)  # [B, T, V]
        m = m * _ACTIVATIONS[self.gate_activation](self.w_a(z))
        h = F.silu(self.w_h(z) + self.u_h(m))
        gate = torch.sigmoid(self.w_o(z))
        return gate * h + (1 - gate) * x


def norm_rms(x: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in x's dtype."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
