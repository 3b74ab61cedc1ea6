"""The commands and files that a page of documentation shows, as a reader would take them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OUTPUT = "text"  # a block that shows what a command printed


class Block(NamedTuple):
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that it is, if its first line is a comment that names one."""
        named = re.match(r"# ([\w./-]+\.\w+)\n", self.text)
        return named[1] if named else None


class Command(NamedTuple):
    line: str
    exit_code: int


def blocks(path: Path) -> Iterator[Block]:
    """Every fenced block, in lists too, and every indented one, which is a shell's; in order."""
    fence, margin, held = None, 0, []
    indented: list[str] = []
    for line in [*path.read_text().splitlines(), ""]:
        opens = re.match(r"( *)```(\w*)", line)
        if fence is not None:
            if opens and not opens[2]:
                yield Block(fence, "\n".join(held) + "\n")
                fence, held = None, []
            else:
                held.append(line[margin:])
        elif line.startswith("    ") and opens is None:
            indented.append(line[4:])
        else:
            if indented:
                yield Block("sh", "\n".join(indented) + "\n")
                indented = []
            if opens:
                fence, margin = opens[2], len(opens[1])
    if fence is not None:
        raise ValueError(f"{path}: a fence is opened and not closed")


def commands(text: str) -> Iterator[Command]:
    """The lines of a shell block without comments; `# exits with 3` is what such a line does."""
    for line in text.replace("\\\n", " ").splitlines():
        bare, _, comment = line.partition(" #")
        if not bare.strip() or bare.lstrip().startswith("#"):
            continue
        code = re.search(r"exits with (\d+)", comment)
        yield Command(" ".join(bare.split()), int(code[1]) if code else 0)
