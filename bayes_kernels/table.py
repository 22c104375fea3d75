"""Tables for terminals, Markdown and pages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from . import html


class Table(NamedTuple):
    """Headings and rows of cells.

    Attributes:
        title: The line above the table.
        headings: Of all columns.
        rows: Cells; a row may be short.
        left: How many columns are words, from the left; the others are numbers.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def text(self) -> str:
        """Aligned columns below the title."""
        lines = [
            "  ".join(row).rstrip() for row in _aligned([self.headings, *self.rows], self.left)
        ]
        return "\n".join([*([self.title] if self.title else ()), *lines]) + "\n"

    def markdown(self) -> str:
        """The table in Markdown, without its title; columns are aligned, so that terminals can show it."""
        rows = [[cell.replace("|", "/") for cell in row] for row in (self.headings, *self.rows)]
        heading, *rest = _aligned(rows, self.left, 3)  # fewer dashes are no rule
        rule = [("-" * len(cell))[:-1] + "-:"[at >= self.left] for at, cell in enumerate(heading)]
        return "".join(f"| {' | '.join(row)} |\n" for row in (heading, rule, *rest))

    def html(self) -> str:
        """The table in HTML, its title above it."""
        return html.table(self.headings, self.rows, left=self.left, caption=self.title)


def _aligned(rows: Sequence[Sequence[str]], left: int, least: int = 0) -> list[tuple[str, ...]]:
    """Rows with cells of equal width in each column: words to the left, numbers to the right."""
    columns: list[list[str]] = []
    for at, column in enumerate(zip_longest(*rows, fillvalue="")):
        # The last cell of a short row, a message, may stand out.
        message = {row for row, cells in enumerate(rows) if at + 1 == len(cells) < len(rows[0])}
        width = max(least, *(len(cell) for row, cell in enumerate(column) if row not in message))
        columns.append([cell.ljust(width) if at < left else cell.rjust(width) for cell in column])
    return list(zip(*columns, strict=True))


def shorten(text: str, length: int = 60) -> str:
    """The text on one line, cut where it is longer."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"
