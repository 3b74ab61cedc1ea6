"""The CHELA layer (arXiv 2406.08128) by Triton kernels: another forward of the reference's.

    X~ = norm(x)                                    normalize                 4 D
    Z = short_long_conv(X~)                         short_long_conv.py       16 D
    Q, K = a * SiLU(Z W_z + b_z) + m                queries_keys              6 K
    V = SiLU(X~ W_v + b_v)                          silu                      4 V
    O = linear_attention(Q, K, V)                   linear_attention.py       4 V + 8 K
    M = norm_rms(O) * act(Z W_a + b_a)              norm_gate                 6 V
        or, without gradients, on Hopper            gated_attention           2 V + 2 D
    H = Z W_h + b_h + M U_h                         cuBLAS, one after the other into one sum
    y = sigmoid(Z W_o + b_o) SiLU(H) + ..           output_gate               8 D

Bytes a token in 16 bits of what is not a product of matrices, which are cuBLAS's. Backward, the
gradients of Z and of X~ meet in one buffer each (projections.py), those of biases are summed by the
kernels that make what they sum, and that of x around the norm is added by the norm's kernel. The
class is the reference's own with its steps replaced, so that there is one set of parameters and one
meaning of every option (docs/decisions/0008).
"""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from chela_bench.errors import ArgumentError
from chela_bench.kernels.activated_attention import activated_attention
from chela_bench.kernels.chela_decode import StateCache
from chela_bench.kernels.chela_limits import beyond_kernels, takes
from chela_bench.kernels.chela_merged import MergedKernels
from chela_bench.kernels.dispatch import autocast
from chela_bench.kernels.gated_attention import gated_attention, gating_walk
from chela_bench.kernels.gates_ops import (
    joint_output_gate,
    norm_gate,
    normed_output_gate,
    output_gate,
    silu,
)
from chela_bench.kernels.linear_attention import linear_attention
from chela_bench.kernels.normalize import normalize
from chela_bench.kernels.projections import (
    Projection,
    add_product,
    called,
    can_project,
    projected,
)
from chela_bench.kernels.queries_keys_ops import queries_keys
from chela_bench.kernels.short_long_conv import short_conv, short_long_conv
from chela_bench.reference import chela as reference
from chela_bench.reference.chela import zero_padding
from chela_bench.reference.chela_decode import ChelaCache
from chela_bench.reference.long_kernels import taps_of

Implementation = Literal["auto", "triton", "reference"]


class ChelaLayer(reference.ChelaLayer):
    """x [B, T, D] -> y [B, T, D], as chela_bench.reference.chela.ChelaLayer, whose options it takes
    and whose state_dict it shares.

    implementation: "triton", "reference", or "auto", which is Triton for float32, bfloat16 and
    float16 on a GPU where the sizes are within the kernels' (chela_limits.py: up to 256 keys a
    head, d_value 4096, max_length 8388608), and else the reference; the repr says which. What
    rounds besides each product: X~, Z, Q, K, V, O, M and y, in the module's dtype. In float16 the
    attention of token t is kept in range by a power of two near 1 / sqrt(t + 1), which the norm
    after it cancels, its eps too.

    The norm's gradient is orthogonal to O. Where few tokens or few keys leave the attention's state
    nearly of rank one, dQ and dK are what is left of that, and rounding O to 16 bits, which the
    reference does after the norm, costs them more than it costs y.

    torch.compile(fullgraph=True) takes it whole; a few graphs serve all T.

    `prefill` and `step` are the reference's, with a StateCache (chela_decode.py) where Triton
    computes: a token then costs O(log^2 T) amortised, and a CUDA graph of a step serves all steps
    (StepGraph, chela_graph.py).
    """

    def __init__(
        self, d_model: int, *, implementation: Implementation = "auto", **options: Any
    ) -> None:
        """Raises ArgumentError for an unknown option, sizes that do not fit each other or, if
        "triton", the kernels."""
        super().__init__(d_model, **options)
        if implementation not in get_args(Implementation):
            raise ArgumentError(
                f"no implementation {implementation!r}; it is one of "
                f"{', '.join(map(repr, get_args(Implementation)))}"
            )
        self.implementation = implementation
        beyond = beyond_kernels(
            d_key=self.a_q.shape[0],
            d_value=self.w_v.out_features,
            num_heads=self.num_heads,
            max_length=self.max_length,
        )
        if implementation == "triton" and beyond is not None:
            raise ArgumentError(f'implementation="triton" wanted {beyond}, or "reference"')
        self._has_kernels = beyond is None
        self._is_reparameterized = False
        self._merged: MergedKernels | None = None
        self.register_load_state_dict_post_hook(_merge_again)

    def extra_repr(self) -> str:
        chosen = self._chosen(self.a_q)
        how = f"auto: {chosen}" if self.implementation == "auto" else chosen
        return f"implementation={how!r}{', reparameterized' * self._is_reparameterized}"

    def reparameterize(self) -> None:
        """For inference: forward convolves by merged kernels, whose spectra it keeps for two T.

        The same output, within rounding; parameters and state_dict stay as they are. What is merged
        follows the parameters when they are loaded, moved, converted or changed in place, but for
        changes through `.data`, which nobody sees: call it again after those. A forward for which
        gradients are on and a parameter of the convolution requires one is an ArgumentError.
        `prefill` and `step` always merge. Where the reference computes, nothing is merged.

        Memory: the merged kernels in float32, [D, W] and [D, max_length], and two spectra of 4
        bytes a tap [D, T], in float32 8; two-sided twice all of it. A CUDA graph reads the spectrum
        of its T, so capture no more than two T. Compiled by torch.compile, forward looks for no
        changes in place and keeps no spectra: after those call this again, and first run it once,
        uncompiled, at each T. `restore` ends it all.
        """
        self._is_reparameterized = True
        self._merge()

    def restore(self) -> None:
        """Undo `reparameterize`: forward trains again."""
        self._is_reparameterized, self._merged = False, None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As the reference's. Raises ArgumentError for a longer T, and on a CPU if "triton"."""
        self._check_gradients()
        if self._chosen(x) == "reference":
            return super().forward(x, mask)
        self._check_input(x, mask)
        return self._computed(x, mask, None)

    def _computed(self, x: Tensor, mask: Tensor | None, cache: StateCache | None) -> Tensor:
        """y [B, T, D] of a whole sequence, or with a cache, of its next tokens."""
        x = zero_padding(x, mask)
        before = self.norm_position == "before"
        normed, x = normalize(self.norm, x) if before else (x, x)  # X~
        normed = zero_padding(normed, mask)
        is_fused = can_project(x, self.w_z, self.w_v, self.w_a, self.w_h, self.w_o, self.u_h)
        values = (projected if is_fused else called)(normed, self.w_v)
        normed = values.x
        z = self._convolved(normed, mask) if cache is None else cache.convolve(normed)
        drops = self.training and self.dropout.p > 0
        gates_on_the_way = cache is None and not drops
        m, z, squares = self._attended(
            values, z, mask, cache, is_fused=is_fused, gates_on_the_way=gates_on_the_way
        )
        if squares is not None:
            g = None if self.w_o is None else self.w_o(z)
            width, u = m.shape[2], self.u_h(m)
            y = normed_output_gate(self.w_h(z), u, squares, g, x, width=width, eps=self.eps)
        else:
            y = self._mixed(m, z, x, is_fused=is_fused, drops=drops)
        return zero_padding(y if before else normalize(self.norm, y)[0], mask)

    def _mixed(self, m: Tensor, z: Tensor, x: Tensor, *, is_fused: bool, drops: bool) -> Tensor:
        """y [B, T, D] of M, Z and x."""
        if is_fused and self.w_o is not None and not drops:
            both = projected(z, self.w_h, self.w_o)
            bias_h, bias_g = both.biases
            hg = add_product(both.out, m, self.u_h)
            return joint_output_gate(hg, x, bias_h=bias_h, bias_g=bias_g)
        h, z, [bias_h] = (projected if is_fused else called)(z, self.w_h)
        if is_fused:
            h = add_product(h, m, self.u_h)
        else:
            h.flatten(0, 1).addmm_(m.flatten(0, 1), self.u_h.weight.to(h.dtype).T)
        if drops:
            return self._gate_output(self.dropout(silu(h, bias=bias_h)), z, x)
        return output_gate(h, None if self.w_o is None else self.w_o(z), x, bias_h=bias_h)

    def _convolved(self, normed: Tensor, mask: Tensor | None) -> Tensor:
        """Z [B, T, D]."""
        (normed,) = autocast(normed)
        shorts, long, identity, options = self._kernels(normed)
        if mask is None or self.order == "parallel":
            return short_long_conv(
                normed, shorts, long, order=self.order, identity=identity, **options
            )
        u = zero_padding(short_conv(normed, shorts, identity=identity, causal=self.causal), mask)
        return short_long_conv(u, [], long, order="parallel", identity=False, **options)

    def _kernels(self, x: Tensor) -> tuple[list[Tensor], Tensor, bool, dict[str, Any]]:
        """Short kernels, the long one, whether there is a unit tap, and more options of
        short_long_conv, for rows like x [B, T, D]."""
        if self._is_reparameterized:
            merged = self._merged_kernels()
            options = merged.spectra(x.shape[1], x.dtype)
            options |= {"causal": self.causal, "long_kernel_future": merged.future}
            return merged.shorts, merged.long, False, options
        future = self.long_kernel_future
        options = {
            "causal": self.causal,
            "long_kernel_future": None if future is None else taps_of(future),
        }
        return list(self.short_kernels), taps_of(self.long_kernel), True, options

    def _attended(
        self,
        values: Projection,
        z: Tensor,
        mask: Tensor | None,
        cache: StateCache | None,
        *,
        is_fused: bool,
        gates_on_the_way: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """M [B, T, V]; Z for what follows; and where M is not normed yet, but only if it
        `gates_on_the_way`, the squares of what it is to be normed by."""
        project = projected if is_fused else called
        p, z, [bias] = (z, z, [None]) if self.w_z is None else project(z, self.w_z)
        q, k = queries_keys(
            p, self.a_q, self.m_q, self.a_k, self.m_k, activation=self.w_z is not None, bias=bias
        )
        shrink = None
        if q.dtype == torch.float16:
            shrink = self._shrink(q, 0 if cache is None else cache.before)
            q = q * shrink.to(q.dtype)[:, None]
        heads = (self.num_heads, -1)
        q, k, p = (u.unflatten(2, heads) for u in (q, k, values.out))
        walk = gating_walk(q, k, p, causal=self.causal) if gates_on_the_way else None
        [bias] = values.biases
        if is_fused and mask is None:
            o = activated_attention(q, k, p, causal=self.causal, bias=bias)
        else:
            v = zero_padding(silu(values.out, bias=bias), mask).unflatten(2, heads)
            if walk is not None:
                a = None if self.w_a is None else self.w_a(z)
                m, squares = gated_attention(q, k, v, a, walk, activation=self.gate_activation)
                return m, z, squares
            if cache is None:
                o, _ = linear_attention(q, k, v, causal=self.causal)
            else:
                o = cache.attend(q, k, v)
        a, z, [bias] = (None, z, [None]) if self.w_a is None else project(z, self.w_a)
        m = norm_gate(
            o.flatten(2), a, eps=self.eps, activation=self.gate_activation, dtype=z.dtype,
            bias=bias, shrink=shrink, owns_gradient=is_fused,
        )  # fmt: skip
        return m, z, None

    def _shrink(self, q: Tensor, before: int | Tensor) -> Tensor:
        """About 1 / sqrt(n) of the n tokens that each one attends to [T]; `before` came before q.
        Powers of two, so that a product with them does not round."""
        T = q.shape[1]
        tokens = torch.arange(1, T + 1, device=q.device, dtype=torch.float32) + before
        seen = tokens if self.causal else tokens.new_full((T,), T)
        return torch.exp2(-(torch.frexp(seen).exponent // 2).to(torch.float32))

    def _new_cache(self, x: Tensor) -> ChelaCache:
        if self._chosen(x) == "reference":
            return super()._new_cache(x)
        H, K, V = self.num_heads, self.a_q.shape[0], self.w_v.out_features
        return StateCache(
            self,
            x,
            short_kernels=list(self.short_kernels),
            long_kernel=taps_of(self.long_kernel),
            order=self.order,
            max_length=self.max_length,
            state=(H, K // H, V // H),
        )

    def _extend(self, x: Tensor, cache: ChelaCache) -> Tensor:
        if not isinstance(cache, StateCache):
            return super()._extend(x, cache)
        y = self._computed(x, None, cache)
        cache.advance(x.shape[1])
        return y

    def _merged_kernels(self) -> MergedKernels:
        """Those of the parameters as they are now."""
        merged = self._merged
        is_known = torch.compiler.is_compiling()  # which traces no check
        if merged is None or not (is_known or merged.is_of(self._convolution())):
            merged = self._merged = self._new_merged()
        return merged

    def _merge(self) -> None:
        """Anew, if reparameterized."""
        wanted = self._is_reparameterized and self._chosen(self.a_q) == "triton"
        self._merged = self._new_merged() if wanted else None

    def _new_merged(self) -> MergedKernels:
        future = self.long_kernel_future
        # Outside inference mode, what it makes can be used inside and outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return MergedKernels(
                list(self.short_kernels),
                taps_of(self.long_kernel),
                None if future is None else taps_of(future),
                order=self.order,
                parameters=self._convolution(),
            )

    def _convolution(self) -> list[nn.Parameter]:
        """Parameters of the convolution."""
        longs = [
            kernel for kernel in (self.long_kernel, self.long_kernel_future) if kernel is not None
        ]
        found = [*self.short_kernels]
        for kernel in longs:
            found += [kernel] if isinstance(kernel, nn.Parameter) else kernel.parameters()
        return found

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        """What .to(), .half(), .cuda() and the like call."""
        super()._apply(*arguments, **options)
        self._merge()
        return self

    def _check_gradients(self) -> None:
        if not self._is_reparameterized or not torch.is_grad_enabled():
            return
        if any(parameter.requires_grad for parameter in self._convolution()):
            raise ArgumentError(
                "a reparameterized layer has no gradients for its convolution, whose parameters "
                "require them; restore() it for training, use torch.no_grad(), or set "
                "requires_grad to False on short_kernels and long_kernel"
            )

    def _chosen(self, x: Tensor) -> Literal["triton", "reference"]:
        if self.implementation == "auto":
            return "triton" if self._has_kernels and takes(x) else "reference"
        return self.implementation


class ChelaBlock(reference.ChelaBlock):
    """The reference's ChelaBlock around this file's ChelaLayer: the same options, `implementation`
    too, and the same state_dict."""

    layer_type = ChelaLayer
    layer: ChelaLayer

    def reparameterize(self) -> None:
        """The layer's."""
        self.layer.reparameterize()

    def restore(self) -> None:
        """The layer's."""
        self.layer.restore()

    def _fed_forward(self, u: Tensor) -> Tensor:
        """As the reference's, normed by a kernel."""
        if self.layer._chosen(u) == "reference":
            return super()._fed_forward(u)
        if self.layer.norm_position == "before":
            normed, around = normalize(self.norm, u)
            return around + self._feed_forward(normed)
        return normalize(self.norm, u + self._feed_forward(u))[0]


def _merge_again(layer: ChelaLayer, incompatible_keys: object) -> None:
    """After load_state_dict."""
    layer._merge()
