"""What a causal CHELA layer keeps of sequences between calls of `prefill` and `step`."""

import weakref
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from chela_bench.errors import ArgumentError


class ChelaCache(ABC):
    """What one ChelaLayer knows of `batch` sequences side by side, `position` tokens of each.

    `ChelaLayer.prefill` makes one, `prefill` and `step` go on with it; no other layer can. It holds
    nothing of the layer's but what its class says, and no padding: all sequences are equally long.
    copy.deepcopy(cache) is another for the same layer, from which the same sequences go on.
    """

    def __init__(self, layer: nn.Module, batch: int, device: torch.device) -> None:
        self._layer = weakref.ref(layer)
        self.batch, self.device = batch, device

    def is_of(self, layer: nn.Module) -> bool:
        """Whether this layer made it."""
        return self._layer() is layer

    @property
    @abstractmethod
    def position(self) -> int:
        """Tokens so far, of each sequence."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of what it holds."""

    @abstractmethod
    def reset(self) -> None:
        """Back to the start of sequences."""


class HistoryCache(ChelaCache):
    """All tokens so far: a step computes the whole layer anew, in O(T).

    tokens      [B, position, D] in the dtype of x
    nbytes      B * position * D * itemsize
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        """x [B, T, D], none of which it takes in."""
        super().__init__(layer, x.shape[0], x.device)
        self.tokens = x.new_empty(x.shape[0], 0, x.shape[2])

    @property
    def position(self) -> int:
        return self.tokens.shape[1]

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes

    def reset(self) -> None:
        self.tokens = self.tokens[:, :0].clone()


def check_decoding(layer: nn.Module, x: Tensor, like: Tensor, cache: ChelaCache | None) -> None:
    """That x fits a layer whose weights are like `like`, and its cache.

    The rest of what `prefill` and `step` refuse, besides shapes.
    """
    if cache is not None and not cache.is_of(layer):
        raise ArgumentError(
            "wanted the cache that this layer's prefill returned, got another layer's; keep one "
            "for each layer"
        )
    if cache is not None and x.shape[0] != cache.batch:
        raise ArgumentError(
            f"wanted x of B = {cache.batch} sequences, as its cache, got {x.shape[0]}; prefill "
            "others into a cache of their own"
        )
    devices = [like.device] if cache is None else [like.device, cache.device]
    if any(device != x.device for device in devices):
        raise ArgumentError(
            f"wanted x on {' and '.join(map(str, devices))}, as layer and cache, got {x.device}; "
            "move x, or prefill anew after moving the layer"
        )
    if x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ArgumentError(
            f"wanted x in {like.dtype}, as the layer, got {x.dtype}; convert one of them"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            "decoding has no gradient, and x requires one; use torch.no_grad() or x.detach()"
        )
