"""The CHELA layer and block (arXiv 2406.08128) in plain PyTorch: convolution, attention, gates."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chela_bench.errors import ArgumentError
from chela_bench.reference.chela_decode import ChelaCache, HistoryCache, check_decoding
from chela_bench.reference.linear_attention import compute_dtype, linear_attention
from chela_bench.reference.long_kernels import (
    LongKernelForm,
    init_long_kernels,
    new_long_kernel,
    taps_of,
)
from chela_bench.reference.short_long_conv import (
    Order,
    default_short_sizes,
    short_conv,
    short_long_conv,
)

Projection = Literal["shared", "none"]
GateActivation = Literal["sigmoid", "silu"]
Norm = Literal["layer", "rms"]
NormPosition = Literal["before", "after"]
FeedForwardActivation = Literal["silu", "gelu"]

_NORMS: dict[str, type[nn.LayerNorm | nn.RMSNorm]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
}


class ChelaLayer(nn.Module):
    """x [B, T, D] -> y [B, T, D], T <= max_length. K = d_key (128), V = d_value (2 D unless given).

        X~ = norm(x)                                            [B, T, D]
        Z  = short_long_conv(X~)                                [B, T, D]
        Z' = SiLU(Z W_z + b_z)                                  [B, T, K]
        Q  = a_q * Z' + m_q        K = a_k * Z' + m_k           [B, T, K]
        Vv = SiLU(X~ W_v + b_v)                                 [B, T, V]
        A  = act(Z W_a + b_a)                                   [B, T, V]   act = gate_activation
        M  = norm_rms(linear_attention(Q, K, Vv)) * A           [B, T, V]
        H  = dropout(SiLU(Z W_h + M U_h + b_h))                 [B, T, D]
        G  = sigmoid(Z W_o + b_o)                               [B, T, D]
        y  = G * H + (1 - G) * x                                [B, T, D]

    What may differ from that, and its parameters go with it:

        projection="none"        Z' = Z, so K = D; a d_key that is not D is refused
        num_heads                Q, K, Vv are cut into heads of K / num_heads and V / num_heads
        attention_gate=False     M = norm_rms(linear_attention(Q, K, Vv))
        output_gate=False        y = H + x
        norm="rms"               torch's rms_norm with a weight, in place of layer_norm
        norm_position="after"    X~ = x and norm(y) for y, Mega's post-norm (arXiv 2209.10655)
        short_sizes              widths of the short kernels; () leaves their unit tap alone:
                                 Z = K_long * SiLU(X~) if serial, X~ + K_long * X~ if parallel
        long_kernel="multiscale" `MultiscaleKernel`: parameters grow with log(max_length)

    Products with W run in the module's dtype, or torch.autocast's; norms, convolution and attention
    in float32 (float64 in a float64 module), then round. norm_rms(h) = h / sqrt(mean(h^2) + eps)
    has no parameters and comes before that rounding, because the attention grows with t and would
    overflow float16. Its mean runs over all V, the heads together: one scale a row commutes with
    the product by U_h.

    Initialisation, our choice, the paper gives none: each channel sees z of about its input's
    variance (short taps white, of unit energy together; `init_long_kernels`); a_q = a_k = 1 and
    m_q = m_k = 0, since norm_rms cancels their size as long as it is far above eps; linears and
    norms as torch's.

    torch.compile(fullgraph=True) takes it whole, anew for each T, on which its FFT's length
    depends: PyTorch refuses a ninth, unless torch._dynamo.config.recompile_limit is raised.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_key: int | None = None,
        d_value: int | None = None,
        max_length: int,
        causal: bool = True,
        order: Order = "serial",
        projection: Projection = "shared",
        num_heads: int = 1,
        gate_activation: GateActivation = "sigmoid",
        attention_gate: bool = True,
        output_gate: bool = True,
        norm: Norm = "layer",
        norm_position: NormPosition = "before",
        short_sizes: Sequence[int] | None = None,
        long_kernel: LongKernelForm = "explicit",
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        """Raises ArgumentError for an unknown option or sizes that do not fit each other."""
        super().__init__()
        _check_option("order", order, Order)
        _check_option("projection", projection, Projection)
        _check_option("gate_activation", gate_activation, GateActivation)
        _check_option("norm", norm, Norm)
        _check_option("norm_position", norm_position, NormPosition)
        _check_option("long_kernel", long_kernel, LongKernelForm)
        if max_length < 1:
            raise ArgumentError(
                f"max_length is a number of tokens, got {max_length}; pass 1 or more"
            )
        widths = default_short_sizes(max_length) if short_sizes is None else tuple(short_sizes)
        _check_widths(widths, causal=causal)
        K = _key_width(d_model, d_key, projection)
        V = 2 * d_model if d_value is None else d_value
        _check_heads(num_heads, K, V)
        if not 0 <= dropout < 1:
            raise ArgumentError(f"wanted 0 <= dropout < 1, got {dropout}; 0 leaves it out")

        self.d_model, self.max_length, self.num_heads = d_model, max_length, num_heads
        self.causal, self.order, self.norm_position = causal, order, norm_position
        self.gate_activation, self.eps = gate_activation, eps
        self.norm = _NORMS[norm](d_model, eps=eps)
        self.dropout = nn.Dropout(dropout)

        self.short_kernels = nn.ParameterList(
            nn.Parameter(torch.empty(d_model, width)) for width in widths
        )
        self.long_kernel = new_long_kernel(long_kernel, d_model, max_length)
        self.long_kernel_future = (
            None if causal else new_long_kernel(long_kernel, d_model, max(1, max_length - 1))
        )
        self.w_z = nn.Linear(d_model, K) if projection == "shared" else None
        self.a_q, self.a_k = nn.Parameter(torch.ones(K)), nn.Parameter(torch.ones(K))
        self.m_q, self.m_k = nn.Parameter(torch.zeros(K)), nn.Parameter(torch.zeros(K))
        self.w_v = nn.Linear(d_model, V)
        self.w_a = nn.Linear(d_model, V) if attention_gate else None
        self.w_h = nn.Linear(d_model, d_model)  # its bias is b_h
        self.u_h = nn.Linear(V, d_model, bias=False)
        self.w_o = nn.Linear(d_model, d_model) if output_gate else None
        for kernel in self.short_kernels:
            nn.init.normal_(kernel, std=(len(widths) * kernel.shape[1]) ** -0.5)
        init_long_kernels(self.long_kernel, self.long_kernel_future)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """y [B, T, D] in x's dtype, which is the module's.

        mask [B, T] bool is True where there is a token. A row whose tokens lie side by side, padded
        on the right, the left or both, comes out as if it were cut to them, causal or two-sided;
        padding may hold anything, and y is zero there. Raises ArgumentError for a longer T.
        """
        self._check_input(x, mask)
        x = zero_padding(x, mask)
        before = self.norm_position == "before"
        normed = zero_padding(_normalize(self.norm, x), mask) if before else x  # X~
        z = self._convolve(normed, mask)
        m = self._attend(normed, z, mask)
        h = self.dropout(F.silu(self.w_h(z) + self.u_h(m)))
        y = self._gate_output(h, z, x)
        return zero_padding(y if before else _normalize(self.norm, y), mask)

    def prefill(self, x: Tensor, cache: ChelaCache | None = None) -> tuple[Tensor, ChelaCache]:
        """y [B, T, D] of a prompt x [B, T, D], as forward has it, and the cache for what follows.

        With a cache, the prompt goes on after its tokens, so that a long one may come in pieces;
        T may be 0. Causal layers only. There is no mask: all sequences are equally long, and such
        of other lengths take other caches. Without gradient: an x that requires one is an error,
        unless gradients are off. Dropout is as in forward, so call eval() first. Raises
        ArgumentError for what does not fit, and then the cache is as it was.
        """
        self._check_tokens(x, "[B, T, D]", cache)
        with torch.no_grad():
            cache = self._new_cache(x) if cache is None else cache
            return self._extend(x, cache), cache

    def step(self, x: Tensor, cache: ChelaCache) -> Tensor:
        """y [B, D] of the next token, x [B, D], which joins the cache: as `prefill` of one."""
        self._check_tokens(x, "[B, D]", cache)
        with torch.no_grad():
            return self._extend(x[:, None], cache)[:, 0]

    def _new_cache(self, x: Tensor) -> ChelaCache:
        return HistoryCache(self, x)

    def _extend(self, x: Tensor, cache: ChelaCache) -> Tensor:
        """y [B, T, D] of the next tokens x [B, T, D], which join the cache."""
        assert isinstance(cache, HistoryCache)
        tokens = torch.cat([cache.tokens, x], dim=1)
        y = ChelaLayer.forward(self, tokens)[:, cache.position :]
        cache.tokens = tokens
        return y

    def _convolve(self, normed: Tensor, mask: Tensor | None) -> Tensor:
        """Z [B, T, D]: short_long_conv, whose parts "serial" runs apart to mask what lies between.

        The taps of short kernels reach into the padding, and a long one would carry that back.
        """
        u, shorts = normed, list(self.short_kernels)
        future = self.long_kernel_future
        with _no_autocast(normed):
            if self.order == "serial":
                u, shorts = zero_padding(short_conv(u, shorts, causal=self.causal), mask), []
            return short_long_conv(
                u,
                shorts,
                taps_of(self.long_kernel),
                order="parallel",
                identity=self.order == "parallel",
                causal=self.causal,
                long_kernel_future=None if future is None else taps_of(future),
            ).to(normed.dtype)

    def _attend(self, normed: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
        """M [B, T, V]. Masked values leave nothing of the padding in K^T V."""
        shared = z if self.w_z is None else F.silu(self.w_z(z))  # Z' [B, T, K]
        q, k = self.a_q * shared + self.m_q, self.a_k * shared + self.m_k  # [B, T, K]
        v = zero_padding(F.silu(self.w_v(normed)), mask)  # [B, T, V]
        q, k, v = (
            u.unflatten(2, (self.num_heads, u.shape[2] // self.num_heads)) for u in (q, k, v)
        )
        with _no_autocast(q):
            o = self._attention(q, k, v)  # [B, T, H, V / H]
            m = norm_rms(o.flatten(2), eps=self.eps).to(z.dtype)  # [B, T, V]
        return m if self.w_a is None else m * _ACTIVATIONS[self.gate_activation](self.w_a(z))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, causal=self.causal)[0]

    def _gate_output(self, h: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """y [B, T, D]."""
        if self.w_o is None:
            return h + x
        gate = torch.sigmoid(self.w_o(z))
        return gate * h + (1 - gate) * x

    def _check_input(self, x: Tensor, mask: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[2] != self.d_model or x.shape[1] > self.max_length:
            raise ArgumentError(
                f"wanted x [B, T <= {self.max_length}, {self.d_model}], got "
                f"{list(x.shape)}; build the layer with a larger max_length for more tokens"
            )
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ArgumentError(
                f"wanted mask [B, T] = {list(x.shape[:2])} in torch.bool, got {list(mask.shape)} "
                f"in {mask.dtype}; it is True where there is a token"
            )

    def _check_tokens(self, x: Tensor, named: str, cache: ChelaCache | None) -> None:
        """x [B, T, D] of `prefill` or [B, D] of `step`."""
        if not self.causal:
            raise ArgumentError(
                "wanted causal=True for prefill and step, got a two-sided layer, whose output "
                "reads tokens to come; call it with the whole sequence"
            )
        is_step = named == "[B, D]"
        if x.ndim != 3 - is_step or x.shape[-1] != self.d_model:
            raise ArgumentError(
                f"wanted x {named} with D = {self.d_model}, got {list(x.shape)}; step takes one "
                "token of each sequence and prefill many"
            )
        check_decoding(self, x, self.w_v.weight, cache)
        tokens, seen = 1 if is_step else x.shape[1], 0 if cache is None else cache.position
        if seen + tokens > self.max_length:
            raise ArgumentError(
                f"wanted at most max_length = {self.max_length} tokens, got {tokens} after {seen}; "
                "build the layer with a larger max_length, or reset() the cache"
            )


class ChelaBlock(nn.Module):
    """A ChelaLayer, then a feed-forward network with its own norm and residual. F = d_ff (2 D).

        u = ChelaLayer(x)                                       [B, T, D]
        y = u + dropout(W_2 dropout(act(W_1 norm(u) + b_1)) + b_2)          act = ff_activation

    or, with norm_position="after", y = norm(u + dropout(W_2 dropout(act(W_1 u + b_1)) + b_2)).
    W_1 [F, D], W_2 [D, F]. All further options are the layer's; norm, norm_position, dropout and
    eps hold for both halves. Initialisation: W_1 and W_2 normal of variance 2 / (D + F) (Glorot),
    b_1 = b_2 = 0. A stack of twelve starts with outputs of rms 0.6 to 0.9 under the output gate,
    which forgets; without it H + x adds up, to about 3.
    """

    layer_type: type[ChelaLayer] = ChelaLayer

    def __init__(
        self,
        d_model: int,
        *,
        d_ff: int | None = None,
        ff_activation: FeedForwardActivation = "silu",
        **layer_options: Any,
    ) -> None:
        """Raises ArgumentError for an unknown option or sizes that do not fit each other."""
        super().__init__()
        _check_option("ff_activation", ff_activation, FeedForwardActivation)
        d_ff = 2 * d_model if d_ff is None else d_ff
        if d_ff < 1:
            raise ArgumentError(f"d_ff is a width, got {d_ff}; pass 1 or more")
        self.ff_activation = ff_activation
        self.layer = self.layer_type(d_model, **layer_options)
        self.norm = type(self.layer.norm)(d_model, eps=self.layer.eps)
        self.w_1, self.w_2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(self.layer.dropout.p)
        for linear in (self.w_1, self.w_2):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """y [B, T, D], as ChelaLayer.forward."""
        return zero_padding(self._fed_forward(self.layer(x, mask)), mask)

    def prefill(self, x: Tensor, cache: ChelaCache | None = None) -> tuple[Tensor, ChelaCache]:
        """y [B, T, D], and the layer's cache, as ChelaLayer.prefill."""
        u, cache = self.layer.prefill(x, cache)
        with torch.no_grad():
            return self._fed_forward(u), cache

    def step(self, x: Tensor, cache: ChelaCache) -> Tensor:
        """y [B, D], as ChelaLayer.step."""
        u = self.layer.step(x, cache)
        with torch.no_grad():
            return self._fed_forward(u)

    def _fed_forward(self, u: Tensor) -> Tensor:
        """y [..., D] of the layer's output."""
        if self.layer.norm_position == "before":
            return u + self._feed_forward(_normalize(self.norm, u))
        return _normalize(self.norm, u + self._feed_forward(u))

    def _feed_forward(self, u: Tensor) -> Tensor:
        hidden = self.dropout(_ACTIVATIONS[self.ff_activation](self.w_1(u)))  # [B, T, F]
        out: Tensor = self.dropout(self.w_2(hidden))
        return out


def norm_rms(x: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in x's dtype."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _normalize(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    """norm(x), computed in float32 (float64 for float64), in x's dtype."""
    dtype = compute_dtype(x)
    weight, width = norm.weight.to(dtype), x.shape[-1:]
    if isinstance(norm, nn.LayerNorm):
        y = F.layer_norm(x.to(dtype), width, weight, norm.bias.to(dtype), norm.eps)
    else:
        y = F.rms_norm(x.to(dtype), width, weight, norm.eps)
    return y.to(x.dtype)


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Within, products are of the dtype that they are given in."""
    kind = x.device.type
    if torch.compiler.is_compiling():  # which cannot ask
        return torch.autocast(kind, enabled=False)
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, T, ...] with zeros where mask [B, T] has no token, whatever was there."""
    return x if mask is None else x.masked_fill(~mask[:, :, None], 0)


def _key_width(d_model: int, d_key: int | None, projection: Projection) -> int:
    if projection == "shared":
        return 128 if d_key is None else d_key
    if d_key not in (None, d_model):
        raise ArgumentError(
            f'projection="none" takes Z for Z\', so d_key is d_model = {d_model}, got {d_key}; '
            'leave d_key out, or use projection="shared"'
        )
    return d_model


def _check_heads(num_heads: int, K: int, V: int) -> None:
    if min(num_heads, K, V) < 1 or K % num_heads or V % num_heads:
        raise ArgumentError(
            f"wanted d_key and d_value of 1 or more that num_heads divides, got d_key = {K}, "
            f"d_value = {V} and num_heads = {num_heads}; pass multiples of num_heads"
        )


def _check_widths(widths: Sequence[int], *, causal: bool) -> None:
    if any(width < 1 or (width % 2 == 0 and not causal) for width in widths):
        raise ArgumentError(
            f"short_sizes are widths of 1 or more{'' if causal else ', odd if causal=False'}, got "
            f"{list(widths)}; pass () for no short kernel"
        )


def _check_option(name: str, value: object, known: object) -> None:
    if value not in get_args(known):
        raise ArgumentError(
            f"no {name} {value!r}; it is one of {', '.join(map(repr, get_args(known)))}"
        )
