"""A step of decoding as one CUDA graph, whose launches cost the host no more than one.

    y, cache = layer.prefill(prompt)
    step = StepGraph(lambda x: layer.step(x, cache), x, [cache])        # x [B, D], any token's
    y_t = step(x_t)                                                     # as layer.step(x_t, cache)

A graph is the same launches again and again, and steps differ by their position alone: the kernels
captured here read it from memory. The squares of the convolution, due after every 64 tokens and of
sizes that depend on the position, are launched after the graph, as an eager step does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor

from chela_bench.errors import ArgumentError
from chela_bench.kernels.chela_decode import StateCache
from chela_bench.reference.chela_decode import ChelaCache

WARM_UPS = 2  # the first compiles and allocates what libraries keep


class StepGraph:
    """step(x) for one token of each sequence, captured once, replayed at every call.

    step: layer.step, block.step or a function of several, with all of `caches`, each of them in one
    step; x, of which only shape, dtype and device count, is what it will be called with. Between
    calls, prefill and eager steps may go on with the caches, and reset() them.

    It reads parameters where they were when it was captured: changes in place are seen, another
    place (.to, .half, a new Parameter) is not, so capture anew. Nor is anything else that `step`
    decides when it runs. It holds the caches and the memory of one step's intermediate tensors.
    Raises ArgumentError off a GPU, for a cache that is full, and for one of a layer computed by the
    reference, whose step is a forward of all tokens so far.
    """

    def __init__(
        self, step: Callable[[Tensor], Tensor], x: Tensor, caches: Sequence[ChelaCache]
    ) -> None:
        if not x.is_cuda:
            raise ArgumentError(
                f"wanted x on a GPU for a CUDA graph, got {x.device}; call the step itself"
            )
        self._caches = [cache for cache in caches if isinstance(cache, StateCache)]
        if not self._caches or len(self._caches) < len(caches):
            raise ArgumentError(
                "wanted one or more caches of layers that Triton computes, got "
                f"{', '.join(type(cache).__name__ for cache in caches) or 'none'}; what the "
                "reference computes has no step that a graph could repeat"
            )
        self._check_room()
        self._graph, self._x = torch.cuda.CUDAGraph(), x.detach().clone()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.device(x.device), torch.no_grad():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    with self._each(StateCache.unchanged):
                        step(self._x)
            torch.cuda.current_stream().wait_stream(stream)
            with self._each(StateCache.captured), torch.cuda.graph(self._graph):
                self._y = step(self._x)

    def __call__(self, x: Tensor) -> Tensor:
        """step(x), which joins the caches. Raises ArgumentError for another shape, dtype or device
        than it was captured with, and for a cache that is full."""
        wanted = self._x
        if (x.shape, x.dtype, x.device) != (wanted.shape, wanted.dtype, wanted.device):
            raise ArgumentError(
                f"wanted x {list(wanted.shape)} in {wanted.dtype} on {wanted.device}, as the graph "
                f"was captured with, got {list(x.shape)} in {x.dtype} on {x.device}; capture "
                "another"
            )
        self._check_room()
        with torch.no_grad():
            wanted.copy_(x)
            with self._each(StateCache.replay):
                self._graph.replay()
            return self._y.clone()

    def _check_room(self) -> None:
        for cache in self._caches:
            cache.check_room()

    @contextmanager
    def _each(
        self, context: Callable[[StateCache], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """This context of every cache."""
        with ExitStack() as stack:
            for cache in self._caches:
                stack.enter_context(context(cache))
            yield
