"""Decoding with a causal long convolution: one token at a time, O(log^2 T) work a token.

    z_t = sum_{n=0}^{min(t, L-1)} k_n x_{t-n}         for each (b, d)

x, z [B, T, D]; k [D, L], known from the start; sums in float32. Summed anew for every token, that
is O(T) a token. Here the triangle of products, x_j in the output i >= j, is cut into tiles, each of
them one computation:

    strip     output i, inputs from the start of its block up to i: summed, one kernel a token
    square    when m = c * block tokens are there: inputs [m - U, m), outputs [m, m + U), taps
              [1, 2 U), U = block * (the largest power of two that divides c): FFTs of length 2 U

Of all c between the blocks of j and i, one is divisible by the largest power of two: its square,
and no other tile, holds the product. Squares of size U come every 2 U tokens. In cyclic transforms
of length 2 U only the first U results wrap around; they are not wanted.

An entry of the state is the sum of what squares have added to an output, until that token comes,
and its input from then on. One array is both:

    state [B, D, N]     x_0 ... x_{t-1} | sums for z_t ... z_{N-1}          float32

A prompt is cut into spans at which the same squares end (`span`): inside a span everything is one
convolution, by a FFT of its own, and the squares that lie in it are skipped.

Relaxed, or on-line, multiplication: Fischer and Stockmeyer, "Fast on-line integer multiplication",
1974; van der Hoeven, "Relax, but don't be too lazy", 2002. For long convolution models, with this
tiling: Oncescu et al., "Flash Inference", arXiv 2410.12982. One array and the spans are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels.launching import Launcher, on_device_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (16, 32, 64, 128, 256)
BLOCK_R = 16  # rows (b, d) of a program
TOGETHER = 2**26  # elements in transforms at once


class Tile(NamedTuple):
    """Products of some inputs with all taps by which they reach some outputs."""

    inputs: range
    outputs: range
    fft_length: int  # 0: summed

    @property
    def taps(self) -> range:
        nearest = max(0, self.outputs.start - self.inputs[-1])
        return range(nearest, self.outputs[-1] - self.inputs.start + 1)


def tiles(T: int, block: int, taps: int | None = None) -> list[Tile]:
    """What T steps compute, in order: every (input, output) within `taps` (None: T) is in exactly
    one tile."""
    plan = []
    for t in range(T):
        plan.append(Tile(range(t - t % block, t + 1), range(t, t + 1), 0))
        square = square_at(t + 1, block, T if taps is None else taps, T)
        if square is not None:
            plan.append(square)
    return plan


def square_at(position: int, block: int, taps: int, length: int) -> Tile | None:
    """The square that is due once there are `position` of `length` tokens, if there is one."""
    if position % block != 0 or not 0 < position < length or taps < 2:
        return None
    size = min(position & -position, largest_square(block, taps))  # block is a power of two
    outputs = range(position, min(position + size, length))
    return Tile(range(position - size, position), outputs, 2 * size)


def largest_square(block: int, taps: int) -> int:
    """The least block * 2^j with no pair, `taps` - 1 apart at most, beyond the square's sides."""
    size = block
    while size < taps - 1:
        size *= 2
    return size


