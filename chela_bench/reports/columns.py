"""Tables for a terminal: as many columns as fit its width, the rest in further tables below."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Column = tuple[str, Sequence[Text]]  # its name and cells

_GAP = 2  # characters between columns
_LONGEST_NAME = 18  # a longer one is folded


def line(text: str, style: str = "") -> Text:
    return Text(text, style, overflow="fold")


def indented(text: str, style: str = "") -> RenderableType:
    """By two, the lines that it is wrapped into too."""
    return Padding.indent(line(text, style), 2)


def tables(
    leading: Sequence[Column],
    columns: Sequence[Column],
    width: int,
    *,
    repeated: int = 1,
    words: int = 0,
) -> Iterator[RenderableType]:
    """Leading columns and then the others, cut where the width ends; every table repeats the first
    `repeated` of the leading ones. Of the leading, the last `words` are no numbers."""
    waiting = list(columns)
    while waiting:
        block, left = leading, room(leading, width)
        while waiting and (left >= column_width(*waiting[0]) or block is leading):
            left -= column_width(*waiting[0]) + _GAP
            block = [*block, waiting.pop(0)]
        yield table(block, width, left=range(1, 1 + words))
        leading = leading[:repeated]
        if waiting:
            yield Text()


def room(columns: Sequence[Column], width: int) -> int:
    """What is left beside the columns."""
    return width - sum(column_width(*column) + _GAP for column in columns)


def column_width(name: str, cells: Sequence[Text]) -> int:
    return max(min(Text(name).cell_len, _LONGEST_NAME), *(cell.cell_len for cell in cells))


def table(columns: Sequence[Column], width: int, *, left: Container[int] = ()) -> Table:
    """Columns of numbers; those at `left` are words."""
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), highlight=False
    )
    fits = sum(column_width(*column) + _GAP for column in columns) - _GAP <= width
    for number, (name, cells) in enumerate(columns):
        table.add_column(
            Text(name, overflow="fold"),
            justify="left" if number in left else "right",
            vertical="bottom",
            overflow="fold",
            width=column_width(name, cells) if fits else None,
        )
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table
