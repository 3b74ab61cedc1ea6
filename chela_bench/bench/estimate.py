"""How long will a call take? Answered from other lengths, before the length itself is tried."""

from __future__ import annotations

import torch

from chela_bench.bench import timing
from chela_bench.bench.job import Finished, Job

PROBE_STEP = 16  # a length is estimated from one PROBE_STEP times shorter
SHORTEST_PROBE = 1024  # tokens; up to here nothing is estimated


def refuse_if_too_long(job: Job) -> None:
    """Raises Finished("skipped") if a single call is estimated above the limit."""
    limit_s = job.bench.session.limits.call_s
    estimate_s = _estimated_seconds(job, job.tokens)
    if estimate_s is not None and estimate_s > limit_s:
        raise Finished("skipped", f"estimated {estimate_s:.3g} s > limit {limit_s:g} s")


def _estimated_seconds(job: Job, tokens: int) -> float | None:
    """Seconds of one call at `tokens`, from another length already run or a shorter one run now.

    Nothing is estimated (None), and the length simply run, up to SHORTEST_PROBE tokens, and where
    the implementation refuses the shorter length.
    """
    if tokens <= SHORTEST_PROBE:
        return None
    known, limit_s = job.known_seconds, job.bench.session.limits.call_s
    longer = min((length for length in known if length > tokens), default=None)
    if longer is not None and known[longer] <= limit_s:
        return known[longer]
    shorter = max((length for length in known if length <= tokens), default=0)
    if shorter * PROBE_STEP >= tokens:
        return _grown(job, known[shorter], shorter, tokens)
    probe = max(SHORTEST_PROBE, tokens // PROBE_STEP)
    estimate_s = _estimated_seconds(job, probe)
    if estimate_s is not None and estimate_s > limit_s:
        return _grown(job, estimate_s, probe, tokens)
    probed_s = _probed_seconds(job, probe)
    if probed_s is None:
        return None
    known[probe] = probed_s
    return _grown(job, probed_s, probe, tokens)


def _grown(job: Job, seconds: float, shorter: int, tokens: int) -> float:
    growth: float = (tokens / shorter) ** job.growth
    return seconds * growth


def _probed_seconds(job: Job, tokens: int) -> float | None:
    try:
        with job.at(tokens) as call, job.bench.spending("timing"):
            return timing.seconds_of(call)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise Finished("oom", f"out of memory already at T = {tokens}: {error}") from error
    except Exception:  # it may take the length asked for all the same: that decides
        return None