def span(position: int, tokens: int, block: int) -> int:
    """How many of the next `tokens` to convolve at once: up to the end of the block, or whole
    blocks, U = block * 2^j from a multiple of U on, for which `sums` are complete where they start
    and in which no square reaches further than they do."""
    if position % block != 0 or tokens < block:
        return min(tokens, block - position % block)
    size = block << (tokens // block).bit_length() - 1
    return size if position == 0 else min(size, position & -position)


@triton.jit(
    do_not_specialize=[
        "stride_xb", "stride_xt", "stride_zb", "stride_zt", "position", "tokens", "B", "D", "N", "L"
    ]
)  # fmt: skip
def _long_conv_strip_kernel(
    x_ptr, z_ptr, state_ptr, kernel_ptr, counter_ptr,  # counter [1], or the position as a number
    stride_xb: tl.int64, stride_xt: tl.int64, stride_zb: tl.int64, stride_zt: tl.int64,
    position: tl.int64, tokens: tl.int64,  # tokens before x; in x, none beyond their block
    B: tl.int32, D: tl.int32, N: tl.int64, L: tl.int64,
    TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,  # TAPS = min(L, BLOCK_T)
):  # fmt: skip
    if counter_ptr is not None:
        position = tl.load(counter_ptr)
    pid = tl.program_id(0).to(tl.int64)
    i, pid_r = pid % tokens, pid // tokens
    t = position + i
    rows = pid_r.to(tl.int32) * BLOCK_R + tl.arange(0, BLOCK_R)  # of B * D
    mask_r = rows < B * D
    b, d = (rows // D).to(tl.int64), (rows % D).to(tl.int64)
    x_ptr += b * stride_xb + d  # [BLOCK_R]
    z_ptr += b * stride_zb + d
    state_ptr += rows.to(tl.int64) * N

    offs_t = position - position % BLOCK_T + tl.arange(0, BLOCK_T)  # the block's tokens
    taps = t - offs_t
    mask = mask_r[:, None] & ((taps >= 0) & (taps < TAPS))[None, :]
    is_new = (offs_t >= position)[None, :]
    kernel = tl.load(kernel_ptr + d[:, None] * L + taps[None, :], mask=mask, other=0.0)
    old = tl.load(state_ptr[:, None] + offs_t[None, :], mask=mask & ~is_new, other=0.0)
    offs_x = (offs_t - position) * stride_xt
    new = tl.load(x_ptr[:, None] + offs_x[None, :], mask=mask & is_new, other=0.0)
    inputs = tl.where(is_new, new.to(tl.float32), old)  # [BLOCK_R, BLOCK_T]

    sums = tl.load(state_ptr + t, mask=mask_r, other=0.0)
    z = sums + tl.sum(inputs * kernel, axis=1)  # [BLOCK_R]
    tl.store(z_ptr + i * stride_zt, z.to(z_ptr.dtype.element_ty), mask=mask_r)
    x = tl.load(x_ptr + i * stride_xt, mask=mask_r, other=0.0).to(tl.float32)
    tl.debug_barrier()  # all threads have loaded what the input replaces
    tl.store(state_ptr + t, x, mask=mask_r)


_strip = Launcher(_long_conv_strip_kernel)


class LongConvDecoder:
    """z_t = sum_{n=0}^{min(t, L-1)} kernel[d, n] x[t - n], token after token, as the whole
    convolution has it.

        decoder = LongConvDecoder(kernel, batch=8, max_length=65536)
        z = decoder.prefill(prompt)         # [B, T, D]
        z = decoder.step(x)                 # [B, D], the next token's

    kernel [D, T_long] in float32, bfloat16 or float16 is copied, without gradient; L = min(T_long,
    N) taps are used, N = max_length. x in any of these dtypes, rows of D of any strides; z is in
    the dtype of x, rounded once from float32 sums. Inference only: an x that requires a gradient
    is an error, unless gradients are off. Sequences of a batch go side by side.

    Time. A token costs block / 2 multiply-adds a channel on average, in one launch, and, spread
    over all tokens, two FFTs of length 2 U every 2 U tokens for each size U = block * 2^j of up to
    L: O(log^2) in all. Single steps differ: most are the launch alone; after every `block` tokens
    FFTs follow, at worst, after 2^j * block, of all there is. Larger blocks are fewer FFTs and more
    sums. A max_length of 2^j * block makes the most of the largest square.

    Memory. state_bytes, none of it allocated again by a step:

        4 B D N                           inputs so far and sums to come
        4 D L                             taps
        8 D sum over U of (U + 1)         spectra of taps; U = block * 2^j < N, up to the first
                                          that is L - 1 or more: at most 16 D min(2 L, N), nearly

    and while a square of size U is added, about 32 B D U for its transforms, but, by parts of the
    batch, no more than about a GiB or what one sequence needs.

    Errors. FFTs in float32 are off by about 1e-6 of a row's rms, not of z_t, and a step never by
    inputs that come later. A prompt's outputs may be, within a span: where an input is NaN or
    infinite, all of the span in this (b, d) is NaN, and everything that squares add later; other
    rows, and what came earlier, keep their values. reset() forgets it.

    Raises ArgumentError for what does not fit, and then nothing has changed.
    """

    def __init__(self, kernel: Tensor, batch: int, *, max_length: int, block: int = 64) -> None:
        _check_kernel(kernel, batch, max_length, block)
        self.max_length, self.block, self._position = max_length, block, 0
        # Outside inference mode, what it makes can be updated inside and outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._kernel = kernel[:, :max_length].to(torch.float32, copy=True).contiguous()
            D, L = self._kernel.shape
            self._state = self._kernel.new_zeros(batch, D, max_length)
            later = self._kernel.clone()
            later[:, 0] = 0  # belongs to strips; it may be large, and an error is relative to it
            self._spectra = {}
            size = block
            while size < max_length and L > 1 and size <= largest_square(block, L):
                self._spectra[size] = torch.fft.rfft(later, n=2 * size)  # [D, size + 1]
                size *= 2
        self._taps = L
        self._counter: Tensor | None = None
        self._constants = _strip.constants(TAPS=min(L, block), BLOCK_T=block, BLOCK_R=BLOCK_R)

    @property
    def position(self) -> int:
        """Tokens so far."""
        return self._position

    @property
    def kernel(self) -> Tensor:
        """The taps in use [D, L], float32."""
        return self._kernel

    @property
    def state_bytes(self) -> int:
        """Bytes that are held between steps: see the formula above."""
        held = (self._state, self._kernel, *self._spectra.values())
        return sum(x.numel() * x.element_size() for x in held)

    def reset(self) -> None:
        """Back to the start of a sequence, with the same kernel."""
        self._state.zero_()
        self._position = 0

    def step(self, x: Tensor) -> Tensor:
        """z [B, D] of the next token, x [B, D]."""
        B, D, _ = self._state.shape
        self._check_tokens(x, "[B, D]", (B, D), 1)
        z = torch.empty((B, D), dtype=x.dtype, device=x.device)
        self._sum(x.unsqueeze(1), z.unsqueeze(1))
        self._advance(1)
        return z

    def prefill(self, x: Tensor) -> Tensor:
        """z [B, T, D] of the next T tokens, x [B, T, D]: as T steps, by O(T log T) of FFTs and,
        like the steps, what squares are due. At any position; T may be 0."""
        B, D, _ = self._state.shape
        T = x.shape[1] if x.ndim == 3 else 1
        self._check_tokens(x, "[B, T, D]", (B, T, D), T)
        z = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
        for piece in self._spans(T):
            if piece.stop - piece.start <= self.block:
                self._sum(x[:, piece], z[:, piece])
            else:
                self._convolve(x[:, piece], z[:, piece])
        return z

    def append(self, x: Tensor) -> None:
        """As prefill, for whom has z of these tokens from elsewhere: half of its FFTs, those of
        squares, are left."""
        B, D, _ = self._state.shape
        T = x.shape[1] if x.ndim == 3 else 1
        self._check_tokens(x, "[B, T, D]", (B, T, D), T)
        for piece in self._spans(T):
            here = self._state[..., self._position : self._position + piece.stop - piece.start]
            here.copy_(x.detach()[:, piece].mT)

    @contextmanager
    def captured(self, counter: Tensor) -> Iterator[None]:
        """Within, a call for one token launches the same at every position, so that a CUDA graph
        may capture it: the position is read from counter [1] int64, which its owner advances, and
        here nothing is counted: call `replayed` after every such token."""
        self._counter = counter
        try:
            yield
        finally:
            self._counter = None

    def replayed(self) -> None:
        """Count one token that went through a captured call, and add the square that is due."""
        self._advance(1)

    def entry(self, position: int) -> Tensor:
        """Of the state [B, D], for this token: all that its call writes, but for squares."""
        return self._state[..., position]

    def _spans(self, T: int) -> Iterator[slice]:
        """Pieces of T tokens, each of which is to be in the state before the next is asked for."""
        done = 0
        while done < T:
            tokens = span(self._position, T - done, self.block)
            yield slice(done, done + tokens)
            self._advance(tokens)
            done += tokens

    def _sum(self, x: Tensor, z: Tensor) -> None:
        """The strips of tokens x [B, T, D] of one block into z; their inputs into the state."""
        if x.stride(-1) != 1:
            x = x.contiguous()
        (B, D, N), tokens = self._state.shape, x.shape[1]
        with on_device_of(x):
            _strip(
                tokens * -(-B * D // BLOCK_R),
                (x, z, self._state, self._kernel, self._counter),
                (*x.stride()[:2], *z.stride()[:2], self._position, tokens, B, D, N, self._taps),
                self._constants, 4, 3,
            )  # fmt: skip

    def _convolve(self, x: Tensor, z: Tensor) -> None:
        """As _sum, for a span of more than a block."""
        start, tokens = self._position, x.shape[1]
        spectrum = torch.fft.rfft(self._kernel[:, :tokens], n=2 * tokens)
        for state, u, out in self._parts(2 * tokens, x.detach().mT, z.mT):  # [., D, T]
            here = state[..., start : start + tokens]
            out.copy_(here + _cyclic(u.to(torch.float32), spectrum)[..., :tokens])
            here.copy_(u)

    def _advance(self, tokens: int) -> None:
        """Count them, and add the square that is then due to the sums."""
        if self._counter is not None:
            return
        self._position += tokens
        if self._position % self.block != 0:
            return
        square = square_at(self._position, self.block, self._taps, self.max_length)
        if square is None:
            return
        inputs, outputs, n = square
        size = len(inputs)
        for (state,) in self._parts(n):
            sums = _cyclic(state[..., inputs.start : inputs.stop], self._spectra[size])
            state[..., outputs.start : outputs.stop] += sums[..., size : size + len(outputs)]

    def _parts(self, n: int, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The state and others [B, ...], as many of B at once as transforms of length n may be."""
        rows = max(1, TOGETHER // (n * self._state.shape[1]))
        return zip(*(x.split(rows) for x in (self._state, *others)), strict=True)

    def _check_tokens(self, x: Tensor, named: str, wanted: tuple[int, ...], tokens: int) -> None:
        if x.shape != wanted:
            raise ArgumentError(
                f"wanted x {named} = {list(wanted)}, got {list(x.shape)}; batch and width are "
                "those of the decoder, step takes one token, prefill and append many"
            )
        if x.dtype not in DTYPES:
            raise ArgumentError(
                f"wanted x in float32, bfloat16 or float16, got {x.dtype}; convert it"
            )
        if x.device != self._state.device:
            raise ArgumentError(
                f"wanted x on {self._state.device}, as the kernel, got {x.device}; move one"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(
                "decoding has no gradient, and x requires one; use torch.no_grad() or x.detach()"
            )
        if self._counter is not None and tokens != 1:
            raise ArgumentError(
                f"wanted one token in a call that a CUDA graph captures, got {tokens}; call more "
                "outside of it"
            )
        if self._position + tokens > self.max_length:
            raise ArgumentError(
                f"wanted at most max_length = {self.max_length} tokens, got {tokens} more after "
                f"{self._position}; make a decoder with a larger max_length, or reset() this one"
            )


def _cyclic(x: Tensor, spectrum: Tensor) -> Tensor:
    """x [B, D, U] and the taps of a spectrum [D, U + 1], convolved in cycles of 2 U."""
    n = 2 * x.shape[-1]
    values = torch.fft.rfft(x, n=n)
    values *= spectrum
    found: Tensor = torch.fft.irfft(values, n=n)
    return found


def _check_kernel(kernel: Tensor, batch: int, max_length: int, block: int) -> None:
    if kernel.ndim != 2 or kernel.numel() == 0:
        raise ArgumentError(
            "wanted kernel [D, T_long] with at least one channel and one tap, got "
            f"{list(kernel.shape)}; a kernel has one row per channel of x"
        )
    if kernel.dtype not in DTYPES:
        raise ArgumentError(
            f"wanted kernel in float32, bfloat16 or float16, got {kernel.dtype}; convert it"
        )
    if batch < 1 or max_length < 1:
        raise ArgumentError(
            f"wanted batch >= 1 and max_length >= 1, got {batch} and {max_length}; they are the "
            "sequences decoded side by side, and the most tokens in one"
        )
    if block not in BLOCKS:
        raise ArgumentError(f"no block {block!r}; it is one of {', '.join(map(str, BLOCKS))}")
    if not _strip.runs_on(kernel.device):
        raise ArgumentError(
            f"decoding needs a GPU: wanted kernel on one, got {kernel.device}; move it, use "
            "chela_bench.reference.short_long_conv, or start Python with TRITON_INTERPRET=1"
        )
