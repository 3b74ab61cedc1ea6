"""Is it right? The implementation against the op's float64 oracle, on the very shape and dtype."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from chela_bench.bench import check
from chela_bench.bench.inputs import DTYPES, Inputs
from chela_bench.bench.job import Activity, Finished, Function, Job, Results, first
from chela_bench.bench.load import load
from chela_bench.bench.models import decode_window

_SMALL_BLOCKS = 64  # of 1 MiB, the largest that the caching allocator's small pool serves


def judge_first(job: Job, inputs: Inputs, columns: dict[str, Any]) -> None:
    """Before timing: freshly computed, in memory that reads as NaN until it is written."""
    with _poisoned_memory(job):
        _judge(job, inputs, lambda: job.results(inputs), columns, "compiling", when="")


def judge_again(job: Job, inputs: Inputs, call: Results, columns: dict[str, Any]) -> None:
    """After timing: fresh numbers of the other distribution in the timed tensors, the timed call.

    What remembers results, by shape or by tensor, is found out here. A `bwd` call keeps a forward
    pass of the old numbers, and a `decode` call their cache: there all is computed once more.
    """
    fresh = job.draw(seed=1, other=True)
    with torch.no_grad():
        for name, tensor in inputs.tensors.items():
            tensor.copy_(fresh.tensors[name])
    del fresh
    stale = job.case.direction in ("bwd", "decode")
    results = call if not stale else lambda: job.results(inputs)
    _judge(job, inputs, results, columns, "checking", when="after timing, on fresh inputs, ")


def _judge(
    job: Job,
    inputs: Inputs,
    results: Results,
    columns: dict[str, Any],
    activity: Activity,
    *,
    when: str,
) -> None:
    """Adds the errors to the columns; raises Finished("wrong") if one is above the budget."""
    case = job.case
    before = {name: tensor.detach().clone() for name, tensor in inputs.tensors.items()}
    job.bench.announce("build")  # the first call at this shape compiles and autotunes
    with job.bench.spending(activity):
        actual = [tensor.detach() for tensor in results()]
    for name, tensor in inputs.tensors.items():
        if not torch.equal(tensor.detach(), before[name]):
            raise Finished("wrong", f"{when}it changes its input {name}")
    job.bench.announce("check")
    exact_inputs = Inputs(before, inputs.kinds, inputs.arguments).to(torch.float64)
    del before
    budget = check.error_budget(
        case.dtype,
        roundings=job.op.roundings[case.direction],
        tokens=job.tokens,
        operands=job.impl.fp32_operands if case.dtype == "fp32" and job.bench.cuda else None,
    )
    columns["error_budget"] = budget
    if job.bench.cuda:
        torch.cuda.empty_cache()  # float64's blocks do not fit into what was kept for others
    try:
        with job.bench.spending("checking"):
            errors = _errors(job, actual, exact_inputs, when=when)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise Finished("skipped", f"{when}the float64 oracle does not fit: {error}") from error
    known: dict[str, float] = columns.setdefault("errors", {})
    for name, error_rel in errors.items():
        if math.isfinite(error_rel):
            known[name] = max(error_rel, known.get(name, 0.0))
    worst = max(errors, key=lambda name: errors[name])
    if all(map(math.isfinite, errors.values())):
        columns["error_rel"] = max(known.values())
    if not errors[worst] <= budget:
        size = f"off by {errors[worst]:.2e}" if math.isfinite(errors[worst]) else "not finite"
        raise Finished("wrong", f"{when}{worst} is {size}; budget {budget:.2e}")


def _errors(job: Job, actual: Sequence[Tensor], inputs: Inputs, *, when: str) -> dict[str, float]:
    """Error of the output and, with a backward, of every gradient, by name."""
    names: list[str] = ["o"]
    kinds: list[check.ErrorKind] = [job.op.output_kind]
    if job.gradients:
        names += [f"d{name}" for name in inputs.tensors]
        kinds += inputs.kinds.values()
    errors: dict[str, float] = {}
    exact = _oracle(job, inputs)
    for name, kind, got, wanted in zip(names, kinds, actual, exact, strict=True):
        if got.shape != wanted.shape or got.dtype != DTYPES[job.case.dtype]:
            raise Finished(
                "wrong",
                f"{when}{name} should be {list(wanted.shape)} {job.case.dtype}; "
                f"it is {list(got.shape)} {got.dtype}",
            )
        errors[name] = check.error_of(got, wanted, kind)
    return errors


def _oracle(job: Job, inputs: Inputs) -> Sequence[Tensor]:
    """Output and gradients in float64 by the op's oracle, of the same rounded inputs and do."""
    function: Function = load(job.op.oracle)
    options = {name: value for name, value in job.case.config.items() if name in job.op.options}
    if job.decodes:
        whole = functools.partial(function, **options)
        return [_stepped(whole, *inputs.arguments(inputs.tensors))]
    if not job.gradients:
        with torch.no_grad():
            return [first(function(*inputs.arguments(inputs.tensors), **options))]
    leaves = list(inputs.requires_grad_(True).tensors.values())
    output = first(function(*inputs.arguments(inputs.tensors), **options))
    gradient = job.output_gradient(output).to(torch.float64)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


@torch.no_grad()
def _stepped(function: Function, x: Tensor, *others: Any) -> Tensor:
    """Of the whole forward what steps compute. One sequence after another: the intermediate results
    of a batch need not fit in float64."""
    window = decode_window(x.shape[1])
    rows = (first(function(row, *others)) for row in x[:, : window.stop].split(1))
    return torch.cat([row[:, window.start :] for row in rows])


@contextlib.contextmanager
def _poisoned_memory(job: Job) -> Iterator[None]:
    """Memory that nobody wrote reads as NaN.

    torch fills every torch.empty with NaN in deterministic mode. Compiled code allocates past
    that, and would be compiled anew for the mode: for it, the free blocks of CUDA's caching
    allocator are filled with NaN instead, which reaches most of what it allocates.
    """
    if job.impl.compiled:
        if job.bench.cuda:
            _fill_free_blocks(job.bench.device)
        yield
        return
    torch.set_deterministic_debug_mode("warn")  # the other function imports the compiler: seconds
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "does not have a deterministic implementation"
            yield
    finally:
        torch.set_deterministic_debug_mode("default")


def _fill_free_blocks(device: torch.device) -> None:
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    blocks = [torch.full((free_bytes // 16,), math.nan, device=device)]
    blocks += [torch.full((1 << 18,), math.nan, device=device) for _ in range(_SMALL_BLOCKS)]
    blocks.clear()
