"""Time samples as a page carries them, until its script draws them."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_SAMPLES = 512  # of a point; of more, as many evenly spread


def written_samples(samples: Sequence[int]) -> str:
    """The least, then each one's excess over it in the order taken, in base 36: what the page's
    script reads. Of more than 512, 512 evenly spread."""
    step = max(1.0, len(samples) / _MOST_SAMPLES)
    kept = [samples[int(i * step)] for i in range(min(len(samples), _MOST_SAMPLES))]
    least = min(kept, default=0)
    return " ".join(_base_36(value) for value in (least, *(each - least for each in kept)))


def _base_36(value: int) -> str:
    digits = ""
    while value or not digits:
        value, digit = divmod(value, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits
