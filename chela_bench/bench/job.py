"""One case on one device: its inputs, its call, and what the worker has learnt so far."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from chela_bench.bench import timing
from chela_bench.bench.cases import Case, Session
from chela_bench.bench.inputs import DTYPES, Draw, Inputs, standard_normal
from chela_bench.bench.load import load
from chela_bench.bench.models import decode_window
from chela_bench.bench.ops import Impl, Op
from chela_bench.bench.tuning import Tunings
from chela_bench.profiles.nvml import Sampler
from chela_bench.records import Ceilings, Outcome, shape_label

Function = Callable[..., Any]
Results = Callable[[], Sequence[Tensor]]
Activity = Literal["compiling", "checking", "timing"]


class Finished(Exception):
    """The point is over before it has a time to show: an outcome other than ok, and why."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, reason


@dataclass
class Bench:
    """A device with what is known of it, and what has been learnt about implementations so far."""

    session: Session
    device: torch.device
    device_name: str  # "cpu" or the GPU's UUID, as it stands in every point
    l2_bytes: int
    ceilings: Ceilings
    sampler: Callable[[], Sampler]  # reads the GPU while a block runs
    announce: Callable[[str], None]  # tells the parent which phase begins
    timer: timing.EventTimer | None = None  # with --timer event, on a GPU
    evictor: timing.L2Evictor | None = None  # with --timer profiler and cold L2
    seconds_at: dict[tuple[str, ...], dict[int, float]] = field(default_factory=dict)
    host_ns: dict[tuple[str, ...], int] = field(default_factory=dict)
    tunings: Tunings = field(default_factory=Tunings)
    spent_s: dict[str, float] = field(default_factory=dict)  # of the case at hand, by activity

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @contextmanager
    def spending(self, activity: Activity) -> Iterator[None]:
        """Adds the block's wall time, device work included, to what the case spent on it."""
        begin = time.perf_counter()
        try:
            yield
            if self.cuda:
                torch.cuda.synchronize(self.device)
        finally:
            elapsed_s = time.perf_counter() - begin
            self.spent_s[activity] = self.spent_s.get(activity, 0.0) + elapsed_s


@dataclass
class Job:
    """One case, its op and implementation looked up."""

    bench: Bench
    case: Case
    op: Op
    impl: Impl
    function: Function

    @property
    def tokens(self) -> int:
        return self.case.shape["T"]

    @property
    def decodes(self) -> bool:
        """Whether a call is steps of one token each."""
        return self.case.direction == "decode"

    @property
    def gradients(self) -> bool:
        return self.case.direction in ("bwd", "fwdbwd")

    @property
    def growth(self) -> float:
        """p of time ~ T**p: what a step reads of a cache grows with T, not with its square."""
        return 1.0 if self.decodes else self.impl.growth

    @property
    def series(self) -> tuple[str, ...]:
        """All that identifies the case but its length."""
        dims = tuple(f"{k}{v}" for k, v in self.case.shape.items() if k != "T")
        config = tuple(f"{k}={v}" for k, v in sorted(self.case.config.items()))
        return (self.case.op, self.case.impl, self.case.direction, self.case.dtype, *dims, *config)

    @property
    def known_seconds(self) -> dict[int, float]:
        """Seconds of one call by length, as measured in this worker."""
        return self.bench.seconds_at.setdefault(self.series, {})

    def shape(self, tokens: int | None = None) -> dict[str, int]:
        return {**self.case.shape, "T": self.tokens if tokens is None else tokens}

    def tuned(self, tokens: int | None = None) -> AbstractContextManager[None]:
        """While at it, autotuners choose for the case's shape, or for that of another length."""
        return self.bench.tunings.at(f"{self.case.op}/{shape_label(self.shape(tokens))}")

    @contextmanager
    def at(self, tokens: int) -> Iterator[Results]:
        """A call at another length, compiled and tuned for it."""
        self.bench.announce("build")
        with self.tuned(tokens):
            inputs = self.draw(tokens=tokens)
            with self.bench.spending("compiling"):
                call = self.call(inputs)
                call()
            yield call

    def draw(self, *, tokens: int | None = None, seed: int = 0, other: bool = False) -> Inputs:
        """The case's inputs; `other` takes the distribution that is not timed."""
        distribution = self.bench.session.inputs
        if other:
            distribution = "mean1" if distribution == "randn" else "randn"
        make: Callable[[Draw], Inputs] = load(self.op.inputs)
        return make(
            Draw(
                self.shape(tokens),
                DTYPES[self.case.dtype],
                self.bench.device,
                self.bench.session.seed + seed,
                distribution,
            )
        )

    def output(self, inputs: Inputs) -> Tensor:
        return first(self.function(*inputs.arguments(inputs.tensors), **self.case.config))

    def output_gradient(self, like: Tensor) -> Tensor:
        """do: the same numbers for every implementation of one shape."""
        noise = standard_normal(like.shape, self.bench.session.seed + 7, self.bench.device)
        return noise.to(DTYPES[self.case.dtype])

    def call(self, inputs: Inputs) -> Results:
        """The timed call: `fwd` without autograd; `fwdbwd` forward and every input's gradient for
        a fixed do; `bwd` the gradients alone, of a forward run once here; `decode` the steps of
        `decode_window`, the same each time, after a prompt taken in once here."""
        if self.decodes:
            return self._decoding(inputs)
        if self.case.direction == "fwd":
            inputs.requires_grad_(False)

            def forward() -> Sequence[Tensor]:
                with torch.no_grad():
                    return [self.output(inputs)]

            return forward
        leaves = list(inputs.requires_grad_(True).tensors.values())
        if self.case.direction == "bwd":
            kept = self.output(inputs)
            kept_gradient = self.output_gradient(kept)
            return lambda: torch.autograd.grad(kept, leaves, kept_gradient, retain_graph=True)
        output_gradient = self.output_gradient(self.output(inputs))

        def forward_backward() -> Sequence[Tensor]:
            output = self.output(inputs)
            return [output, *torch.autograd.grad(output, leaves, output_gradient)]

        return forward_backward

    def results(self, inputs: Inputs) -> Sequence[Tensor]:
        """Output and, with a backward, every input's gradient, computed once. Of steps, their
        outputs [B, steps, D]."""
        if self.decodes:
            return [torch.stack(self._decoding(inputs)(), dim=1)]
        if not self.gradients:
            return self.call(inputs)()
        leaves = list(inputs.requires_grad_(True).tensors.values())
        output = self.output(inputs)
        return [output, *torch.autograd.grad(output, leaves, self.output_gradient(output))]

    def _decoding(self, inputs: Inputs) -> Decoding:
        inputs.requires_grad_(False)
        x, *others = inputs.arguments(inputs.tensors)
        window = decode_window(x.shape[1])
        begin: Function = load(self.impl.decoder or "")
        with torch.no_grad():
            prompt = x[:, : window.start]
            step, cache = begin(prompt, x.shape[1], *others, **self.case.config)
            tokens = x[:, window.start : window.stop].transpose(0, 1).contiguous().unbind()
        return Decoding(step, cache, tokens)


class Decoding(timing.Steps):
    """Steps from one cache, again and again: each call copies it, and takes the same tokens in."""

    def __init__(self, step: Function, cache: object, tokens: Sequence[Tensor]) -> None:
        super().__init__(self._rewind, self._next, len(tokens))
        self._function, self._begin, self._tokens = step, cache, tokens
        self._cache: object = None
        self._left: Iterator[Tensor] = iter(())

    def _rewind(self) -> None:
        self._cache = None  # two may not fit beside the one that is copied
        self._cache = copy.deepcopy(self._begin)
        self._left = iter(self._tokens)

    def _next(self) -> Tensor:
        with torch.no_grad():
            return first(self._function(next(self._left), self._cache))


def first(result: Any) -> Tensor:
    """An implementation returns o, or a tuple that begins with it."""
    output = result[0] if isinstance(result, tuple) and result else result
    if not isinstance(output, Tensor):
        raise Finished(
            "wrong",
            f"it returns {type(result).__name__}; wanted a tensor, or a tuple that begins with one",
        )
    return output
