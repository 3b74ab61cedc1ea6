"""Sequence lengths as people write them."""

from __future__ import annotations

import re

from chela_bench.errors import UsageError

LONGEST = 1 << 30  # tokens; beyond it a typo is likelier than a wish
_LENGTH = re.compile(r"([0-9]{1,10})([km]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_lengths(text: str) -> list[int]:
    """`1k..64k` doubles from the first to the last; `1k,3k,8k` lists. k = 1024, m = 1024^2."""
    if ".." in text:
        first_text, _, last_text = text.partition("..")
        first, last = _length(first_text, text), _length(last_text, text)
        if first > last:
            raise UsageError(f"--lens {text!r} runs backwards; write {last_text}..{first_text}")
        doublings = range((last // first).bit_length())
        return [first << doubling for doubling in doublings]
    return list(dict.fromkeys(_length(part, text) for part in text.split(",")))


def _length(part: str, whole: str) -> int:
    match = _LENGTH.fullmatch(part.strip())
    length = int(match[1]) * _UNITS[match[2].lower()] if match else 0
    if not 1 <= length <= LONGEST:
        raise UsageError(
            f"--lens {whole!r}: {part.strip()!r} is not a length from 1 to 1024m; "
            "write 1k..64k, or 1k,3k,8k (k = 1024)"
        )
    return length
