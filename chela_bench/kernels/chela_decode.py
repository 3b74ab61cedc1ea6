"""Decoding with the CHELA layer by Triton kernels: the state of its attention and convolutions.

    u_t = SiLU(sum_n k_n X~_{t-n})    short_conv, its last W - 1 inputs; parallel, u = X~
    Z_t = sum_n k_long_n u_{t-n}      LongConvDecoder, every u and sums to come
    S_t = S_{t-1} + K_t V_t^T         as linear_attention_step, one state a head

Everything else in the layer is of one token alone. A prompt is convolved and attended by the
kernels of a whole sequence; of its convolution's spans the decoder then adds the squares alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from chela_bench.errors import ArgumentError
from chela_bench.kernels.dispatch import autocast
from chela_bench.kernels.launching import on_device_of
from chela_bench.kernels.linear_attention import linear_attention
from chela_bench.kernels.linear_attention_recurrent import step_of_rows
from chela_bench.kernels.long_conv_stream import LongConvDecoder
from chela_bench.kernels.reparameterization import reparameterize
from chela_bench.kernels.short_long_conv import long_conv, short_conv
from chela_bench.kernels.short_long_conv_checks import Layout, Order
from chela_bench.kernels.short_long_conv_ops import products
from chela_bench.reference.chela_decode import ChelaCache


class StateCache(ChelaCache):
    """What a step needs, in float32 whatever the layer's dtype, and never more than at the start.

        decoder       LongConvDecoder of N = max_length tokens
                          inputs and sums to come     4 B D N
                          taps, and their spectra     4 D L + 8 D sum over U of (U + 1)
        attention     S [B, H, K / H, V / H]          4 B K V / H
        kernel        short kernels and unit tap, merged [D, W]: serial alone      4 D W
        inputs        the last of X~ [B, D, W - 1]: serial alone                   4 B D (W - 1)

    nbytes is the sum; a graph of a step adds 8 bytes. W is the widest short kernel's width, or 1;
    L = N taps (parallel: W if that is more, but N at most); U = 64 * 2^j < N, up to the first that
    is L - 1 or more. The decoder has nearly all of it: for B = 64, D = 1024, N = 16384 4.3 GB of
    its 4.5; so a max_length beyond what is to be decoded costs memory.

    The convolution's kernels are copies, merged as `reparameterize` does, of when it was made;
    other parameters are read at every call. A layer that was trained on or loaded since is another
    layer: make another cache. Steps allocate nothing that lasts, and states stay where they are.

    All that differs from step to step are the position, a number to one kernel, and the squares
    that are due after every 64 tokens. In `captured` the position is read from memory and squares
    wait, so a CUDA graph of any step is one of all: see StepGraph (chela_graph.py).
    """

    def __init__(
        self,
        layer: nn.Module,
        x: Tensor,
        *,
        short_kernels: Sequence[Tensor],
        long_kernel: Tensor,
        order: Order,
        max_length: int,
        state: tuple[int, int, int],
    ) -> None:
        """x [B, T, D], none of which it takes in; state: H, K / H, V / H."""
        B, _, D = x.shape
        super().__init__(layer, B, x.device)
        self._position = 0
        self._counter: Tensor | None = None  # the position, for graphs
        self._is_captured = False
        # Outside inference mode, what it makes can be updated inside and outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.kernel, long = reparameterize(short_kernels, long_kernel, order=order)
            self.decoder = LongConvDecoder(long, B, max_length=max_length)
            self.attention = long.new_zeros(B, *state)
            past = 0 if self.kernel is None else self.kernel.shape[1] - 1
            self.inputs = long.new_zeros(B, D, past)

    @property
    def position(self) -> int:
        return self._position

    @property
    def before(self) -> int | Tensor:
        """The position, or in `captured` where it is to be read."""
        if self._is_captured:
            assert self._counter is not None
            return self._counter
        return self._position

    @property
    def nbytes(self) -> int:
        kernel = 0 if self.kernel is None else self.kernel.nbytes
        return self.decoder.state_bytes + self.attention.nbytes + kernel + self.inputs.nbytes

    def reset(self) -> None:
        self.decoder.reset()
        self.attention.zero_()
        self.inputs.zero_()
        self._move_to(0)

    def convolve(self, x: Tensor) -> Tensor:
        """Z [B, T, D] of the next X~ [B, T, D]."""
        self._check_order()
        (x,) = autocast(x)
        if self._position > 0 or x.shape[1] <= self.decoder.block:
            return self.decoder.prefill(self._short(x, "btd"))
        u = self._short(x.mT, "bdt")  # [B, D, T], channel-major, as transforms and states are
        self.decoder.append(u.mT)
        z = long_conv(u, self.decoder.kernel, layout="bdt")
        found: Tensor = products(z, None, False, True).mT
        return found

    def _check_order(self) -> None:
        if self.decoder.position != self._position:
            raise ArgumentError(
                "wanted a cache whose calls all came to their end, got one that an error or "
                "interrupt left half updated; reset() it, and prefill anew"
            )

    def _short(self, x: Tensor, layout: Layout) -> Tensor:
        """u, in this layout, as x is."""
        if self.kernel is not None:
            return short_conv(x, [self.kernel], identity=False, layout=layout, state=self.inputs)
        if layout == "btd":
            return x
        u: Tensor = products(x, None, True, False)
        return u

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """O [B, T, H, V / H] of the next q, k [B, T, H, K / H] and v [B, T, H, V / H]."""
        if q.shape[1] == 1:
            with on_device_of(q):
                return step_of_rows(q, k, v, self.attention, q.shape[3] ** -0.5)
        before = self.attention if self._position > 0 else None
        o, final = linear_attention(q, k, v, initial_state=before, output_final_state=True)
        assert final is not None
        self.attention.copy_(final)
        return o

    def advance(self, tokens: int) -> None:
        """Count tokens that went through both."""
        if self._is_captured:
            assert self._counter is not None
            self._counter += 1
        else:
            self._move_to(self._position + tokens)

    def check_room(self) -> None:
        """For one more token, in good order. Raises ArgumentError."""
        self._check_order()
        if self._position >= self.decoder.max_length:
            raise ArgumentError(
                f"wanted at most max_length = {self.decoder.max_length} tokens, got 1 after "
                f"{self._position}; build the layer with a larger max_length, or reset() the cache"
            )

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Within, a step may be captured by a CUDA graph, and launches what it launches at any
        position. What is captured is not counted: `replay` is for that."""
        if self._counter is None:
            with torch.inference_mode(False):
                self._counter = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._move_to(self._position)
        self._is_captured = True
        try:
            with self.decoder.captured(self._counter):
                yield
        finally:
            self._is_captured = False

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Within, a step runs that was captured: it is counted, and the square that is then due is
        added. What does not come to its end leaves a cache half updated."""
        self._position += 1  # the counter is told by the step
        yield
        self.decoder.replayed()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Within, one step as `captured` may run for nothing: it is undone."""
        changing = self.decoder.entry(self._position), self.attention, self.inputs
        kept = [x.clone() for x in changing]
        try:
            with self.captured():
                yield
        finally:
            for x, before in zip(changing, kept, strict=True):
                x.copy_(before)
            self._move_to(self._position)

    def _move_to(self, position: int) -> None:
        self._position = position
        if self._counter is not None:
            self._counter.fill_(position)
